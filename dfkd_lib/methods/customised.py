"""Customizing Student Networks From Heterogeneous Teachers via Adaptive Knowledge Amalgamation, arXiv 1908.07121.

From a pool of networks whose classes overlap with what a user wants, a student for exactly the wanted tasks is made in
two steps. For each task, the sources that know it become one *component* net, which learns every unlabelled image
from the one source that is least ambiguous about it; then the components become the *target* net. Features are
compared through 1x1 bridges that are thrown away.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data import ImageSet
from ..errors import InputError
from ..models.adapters import adapter
from ..models.chains import chain
from ..runtime import Runtime
from ..training.modes import still
from ..training.players import Resumable, adam, freeze
from ..training.schedules import cosine
from .amalgamation import Settings, Views, descend, look
from .ensembles import least_ambiguous, predict


@dataclass(frozen=True)
class Source:
    """A network to learn from.

    Attributes:
        network: trained; images -> logits.
        outputs: which of its outputs count, in the order of the task's classes.
        heads: which of the student's outputs learn from them; () stands for all.
        rows: int64, the images that are learned from it; None for all.
    """

    network: nn.Module
    outputs: Sequence[int]
    heads: Sequence[int] = ()
    rows: Tensor | None = field(default=None, compare=False)


def select(sources: Sequence[Source], images: ImageSet, runtime: Runtime) -> Tensor:
    """t*(x) of every image, as it is and without label: int64 [N], see :func:`.ensembles.least_ambiguous`.

    Only the wanted outputs enter. Done once, before the component learns.
    """
    logits = [predict(source.network, images, runtime)[:, list(source.outputs)] for source in sources]
    return least_ambiguous(logits)


def split(sources: Sequence[Source], chosen: Tensor) -> list[Source]:
    """Each source with the images that are its own; a source without any is left out."""
    rows = [(chosen == t).nonzero()[:, 0].cpu() for t in range(len(sources))]
    return [Source(s.network, s.outputs, s.heads, own) for s, own in zip(sources, rows, strict=True) if len(own)]


def batch_sizes(sizes: Sequence[int], batch_size: int) -> list[int]:
    """Shares of a batch in proportion to the sizes, 2 or more each, which batch normalisation needs."""
    return [max(2, round(batch_size * size / sum(sizes))) for size in sizes]


def widened(network: nn.Module, ratio: float, x: Tensor) -> nn.Module:
    """A new network of the same modules whose inner features have `ratio` times the channels; outputs stay as many.

    The target net has to hold what several component nets hold: 9/8 of their widths in the authors' code for classes,
    45/32 for attributes of faces.

    Args:
        network: whose modules, applied in order, are its forward pass.
        x: images [B, C, H, W] on which that is checked.

    Raises:
        InputError: a network with branches, or a convolution with groups.
    """
    last = chain(network, x).layers[-1].name
    made = copy.deepcopy(network)
    was = wide = 0
    for name, module in [*made.named_modules()]:
        new: nn.Module
        if isinstance(module, nn.Conv2d | nn.Linear):
            inputs = module.weight.shape[1] // was * wide if was else module.weight.shape[1]
            was = len(module.weight)
            wide = was if name == last else round(ratio * was)
            bias = module.bias is not None
            if isinstance(module, nn.Linear):
                new = nn.Linear(inputs, wide, bias)
            elif module.groups == 1:
                new = nn.Conv2d(inputs, wide, module.kernel_size, module.stride, module.padding, bias=bias)  # type: ignore[arg-type]
            else:
                raise InputError(
                    f"{name!r} has {module.groups} groups; only convolutions without groups can be widened"
                )
        elif isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            new = type(module)(wide)
        else:
            continue
        parent, _, child = name.rpartition(".")
        setattr(made.get_submodule(parent), child, new.to(next(module.parameters())))
    return made


def unit_norm(bridge: nn.Module) -> Tensor:
    """1/m sum_o (sum_i w_oi^2 - 1)^2: 0 where every filter has unit length, and 1 at the zero bridge.

    With bridges on both sides and nothing else, the feature loss is least where both are zero; this excludes it.
    """
    weight: Any = bridge.weight
    return (weight.flatten(1).square().sum(1) - 1).square().mean()


class Bridges(nn.Module):
    """The 1x1 maps between one source and the student, and the scale mu of the student's logits.

    Args:
        ours, theirs: channels of the student's and of the source's features at each place.
        two_sided: both map to half of the source's width; otherwise the student's side maps to the source's own.
    """

    def __init__(self, ours: Sequence[int], theirs: Sequence[int], *, two_sided: bool) -> None:
        super().__init__()
        width = [c // 2 if two_sided else c for c in theirs]
        self.student = nn.ModuleList(adapter(c, m, 4) for c, m in zip(ours, width, strict=True))
        pairs = zip(theirs, width, strict=True) if two_sided else ()
        self.source = nn.ModuleList(adapter(c, m, 4) for c, m in pairs)
        self.mu = nn.Parameter(torch.ones(()))

    def forward(self, f_s: list[Tensor], f_t: list[Tensor]) -> Tensor:
        """sum_k mean ||beta^s_k(f_s^k) - beta^src_k(f_t^k)||^2."""
        theirs = [b(f) for b, f in zip(self.source, f_t, strict=True)] if len(self.source) else f_t
        return torch.stack(
            [F.mse_loss(b(f), t) for b, f, t in zip(self.student, f_s, theirs, strict=True)] or [self.mu.new_zeros(())]
        ).sum()

    def norm(self) -> Tensor:
        """The penalty of all bridges on the source's side."""
        return torch.stack([unit_norm(b) for b in self.source] or [self.mu.new_zeros(())]).sum()


class Adaptive(Resumable):
    """One student regresses the features and logits of several sources: either stage of the amalgamation.

    Component: each source has its own images, and a share of each batch in proportion; `two_sided` bridges and the
    norm penalty. Target: the sources are component nets, each has its own head of the student, all see the same
    batch, and the bridges are one-sided. The student sees the whole batch in one pass.

    Args:
        places: modules whose outputs [B, C, H, W] are compared, taken before an activation: of the student, and of
            each source. Without places, logits alone are.
        norm: weight of the norm penalty.
    """

    data_free: ClassVar[bool] = False
    PARTS: tuple[str, ...] = ("student", "bridges", "optimizer", "bridge_optimizer", "scaler", "steps")

    def __init__(
        self,
        sources: Sequence[Source],
        student: nn.Module,
        images: ImageSet,
        settings: Settings,
        runtime: Runtime,
        *,
        places: Sequence[Sequence[str]] = (),
        two_sided: bool,
        norm: float = 1.0,
    ) -> None:
        self.settings, self.runtime, self.n_steps, self.norm = settings, runtime, settings.n_steps, norm
        self.sources = sources
        self.networks = [freeze(runtime.prepare(source.network)) for source in sources]
        self.student = runtime.prepare(student).train()
        self.places = [list(at) for at in places] or [[] for _ in range(len(sources) + 1)]
        if len(self.places) != len(sources) + 1:
            raise InputError(f"{len(sources)} sources and a student need {len(sources) + 1} lists of places")
        shared = all(source.rows is None for source in sources)
        sets = [images] if shared else [images if s.rows is None else images.take(s.rows) for s in sources]
        sizes = batch_sizes([len(part) for part in sets], settings.batch_size)
        self.views = [Views(part, settings, runtime, f"source {i} views", n)
                      for i, (part, n) in enumerate(zip(sets, sizes, strict=True))]  # fmt: skip
        ends = [*itertools.accumulate(sizes, initial=0)]
        self.shares = [slice(None)] * len(sources) if shared else [slice(*ends[t : t + 2]) for t in range(len(sources))]
        for i, view in enumerate(self.views):
            setattr(self, f"randomness_{i}", view.randomness)
        self.PARTS = (*self.PARTS, *(f"randomness_{i}" for i in range(len(self.views))))
        channels = self._channels(runtime.images(images.batch(range(2))[0]))
        self.bridges = nn.ModuleList(Bridges(channels[0], c, two_sided=two_sided) for c in channels[1:])
        self.bridges = runtime.prepare(self.bridges).train()
        decay = settings.weight_decay
        self.optimizer = adam(self.student, settings.lr, weight_decay=decay)
        self.bridge_optimizer = adam(self.bridges, settings.lr_term, weight_decay=decay)
        self.scaler, self.steps = runtime.scaler(), 0
        self.outputs, self.heads = (
            [torch.tensor([*at], dtype=torch.int64, device=runtime.device) for at in chosen]
            for chosen in ([s.outputs for s in sources], [s.heads for s in sources])
        )

    def _channels(self, x: Tensor) -> list[list[int]]:
        """Channels at the places of all networks, the student first."""
        shapes = []
        for i, (network, at) in enumerate(zip([self.student, *self.networks], self.places, strict=True)):
            with still(network):
                z, features = look(network, x, at)
            name = "the student" if i == 0 else f"source {i}"
            heads = [s.heads or range(len(s.outputs)) for s in self.sources]
            wanted = max(itertools.chain(*heads)) if i == 0 else max(self.sources[i - 1].outputs)
            if z.ndim != 2 or wanted >= z.shape[1]:
                raise InputError(
                    f"{name} gives {'x'.join(map(str, z.shape[1:]))} outputs; output {wanted} is asked of it"
                )
            shapes.append([f.shape for f in features])
        for i, found in enumerate(shapes[1:], 1):
            for place, ours, theirs in zip(self.places[0], shapes[0], found, strict=True):
                if len(ours) != 4 or ours[2:] != theirs[2:]:
                    sizes = ["x".join(map(str, shape[1:])) for shape in (ours, theirs)]
                    raise InputError(f"place {place!r}: {sizes[0]} in the student, {sizes[1]} in source {i}; bridges "
                                     "need feature maps of equal height and width")  # fmt: skip
        return [[shape[1] for shape in found] for found in shapes]

    def step(self) -> dict[str, Tensor]:
        """One update on a batch of which each source sees its share; returns its three terms, detached."""
        dtype = self.runtime.dtype
        features, logits, norms = [], [], []
        x = torch.cat([view.batch(self.steps) for view in self.views])
        with self.runtime.autocast():
            s_all, f_s = look(self.student, x, self.places[0])
        for t, (source, share) in enumerate(zip(self.sources, self.shares, strict=True)):
            bridges, s = self.bridges[t], s_all[share].to(dtype)
            with self.runtime.autocast():
                with torch.no_grad():
                    z, f_t = look(self.networks[t], x[share], self.places[t + 1])
                features.append(bridges([f[share] for f in f_s], f_t))
            s = s.index_select(1, self.heads[t]) if source.heads else s
            z = z.to(dtype).index_select(1, self.outputs[t])
            logits.append(F.mse_loss(bridges.mu * s, z))  # type: ignore[operator]
            norms.append(bridges.norm())  # type: ignore[operator]
        terms = {
            name: torch.stack(parts).sum()
            for name, parts in (("features", features), ("logits", logits), ("norm", norms))
        }
        loss = terms["features"] + terms["logits"] + self.norm * terms["norm"]
        fall = cosine(self.steps, self.n_steps)
        rates = [(self.optimizer, fall * self.settings.lr), (self.bridge_optimizer, fall * self.settings.lr_term)]
        descend(loss, rates, self.scaler)
        self.steps += 1
        return {name: value.detach() for name, value in terms.items()}
