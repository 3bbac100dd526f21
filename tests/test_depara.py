"""Attribution graphs: similarities by hand, what they do not depend on, and the published table's sums."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from conftest import settled, stream
from scipy import stats
from torch import Tensor, nn

from dfkd_lib.errors import InputError
from dfkd_lib.methods import depara
from dfkd_lib.methods.attribution import ABSOLUTE, affinity, explain
from dfkd_lib.methods.depara import (
    Graph,
    best_layer,
    edge_similarity,
    edges,
    graph_of,
    layer_graphs,
    layer_similarities,
    layers_of,
    leave_one_out,
    linear_cka,
    model_graph,
    rsa,
    similarity,
    strongest,
    target_graph,
)  # fmt: skip


def features(seed: int = 0, n: int = 12, d: int = 9) -> Tensor:
    return torch.randn(n, d, generator=stream(seed)).double()


def images(n: int = 12) -> Tensor:
    return torch.rand(n, 1, 8, 8, generator=stream(1))


def orthogonal(d: int = 9) -> Tensor:
    return torch.linalg.qr(torch.randn(d, d, generator=stream(5)).double()).Q


def test_edges_by_hand() -> None:
    f = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0]])
    assert edges(f).tolist() == pytest.approx([0.0, math.sqrt(0.5), math.sqrt(0.5)])
    assert edges(torch.cat([f, torch.zeros(1, 2)]))[[2, 4, 5]].tolist() == [0.0, 0.0, 0.0], "a dead feature"


def test_edge_similarity_is_spearmans_and_does_not_depend_on_the_basis() -> None:
    f, g = features(0), features(1)
    e = edges(g)
    s = edge_similarity(edges(f), e)
    assert s == pytest.approx(stats.spearmanr(edges(f), e).statistic)
    assert edge_similarity(edges(3.0 * f @ orthogonal()), e) == pytest.approx(s, abs=1e-3)
    assert edge_similarity(edges(f).double() ** 3, e) == pytest.approx(s, abs=1e-6), "any increasing function"
    moved = f + torch.randn(1, 9, generator=stream(7)).double()
    assert torch.allclose(edges(moved, centred=True), edges(f, centred=True), atol=1e-6)
    assert not torch.allclose(edges(moved), edges(f), atol=1e-2)


def graph(seed: int = 0, x: Tensor | None = None) -> Graph:
    return model_graph(settled(seed), images() if x is None else x)


def test_similarity_of_graphs() -> None:
    g, h = graph(0), graph(1)
    for weight in (0.0, 0.25, 10.0):
        assert similarity(g, g, weight) == pytest.approx(1 + weight)
        assert similarity(g, h, weight) == similarity(h, g, weight)
    assert similarity(g, h, 0.0) == affinity(g.nodes, h.nodes), "the method of the attribution maps"
    assert similarity(g, h, math.inf) == edge_similarity(g.edges, h.edges)
    assert -1 <= affinity(g.nodes, h.nodes) <= 1 and -1 <= edge_similarity(g.edges, h.edges) <= 1


def test_a_common_order_of_the_images_does_not_matter() -> None:
    order = torch.randperm(12, generator=stream(3))
    turned = similarity(graph(0, images()[order]), graph(1, images()[order]), 0.5)
    assert turned == pytest.approx(similarity(graph(0), graph(1), 0.5), abs=1e-5)


def test_rsa_is_edges_of_features_without_their_own_mean() -> None:
    f, g = features(0), features(1)
    i, j = torch.triu_indices(12, 12, 1)
    by_numpy = [1 - torch.corrcoef(h)[i, j] for h in (f, g)]
    assert rsa(f, g) == pytest.approx(stats.spearmanr(*by_numpy).statistic, abs=1e-3)
    centred = [h - h.mean(1, keepdim=True) for h in (f, g)]
    assert rsa(*centred) == pytest.approx(edge_similarity(*(edges(h) for h in centred)))


def test_linear_cka() -> None:
    f, g = features(0), features(1, d=5)
    assert linear_cka(f, 2 * f @ orthogonal() + 1) == pytest.approx(1.0)
    f0, g0 = f - f.mean(0), g - g.mean(0)
    wanted = (g0.T @ f0).norm() ** 2 / ((f0.T @ f0).norm() * (g0.T @ g0).norm())
    assert linear_cka(f, g) == pytest.approx(float(wanted))
    assert linear_cka(torch.ones(12, 3), f) == 0.0


def test_lambda_is_never_chosen_on_its_own_target() -> None:
    measured = torch.arange(5.0).repeat(3, 1).double()
    right, wrong = measured.clone(), -10 * measured
    # To targets 0 and 1 the nodes are wrong and the edges right; to target 2 it is the other way round.
    nodes = torch.stack([wrong[0], wrong[1], right[2]])
    of_edges = torch.stack([right[0], right[1], wrong[2]])
    scores, chosen = leave_one_out(nodes, of_edges, measured, [None] * 3, [0.0, math.inf])
    assert chosen == [0.0, 0.0, math.inf]
    assert torch.equal(scores, torch.stack([wrong[0], wrong[1], wrong[2]]))
    spoiled = measured.clone()
    spoiled[0] = spoiled[0].flip(0)
    assert leave_one_out(nodes, of_edges, spoiled, [None] * 3, [0.0, math.inf])[1][0] == chosen[0]
    with pytest.raises(InputError, match="at least two targets"):
        leave_one_out(nodes[:1], of_edges[:1], measured[:1], [None], [0.0])


def test_layers_in_the_order_of_the_pass_without_the_last() -> None:
    class Crossed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(8 * 36, 3)
            self.second = nn.Conv2d(4, 8, 1)
            self.first = nn.Conv2d(1, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.second(self.first(x)).flatten(1))

    network = Crossed().eval()
    assert layers_of(network, images(1)) == ["first", "second"]
    with pytest.raises(InputError, match="no convolution or linear layer before its last"):
        layers_of(nn.Sequential(nn.Flatten(), nn.Linear(64, 2)), images(1))


def test_graphs_of_layers_are_the_same_in_any_order_and_twice() -> None:
    network = settled()
    forth = layer_graphs(network, images(), ["0", "1"])
    back = layer_graphs(network, images(), ["1", "0", "0"])
    for layer in ("0", "1"):
        assert torch.equal(forth[layer].nodes, back[layer].nodes)
        assert torch.equal(forth[layer].edges, back[layer].edges)


def test_layers_are_held_against_absolute_maps_of_logits() -> None:
    network, target = settled(0), settled(1)
    goal = target_graph(target, images())
    assert torch.equal(goal.nodes, explain(target, images(), mean=ABSOLUTE).maps) and (goal.nodes >= 0).all()
    found = layer_similarities(layer_graphs(network, images(), ["0", "1"]), goal, weight=2.0)
    for s_v, s_e, s in found.values():
        assert s == s_v + 2.0 * s_e and 0 <= s_v <= 1
    assert best_layer({"a": (0, 0, 0.1), "b": (0, 0, 0.4), "c": (0, 0, 0.4)}) == "b"


def test_a_dead_layer_is_named() -> None:
    network = settled()
    with torch.no_grad():
        network[0].weight.zero_()
    with pytest.raises(InputError, match="layer '0' does not depend on the image at all for 12 of 12"):
        layer_graphs(network, images(), ["0"])


def test_the_strongest_edges_are_as_many_as_asked_for() -> None:
    e = edges(features())
    pairs = strongest(e, 0.1)
    assert len(pairs) == round(0.1 * 66) and all(p < q for p, q in pairs)
    i, j = torch.triu_indices(12, 12, 1)
    of = {(int(p), int(q)): float(v) for p, q, v in zip(i, j, e, strict=True)}
    assert min(of[pair] for pair in pairs) >= sorted(of.values())[-len(pairs)]


@pytest.mark.parametrize(("n", "said"), [(2, "between 2 probe images"), (2001, "3 to 2000")])
def test_edges_need_some_images_and_not_too_many(n: int, said: str) -> None:
    with pytest.raises(InputError, match=said):
        edges(torch.ones(n, 2))


def test_a_graph_is_made_of_one_explanation() -> None:
    explained = explain(settled(), images())
    g: Any = graph_of(explained, centred=True)
    assert torch.equal(g.edges, edges(explained.features, centred=True)) and g.nodes is explained.maps
    assert depara.combined(0.5, 0.2, 2.0) == pytest.approx(0.9)
