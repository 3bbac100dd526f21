"""No step waits for the device, and all that it makes is made there."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import FunctionType

import pytest
import torch
from host_watch import HostWatch
from test_resume import CASES
from torch import Tensor

from dfkd_lib.data import augment
from dfkd_lib.runtime import Runtime
from dfkd_lib.training.fit import Method

CPU = Runtime(torch.device("cpu"))


@pytest.mark.parametrize("build", CASES.values(), ids=CASES)
def test_a_step_and_the_step_after_a_resume_ask_nothing_of_the_processor(build: Callable[[Runtime], Method]) -> None:
    method, resumed = build(CPU), build(CPU)
    method.step()
    resumed.load_state_dict(copy.deepcopy(method.state_dict()))
    for each in (method, resumed):
        with HostWatch() as watch:
            metrics = each.step()
        assert not watch.found
        assert all(isinstance(value, Tensor) for value in metrics.values())


@pytest.mark.parametrize(
    ("call", "fault"),
    [
        (lambda x: x.sum().item(), "item waits"),
        (lambda x: float(x.sum()), "__float__ waits"),
        (lambda x: bool((x > 0).any()), "__bool__ waits"),
        (lambda x: x.to("cpu"), "to waits"),
        (lambda x: x[x > 0], "mask"),
        (lambda x: x[[0, 1]], "list"),
        (lambda x: x + torch.tensor([1.0, 2.0, 3.0]), "brings numbers"),
        (lambda x: x + torch.zeros(3), "zeros without a device"),
        (lambda x: x + torch.rand(3, device=x.device), "rand without a generator"),
    ],
)
def test_the_watch_sees_what_it_is_for(call: Callable[[Tensor], object], fault: str) -> None:
    of_the_library = FunctionType(call.__code__.replace(co_filename=augment.__file__), globals())
    with HostWatch() as watch:
        of_the_library(torch.ones(3))
    assert any(fault in line for line in watch.found)
