"""A book of one chapter that runs in a second: it imports no torch, and can be told to fail, to die or to wait."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dfkd_lib.reproduction.cli import main
from dfkd_lib.reproduction.notebooks import setup_cell

PARAMETERS = """# a second
profile = "smoke"
seed = 0  # [0..] every random stream follows from it
device = "auto"
precision = "float32"  # {auto|float32}
threads = 0  # [0..] CPU threads
out = ""
lr = 0.5  # (0..1] learning rate
n_steps = 3  # [1..100] steps
sizes = [1, 2]  # [1..] of something
mode = "work"  # {work|fail|refuse|die|wait|nothing} what this run shall do
anything = None"""

WORK = """import json, os, sys, time
from pathlib import Path

folder = Path(os.environ.get("DFKD_OUT", "") or out or ".")

def emit(**event):
    if "DFKD_EVENTS" in os.environ:
        with open(os.environ["DFKD_EVENTS"], "a") as f:
            f.write(json.dumps(event) + "\\n")

done = folder / "done.txt"
first = int(done.read_text()) if done.exists() else 0
emit(event="start", fit="toy", step=first, n_steps=n_steps)
for step in range(first + 1, n_steps + 1):
    if "DFKD_OUT" in os.environ:  # whole from the moment it is there: tests wait for it
        done.with_suffix(".new").write_text(str(step))
        os.replace(done.with_suffix(".new"), done)
    emit(event="progress", fit="toy", step=step, n_steps=n_steps, seconds=0.1, eta=0.1, metrics={"accuracy": 0.5})
    if mode == "wait" and not (folder / "go").exists():
        time.sleep(60)
emit(event="done", fit="toy", step=n_steps, n_steps=n_steps, seconds=0.2, metrics={"accuracy": lr})
print("steps", n_steps)"""

TROUBLE = """if mode == "fail":
    raise ValueError("the toy broke\\nsecond line")
if mode == "refuse":
    from dfkd_lib.errors import InputError
    raise InputError("no such dataset")
if mode == "die":
    os._exit(1)"""

RECORD = """record = {
    "schema": 1, "chapter": "tiny", "profile": profile, "parameters": {"lr": lr, "n_steps": n_steps}, "seed": seed,
    "seconds": 1.0, "metrics": {"toy/DFAD/accuracy": lr, "toy/resumed/value": first},
    "best": {"toy/DFAD/accuracy": lr}, "finished": "2026-01-01T00:00:00+00:00",
    "threads": os.environ.get("OMP_NUM_THREADS"),
}
if "DFKD_OUT" in os.environ and mode != "nothing":
    (folder / "record.json").write_text(json.dumps(record))"""


def cell(source: str, *tags: str, number: int) -> dict[str, object]:
    return {
        "cell_type": "code",
        "id": f"cell-{number}",
        "metadata": {"tags": list(tags)} if tags else {},
        "execution_count": number,
        "outputs": [],
        "source": source,
    }


def notebook() -> dict[str, object]:
    """The tiny chapter as JSON, stored as if it had run."""
    title = {"cell_type": "markdown", "id": "title", "metadata": {}, "source": "# A tiny chapter\n\nIt does nothing."}
    return {
        "cells": [
            title,
            cell(setup_cell(), "remove-input", "setup", number=1),
            cell(PARAMETERS, "parameters", number=2),
            cell(WORK, number=3),
            cell(TROUBLE, number=4),
            cell(RECORD, number=5),
        ],
        "metadata": {
            "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        },
        "nbformat": 4,
        "nbformat_minor": 5,
    }


def write(book: Path) -> Path:
    """Write the chapter `tiny` and its profile `cpu` into a book folder; returns the notebook's path."""
    path = book / "chapters" / "tiny.ipynb"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(notebook(), indent=1, sort_keys=True) + "\n")
    (book / "profiles" / "tiny").mkdir(parents=True)
    (book / "profiles" / "tiny" / "cpu.yml").write_text("# two seconds\nlr: 0.25\nn_steps: 5\n")
    return path


def refused(capsys: pytest.CaptureFixture[str], *words: str, status: int = 2) -> str:
    """Run a command that must fail with one short line on stderr and nothing on stdout; returns the line."""
    assert main(words) == status
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("dfkd: error: ") and err.count("\n") == 1 and len(err) < 600
    assert "fault of this program" not in err
    return err
