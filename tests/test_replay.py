"""A recorded update does what the update does as it is written, bit for bit; where it cannot be recorded, that is said.

There is no GPU here: `op_recorder` stands in for CUDA graphs and is as blind to what changes in Python.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import stream
from op_recorder import OpRecorder
from test_resume import CASES, by_name, differences
from torch import Tensor, nn

from dfkd_lib import distillers
from dfkd_lib.runtime import Runtime
from dfkd_lib.training import replay
from dfkd_lib.training.fit import Method
from dfkd_lib.training.players import recordable, sgd, update
from dfkd_lib.training.replay import WARM_UP, Replay
from dfkd_lib.training.schedules import set_lr

GRAPHS = Runtime(torch.device("cpu"), graphs=True)
VARIANTS = [
    *distillers.names(), "dafl, joint", "zskt, fresh noise", "zskt, attention", "dfq, statistics of a Gaussian",
    "fast, reptile", "nayer, noisy layers that stay", "cmi, without contrast", "kd", "supervised",
]  # fmt: skip
UNUSED = {
    "random": {"generation"}, "zskt, fresh noise": {"lecture"}, "dfad-one-stage": {"imitation", "generation"},
}  # fmt: skip
# Each kind of update is recorded, those of the first call too, and replayed.
LONGER = {"inner_steps": 4, "g_steps": 4, "memory_size": 16, "negatives": 8}


@pytest.fixture
def recorders(monkeypatch: pytest.MonkeyPatch) -> list[OpRecorder]:
    """Updates are recorded from now on; by these, in the order in which they were asked for."""
    made: list[OpRecorder] = []

    def recorder_of(runtime: Runtime) -> OpRecorder:
        made.append(OpRecorder())
        return made[-1]

    monkeypatch.setattr(replay, "recorder_of", recorder_of)
    return made


def built(variant: str) -> Method:
    settings = {}
    if variant in distillers.names():
        known = distillers.settings_for(variant, preset="paper")
        settings = {name: value for name, value in LONGER.items() if hasattr(known, name)}
        return by_name(variant, GRAPHS, **settings)
    return CASES[variant](GRAPHS)


def updates_of(method: Method) -> list[Replay]:
    return [part for part in vars(method).values() if isinstance(part, Replay)]


def played(method: Method, n_steps: int) -> list[dict[str, Tensor]]:
    return [method.step() for _ in range(n_steps)]


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_recorded_method_is_the_method_as_written_and_so_when_it_is_resumed(variant, recorders):
    recorded, written = built(variant), built(variant)
    for each in updates_of(written):
        each.recorder = None
    first, last = 5, 4
    metrics = [played(method, first) for method in (written, recorded)]
    assert not differences(*metrics)
    assert not differences(written.state_dict(), recorded.state_dict())
    middle = copy.deepcopy(recorded.state_dict())
    played(recorded, 1)
    recorded.load_state_dict(middle)  # what was recorded before works on moments that are no longer in use
    metrics = [played(method, last) for method in (written, recorded)]
    assert not differences(*metrics)
    assert not differences(written.state_dict(), recorded.state_dict())
    unused = {name for name, part in vars(recorded).items() if isinstance(part, Replay) and not part.recorder.replays}
    assert unused == UNUSED.get(variant, set()), "each kind of update was replayed"


def test_the_stand_in_is_as_blind_as_a_graph(recorders):
    """Otherwise the comparison above would not find a learning rate that is a number."""
    rate, x = [1.0], torch.zeros(1)
    add = Replay(lambda: x.add_(rate[0]), GRAPHS)
    for _ in range(WARM_UP + 1):
        add()
    rate[0] = 100.0
    add()
    assert x.item() == WARM_UP + 2


def test_a_schedule_reaches_the_recorded_update(recorders):
    layer = nn.Linear(1, 1, bias=False)
    optimizer = recordable(sgd(layer, 1.0, 0.0, momentum=0.0), GRAPHS)
    descent = Replay(lambda: update(optimizer, layer.weight.sum(), GRAPHS.scaler()), GRAPHS)
    moved = []
    for lr in (1.0, 0.5, 0.25, 0.125, 0.0625, 0.0):
        before = layer.weight.item()
        set_lr(optimizer, lr)
        descent()
        moved.append(before - layer.weight.item())
    assert moved == pytest.approx([1.0, 0.5, 0.25, 0.125, 0.0625, 0.0])
    assert recorders[0].replays == len(moved) - WARM_UP


def test_without_graphs_nothing_is_recorded_and_rates_are_numbers(recorders, float32):
    method = by_name("dfad", float32)
    played(method, 3)
    assert not recorders and all(each.recorder is None for each in updates_of(method))
    assert isinstance(method.student_optimizer.param_groups[0]["lr"], float)  # type: ignore[attr-defined]


def test_each_key_is_recorded_apart(recorders):
    x, doubles = torch.ones(()), [False]

    def work() -> None:
        x.mul_(2) if doubles[0] else x.add_(1)

    step, expected = Replay(work, GRAPHS), 1
    for turn in range(5 * (WARM_UP + 1)):
        doubles[0] = turn % 4 == 3
        step(doubles[0])
        expected = 2 * expected if doubles[0] else expected + 1
    assert x.item() == expected
    assert recorders[0].recordings == 2


def test_results_are_the_callers(recorders):
    x = torch.zeros(())

    def work() -> dict[str, Tensor]:
        x.add_(1)
        return {"x": x * 1}

    step = Replay(work, GRAPHS)
    results = [step()["x"] for _ in range(WARM_UP + 4)]
    assert [result.item() for result in results] == list(range(1, WARM_UP + 5))
    assert recorders[0].replays == 4


def test_after_forget_the_work_is_recorded_on_what_it_uses_now(recorders):
    place = {"x": torch.zeros(())}
    step = Replay(lambda: place["x"].add_(1), GRAPHS)
    for _ in range(WARM_UP + 2):
        step()
    place["x"] = torch.zeros(())
    step.forget()
    for _ in range(WARM_UP + 2):
        step()
    assert place["x"].item() == WARM_UP + 2 and recorders[0].recordings == 2


class Refusing(OpRecorder):
    """Cannot record anything."""

    def record(self, work: Callable[[], Any], streams: Any) -> Any:
        self.recordings += 1
        raise RuntimeError("operation not permitted\nwhen a stream is capturing")


def test_what_cannot_be_recorded_runs_as_written_and_says_so_in_one_line(monkeypatch, capsys):
    refusing: list[Refusing] = []
    monkeypatch.setattr(replay, "recorder_of", lambda runtime: refusing.append(Refusing()) or refusing[-1])
    refused = by_name("zskt", GRAPHS)
    written = by_name("zskt", GRAPHS)
    for each in updates_of(written):
        each.recorder = None
    assert not differences(played(written, 6), played(refused, 6))
    assert not differences(written.state_dict(), refused.state_dict())
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["dfkd: note: an update cannot be recorded, and runs as written: operation not permitted"] * 3
    assert [one.recordings for one in refusing[:3]] == [1] * 3, "it is tried once"


def test_a_processor_has_nothing_to_record_with(float32):
    assert Replay(lambda: None, replace(float32, graphs=True)).recorder is None


class Stream:
    """A stand-in for a generator of CUDA, which a recording that fails leaves in the recorded state."""

    def __init__(self, device: object = None) -> None:
        self.device, self.real, self.recorded = device, stream(), False

    def get_state(self) -> Tensor:
        return self.real.get_state()

    def set_state(self, state: Tensor) -> None:
        self.real.set_state(state)

    def graphsafe_get_state(self) -> torch.Generator:
        return self.real

    def graphsafe_set_state(self, other: torch.Generator) -> None:
        self.real, self.recorded = other, False


class Breaking:
    """Takes the place of `torch.cuda.graph`: draws from the stream, and fails at its end."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream

    def __enter__(self) -> None:
        self.stream.recorded = True

    def __exit__(self, *error: Any) -> None:
        raise RuntimeError("operation not permitted")


def test_a_recording_that_fails_leaves_the_random_streams_as_they_were(monkeypatch):
    drawn, graph = Stream(), type("Graph", (), {"register_generator_state": lambda self, stream: None})
    monkeypatch.setattr(torch.cuda, "CUDAGraph", graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda *_, **__: Breaking(drawn))
    recorder = object.__new__(replay.CudaRecorder)
    recorder.stream = recorder.memory = None
    before = drawn.get_state()
    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="not permitted"):
        fresh = Stream()
        patched.setattr(torch, "Generator", lambda device: fresh)
        recorder.record(lambda: torch.rand(5, generator=drawn.real), [drawn])
    assert torch.equal(drawn.get_state(), before) and not drawn.recorded
    assert gc.isenabled()
