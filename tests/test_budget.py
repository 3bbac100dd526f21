"""Budgets add up what was spent, and survive a checkpoint."""

from __future__ import annotations

import pytest
import torch

from dfkd_lib.training import budget as budgets
from dfkd_lib.training import checkpoints
from dfkd_lib.training.budget import Budget

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch):
    """A clock that moves by hand, and the devices on which it was read."""
    now, asked = [0.0], []
    monkeypatch.setattr(budgets, "_mark", lambda device: asked.append(device) or now[0])
    return now, asked


def test_either_half_has_its_own_clock(clock):
    now, asked = clock
    budget = Budget()
    for seconds in (1.0, 2.5):
        with budget.synthesis(CPU):
            now[0] += seconds
        now[0] += 100
        with budget.distillation(CPU):
            now[0] += 10 * seconds
    assert budget.synthesis_seconds == 3.5 and budget.distillation_seconds == 35
    assert asked == [CPU] * 8, "read at both ends"


def test_seconds_are_real_ones():
    budget = Budget()
    with budget.synthesis(CPU):
        torch.rand(300, 300) @ torch.rand(300, 300)
    assert 0 < budget.synthesis_seconds < 10 and budget.distillation_seconds == 0


class Event:
    """Stands in for an event of a GPU, each of which happens a second after the one before."""

    recorded, waited = 0, 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        Event.recorded += 1
        self.at = Event.recorded

    def synchronize(self) -> None:
        Event.waited += 1

    def elapsed_time(self, other: Event) -> float:
        return 1000.0 * (other.at - self.at)


def test_a_gpu_keeps_its_own_time_and_is_waited_for_only_where_the_time_is_read(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: pytest.fail("the whole device is waited for"))
    budget, gpu = Budget(), torch.device("cuda:0")
    for _ in range(3):
        with budget.synthesis(gpu):
            pass
        with budget.distillation(gpu), budget.synthesis(gpu):
            pass
    assert Event.recorded == 18 and Event.waited == 0
    assert (budget.synthesis_seconds, budget.distillation_seconds) == (6, 9) and Event.waited == 9
    assert budget.state_dict()["synthesis_seconds"] == 6 and Event.waited == 9, "each is read once"


def test_a_device_without_events_is_timed_by_the_processor(monkeypatch):
    class Missing(Event):
        def __init__(self, enable_timing: bool) -> None:
            raise RuntimeError("no events here")

    monkeypatch.setattr(torch.cuda, "Event", Missing)
    budget = Budget()
    with budget.synthesis(torch.device("cuda:0")):
        sum(range(1000))
    assert budget.synthesis_seconds > 0


def test_a_restored_budget_goes_on(tmp_path, clock):
    now, _ = clock
    budget = Budget()
    spent = {"student_updates": 3, "images": 40, "teacher_passes": 500}
    budget.load_state_dict(spent | {"synthesis_seconds": 1.5, "distillation_seconds": 2.5})
    checkpoints.save(tmp_path / "b", budget.state_dict())
    later = Budget()
    later.load_state_dict(checkpoints.load(tmp_path / "b"))
    assert later == budget and isinstance(later.student_updates, int)
    with later.synthesis(CPU):
        now[0] += 1
    assert later.synthesis_seconds == 2.5
