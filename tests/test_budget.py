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
    """A clock that moves by hand, and the devices it was asked to wait for."""
    now, asked = [0.0], []
    monkeypatch.setattr(budgets, "_now", lambda device: asked.append(device) or now[0])
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
    assert asked == [CPU] * 8, "the device is waited for at both ends"


def test_seconds_are_real_ones():
    budget = Budget()
    with budget.synthesis(CPU):
        torch.rand(300, 300) @ torch.rand(300, 300)
    assert 0 < budget.synthesis_seconds < 10 and budget.distillation_seconds == 0


def test_a_gpu_is_waited_for(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    with Budget().synthesis(torch.device("cuda:0")):
        assert len(waited) == 1
    assert waited == [torch.device("cuda:0")] * 2
    with Budget().distillation(CPU):
        pass
    assert len(waited) == 2


def test_a_restored_budget_goes_on(tmp_path, clock):
    now, _ = clock
    budget = Budget(student_updates=3, images=40, teacher_passes=500, synthesis_seconds=1.5, distillation_seconds=2.5)
    checkpoints.save(tmp_path / "b", budget.state_dict())
    later = Budget()
    later.load_state_dict(checkpoints.load(tmp_path / "b"))
    assert later == budget and isinstance(later.student_updates, int)
    with later.synthesis(CPU):
        now[0] += 1
    assert later.synthesis_seconds == 2.5
