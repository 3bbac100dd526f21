"""Chapters without Jupyter: the same record as the notebook gives, one line when a cell fails, resumable."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dfkd_lib import records
from dfkd_lib.reproduction import runs
from dfkd_lib.reproduction.cli import main

JUPYTER = ["IPython", "ipykernel", "jupyter_client", "jupyter_core", "nbformat", "nbclient", "papermill"]

pytestmark = pytest.mark.usefixtures("here")


def dfkd(command: str) -> int:
    return main(command.split())


def without_jupyter(command: str) -> subprocess.Popen[str]:
    """Start a command in a process that cannot import anything of Jupyter."""
    code = (
        f"import sys\nfor name in {JUPYTER!r}: sys.modules[name] = None\n"
        f"from dfkd_lib.reproduction.cli import main\nsys.exit(main({command.split()!r}))"
    )
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-c", code], text=True, **pipes)


def test_the_record_is_that_of_the_notebook(capsys: pytest.CaptureFixture[str]) -> None:
    options = "run tiny --profile cpu --seed 3 -p lr 0.125"
    assert dfkd(f"{options} --out notebook") == dfkd(f"{options} --out plain --plain") == 0
    capsys.readouterr()
    for key in ("metrics", "best", "parameters", "seed", "profile"):
        assert records.read(Path("plain"))[key] == records.read(Path("notebook"))[key]
    assert not Path("plain/notebook.ipynb").exists() and Path("plain/output.txt").read_text() == "steps 5\n"
    ours, other = (json.loads(Path(name, "run.json").read_text()) for name in ("plain", "notebook"))
    assert ours.pop("plain") is True and ours.pop("command") and other.pop("command") and ours == other

    assert dfkd("run tiny --resume plain") == 0
    out, err = capsys.readouterr()
    assert "is finished" in err and "toy/DFAD/accuracy  0.125" in out


def test_what_is_printed_and_the_process_afterwards(capsys: pytest.CaptureFixture[str]) -> None:
    before = os.getcwd(), dict(os.environ), sys.stdout
    assert dfkd("run tiny --plain --out a") == 0
    out, err = capsys.readouterr()
    assert out.startswith("steps 3\n") and "kept in" in out
    assert err == "toy: done after 3 steps, 0:00, accuracy 0.5\n"
    assert dfkd("run tiny --plain --json --out b") == 0
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [e["event"] for e in events] == ["start", "progress", "progress", "progress", "done", "finished"]
    assert dfkd("run tiny --plain --quiet --out c") == 0
    assert "steps" not in capsys.readouterr().out and Path("c/output.txt").read_text() == "steps 3\n"
    assert (os.getcwd(), dict(os.environ), sys.stdout) == before


@pytest.mark.parametrize(
    ("mode", "status", "message"),
    [
        ("fail", 1, "tiny failed in code cell 4: ValueError: the toy broke (see "),
        ("refuse", 2, "tiny failed in code cell 4: InputError: no such dataset (see "),
        ("nothing", 1, "left no record.json"),
    ],
)
def test_a_failing_cell_is_one_line_and_its_traceback_is_kept(
    capsys: pytest.CaptureFixture[str], mode: str, status: int, message: str
) -> None:
    assert dfkd(f"run tiny --plain --quiet --out a -p mode {mode}") == status
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and message in err and "output.partial.txt" in err
    kept = Path("a/output.partial.txt").read_text()
    assert mode == "nothing" or ("Traceback" in kept and "raise " in kept and "<tiny cell 4>" in kept)
    assert not Path("a/output.txt").exists() and not runs.is_finished(Path("a"))


def test_a_refused_run_that_trained_nothing_leaves_its_folder_free(capsys: pytest.CaptureFixture[str]) -> None:
    refused, corrected = "run tiny --plain --quiet -p mode refuse", "run tiny --plain --quiet -p lr 0.25"
    assert dfkd(refused) == 2
    assert dfkd(corrected) == 0
    assert records.read(Path("runs/tiny-smoke-seed0"))["metrics"]["toy/DFAD/accuracy"] == 0.25

    runs.begin(Path("a"), "tiny", {"profile": "smoke", "mode": "refuse"}, "dfkd run tiny", plain=True)
    Path("a/checkpoints").mkdir()
    assert dfkd("run tiny --quiet --resume a") == 2
    capsys.readouterr()
    assert dfkd(f"{corrected} --out a") == 2
    assert "holds an unfinished run; continue it with --resume" in capsys.readouterr().err


@pytest.mark.skipif(os.name == "nt", reason="signals differ")
def test_without_jupyter_a_run_can_be_interrupted_and_resumed(here: Path) -> None:
    with without_jupyter("run tiny --plain --out a -p mode wait") as process:
        while not (here / "a" / "done.txt").exists():
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, err = process.communicate()
    assert process.returncode == 130
    assert err == f"dfkd: interrupted; continue with: dfkd run tiny --resume {here / 'a'}\n"
    (here / "a" / "go").touch()
    with without_jupyter("run tiny --resume a") as process:  # it stays plain
        out, err = process.communicate()
    assert process.returncode == 0, err
    assert "toy/resumed/value  1" in out and runs.is_finished(here / "a")


def test_a_run_begun_as_a_notebook_can_go_on_without_jupyter(capsys: pytest.CaptureFixture[str]) -> None:
    runs.begin(Path("a"), "tiny", {"profile": "smoke"}, "dfkd run tiny")
    assert dfkd("run tiny --resume a --plain") == 0
    assert runs.is_finished(Path("a"))
