"""How well unseen classes are recognised, and how well a confidence says when: accuracies per class, risk, coverage."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import InputError


def class_accuracies(predicted: Tensor, labels: Tensor) -> dict[int, float]:
    """Share of each class's samples that are classified rightly, {class: share in [0, 1]}, of the classes that occur.

    Args:
        predicted, labels: int64 [N].

    Raises:
        InputError: there is no sample.
    """
    if not len(labels):
        raise InputError("there is no sample to measure an accuracy on; pass at least one")
    right = predicted == labels
    return {int(c): float(right[labels == c].double().mean()) for c in labels.unique()}


def mean_class_accuracy(predicted: Tensor, labels: Tensor) -> float:
    """MCA, the mean of :func:`class_accuracies`: each class counts the same, however many samples it has."""
    shares = class_accuracies(predicted, labels).values()
    return sum(shares) / len(shares)


def harmonic_mean(a: float, b: float) -> float:
    """H = 2ab / (a + b) of two shares, 0 where both are 0: no more than twice the smaller one."""
    return 2 * a * b / (a + b) if a + b > 0 else 0.0


def zero_shot_measures(
    target_scores: Tensor, target_labels: Tensor, source_scores: Tensor, source_labels: Tensor, target: Tensor
) -> dict[str, float]:
    """Conventional and generalised zero-shot accuracy of one set of scores.

    Args:
        target_scores: float [N_t, C] on test samples of unseen classes, over all classes.
        target_labels: int64 [N_t].
        source_scores, source_labels: the same of held-out samples of seen classes, [N_s, C] and [N_s].
        target: bool [C], which classes are unseen.

    Returns:
        "conventional": MCA on target samples with the unseen classes as candidates; "MCA_s", "MCA_t": with all
        classes as candidates; "H": their harmonic mean. Shares in [0, 1]; "conventional" is never below "MCA_t".
    """
    among_unseen = target_scores.masked_fill(~target, -torch.inf).argmax(1)
    mca_s = mean_class_accuracy(source_scores.argmax(1), source_labels)
    mca_t = mean_class_accuracy(target_scores.argmax(1), target_labels)
    return {
        "conventional": mean_class_accuracy(among_unseen, target_labels),
        "MCA_s": mca_s,
        "MCA_t": mca_t,
        "H": harmonic_mean(mca_s, mca_t),
    }


def risk_coverage(confidence: Tensor, wrong: Tensor) -> Tensor:
    """The risk among the i most confident of n samples, i = 1, ..., n: float64 [n].

    Samples of equal confidence have no order of their own: each counts as the mean of its group, so that the curve
    does not depend on the order in which samples come.

    Args:
        confidence: float [n], larger is surer.
        wrong: bool [n], whether the prediction is an error.

    Raises:
        InputError: no sample, or a confidence that is NaN.
    """
    if not len(confidence) or len(confidence) != len(wrong):
        raise InputError(
            f"{len(confidence)} confidences and {len(wrong)} errors make no curve; pass one error per confidence"
        )
    if confidence.isnan().any():
        raise InputError("a confidence is NaN; check the scores that it is computed from")
    order = confidence.argsort(descending=True, stable=True)
    _, group, sizes = confidence[order].unique_consecutive(return_inverse=True, return_counts=True)
    errors = torch.zeros(len(sizes), dtype=torch.float64, device=wrong.device)
    errors.index_add_(0, group, wrong[order].double())
    shared = (errors / sizes)[group]
    return shared.cumsum(0) / torch.arange(1, len(wrong) + 1, device=wrong.device)


def aurc(confidence: Tensor, wrong: Tensor) -> float:
    """Area under the risk-coverage curve, 1/n sum_i (errors among the i most confident) / i, in [0, 1]; less is better.

    The error rate is what a confidence that knows nothing has.
    """
    return float(risk_coverage(confidence, wrong).mean())


def oracle_aurc(n: int, errors: int) -> float:
    """The least AURC of n predictions of which `errors` are wrong: all of these come last. About e + (1-e) ln(1-e)."""
    last = torch.arange(n - errors + 1, n + 1, dtype=torch.float64)
    return float(((last - (n - errors)) / last).sum()) / n


def excess_aurc(confidence: Tensor, wrong: Tensor) -> float:
    """AURC above the oracle's for the same predictions: compares confidences of predictors with unlike error rates."""
    return aurc(confidence, wrong) - oracle_aurc(len(wrong), int(wrong.sum()))


def risk_at_coverage(risks: Tensor, coverage: float) -> float:
    """The risk if this share of the samples, the most confident ones, is predicted; at least one is.

    Args:
        risks: [n], as :func:`risk_coverage` gives them.
        coverage: in (0, 1].
    """
    _check_share("coverage", coverage)
    return float(risks[max(1, round(coverage * len(risks))) - 1])


def coverage_at_risk(risks: Tensor, risk: float) -> float:
    """The largest share of samples that can be predicted at no more than this risk; 0 if none can.

    Args:
        risks: [n], as :func:`risk_coverage` gives them.
        risk: in (0, 1].
    """
    _check_share("risk", risk)
    allowed = (risks <= risk + 1e-12).nonzero()
    return (int(allowed[-1]) + 1) / len(risks) if len(allowed) else 0.0


def paired(a: Sequence[float], b: Sequence[float]) -> tuple[float, float, int]:
    """Mean and standard deviation of the differences a - b of paired measurements, and in how many pairs a > b.

    Pairs share their classes and images, whose influence is far larger than that of a method and falls out.

    Args:
        a, b: one figure per pair, in the same order; with a single pair the deviation is NaN.

    Raises:
        InputError: no pair, or unlike numbers of figures.
    """
    if not a or len(a) != len(b):
        raise InputError(f"{len(a)} and {len(b)} figures make no pairs; pass one of each per pair")
    differences = [x - y for x, y in zip(a, b, strict=True)]
    spread = statistics.stdev(differences) if len(a) > 1 else math.nan
    return statistics.fmean(differences), spread, sum(d > 0 for d in differences)


def _check_share(name: str, value: float) -> None:
    if not 0 < value <= 1:
        raise InputError(f"{name} is a share above 0 and at most 1, not {value!r}")
