"""Errors whose message is one line: what is wrong, and what to do about it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class DFKDError(Exception):
    """Base of every error that this project raises on purpose."""


class InputError(DFKDError):
    """The caller asked for something that does not exist or cannot be; the command exits with status 2."""


class DataUnavailable(DFKDError):
    """A dataset is neither on disk nor reachable."""


class DataFreeViolation(DFKDError):
    """A data-free method touched training data."""


class NonFiniteLoss(DFKDError):
    """A loss, or a weight, became NaN or infinite."""


class DamagedFile(DFKDError):
    """A file exists but does not hold what it should."""


def first_line(error: BaseException) -> str:
    """What an error of foreign code says, in one line, or its kind if it says nothing."""
    if isinstance(error, KeyError):
        return f"no key {error}"  # which alone is a mere word
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return lines[-1] if "TorchScript" in lines[0] else lines[0]  # the interpreter puts the traceback first


def unknown(kind: str, name: object, known: Iterable[str]) -> InputError:
    """The error for a name that is not among `known`, with the nearest known name if one is near."""
    names = sorted(known)
    near = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    shown = repr(str(name)[:80])
    return InputError(f"unknown {kind} {shown}; {hint}known: {', '.join(names) or 'none'}")
