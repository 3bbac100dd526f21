"""How good a network is on real data: accuracy and mean intersection over union."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..data import ImageSet
from ..runtime import Runtime
from ..training.modes import evaluating


def accuracy(model: nn.Module, images: ImageSet, runtime: Runtime, batch_size: int = 500) -> float:
    """Share of images whose largest logit is at the label, in [0, 1].

    Args:
        model: [B, C, H, W] in [0, 1] -> logits [B, classes].
    """
    correct = torch.zeros((), dtype=torch.int64, device=runtime.device)
    with evaluating(model), runtime.autocast():
        for x, y in images.batches(batch_size):
            correct += (model(runtime.images(x)).argmax(1) == y.to(runtime.device)).sum()
    return int(correct) / len(images)


def confusion(predicted: Tensor, labels: Tensor, n_classes: int, void: int | None = None) -> Tensor:
    """Counts [n_classes, n_classes] of (label, prediction) pairs; void labels are left out.

    Args:
        predicted, labels: integer tensors of one shape, values in [0, n_classes) or void.
    """
    predicted, labels = predicted.flatten(), labels.flatten().long()
    if void is not None:
        kept = labels != void
        predicted, labels = predicted[kept], labels[kept]
    return torch.bincount(labels * n_classes + predicted, minlength=n_classes**2).view(n_classes, n_classes)


def mean_iou_of(counts: Tensor) -> float:
    """Mean over classes of intersection / union, in [0, 1].

    A class that is neither labelled nor predicted anywhere has no union and does not count.

    Args:
        counts: confusion counts [n_classes, n_classes].
    """
    intersection = counts.diagonal().double()
    union = counts.sum(0) + counts.sum(1) - counts.diagonal()
    return float(torch.nanmean(intersection / union))


def mean_iou(model: nn.Module, images: ImageSet, runtime: Runtime, batch_size: int = 25) -> float:
    """Mean intersection over union on labelled images, at the resolution of the masks; void pixels ignored.

    Args:
        model: [B, C, H, W] in [0, 1] -> logits [B, classes, H, W].
    """
    n = images.n_classes
    counts = torch.zeros(n, n, dtype=torch.int64, device=runtime.device)
    with evaluating(model), runtime.autocast():
        for x, y in images.batches(batch_size):
            counts += confusion(model(runtime.images(x)).argmax(1), y.to(runtime.device), n, images.void)
    return mean_iou_of(counts)


def agreement(ours: Tensor, theirs: Tensor) -> float:
    """Share of the inputs for which two networks predict the same class.

    Args:
        ours, theirs: predicted classes, int64 [N].
    """
    return float((ours == theirs).float().mean())


def evaluate(model: nn.Module, images: ImageSet, runtime: Runtime) -> dict[str, float]:
    """The figure that suits the task: {"accuracy": ...} or {"mean IoU": ...}."""
    if images.task == "segmentation":
        return {"mean IoU": mean_iou(model, images, runtime)}
    return {"accuracy": accuracy(model, images, runtime)}
