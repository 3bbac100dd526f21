"""Mosaicking to Distill: Knowledge Distillation from Out-of-Domain Data (MosaicKD), arXiv 2110.15094.

The teacher's domain is out of reach, and the images at hand show other things. What the two share is local: edges,
textures, parts. A generator re-assembles such patches into images that the teacher recognises. Four players:

    D tells patches of G(z) from patches of the images at hand,
    G makes images whose patches pass D, to which T gives confident and balanced answers and S wrong ones,
    S imitates T on images of G and on the images at hand,
    T never changes.

Without D and without images it is a data-free game; without G it is distillation on the images at hand.
"""

from __future__ import annotations

import copy
import math
from contextlib import ExitStack
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import losses
from ..data import ImageSet, crop_flip, minibatches
from ..errors import InputError, unknown
from ..runtime import Runtime
from ..training.budget import Budget
from ..training.modes import evaluating
from ..training.players import Resumable, adam, check_positive, freeze, no_weight_gradients, sgd, update
from ..training.schedules import cosine, set_lr

REDUCTIONS = ("sum", "mean")


@dataclass(frozen=True)
class Settings:
    """The hyper-parameters of one run; defaults are those of the authors' command for CIFAR-10.

    Attributes:
        latent_dim: length of the noise vector.
        batch_size: B, images of D's real batch, of the generator, and of each half of the student's batch.
        kd_steps: student updates per outer iteration.
        n_steps: outer iterations over which cosines take all learning rates to 0; 0 keeps them constant.
        loc, align, adv, balance: weights of the generator's terms; loc also weighs the discriminator's loss.
        reduction: over the patches of an image, "sum" (the authors' code: an image with more patches weighs more)
            or "mean".
        temperature: tau of the student's loss; the generator's is 1 always.
        lr_student, momentum, weight_decay: SGD of the student.
        lr_generator, lr_discriminator: Adam, betas 0.5 and 0.999.
        pad, flip: augmentation of the real images of the student's batch; D's are not augmented.
        student_trains_in_generation: the student's batch-norm stays in train mode in the generator's step, as in
            the authors' code; False puts it into eval mode there.
    """

    latent_dim: int = 100
    batch_size: int = 256
    kd_steps: int = 5
    n_steps: int = 0
    loc: float = 1.0
    align: float = 1.0
    adv: float = 1.0
    balance: float = 10.0
    reduction: str = "sum"
    temperature: float = 1.0
    lr_student: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4
    lr_generator: float = 1e-3
    lr_discriminator: float = 1e-3
    pad: int = 4
    flip: bool = True
    student_trains_in_generation: bool = True

    def __post_init__(self) -> None:
        check_positive(self, "latent_dim", "kd_steps", "temperature", "lr_student", "lr_generator", "lr_discriminator")
        if self.batch_size < 2:
            raise InputError(f"batch_size must be at least 2 (batch normalisation), not {self.batch_size}")
        if self.reduction not in REDUCTIONS:
            raise unknown("reduction", self.reduction, REDUCTIONS)
        for name in ("n_steps", "loc", "align", "adv", "balance", "pad"):
            if not getattr(self, name) >= 0:
                raise InputError(f"{name} must be 0 or more, not {getattr(self, name)!r}")


def over_patches(per_patch: Tensor, reduction: str) -> Tensor:
    """Mean over images of the sum, or of the mean, over patches.

    Args:
        per_patch: [B, 1, h, w].
    """
    per_image = per_patch.flatten(1)
    return (per_image.sum(1) if reduction == "sum" else per_image.mean(1)).mean()


def discriminator_loss(fake: Tensor, real: Tensor, reduction: str = "sum") -> Tensor:
    """L_D: binary cross-entropy of every patch, half for either kind; K ln 2 when all K logits are 0.

    Args:
        fake, real: patch logits [B, 1, h, w], positive for real.
    """
    return (over_patches(F.softplus(fake), reduction) + over_patches(F.softplus(-real), reduction)) / 2


def local_loss(fake: Tensor, reduction: str = "sum") -> Tensor:
    """L_local, Eq. 3: small when every patch passes for real (non-saturating).

    Args:
        fake: patch logits [B, 1, h, w].

    Returns:
        Scalar >= 0; K ln 2 when all K logits are 0.
    """
    return over_patches(F.softplus(-fake), reduction)


def entropies(logits: Tensor) -> Tensor:
    """-sum_c p_c ln p_c at every position, from the log-softmax, so that a certain belief gives 0 and never NaN.

    Args:
        logits: [B, C] or [B, C, H, W].

    Returns:
        [B] or [B, H, W], each in [0, ln C].
    """
    log_p = F.log_softmax(logits, dim=1)
    return -(log_p.exp() * log_p).sum(1)


def alignment_loss(teacher: Tensor) -> Tensor:
    """L_align, Eq. 4: mean entropy of the teacher's belief over images, for segmentation over pixels too.

    Args:
        teacher: logits [B, C] or [B, C, H, W].

    Returns:
        Scalar in [0, ln C].
    """
    return entropies(teacher).mean()


def balance_loss(teacher: Tensor) -> Tensor:
    """L_bal: sum_c q_c log2 q_c of the mean belief q over batch and pixels; least when all classes come up alike.

    Args:
        teacher: logits [B, C] or [B, C, H, W].

    Returns:
        Scalar in [-log2 C, 0].
    """
    return losses.class_balance(teacher.movedim(1, -1).flatten(0, -2)) / math.log(2)


def adversarial_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """L_adv, Eq. 7: minus the divergence that the student is to lower, at temperature 1.

    Args:
        student, teacher: logits [B, C] or [B, C, H, W]; gradients flow through both.

    Returns:
        Scalar <= 0.
    """
    return -losses.kl(student, teacher)


class MosaicKD(Resumable):
    """The four-player game, one outer iteration per :meth:`step`; a player that is None does not play.

    Args:
        teacher: images [B, C, H, W] in [0, 1] -> logits; frozen here, nothing of it ever changes.
        student: the same interface, any architecture.
        generator: noise [B, latent_dim] -> images in [0, 1]. Without one, the student learns from `images` alone.
        discriminator: images in [0, 1] -> patch logits [B, 1, h, w]. Without one, or with loc 0, patches are free.
        images: out-of-domain images of the generator's size. Without any there can be no discriminator.

    Attributes:
        steps: outer iterations done.
        budget: what has been spent.

    Raises:
        InputError: players that cannot play together.
    """

    data_free: ClassVar[bool] = False
    PARTS: tuple[str, ...] = (
        "student", "student_optimizer", "student_scaler", "noise", "augmentation", "steps", "budget",
    )  # fmt: skip

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        generator: nn.Module | None,
        discriminator: nn.Module | None,
        images: ImageSet | None,
        settings: Settings,
        runtime: Runtime,
    ) -> None:
        if teacher is student:
            raise InputError("teacher and student are the same network; give the student its own")
        if images is None and (discriminator is not None or generator is None):
            raise InputError("without out-of-domain images there must be a generator and no discriminator; give images")
        if discriminator is not None and generator is None:
            raise InputError("without a generator the discriminator has nothing to judge; leave it out")
        self.settings, self.runtime = settings, runtime
        self.teacher = freeze(runtime.prepare(teacher))
        self.student = runtime.prepare(student).train()
        self.student_optimizer = sgd(self.student, settings.lr_student, settings.weight_decay, settings.momentum)
        self.student_scaler = runtime.scaler()
        self.noise, self.augmentation = runtime.stream("mosaickd noise"), runtime.stream("mosaickd augmentation")
        self.generator = None if generator is None else runtime.prepare(generator).train()
        if self.generator is not None:
            self.generator_optimizer = adam(self.generator, settings.lr_generator, (0.5, 0.999))
            self.generator_scaler = runtime.scaler()
            self.PARTS += ("generator", "generator_optimizer", "generator_scaler")
        self.discriminator = None if discriminator is None else runtime.prepare(discriminator).train()
        if self.discriminator is not None:
            self.discriminator_optimizer = adam(self.discriminator, settings.lr_discriminator, (0.5, 0.999))
            self.discriminator_scaler = runtime.scaler()
            self.PARTS += ("discriminator", "discriminator_optimizer", "discriminator_scaler")
        self.images = None if images is None else images.to(runtime.device)
        if images is not None:
            # Two orders of visiting: the discriminator's and the student's.
            self.judged = minibatches(len(images), settings.batch_size, seed=runtime.seed, device=runtime.device)
            self.shown = minibatches(
                len(images), settings.batch_size, seed=runtime.seed + 1_000_003, device=runtime.device
            )
        self.steps = 0
        self.budget = Budget()

    def step(self) -> dict[str, Tensor]:
        """The discriminator's step, the generator's, then `kd_steps` of the student's.

        Returns:
            "discriminator loss"; "local", "align", "adversarial" and "balance", the generator's terms before they
            are weighted; "distillation loss", the mean over the student's steps. Terms of players that do not play
            are absent. Detached scalars on the device.
        """
        self.set_learning_rates()
        metrics: dict[str, Tensor] = {}
        if self.generator is not None:
            with self.budget.synthesis(self.runtime.device):
                # One pass of the generator serves both steps.
                with self.runtime.autocast():
                    fake = self.generator(self.sample_noise()).to(self.runtime.dtype)
                if self.discriminator is not None and self.settings.loc:
                    metrics["discriminator loss"] = self.discriminate(fake.detach())
                metrics |= self.generate(fake)
        with self.budget.distillation(self.runtime.device):
            imitated = [self.imitate() for _ in range(self.settings.kd_steps)]
        metrics["distillation loss"] = torch.stack(imitated).mean()
        self.steps += 1
        return metrics

    def set_learning_rates(self) -> None:
        """Those of this outer iteration."""
        settings = self.settings
        factor = cosine(min(self.steps, settings.n_steps), settings.n_steps) if settings.n_steps else 1.0
        set_lr(self.student_optimizer, settings.lr_student * factor)
        if self.generator is not None:
            set_lr(self.generator_optimizer, settings.lr_generator * factor)
        if self.discriminator is not None:
            set_lr(self.discriminator_optimizer, settings.lr_discriminator * factor)

    def discriminate(self, fake: Tensor) -> Tensor:
        """The discriminator's step on generated images and on as many real ones, in two batches; returns L_D."""
        assert self.discriminator is not None and self.images is not None
        real, _ = self.images.batch(self.judged(self.steps))
        with self.runtime.autocast():
            on_fake = self.discriminator(fake).to(self.runtime.dtype)
            on_real = self.discriminator(self.runtime.images(real)).to(self.runtime.dtype)
        loss = discriminator_loss(on_fake, on_real, self.settings.reduction)
        update(self.discriminator_optimizer, self.settings.loc * loss, self.discriminator_scaler)
        return loss.detach()

    def generate(self, fake: Tensor) -> dict[str, Tensor]:
        """The generator's step, through the updated D, through T and through S; none of these learns.

        Args:
            fake: images of the generator, with their graph.
        """
        settings = self.settings
        judge = self.discriminator if settings.loc else None
        self.student.train(settings.student_trains_in_generation)
        with ExitStack() as frozen:
            for player in filter(None, (self.student, judge)):
                frozen.enter_context(no_weight_gradients(player))
            with self.runtime.autocast():
                t, s = self.look(fake), self.student(fake).to(self.runtime.dtype)
                d = None if judge is None else judge(fake).to(self.runtime.dtype)
            terms = {"adversarial": adversarial_loss(s, t), "align": alignment_loss(t), "balance": balance_loss(t)}
            loss = settings.adv * terms["adversarial"] + settings.align * terms["align"]
            loss = loss + settings.balance * terms["balance"]
            if d is not None:
                terms["local"] = local_loss(d, settings.reduction)
                loss = loss + settings.loc * terms["local"]
            update(self.generator_optimizer, loss, self.generator_scaler)
        self.student.train()
        return {name: term.detach() for name, term in terms.items()}

    def imitate(self) -> Tensor:
        """One student step on fresh fakes and augmented real images in one batch; returns L_S, detached."""
        settings, budget = self.settings, self.budget
        with self.runtime.autocast():
            with torch.no_grad():
                x = self.runtime.images(torch.cat(self.lesson()))
                t = self.look(x)
            s = self.student(x).to(self.runtime.dtype)
        loss = losses.kl(s, t, settings.temperature)
        update(self.student_optimizer, loss, self.student_scaler)
        budget.student_updates += 1
        return loss.detach()

    def lesson(self) -> list[Tensor]:
        """What the student sees next: images of the generator, which stays in train mode, and real ones."""
        settings, parts = self.settings, []
        if self.generator is not None:
            parts.append(self.generator(self.sample_noise()).to(self.runtime.dtype))
            self.budget.images += settings.batch_size
        if self.images is not None:
            real, _ = self.images.batch(self.shown(self.budget.student_updates))
            real = crop_flip(real, pad=settings.pad, flip=settings.flip, generator=self.augmentation)
            parts.append(real.to(self.runtime.dtype))
        return parts

    def look(self, x: Tensor) -> Tensor:
        """The teacher's logits on x, in full precision."""
        self.budget.teacher_passes += len(x)
        return self.teacher(x).to(self.runtime.dtype)

    def sample_noise(self) -> Tensor:
        """Fresh z ~ N(0, I), [batch_size, latent_dim]."""
        shape = (self.settings.batch_size, self.settings.latent_dim)
        return torch.randn(shape, generator=self.noise, device=self.runtime.device, dtype=self.runtime.dtype)

    @torch.no_grad()
    def pictures(self, n: int) -> Tensor:
        """n images of the generator, the same noise each time, batch statistics as in training; changes nothing.

        Returns:
            [n, C, H, W] in [0, 1].

        Raises:
            InputError: there is no generator.
        """
        if self.generator is None:
            raise InputError("this run has no generator, so there are no generated images to show")
        z = torch.randn(
            (max(n, self.settings.batch_size), self.settings.latent_dim),
            generator=self.runtime.stream("mosaickd pictures"),
            device=self.runtime.device,
            dtype=self.runtime.dtype,
        )
        with self.runtime.autocast():
            return copy.deepcopy(self.generator)(z)[:n].to(self.runtime.dtype)

    def watch(self, n: int = 16) -> dict[str, Tensor]:
        """What the generator makes of the same noise each time, and what the networks say to it; changes nothing.

        Returns:
            "images" [n, C, H, W]; "teacher" and "student", predicted classes [n] or [n, H, W].
        """
        with evaluating(self.student), self.runtime.autocast():
            x = self.pictures(n)
            prepared = self.runtime.images(x)
            opinions = {"teacher": self.teacher(prepared).argmax(1), "student": self.student(prepared).argmax(1)}
        return {"images": x, **opinions}


class DataFreeGame(MosaicKD):
    """The same game without images and so without a discriminator; `fit` keeps all training data from it."""

    data_free: ClassVar[bool] = True

    def __init__(
        self, teacher: nn.Module, student: nn.Module, generator: nn.Module, settings: Settings, runtime: Runtime
    ) -> None:
        super().__init__(teacher, student, generator, None, None, settings, runtime)
