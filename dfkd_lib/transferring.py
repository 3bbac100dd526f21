"""Which of several trained networks to start from, and at which layer: one call each, for networks of your own.

No labels and no training: a network is compared with others by what it looks at in a few hundred unlabelled images,
see :mod:`.methods.attribution` and :mod:`.methods.depara`. What is passed in stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .arguments import statistics_of_images
from .checking import check_module
from .data import ImageSet
from .errors import InputError, first_line, unknown
from .lending import bare, borrowed, normalizing
from .measures.ranking import precision_at
from .methods import attribution, depara
from .methods.depara import Graph
from .runtime import Runtime, random_state_kept
from .settings import typed
from .training.players import freeze

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Statistics = Sequence[float] | Mapping[str, Sequence[float]] | None


@dataclass(frozen=True)
class Transferability:
    """Networks and how near they are to each other, on the probe images that they share.

    Attributes:
        graphs: {name: maps and edges of the network}, on the CPU; what one more network is compared with.
        affinity: float64 [N, N], symmetric, in the order of `names`: s_V + edge_weight s_E. The diagonal is
            1 + edge_weight, less the share of images on which a network has no map.
        images: the probe images, float [n, C, H, W] in [0, 1], on the CPU.
        kind, edge_weight, batch_size, runtime: as they were asked for.
    """

    graphs: dict[str, Graph]
    affinity: Tensor
    images: Tensor = field(repr=False)
    kind: str
    edge_weight: float
    batch_size: int
    runtime: Runtime = field(repr=False)

    @property
    def names(self) -> list[str]:
        """The networks, in the order of rows and columns."""
        return list(self.graphs)

    def ranking(self, target: str) -> list[tuple[str, float]]:
        """The other networks by their affinity to the target, best first: (name, affinity).

        Raises:
            InputError: no network of that name.
        """
        if target not in self.graphs:
            raise unknown("network", target, self.graphs)
        row = self.affinity[self.names.index(target)]
        others = [(name, float(s)) for name, s in zip(self.names, row, strict=True) if name != target]
        return sorted(others, key=lambda pair: -pair[1])

    def precision(self, useful: Mapping[str, Sequence[str]]) -> list[float]:
        """P@K for K = 1, ..., N - 1: the share of useful sources among the K that are ranked first, mean over targets.

        Args:
            useful: {target: sources known to be useful to it}, such as `dfkd_lib.data.taskonomy.BEST_SOURCES`; all of
                them among the networks.

        Raises:
            InputError: no targets, or a name that no network has.
        """
        if not useful:
            raise InputError("useful is empty; give at least one target with its useful sources")
        for name in (n for target, sources in useful.items() for n in (target, *sources)):
            if name not in self.graphs:
                raise unknown("network in useful", name, self.graphs)
        own = [self.names.index(target) for target in useful]
        relevant = [[self.names.index(name) for name in sources] for sources in useful.values()]
        found: list[float] = precision_at(self.affinity[own], relevant, own).tolist()
        return found

    def with_model(
        self,
        name: str,
        module: nn.Module,
        *,
        at: str = attribution.PENULTIMATE,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> Transferability:
        """One network more: it alone is explained, and compared with each of the others; their entries stay the same.

        Args:
            at, mean, std: as in :func:`transferability`, of this network.

        Raises:
            InputError: there is a network of that name, or this one cannot be explained.
        """
        if not isinstance(name, str) or name in self.graphs:
            raise InputError(f"there is a network {name!r} already; give the new one a name of its own")
        graph = _graph(name, module, self.images, at, mean, std, self)
        graphs = self.graphs | {name: graph}
        row = torch.tensor([depara.similarity(graph, g, self.edge_weight) for g in graphs.values()]).double()
        matrix = torch.zeros(len(graphs), len(graphs), dtype=torch.float64)
        matrix[:-1, :-1] = self.affinity
        matrix[-1] = matrix[:, -1] = row
        return replace(self, graphs=graphs, affinity=matrix)

    def figure(self) -> Figure:
        """The affinity matrix as a picture; needs matplotlib."""
        import matplotlib.pyplot as plt

        side = 2.5 + 0.45 * len(self.names)
        figure, axis = plt.subplots(figsize=(side, side * 0.85), layout="constrained")
        picture = axis.imshow(self.affinity.numpy(), cmap="viridis")
        axis.set_xticks(range(len(self.names)), self.names, rotation=60, ha="right")
        axis.set_yticks(range(len(self.names)), self.names)
        figure.colorbar(picture, ax=axis, label="affinity", shrink=0.8)
        return figure


@dataclass(frozen=True)
class LayerChoice:
    """The layers of a source and how near each is to the target network.

    Attributes:
        best: the name of the layer to transfer from: keep and freeze the source up to it.
        similarities: {layer: (s_V, s_E, s_V + edge_weight s_E)}, from the first layer to the last.
    """

    best: str
    similarities: dict[str, tuple[float, float, float]]

    def __str__(self) -> str:
        rows = [
            f"{'*' if name == self.best else ' '} {name}: nodes {v:.3f}, edges {e:.3f}, together {s:.3f}"
            for name, (v, e, s) in self.similarities.items()
        ]
        return "\n".join(rows)


def transferability(
    models: Mapping[str, nn.Module],
    probe_images: ImageSet | Tensor,
    *,
    at: str | Mapping[str, str] = attribution.PENULTIMATE,
    mean: Statistics = None,
    std: Statistics = None,
    kind: str = attribution.GRADIENT_INPUT,
    edge_weight: float = 0.0,
    batch_size: int = 64,
    runtime: Runtime | None = None,
) -> Transferability:
    """Compare trained networks of your own on unlabelled images, to find which one to start from for which task.

    A target task needs a network of its own among them, however poor: train one on what labels there are.

    Args:
        models: {name: network}; images [B, C, H, W] of one shape for all. Architectures and outputs may differ.
        probe_images: a few hundred, of any kind that the networks are used to: uint8 or floats in [0, 1],
            [n, C, H, W]. They are kept in memory, and of each network one map of H x W per image.
        at: what of a network is explained: "penultimate", the input of its last linear layer; "output"; or the name
            of a module. One for all, or {name: its own}; networks that are not named have "penultimate". The logits
            of a classifier have no sign of their own, so maps of "output" are absolute; prefer "penultimate".
        mean, std: one number per channel, for networks that expect (x - mean) / std; None for those that expect x in
            [0, 1]. One for all, or {name: its own}; networks that are not named have none.
        kind: "gradient x input", "saliency" or "epsilon-LRP".
        edge_weight: lambda of DEPARA: 0 compares maps alone; 0.25 adds a quarter of how alike the networks order the
            images' similarities, which the paper has at that value.
        batch_size: images per pass; the result does not depend on it.
        runtime: where and how to compute; by default what suits this machine, in float32.

    Raises:
        InputError: something does not fit; the message names the network and what to do.
    """
    if kind not in attribution.KINDS:
        raise unknown("kind", kind, attribution.KINDS)
    if not isinstance(models, Mapping) or not models:
        raise InputError("models must be a dict from name to network, with at least one network")
    weight = _weight(edge_weight)
    images = _images(probe_images)
    for what, given in (("at", at), ("mean", mean), ("std", std)):
        for name in given if isinstance(given, Mapping) else ():
            if name not in models:
                raise unknown(f"network in {what}", name, models)
    result = Transferability(
        {}, torch.zeros(0, 0, dtype=torch.float64), images, kind, weight, _batch_size(batch_size), _runtime(runtime)
    )
    for name, module in models.items():
        place = at if isinstance(at, str) else at.get(name, attribution.PENULTIMATE)
        result = result.with_model(name, module, at=place, mean=_of(mean, name), std=_of(std, name))
    return result


def select_layer(
    source: nn.Module,
    target: nn.Module,
    probe_images: ImageSet | Tensor,
    *,
    layers: Sequence[str] | None = None,
    edge_weight: float = depara.LAYER_WEIGHT,
    mean: Statistics = None,
    std: Statistics = None,
    batch_size: int = 64,
    runtime: Runtime | None = None,
) -> LayerChoice:
    """Find the layer of a source network to transfer from, by what is most like the target network's output.

    Args:
        source: the network whose first layers shall be kept.
        target: a network trained on the target task, however few its labels; its output is what layers are held
            against.
        probe_images: of the target's domain, as in :func:`transferability`; the authors take 200.
        layers: names of modules of the source; None takes all convolutions and linear layers but the last.
        edge_weight: lambda; the authors show 1, which did better with a tenth of the target's labels, and 10.
        mean, std: as in :func:`transferability`, with the names "source" and "target".

    Raises:
        InputError: something does not fit; the message names the network and what to do.
    """
    weight = _weight(edge_weight)
    images, chosen, size = _images(probe_images), _runtime(runtime), _batch_size(batch_size)
    with random_state_kept(chosen.device):
        own = _lent("source", source, images, _of(mean, "source"), _of(std, "source"), chosen)
        theirs = _lent("target", target, images, _of(mean, "target"), _of(std, "target"), chosen)
        x = chosen.images(images)
        with _named("source", images):
            if layers is None:
                places = depara.layers_of(own.network, x[:1])
            else:
                places = [own.place(name) for name in typed("layers", layers, tuple[str, ...])]
            graphs = depara.layer_graphs(own.network, x, places, size)
        with _named("target", images):
            goal = depara.target_graph(theirs.network, x, size)
    if not graphs:
        raise InputError("layers is empty; name at least one module of the source")
    found = depara.layer_similarities({own.name(place): graph for place, graph in graphs.items()}, goal, weight)
    return LayerChoice(depara.best_layer(found), found)


@dataclass(frozen=True)
class _Lent:
    """A copy of a network that shares its weights, behind its normalisation if it has one, and where its modules lie.

    Attributes:
        prefix: of the names of the network's modules, in the copy.
    """

    network: nn.Module
    prefix: str

    def place(self, name: str) -> str:
        """A module's name in the copy."""
        if name in (attribution.OUTPUT, attribution.PENULTIMATE):
            return name
        inside = dict(self.network.named_modules())
        if self.prefix + name not in inside or not name:
            shown = [n.removeprefix(self.prefix) for n in inside if n.startswith(self.prefix) and n != self.prefix]
            raise unknown("module", name, [attribution.OUTPUT, attribution.PENULTIMATE, *filter(None, shown)])
        return self.prefix + name

    def name(self, place: str) -> str:
        """The name in the network of a module of the copy."""
        return place.removeprefix(self.prefix)


def _lent(
    who: str, module: nn.Module, images: Tensor, mean: Sequence[float] | None, std: Sequence[float] | None, how: Runtime
) -> _Lent:
    if not isinstance(module, nn.Module):
        raise InputError(f"{who} is a {type(module).__name__}, not a torch.nn.Module")
    with _named(who, images):
        check_module(module, "network")
        copy = freeze(borrowed(bare(module), "network"))
        statistics = statistics_of_images(mean, std, images.shape[1], copy)
        network = how.prepare(normalizing(copy, statistics)).eval()
    return _Lent(network, "" if statistics is None else "network.")


def _graph(
    name: str, module: nn.Module, images: Tensor, at: str, mean: Sequence[float] | None, std: Sequence[float] | None,
    asked: Transferability,
) -> Graph:  # fmt: skip
    with random_state_kept(asked.runtime.device):
        lent = _lent(name, module, images, mean, std, asked.runtime)
        with _named(name, images):
            explained = attribution.explain(
                lent.network, asked.runtime.images(images), at=lent.place(at), kind=asked.kind,
                mean=attribution.ABSOLUTE if at == attribution.OUTPUT else attribution.SIGNED,
                batch_size=asked.batch_size,
            )  # fmt: skip
            attribution.check_alive(explained.maps, "the network")
    return depara.graph_of(explained, centred=True)


@contextmanager
def _named(who: str, images: Tensor) -> Iterator[None]:
    """Say of a refusal, and of whatever a network's own code raises, which network it is about, in one line."""
    try:
        yield
    except InputError as e:
        raise InputError(f"{who}: {e}") from e
    except Exception as e:
        shape = "x".join(map(str, images.shape[1:]))
        raise InputError(
            f"{who} fails on probe images of shape {shape}: {first_line(e)}; give images of the shape that it expects"
        ) from e


def _images(given: ImageSet | Tensor) -> Tensor:
    """Probe images as float32 [n, C, H, W] in [0, 1], on the CPU."""
    if not isinstance(given, ImageSet | Tensor):
        raise InputError(f"probe_images must be an ImageSet or a tensor [n, C, H, W], not a {type(given).__name__}")
    images = (given.images if isinstance(given, ImageSet) else given.detach()).cpu()
    if images.ndim != 4 or images.dtype == torch.bool or images.is_complex():
        raise InputError(f"probe_images must be [n, C, H, W], uint8 or floats in [0, 1], not {list(images.shape)}")
    if not 3 <= len(images) <= depara.MOST_PROBES:
        raise InputError(f"there are {len(images)} probe images; give 3 to {depara.MOST_PROBES}, a few hundred will do")
    if images.dtype == torch.uint8:
        return images.float() / 255
    if not images.is_floating_point() or not (images.min() >= 0 and images.max() <= 1):
        raise InputError("probe_images must be uint8 or floats in [0, 1]; leave normalising to mean and std")
    return images.float()


def _batch_size(given: int) -> int:
    size: int = typed("batch_size", given, int)
    if size < 1:
        raise InputError(f"batch_size must be at least 1, not {size}")
    return size


def _weight(given: float) -> float:
    weight: float = typed("edge_weight", given, float)
    if not weight >= 0:
        raise InputError(f"edge_weight must be 0 or more, not {weight}")
    return weight


def _runtime(given: Runtime | None) -> Runtime:
    if not isinstance(given, Runtime | None):
        raise InputError(f"runtime must be a dfkd_lib.runtime.Runtime, from Runtime.choose, not {given!r}")
    if given is not None:
        return given
    with random_state_kept():
        return Runtime.choose(precision="float32")


def _of(given: Statistics, name: str) -> Sequence[float] | None:
    return given.get(name) if isinstance(given, Mapping) else given
