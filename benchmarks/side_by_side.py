"""Rows of the comparison side by side on one GPU: python -m benchmarks.side_by_side --minutes 9 --out runs/rows

Every row of every seed is a process of its own, a `gpu_trial`, and so many of them run at a time. Rows of one seed end
in one record, `OUT/DATASET-UPDATES-seedS`. It holds no seconds: a row's time beside others is no time of its method.
`--resume` goes on with what is not finished.

Recorded updates leave a GPU little idle time, so expect no more rows an hour than one after the other gives, but first
curves of all of them at once. Under NVIDIA's MPS daemon do not stop a single process: its end is the end of all.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.gpu_trial import LABELS
from dfkd_lib import records
from dfkd_lib.errors import DFKDError
from dfkd_lib.files import write_text
from dfkd_lib.reproduction.cluster import cores

ON_DATA = "kd"
ROWS = [ON_DATA, *LABELS]
PATIENCE = 20.0  # seconds for a row to end by itself after the deadline


def command_of(row: str, seed: int, folder: Path, minutes: float, more: list[str]) -> list[str]:
    """The process of one row."""
    part = ON_DATA if row == ON_DATA else "short"
    methods = [] if row == ON_DATA else ["--methods", row]
    return [
        sys.executable, "-m", "benchmarks.gpu_trial", "--parts", part, *methods, "--seed", str(seed), "--shared",
        "--resume", "--minutes", f"{minutes:.2f}", "--out", str(folder), *more,
    ]  # fmt: skip


def run(jobs: Iterable[tuple[str, int]], out: Path, processes: int, deadline: float, more: list[str]) -> None:
    """Every (row, seed) in its turn, `processes` at a time, each with a log beside its folder."""
    waiting, running = list(jobs), dict[subprocess.Popen[bytes], str]()
    try:
        while waiting or running:
            left = deadline - time.perf_counter()
            for process in [p for p in running if p.poll() is not None]:
                print(f"[{left:4.0f} s left] {running.pop(process)}: status {process.returncode}", flush=True)
            if left < -PATIENCE:
                break
            while waiting and len(running) < processes and left > 0:
                row, seed = waiting.pop(0)
                folder = out / "rows" / f"seed{seed}" / row
                folder.mkdir(parents=True, exist_ok=True)
                with open(folder.with_suffix(".log"), "ab") as log:
                    process = subprocess.Popen(
                        command_of(row, seed, folder, left / 60, more), stdout=log, stderr=subprocess.STDOUT
                    )
                running[process] = f"seed {seed}, {row}"
            if left <= 0:
                waiting.clear()
            time.sleep(0.2)
    finally:
        for process in running:
            process.kill()


def gather(out: Path) -> list[Path]:
    """One record of the rows of each seed, from their own; returns the folders."""
    found: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(out.glob("rows/seed*/*/*/record.json")):
        record = records.read(path.parent)
        if any(key.endswith("/accuracy") and "/teacher/" not in key for key in record["metrics"]):
            found.setdefault(f"{record['run']}-{path.parts[-4]}", []).append(record)
    return [_merged(out / name, rows) for name, rows in found.items()]


def _merged(folder: Path, rows: list[dict[str, Any]]) -> Path:
    rows.sort(key=lambda r: ROWS.index(Path(r["folder"]).parent.name))
    methods = [name for r in rows if (name := Path(r["folder"]).parent.name) != ON_DATA]
    for r in rows[1:]:
        for key in ("code", "packages", "hardware"):
            if r[key] != rows[0][key]:
                raise DFKDError(f"{r['folder']} differs from {rows[0]['folder']} in {key}; delete one and run it again")
    history = pd.concat([pd.read_csv(Path(r["folder"]) / "history.csv") for r in rows])
    first = {key: value for key, value in rows[0].items() if key not in ("run", "folder")}
    records.write(
        folder,
        first
        | {
            "parameters": first["parameters"] | {"methods": methods},
            "command": "python -m benchmarks.side_by_side",
            "data": _distinct(entry for r in rows for entry in r["data"]),
            "teachers": _distinct(facts for r in rows for facts in r["teachers"]),
            "runtime": f"{first['runtime']}, rows side by side",
            "seconds": round(sum(r["seconds"] for r in rows), 1),
            "resumed": {key: value for r in rows for key, value in r["resumed"].items()},
            "metrics": {key: value for r in rows for key, value in r["metrics"].items()},
            "best": {key: value for r in rows for key, value in r["best"].items()},
            "finished": max(r["finished"] for r in rows),
        },
    )
    write_text(folder / "history.csv", history.to_csv(index=False, float_format="%.6g", lineterminator="\n"))
    return folder


def _distinct(entries: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for entry in entries:
        if entry not in found:
            found.append(entry)
    return found


def main() -> int:
    """Parse the command line and run the rows; 0 also when the deadline ended it, 2 for what cannot be asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--processes", type=int, default=max(1, min(4, cores() - 1)))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--rows", nargs="+", default=ROWS, choices=ROWS)
    parser.add_argument("--updates", type=int, default=0, help="of the student; 0: a tenth of the published")
    parser.add_argument("--out", type=Path, default=Path("runs/rows"))
    parser.add_argument("--resume", action="store_true", help="go on in a folder that holds earlier rows")
    args = parser.parse_args()
    deadline = time.perf_counter() + 60 * args.minutes
    if args.processes < 1:
        parser.error(f"--processes must be at least 1, not {args.processes}")
    if args.out.is_dir() and any(args.out.iterdir()) and not args.resume:
        print(f"{args.out} is not empty; choose another --out, or --resume", file=sys.stderr)
        return 2
    more = ["--device", args.device, "--updates", str(args.updates)]
    try:
        run([(row, seed) for seed in args.seeds for row in args.rows], args.out, args.processes, deadline, more)
        for folder in gather(args.out):
            metrics = records.read(folder)["metrics"]
            for key, value in metrics.items():
                if key.endswith("/accuracy"):
                    print(f"{folder.name} {key.split('/')[1]}: {value}")
    except DFKDError as e:
        print(f"side_by_side: error: {e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
