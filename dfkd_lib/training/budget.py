"""What a method has spent: student updates, synthesised images, teacher passes and seconds of its two halves."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

_HALVES = ("synthesis_seconds", "distillation_seconds")


@dataclass
class Budget:
    """Running totals of one method; they survive a checkpoint.

    Attributes:
        student_updates: optimiser steps of the student.
        images: images synthesised for the student: stored in a bank, or made afresh for one update.
        teacher_passes: images sent forward through the teacher, in synthesis and in distillation.
    """

    student_updates: int = 0
    images: int = 0
    teacher_passes: int = 0
    _seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(_HALVES, 0.0))
    _running: list[tuple[str, Callable[[], float]]] = field(default_factory=list)

    @property
    def synthesis_seconds(self) -> float:
        """Time spent on synthesis. On a GPU, reading it waits for what still runs."""
        return self._total("synthesis_seconds")

    @property
    def distillation_seconds(self) -> float:
        """Time spent on the student's updates. On a GPU, reading it waits for what still runs."""
        return self._total("distillation_seconds")

    @contextmanager
    def synthesis(self, device: torch.device) -> Iterator[None]:
        """Count the time inside as synthesis; on a GPU by events of the device, without waiting for it."""
        with self._timed("synthesis_seconds", device):
            yield

    @contextmanager
    def distillation(self, device: torch.device) -> Iterator[None]:
        """Count the time inside as distillation, likewise."""
        with self._timed("distillation_seconds", device):
            yield

    @contextmanager
    def _timed(self, half: str, device: torch.device) -> Iterator[None]:
        start = _mark(device)
        yield
        self._running.append((half, _between(start, _mark(device))))
        if len(self._running) > 1000 or device.type != "cuda":
            self._settle()

    def _settle(self) -> None:
        for half, seconds in self._running:
            self._seconds[half] += seconds()
        self._running.clear()

    def _total(self, half: str) -> float:
        self._settle()
        return self._seconds[half]

    def state_dict(self) -> dict[str, float]:
        """The totals."""
        counts = {"student_updates": self.student_updates, "images": self.images, "teacher_passes": self.teacher_passes}
        return counts | {half: self._total(half) for half in _HALVES}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Continue from earlier totals."""
        self._running.clear()
        for name, value in state.items():
            if name in _HALVES:
                self._seconds[name] = value
            else:
                setattr(self, name, int(value))


def _mark(device: torch.device) -> torch.cuda.Event | float:
    """A point in time: on CUDA one in the device's own order of work."""
    if device.type == "cuda":
        try:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            return event
        except (RuntimeError, AssertionError):  # a device without events
            pass
    return time.perf_counter()


def _between(start: torch.cuda.Event | float, stop: torch.cuda.Event | float) -> Callable[[], float]:
    if isinstance(start, torch.cuda.Event) and isinstance(stop, torch.cuda.Event):
        return lambda: _elapsed(start, stop)
    assert isinstance(start, float) and isinstance(stop, float)
    seconds = stop - start
    return lambda: seconds


def _elapsed(start: torch.cuda.Event, stop: torch.cuda.Event) -> float:
    stop.synchronize()
    return start.elapsed_time(stop) / 1000
