"""DeepInversion (DI) and Adaptive DeepInversion (ADI), arXiv 1912.08795: images are found by descent on their pixels.

A batch of noise becomes a batch of images of chosen classes c that look to the teacher's batch-norm layers like
its training data; ADI adds a reward for inputs on which the student still differs:

    min over x:  CE(T(x~), c) + a_bn sum_l r_l(x~) + a_tv TV(x~) + a_2 ||x~|| - a_adv JS(T(x~), S(x~)),

with x~ a random roll, and mirror image, of x. Each call starts from new noise and stores one batch; the student
learns on random batches of all that is stored. The loop around the descent is that of CMI's toolbox, because the
authors' own distillation on CIFAR-10 was never released.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import losses
from ..errors import InputError
from ..runtime import Runtime
from ..taps import batch_norm_layers
from ..training.players import adam, check_positive, recordable, start_anew, update
from ..training.replay import Replay
from .distiller import BankDistiller, Distillation
from .inversion import Best, batch_norm_loss, check_bn_scale


@dataclass(frozen=True)
class Settings(Distillation):
    """The hyper-parameters of one run; defaults are those of the toolbox's CIFAR script.

    Pixels are optimised in the unit of a normalised image, u = (x - pixel_mean) / pixel_std, where the published
    learning rate, noise and regularisers have their meaning; the teacher is given x.

    Attributes:
        synthesis_batch: images inverted at a time, and stored, in each call.
        g_steps: descent steps per call; the authors' CIFAR-10 script takes 2000.
        lr_pixels, betas: Adam on the pixels, new in each call.
        pixel_mean, pixel_std: of the pixels that the teacher was trained on, all channels together.
        bn, oh: a_bn and the weight of the cross-entropy against the targets.
        bn_scale: "absolute", the papers' L_bn, or "relative", ours, which is free of the network's scale; see
            :func:`dfkd_lib.methods.inversion.batch_norm_loss`.
        adv: a_adv, the competition with the student. 0 is plain DeepInversion, above 0 is ADI.
        js_temperature: T at which the beliefs of the Jensen-Shannon divergence are softened.
        tv, l2: a_tv and a_2, smoothness and size of the pixels.
        jitter: the roll is of up to so many pixels either way, the same for a whole batch.
        pad, flip: augmentation of what the student sees; `flip` also mirrors every second descent step.
        bank_size: images kept, the oldest make room.
    """

    kd_steps: int = 400
    temperature: float = 20.0
    synthesis_batch: int = 256
    g_steps: int = 1000
    lr_pixels: float = 0.1
    betas: tuple[float, float] = (0.5, 0.99)
    pixel_mean: float = 0.5
    pixel_std: float = 0.25
    bn: float = 10.0
    bn_scale: str = "absolute"
    oh: float = 1.0
    adv: float = 1.0
    js_temperature: float = 3.0
    tv: float = 1e-3
    l2: float = 0.0
    jitter: int = 4
    pad: int = 4
    flip: bool = True
    bank_size: int = 51_200

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bn_scale(self.bn_scale)
        check_positive(self, "synthesis_batch", "g_steps", "lr_pixels", "pixel_std", "js_temperature", "bank_size")
        for name in ("bn", "oh", "adv", "tv", "l2", "jitter", "pad"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} must be 0 or more, not {getattr(self, name)!r}")


PRESETS: dict[str, dict[str, Any]] = {
    "digits": {
        "batch_size": 64, "synthesis_batch": 128, "lr_pixels": 0.2, "kd_steps": 100, "g_steps": 80, "bn": 3.0,
        "tv": 0.0, "jitter": 1, "pad": 1, "flip": False,
    },
    "mnist": {
        "batch_size": 64, "synthesis_batch": 256, "lr_pixels": 0.2, "kd_steps": 25, "g_steps": 80, "temperature": 4.0,
        "pixel_mean": 0.1307, "pixel_std": 0.3081, "jitter": 3, "pad": 2, "flip": False, "bn": 30.0,
        "bn_scale": "relative",
    },
    # 80 calls of 150 steps in place of 200 of 1,000, which would take ten times the student's own time.
    "cifar10": {"kd_steps": 100, "g_steps": 150, "bn_scale": "relative"},
}  # fmt: skip
"""Our settings at each small scale, as changes of the defaults; the pixels' mean and deviation stay those of CIFAR."""


def roll_flip(x: Tensor, *, jitter: int, flip: bool, generator: torch.Generator) -> Tensor:
    """Roll a whole batch by up to `jitter` pixels along both axes, what leaves on one side entering on the other,
    and mirror it half of the time: a permutation of each image's pixels.

    Args:
        x: [B, C, H, W].
        generator: on the device of `x`; the same state gives the same result.
    """
    b, c, h, w = x.shape
    down, across = torch.randint(-jitter, jitter + 1, (2, 1), generator=generator, device=x.device)
    rows = (torch.arange(h, device=x.device) - down) % h
    columns = (torch.arange(w, device=x.device) - across) % w
    if flip:
        coin = torch.rand(1, generator=generator, device=x.device) < 0.5
        columns = torch.where(coin, columns.flip(0), columns)
    at = (rows[:, None] * w + columns).view(1, 1, h * w).expand(b, c, h * w)
    return x.flatten(2).gather(2, at).view(b, c, h, w)


class DeepInversion(BankDistiller):
    """One call inverts a batch for `g_steps` steps, then the student takes `kd_steps` updates on the bank.

    Args:
        teacher, student, image_shape, runtime: see :class:`dfkd_lib.methods.distiller.Distiller`.

    Raises:
        InputError: the teacher has no batch norm.
    """

    PARTS: tuple[str, ...] = (*BankDistiller.PARTS, "pixel_scaler")

    def __init__(
        self, teacher: nn.Module, student: nn.Module, image_shape: Sequence[int], settings: Settings, runtime: Runtime
    ) -> None:
        bank = {"bank_size": settings.bank_size, "pad": settings.pad, "flip": settings.flip}
        super().__init__(teacher, student, image_shape, settings, runtime, **bank)  # type: ignore[arg-type]
        self.settings = settings
        self.layers = batch_norm_layers(self.teacher)
        self.pixel_scaler = runtime.scaler()
        # What one call works on; each call starts these anew, in place.
        shape = settings.synthesis_batch, *self.image_shape
        self.pixels = nn.ParameterList([torch.zeros(shape, device=runtime.device, dtype=runtime.dtype)])
        self.targets = torch.zeros(settings.synthesis_batch, dtype=torch.int64, device=runtime.device)
        self.optimizer = recordable(adam(self.pixels, settings.lr_pixels, settings.betas), runtime)
        self.best = Best(runtime)
        self.inversion = Replay(self.inversion_step, runtime, [self.augmentation])

    @property
    def newest_call(self) -> int:
        """See :attr:`BankDistiller.newest_call`."""
        return self.settings.synthesis_batch

    def synthesize(self) -> dict[str, Tensor]:
        """Invert one batch from new noise and store its best iterate.

        Returns:
            "bn loss", "target loss" and, for ADI, "disagreement" (the Jensen-Shannon divergence) at the last step;
            "best loss", that of what is stored.
        """
        settings = self.settings
        self.targets.copy_(self.draw_targets(len(self.targets)))
        with torch.no_grad():
            self.pixels[0].copy_(self.clip(self.draw_pixels(settings.synthesis_batch)))
        start_anew(self.optimizer)
        self.best.start()
        for _ in range(settings.g_steps):
            terms: dict[str, Tensor] = self.inversion()
        self.budget.teacher_passes += settings.g_steps * settings.synthesis_batch
        self.store(self.image(self.best.tensors[0]))
        return {**terms, "best loss": self.best.loss.clone()}

    def inversion_step(self) -> dict[str, Tensor]:
        """One descent step, a :class:`~..training.replay.Replay`'s work; returns the terms of the loss, detached."""
        (u,) = self.pixels
        loss, terms = self.inversion_loss(u, self.targets)
        self.best.offer(loss, u)
        update(self.optimizer, loss, self.pixel_scaler)
        with torch.no_grad():
            u.copy_(self.clip(u))
        return terms

    def inversion_loss(self, u: Tensor, targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of the descent on one random roll of the pixels u, and its terms, detached."""
        settings = self.settings
        u = roll_flip(u, jitter=settings.jitter, flip=settings.flip, generator=self.augmentation)
        x = self.image(u)
        with self.runtime.autocast():
            t, seen = self.look(x, self.layers)
            s = self.opinion(x) if settings.adv else t
        terms = {"bn loss": batch_norm_loss(seen, settings.bn_scale), "target loss": losses.cross_entropy(t, targets)}
        loss = settings.bn * terms["bn loss"] + settings.oh * terms["target loss"]
        if settings.tv:
            loss = loss + settings.tv * losses.total_variation(u)
        if settings.l2:
            loss = loss + settings.l2 * torch.linalg.vector_norm(u)
        if settings.adv:
            terms["disagreement"] = losses.jensen_shannon(s, t, settings.js_temperature)
            loss = loss - settings.adv * terms["disagreement"]
        return loss, {name: term.detach() for name, term in terms.items()}

    def draw_pixels(self, n: int) -> Tensor:
        """Normalised pixels of unit variance, [n, C, H, W]."""
        return self.draw_noise(n, math.prod(self.image_shape)).view(n, *self.image_shape)

    def image(self, u: Tensor) -> Tensor:
        """Normalised pixels -> image space."""
        return self.settings.pixel_mean + self.settings.pixel_std * u

    def clip(self, u: Tensor) -> Tensor:
        """The nearest normalised pixels whose image lies in [0, 1]."""
        mean, std = self.settings.pixel_mean, self.settings.pixel_std
        return u.clamp(-mean / std, (1 - mean) / std)
