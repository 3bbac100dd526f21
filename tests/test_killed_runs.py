"""A run of the real chapter, killed at any moment, leaves whole files only and resumes to the same figures."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

from dfkd_lib import records
from dfkd_lib.training import checkpoints

COMMAND = [sys.executable, "-m", "dfkd_lib", "run", "dfad"]
VALUES = {"parts": '["comparison"]', "n_steps": "10", "teacher_epochs": "1", "scratch_epochs": "1"}
SHORT = [word for pair in VALUES.items() for word in ("-p", *pair)]
KILLS = int(os.environ.get("DFKD_TEST_KILLS", "1"))


def start(*words: str) -> subprocess.Popen[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DFKD_CHECKPOINT_SECONDS": "0"}
    return subprocess.Popen([*COMMAND, *words], env=environment, stderr=subprocess.PIPE, text=True)


def finish(*words: str) -> None:
    process = start(*words)
    _, err = process.communicate()
    assert process.returncode == 0, err


def assert_only_whole_files(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.suffix in (".json", ".ipynb"):
            json.loads(path.read_text())
        elif path.suffix == ".safetensors":
            checkpoints.load(path)


def test_kill_and_resume(tmp_path):
    whole = tmp_path / "whole"
    begun = time.monotonic()
    finish(*SHORT, "--out", str(whole))
    duration = time.monotonic() - begun
    expected = records.read(whole)
    draw = random.Random(0)
    for i in range(KILLS):
        killed = tmp_path / f"killed-{i}"
        process = start(*SHORT, "--out", str(killed))
        while not (killed / "run.json").exists():
            assert process.poll() is None
            time.sleep(0.05)
        time.sleep(draw.uniform(0.1, 0.8) * duration)
        process.kill()
        process.communicate()
        assert_only_whole_files(killed)
        finish("--resume", str(killed))
        resumed = records.read(killed)
        assert (resumed["metrics"], resumed["best"]) == (expected["metrics"], expected["best"])
