"""No step waits for the device, and all that it makes is made there."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import FunctionType

import pytest
import torch
from host_watch import HostWatch
from pretended_device import DEVICE, HOST, MixedDevices, PretendedDevice, on_host
from test_resume import CASES
from torch import Tensor, nn

from dfkd_lib.data import augment
from dfkd_lib.methods import amalgamation
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


@pytest.mark.parametrize("build", CASES.values(), ids=CASES)
def test_a_step_and_a_resume_stay_on_one_device(build: Callable[[Runtime], Method]) -> None:
    amalgamation._on_device.cache_clear()  # what it kept was another pretended device's
    with PretendedDevice() as pretended:
        method, resumed = build(Runtime(DEVICE)), build(Runtime(DEVICE))
        method.step()
        resumed.load_state_dict(on_host(method.state_dict()))
        pretended.copies.clear()  # building and resuming may copy
        for each in (method, resumed):
            metrics = each.step()
            assert all(value.device == DEVICE for value in metrics.values())
        assert not pretended.copies


@pytest.mark.parametrize(
    "mix",
    [
        lambda x: x + torch.zeros(3),
        lambda x: x + torch.zeros(3, device=HOST),
        lambda x: x[torch.tensor([0, 1])],
        lambda x: x.uniform_(generator=torch.Generator()),
        lambda x: torch.rand(3, generator=torch.Generator(DEVICE)),
        lambda x: torch.stack([x, x.cpu()]),
        lambda x: copy.deepcopy(x) + x.cpu(),
        lambda x: nn.Linear(3, 3)(x),
        lambda x: x.numpy(),
    ],
)
def test_the_pretended_device_refuses_a_mix(mix: Callable[[Tensor], object]) -> None:
    with PretendedDevice(), pytest.raises(MixedDevices):
        mix(torch.ones(3, device=DEVICE))


def test_the_pretended_device_notes_copies_and_lets_the_rest_pass() -> None:
    with PretendedDevice() as pretended:
        x, host = torch.ones(3).to(DEVICE), torch.ones(3)
        layer = nn.Linear(3, 2).to(DEVICE)
        assert x.device == layer.weight.device == DEVICE and host.device == HOST
        pretended.copies.clear()
        layer(x * torch.tensor(2.0)).sum().backward()
        assert layer.weight.grad.device == x[1:].device == torch.zeros_like(x).device == DEVICE
        torch.rand(3, generator=torch.Generator(DEVICE), device=DEVICE)
        assert not pretended.copies
        x.copy_(host)
        assert x.device == DEVICE and x.sum().item() == 3.0 and x.cpu().device == HOST
        assert [line.rsplit(": ", 1)[1] for line in pretended.copies] == [
            "between device and processor", "a number is read", "from the device",
        ]  # fmt: skip


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
