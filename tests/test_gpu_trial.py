"""The trial of a GPU, at its toy size on the processor: what it leaves behind, and how it ends."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import gpu_trial


@pytest.fixture
def trial(monkeypatch, tmp_path):
    """Run the script in this process; returns its exit status."""
    monkeypatch.setenv("DFKD_CHECKPOINT_SECONDS", "60")
    monkeypatch.setattr(gpu_trial.milliseconds, "__defaults__", (0.0,))

    def run(*arguments: str, minutes: str = "1", methods: tuple[str, ...] = ("dfad",)) -> int:
        command = ["gpu_trial.py", "--device", "cpu", "--minutes", minutes, "--out", str(tmp_path / "trial")]
        monkeypatch.setattr("sys.argv", [*command, *arguments, "--methods", *methods])
        return gpu_trial.main()

    return run


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def test_a_toy_trial_leaves_its_records_and_is_resumed(trial, tmp_path, capsys):
    out = tmp_path / "trial"
    assert trial("--parts", "agreement", "speed", methods=("dfad", "adi")) == 0
    agreement, speed = read(out / "agreement.json"), read(out / "speed.json")
    assert agreement.keys() == {"dfad", "adi"}
    assert all(figure < 1e-6 for figures in agreement.values() for figure in figures.values())
    assert speed.keys() == {"dfad digits", "adi digits"}
    assert all(figures["update, eager"] > 0 for figures in speed.values())

    assert trial("--parts", "teacher", "short") == 2
    assert "trial is not empty; choose another --out, or --resume" in capsys.readouterr().err
    assert not (out / "digits-40").exists()

    assert trial("--parts", "teacher", "short", "--resume") == 0
    metrics = read(out / "digits-40" / "record.json")["metrics"]
    rows = [f"comparison/{row}/accuracy" for row in ("teacher", "KD original", "DFAD")]
    assert all(0 <= metrics[row] <= 1 for row in rows)
    assert metrics["comparison/DFAD/student updates"] == gpu_trial.TOY.short_updates
    for name in ("student-kd", "student-dfad", "images-dfad"):
        assert (out / "digits-40" / f"{name}.safetensors").stat().st_size > 0


def test_the_deadline_ends_a_trial_without_an_error(trial, capsys):
    assert trial(minutes="0.002") == 0
    assert "the time is up; --resume goes on" in capsys.readouterr().out


def test_a_device_that_is_not_there_is_named(trial, capsys):
    assert trial("--device", "cuda:7") == 2
    assert "cuda:7" in capsys.readouterr().err
