"""Whether an inversion worked: its batch-norm term beside its class term, and a warning when images carry no class."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import losses
from ..data import ImageSet
from ..runtime import Runtime
from ..taps import batch_norm_layers, tapped
from .inversion import batch_norm_loss


def matching_terms(metrics: Mapping[str, float], settings: Any) -> tuple[float, float] | None:
    """The batch-norm and the class term of one synthesis call, without their weights.

    Args:
        metrics: what `step()` of a method returned, or a row of the history of its fit.
        settings: the method's.

    Returns:
        (L_bn, cross-entropy); for DFQ, which has no targets, the second is its one-hot term. None for a method
        without such terms.
    """
    if "bn loss" not in metrics:
        return None
    if "class loss" in metrics:  # CMI reports its terms as it adds them up
        return metrics["bn loss"] / settings.bn, metrics["class loss"] / settings.oh
    class_term = metrics.get("target loss", metrics.get("one-hot loss"))
    return None if class_term is None else (metrics["bn loss"], class_term)


@torch.no_grad()
def matching_terms_of(
    teacher: nn.Module, x: Tensor, labels: Tensor, runtime: Runtime, *, scale: str = "absolute"
) -> tuple[float, float]:
    """The same two terms on given images: on real ones, what an inversion can hope for.

    Args:
        teacher: in eval mode.
        x: [B, C, H, W] in [0, 1]; as many as the method makes at a time, because the term falls with the batch.
        labels: int64 [B].
        scale: see :func:`~.inversion.batch_norm_loss`.

    Raises:
        InputError: the teacher has no batch norm.
    """
    with tapped(batch_norm_layers(teacher)) as seen, runtime.autocast():
        t = teacher(runtime.images(x)).to(runtime.dtype)
    class_term = losses.cross_entropy(t, labels.to(t.device))
    return float(batch_norm_loss(seen, scale)), float(class_term)


def terms_of_a_run(
    teacher: nn.Module, history: Sequence[Mapping[str, float]], settings: Any, real: ImageSet, runtime: Runtime
) -> dict[str, float]:
    """Both terms at the first and the last reading of a run, and on as many real images as it makes at a time.

    Args:
        real: images with labels [N], to be looked at, not learnt from.

    Returns:
        "batch-norm term, first" and so on for first, last and real, and "batch-norm weight"; empty for a method
        without such terms.
    """
    first, last = (matching_terms(row, settings) for row in (history[0], history[-1]))
    if not (first and last):
        return {}
    x, labels = real.batch(torch.arange(getattr(settings, "synthesis_batch", settings.batch_size)))
    on_real = matching_terms_of(teacher, x, labels, runtime, scale=settings.bn_scale)
    return {
        f"{term} term, {when}": value
        for when, terms in (("first", first), ("last", last), ("real", on_real))
        for term, value in zip(("batch-norm", "class"), terms, strict=True)
    } | {"batch-norm weight": settings.bn}


def without_classes(history: Sequence[Mapping[str, float]], settings: Any, n_classes: int) -> str:
    """One line of warning if the class term never fell below ln K, what guessing gives; else an empty text.

    The images then do not show the classes that they were asked for, most often because the batch-norm term outweighs
    the class term by far. A method without targets is not judged.
    """
    found = [terms for row in history if "one-hot loss" not in row and (terms := matching_terms(row, settings))]
    if not found or min(class_term for _, class_term in found) < math.log(n_classes):
        return ""
    of_bn, of_class = found[-1]
    relative = "" if settings.bn_scale == "relative" else ', or choose bn_scale="relative"'
    return (
        f"the class term stayed at chance (cross-entropy {of_class:.1f}, ln {n_classes} = {math.log(n_classes):.1f}), "
        f"so the images do not show the classes asked for; the batch-norm term weighs {settings.bn * of_bn:.3g}: "
        f"lower bn{relative}"
    )
