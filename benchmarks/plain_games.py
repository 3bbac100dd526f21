"""DFAD, MosaicKD and training on labels as plain loops, as public code runs them: nothing frozen, nothing fused.

See :mod:`benchmarks.plain_inversion`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfkd_lib.data import ImageSet, crop_flip, minibatches
from dfkd_lib.methods import dfad, mosaickd
from dfkd_lib.runtime import Runtime
from dfkd_lib.training.supervised import Recipe


class PlainDFAD:
    """DFAD: the pseudo-code word for word."""

    def __init__(
        self, teacher: nn.Module, student: nn.Module, generator: nn.Module, settings: dfad.Settings, runtime: Runtime
    ) -> None:
        self.settings, self.dtype = settings, runtime.dtype
        self.teacher = teacher.to(runtime.device, runtime.dtype).eval()
        self.student = student.to(runtime.device, runtime.dtype).train()
        self.generator = generator.to(runtime.device, runtime.dtype).train()
        self.opt_s = torch.optim.SGD(
            self.student.parameters(), settings.lr_student, settings.momentum, weight_decay=settings.weight_decay
        )
        self.opt_g = torch.optim.Adam(self.generator.parameters(), settings.lr_generator)
        self.noise = runtime.stream("dfad noise")

    def step(self) -> None:
        """One outer iteration: k student updates, one generator update."""
        shape = (self.settings.batch_size, self.settings.latent_dim)
        for _ in range(self.settings.k):
            z = torch.randn(shape, generator=self.noise, device=self.noise.device, dtype=self.dtype)
            fake = self.generator(z).detach()
            loss = F.l1_loss(self.student(fake), self.teacher(fake).detach())
            self.opt_s.zero_grad()
            loss.backward()
            self.opt_s.step()
        z = torch.randn(shape, generator=self.noise, device=self.noise.device, dtype=self.dtype)
        fake = self.generator(z)
        loss = -F.l1_loss(self.student(fake), self.teacher(fake))
        self.opt_g.zero_grad()
        loss.backward()
        self.opt_g.step()


class PlainMosaicKD:
    """MosaicKD: discriminator of patches, generator, student on generated and real images."""

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        generator: nn.Module,
        discriminator: nn.Module,
        images: ImageSet,
        settings: mosaickd.Settings,
        runtime: Runtime,
    ) -> None:
        self.settings, self.images, self.runtime = settings, images, runtime
        self.teacher = teacher.to(runtime.device, runtime.dtype).eval()
        self.student, self.generator, self.discriminator = (
            player.to(runtime.device, runtime.dtype).train() for player in (student, generator, discriminator)
        )
        self.opt_s = torch.optim.SGD(
            self.student.parameters(), settings.lr_student, settings.momentum, weight_decay=settings.weight_decay
        )
        self.opt_g, self.opt_d = (
            torch.optim.Adam(player.parameters(), lr, betas=(0.5, 0.999))
            for player, lr in (
                (self.generator, settings.lr_generator),
                (self.discriminator, settings.lr_discriminator),
            )
        )
        self.noise, self.augmentation = runtime.stream("mosaickd noise"), runtime.stream("mosaickd augmentation")
        self.judged, self.shown = (
            minibatches(len(images), settings.batch_size, seed=runtime.seed + k, device=runtime.device)
            for k in (0, 1_000_003)
        )
        self.steps = self.updates = 0

    def fakes(self) -> Tensor:
        """Images of fresh noise."""
        shape = (self.settings.batch_size, self.settings.latent_dim)
        z = torch.randn(shape, generator=self.noise, device=self.runtime.device, dtype=self.runtime.dtype)
        made: Tensor = self.generator(z)
        return made

    def judge(self, x: Tensor, real: float) -> Tensor:
        """Binary cross-entropy of all patches of an image, the mean over images."""
        logits = self.discriminator(x).flatten(1)
        wanted = torch.full_like(logits, real)
        return F.binary_cross_entropy_with_logits(logits, wanted, reduction="none").sum(1).mean()

    def step(self) -> None:
        """Discriminator, generator, then `kd_steps` of the student."""
        settings, dtype = self.settings, self.runtime.dtype
        fake = self.fakes()
        real = self.images.batch(self.judged(self.steps))[0].to(dtype)
        loss = settings.loc * (self.judge(fake.detach(), 0.0) + self.judge(real, 1.0)) / 2
        self.opt_d.zero_grad()
        loss.backward()
        self.opt_d.step()
        t, s = self.teacher(fake), self.student(fake)
        p = F.softmax(t, 1)
        loss = -settings.adv * F.kl_div(F.log_softmax(s, 1), p, reduction="batchmean")
        loss = loss - settings.align * (p * F.log_softmax(t, 1)).sum(1).mean()
        loss = loss + settings.balance * (p.mean(0) * p.mean(0).log()).sum() / math.log(2)
        loss = loss + settings.loc * self.judge(fake, 1.0)
        self.opt_g.zero_grad()
        loss.backward()
        self.opt_g.step()
        for _ in range(settings.kd_steps):
            real = self.images.batch(self.shown(self.updates))[0]
            real = crop_flip(real, pad=settings.pad, flip=settings.flip, generator=self.augmentation).to(dtype)
            with torch.no_grad():
                x = torch.cat([self.fakes(), real])
                t = self.teacher(x)
            tau = settings.temperature
            loss = F.kl_div(F.log_softmax(self.student(x) / tau, 1), F.softmax(t / tau, 1), reduction="batchmean")
            self.opt_s.zero_grad()
            (loss * tau**2).backward()
            self.opt_s.step()
            self.updates += 1
        self.steps += 1


class PlainTraining:
    """A teacher on labels, SGD at a constant rate, shifted and mirrored images."""

    def __init__(self, network: nn.Module, images: ImageSet, recipe: Recipe, runtime: Runtime) -> None:
        self.images, self.dtype = images, runtime.dtype
        self.network = network.to(runtime.device, runtime.dtype).train()
        self.optimizer = torch.optim.SGD(
            self.network.parameters(), recipe.lr, recipe.momentum, weight_decay=recipe.weight_decay
        )
        self.batches = minibatches(len(images), recipe.batch_size, seed=runtime.seed, device=runtime.device)
        self.augmentation = runtime.stream("supervised augmentation")
        self.steps = 0

    def step(self) -> None:
        """One update."""
        x, y = self.images.batch(self.batches(self.steps))
        loss = F.cross_entropy(self.network(crop_flip(x, generator=self.augmentation).to(self.dtype)), y)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.steps += 1
