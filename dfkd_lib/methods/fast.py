"""FastDFKD ("Up to 100x Faster Data-free Knowledge Distillation"), arXiv 2112.06253: a meta-generator near any batch.

Inverting a batch from nothing takes hundreds of steps, most of them spent on features that all images share. A
meta-generator theta keeps these: each call copies it and takes only k steps of copy and noise together,

    (theta'_{j+1}, z_{j+1}) = Adam step on L_inv(theta'_j, z_j),  theta'_0 = theta,  z_0 ~ N(0, I),
    L_inv = a_bn L_bn + a_oh CE(T(x), c) - a_adv KL where teacher and student agree,

stores the best of the k batches, and moves theta by the sum of the k gradients (first-order MAML), so that the
next call starts nearer. The student learns on random batches of all that is stored.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import losses, models
from ..data import crop_flip
from ..errors import InputError, unknown
from ..runtime import Runtime
from ..taps import batch_norm_layers, tapped
from ..training.players import adam, check_positive, recordable, start_anew
from ..training.replay import Replay
from .distiller import BankDistiller, Distillation
from .inversion import Best, MomentumStatistics, batch_norm_loss, check_bn_scale

META = ("fomaml", "reptile", "sequential", "reset")
REPTILE_SCALE = 67.0  # of the authors' code; under Adam nearly without effect


@dataclass(frozen=True)
class Settings(Distillation):
    """The hyper-parameters of one run; defaults are Fast-5 of the authors' CIFAR script for Wide-ResNets.

    Attributes:
        latent_dim, ngf: n_z and the unit of width of the generator.
        synthesis_batch: images made, and stored, in each call.
        g_steps: k, steps per call. The authors' rates: lr_generator 5e-3, lr_z 0.015 for k = 2; 3e-3, 0.01 for
            k = 5; 2e-3, 0.01 for k = 10.
        lr_generator, lr_z: Adam on the copy of the generator and on the noise, new in each call. The
            meta-generator's own Adam lasts and has the rate k lr_generator.
        meta: how a call leaves the meta-generator: "fomaml" moves it by the sum of the call's gradients, "reptile"
            by the difference to the copy, "sequential" replaces it by the copy, and "reset" never uses it but
            draws a new generator for each call.
        bn, oh, adv: a_bn, a_oh, a_adv.
        bn_scale: "absolute", the papers' L_bn, or "relative", ours, which is free of the network's scale; see
            :func:`dfkd_lib.methods.inversion.batch_norm_loss`.
        rho: momentum of the batch-norm statistics; the gradient of L_bn is scaled by 1 - rho.
        warmup: first calls that only synthesise. The adversarial term is off before the last of them.
        reset_l0: number of the call, from 1, before which the first layer of the meta-generator is drawn anew; 0
            is never.
        pad, flip: augmentation of what teacher and student see, in synthesis and in distillation.
        bank_size: images kept, the oldest make room.
    """

    kd_steps: int = 400
    temperature: float = 20.0
    lr_student: float = 0.2
    latent_dim: int = 256
    ngf: int = 64
    synthesis_batch: int = 256
    g_steps: int = 5
    lr_generator: float = 3e-3
    lr_z: float = 0.01
    meta: str = "fomaml"
    bn: float = 10.0
    bn_scale: str = "absolute"
    oh: float = 0.4
    adv: float = 1.1
    rho: float = 0.9
    warmup: int = 20
    reset_l0: int = 140
    pad: int = 4
    flip: bool = True
    bank_size: int = 56_320

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bn_scale(self.bn_scale)
        check_positive(self, "latent_dim", "ngf", "g_steps", "lr_generator", "lr_z", "bank_size")
        for name in ("bn", "oh", "adv", "warmup", "reset_l0", "pad"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} must be 0 or more, not {getattr(self, name)!r}")
        if self.synthesis_batch < 2:
            raise InputError(f"synthesis_batch must be at least 2 (batch normalisation), not {self.synthesis_batch}")
        if not 0 <= self.rho < 1:
            raise InputError(f"rho must be in [0, 1), not {self.rho!r}")
        if self.meta not in META:
            raise unknown("meta", self.meta, META)


# Ours, the first two picked on held-out images; a run takes `warmup` calls more than its updates need.
_SMALL: dict[str, Any] = {"batch_size": 128, "synthesis_batch": 128, "g_steps": 5, "reset_l0": 0}
_GREY = _SMALL | {"lr_generator": 5e-3, "lr_z": 0.015, "ngf": 16, "flip": False}
PRESETS: dict[str, dict[str, Any]] = {
    "digits": _GREY
    | {"batch_size": 64, "kd_steps": 10, "synthesis_batch": 64, "latent_dim": 64, "warmup": 20, "pad": 1},
    "mnist": _GREY
    | {
        "batch_size": 64, "kd_steps": 20, "temperature": 4.0, "lr_student": 0.1, "latent_dim": 128,
        "synthesis_batch": 64, "warmup": 15, "pad": 2,
    },
    # The authors' 220 calls on a tenth of their student updates.
    "cifar10": {"kd_steps": 40, "bn_scale": "relative"},
}  # fmt: skip


class Fast(BankDistiller):
    """One call takes k steps from the meta-generator, then the student takes `kd_steps` updates on the bank.

    Args:
        teacher, student, image_shape, runtime: see :class:`dfkd_lib.methods.distiller.Distiller`.

    Attributes:
        generator: the meta-generator theta, noise [B, latent_dim] -> images in [0, 1].
        inner: theta', a module of its own, so that nothing it learns can reach theta unasked.

    Raises:
        InputError: the teacher has no batch norm, or the generator cannot make images of this shape.
    """

    PARTS: tuple[str, ...] = (
        *BankDistiller.PARTS,
        "generator",
        "meta_optimizer",
        "generator_scaler",
        "statistics",
        "redraw",
    )

    def __init__(
        self, teacher: nn.Module, student: nn.Module, image_shape: Sequence[int], settings: Settings, runtime: Runtime
    ) -> None:
        bank = {"bank_size": settings.bank_size, "pad": settings.pad, "flip": settings.flip}
        super().__init__(teacher, student, image_shape, settings, runtime, **bank)  # type: ignore[arg-type]
        self.settings = settings
        self.layers = batch_norm_layers(self.teacher)
        channels, height, width = self.image_shape
        self.generator, self.inner = (
            runtime.prepare(
                models.build_generator(
                    "toolbox_small",
                    latent_dim=settings.latent_dim,
                    image_shape=(channels, height, width),
                    mean=(0.5,) * channels,
                    std=(0.5,) * channels,
                    ngf=settings.ngf,
                )
            ).train()
            for _ in range(2)
        )
        self.meta_optimizer = adam(self.generator, settings.g_steps * settings.lr_generator, (0.5, 0.999))
        for theta in self.generator.parameters():
            theta.grad = torch.zeros_like(theta)
        self.generator_scaler = runtime.scaler()
        self.statistics = MomentumStatistics(settings.rho, runtime.device, settings.bn_scale)
        self.redraw = runtime.stream("fast redraw")
        # What one call works on; each call starts these anew, in place.
        self.z = torch.zeros(settings.synthesis_batch, settings.latent_dim, device=runtime.device, dtype=runtime.dtype)
        self.z.requires_grad_()
        self.targets = torch.zeros(settings.synthesis_batch, dtype=torch.int64, device=runtime.device)
        self.inner_optimizer = recordable(inner_optimizer(self.inner, self.z, settings), runtime)
        self.best = Best(runtime)
        self.inversion = Replay(self.inversion_step, runtime, [self.augmentation])

    @property
    def warming_up(self) -> bool:
        """Whether this call only synthesises."""
        return self.calls < self.settings.warmup

    @property
    def adversarial(self) -> bool:
        """Whether this call rewards disagreement: from the last call of the warm-up on, one before distillation."""
        return self.settings.adv > 0 and self.calls + 1 >= self.settings.warmup

    @property
    def newest_call(self) -> int:
        """See :attr:`BankDistiller.newest_call`."""
        return self.settings.synthesis_batch

    def synthesize(self) -> dict[str, Tensor]:
        """k steps from the meta-generator, the best batch into the bank, one step of the meta-generator.

        Returns:
            "first loss" and "best loss" of the call; "bn loss", "target loss" and, once it counts, "agreeing KL"
            at the last step.
        """
        settings = self.settings
        if self.calls + 1 == settings.reset_l0:
            draw_first_layer(self.generator, self.redraw)
        self.inner.load_state_dict(self.generator.state_dict())
        if settings.meta == "reset":
            models.draw_weights(self.inner, self.redraw)
        with torch.no_grad():
            self.z.copy_(self.draw_noise(*self.z.shape))
        self.targets.copy_(self.draw_targets(len(self.targets)))
        start_anew(self.inner_optimizer)
        self.meta_optimizer.zero_grad(set_to_none=False)
        self.best.start()
        steps = [self.inversion(self.adversarial, self.statistics.remembering) for _ in range(settings.g_steps)]
        self.budget.teacher_passes += settings.g_steps * settings.synthesis_batch
        self.statistics.update()
        self.meta_update()
        self.store(self.best.tensors[0])
        (first, _), (_, terms) = steps[0], steps[-1]
        return {**terms, "first loss": first, "best loss": self.best.loss.clone()}

    def inversion_step(self) -> tuple[Tensor, dict[str, Tensor]]:
        """One step of copy and noise, a :class:`~..training.replay.Replay`'s work; returns loss and terms, detached."""
        with self.runtime.autocast():
            x = self.inner(self.z).to(self.runtime.dtype)
        loss, terms = self.inversion_loss(self.augment(x), self.targets)
        self.best.offer(loss, x)
        self.inner_update(self.inner_optimizer, loss)
        return loss.detach(), terms

    def inversion_loss(self, x: Tensor, targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """L_inv on one augmented view, and its terms, detached."""
        settings = self.settings
        with self.runtime.autocast():
            t, seen = self.look(x, self.layers)
            s = self.opinion(x) if self.adversarial else t
        terms = {"bn loss": self.statistics.loss(seen), "target loss": losses.cross_entropy(t, targets)}
        loss = settings.bn * terms["bn loss"] + settings.oh * terms["target loss"]
        if self.adversarial:
            terms["agreeing KL"] = losses.agreeing_kl(s, t)
            loss = loss - settings.adv * terms["agreeing KL"]
        return loss, {name: term.detach() for name, term in terms.items()}

    def inner_update(self, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
        """One step of copy and noise; for FOMAML its gradient is also added to the meta-generator's."""
        scaler = self.generator_scaler
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        if self.settings.meta == "fomaml":
            for theta, fast in zip(self.generator.parameters(), self.inner.parameters(), strict=True):
                # float16 can overflow in a step, which the scaler then skips; so does the sum.
                if fast.grad is not None:
                    step = torch.nan_to_num(fast.grad, 0.0, 0.0, 0.0) if scaler.is_enabled() else fast.grad
                    theta.grad.add_(step)  # type: ignore[union-attr]  # made in the constructor
        scaler.step(optimizer)
        scaler.update()

    @torch.no_grad()
    def meta_update(self) -> None:
        """Move theta as `meta` says, after the last inner step."""
        if self.settings.meta == "sequential":
            self.generator.load_state_dict(self.inner.state_dict())
        elif self.settings.meta == "reptile":
            for theta, fast in zip(self.generator.parameters(), self.inner.parameters(), strict=True):
                theta.grad.copy_(REPTILE_SCALE * (theta - fast))  # type: ignore[union-attr]
        if self.settings.meta in ("fomaml", "reptile"):
            self.meta_optimizer.step()


def inner_optimizer(generator: nn.Module, z: Tensor, settings: Settings) -> torch.optim.Adam:
    """The Adam of one call: generator and noise, each at its own rate."""
    optimizer = adam(generator, settings.lr_generator, (0.5, 0.999))
    optimizer.add_param_group({"params": [z], "lr": settings.lr_z})
    return optimizer


@torch.no_grad()
def draw_first_layer(generator: nn.Module, random: torch.Generator) -> None:
    """Draw the first linear layer and the scale of the first batch norm from N(0, 0.02), biases 0.

    A scale near 0, not 1, is what the authors' code draws.
    """
    for kind in (nn.Linear, nn.BatchNorm2d):
        layer = next(m for m in generator.modules() if isinstance(m, kind))
        nn.init.normal_(layer.weight, 0.0, 0.02, generator=random)
        nn.init.zeros_(layer.bias)


def descent(method: Fast, generator: nn.Module, n_steps: int, *, seed: int = 0) -> Tensor:
    """The losses of one long call that starts from a copy of `generator`; nothing of the method changes.

    The direct test of the features that all images share: noise, targets and augmentation depend on the seed
    alone, so two generators are compared on the same batch, by the plain loss a_bn L_bn + a_oh CE, without
    student and momentum.

    Returns:
        The loss before each step, [n_steps].
    """
    settings, runtime = method.settings, method.runtime
    random = runtime.stream(f"fast descent {seed}")
    shape = (settings.synthesis_batch, settings.latent_dim)
    z = torch.randn(shape, generator=random, device=runtime.device, dtype=runtime.dtype).requires_grad_()
    targets = torch.randint(method.n_classes, shape[:1], generator=random, device=runtime.device)
    walker = copy.deepcopy(generator).train()
    optimizer = inner_optimizer(walker, z, settings)
    seen_losses = []
    for _ in range(n_steps):
        with runtime.autocast():
            x = crop_flip(walker(z).to(runtime.dtype), pad=settings.pad, flip=settings.flip, generator=random)
            with tapped(method.layers) as seen:
                t = method.teacher(runtime.images(x)).to(runtime.dtype)
        loss = settings.bn * batch_norm_loss(seen, settings.bn_scale) + settings.oh * losses.cross_entropy(t, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen_losses.append(loss.detach())
    return torch.stack(seen_losses)
