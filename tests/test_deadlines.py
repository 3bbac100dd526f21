"""Minutes are kept where a machine slows down after the measurement; the clock is the test's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import settled
from PIL import Image
from torch import Tensor

import dfkd_lib
from dfkd_lib import own_images, planning
from dfkd_lib.deadlines import Deadline, Plan
from dfkd_lib.methods.dfad import DFAD
from dfkd_lib.own_images import OnPictures
from dfkd_lib.training import fit as fitting

TINY: dict[str, Any] = {
    "image_shape": (1, 8, 8), "num_classes": 5, "device": "cpu", "precision": "float32", "progress": False,
    "batch_size": 4, "latent_dim": 4, "ngf": 2,
}  # fmt: skip


class Watch:
    """A clock that stands still but for steps: three seconds each, and `slower` times that from the `late`-th on."""

    def __init__(self) -> None:
        self.now, self.steps, self.late, self.slower = 0.0, 0, 1000, 1.0

    def __call__(self) -> float:
        return self.now

    def tick(self) -> None:
        self.steps += 1
        self.now += 3 * (self.slower if self.steps > self.late else 1)


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Iterator[Watch]:
    clock = Watch()
    for kind in (DFAD, OnPictures):
        usual = kind.step

        def step(self: Any, usual: Any = usual) -> dict[str, Tensor]:
            clock.tick()
            return usual(self)

        monkeypatch.setattr(kind, "step", step)
    monkeypatch.setattr(planning, "clock", clock)
    monkeypatch.setattr(fitting.time, "perf_counter", clock)
    yield clock


def distil(**options: Any) -> dfkd_lib.Distilled:
    return dfkd_lib.distill(settled().eval(), settled(1, width=4), options.pop("method", "dfad"), **TINY | options)


@pytest.mark.parametrize("slower", [1.5, 4.0])
def test_a_machine_that_slows_down_moves_the_end(watch: Watch, slower: float) -> None:
    watch.late, watch.slower = 15, slower
    with pytest.warns(UserWarning, match="slower than measured.* as many as ended in 2 minutes"):
        made = distil(minutes=2, k=2)
    assert 0.85 * 120 <= watch.now <= 1.1 * 120
    assert made.budget.student_updates == 2 * made.fit.moved_to < made.record["parameters"]["settings"]["n_updates"]
    assert any("slower than measured" in line for line in made.record["warnings"])


def test_a_steady_machine_is_left_alone(watch: Watch) -> None:
    made = distil(minutes=1)
    assert made.fit.moved_to == 0 and not any("slower" in line for line in made.record["warnings"])
    assert 0.85 * 60 <= watch.now <= 60


@pytest.mark.parametrize("slower", [0.75, 0.25])
def test_a_machine_that_was_busy_during_the_measurement_is_used_to_the_end(watch: Watch, slower: float) -> None:
    watch.late, watch.slower = 5, slower
    made = distil(minutes=1)
    first = made.record["parameters"]["settings"]["n_updates"]
    assert first < made.budget.student_updates == made.fit.moved_to <= 2 * first and not made.record["warnings"]
    assert watch.now <= 60 and (made.fit.moved_to == 2 * first or watch.now >= 0.85 * 60)


@pytest.mark.parametrize("slower", [3.0, 0.6])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_same_call_reads_a_run_whose_end_was_moved(watch: Watch, tmp_path: Path, slower: float) -> None:
    watch.late, watch.slower = 8, slower
    first = distil(minutes=1, out=tmp_path)
    ended = watch.now
    again = distil(minutes=1, out=tmp_path)
    assert watch.now == ended and again.fit.moved_to == first.fit.moved_to > 0
    assert again.agreement == first.agreement


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_interrupted_run_counts_what_it_has_spent(
    watch: Watch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = fitting._save

    def broken(*args: Any) -> None:
        usual(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(fitting, "_save", broken)
        distil(minutes=2, out=tmp_path)
    watch.late, watch.slower = 0, 2.0
    watch.now += 10_000  # between the calls
    made = distil(minutes=2, out=tmp_path)
    assert 0.8 * 120 <= watch.now - 10_000 <= 1.1 * 120 and made.fit.moved_to > 0


def test_pictures_keep_their_time_too(watch: Watch, tmp_path: Path) -> None:
    for i in range(12):
        Image.new("L", (8, 8), 20 * i).save(tmp_path / f"{i}.png")
    watch.late, watch.slower = 12, 3.0
    with pytest.warns(UserWarning, match="slower than measured"):
        dfkd_lib.distill(settled().eval(), settled(1, width=4), images=tmp_path, minutes=2,
                         **{k: v for k, v in TINY.items() if k not in ("latent_dim", "ngf")})  # fmt: skip
    assert 0.85 * 120 <= watch.now <= 1.1 * 120


class Run:
    def __init__(self) -> None:
        self.settings = own_images.settings_for("mnist", 100, {})


def test_the_schedule_moves_with_the_end() -> None:
    run = Run()

    def settings(n: int) -> own_images.Settings:
        return own_images.settings_for("mnist", n, {})

    watching = Deadline(run, settings, Plan(100, 100.0), 100)
    assert watching(10, 100, 10.0) == 100 and watching(20, 100, 20.0) == 100
    n = watching(30, 100, 60.0)
    assert 30 < n < 100 and run.settings.n_updates == n and run.settings.milestones == (n * 60 // 100, n * 85 // 100)
    for step in range(31, 200):
        n = watching(step, n, 60.0 + (step - 30))
        if step == n:
            break
    assert n < 100 and 60 + n - 30 <= 100, "it ends in time, and comes back to what time allows"
    assert watching(n + 1, n + 1, 200.0) == n + 1, "too late: it ends at once"
