"""Data-Free Adversarial Distillation (DFAD), arXiv 1912.11006, with its RANDOM baseline.

A generator looks for inputs on which student and teacher disagree; the student then learns to agree on them:

    min over S, max over G:  D(T, S; G) = E_z [ 1/n || T(G(z)) - S(G(z)) ||_1 ],  z ~ N(0, I).

One outer iteration is k imitation steps of the student, each on fresh noise, then one generation step.
ZSKT (arXiv 1905.09768) published a similar game first, with a KL discrepancy.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import models
from ..checking import common_classes
from ..errors import InputError, unknown
from ..losses import IMITATION, log_compressed, mae
from ..models.normalize import pixel_statistics
from ..runtime import Runtime
from ..training.budget import Budget
from ..training.modes import evaluating
from ..training.players import (
    Resumable,
    adam,
    check_positive,
    freeze,
    in_compute_type,
    no_weight_gradients,
    recordable,
    sgd,
    update,
)
from ..training.replay import Replay
from ..training.schedules import cosine, drops, set_lr


@dataclass(frozen=True)
class Settings:
    """The hyper-parameters of one run; defaults are those of the authors' CIFAR script, without its two drops of the
    learning rates (see `milestones`).

    Attributes:
        latent_dim: n_z, length of the noise vector.
        batch_size: B, images per step. The last layer of generator A normalises over the batch: keep B >= 64.
        k: imitation steps per generation step.
        loss: discrepancy of both stages: "MAE" (the paper's), "MSE" or "KL" (its ablation).
        log_generator_loss: generator minimises -log(1 + D) in place of -D (the paper's segmentation runs).
        lr_student, momentum, weight_decay: SGD of the student.
        lr_generator: Adam of the generator, default betas.
        milestones: outer iterations at which both learning rates fall by `drop_factor`.
        n_updates: student updates over which a cosine, besides any milestones, takes both learning rates to 0, as
            in the harness of the other methods; 0 is none.
        generator_steps: generation steps per outer iteration; 0 is the RANDOM baseline.
        student_trains_in_generation: the student's batch-norm stays in train mode in the generation stage, as in
            the authors' code; False puts it into eval mode there.
        ngf: width of the generator that :meth:`DFAD.for_images` builds.
    """

    latent_dim: int = 256
    batch_size: int = 256
    k: int = 5
    loss: str = "MAE"
    log_generator_loss: bool = False
    lr_student: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    lr_generator: float = 1e-3
    milestones: tuple[int, ...] = ()
    drop_factor: float = 0.1
    n_updates: int = 0
    generator_steps: int = 1
    student_trains_in_generation: bool = True
    ngf: int = 64

    def __post_init__(self) -> None:
        check_positive(self, "latent_dim", "k", "lr_student", "lr_generator", "drop_factor")
        if self.batch_size < 2:
            raise InputError(f"batch_size must be at least 2 (batch normalisation), not {self.batch_size}")
        if self.loss not in IMITATION:
            raise unknown("loss", self.loss, IMITATION)


PAPER_MNIST: dict[str, Any] = {"latent_dim": 100, "batch_size": 512, "lr_student": 0.01, "weight_decay": 1e-4}
"""The authors' settings for MNIST, as changes of the defaults."""

# Ours, chosen on held-out images; of the digits, loss and k too: with the paper's MAE and k = 5 the student learns
# no more there than from the untrained generator.
PRESETS: dict[str, dict[str, Any]] = {
    "digits": {
        "loss": "KL", "k": 1, "latent_dim": 32, "ngf": 16, "batch_size": 64, "lr_student": 0.2, "weight_decay": 1e-4,
    },
    "mnist": {
        "latent_dim": 100, "ngf": 16, "batch_size": 64, "lr_student": 0.02, "lr_generator": 3e-3,
        "weight_decay": 1e-4, "k": 2,
    },
    "cifar10": {},
}  # fmt: skip


def imitation_loss(student: Tensor, teacher: Tensor, settings: Settings) -> Tensor:
    """L_IM = D(T, S; G), what the student descends.

    Args:
        student, teacher: logits [B, C] or [B, C, H, W] of the two networks on one generated batch.
    """
    return IMITATION[settings.loss](student, teacher)


def generation_loss(student: Tensor, teacher: Tensor, settings: Settings) -> Tensor:
    """L_GE = -D(T, S; G), or -log(1 + D) for segmentation, what the generator descends.

    Args:
        student, teacher: logits [B, C] or [B, C, H, W] of the two networks on one generated batch.
    """
    discrepancy = IMITATION[settings.loss](student, teacher)
    return -log_compressed(discrepancy) if settings.log_generator_loss else -discrepancy


class DFAD(Resumable):
    """The game, one outer iteration per :meth:`step`.

    Args:
        teacher: images [B, C, H, W] -> logits; it is frozen here and nothing of it ever changes.
        student: the same interface, any architecture.
        generator: noise [B, latent_dim] -> images in the teacher's input space.
        runtime: where and how to compute; the players are moved there.

    Attributes:
        steps: outer iterations done.
        budget: what has been spent.
    """

    data_free: ClassVar[bool] = True
    PARTS: tuple[str, ...] = (
        "student",
        "generator",
        "student_optimizer",
        "generator_optimizer",
        "student_scaler",
        "generator_scaler",
        "noise",
        "steps",
        "budget",
    )

    def __init__(
        self, teacher: nn.Module, student: nn.Module, generator: nn.Module, settings: Settings, runtime: Runtime
    ) -> None:
        self.settings, self.runtime = settings, runtime
        self.teacher = in_compute_type(freeze(runtime.prepare(teacher)), runtime)
        self.student = runtime.prepare(student)
        self.student.train()
        self.generator = runtime.prepare(generator).train()
        self.student_optimizer = recordable(
            sgd(self.student, settings.lr_student, settings.weight_decay, settings.momentum), runtime
        )
        self.generator_optimizer = recordable(adam(self.generator, settings.lr_generator), runtime)
        self.student_scaler, self.generator_scaler = runtime.scaler(), runtime.scaler()
        self.noise = runtime.stream("dfad noise")
        self.steps = 0
        self.budget = Budget()
        self.imitation = Replay(self.imitate, runtime, [self.noise])
        self.generation = Replay(self.generate, runtime, [self.noise])

    @classmethod
    def for_images(
        cls, teacher: nn.Module, student: nn.Module, image_shape: Sequence[int], settings: Settings, runtime: Runtime
    ) -> DFAD:
        """The game with a generator A of its own, made for the pixel statistics that the teacher normalises with.

        Where the teacher has no layer `Normalize` that tells them, mean 0.5 and std 0.25 are taken.

        Args:
            image_shape: (C, H, W).

        Raises:
            InputError: see :func:`~dfkd_lib.checking.common_classes`.
        """
        channels, height, width = image_shape
        mean, std = pixel_statistics(teacher, channels)
        generator = models.build_generator(
            "generator_a", latent_dim=settings.latent_dim, image_shape=(channels, height, width),
            mean=mean, std=std, ngf=settings.ngf,
        )  # fmt: skip
        method = cls(teacher, student, generator, settings, runtime)
        common_classes(method.teacher, method.student, image_shape, runtime, dense=True)
        return method

    def step(self) -> dict[str, Tensor]:
        """k imitation steps, then the generation step.

        Returns:
            "discrepancy": mean of the k imitation losses; "relative discrepancy": mean |S(x) - T(x)| over mean
            |T(x)|, comparable between losses; "generator loss", unless the generator does not play. Detached
            scalars on the device.
        """
        self.set_learning_rates()
        with self.budget.distillation(self.runtime.device):
            imitation = torch.stack([torch.stack(self.imitation()) for _ in range(self.settings.k)])
        discrepancy, relative = imitation.mean(0)
        metrics = {"discrepancy": discrepancy, "relative discrepancy": relative}
        with self.budget.synthesis(self.runtime.device):
            for _ in range(self.settings.generator_steps):
                metrics["generator loss"] = self.generation()
        self.steps += 1
        self.budget.student_updates += self.settings.k
        self.budget.images += self.settings.k * self.settings.batch_size
        self.budget.teacher_passes += (self.settings.k + self.settings.generator_steps) * self.settings.batch_size
        return metrics

    def set_learning_rates(self) -> None:
        """Those of this outer iteration."""
        settings = self.settings
        factor = drops(self.steps, settings.milestones, settings.drop_factor)
        if settings.n_updates:
            factor *= cosine(min(self.budget.student_updates, settings.n_updates), settings.n_updates)
        set_lr(self.student_optimizer, settings.lr_student * factor)
        set_lr(self.generator_optimizer, settings.lr_generator * factor)

    def imitate(self) -> tuple[Tensor, Tensor]:
        """One student step on fresh fakes; the generator stays in train mode but does not learn.

        Returns:
            L_IM, and mean |S(x) - T(x)| over mean |T(x)|; both detached.
        """
        with self.runtime.autocast():
            with torch.no_grad():
                x = self.generator(self.sample_noise())
                t = self.look(x)
            s = self.student(x).to(self.runtime.dtype)
            loss = imitation_loss(s, t, self.settings)
        update(self.student_optimizer, loss, self.student_scaler)
        return loss.detach(), mae(s.detach(), t) / t.abs().mean()

    def generate(self) -> Tensor:
        """One generator step through both networks, neither of which learns; returns L_GE, detached."""
        self.student.train(self.settings.student_trains_in_generation)
        with no_weight_gradients(self.student):
            with self.runtime.autocast():
                x = self.generator(self.sample_noise())
                s = self.student(x).to(self.runtime.dtype)
                t = self.look(x)
                loss = generation_loss(s, t, self.settings)
            update(self.generator_optimizer, loss, self.generator_scaler)
        self.student.train()
        return loss.detach()

    def look(self, x: Tensor) -> Tensor:
        """The teacher's logits on x, in full precision."""
        return self.teacher(x).to(self.runtime.dtype)

    def sample_noise(self, n: int | None = None) -> Tensor:
        """Fresh z ~ N(0, I), [n, latent_dim]; n defaults to the batch size."""
        shape = (n or self.settings.batch_size, self.settings.latent_dim)
        return torch.randn(shape, generator=self.noise, device=self.runtime.device, dtype=self.runtime.dtype)

    def watch(self, n: int = 16) -> dict[str, Tensor]:
        """What the generator makes of the same noise each time it is called, and what the networks say to it.

        The batch statistics are those of training, on a copy, so that watching changes nothing.

        Returns:
            "images" [n, C, H, W]; "teacher" and "student", predicted classes [n] or [n, H, W].
        """
        z = torch.randn(
            (self.settings.batch_size, self.settings.latent_dim),
            generator=self.runtime.stream("dfad watch"),
            device=self.runtime.device,
            dtype=self.runtime.dtype,
        )
        with evaluating(self.student), self.runtime.autocast():
            x = copy.deepcopy(self.generator)(z)[:n]
            opinions = {"teacher": self.teacher(x).argmax(1), "student": self.student(x).argmax(1)}
        return {"images": x.to(self.runtime.dtype), **opinions}


def gradient_norms(
    teacher: nn.Module, student: nn.Module, generator: nn.Module, z: Tensor, gaps: Sequence[float]
) -> list[dict[str, Any]]:
    """How strongly each loss pulls on student and generator as the student nears the teacher; nothing is trained.

    The student's logits are moved towards the teacher's, s = t + gap * (S(x) - T(x)), x = G(z): gap 1 is the
    student as it is, gap 0 perfect imitation.

    Args:
        z: noise [B, latent_dim].
        gaps: shares of the present disagreement, > 0.

    Returns:
        One row per gap and loss: "gap", "loss" (name), "student": Euclidean norm of the gradient of L_IM with
        respect to the logits s, "generator": norm of the gradient of L_GE over all weights of the generator.
    """
    weights = [p for p in generator.parameters() if p.requires_grad]
    rows = []
    for gap in gaps:
        for name, loss in IMITATION.items():
            x = generator(z)
            t, s = teacher(x), student(x)
            s = t + gap * (s - t)
            apart = s.detach().requires_grad_()
            (at_logits,) = torch.autograd.grad(loss(apart, t.detach()), apart)
            at_weights = torch.autograd.grad(loss(s, t), weights)
            norm = torch.stack([g.norm() for g in at_weights]).norm()
            rows.append({"gap": gap, "loss": name, "student": float(at_logits.norm()), "generator": float(norm)})
    return rows
