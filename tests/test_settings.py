"""Settings from a person: of the annotated types and in range, whatever the method, or one line."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import numpy as np
import pytest
import torch

from dfkd_lib import distillers
from dfkd_lib.errors import InputError
from dfkd_lib.settings import made, typed


@dataclass(frozen=True)
class Example:
    steps: int = 1
    rate: float = 0.1
    flip: bool = False
    kind: str = "a"
    betas: tuple[float, float] = (0.9, 0.99)
    milestones: tuple[int, ...] = ()
    limit: int | None = None
    clip: float = 5.0


@pytest.mark.parametrize(
    ("name", "given", "becomes"),
    [
        ("steps", np.int64(8), 8),
        ("rate", 1, 1.0),
        ("rate", np.float32(0.5), 0.5),
        ("rate", np.int32(2), 2.0),
        ("flip", np.bool_(True), True),
        ("betas", [0, 0.5], (0.0, 0.5)),
        ("milestones", [np.int64(3), 4], (3, 4)),
        ("limit", None, None),
        ("limit", np.int64(2), 2),
        ("clip", math.inf, math.inf),
    ],
)
def test_what_means_the_same_is_brought_to_the_annotated_type(name, given, becomes):
    value = getattr(made(Example, {name: given}), name)
    assert value == becomes and type(value) is type(becomes)
    if isinstance(value, tuple):
        assert [type(v) for v in value] == [type(v) for v in becomes]


@pytest.mark.parametrize(
    ("name", "given", "said"),
    [
        ("steps", 2.5, "steps must be a whole number, not 2.5"),
        ("steps", 64.0, "steps must be a whole number, not 64.0"),
        ("steps", True, "steps must be a whole number, not True"),
        ("steps", "64", "steps must be a whole number, not '64'"),
        ("steps", None, "steps must be a whole number, not None"),
        ("steps", torch.tensor(3), "steps must be a whole number"),
        ("steps", -1, "steps must be 0 or more, not -1"),
        ("limit", 1.5, "limit must be a whole number, not 1.5"),
        ("rate", "1e-3", "rate must be a number, not '1e-3'"),
        ("rate", True, "rate must be a number, not True"),
        ("rate", 1j, "rate must be a number, not 1j"),
        ("rate", math.nan, "rate must be finite, not nan"),
        ("rate", math.inf, "rate must be finite, not inf"),
        ("rate", 10**400, "rate is too large"),
        ("clip", -math.inf, "clip must be finite, not -inf"),
        ("flip", "False", "flip must be True or False, not 'False'"),
        ("flip", 0, "flip must be True or False, not 0"),
        ("kind", 1, "kind must be text, not 1"),
        ("betas", 0.9, "betas must be a sequence of 2, each a number, not 0.9"),
        ("betas", (0.9,), "betas must be a sequence of 2"),
        ("betas", "ab", "betas must be a sequence of 2"),
        ("betas", (0.9, 1.0), "betas must be in [0, 1), not 1.0"),
        ("milestones", 3, "milestones must be a sequence, each a whole number, not 3"),
        ("milestones", (1, 2.0), "milestones must be a whole number, not 2.0"),
    ],
)
def test_what_does_not_is_refused_by_name(name, given, said):
    with pytest.raises(InputError) as e:
        made(Example, {name: given})
    assert said in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("method", distillers.names())
def test_no_setting_of_any_method_takes_another_type_or_a_number_below_0(method):
    """Driven by the annotations, so that a new setting needs no check of its own."""
    known = distillers.settings_for(method, preset="paper")
    for f in fields(known):
        value = getattr(known, f.name)
        wrong = [{}, "no" if not isinstance(value, str) else 1, math.nan]
        if not isinstance(value, bool | str | tuple):
            wrong += [True, -1 if isinstance(value, int) else -1.0]
        for bad in wrong:
            with pytest.raises(InputError) as e:
                distillers.settings_for(method, preset="paper", **{f.name: bad})
            assert f.name in str(e.value) or "by definition" in str(e.value)


def test_a_momentum_of_1_or_more_and_a_negative_decay_are_refused():
    for changes in ({"momentum": 2.0}, {"momentum": -1}, {"weight_decay": -1}):
        with pytest.raises(InputError, match=next(iter(changes))):
            distillers.settings_for("dfad", preset="paper", **changes)


def test_a_value_alone():
    assert typed("seed", np.int64(3), int) == 3
    with pytest.raises(InputError, match="seed must be a whole number, not None"):
        typed("seed", None, int)
