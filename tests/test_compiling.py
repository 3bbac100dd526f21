"""A compiled method is the method as written; taps and hooks see what they saw; what cannot be compiled says so."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from conftest import settled
from test_resume import CASES, by_name, differences
from torch import Tensor, nn

from dfkd_lib import compiling, distillers
from dfkd_lib.compiling import Compiled, as_written, compiled, shown
from dfkd_lib.runtime import Runtime
from dfkd_lib.taps import batch_norm_layers, tapped
from dfkd_lib.training.fit import Method
from dfkd_lib.training.modes import evaluating
from dfkd_lib.training.players import freeze, in_compute_type

WRITTEN = Runtime(torch.device("cpu"), "float64")
COMPILED = replace(WRITTEN, compile=True)
WHAT_IS_COMPILED: dict[str, Callable[[Runtime], Method]] = {
    **{name: partial(by_name, name) for name in distillers.names()},
    **{name: CASES[name] for name in ("kd", "supervised", "mosaickd")},
}
needs_compiler = pytest.mark.skipif(bool(compiling.hindrance(WRITTEN.device)), reason="there is no C++ compiler")


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes are traced and guarded as for the compiler, but what was traced then runs by torch's own kernels."""
    torch._dynamo.reset()
    monkeypatch.setattr(compiling, "BACKEND", "eager")


def played(method: Method, n_steps: int = 3) -> list[dict[str, Tensor]]:
    return [method.step() for _ in range(n_steps)]


@pytest.mark.parametrize("build", WHAT_IS_COMPILED.values(), ids=WHAT_IS_COMPILED)
def test_a_traced_method_is_the_method_as_written(build: Callable[[Runtime], Method], traced: None) -> None:
    written, ours = build(WRITTEN), build(COMPILED)
    torch._dynamo.utils.counters.clear()
    assert not differences(played(written), played(ours))
    assert not differences(written.state_dict(), ours.state_dict())
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] and not counters["graph_break"]


@needs_compiler
@pytest.mark.parametrize("name", ["dfq"])
def test_a_compiled_method_is_the_method_as_written_to_a_relative_1e_8(name: str) -> None:
    check_compiled(name)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("name", WHAT_IS_COMPILED.keys() - {"dfq"})
def test_so_are_all_others(name: str) -> None:
    check_compiled(name)


def check_compiled(name: str) -> None:
    written, ours = (WHAT_IS_COMPILED[name](runtime) for runtime in (WRITTEN, COMPILED))
    for before, after in zip(played(written), played(ours), strict=True):
        torch.testing.assert_close(after, before, rtol=1e-8, atol=1e-10)
    student, compiled_student = (method.student.state_dict() for method in (written, ours))  # type: ignore[attr-defined]
    torch.testing.assert_close(dict(compiled_student), dict(student), rtol=1e-8, atol=1e-10)


@torch._dynamo.config.patch(cache_size_limit=1)  # a shared cache would be full with the first
def test_two_networks_in_one_process_keep_their_taps_and_their_caches(traced: None) -> None:
    x = torch.rand(4, 1, 8, 8)
    for seed in range(4):
        network = compiled(freeze(settled(seed)), frozen=True)
        twin = copy.deepcopy(network)
        assert twin._compiled_call_impl is None
        torch._dynamo.utils.counters.clear()
        for _ in range(3):
            t, seen = shown(network, batch_norm_layers(network), x)
            with tapped(batch_norm_layers(twin)) as expected:
                assert torch.equal(t, twin(x))
            assert [visit.layer for visit in seen] == batch_norm_layers(network)
            assert torch.equal(seen[0].x, expected[0].x)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_a_layer_that_is_visited_twice_is_seen_twice(traced: None) -> None:
    layer = nn.BatchNorm2d(1)
    layer.running_mean.fill_(0.5)  # type: ignore[union-attr]
    network = compiled(freeze(nn.Sequential(layer, nn.ReLU(), layer)), frozen=True)
    x = torch.rand(4, 1, 8, 8, requires_grad=True)
    for _ in range(3):
        _, seen = shown(network, [layer], x)
        assert [visit.layer for visit in seen] == [layer, layer] and torch.equal(seen[0].x, x)
        (gradient,) = torch.autograd.grad(seen[1].x.sum(), x)
        assert torch.allclose(gradient, (x > 0.5) / (1 + layer.eps) ** 0.5)


def test_hooks_that_come_later_are_called(traced: None) -> None:
    network, x, calls = compiled(settled()), torch.rand(4, 1, 8, 8), []
    network(x)
    with tapped(batch_norm_layers(network)) as seen:
        network(x)
    assert len(seen) == 1
    hook = network[2].register_forward_hook(lambda *_: calls.append(1))
    network(x)
    hook.remove()
    network(x)
    assert calls == [1]


def test_constant_weights_are_those_of_now(traced: None) -> None:
    network, x = compiled(freeze(settled()), frozen=True), torch.rand(4, 1, 8, 8)
    for change in (lambda: None, lambda: network[0].weight.mul_(2), lambda: network.to(torch.float64)):
        with torch.no_grad():
            change()
            given = x.to(network[0].weight.dtype)
            assert torch.equal(network(given), copy.deepcopy(network)(given))


def test_a_frozen_network_has_constant_weights_only_where_no_gradient_is_asked_for(monkeypatch) -> None:
    made: list[dict[str, bool]] = []
    monkeypatch.setattr(compiling, "_compile", lambda passes, **options: made.append(options) or passes)
    network, x = in_compute_type(freeze(COMPILED.prepare(settled())), COMPILED), torch.rand(2, 1, 8, 8).double()
    network(x)
    assert made == [{}]
    with torch.no_grad():
        network(x)
        network(x)
    assert made == [{}, {"freezing": True}]


def test_prepared_twice_is_compiled_once_and_in_16_bits_too() -> None:
    network = COMPILED.prepare(settled())
    passes = network._compiled_call_impl
    assert COMPILED.prepare(network)._compiled_call_impl is passes
    lowered = in_compute_type(freeze(network), Runtime(torch.device("cpu"), "bfloat16", compile=True))
    assert isinstance(lowered._compiled_call_impl, Compiled) and lowered._compiled_call_impl.network is lowered


def test_checks_and_evaluations_run_as_written(traced: None) -> None:
    network = compiled(settled())
    torch._dynamo.utils.counters.clear()
    with evaluating(network):
        network(torch.rand(4, 1, 8, 8))
    with as_written():
        network(torch.rand(3, 1, 8, 8))
    assert not torch._dynamo.utils.counters["stats"]


def test_what_cannot_be_compiled_runs_as_written_and_says_so_in_one_line(monkeypatch, capsys) -> None:
    def refuses(*_: Any) -> None:
        raise torch._dynamo.exc.Unsupported("no kernel for this\nand more")

    monkeypatch.setattr(compiling, "_compile", lambda passes, **options: refuses)
    network, x = compiled(freeze(settled())), torch.rand(4, 1, 8, 8)
    for _ in range(2):
        assert torch.equal(network(x), copy.deepcopy(network)(x))
    assert capsys.readouterr().err.splitlines() == [
        "dfkd: note: Sequential cannot be compiled, and runs as written: no kernel for this"
    ]


@pytest.mark.parametrize(
    ("wanted", "cxx", "compiles", "said"),
    [
        (False, "no-such-compiler", False, ""),
        (True, "no-such-compiler", False, "there is no C++ compiler no-such-compiler"),
        (True, "true", True, ""),
    ],
)
def test_what_cannot_be_compiled_here_is_not_and_the_run_says_why(
    wanted: bool, cxx: str, compiles: bool, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(os.environ, "CXX", cxx)
    runtime = Runtime.choose("cpu", "float32", compile=wanted)
    assert (
        runtime.compile == compiles
        and runtime.not_compiled.startswith(said)
        and bool(runtime.not_compiled) == bool(said)
    )
    line = runtime.describe()
    assert ("not compiled (" + said in line) if said else ("not compiled" not in line)
    assert (", compiled," in line) == compiles
