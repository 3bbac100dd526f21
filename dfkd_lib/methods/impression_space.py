"""What is done with impressions once they are encoded: translation, style, relations between images.

Each takes impressions and gives impressions to decode, or figures; none of it knows how encoding and decoding work.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..taps import batch_norm_layers, tapped
from .impression import Impression, Template


def mean_impression(impressions: Impression) -> Impression:
    """Ibar: the mean of the impressions of a set, {stage: [1, D_l]}; not the impression of the pooled pixels."""
    return {name: i.mean(0, keepdim=True) for name, i in impressions.items()}


def translated(source: Impression, mean_a: Impression, mean_b: Impression, alpha: float = 1.0) -> Impression:
    """t_l = max(0, I_l(x) + alpha (Ibar_l(B) - Ibar_l(A))): unpaired translation from the set A to the set B.

    The maximum stands only where the source itself is never negative, as behind a ReLU: no image has an impression
    below 0 there.

    Args:
        source: {stage: [B, D_l]}.
        mean_a, mean_b: {stage: [1, D_l]}, see :func:`mean_impression`.
    """
    target = {}
    for name, i in source.items():
        target[name] = _reachable(i + alpha * (mean_b[name] - mean_a[name]), i)
    return target


def _reachable(t: Tensor, i: Tensor) -> Tensor:
    """max(0, t) where the impressions i are never negative, as behind a ReLU; else t."""
    return torch.where((i >= 0).all(), t.clamp_min(0), t)


def sampled(impressions: Impression, n: int, shrink: float, generator: torch.Generator) -> Impression:
    """t_l ~ N(Ibar_l, (shrink s_l)^2): targets around the mean of a set, each entry drawn for itself.

    As in :func:`translated`, nothing falls below 0 where the set has nothing below it.

    Args:
        impressions: of the set, {stage: [N, D_l]}; s_l is their standard deviation over the set.
        n: number of targets.
        shrink: of the standard deviation; 0 gives the mean n times.
        generator: on the CPU.

    Returns:
        {stage: [n, D_l]}.
    """
    drawn = {}
    for name, i in impressions.items():
        noise = torch.randn(n, i.shape[1], generator=generator).to(i)
        drawn[name] = _reachable(i.mean(0) + shrink * i.std(0, correction=0) * noise, i)
    return drawn


def interpolated(one: Impression, other: Impression, alpha: float) -> Impression:
    """t = (1 - alpha) I(x_1) + alpha I(x_2)."""
    return {name: torch.lerp(i, other[name], alpha) for name, i in one.items()}


def replaced(content: Impression, style: Impression, n_shallow: int) -> Impression:
    """The first `n_shallow` stages from one image, the others from another: style transfer as impression matching."""
    names = list(content)
    return {name: (style if names.index(name) < n_shallow else content)[name] for name in names}


def relation_vectors(impressions: Impression, centre: Impression) -> Tensor:
    """v(x): centred impressions, each stage at unit length, side by side, over sqrt(M).

    Args:
        impressions: {stage: [N, D_l]}.
        centre: {stage: [1, D_l]}, the mean impression of a reference set.

    Returns:
        [N, sum D_l], rows of unit length, so that R = v v^T lies in [-1, 1].
    """
    stages = [F.normalize(i - centre[name], dim=1) for name, i in impressions.items()]
    return torch.cat(stages, 1) / len(stages) ** 0.5


def nearest(relations: Tensor, k: int) -> Tensor:
    """The k most related other images of each: indices [N, k] from R [N, N]."""
    others = relations - 4 * torch.eye(len(relations), device=relations.device, dtype=relations.dtype)
    return others.topk(k, dim=1).indices


def retrieval_precision(relations: Tensor, labels: Tensor, k: int) -> float:
    """Share of images of the same class among the k most related ones, mean over images."""
    labels = labels.to(relations.device)
    return float((labels[nearest(relations, k)] == labels[:, None]).double().mean())


def retrieval_chance(labels: Tensor) -> float:
    """What :func:`retrieval_precision` is for relations without meaning."""
    counts = torch.bincount(labels).double()
    return float((counts * (counts - 1)).sum() / (len(labels) * (len(labels) - 1)))


def class_relations(relations: Tensor, labels: Tensor, n_classes: int) -> Tensor:
    """Mean relation of the images of each pair of classes, no image with itself: [n_classes, n_classes]."""
    member = F.one_hot(labels.to(relations.device), n_classes).to(relations.dtype)
    total = member.T @ (relations - torch.diag(relations.diagonal())) @ member
    sizes = member.sum(0)
    return total / (torch.outer(sizes, sizes) - torch.diag(sizes)).clamp_min(1)


def similarity_map(
    template: Template, x: Tensor, other: Tensor, centre: Impression, kind: str, stages: Sequence[str] = ()
) -> Tensor:
    """Which pixels of x make it similar to `other`: |d R / d x|, summed over the colours.

    Args:
        x, other: [B, C, H, W]; row i of one is related to row i of the other.

    Returns:
        [B, H, W] >= 0.
    """
    x = template.runtime.images(x).detach().requires_grad_()
    with torch.no_grad():
        theirs = relation_vectors(template.encode(other, kind, stages), centre)
    ours = relation_vectors(template.encode(x, kind, stages), centre)
    (gradient,) = torch.autograd.grad((ours * theirs).sum(), x)
    return gradient.abs().sum(1)


@torch.no_grad()
def remembered(network: nn.Module, x: Tensor) -> list[tuple[float, float]]:
    """How far a batch is from what each batch-norm layer remembers, and from nothing.

    With (mean, variance) over batch and space as the operator, the running statistics are the impression of the
    whole training set, and matching them is DeepInversion's regulariser.

    Args:
        x: [B, C, H, W] in [0, 1].

    Returns:
        For each layer: ||s - r|| and ||r||, with s the statistics of the batch and r the running ones.
    """
    with tapped(batch_norm_layers(network)) as seen:
        network(x)
    rows = []
    for visit in seen:
        running = torch.cat([visit.layer.running_mean, visit.layer.running_var])  # type: ignore[list-item]
        rows.append((float((torch.cat(visit.statistics()) - running).norm()), float(running.norm())))
    return rows
