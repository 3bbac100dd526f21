"""What a method has spent: student updates, synthesised images, teacher passes and seconds of its two halves."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch


@dataclass
class Budget:
    """Running totals of one method; they survive a checkpoint.

    Attributes:
        student_updates: optimiser steps of the student.
        images: images synthesised for the student: stored in a bank, or made afresh for one update.
        teacher_passes: images sent forward through the teacher, in synthesis and in distillation.
        synthesis_seconds, distillation_seconds: wall-clock time of either half, the device idle at both ends.
    """

    student_updates: int = 0
    images: int = 0
    teacher_passes: int = 0
    synthesis_seconds: float = 0.0
    distillation_seconds: float = 0.0

    @contextmanager
    def synthesis(self, device: torch.device) -> Iterator[None]:
        """Count the time inside as synthesis; waits for a GPU at both ends, or the clock would lie."""
        start = _now(device)
        yield
        self.synthesis_seconds += _now(device) - start

    @contextmanager
    def distillation(self, device: torch.device) -> Iterator[None]:
        """Count the time inside as distillation; waits for a GPU at both ends."""
        start = _now(device)
        yield
        self.distillation_seconds += _now(device) - start

    def state_dict(self) -> dict[str, float]:
        """The totals."""
        return asdict(self)

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Continue from earlier totals."""
        for name, value in state.items():
            setattr(self, name, value)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
