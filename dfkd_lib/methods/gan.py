"""A GAN, trained in the one stage of :mod:`.one_stage` or in the two that it replaces.

In two stages D learns first, from fresh fakes through which no gradient passes, then G through the updated D, from
fresh noise again. That is how the authors' code trains what it compares with. Two cheaper variants are fairer: D's
weight gradients are not computed where nobody uses them, and one batch of fakes serves both stages. With g and d the
costs of one pass forward, and as much again for each kind of gradient:

    one-stage 3g + 6d;  two-stage 4g + 9d;  D frozen 4g + 8d;  fakes reused 3g + 8d.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..data import ImageSet, minibatches
from ..errors import InputError, unknown
from ..runtime import Runtime
from ..training.players import Resumable, adam, check_positive, no_weight_gradients, update
from .one_stage import LOSSES, choose_form, one_stage_gradients, step_together

ONE_STAGE, TWO_STAGE, FROZEN, REUSED = "one-stage", "two-stage", "two-stage, D frozen", "two-stage, fakes reused"
SCHEMES = (ONE_STAGE, TWO_STAGE, FROZEN, REUSED)


@dataclass(frozen=True)
class Settings:
    """The hyper-parameters of one run; defaults are those of the authors' configurations for MNIST in two stages.

    Attributes:
        scheme: one of `SCHEMES`; where fakes are reused, D is frozen too.
        loss: "saturating" or "WGAN" (symmetric), "non-saturating", "LSGAN" or "hinge" (asymmetric).
        fallback: take two backward passes over one forward pass where a single one is not exact.
        latent_dim: d_z, length of the noise vector.
        batch_size: B, fakes and as many real images per update.
        lr_generator, lr_discriminator, betas: Adam. The authors' rates of D differ between schemes: in one stage
            1.35e-5 for the symmetric losses on MNIST, 5e-5 for the asymmetric.
        clip: bound of each of D's weights after its step; for "WGAN" alone.
    """

    scheme: str = ONE_STAGE
    loss: str = "non-saturating"
    fallback: bool = False
    latent_dim: int = 100
    batch_size: int = 128
    lr_generator: float = 2e-4
    lr_discriminator: float = 2e-4
    betas: tuple[float, float] = (0.5, 0.999)
    clip: float = 0.01

    def __post_init__(self) -> None:
        if self.scheme not in SCHEMES:
            raise unknown("scheme", self.scheme, SCHEMES)
        if self.loss not in LOSSES:
            raise unknown("loss", self.loss, LOSSES)
        check_positive(self, "latent_dim", "lr_generator", "lr_discriminator", "clip")
        if self.batch_size < 2:
            raise InputError(f"batch_size must be at least 2 (batch normalisation), not {self.batch_size}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise InputError(f"betas must lie in [0, 1), not {self.betas}")


class GAN(Resumable):
    """The game of two, one update of either player per :meth:`step`.

    Args:
        generator: noise [B, latent_dim] -> images [B, C, H, W] in [0, 1].
        discriminator: such images -> logits [B], or several per image, positive for real.
        images: the real ones.
        runtime: where and how to compute; the players are moved there.

    Attributes:
        form: of :func:`~.one_stage.one_stage_gradients`; "" in two stages.
        steps: updates done.

    Raises:
        InputError: one backward pass would not be exact, see :func:`~.one_stage.why_not_one_stage`, and
            `settings.fallback` is off.
    """

    data_free: ClassVar[bool] = False
    PARTS: tuple[str, ...] = (
        "generator",
        "discriminator",
        "generator_optimizer",
        "discriminator_optimizer",
        "scaler",
        "noise",
        "steps",
    )

    def __init__(
        self, generator: nn.Module, discriminator: nn.Module, images: ImageSet, settings: Settings, runtime: Runtime
    ) -> None:
        self.settings, self.runtime, self.loss = settings, runtime, LOSSES[settings.loss]
        self.generator, self.discriminator = (runtime.prepare(net).train() for net in (generator, discriminator))
        self.generator_optimizer = adam(self.generator, settings.lr_generator, settings.betas)
        self.discriminator_optimizer = adam(self.discriminator, settings.lr_discriminator, settings.betas)
        self.scaler = runtime.scaler()
        self.noise = runtime.stream("gan noise")
        self.images = images.to(runtime.device)
        self.order = minibatches(len(images), settings.batch_size, seed=runtime.seed, device=runtime.device)
        self.steps = 0
        self.form = ""
        if settings.scheme == ONE_STAGE:
            self.form = choose_form(self.loss, self.discriminator, self.real(), settings.fallback)

    def step(self) -> dict[str, Tensor]:
        """One update of D and one of G.

        Returns:
            "discriminator loss" and "generator loss", L_D and L_G before the weights moved that descend them; in one
            stage also "held ratios", see :func:`~.one_stage.one_stage_gradients`. Detached scalars on the device.
        """
        metrics = self.one_stage() if self.settings.scheme == ONE_STAGE else self.two_stages()
        self.steps += 1
        return metrics

    def one_stage(self) -> dict[str, Tensor]:
        """Both gradients at the same weights, then both steps."""
        metrics = one_stage_gradients(
            self.generator, self.discriminator, self.sample_noise(), self.real(), self.loss, self.runtime,
            form=self.form, scaler=self.scaler,
        )  # fmt: skip
        step_together(self.scaler, self.discriminator_optimizer, self.generator_optimizer)
        self.clip_weights()
        return metrics

    def two_stages(self) -> dict[str, Tensor]:
        """D's step, then G's through the D that it made."""
        scheme = self.settings.scheme
        with torch.set_grad_enabled(scheme == REUSED):
            fake = self.fakes()
        loss_d = self.discriminate(fake.detach())
        if scheme != REUSED:
            fake = self.fakes()
        with nullcontext() if scheme == TWO_STAGE else no_weight_gradients(self.discriminator):
            loss_g = self.generate(fake)
        return {"discriminator loss": loss_d, "generator loss": loss_g}

    def discriminate(self, fake: Tensor) -> Tensor:
        """D's step on generated images [B, C, H, W] and as many real ones; returns L_D, detached."""
        with self.runtime.autocast():
            s = self.discriminator(fake).to(self.runtime.dtype)
            r = self.discriminator(self.real()).to(self.runtime.dtype)
        loss = self.loss.discriminator(r, s)
        update(self.discriminator_optimizer, loss, self.scaler)
        self.clip_weights()
        return loss.detach()

    def generate(self, fake: Tensor) -> Tensor:
        """G's step; returns L_G, detached.

        Args:
            fake: its images [B, C, H, W], with their graph.
        """
        with self.runtime.autocast():
            s = self.discriminator(fake).to(self.runtime.dtype)
        loss = self.loss.generator(s)
        update(self.generator_optimizer, loss, self.scaler)
        return loss.detach()

    @torch.no_grad()
    def clip_weights(self) -> None:
        """Bring D's weights back into [-clip, clip], if the loss is WGAN's."""
        if self.settings.loss == "WGAN":
            for weight in self.discriminator.parameters():
                weight.clamp_(-self.settings.clip, self.settings.clip)

    def fakes(self) -> Tensor:
        """Images [B, C, H, W] of the generator from fresh noise, in full precision."""
        with self.runtime.autocast():
            images: Tensor = self.generator(self.sample_noise())
        return images.to(self.runtime.dtype)

    def real(self) -> Tensor:
        """This step's real images [B, C, H, W] in [0, 1]."""
        return self.runtime.images(self.images.batch(self.order(self.steps))[0])

    def sample_noise(self) -> Tensor:
        """Fresh z ~ N(0, I), [batch_size, latent_dim]."""
        return self._noise(self.settings.batch_size, self.noise)

    @torch.no_grad()
    def pictures(self, n: int = 16) -> Tensor:
        """n images of the generator [n, C, H, W], the same noise each time, batch statistics as in training, on a
        copy: nothing changes."""
        z = self._noise(max(n, self.settings.batch_size), self.runtime.stream("gan pictures"))
        with self.runtime.autocast():
            return copy.deepcopy(self.generator)(z)[:n].to(self.runtime.dtype)

    def _noise(self, n: int, stream: torch.Generator) -> Tensor:
        shape = (n, self.settings.latent_dim)
        return torch.randn(shape, generator=stream, device=self.runtime.device, dtype=self.runtime.dtype)
