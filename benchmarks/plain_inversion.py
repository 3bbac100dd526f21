"""Plain loops of methods that match batch-norm statistics, as public code runs them: nothing frozen, nothing fused.

Measures of speed are ratios to these. They share with the library what is not the loop: networks, augmentation,
weight drawing. Like the authors' code they freeze no weights in synthesis; unlike it they keep images and features on
the device.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfkd_lib import models
from dfkd_lib.data import crop_flip, resized_crop_flip
from dfkd_lib.methods import dfq
from dfkd_lib.runtime import Runtime


class PlainInversion:
    """The half that FastDFKD and CMI share: hooks on the teacher, the terms of the inversion loss, distillation.

    Args:
        generator: its weights at the start; copied.
    """

    def __init__(
        self, teacher: nn.Module, student: nn.Module, generator: nn.Module, settings: Any, runtime: Runtime
    ) -> None:
        self.settings, self.device, self.dtype = settings, runtime.device, runtime.dtype
        self.teacher = teacher.to(self.device, self.dtype).eval()
        self.student = student.to(self.device, self.dtype).train()
        own = copy.deepcopy(generator).to(self.device, self.dtype)
        self.generator = own.to(memory_format=torch.contiguous_format)
        self.n_classes = [m for m in self.teacher.modules() if isinstance(m, nn.Linear)][-1].out_features
        self.layers = [m for m in self.teacher.modules() if isinstance(m, nn.BatchNorm2d)]
        self.inputs: dict[nn.Module, Tensor] = {}
        for layer in self.layers:
            layer.register_forward_hook(lambda module, inputs, output: self.inputs.__setitem__(module, inputs[0]))
        self.opt_s = torch.optim.SGD(
            self.student.parameters(), settings.lr_student, settings.momentum, weight_decay=settings.weight_decay
        )
        self.pool: Tensor | None = None
        self.noise, self.augmentation = runtime.stream("noise"), runtime.stream("augmentation")

    def start(self) -> tuple[Tensor, Tensor]:
        """Noise and targets of one call."""
        n, settings = self.settings.synthesis_batch, self.settings
        z = torch.randn(n, settings.latent_dim, generator=self.noise, device=self.device, dtype=self.dtype)
        targets = torch.randint(self.n_classes, (n,), generator=self.noise, device=self.device).sort().values
        return z.requires_grad_(), targets

    def view(self, x: Tensor) -> Tensor:
        """Shifted and mirrored, as the networks see it."""
        return crop_flip(x, pad=self.settings.pad, flip=self.settings.flip, generator=self.augmentation)

    def batch_statistics(self) -> list[tuple[Tensor, Tensor]]:
        """Mean and biased variance of what the teacher's batch-norm layers have just seen."""
        seen = [self.inputs[layer] for layer in self.layers]
        return [(x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)) for x in seen]

    def bn_loss(self, batch: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Distance of such statistics from the running ones."""
        total = torch.zeros((), device=self.device, dtype=self.dtype)
        for layer, (mean, var) in zip(self.layers, batch, strict=True):
            assert layer.running_mean is not None and layer.running_var is not None
            total = total + torch.norm(layer.running_var - var, 2) + torch.norm(layer.running_mean - mean, 2)
        return total

    def adversarial_loss(self, s: Tensor, t: Tensor) -> Tensor:
        """-KL where both name the same class."""
        mask = (s.argmax(1) == t.argmax(1)).to(s.dtype)
        return -(F.kl_div(F.log_softmax(s, 1), F.softmax(t, 1), reduction="none").sum(1) * mask).mean()

    def store(self, x: Tensor) -> None:
        """Into the pool, at eight bits a colour as in a file."""
        x = (x.float() * 255).round() / 255
        self.pool = x if self.pool is None else torch.cat([self.pool, x])

    def distil(self) -> None:
        """One update of the student on random images of the pool."""
        assert self.pool is not None
        settings = self.settings
        at = torch.rand(settings.batch_size, generator=self.augmentation, device=self.device) * len(self.pool)
        self.imitate(self.view(self.pool[at.long()]).to(self.dtype))

    def imitate(self, x: Tensor) -> None:
        """One update of the student on x."""
        settings = self.settings
        with torch.no_grad():
            t = self.teacher(x)
        s = self.student(x)
        temperature = settings.temperature
        loss = F.kl_div(F.log_softmax(s / temperature, 1), F.softmax(t / temperature, 1), reduction="batchmean")
        self.opt_s.zero_grad()
        (loss * temperature**2).backward()
        self.opt_s.step()


class PlainFast(PlainInversion):
    """FastDFKD with first-order MAML, word for word."""

    def __init__(
        self, teacher: nn.Module, student: nn.Module, generator: nn.Module, settings: Any, runtime: Runtime
    ) -> None:
        super().__init__(teacher, student, generator, settings, runtime)
        self.meta_opt = torch.optim.Adam(
            self.generator.parameters(), settings.g_steps * settings.lr_generator, betas=(0.5, 0.999)
        )
        self.averages: list[tuple[Tensor, Tensor]] = []

    def synthesize(self) -> None:
        """One call: k steps of a copy of the meta-generator, then one of the meta-generator."""
        settings, rho = self.settings, self.settings.rho
        self.student.eval()
        fast_generator = copy.deepcopy(self.generator).train()
        z, targets = self.start()
        opt = torch.optim.Adam(
            [{"params": fast_generator.parameters()}, {"params": [z], "lr": settings.lr_z}],
            lr=settings.lr_generator,
            betas=(0.5, 0.999),
        )
        self.meta_opt.zero_grad()
        best_loss, best_x = float("inf"), z
        for _ in range(settings.g_steps):
            x = fast_generator(z)
            view = self.view(x)
            t, s = self.teacher(view), self.student(view)
            batch = self.batch_statistics()
            mixed = batch
            if self.averages:
                mixed = [
                    ((1 - rho) * mean + rho * m, (1 - rho) * var + rho * v)
                    for (mean, var), (m, v) in zip(batch, self.averages, strict=True)
                ]
            loss = settings.bn * self.bn_loss(mixed) + settings.oh * F.cross_entropy(t, targets)
            loss = loss + settings.adv * self.adversarial_loss(s, t)
            if loss.item() < best_loss:
                best_loss, best_x = loss.item(), x.detach()
            opt.zero_grad()
            loss.backward()
            for p, q in zip(self.generator.parameters(), fast_generator.parameters(), strict=True):
                assert q.grad is not None
                p.grad = q.grad.clone() if p.grad is None else p.grad + q.grad
            opt.step()
        last = [(mean.detach(), var.detach()) for mean, var in batch]
        if self.averages:
            last = [
                (rho * m + (1 - rho) * mean, rho * v + (1 - rho) * var)
                for (mean, var), (m, v) in zip(last, self.averages, strict=True)
            ]
        self.averages = last
        self.meta_opt.step()
        self.student.train()
        self.store(best_x)


class PlainCMI(PlainInversion):
    """CMI, word for word.

    Args:
        head: the projection head's weights at the start; copied.
    """

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        generator: nn.Module,
        head: nn.Module,
        settings: Any,
        runtime: Runtime,
    ) -> None:
        super().__init__(teacher, student, generator, settings, runtime)
        self.head = copy.deepcopy(head).to(self.device, self.dtype)
        self.opt_head = torch.optim.Adam(self.head.parameters(), settings.lr_generator)
        n_features = next(self.head.parameters()).shape[1]
        self.memory = torch.zeros(settings.memory_size, 2 * n_features, device=self.device, dtype=self.dtype)
        self.stored = self.pointer = 0

    def remember(self, rows: Tensor) -> None:
        """Write pairs of features into the memory, whose size is a multiple of the batch."""
        self.memory[self.pointer : self.pointer + len(rows)] = rows
        self.pointer = (self.pointer + len(rows)) % len(self.memory)
        self.stored = min(self.stored + len(rows), len(self.memory))

    def features(self) -> Tensor:
        """The mean over pixels of what each layer has just seen."""
        return torch.cat([self.inputs[layer].mean((2, 3)) for layer in self.layers], 1)

    def contrastive_loss(self, local: Tensor, whole: Tensor) -> Tensor:
        """L_cr against negatives from the memory."""
        settings, n = self.settings, len(local)
        keys = torch.rand(len(self.memory), generator=self.noise, device=self.device)
        at = keys[: self.stored].argsort()[: settings.negatives]
        stored_local, stored_whole = self.memory[at].chunk(2, 1)
        u = F.normalize(self.head(torch.cat([local, stored_local])), dim=1)
        v = F.normalize(self.head(torch.cat([whole, stored_whole])), dim=1).detach()
        logits = u @ v.T / settings.cr_temperature
        each = F.cross_entropy(logits, torch.arange(len(logits), device=self.device), reduction="none")
        return each[:n].mean() + (each[n:].mean() if len(each) > n else 0)

    def synthesize(self) -> None:
        """One call: a new generator, `inner_steps` updates of generator, noise and head."""
        settings = self.settings
        self.student.eval()
        self.generator.train()
        z, targets = self.start()
        models.draw_weights(self.generator, self.noise)
        opt = torch.optim.Adam([*self.generator.parameters(), z], settings.lr_generator, betas=(0.5, 0.999))
        best_loss, best_x, best_features = float("inf"), z, z
        for _ in range(settings.inner_steps):
            x = self.generator(z)
            view = self.view(x)
            t, s = self.teacher(view), self.student(view)
            loss = settings.bn * self.bn_loss(self.batch_statistics()) + settings.oh * F.cross_entropy(t, targets)
            loss = loss + settings.adv * self.adversarial_loss(s, t)
            whole = self.features()
            self.teacher(
                resized_crop_flip(x, scale=settings.local_scale, flip=settings.flip, generator=self.augmentation)
            )
            local = self.features()
            loss = loss + settings.cr * self.contrastive_loss(local, whole)
            if loss.item() < best_loss:
                best_loss, best_x = loss.item(), x.detach()
                best_features = torch.cat([local, whole], 1).detach()
            opt.zero_grad()
            self.opt_head.zero_grad()
            loss.backward()
            opt.step()
            self.opt_head.step()
        self.student.train()
        self.store(best_x)
        self.remember(best_features)


class PlainDFQ(PlainInversion):
    """DFQ in the form of CMI's toolbox: batch-norm statistics, one-hot and balance terms, adversarial KL."""

    def __init__(
        self, teacher: nn.Module, student: nn.Module, generator: nn.Module, settings: dfq.Settings, runtime: Runtime
    ) -> None:
        super().__init__(teacher, student, generator, settings, runtime)
        self.opt_g = torch.optim.Adam(self.generator.parameters(), settings.lr_generator, betas=settings.betas)

    def images(self) -> Tensor:
        """Of fresh noise."""
        shape = (self.settings.batch_size, self.settings.latent_dim)
        made: Tensor = self.generator(torch.randn(shape, generator=self.noise, device=self.device, dtype=self.dtype))
        return made

    def step(self) -> None:
        """One update of the generator, `kd_steps` of the student."""
        settings = self.settings
        self.student.eval()
        self.generator.train()
        fake = self.images()
        t, s = self.teacher(fake), self.student(fake)
        belief = F.softmax(t, 1).mean(0)
        loss = settings.bn * self.bn_loss(self.batch_statistics()) + settings.oh * F.cross_entropy(t, t.argmax(1))
        loss = loss + settings.balance * (belief * belief.log()).sum()
        loss = loss - settings.adv * F.kl_div(F.log_softmax(s, 1), F.softmax(t, 1), reduction="batchmean")
        self.opt_g.zero_grad()
        loss.backward()
        self.opt_g.step()
        self.student.train()
        self.generator.eval()
        for _ in range(settings.kd_steps):
            with torch.no_grad():
                fake = self.images()
            self.imitate(fake)
