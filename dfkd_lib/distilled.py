"""What comes out of a distillation, and how it is kept."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from . import lending, records
from .errors import DFKDError
from .training.budget import Budget
from .training.fit import Fit


@dataclass(frozen=True)
class Distilled:
    """What came out of :func:`dfkd_lib.distill`.

    Attributes:
        student: a trained copy of the student that was passed in: in eval mode, on that one's device, without a
            `torch.compile` or `DataParallel` around it.
        agreement: share of fresh synthetic images, or of held-back pictures, on which student and teacher name the
            same class; for segmentation the mean intersection over union of the student's maps with the teacher's.
            It is the only figure that can be had without labels, and no accuracy: synthetic images are not the images
            that the student is for, and most methods look for those on which the networks still differ.
        classes_named: how many different classes the teacher names on those images. Where they are few, agreement
            is easy and says little.
        accuracy: of "teacher" and "student" on the test images, for segmentation their mean intersection over union
            with the masks; empty if none were given.
        images: some of the images on which the networks were compared, float32 [n, C, H, W] in [0, 1], on the CPU.
        budget: what was spent.
        seconds: wall-clock time, resumed parts included.
        fit: the history of the training metrics.
        record: all this as JSON knows it, with every setting, the versions of code and packages, and "warnings".
    """

    student: nn.Module
    agreement: float
    classes_named: int
    accuracy: dict[str, float]
    images: Tensor
    budget: Budget
    seconds: float
    fit: Fit
    record: dict[str, Any]

    def __str__(self) -> str:
        asked = self.record["parameters"]
        teacher, student = self.record["networks"]["teacher"], self.record["networks"]["student"]
        seen, fresh = "synthetic images", "fresh synthetic images"
        if asked["method"] == "kd":
            seen, fresh = "pictures", "held-back pictures"
        agreed, right = "agreement", "test accuracy"
        if "task" in asked:
            agreed, right = "mean IoU with the teacher", "test mean IoU"
        lines = [
            f"{asked['method']}: {self.budget.student_updates:,} student updates on {self.budget.images:,} {seen} in "
            f"{self.seconds:.0f} s",
            f"{teacher:,} -> {student:,} parameters ({teacher / max(1, student):.1f} times fewer)",
            f"{agreed} on {fresh} {self.agreement:.1%}, where the teacher names {self.classes_named} "
            f"of {asked['num_classes']} classes",
        ]
        if self.accuracy:
            lines.append(f"{right} {self.accuracy['student']:.1%}, teacher {self.accuracy['teacher']:.1%}")
        return "\n".join([*lines, *(f"warning: {line}" for line in self.record["warnings"])])


def keep(student: nn.Module, record: dict[str, Any], folder: Path) -> None:
    """Write the weights and the record; what cannot be written is a warning, there and in the record that is handed on.

    Args:
        record: its "warnings" are added to.
    """
    for what, write in (("student", partial(lending.save, student, folder / "student.safetensors")),
                        ("record", partial(records.write, folder, record))):  # fmt: skip
        try:
            write()
        except DFKDError as e:
            record["warnings"].append(f"{e}; the {what} is in the result all the same: keep it from there")
            warnings.warn(record["warnings"][-1], stacklevel=3)
