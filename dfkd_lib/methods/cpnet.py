"""CPNet: coupling network for data-free distillation, ICCV 2025 (no arXiv version): NAYER with a generator that
mirrors the teacher.

**The released code, repaired; the paper could not be read; no replication of published figures.** The generator is
built as an approximate inverse of the teacher, one block per block of the teacher, cut where batch-norm layers
(nodes, deepest first) look at feature maps h_n:

    u_0 = BN(Linear(v)),  u_{n+1} = LReLU(BN(conv(up(u_n)))),  x = sigmoid(conv(up(u_{N-1}))),

with u_n of the shape of h_n. Noisy layers, schedule, pool and student are NAYER's. With tau(x) the one view of the
batch that both networks see (crop, flip, colour jitter, CutMix), the loss of an inner step is

    L = a_bn L_bn + a_oh L_ce + a_adv (L_kl + beta L_feat) + a_al L_al,
    L_ce = CE with CutMix's labels, (1 - a_i) CE(t_i, c_i) + a_i CE(t_i, c_pi(i)),
    L_kl = -KL(p_S || p_T) where both agree, which is the other direction than NAYER's,
    L_al = sum_n mean (u_n - sg[(h_n - mean) / std * running std + running mean])^2,
    L_feat = mean |cos(f_i - f*_{c_i}, b)|, f*_c = (delta e_c - bias) P, b = 1^T P, P a damped inverse of W^T,

where W is the teacher's last linear layer and f its input; L_kl and L_feat are off in the warm-up.

Repairs. The authors' first inner step stops at a name that is defined nowhere; that line is dropped. Their `dist`,
read nowhere, is beta; its default, 0, is their script's value for WRN-40-2 to WRN-16-1. A channel without variance
does not divide by zero. The student is in eval mode in all of the synthesis. A last layer without bias has bias 0.
Left as released: u_n belongs to the plain image, h_n to its view; the best step is picked by losses of mixed and
unmixed views alike; f*_{c_i} ignores CutMix.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import losses
from ..compiling import as_written
from ..data.augment import colour_jitter, cut_mix
from ..errors import InputError
from ..runtime import Runtime
from ..taps import Seen, last_linear
from ..training.players import adam, recordable, update
from . import nayer

DAMPING = 0.1  # singular values of W below it count as this
SMOOTHING = 0.1  # epsilon: a feature f*_c gives class c the belief 1 - epsilon


@dataclass(frozen=True)
class Settings(nayer.Settings):
    """The hyper-parameters of one run: NAYER's, whose defaults are also those of CPNet's CIFAR-10 scripts, and

    Attributes:
        coupled: the generator mirrors the teacher; False takes NAYER's, of width `ngf`.
        align: a_al, weight of the alignment; it needs `coupled`.
        cutmix: probability with which the view of a whole batch is mixed, see :func:`dfkd_lib.data.augment.cut_mix`.
        jitter: probability with which an image's colours are changed in its view.
        swapped_kl: reward KL(p_S || p_T); False is NAYER's KL(p_T || p_S).
        dist: beta; weight of the feature term in units of `adv`. The scripts' values lie between 0 and 1.
    """

    coupled: bool = True
    align: float = 1.0
    cutmix: float = 0.5
    jitter: float = 0.4
    swapped_kl: bool = True
    dist: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("align", "dist"):
            if not getattr(self, name) >= 0:
                raise InputError(f"{name} must be 0 or more, not {getattr(self, name)!r}")
        for name in ("cutmix", "jitter"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} is a probability, in [0, 1], not {getattr(self, name)!r}")
        if self.align and not self.coupled:
            raise InputError(
                f"align {self.align!r} aligns the coupled generator with the teacher, and coupled is False; "
                "set align to 0, or coupled to True"
            )


# Grey images have no colours to change.
PRESETS: dict[str, dict[str, Any]] = {
    "digits": nayer.PRESETS["digits"] | {"jitter": 0.0},
    "mnist": nayer.PRESETS["mnist"] | {"jitter": 0.0},
    "cifar10": nayer.PRESETS["cifar10"],
}

_OFF: dict[str, Any] = {
    "coupled": False, "align": 0.0, "cutmix": 0.0, "jitter": 0.0, "swapped_kl": False, "dist": 0.0,
}  # fmt: skip
_ON = {
    "NAYER": (),
    "NAYER + augmentation": ("cutmix", "jitter"),
    "coupled body": ("coupled",),
    "+ alignment": ("coupled", "align"),
    "+ augmentation": ("coupled", "align", "cutmix", "jitter"),
    "+ swapped KL": ("coupled", "align", "cutmix", "jitter", "swapped_kl"),
}
VARIANTS: dict[str, dict[str, Any]] = {
    row: {name: off for name, off in _OFF.items() if name not in on} for row, on in _ON.items()
} | {"+ feature term": {"dist": 0.75}}
"""From NAYER to CPNet, as settings beside a preset. The second row is the control that tells what the augmentation, of
which abstract and figure say nothing, does alone."""


def choose_nodes(seen: Sequence[Seen]) -> list[int]:
    """The visits that the generator mirrors, as numbers into `seen`, deepest first.

    The last visit at each resolution of feature maps; if these are three, also the network's first. The authors list
    them by hand, the same four for their CIFAR networks. Maps of one pixel, such as those of LeNet-5's third
    convolution, do not count: what grows out of one is the same everywhere but at the borders.

    Raises:
        InputError: no batch-norm layer looks at feature maps [B, C, H, W] of more than one pixel.
    """
    maps = [i for i, visit in enumerate(seen) if visit.x.ndim == 4 and visit.x.shape[2:].numel() > 1]
    if not maps:
        raise InputError(
            "no batch-norm layer of the teacher looks at feature maps [B, C, H, W], which cpnet's generator mirrors; "
            "set coupled to False and align to 0, or use nayer"
        )
    chosen = set({seen[i].x.shape[2:]: i for i in maps}.values())
    if len(chosen) == 3:
        chosen.add(maps[0])
    return sorted(chosen, key=lambda i: (seen[i].x.shape[2:].numel(), -i))


class CoupledBody(nn.Module):
    """The generator: latents [B, latent_dim] -> images [B, C, H, W] in [0, 1], and [u_0, ...].

    Args:
        nodes: shapes (c_n, h_n, w_n), deepest first; u_n is [B, c_n, h_n, w_n].
        image_shape: (C, H, W).
    """

    def __init__(
        self, latent_dim: int, nodes: Sequence[tuple[int, int, int]], image_shape: tuple[int, int, int]
    ) -> None:
        super().__init__()
        first, last = nodes[0], nodes[-1]
        start = nn.Sequential(nn.Linear(latent_dim, math.prod(first)), nn.Unflatten(1, first), nn.BatchNorm2d(first[0]))
        self.blocks = nn.ModuleList([start])
        for below, node in pairwise(nodes):
            layers = [*_up(below, node), nn.Conv2d(below[0], node[0], 3, padding=1, bias=False)]
            self.blocks.append(nn.Sequential(*layers, nn.BatchNorm2d(node[0]), nn.LeakyReLU(0.2)))
        to_image = nn.Conv2d(last[0], image_shape[0], 3, padding=1)
        self.image = nn.Sequential(*_up(last, image_shape), to_image, nn.Sigmoid())

    def forward(self, v: Tensor) -> tuple[Tensor, list[Tensor]]:
        """See the class."""
        trunk: list[Tensor] = []
        for block in self.blocks:
            trunk.append(block(trunk[-1] if trunk else v))
        return self.image(trunk[-1]), trunk


def _up(below: tuple[int, int, int], above: tuple[int, int, int]) -> list[nn.Module]:
    return [] if below[1:] == above[1:] else [nn.Upsample(size=above[1:])]


@torch.no_grad()
def restored(visit: Seen, past: tuple[Tensor, Tensor] | None, rho: float) -> Tensor:
    """A node's input brought to what its layer remembers: the target of u_n, without gradient.

    Args:
        visit: of a batch-norm layer to h [B, c, H, W].
        past: averages m, v of mean and variance over earlier batches, [c] each; None before there are any.
        rho: weight of the past.

    Returns:
        (h - mean) / std * running std + running mean, [B, c, H, W]; mean and variance are (1 - rho) times the batch's,
        the variance unbiased, plus rho times the past's. A variance below the layer's epsilon counts as that.
    """
    mean, variance = visit.statistics()
    n = visit.x.numel() // visit.x.shape[1]
    variance = variance * (n / (n - 1))
    if past is not None:
        mean, variance = ((1 - rho) * new + rho * old for new, old in zip((mean, variance), past, strict=True))
    layer: Any = visit.layer
    gain = (layer.running_var / variance.clamp_min(getattr(layer, "eps", 1e-5))).sqrt()
    target: Tensor = (visit.x - mean[:, None, None]) * gain[:, None, None] + layer.running_mean[:, None, None]
    return target


def damped_inverse(weight: Tensor, damping: float = DAMPING) -> Tensor:
    """P, the pseudo-inverse of W^T with singular values below `damping` raised to it.

    Args:
        weight: W [C, d].

    Returns:
        [C, d]; W P^T is the identity if d >= C and nothing was raised.
    """
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    inverse: Tensor = (left / values.clamp_min(damping)) @ right
    return inverse


def feature_line(layer: nn.Linear) -> tuple[Tensor, Tensor]:
    """The features f*_c that give class c the belief 0.9, and the direction b that raises all logits alike; float64.

    Args:
        layer: the teacher's last, d features -> C logits, with or without bias.

    Returns:
        f* [C, d] and b [d].

    Raises:
        InputError: fewer features than classes, where no feature gives such beliefs.
    """
    weight = layer.weight.detach().cpu().double()
    n_classes, d = weight.shape
    if d < n_classes:
        raise InputError(
            f"dist above 0 needs as many features as classes, and the teacher's last linear layer takes {d} features "
            f"to {n_classes} classes; set dist to 0"
        )
    inverse = damped_inverse(weight)
    delta = math.log((1 - SMOOTHING) * (n_classes - 1) / SMOOTHING)
    logits = delta * torch.eye(n_classes, dtype=weight.dtype)
    if layer.bias is not None:
        logits = logits - layer.bias.detach().cpu().double()
    return logits @ inverse, inverse.sum(0)


def feature_cosine(features: Tensor, anchors: Tensor, direction: Tensor) -> Tensor:
    """L_feat = mean |cos(f - f*, b)|; 1 where features lie on the line f* + r b, from which minimising drives them.

    Args:
        features, anchors: f and f* of the same images, [B, d].
        direction: b [d].

    Returns:
        Scalar in [0, 1].
    """
    return F.cosine_similarity(features - anchors, direction[None], dim=1).abs().mean()


def mixed_cross_entropy(logits: Tensor, targets: Tensor, others: Tensor, share: Tensor) -> Tensor:
    """L_ce = mean (1 - a) CE(t, c) + a CE(t, c'): cross-entropy of images of which a share shows another class.

    Args:
        logits: [B, C].
        targets, others: c and c', int64 [B].
        share: a [B], in [0, 1].
    """
    of_own, of_other = (F.cross_entropy(logits, labels, reduction="none") for labels in (targets, others))
    return ((1 - share) * of_own + share * of_other).mean()


class CPNet(nayer.NAYER):
    """See the module; arguments are those of :class:`~.distiller.Distiller`.

    Attributes:
        nodes: see :func:`choose_nodes`; empty without `coupled`.
        generator: a :class:`CoupledBody`; without `coupled`, NAYER's.

    Raises:
        InputError: the teacher has no batch norm that looks at feature maps; `dist` is above 0 and its last linear
            layer does not take features [B, d], d >= K, to the logits.
    """

    settings: Settings

    def __init__(
        self, teacher: nn.Module, student: nn.Module, image_shape: Sequence[int], settings: Settings, runtime: Runtime
    ) -> None:
        super().__init__(teacher, student, image_shape, settings, runtime)
        self.classifier = last_linear(self.teacher) if settings.dist else None
        self.watched = self.layers if self.classifier is None else [*self.layers, self.classifier]
        with torch.no_grad(), runtime.autocast(), as_written():
            _, seen = self.look(torch.full((2, *self.image_shape), 0.5), self.watched)
        visits, features = self.told_apart(seen)
        if self.classifier is not None:
            if len(self.classifier.weight) != self.n_classes or len(features) != 1 or features[0].ndim != 2:
                raise InputError(
                    f"the teacher's last linear layer does not take features [B, d] to its {self.n_classes} logits, "
                    "which dist above 0 needs; set dist to 0"
                )
            self.anchors, self.direction = (
                each.to(runtime.dtype).to(runtime.device) for each in feature_line(self.classifier)
            )
        self.nodes: list[int] = []
        if settings.coupled:
            self.nodes = choose_nodes(visits)
            shapes = [(c, h, w) for c, h, w in (visits[n].x.shape[1:] for n in self.nodes)]
            self.generator = runtime.prepare(CoupledBody(settings.latent_dim, shapes, self.image_shape)).train()
            players = nn.ModuleList([self.generator, self.embedding, self.noisy])
            self.optimizer = recordable(adam(players, settings.lr_generator, (0.5, 0.999)), runtime)
            self.renew()

    def told_apart(self, seen: Sequence[Seen]) -> tuple[list[Seen], list[Tensor]]:
        """The visits to batch-norm layers, and what the last linear layer was given."""
        visits = [visit for visit in seen if visit.layer is not self.classifier]
        return visits, [visit.x.to(self.runtime.dtype) for visit in seen if visit.layer is self.classifier]

    def inversion_step(self) -> dict[str, Tensor]:
        """See :meth:`NAYER.inversion_step`; its terms, and "feature loss" and "alignment loss" if weighted."""
        settings, targets, augmentation = self.settings, self.targets, self.augmentation
        with self.runtime.autocast():
            x, trunk = self.made(targets)
            view = self.augment(x)
            if settings.jitter:
                view = colour_jitter(view, p=settings.jitter, generator=augmentation)
            if settings.cutmix:
                view, partners, share = cut_mix(view, p=settings.cutmix, generator=augmentation)
            t, seen = self.look(view, self.watched)
            s = t if self.warming_up else self.opinion(view)
        visits, features = self.told_apart(seen)
        terms = {"bn loss": self.statistics.loss(visits)}
        if settings.cutmix:
            terms["target loss"] = mixed_cross_entropy(t, targets, targets[partners], share)
        else:
            terms["target loss"] = losses.cross_entropy(t, targets)
        loss = settings.bn * terms["bn loss"] + settings.oh * terms["target loss"]
        if not self.warming_up:
            terms["agreeing KL"] = losses.agreeing_kl(t, s) if settings.swapped_kl else losses.agreeing_kl(s, t)
            loss = loss - settings.adv * terms["agreeing KL"]
            if settings.dist:
                terms["feature loss"] = feature_cosine(features[0], self.anchors[targets], self.direction)
                loss = loss + settings.adv * settings.dist * terms["feature loss"]
        if settings.align:
            terms["alignment loss"] = self.alignment(trunk, visits)
            loss = loss + settings.align * terms["alignment loss"]
        self.best.offer(loss, x)
        update(self.optimizer, loss, self.generator_scaler)
        return {name: term.detach() for name, term in terms.items()}

    def alignment(self, trunk: Sequence[Tensor], visits: Sequence[Seen]) -> Tensor:
        """L_al of u_0, ... and all visits to batch-norm layers of one pass; its gradient reaches the u_n alone."""
        pasts = self.statistics.averages if self.statistics.remembering else [None] * len(visits)
        targets = (restored(visits[n], pasts[n], self.settings.rho) for n in self.nodes)
        return torch.stack([(u - h).square().mean() for u, h in zip(trunk, targets, strict=True)]).sum()

    def made(self, targets: Tensor) -> tuple[Tensor, list[Tensor]]:
        """x = G(W BN(e) + b) for block-ordered targets [B], images [B, C, H, W] in [0, 1]; and u_0, ... if coupled."""
        made: Any = self.generator(self.noisy(self.embedding(targets)))
        return made if self.settings.coupled else (made, [])

    def forward(self, targets: Tensor) -> Tensor:
        """See :meth:`NAYER.forward`."""
        return self.made(targets)[0]
