"""The guard that makes "data-free" a property that is checked, and the list of what was opened."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import DataFreeViolation

# What a data-free method may read: evaluation data, and images that a network made.
OPEN_SPLITS = ("test", "synthetic")

# One list for the whole process, so that a worker thread cannot read what the main thread forbids.
_guards: list[list[str]] = []
_evaluations: list[object] = []
_opened: dict[tuple[str, str, str], None] = {}


@contextmanager
def no_training_data(who: str) -> Iterator[None]:
    """While this context is open, only test splits and synthetic images can be read, and held-out data inside
    `evaluating`; guards may be nested.

    Args:
        who: the method that claims to need no data; the error names it.

    Raises:
        DataFreeViolation: raised by `load` and `ImageSet` at any other access inside the context.
    """
    guard = [who]
    _guards.append(guard)
    try:
        yield
    finally:
        # By identity: contexts of several threads may close in any order, and two may have one name.
        _guards[:] = [other for other in _guards if other is not guard]


@contextmanager
def evaluating() -> Iterator[None]:
    """While this context is open, guards let held-out data through: a student may be measured there, not taught."""
    mark = object()
    _evaluations.append(mark)
    try:
        yield
    finally:
        _evaluations.remove(mark)


def check(name: str, split: str) -> None:
    """Refuse a set of training images while a guard is active."""
    if _guards and split not in OPEN_SPLITS and not (_evaluations and split == "held_out"):
        who = _guards[-1][0]
        raise DataFreeViolation(
            f"{who} is data-free but touched the {split!r} images of {name!r}; read them outside its training"
        )


def note(name: str, split: str, fingerprint: str) -> None:
    """Add a set to the list that `opened` gives."""
    _opened[name, split, fingerprint] = None


def opened() -> list[tuple[str, str, str]]:
    """(name, split, fingerprint) of every set that `load` opened in this process, first to last."""
    return list(_opened)
