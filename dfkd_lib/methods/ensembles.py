"""Several teachers without any training: the ensembles to beat, and the metrics that all amalgamations share."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..data import ImageSet
from ..losses import cross_entropy
from ..runtime import Runtime
from ..training.modes import evaluating
from .amalgamation import Tasks, union


def entropy(logits: Tensor) -> Tensor:
    """H = -sum_c p_c ln p_c of each row, in [0, ln C]; finite for logits of any size.

    Args:
        logits: [B, C].

    Returns:
        [B].
    """
    log_p = logits.log_softmax(1)
    return -(log_p.exp() * log_p).sum(1)


def least_ambiguous(logits: Sequence[Tensor]) -> Tensor:
    """t*(x) = argmin_t H_t(x): for each image the network that is surest; the first of equals.

    Args:
        logits: [B, C_t] of each network.

    Returns:
        int64 [B].
    """
    lowest = entropy(logits[0])
    chosen = torch.zeros(len(lowest), dtype=torch.int64, device=lowest.device)
    for t, z in enumerate(logits[1:], 1):
        h = entropy(z)
        chosen = torch.where(h < lowest, t, chosen)
        lowest = torch.minimum(h, lowest)
    return chosen


def best_temperature(logits: Tensor, labels: Tensor) -> float:
    """The temperature in [0.1, 10] at which a classifier's own labelled images are likeliest.

    The labels are smoothed by C / (N + C), as Platt does: a classifier that makes no error on few images would
    otherwise be driven to the lowest temperature, whatever it is.
    """
    n, c = logits.shape
    grid = torch.logspace(-1, 1, 201, dtype=torch.float64).tolist()
    losses = [float(cross_entropy(logits.double() / t, labels, c / (n + c))) for t in grid]
    return grid[losses.index(min(losses))]


def ensembles(logits: Sequence[Tensor], tasks: Tasks, temperatures: Sequence[float]) -> dict[str, Tensor]:
    """What can be made of the teachers without any training: scores over the union [N, C] by name.

    Args:
        logits: [N, C_t] of each teacher.
        temperatures: one per teacher, fitted on labels; only "calibrated" uses them, and no student ever does.
    """
    beliefs = [z.softmax(1) for z in logits]
    surest = least_ambiguous(logits)
    return {
        "raw logits": union(logits, tasks, centre=False),
        "centred logits": union(logits, tasks),
        "probabilities": union(beliefs, tasks, centre=False),
        "lowest entropy": union([p + (surest == t)[:, None] for t, p in enumerate(beliefs)], tasks, centre=False),
        "calibrated": union([z / t for z, t in zip(logits, temperatures, strict=True)], tasks),
    }


def predict(model: nn.Module, images: ImageSet, runtime: Runtime) -> Tensor:
    """The logits of all images, [N, C], in eval mode, in at least float32."""
    with evaluating(model), runtime.autocast():
        parts = [model(runtime.images(x)).to(runtime.dtype) for x, _ in images.batches(500)]
    return torch.cat(parts).clone()


def right(scores: Tensor, labels: Tensor, tasks: Tasks, task: int | None = None) -> Tensor:
    """Whether the largest score is at the label, image by image: over the union, or among a task's classes alone.

    Args:
        scores: [N, C].
        labels: int64 [N], of the union.

    Returns:
        bool [N].
    """
    if task is None:
        return scores.argmax(1) == labels
    at = tasks.places(task, scores.device)
    return at[scores[:, at].argmax(1)] == labels


def measures(scores: Tensor, labels: Tensor, tasks: Tasks) -> dict[str, float]:
    """The metrics of all three parts, as fractions. Published tables mix the first two.

    - union: argmax over all outputs, all images.
    - part t known: argmax among the classes of task t, on its images: what a teacher has, by nature.
    - part t unknown: argmax over all outputs, on the images of task t.
    - assignment: the argmax over all outputs is a class of the right task.
    """
    over_union, predicted = right(scores, labels, tasks), scores.argmax(1)
    assigned = torch.zeros_like(over_union)
    found = {"union": share(over_union)}
    for t in range(len(tasks.columns)):
        ours = tasks.holds(t, labels)
        assigned |= ours & tasks.holds(t, predicted)
        found[f"part {t + 1} known"] = share(right(scores, labels, tasks, t)[ours])
        found[f"part {t + 1} unknown"] = share(over_union[ours])
    return found | {"assignment": share(assigned)}


def share(flags: Tensor) -> float:
    """The share of True in a bool tensor."""
    return int(flags.sum()) / max(1, len(flags))


def margin(ours: Tensor, theirs: Tensor) -> tuple[float, float]:
    """How much more often one classifier is right than another on the same images, and half its 95 % interval.

    Args:
        ours, theirs: bool [N], image by image; the interval is that of the paired differences.
    """
    difference = ours.double() - theirs.double()
    return float(difference.mean()), 1.96 * float(difference.std()) / math.sqrt(len(difference))
