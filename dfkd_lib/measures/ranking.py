"""How well predicted scores of sources agree with measured ones, target by target; trees of tasks.

Scores are matrices [T, N], a row per target, a column per source, larger is better. A target may itself be one of the
sources: `own[t]` is its column, or None, and it is never a source for itself. What stands there is not read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..errors import InputError

Own = Sequence[int | None]


def ranked(scores: Tensor, own: int | None = None) -> list[int]:
    """Sources from the best to the worst, without the target's own column; equal scores stay in order.

    Args:
        scores: [N].

    Raises:
        InputError: a score is NaN.
    """
    others = [s for s in range(len(scores)) if s != own]
    if torch.isnan(scores[others]).any():
        raise InputError("a source has no score; measure it, or leave it out")
    return sorted(others, key=lambda s: -float(scores[s]))


def precision_at(predicted: Tensor, relevant: Sequence[Sequence[int]], own: Own) -> Tensor:
    """P@K = 1/(TK) sum_t |top_K(t) and R_t| for K = 1, ..., the number of candidates: float64.

    A ranking by chance has |R| / candidates for every K, an oracle min(1, |R| / K).

    Args:
        predicted: [T, N].
        relevant: R_t, the columns that count as useful for each target.
    """
    hits = _hits(predicted, relevant, own)
    return hits.mean(0) / torch.arange(1, hits.shape[1] + 1)


def recall_at(predicted: Tensor, relevant: Sequence[Sequence[int]], own: Own) -> Tensor:
    """R@K = 1/T sum_t |top_K(t) and R_t| / |R_t|, as :func:`precision_at`; K |P@K| = |R| R@K for sets of one size."""
    sizes = torch.tensor([len(r) for r in relevant], dtype=torch.float64)
    return (_hits(predicted, relevant, own) / sizes[:, None]).mean(0)


def _hits(predicted: Tensor, relevant: Sequence[Sequence[int]], own: Own) -> Tensor:
    """|top_K(t) and R_t|, float64 [T, K]. Targets with one candidate more than others lose the last one."""
    rows = [ranked(scores, o) for scores, o in zip(predicted, own, strict=True)]
    n = min(map(len, rows))
    found = [[float(s in set(r)) for s in row[:n]] for row, r in zip(rows, relevant, strict=True)]
    return torch.tensor(found, dtype=torch.float64).cumsum(1)


def top(measured: Tensor, r: int, own: Own) -> list[list[int]]:
    """R_t: the r best sources of each target, best first."""
    return [ranked(scores, o)[:r] for scores, o in zip(measured, own, strict=True)]


def ranks(x: Tensor) -> Tensor:
    """Ranks from 1 on, float64 [n]; equal values share the mean of theirs."""
    _, inverse, counts = x.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts - 1) / 2)[inverse]


def spearman(a: Tensor, b: Tensor) -> float:
    """Rank correlation of two vectors [n], with mean ranks for ties; 0 if one of them is constant."""
    return pearson(ranks(a), ranks(b))


def pearson(a: Tensor, b: Tensor) -> float:
    """Correlation of two vectors [n] in [-1, 1]; 0 if one of them is constant."""
    if a.shape != b.shape:
        raise InputError(f"vectors of {len(a)} and {len(b)} numbers cannot be correlated; use the same images")
    a, b = a.double() - a.double().mean(), b.double() - b.double().mean()
    norm = math.sqrt(float(a @ a) * float(b @ b))
    return max(-1.0, min(1.0, float(a @ b) / norm)) if norm else 0.0


def kendall(a: Tensor, b: Tensor) -> float:
    """Kendall's tau-b of two vectors [n]: concordant less discordant pairs, with ties; 0 if one is constant."""
    i, j = torch.triu_indices(len(a), len(a), 1)
    of_a, of_b = (a[i] - a[j]).sign().double(), (b[i] - b[j]).sign().double()
    norm = math.sqrt(float(of_a.abs().sum()) * float(of_b.abs().sum()))
    return float(of_a @ of_b) / norm if norm else 0.0


Correlation = Callable[[Tensor, Tensor], float]


def agreement(predicted: Tensor, measured: Tensor, own: Own, correlation: Correlation = spearman) -> Tensor:
    """Correlation over the sources of each target, its own left out: float64 [T], for [T, N] and [T, N]."""
    found = []
    for p, m, o in zip(predicted, measured, own, strict=True):
        others = [s for s in range(len(p)) if s != o]
        found.append(correlation(p[others], m[others]))
    return torch.tensor(found, dtype=torch.float64)


def permutation_p(similarity: Tensor, measured: Tensor, own: Sequence[int], n: int = 2000, seed: int = 0) -> float:
    """Share of permutations of the networks' identities that agree with the measured scores at least as well.

    One permutation for all targets: rows and columns of the similarity move together, as in Mantel's test, so that
    what is similar to itself stays on the diagonal. Agreement is the mean of :func:`agreement`.

    Args:
        similarity: [N, N] of all networks.
        measured: [T, N].
        own: the network of each target.

    Returns:
        In [1 / (n + 1), 1], the true order counted among the permutations.
    """
    generator = torch.Generator().manual_seed(seed)
    networks, rows = torch.arange(len(similarity)), torch.tensor(own)
    orders = torch.stack([networks, *(torch.randperm(len(networks), generator=generator) for _ in range(n))])
    others = torch.stack([networks[networks != o] for o in own])
    moved = similarity[orders[:, rows, None], orders[:, others]]
    correlations = _of_rows(_ranks_of_rows(moved), _ranks_of_rows(measured.gather(1, others))).mean(1)
    return float((correlations >= correlations[0] - 1e-12).double().mean())


def _ranks_of_rows(x: Tensor) -> Tensor:
    """:func:`ranks` along the last axis of [..., n], for short rows."""
    return (x[..., None, :] < x[..., None]).double().sum(-1) + (x[..., None, :] == x[..., None]).double().sum(-1) / 2


def _of_rows(a: Tensor, b: Tensor) -> Tensor:
    """:func:`pearson` along the last axis."""
    a, b = a - a.mean(-1, keepdim=True), b - b.mean(-1, keepdim=True)
    norm = (a.square().sum(-1) * b.square().sum(-1)).sqrt()
    return torch.where(norm > 0, (a * b).sum(-1) / norm.clamp_min(1e-300), 0.0)


def ceiling(repeats: Sequence[Tensor], own: Own) -> float:
    """Agreement of measured scores with themselves: the mean over pairs of repeats, each [T, N], of mean Spearman.

    No predictor can be expected above it. NaN for a single repeat.
    """
    pairs = [(a, b) for i, a in enumerate(repeats) for b in repeats[:i]]
    if not pairs:
        return math.nan
    return sum(float(agreement(a, b, own).mean()) for a, b in pairs) / len(pairs)


def bootstrap(values: Tensor, n: int = 2000, level: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """Interval of the mean of values [T] over targets that are drawn again with replacement."""
    generator = torch.Generator().manual_seed(seed)
    means = values[torch.randint(len(values), (n, len(values)), generator=generator)].mean(1)
    low, high = torch.quantile(means, torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=means.dtype)).tolist()
    return low, high


def regret(predicted: Tensor, measured: Tensor, own: Own) -> Tensor:
    """What is lost by the source that is predicted to be best: [T], measured best less measured there, 0 or more."""
    lost = []
    for p, m, o in zip(predicted, measured, own, strict=True):
        lost.append(float(m[ranked(m, o)[0]] - m[ranked(p, o)[0]]))
    return torch.tensor(lost, dtype=torch.float64)


def ahp(losses: Tensor) -> Tensor:
    """Sources of one target by who beats whom: Taskonomy's analytic hierarchy process.

    W_ij is the share of test samples on which source i has the smaller loss, clipped to [0.001, 0.999], ties shared;
    the principal eigenvector of W_ij / W_ji is the result.

    Args:
        losses: [N, n_test], per source and sample.

    Returns:
        float64 [N], above 0, of sum 1.
    """
    wins = (losses[:, None] < losses[None]).double().mean(2)
    ties = (losses[:, None] == losses[None]).double().mean(2)
    w = (wins + ties / 2).clamp(0.001, 0.999)
    values, vectors = torch.linalg.eig(w / w.T)
    principal = vectors[:, values.real.argmax()].real.abs()
    return principal / principal.sum()


def task_tree(similarity: Tensor) -> list[tuple[int, int, float]]:
    """Agglomerative clustering of the rows of a matrix [N, N], single linkage on their Euclidean distances.

    Returns:
        N - 1 merges (i, j, height), lowest first. Numbers below N are rows; N + m is the cluster of merge m.
    """
    from sklearn.cluster import AgglomerativeClustering

    tree = AgglomerativeClustering(n_clusters=None, distance_threshold=0.0, linkage="single").fit(similarity.numpy())
    return [(int(i), int(j), float(h)) for (i, j), h in zip(tree.children_, tree.distances_, strict=True)]


def leaves(merges: Sequence[tuple[int, int, float]], node: int | None = None) -> list[int]:
    """Rows in the order in which a tree of :func:`task_tree` is drawn without crossings."""
    n = len(merges) + 1
    node = 2 * n - 2 if node is None else node
    return [node] if node < n else [leaf for child in merges[node - n][:2] for leaf in leaves(merges, child)]
