"""Settings as a person gives them: brought to the types that the annotations name, finite and in range, or refused."""

from __future__ import annotations

import math
import numbers
import types
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np

from .errors import InputError

S = TypeVar("S")

_KINDS = {bool: "True or False", int: "a whole number", float: "a number", str: "text"}
_BELOW_1 = ("momentum", "betas")  # shares of the past; the other upper bounds are the methods' own
_MAY_BE_INFINITE = ("clip",)


def made(kind: type[S], given: Mapping[str, Any]) -> S:
    """A dataclass of settings from values of any origin.

    A whole number may stand for a float, a list for a tuple, a NumPy scalar for Python's own; nothing else is
    converted, so that "False" is not true and 2.5 steps are not 2.

    Raises:
        InputError: a value of the wrong type, one that is not finite or below 0 (no setting may be), or one that the
            class refuses.
    """
    annotations = get_type_hints(kind)
    settings = kind(**{name: typed(name, value, annotations[name]) for name, value in given.items()})
    for f in fields(kind):  # type: ignore[arg-type]
        value = getattr(settings, f.name)
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, int | float):
                _check_range(f.name, number)
    return settings


def typed(name: str, value: Any, annotation: Any) -> Any:
    """The value in the type of an annotation: bool, int, float, str, a tuple or a union of them; any other is as it is.

    Raises:
        InputError: it is of another type, or a float too large; the message has the name.
    """
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return typed(name, value, next(a for a in arguments if a is not type(None)))
    if origin is tuple:
        repeated = arguments[-1] is Ellipsis
        n = len(value) if isinstance(value, Sequence) and not isinstance(value, str) else -1
        if n < 0 or (not repeated and n != len(arguments)):
            many = "a sequence" if repeated else f"a sequence of {len(arguments)}"
            raise InputError(f"{name} must be {many}, each {_KINDS.get(arguments[0], 'of its type')}, not {value!r}")
        return tuple(typed(name, v, arguments[0] if repeated else arguments[i]) for i, v in enumerate(value))
    if annotation not in _KINDS:
        return value
    matches = {
        bool: isinstance(value, bool | np.bool_),
        int: isinstance(value, numbers.Integral) and not isinstance(value, bool),
        float: isinstance(value, numbers.Real) and not isinstance(value, bool),
        str: isinstance(value, str),
    }
    if not matches[annotation]:
        raise InputError(f"{name} must be {_KINDS[annotation]}, not {value!r}")
    try:
        return annotation(value)
    except OverflowError as e:
        raise InputError(f"{name} is too large: {e}") from e


def _check_range(name: str, number: float) -> None:
    if not math.isfinite(number) and not (name in _MAY_BE_INFINITE and number > 0):
        raise InputError(f"{name} must be finite, not {number!r}")
    if number < 0:
        raise InputError(f"{name} must be 0 or more, not {number!r}")
    if name in _BELOW_1 and number >= 1:
        raise InputError(f"{name} must be in [0, 1), not {number!r}")
