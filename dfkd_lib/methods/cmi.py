"""Contrastive Model Inversion (CMI), arXiv 2105.08584.

The teacher is inverted: images are made whose batch-norm statistics and classes are those of its training data.
Alone that yields batches which resemble each other. CMI asks in addition that every new image can be told apart
from all others, those of earlier calls included: in the features that the teacher shows its batch-norm layers, a
zoomed view u_i of an image has to find the whole view v_i of the same image among all N views,

    L = a_bn L_bn + a_oh L_oh + a_adv L_adv + a_cr L_cr,   L_cr = -log exp(u_i v_i / tau) / sum_j exp(u_i v_j / tau).

Each call draws a generator's weights anew, trains it together with its noise and stores the best batch; the
student then learns on everything stored. The authors run it in three modes, see `MODES`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import losses, models
from ..banks import Bank
from ..data import resized_crop_flip
from ..errors import InputError
from ..runtime import Runtime
from ..taps import Seen, batch_norm_layers, tapped
from ..training.modes import still
from ..training.players import Resumable, adam, check_positive, recordable, start_anew
from ..training.replay import Replay
from .distiller import BankDistiller, Distillation
from .inversion import Best, batch_norm_loss, check_bn_scale


@dataclass(frozen=True)
class Settings(Distillation):
    """The hyper-parameters of one run; defaults are those of the authors' adversarial CIFAR-10 script.

    Attributes:
        latent_dim, ngf: length of the noise z, width of the generator.
        synthesis_batch: B, images per call.
        inner_steps: updates of generator and noise per call.
        lr_generator: Adam of generator and noise.
        lr_head: Adam of the projection head; the authors have one rate for all three.
        bn, oh, adv, cr: weights a of the four terms; a term of weight 0 is not computed.
        bn_scale: "absolute", the papers' L_bn, or "relative", ours, which is free of the network's scale; see
            :func:`dfkd_lib.methods.inversion.batch_norm_loss`.
        preinvert: the first so many calls only invert, without the adversarial term and without the student.
        grow: whether later calls go on inverting; False distils on the pre-inverted images alone.
        adv_from: call from which the adversarial term counts, if the pre-inversion is over by then.
        cr_temperature: tau.
        head_dim: length of the projections u, v.
        negatives: stored pairs that the new images are told apart from, drawn at every inner step; 0 leaves the
            other images of the batch alone.
        memory_size: pairs of features kept for that.
        bank_size: images kept for the student.
        local_scale: least and largest share of an image's area in its zoomed view.
        pad, flip: shift and mirror of the whole view and of what the student sees.
    """

    batch_size: int = 128
    kd_steps: int = 2000
    temperature: float = 20.0
    latent_dim: int = 256
    ngf: int = 64
    synthesis_batch: int = 256
    inner_steps: int = 200
    lr_generator: float = 1e-3
    lr_head: float = 1e-3
    bn: float = 1.0
    bn_scale: str = "absolute"
    oh: float = 0.5
    adv: float = 0.5
    cr: float = 0.8
    preinvert: int = 200
    grow: bool = True
    adv_from: int = 0
    cr_temperature: float = 0.1
    head_dim: int = 256
    negatives: int = 4096
    memory_size: int = 40960
    bank_size: int = 61440
    local_scale: tuple[float, float] = (0.25, 1.0)
    pad: int = 4
    flip: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bn_scale(self.bn_scale)
        check_positive(self, "latent_dim", "ngf", "inner_steps", "lr_generator", "lr_head", "cr_temperature")
        check_positive(self, "head_dim", "memory_size", "bank_size")
        for name in ("bn", "oh", "adv", "cr", "preinvert", "adv_from", "negatives", "pad"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} must be at least 0, not {getattr(self, name)!r}")
        if self.synthesis_batch < 2:
            raise InputError(f"synthesis_batch must be at least 2 (batch normalisation), not {self.synthesis_batch}")
        if not 0 < self.local_scale[0] <= self.local_scale[1] <= 1:
            raise InputError(f"local_scale must be (least, largest) within (0, 1], not {self.local_scale}")
        if not self.bn + self.oh + self.cr:
            raise InputError("bn, oh and cr are all 0, so nothing drives the inversion; give one of them a weight")
        if not self.grow and not self.preinvert:
            raise InputError("grow=False distils on pre-inverted images; set preinvert to the calls that make them")


MODES: dict[str, dict[str, Any]] = {
    "non-adversarial": {"preinvert": 200, "adv": 0.0, "grow": False},
    "adversarial": {},
    "scratch": {"preinvert": 0, "kd_steps": 400, "oh": 1.0},
}
"""The authors' three ways to run CIFAR-10, as changes of the defaults: ordinary distillation on 51,200 inverted
images, 87.38 %; 40 more calls with the adversarial term, 90.01 %; that term from the first of 200 calls, 88.82 %."""

# Ours, picked on held-out images of digits: short calls need a fast generator, but not a fast head.
_SMALL: dict[str, Any] = {"oh": 1.0, "temperature": 4.0, "lr_generator": 0.02, "memory_size": 4096}
PRESETS: dict[str, dict[str, Any]] = {
    "digits": _SMALL
    | {
        "batch_size": 64, "kd_steps": 200, "lr_student": 0.2, "latent_dim": 32, "ngf": 16, "synthesis_batch": 128,
        "inner_steps": 90, "preinvert": 2, "head_dim": 32, "negatives": 128, "bank_size": 2048, "pad": 0, "flip": False,
    },
    "mnist": _SMALL
    | {
        "batch_size": 64, "kd_steps": 100, "lr_head": 0.02, "latent_dim": 64, "ngf": 16, "synthesis_batch": 64,
        "inner_steps": 60, "preinvert": 4, "head_dim": 64, "negatives": 512, "bank_size": 8192, "pad": 2, "flip": False,
        "bn": 10.0, "bn_scale": "relative",
    },
    # "scratch", 20 calls ahead so that the student does not overfit the first batches; half the inner steps, at
    # twice the rate, and half the calls.
    "cifar10": {
        "batch_size": 256, "kd_steps": 100, "preinvert": 20, "oh": 1.0, "inner_steps": 100, "lr_generator": 2e-3,
        "bn": 10.0, "bn_scale": "relative",
    },
}  # fmt: skip
"""Our settings at each small scale, as changes of the defaults."""


def inversion_terms(
    t: Tensor, s: Tensor | None, seen: Sequence[Seen], targets: Tensor, settings: Settings
) -> dict[str, Tensor]:
    """The terms of L_inv that have a weight, already weighted.

    L_bn = sum_l ||var_l - running var_l|| + ||mean_l - running mean_l||, L_oh = CE(t, c), and the decision
    adversarial L_adv = -KL(p_t || p_s) over the images on whose class the networks agree: the two are pushed
    apart up to the decision boundary, not across it.

    Args:
        t, s: teacher's and student's logits [B, K] on the whole view; s is None while L_adv is off.
        seen: what the teacher's batch-norm layers were shown in that pass.
        targets: c, classes [B].
    """
    terms = {}
    if settings.bn:
        terms["bn loss"] = settings.bn * batch_norm_loss(seen, settings.bn_scale)
    if settings.oh:
        terms["class loss"] = settings.oh * losses.cross_entropy(t, targets)
    if s is not None:
        terms["adversarial loss"] = -settings.adv * losses.agreeing_kl(s, t)
    return terms


def features(seen: Sequence[Seen]) -> Tensor:
    """phi(x): the mean over pixels of each layer's input, all layers side by side, [B, D].

    The authors take only the inputs of the four stages of a ResNet-34 (D = 512); here a ResNet is treated as
    they treat the other networks.
    """
    return torch.cat([visit.instance_means() for visit in seen], 1)


class Discriminator(Resumable):
    """Tells images apart: a projection head h with its own optimiser, and the features of the images stored.

    Unlike the generator it lives through the whole run.

    Args:
        n_features: D.
        noise: the random stream that negatives are drawn from.
    """

    PARTS: tuple[str, ...] = ("head", "optimizer", "memory")

    def __init__(self, n_features: int, settings: Settings, runtime: Runtime, noise: torch.Generator) -> None:
        self.settings, self.runtime, self.noise = settings, runtime, noise
        head = nn.Sequential(
            nn.Linear(n_features, n_features), nn.ReLU(), nn.Linear(n_features, settings.head_dim)
        )  # fmt: skip
        self.head = runtime.prepare(head)
        self.optimizer = recordable(adam(self.head, settings.lr_head), runtime)
        # Two digits are enough for negatives, and float16 would overflow on a network without normalised inputs.
        self.memory = Bank(settings.memory_size, (2, n_features), torch.bfloat16, runtime.device)

    def project(self, phi: Tensor) -> Tensor:
        """h(phi), rows of unit length: [N, D] -> [N, head_dim]."""
        with self.runtime.autocast():
            projected = self.head(phi)
        return F.normalize(projected.to(self.runtime.dtype), dim=1)

    def loss(self, local: Tensor, whole: Tensor) -> Tensor:
        """L_cr of the new images against each other and against `negatives` of those stored.

        Stored features pass through the head as it is now: they teach it, and reach no image.

        Args:
            local, whole: phi of the zoomed and of the whole views, [B, D].
        """
        stored = self.memory.sample(self.settings.negatives, self.noise).to(self.runtime.dtype)
        queries = self.project(torch.cat([local, stored[:, 0]]))
        with torch.no_grad():
            keys = self.project(torch.cat([whole, stored[:, 1]]))
        return losses.instance_discrimination(queries, keys, len(local), self.settings.cr_temperature)


class CMI(BankDistiller):
    """Inversion with a memory of what was already inverted; see :class:`~.distiller.Distiller`.

    Attributes:
        discriminator: None if `cr` is 0.
        trace: the weighted terms of every inner step of the last call, detached scalars on the device.
    """

    PARTS: tuple[str, ...] = (*BankDistiller.PARTS, "discriminator", "synthesis_scaler")

    def __init__(
        self, teacher: nn.Module, student: nn.Module, image_shape: Sequence[int], settings: Settings, runtime: Runtime
    ) -> None:
        super().__init__(
            teacher, student, image_shape, settings, runtime,
            bank_size=settings.bank_size, pad=settings.pad, flip=settings.flip,
        )  # fmt: skip
        self.settings = settings
        channels, height, width = self.image_shape
        generator = models.build_generator(
            "toolbox_small", latent_dim=settings.latent_dim, image_shape=(channels, height, width),
            mean=(0.5,) * channels, std=(0.5,) * channels, ngf=settings.ngf,
        )  # fmt: skip
        self.generator = runtime.prepare(generator).train()
        self.layers = batch_norm_layers(self.teacher) if settings.bn or settings.cr else []
        self.discriminator = (
            Discriminator(self._count_features(), settings, runtime, self.noise) if settings.cr else None
        )
        self.synthesis_scaler = runtime.scaler()
        self.trace: list[dict[str, Tensor]] = []
        # What one call works on; each call starts these anew, in place.
        z = torch.zeros(settings.synthesis_batch, settings.latent_dim, device=runtime.device, dtype=runtime.dtype)
        self.z = nn.Parameter(z)
        self.targets = torch.zeros(settings.synthesis_batch, dtype=torch.int64, device=runtime.device)
        players = nn.ModuleList([self.generator, nn.ParameterList([self.z])])
        self.optimizer = recordable(adam(players, settings.lr_generator, (0.5, 0.999)), runtime)
        self.best = Best(runtime)
        self.inversion = Replay(self.inversion_step, runtime, [self.noise, self.augmentation])

    @property
    def warming_up(self) -> bool:
        """See :attr:`Distiller.warming_up`: the calls of the pre-inversion."""
        return self.calls < self.settings.preinvert

    @property
    def adversarial(self) -> bool:
        """Whether this call has the adversarial term."""
        return bool(self.settings.adv) and self.calls >= max(self.settings.preinvert, self.settings.adv_from)

    @property
    def newest_call(self) -> int:
        """See :attr:`BankDistiller.newest_call`."""
        return self.settings.synthesis_batch

    def adopt(self, images: Tensor) -> None:
        """Take images that were inverted before in place of the pre-inversion, which is then over.

        Args:
            images: [N, C, H, W], float in [0, 1] or bytes.
        """
        self.bank.append(images)
        self.calls = max(self.calls, self.settings.preinvert)

    def synthesize(self) -> dict[str, Tensor]:
        """One call: a new generator and new noise, `inner_steps` updates of both, the best batch stored.

        Returns:
            The weighted terms at the last inner step, and "inversion loss", the total of the batch stored. It is
            comparable within a call only: its contrastive term falls as the head learns and rises with the memory.
        """
        settings = self.settings
        if not (settings.grow or self.warming_up):
            return {}
        with torch.no_grad():
            self.z.copy_(self.draw_noise(*self.z.shape))
        self.targets.copy_(self.draw_targets(len(self.targets)))
        models.draw_weights(self.generator, self.noise)
        start_anew(self.optimizer)
        self.best.start()
        memory = self.discriminator.memory if self.discriminator else None
        stored_features = () if memory is None else (len(memory.rows), min(len(memory), settings.negatives))
        self.trace = [self.inversion(self.adversarial, *stored_features) for _ in range(settings.inner_steps)]
        views = 2 if self.discriminator else 1
        self.budget.teacher_passes += views * settings.inner_steps * settings.synthesis_batch
        x, *features_of = self.best.tensors
        self.store(x)
        if memory is not None:
            memory.append(torch.stack(features_of, 1))
        return {**self.trace[-1], "inversion loss": self.best.loss.clone()}

    def inversion_step(self) -> dict[str, Tensor]:
        """One inner step, a :class:`~..training.replay.Replay`'s work; returns the weighted terms, detached."""
        x, terms, views = self.invert(self.z, self.targets)
        loss = torch.stack(list(terms.values())).sum()
        self.best.offer(loss, x, *views)
        self.descend(loss, self.optimizer)
        return {name: term.detach() for name, term in terms.items()}

    def invert(self, z: Tensor, targets: Tensor) -> tuple[Tensor, dict[str, Tensor], tuple[Tensor, ...]]:
        """Images [B, C, H, W], the weighted terms of the loss on them, and the features of their two views."""
        with self.runtime.autocast():
            x = self.generator(z).to(self.runtime.dtype)
            view = self.augment(x)
            t, seen = self.look(view, self.layers)
            s = self.opinion(view) if self.adversarial else None
            if self.discriminator:
                zoomed = resized_crop_flip(
                    x, scale=self.settings.local_scale, flip=self.settings.flip, generator=self.augmentation
                )
                _, seen_zoomed = self.look(zoomed, self.layers)
        terms = inversion_terms(t, s, seen, targets, self.settings)
        if not self.discriminator:
            return x, terms, ()
        local, whole = features(seen_zoomed), features(seen)
        terms["contrastive loss"] = self.settings.cr * self.discriminator.loss(local, whole)
        return x, terms, (local, whole)

    def descend(self, loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
        """One update of generator and noise, and one of the projection head."""
        optimizers = [optimizer, self.discriminator.optimizer] if self.discriminator else [optimizer]
        for each in optimizers:
            each.zero_grad(set_to_none=True)
        self.synthesis_scaler.scale(loss).backward()
        for each in optimizers:
            self.synthesis_scaler.step(each)
        self.synthesis_scaler.update()

    def _count_features(self) -> int:
        x = self.runtime.images(torch.full((1, *self.image_shape), 0.5, device=self.runtime.device))
        with still(self.teacher), self.runtime.autocast(), tapped(self.layers) as seen:
            self.teacher(x)
        return features(seen).shape[1]
