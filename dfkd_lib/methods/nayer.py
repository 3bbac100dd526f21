"""NAYER: noisy layer data generation for data-free distillation, arXiv 2310.00258.

A generator that turns class embeddings into images needs few steps, because its input already says which class it
is; but a constant input gives constant images, and noise beside it is ignored. So the randomness sits in a layer:

    x = G(W_k BN(e_c) + b_k),   W_k ~ N(0, 1) entrywise, drawn anew for every batch and then trained with G.

One noisy layer W_k serves one image of every class. The inversion loss is FastDFKD's; the generator is drawn anew
every `g_life` outer iterations. Where the paper embeds class names with a text encoder pretrained on web data, the
default here is a random code: in distribution a fresh layer sees embeddings only through their Gram matrix.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import losses, models
from ..errors import InputError, unknown
from ..runtime import Runtime
from ..taps import batch_norm_layers
from ..training.players import adam, check_positive, recordable, start_anew, update
from ..training.replay import Replay
from .class_codes import CODES, class_codes
from .distiller import BankDistiller, Distillation
from .inversion import Best, MomentumStatistics, check_bn_scale


@dataclass(frozen=True)
class Settings(Distillation):
    """The hyper-parameters of one run; defaults are those of the authors' CIFAR-10 scripts, the code excepted.

    The student is in eval mode in all of the synthesis. The authors' code puts it there for the first batch of an
    outer iteration and back into train mode after it, so their later batches meet a student in train mode.

    Attributes:
        warmup: outer iterations that only synthesise, without the adversarial term.
        batches_warmup, batches: synthesis batches per outer iteration, during the warm-up and after it.
        synthesis_batch: B, images per synthesis batch; a multiple of the number of classes balances them.
        g_steps: inner steps per batch.
        g_life: outer iterations until generator and embedding normalisation are drawn anew.
        redraw: draw the noisy layers for every batch; False, the paper's ablation, draws them with the generator.
        lr_generator: Adam of generator, embedding normalisation and noisy layers, betas (0.5, 0.999), a new one
            per batch.
        bn, oh, adv: weights of the batch-norm, target and adversarial terms.
        bn_scale: "absolute", the papers' L_bn, or "relative", ours, which is free of the network's scale; see
            :func:`dfkd_lib.methods.inversion.batch_norm_loss`.
        rho: momentum of the batch-norm statistics, see `MomentumStatistics`.
        code: where the class embeddings come from, see :func:`class_codes`.
        embedding_dim, latent_dim: d_e and d_v, width of the embeddings and of the generator's input.
        ngf: unit of the generator's channel widths.
        bank_size: images kept; the authors keep all, 160,000 at 100 epochs.
        pad, flip: augmentation of what both networks see.
    """

    batch_size: int = 512
    kd_steps: int = 400
    temperature: float = 20.0
    lr_student: float = 0.2
    warmup: int = 20
    batches_warmup: int = 10
    batches: int = 2
    synthesis_batch: int = 400
    g_steps: int = 30
    g_life: int = 10
    redraw: bool = True
    lr_generator: float = 4e-3
    bn: float = 10.0
    bn_scale: str = "absolute"
    oh: float = 0.5
    adv: float = 1.33
    rho: float = 0.9
    code: str = "random"
    embedding_dim: int = 512
    latent_dim: int = 1000
    ngf: int = 64
    bank_size: int = 50_000
    pad: int = 4
    flip: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bn_scale(self.bn_scale)
        check_positive(self, "batches", "g_steps", "g_life", "lr_generator", "embedding_dim", "latent_dim", "ngf",
                       "bank_size")  # fmt: skip
        if self.synthesis_batch < 2:
            raise InputError(f"synthesis_batch must be at least 2 (batch normalisation), not {self.synthesis_batch}")
        if self.warmup < 0 or (self.warmup and self.batches_warmup < 1):
            raise InputError(
                f"warmup {self.warmup} with batches_warmup {self.batches_warmup} makes no sense; a warm-up is 0 or "
                "more outer iterations of at least 1 batch"
            )
        for name in ("bn", "oh", "adv", "pad"):
            if not getattr(self, name) >= 0:
                raise InputError(f"{name} must be 0 or more, not {getattr(self, name)!r}")
        if not 0 <= self.rho < 1:
            raise InputError(f"rho must be in [0, 1), not {self.rho}")
        if self.code not in CODES:
            raise unknown("code", self.code, CODES)


# The schedule and the weights are the paper's, shortened; chosen on held-out images, the last column untuned.
PRESETS: dict[str, dict[str, Any]] = {
    "digits": {
        "batch_size": 64, "kd_steps": 20, "temperature": 4.0, "lr_student": 0.1, "warmup": 4, "batches_warmup": 3,
        "batches": 1, "synthesis_batch": 100, "g_steps": 15, "g_life": 4, "lr_generator": 0.01, "embedding_dim": 64,
        "latent_dim": 128, "ngf": 8, "pad": 1, "flip": False, "bank_size": 4000,
    },
    "mnist": {
        "batch_size": 64, "kd_steps": 50, "temperature": 4.0, "lr_student": 0.1, "warmup": 4, "batches_warmup": 2,
        "batches": 1, "synthesis_batch": 60, "g_steps": 30, "g_life": 5, "lr_generator": 0.01, "embedding_dim": 128,
        "latent_dim": 256, "ngf": 16, "pad": 2, "flip": False, "bank_size": 20_000, "bn": 10.0,
    },
    # The authors' batches of the student are 512. 100 outer iterations as theirs, with half the new images in each
    # and a quarter of the warm-up.
    "cifar10": {
        "batch_size": 256, "kd_steps": 80, "warmup": 10, "batches_warmup": 5, "batches": 1, "bn_scale": "relative",
    },
}  # fmt: skip


def block_targets(n: int, n_classes: int, random: torch.Generator) -> Tensor:
    """Classes 0, 1, ... again and again, and at the end n mod n_classes different random ones; int64 [n].

    The last, incomplete block has a noisy layer of its own, which would make two identical images of one class.
    """
    whole = torch.arange(n_classes, device=random.device).repeat(n // n_classes)
    rest = torch.randperm(n_classes, generator=random, device=random.device)[: n % n_classes]
    return torch.cat([whole, rest])


class Embedding(nn.Module):
    """c -> BN(e_c): the class codes, standardised over the batch so that what all classes share drops out.

    Without it the text embeddings of all classes nearly coincide (mean cosine 0.87 on CIFAR-10).

    Args:
        codes: [C, d_e], kept as a buffer.
        standardize: False takes the codes as they are.

    Raises:
        InputError: codes of another number of classes, or not finite.
    """

    codes: Tensor

    def __init__(self, codes: Tensor, n_classes: int, *, standardize: bool = True) -> None:
        super().__init__()
        if codes.ndim != 2 or len(codes) != n_classes:
            raise InputError(f"class codes have shape {list(codes.shape)}, not one row for each of {n_classes} classes")
        if not torch.isfinite(codes).all():
            raise InputError("class codes are NaN or infinite")
        if len(codes.unique(dim=0)) < n_classes:
            warnings.warn("two classes have the same code, so they start from the same latent", stacklevel=2)
        self.register_buffer("codes", codes)
        self.normalize = nn.BatchNorm1d(codes.shape[1]) if standardize else nn.Identity()

    def forward(self, targets: Tensor) -> Tensor:
        """[B] -> [B, d_e]."""
        return self.normalize(self.codes[targets])


class NoisyLayers(nn.Module):
    """v_i = W_k e_i + b_k for the images i of block k: all layers in one tensor, one batched product.

    Args:
        n_layers: m.
        n_classes: C, images per layer.
    """

    def __init__(self, n_layers: int, n_classes: int, d_e: int, d_v: int) -> None:
        super().__init__()
        self.n_classes = n_classes
        self.weight = nn.Parameter(torch.empty(n_layers, d_e, d_v))
        self.bias = nn.Parameter(torch.empty(n_layers, 1, d_v))

    @torch.no_grad()
    def redraw(self, random: torch.Generator) -> None:
        """W_k ~ N(0, 1), b_k = 0, in place."""
        self.weight.normal_(generator=random)
        self.bias.zero_()

    def forward(self, e: Tensor) -> Tensor:
        """[B, d_e], (m - 1) C < B <= m C -> [B, d_v]."""
        layers, d_e, d_v = self.weight.shape
        padded = nn.functional.pad(e, (0, 0, 0, layers * self.n_classes - len(e)))
        v = torch.baddbmm(self.bias, padded.view(layers, self.n_classes, d_e), self.weight)
        return v.view(-1, d_v)[: len(e)]


@torch.no_grad()
def draw_default_weights(network: nn.Module, random: torch.Generator) -> None:
    """What a freshly built network holds: linear and convolutional weights and biases uniform within
    1 / sqrt(fan-in), batch normalisation as new. The authors renew their generator so, not with N(0, 0.02)."""
    for layer in network.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            bound = 1 / math.sqrt(layer.weight[0].numel())
            for weights in layer.parameters(recurse=False):
                weights.uniform_(-bound, bound, generator=random)
        elif isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            layer.reset_parameters()


class NAYER(BankDistiller):
    """See the module; arguments are those of :class:`Distiller`.

    Attributes:
        generator: the body G, latents [B, latent_dim] -> images.
        embedding, noisy: what stands before it.
        curve: the unweighted terms at each inner step of the newest batch, [g_steps] each.
    """

    PARTS: tuple[str, ...] = (
        *BankDistiller.PARTS,
        "generator",
        "embedding",
        "noisy",
        "generator_scaler",
        "statistics",
    )

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        image_shape: Sequence[int],
        settings: Settings,
        runtime: Runtime,
    ) -> None:
        super().__init__(
            teacher, student, image_shape, settings, runtime,
            bank_size=settings.bank_size, pad=settings.pad, flip=settings.flip,
        )  # fmt: skip
        self.settings = settings
        self.layers = batch_norm_layers(self.teacher)
        channels, height, width = self.image_shape
        generator = models.build_generator(
            "toolbox_small", latent_dim=settings.latent_dim, image_shape=(channels, height, width),
            mean=(0.5,) * channels, std=(0.5,) * channels, ngf=settings.ngf,
        )  # fmt: skip
        self.generator = runtime.prepare(generator).train()
        codes = class_codes(
            settings.code, self.n_classes, settings.embedding_dim, self.teacher, random=runtime.stream("class codes")
        )
        standardize = settings.code != "clip-gram"
        self.embedding = runtime.prepare(Embedding(codes, self.n_classes, standardize=standardize)).train()
        n_layers = -(-settings.synthesis_batch // self.n_classes)
        self.noisy = runtime.prepare(NoisyLayers(n_layers, self.n_classes, codes.shape[1], settings.latent_dim))
        self.generator_scaler = runtime.scaler()
        self.statistics = MomentumStatistics(settings.rho, runtime.device, settings.bn_scale)
        # What one batch works on; each batch starts these anew, in place.
        self.targets = torch.zeros(settings.synthesis_batch, dtype=torch.int64, device=runtime.device)
        players = nn.ModuleList([self.generator, self.embedding, self.noisy])
        self.optimizer = recordable(adam(players, settings.lr_generator, (0.5, 0.999)), runtime)
        self.best = Best(runtime)
        self.inversion = Replay(self.inversion_step, runtime, [self.augmentation])
        self.renew()

    @property
    def warming_up(self) -> bool:
        """See :meth:`Distiller.warming_up`."""
        return self.calls < self.settings.warmup

    @property
    def newest_call(self) -> int:
        """See :meth:`BankDistiller.newest_call`: the newest batch, in which class c is image c, C + c, ..."""
        return self.settings.synthesis_batch

    @property
    def images_per_call(self) -> int:
        """See :meth:`BankDistiller.images_per_call`: those of all batches, the warm-up's where they are more."""
        settings = self.settings
        return settings.synthesis_batch * max(settings.batches, settings.batches_warmup if settings.warmup else 0)

    def renew(self) -> None:
        """Generator, embedding normalisation and noisy layers as new."""
        draw_default_weights(self.generator, self.noise)
        draw_default_weights(self.embedding, self.noise)
        self.noisy.redraw(self.noise)

    def synthesize(self) -> dict[str, Tensor]:
        """Renew the generator if its life is over, then invert and store this iteration's batches.

        Returns:
            "bn loss", "target loss" and, after the warm-up, "agreeing KL" at the last inner step, and "best loss";
            means over the batches.
        """
        settings = self.settings
        if self.calls and self.calls % settings.g_life == 0:  # the first was drawn at the start
            self.renew()
        batches = settings.batches_warmup if self.warming_up else settings.batches
        made = [self.invert() for _ in range(batches)]
        return {name: torch.stack([metrics[name] for metrics in made]).mean() for name in made[0]}

    def invert(self) -> dict[str, Tensor]:
        """One batch: new noisy layers, `g_steps` updates, its best images into the bank."""
        settings = self.settings
        if settings.redraw:
            self.noisy.redraw(self.noise)
        self.targets.copy_(block_targets(settings.synthesis_batch, self.n_classes, self.noise))
        start_anew(self.optimizer)  # the moments of the batch before belong to other layers
        self.best.start()
        steps = [self.inversion(self.warming_up, self.statistics.remembering) for _ in range(settings.g_steps)]
        self.budget.teacher_passes += settings.g_steps * settings.synthesis_batch
        self.statistics.update()
        self.store(self.best.tensors[0])
        self.curve = {name: torch.stack([terms[name] for terms in steps]) for name in steps[0]}
        return {**steps[-1], "best loss": self.best.loss.clone()}

    def inversion_step(self) -> dict[str, Tensor]:
        """One inner step, a :class:`~..training.replay.Replay`'s work; returns its terms, detached."""
        settings, targets = self.settings, self.targets
        with self.runtime.autocast():
            x = self.forward(targets)
            view = self.augment(x)
            t, seen = self.look(view, self.layers)
            s = t if self.warming_up else self.opinion(view)
        terms = {"bn loss": self.statistics.loss(seen), "target loss": losses.cross_entropy(t, targets)}
        loss = settings.bn * terms["bn loss"] + settings.oh * terms["target loss"]
        if not self.warming_up:
            terms["agreeing KL"] = losses.agreeing_kl(s, t)
            loss = loss - settings.adv * terms["agreeing KL"]
        self.best.offer(loss, x)
        update(self.optimizer, loss, self.generator_scaler)
        return {name: term.detach() for name, term in terms.items()}

    def forward(self, targets: Tensor) -> Tensor:
        """x = G(W BN(e) + b) for block-ordered targets [B]; images [B, C, H, W] in [0, 1]."""
        return self.generator(self.noisy(self.embedding(targets)))
