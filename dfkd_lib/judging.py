"""How near a student has come to its teacher, without labels and with some."""

from __future__ import annotations

import torch
from torch import Tensor

from .measures.evaluation import confusion, mean_iou_of
from .methods.distiller import BankDistiller
from .planning import Run
from .training.players import no_weight_gradients

_FRESH = 256  # synthetic images on which the networks are compared
_FRESH_MAPS = 64  # of networks that name a class for every pixel


def fresh_images(run: Run, *, dense: bool) -> dict[str, Tensor]:
    """Images that the student has not seen, and what the networks say to them; nothing more is learnt.

    Args:
        dense: whether the networks name a class for every pixel.

    Returns:
        "images" [n, C, H, W]; "teacher" and "student", predicted classes [n] or [n, H, W].
    """
    if isinstance(run, BankDistiller):
        run.student.eval()
        with no_weight_gradients(run.student):
            run.synthesize()
        return run.watch(min(_FRESH, run.newest_call))
    return run.watch(_FRESH_MAPS if dense else _FRESH)


def agreement(fresh: dict[str, Tensor], n_classes: int) -> float:
    """Share of images on which both networks name one class; of maps, the mean IoU of the student's with the teacher's.

    Args:
        fresh: see :func:`fresh_images`.
    """
    teacher, student = fresh["teacher"], fresh["student"]
    if teacher.ndim > 1:
        return mean_iou_of(confusion(student, teacher, n_classes))
    return float((student == teacher).float().mean())


def by_class(fresh: dict[str, Tensor]) -> dict[str, list[int]]:
    """{class: [images, or pixels, for which the teacher names it, those of them for which the student does]}."""
    teacher, same = fresh["teacher"], fresh["teacher"] == fresh["student"]
    return {str(c): [int((teacher == c).sum()), int(same[teacher == c].sum())] for c in teacher.unique().tolist()}


def expected_classes(n_classes: int, n: int) -> float:
    """How many different classes n uniform draws name, on average."""
    return n_classes * (1 - (1 - 1 / n_classes) ** n)


def evenly(images: Tensor, n: int) -> Tensor:
    """At most n of the images, spread over all of them, on the CPU in [0, 1]."""
    some = torch.linspace(0, len(images) - 1, min(n, len(images))).round().long()
    return images.cpu()[some].clamp(0, 1).float()
