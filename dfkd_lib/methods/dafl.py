"""DAFL ("Data-Free Learning of Student Networks"), arXiv 1904.01186: images that look like data to the teacher.

The teacher serves as a fixed discriminator. A generator is rewarded when the teacher is sure of its images, when
its batches hold all classes evenly, and when the teacher's last features respond strongly:

    L_G = a_oh CE(T(x), argmax T(x)) + a_bal sum_c q_c ln q_c - a_act mean |phi_T(x)|,  x = G(z),  z ~ N(0, I),

with q the mean belief of the batch. The student imitates the teacher on what the generator makes; the generator
never hears of the student.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import losses
from ..runtime import Runtime
from ..taps import last_linear
from .generative import GenerativeSettings, GeneratorDistiller, check_weights

LOG10 = 1 / math.log(10)


@dataclass(frozen=True)
class Settings(GenerativeSettings):
    """The hyper-parameters of one run; defaults are those of the authors' own code for CIFAR-10.

    Its balance term has log10, so its weight 5 is 5 / ln 10 = 2.17 here. It names no betas; torch's own are taken.

    Attributes:
        oh, balance, act: a_oh, a_bal, a_act; 0 leaves a term out.
        joint: student and generator learn on one and the same batch, made before the generator's update, as in
            the authors' own code (with kd_steps = 1); False gives each student update its own noise.
    """

    batch_size: int = 1024
    kd_steps: int = 1
    weight_decay: float = 5e-4
    generator: str = "generator_dafl"
    latent_dim: int = 1000
    lr_generator: float = 0.02
    betas: tuple[float, float] = (0.9, 0.999)
    samples_in_eval: bool = False
    oh: float = 0.05
    balance: float = 5 * LOG10
    act: float = 0.01
    joint: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_weights(self, "oh", "balance", "act")


PAPER_MNIST: dict[str, Any] = {
    "batch_size": 512, "latent_dim": 100, "lr_generator": 0.2, "optimizer": "adam", "lr_student": 2e-3,
    "oh": 1.0, "balance": 5 * LOG10, "act": 0.1,
}  # fmt: skip
"""The authors' settings for MNIST, as changes of the defaults."""

TOOLBOX: dict[str, Any] = {
    "batch_size": 256, "kd_steps": 5, "weight_decay": 1e-4, "generator": "toolbox_large", "latent_dim": 512,
    "lr_generator": 1e-3, "betas": (0.5, 0.999), "samples_in_eval": True, "oh": 1.0, "balance": 20.0, "act": 1e-3,
    "joint": False,
}  # fmt: skip
"""The script of CMI's toolbox for CIFAR, whose figures the tables of this field quote for Wide-ResNets."""

PRESETS: dict[str, dict[str, Any]] = {
    "digits": TOOLBOX
    | {
        "batch_size": 64, "kd_steps": 1, "generator": "generator_a", "latent_dim": 128, "ngf": 16, "oh": 0.3,
        "balance": 5.0, "lr_student": 0.2, "samples_in_eval": False,
    },
    "mnist": {
        "batch_size": 64, "latent_dim": 100, "ngf": 16, "lr_generator": 3e-3, "optimizer": "sgd", "lr_student": 0.05,
        "weight_decay": 1e-4, "oh": 1.0, "balance": 5.0, "act": 1e-3, "kd_steps": 5, "generator": "generator_dafl",
        "joint": False,
    },
    # The authors' batch of 1,024 costs four times the other rows' images; DFAD's authors ran DAFL at 256 (88.5 %).
    "cifar10": {"batch_size": 256},
}  # fmt: skip
"""Our settings at each small scale, as changes of the defaults."""


def generation_terms(logits: Tensor, features: Tensor) -> dict[str, Tensor]:
    """L_oh, L_bal and L_act of one batch, unweighted.

    Args:
        logits: the teacher's, [B, K].
        features: input of the teacher's last linear layer, [B, D].
    """
    return {
        "one-hot loss": losses.one_hot(logits),
        "balance loss": losses.class_balance(logits),
        "activation loss": losses.activation(features),
    }


def generation_loss(terms: dict[str, Tensor], settings: Settings) -> Tensor:
    """L_G, what the generator descends."""
    weights = {"one-hot loss": settings.oh, "balance loss": settings.balance, "activation loss": settings.act}
    return sum(weight * terms[name] for name, weight in weights.items())  # type: ignore[return-value]


class DAFL(GeneratorDistiller):
    """One call trains the generator against the teacher alone, then the student takes `kd_steps` updates.

    Args:
        teacher, student, image_shape, runtime: see :class:`dfkd_lib.methods.distiller.Distiller`.

    Raises:
        InputError: the teacher has no linear layer, or the generator cannot make images of this shape.
    """

    def __init__(
        self, teacher: nn.Module, student: nn.Module, image_shape: Sequence[int], settings: Settings, runtime: Runtime
    ) -> None:
        super().__init__(teacher, student, image_shape, settings, runtime)
        self.settings = settings
        self.head = last_linear(self.teacher)
        self.shared = torch.zeros(settings.batch_size, *self.image_shape, device=runtime.device, dtype=runtime.dtype)

    def synthesize(self) -> dict[str, Tensor]:
        """The generator's updates; returns "generator loss" and its three terms at the last of them."""
        return self.generate()

    def generation_step(self) -> dict[str, Tensor]:
        """See :meth:`GeneratorDistiller.generation_step`; with `joint`, its batch is kept for the student."""
        with self.runtime.autocast():
            x = self.generator(self.fresh_noise())
            t, seen = self.look(x, [self.head])
        terms = generation_terms(t, seen[-1].x.to(t.dtype))
        loss = generation_loss(terms, self.settings)
        if self.settings.joint:
            self.shared.copy_(x.detach())
        self.descend(loss)
        return {"generator loss": loss.detach()} | {name: term.detach() for name, term in terms.items()}

    def sample(self, n: int) -> Tensor:
        """See :meth:`GeneratorDistiller.sample`; with `joint`, the batch that the generator has just learnt on."""
        return self.shared if self.settings.joint else super().sample(n)
