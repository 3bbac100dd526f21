"""DFQ ("Data-Free Network Quantization With Adversarial Knowledge Distillation"), arXiv 2005.04136, for plain
distillation: the adversarial game, held near the data by the teacher's batch-norm statistics.

The generator hunts disagreement, as in DFAD and ZSKT, but pays for leaving what the teacher remembers:

    L_G = a_bn L_bn + a_oh CE(T(x), argmax T(x)) + a_bal sum_c q_c ln q_c - a_adv KL(T(x) || S(x)),  x = G(z),

with q the mean belief of the batch. This is the form of CMI's toolbox, whose figures the tables of this field
quote. The original has the entropy of single beliefs where this has CE, the KL between Gaussians for L_bn, and a
warm-up of the generator without the student; the last two are options here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import losses
from ..errors import InputError
from ..runtime import Runtime
from ..taps import Seen, batch_norm_layers
from .generative import GenerativeSettings, GeneratorDistiller, check_weights
from .inversion import batch_norm_loss, check_bn_scale


@dataclass(frozen=True)
class Settings(GenerativeSettings):
    """The hyper-parameters of one run; defaults are those of the script of CMI's toolbox for CIFAR.

    Attributes:
        adv, bn, oh, balance: a_adv, a_bn, a_oh, a_bal; 0 leaves a term out. The adversarial KL has temperature 1,
            whatever the student's.
        bn_scale: "absolute", the papers' L_bn, or "relative", ours, which is free of the network's scale; see
            :func:`dfkd_lib.methods.inversion.batch_norm_loss`.
        gaussian: L_bn is the KL between the remembered and the batch's Gaussians, as in the original, not the
            norms r_l; free of the network's scale, so `bn_scale` does not matter to it.
        warmup: first calls, in which the generator trains without the adversarial term and the student waits.
    """

    kd_steps: int = 10
    adv: float = 1.0
    bn: float = 1.0
    bn_scale: str = "absolute"
    oh: float = 1.0
    balance: float = 20.0
    gaussian: bool = False
    warmup: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bn_scale(self.bn_scale)
        check_weights(self, "adv", "bn", "oh", "balance")
        if self.warmup < 0:
            raise InputError(f"warmup must be 0 or more calls, not {self.warmup}")


PRESETS: dict[str, dict[str, Any]] = {
    "digits": {
        "batch_size": 64,
        "kd_steps": 2,
        "generator": "generator_a",
        "generator_steps": 2,
        "latent_dim": 64,
        "ngf": 16,
        "bn": 5.0,
        "balance": 5.0,
        "lr_student": 0.2,
        "samples_in_eval": False,
    },
    "mnist": {
        "batch_size": 64,
        "kd_steps": 2,
        "latent_dim": 100,
        "ngf": 16,
        "lr_generator": 3e-3,
        "bn": 10.0,
        "bn_scale": "relative",
        "balance": 5.0,
        "samples_in_eval": False,
    },
    # Fewer student updates per call, so that 8,000 of them leave the generator 2,000 (the toolbox: 8,000).
    "cifar10": {"kd_steps": 4, "bn": 10.0, "bn_scale": "relative"},
}


def gaussian_batch_norm_loss(seen: Sequence[Seen]) -> Tensor:
    """L_bn of the original: sum over layers and channels of KL(remembered Gaussian || the batch's).

    Both variances carry the layer's epsilon, as in the layer itself: a channel that a batch leaves constant would
    otherwise cost infinitely much.
    """
    terms = []
    for visit in seen:
        layer: Any = visit.layer
        mean, variance = visit.statistics()
        remembered = layer.running_mean, layer.running_var + layer.eps
        terms.append(losses.gaussian_kl(mean, variance + layer.eps, *remembered))
    return torch.stack(terms).sum()


class DFQ(GeneratorDistiller):
    """One call trains the generator against teacher and student, then the student takes `kd_steps` updates.

    Args:
        teacher, student, image_shape, runtime: see :class:`dfkd_lib.methods.distiller.Distiller`.

    Raises:
        InputError: the teacher has no batch norm, or the generator cannot make images of this shape.
    """

    def __init__(
        self, teacher: nn.Module, student: nn.Module, image_shape: Sequence[int], settings: Settings, runtime: Runtime
    ) -> None:
        super().__init__(teacher, student, image_shape, settings, runtime)
        self.settings = settings
        self.layers = batch_norm_layers(self.teacher) if settings.bn else []

    @property
    def warming_up(self) -> bool:
        """Whether only the generator learns in this call."""
        return self.calls < self.settings.warmup

    @property
    def adversarial(self) -> bool:
        """Whether disagreement counts in this call."""
        return self.settings.adv > 0 and not self.warming_up

    def synthesize(self) -> dict[str, Tensor]:
        """The generator's updates; returns "generator loss" and its terms at the last of them."""
        return self.generate(self.adversarial)

    def generation_step(self) -> dict[str, Tensor]:
        """See :meth:`GeneratorDistiller.generation_step`."""
        with self.runtime.autocast():
            x = self.generator(self.fresh_noise())
            t, seen = self.look(x, self.layers)
            s = self.opinion(x) if self.adversarial else None
        terms = self.terms(t, s, seen)
        loss = generation_loss(terms, self.settings)
        self.descend(loss)
        return {"generator loss": loss.detach()} | {name: term.detach() for name, term in terms.items()}

    def terms(self, t: Tensor, s: Tensor | None, seen: Sequence[Seen]) -> dict[str, Tensor]:
        """The terms of L_G on one batch, unweighted, those left out missing.

        Args:
            t, s: logits of teacher and student, [B, K].
            seen: what the teacher's batch-norm layers saw.
        """
        terms = {"one-hot loss": losses.one_hot(t), "balance loss": losses.class_balance(t)}
        if seen:
            gaussian, scale = self.settings.gaussian, self.settings.bn_scale
            terms["bn loss"] = gaussian_batch_norm_loss(seen) if gaussian else batch_norm_loss(seen, scale)
        if s is not None:
            terms["adversarial loss"] = -losses.kl(s, t)
        return terms


def generation_loss(terms: dict[str, Tensor], settings: Settings) -> Tensor:
    """L_G, what the generator descends, from the terms that play in this call."""
    weights = {
        "one-hot loss": settings.oh,
        "balance loss": settings.balance,
        "bn loss": settings.bn,
        "adversarial loss": settings.adv,
    }
    return sum(weights[name] * term for name, term in terms.items())  # type: ignore[return-value]
