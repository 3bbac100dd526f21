"""The trial of a GPU, at its toy size on the processor: what it leaves behind, and how it ends."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import gpu_checks, gpu_trial, side_by_side
from dfkd_lib import records
from dfkd_lib.errors import DFKDError
from dfkd_lib.locations import repository_root


@pytest.fixture
def trial(monkeypatch, tmp_path):
    """Run the script in this process; returns its exit status."""
    monkeypatch.setenv("DFKD_CHECKPOINT_SECONDS", "60")
    monkeypatch.setattr(gpu_checks.milliseconds, "__defaults__", (0.0,))

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

    assert trial("--parts", "kd", "short") == 2
    assert "trial is not empty; choose another --out, or --resume" in capsys.readouterr().err
    assert not (out / "digits-40").exists()

    assert trial("--parts", "kd", "short", "--resume") == 0
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


def row(folder: Path, name: str, accuracy: float, **changed) -> None:
    """What one process leaves of one row."""
    label = {"kd": "KD original"}.get(name, gpu_trial.LABELS.get(name))
    own = folder / "rows" / "seed3" / name / "digits-40"
    own.mkdir(parents=True)
    (own / "history.csv").write_text(f"fit,step,accuracy\ncomparison/{label},40,{accuracy}\n")
    record = {
        "chapter": "comparison", "profile": "cpu", "parameters": {"methods": [name], "n_updates": 40}, "seed": 3,
        "command": "", "code": {"source": "a"}, "packages": {}, "hardware": {"name": "here"}, "runtime": "cpu",
        "data": [{"name": "digits", "split": "test", "fingerprint": "f"}], "teachers": [{"model": "m"}],
        "seconds": 1.0, "resumed": {}, "best": {}, "finished": "2026-01-01T00:00:00+00:00",
        "metrics": {"comparison/teacher/accuracy": 0.9, f"comparison/{label}/accuracy": accuracy},
    }  # fmt: skip
    records.write(own, record | changed)


def test_rows_of_one_seed_become_one_record(tmp_path):
    row(tmp_path, "dfad", 0.5)
    row(tmp_path, "kd", 0.8)
    row(tmp_path, "fast", 0.7)
    (folder,) = side_by_side.gather(tmp_path)
    found = records.read(folder)
    assert found["run"] == "digits-40-seed3"
    assert found["parameters"]["methods"] == ["fast", "dfad"], "in the order of the table"
    assert list(found["metrics"].items()) == [
        ("comparison/teacher/accuracy", 0.9), ("comparison/KD original/accuracy", 0.8),
        ("comparison/Fast-5/accuracy", 0.7), ("comparison/DFAD/accuracy", 0.5),
    ]  # fmt: skip
    assert found["seconds"] == 3 and found["teachers"] == [{"model": "m"}] and len(found["data"]) == 1
    assert "side by side" in found["runtime"]
    history = (folder / "history.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in history[1:]] == [
        f"comparison/{r}" for r in ("KD original", "Fast-5", "DFAD")
    ]


def test_rows_of_different_code_are_not_gathered(tmp_path):
    row(tmp_path, "dfad", 0.5)
    row(tmp_path, "kd", 0.8, code={"source": "b"})
    with pytest.raises(DFKDError, match=r"kd.* in code; delete one and run it again"):
        side_by_side.gather(tmp_path)


def test_a_row_is_a_trial_of_its_own_that_notes_no_seconds(tmp_path, monkeypatch):
    monkeypatch.chdir(repository_root())
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    out = tmp_path / "rows"
    arguments = ["--device", "cpu", "--minutes", "3", "--processes", "1", "--rows", "dfad", "--out", str(out)]
    monkeypatch.setattr("sys.argv", ["side_by_side", *arguments])
    assert side_by_side.main() == 0
    metrics = records.read(out / "digits-40-seed0")["metrics"]
    assert 0 <= metrics["comparison/DFAD/accuracy"] <= 1
    assert metrics["comparison/DFAD/student updates"] == gpu_trial.TOY.short_updates
    assert not any("seconds" in key for key in metrics)
    assert side_by_side.main() == 2, "the folder is not empty"
