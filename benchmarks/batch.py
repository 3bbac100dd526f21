"""What a batch costs beside its notebooks, and what two workers gain over one.

A point of the benchmark is a notebook of one thread that computes for a fixed number of rounds. Three figures: the
seconds of a point beyond those that its notebook spent computing, with the workers warm; the share of it that is
the kernel's start; and the throughput of two workers over that of one. Run it on an idle machine:
python benchmarks/batch.py [--points 8] [--rounds 30]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

PARAMETERS = """# the benchmark
profile = "smoke"
seed = 0  # [0..] of no account
device = "auto"
precision = "float32"
threads = 0
out = ""
rounds = 30  # [1..] of the same work"""

WORK = """import json, os, time
from pathlib import Path

begun = time.perf_counter()
total = 0
for _ in range(rounds):
    for i in range(1_000_000):
        total += i * i
seconds = time.perf_counter() - begun
record = {
    "schema": 1, "chapter": "busy", "profile": profile, "parameters": {"rounds": rounds}, "seed": seed,
    "seconds": seconds, "metrics": {}, "best": {}, "finished": "2026-01-01T00:00:00+00:00",
}
(Path(os.environ["DFKD_OUT"]) / "record.json").write_text(json.dumps(record))"""


def write_book(book: Path) -> None:
    """A book of one chapter that computes."""

    def cell(source: str, *tags: str) -> dict[str, Any]:
        common: dict[str, Any] = {"metadata": {"tags": list(tags)}, "execution_count": None, "outputs": []}
        return {"cell_type": "code", "id": f"c{len(source)}", "source": source} | common

    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    cells = [cell(PARAMETERS, "parameters"), cell(WORK)]
    notebook = {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}
    (book / "chapters").mkdir(parents=True)
    (book / "chapters" / "busy.ipynb").write_text(json.dumps(notebook))


def measure(folder: Path, workers: int, points: int, rounds: int) -> tuple[float, list[float]]:
    """Points per second once every worker is warm, and the seconds of each point beside its work."""
    from dfkd_lib import records
    from dfkd_lib.reproduction import batch, plans

    plan = folder / f"with{workers}.yml"
    seeds = list(range(points + workers))
    plan.write_text(f"chapters: [busy]\nseeds: {seeds}\nparameters: {{rounds: {rounds}}}\n")
    ends: list[float] = []
    took: dict[str, float] = {}

    def hear(event: dict[str, Any]) -> None:
        if event["event"] == "done":
            ends.append(time.perf_counter())
            took[event["folder"]] = event["seconds"]

    summary = batch.run(plans.read(plan), folder / f"with{workers}", workers=workers, say=hear, show=False)
    assert summary.status == 0, summary
    beside = [seconds - records.read(Path(name))["seconds"] for name, seconds in list(took.items())[workers:]]
    return (len(ends) - workers) / (ends[-1] - ends[workers - 1]), beside


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--points", type=int, default=8, help="measured points for each number of workers")
    parser.add_argument("--rounds", type=int, default=30, help="length of a point: millions of additions")
    given = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_book(folder / "book")
        os.environ["DFKD_BOOK"] = str(folder / "book")
        speeds = {}
        for workers in (1, 2):
            speeds[workers], beside = measure(folder, workers, given.points, given.rounds)
            print(
                f"{workers} worker(s): {60 * speeds[workers]:.1f} points a minute, "
                f"{statistics.median(beside):.2f} s a point beside its work (largest {max(beside):.2f} s)"
            )
        print(f"two workers: {speeds[2] / speeds[1]:.2f} times the throughput of one, {os.cpu_count()} cores")


if __name__ == "__main__":
    main()
