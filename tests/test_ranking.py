"""Rankings of sources: counts by hand, limiting cases, and scipy where it has the same statistic."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import stream
from scipy import stats
from scipy.cluster import hierarchy
from torch import Tensor

from dfkd_lib.errors import InputError
from dfkd_lib.measures import ranking
from dfkd_lib.measures.ranking import (
    agreement,
    ahp,
    bootstrap,
    ceiling,
    kendall,
    leaves,
    pearson,
    permutation_p,
    precision_at,
    ranked,
    ranks,
    recall_at,
    regret,
    spearman,
    task_tree,
    top,
)  # fmt: skip

N, T = 9, 6
OWN = list(range(T))


def scores(seed: int = 0, t: int = T) -> Tensor:
    return torch.rand(t, N, generator=stream(seed), dtype=torch.float64)


def square(seed: int = 0) -> Tensor:
    s = torch.rand(N, N, generator=stream(seed), dtype=torch.float64)
    s = (s + s.T) / 2
    return s.fill_diagonal_(1.0)


def test_a_target_is_left_out_by_its_index_and_not_by_its_place() -> None:
    assert ranked(torch.tensor([0.3, -0.2, 0.9, 0.3]), own=0) == [2, 3, 1]
    assert ranked(torch.tensor([-0.5, 0.1, math.nan]), own=2) == [1, 0]
    with pytest.raises(InputError, match="no score"):
        ranked(torch.tensor([0.1, math.nan]))


def test_precision_and_recall_by_hand() -> None:
    predicted = torch.tensor([[9.0, 3, 2, 1], [4, 9, 1, 3]])
    relevant = [[1, 3], [2, 3]]
    # Target 0 ranks 1, 2, 3; target 1 ranks 0, 3, 2.
    assert precision_at(predicted, relevant, [0, 1]).tolist() == pytest.approx([1 / 2, 2 / 4, 4 / 6])
    assert recall_at(predicted, relevant, [0, 1]).tolist() == pytest.approx([1 / 4, 2 / 4, 1.0])


def test_the_oracle_and_the_relations_of_the_curves() -> None:
    measured, r = scores(), 3
    relevant = top(measured, r, OWN)
    oracle, k = precision_at(measured, relevant, OWN), torch.arange(1, N)
    assert oracle.tolist() == pytest.approx([min(1.0, r / i) for i in range(1, N)])
    predicted = scores(1)
    p, recall = precision_at(predicted, relevant, OWN), recall_at(predicted, relevant, OWN)
    assert torch.allclose(p * k, recall * r) and recall[-1] == 1.0


def test_by_chance_precision_is_the_share_of_relevant_sources() -> None:
    relevant = top(scores(), 3, OWN)
    mean = torch.stack([precision_at(scores(100 + i), relevant, OWN) for i in range(400)]).mean(0)
    assert torch.allclose(mean, torch.full((N - 1,), 3 / (N - 1)).double(), atol=0.03)


def test_correlations_are_those_of_scipy_with_and_without_ties() -> None:
    for decimals in (6, 1):
        a, b = (torch.rand(40, generator=stream(s)).double().round(decimals=decimals) for s in (1, 2))
        assert ranks(a).tolist() == stats.rankdata(a).tolist()
        assert spearman(a, b) == pytest.approx(stats.spearmanr(a, b).statistic)
        assert kendall(a, b) == pytest.approx(stats.kendalltau(a, b).statistic)
        assert pearson(a, b) == pytest.approx(stats.pearsonr(a, b).statistic)
    assert spearman(a, a**3) == 1.0 and spearman(a, -a) == -1.0
    assert spearman(a, torch.ones(40)) == kendall(a, torch.ones(40)) == 0.0
    with pytest.raises(InputError, match="40 and 39"):
        spearman(a, a[1:])


def test_agreement_leaves_the_own_column_out() -> None:
    measured = scores()
    spoiled = measured.clone()
    spoiled[OWN, OWN] = math.nan
    assert torch.equal(agreement(measured, spoiled, OWN), torch.ones(T).double())
    assert torch.equal(agreement(measured, -measured, OWN, kendall), -torch.ones(T).double())


def test_permutations_find_what_agrees_and_not_what_does_not() -> None:
    s = square()
    assert permutation_p(s, s[:T], OWN, n=500) < 0.01
    p = [permutation_p(s, scores(seed), OWN, n=200) for seed in range(12)]
    assert 0.2 < sum(p) / len(p) < 0.8
    assert permutation_p(s, s[:T], OWN, n=200) == permutation_p(s, s[:T], OWN, n=200)


def test_the_fast_ranks_are_the_slow_ones() -> None:
    x = torch.rand(3, 8, generator=stream()).double().round(decimals=1)
    fast = ranking._ranks_of_rows(x)
    assert torch.equal(fast + 0.5, torch.stack([ranks(row) for row in x]))


def test_the_ceiling_is_the_agreement_of_halves() -> None:
    a, b = scores(0), scores(1)
    assert ceiling([a, a], OWN) == pytest.approx(1.0)
    assert ceiling([a, b], OWN) == pytest.approx(float(agreement(a, b, OWN).mean()))
    assert math.isnan(ceiling([a], OWN))


def test_an_interval_has_the_mean_in_it_and_no_width_without_spread() -> None:
    values = torch.rand(20, generator=stream()).double()
    low, high = bootstrap(values)
    assert low < float(values.mean()) < high
    assert bootstrap(torch.full((5,), 0.5).double()) == (0.5, 0.5)


def test_regret_by_hand() -> None:
    measured = torch.tensor([[9.0, 0.5, 0.8], [0.9, 9, 0.2]])
    assert regret(measured, measured, [0, 1]).tolist() == [0.0, 0.0]
    assert regret(-measured, measured, [0, 1]).tolist() == pytest.approx([0.3, 0.7])


def test_who_wins_everywhere_leads_and_equals_are_equal() -> None:
    losses = torch.rand(4, 50, generator=stream()).double() + 1
    losses[1] = 0.0
    losses[3] = losses[2]
    found = ahp(losses)
    assert float(found.sum()) == pytest.approx(1.0) and (found > 0).all()
    assert int(found.argmax()) == 1 and float(found[2]) == pytest.approx(float(found[3]))
    assert torch.allclose(ahp(torch.zeros(3, 5)), torch.full((3,), 1 / 3).double())


def test_the_tree_is_that_of_single_linkage() -> None:
    s = square()
    merges = task_tree(s)
    theirs = hierarchy.linkage(s.numpy(), "single")
    assert [h for _, _, h in merges] == pytest.approx(theirs[:, 2].tolist())
    assert sorted(leaves(merges)) == list(range(N))
    together = [sorted(leaves(merges, merge)) for merge in range(N, 2 * N - 1)]
    members: list[list[int]] = [[i] for i in range(N)]
    for i, j, _, _ in theirs:
        members.append(sorted(members[int(i)] + members[int(j)]))
    assert together == members[N:]
