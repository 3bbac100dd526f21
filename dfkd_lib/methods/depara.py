"""DEPARA: Deep Attribution Graph for Deep Knowledge Transferability, arXiv 2003.07496.

A network, or a layer of it, is a graph over the probe images: node k is the attribution map of image k, see
:mod:`.attribution`, and edge pq is how similar images p and q are to the network, cos(f_p, f_q). Two graphs G, G' on
the same images are as similar as

    s(G, G') = s_V + lambda s_E,   s_V = 1/n sum_k cos(v_k, v'_k),   s_E = Spearman(e, e') over all p < q.

By it a target chooses among networks, or among the layers of one. lambda = 0 is the method of the attribution maps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..measures.ranking import Own, agreement, spearman
from ..taps import tapped
from ..training.modes import still
from .attribution import ABSOLUTE, GRADIENT_INPUT, OUTPUT, SIGNED, Explanation, affinity, check_alive, explain

TASK_WEIGHT, LAYER_WEIGHT = 0.25, 1.0  # lambda among networks and among layers
MOST_PROBES = 2000  # 2 million edges


class Graph(NamedTuple):
    """G of a network or layer.

    Attributes:
        nodes: v_k, float32 [n, HW].
        edges: e_pq for p < q, row by row, float32 [n (n - 1) / 2].
    """

    nodes: Tensor
    edges: Tensor


def edges(features: Tensor, centred: bool = False) -> Tensor:
    """e_pq = cos(f_p, f_q) for p < q: [n (n - 1) / 2]; 0 where a feature is 0 everywhere.

    Args:
        features: [n, D].
        centred: take the mean over the images away first, as the authors do among networks and not among layers.

    Raises:
        InputError: fewer than three images, which have no order of edges, or too many for so many edges.
    """
    n = len(features)
    if not 3 <= n <= MOST_PROBES:
        raise InputError(f"edges between {n} probe images cannot be ranked; take 3 to {MOST_PROBES} images")
    f = features.double()
    f = f - f.mean(0) if centred else f
    f = f / f.norm(dim=1, keepdim=True).clamp_min(1e-300)
    p, q = torch.triu_indices(n, n, 1)
    return (f @ f.T)[p, q].float()


def graph_of(explained: Explanation, centred: bool = False) -> Graph:
    """The graph of what :func:`.attribution.explain` returned."""
    return Graph(explained.maps, edges(explained.features, centred))


def edge_similarity(e: Tensor, other: Tensor) -> float:
    """s_E: rank correlation of two networks' edges, in [-1, 1]; ties have mean ranks."""
    return spearman(e, other)


def similarity(graph: Graph, other: Graph, weight: float = TASK_WEIGHT) -> float:
    """s = s_V + lambda s_E of two graphs on the same images; 1 + lambda for equal ones.

    Args:
        weight: lambda, 0 or more; infinite takes s_E alone.
    """
    return combined(affinity(graph.nodes, other.nodes), edge_similarity(graph.edges, other.edges), weight)


def combined(nodes: float, of_edges: float, weight: float) -> float:
    """s_V + lambda s_E, and s_E alone for an infinite lambda."""
    return of_edges if math.isinf(weight) else nodes + weight * of_edges


def rsa(features: Tensor, other: Tensor) -> float:
    """Representational similarity analysis: rank correlation of the images' Pearson correlations, in [-1, 1].

    Args:
        features, other: [n, D], [n, D'], of two networks on the same images.
    """
    of_units = (f - f.mean(1, keepdim=True) for f in (features.double(), other.double()))
    return spearman(*(edges(f) for f in of_units))


def linear_cka(features: Tensor, other: Tensor) -> float:
    """Linear centred kernel alignment of [n, D] and [n, D'], by their n x n Gram matrices; in [0, 1]."""
    a, b = (_gram(f.double() - f.double().mean(0)) for f in (features, other))
    norm = float(a.norm() * b.norm())
    return float((a * b).sum()) / norm if norm else 0.0


def _gram(f: Tensor) -> Tensor:
    return f @ f.T


def leave_one_out(
    nodes: Tensor, of_edges: Tensor, measured: Tensor, own: Own, weights: Sequence[float]
) -> tuple[Tensor, list[float]]:
    """Scores by the lambda that suits the other targets best: none is chosen on the target that it is used for.

    Args:
        nodes, of_edges: s_V and s_E, [T, N].
        measured: [T, N]; the mean Spearman with it over the other targets is what chooses.
        own: the column of each target, see :mod:`dfkd_lib.measures.ranking`.
        weights: lambdas to choose from; of equally good ones the first.

    Returns:
        Scores [T, N], and the lambda of each target.

    Raises:
        InputError: fewer than two targets.
    """
    if len(measured) < 2:
        raise InputError("lambda is chosen on the other targets; give at least two targets")
    scores = [of_edges if math.isinf(w) else nodes + w * of_edges for w in weights]
    found = torch.stack([agreement(s, measured, own) for s in scores])
    others = found.sum(1, keepdim=True) - found
    chosen = others.argmax(0).tolist()
    return torch.stack([scores[c][t] for t, c in enumerate(chosen)]), [weights[c] for c in chosen]


def layers_of(network: nn.Module, image: Tensor) -> list[str]:
    """Names of the convolutions and linear layers in the order in which an image meets them, without the last.

    Args:
        image: [1, C, H, W], as the network expects it.

    Raises:
        InputError: there is no such layer besides the last.
    """
    kinds = (nn.Conv2d, nn.Linear)
    names: dict[nn.Module, str] = {m: name for name, m in network.named_modules() if isinstance(m, kinds)}
    with still(network), tapped(list(names)) as seen:
        network(image.clone())
    found = list(dict.fromkeys(names[visit.layer] for visit in seen))[:-1]
    if not found:
        raise InputError("the network has no convolution or linear layer before its last; name the layers")
    return found


def layer_graphs(network: nn.Module, images: Tensor, layers: Sequence[str], batch_size: int = 64) -> dict[str, Graph]:
    """{layer: its graph}, in the form of the authors' layer selection: absolute maps, edges that are not centred.

    Each layer has a pass and a gradient of its own, so neither the order of layers nor earlier calls matter.

    Args:
        images: [n, C, H, W], as the network expects them.
        layers: names of modules; a convolution's output is taken before its batch norm and activation.
    """
    graphs = {}
    for layer in layers:
        explained = explain(network, images, at=layer, kind=GRADIENT_INPUT, mean=ABSOLUTE, batch_size=batch_size)
        check_alive(explained.maps, f"layer {layer!r}")
        graphs[layer] = graph_of(explained)
    return graphs


def target_graph(network: nn.Module, images: Tensor, batch_size: int = 64) -> Graph:
    """The graph of a target network's logits, which the layers of a source are held against.

    Absolute maps: the sum of logits has no sign of its own.
    """
    return layer_graphs(network, images, [OUTPUT], batch_size)[OUTPUT]


def model_graph(network: nn.Module, images: Tensor, at: str = OUTPUT, batch_size: int = 64) -> Graph:
    """The graph of a network's representation, in the form of the authors' task experiment: signed, centred."""
    explained = explain(network, images, at=at, kind=GRADIENT_INPUT, mean=SIGNED, batch_size=batch_size)
    return graph_of(explained, centred=True)


def layer_similarities(
    layers: Mapping[str, Graph], target: Graph, weight: float = LAYER_WEIGHT
) -> dict[str, tuple[float, float, float]]:
    """{layer: (s_V, s_E, s)}; the layer with the largest s is where the source should be cut."""
    found = {}
    for name, graph in layers.items():
        s_v, s_e = affinity(graph.nodes, target.nodes), edge_similarity(graph.edges, target.edges)
        found[name] = s_v, s_e, combined(s_v, s_e, weight)
    return found


def best_layer(similarities: Mapping[str, tuple[float, float, float]]) -> str:
    """l* = argmax s, the first of equal ones."""
    return max(similarities, key=lambda name: similarities[name][2])


def strongest(of_edges: Tensor, share: float = 0.05) -> list[tuple[int, int]]:
    """The pairs p < q of the strongest edges, round(share M) of them, for a drawing.

    Args:
        of_edges: [M], M = n (n - 1) / 2.
        share: in (0, 1].
    """
    n = round((1 + math.sqrt(1 + 8 * len(of_edges))) / 2)
    at = of_edges.topk(round(share * len(of_edges))).indices
    p, q = torch.triu_indices(n, n, 1)
    return list(zip(p[at].tolist(), q[at].tolist(), strict=True))
