"""Run the points of a plan on Dask.distributed: here with a cluster of local processes, or on one that runs already.

What a point came to is read from its folder, so a batch that was stopped, or that lost workers, goes on where it was.
A point whose worker dies is given to another one, and continues from its checkpoints if that one sees the folder. A
worker that does not share the folder sends what it made with its answer.
"""

from __future__ import annotations

import contextlib
import queue
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .. import records
from ..errors import DFKDError
from ..files import lock, read_json, replace_file, write_json
from ..training.progress import clock
from . import plans, runs
from .board import Board, Row, Say
from .cluster import connect, threads_for
from .plans import FAILED, Plan
from .workers import TOPIC, Task, run_point


@dataclass
class Summary:
    """What a batch came to.

    Attributes:
        before: how many of the finished points were finished before this batch.
        failed: (name, folder, error) of each point that failed, now or before.
        not_run: the same of points that could not be started; the next batch starts them.
    """

    finished: int = 0
    before: int = 0
    seconds: float = 0.0
    failed: list[tuple[str, str, str]] = field(default_factory=list)
    not_run: list[tuple[str, str, str]] = field(default_factory=list)
    refused: list[tuple[str, str]] = field(default_factory=list)

    @property
    def status(self) -> int:
        """Exit status: 1 if a point failed or could not be started, 2 if one was refused, else 0."""
        return 1 if self.failed or self.not_run else 2 if self.refused else 0


def run(
    plan: Plan,
    out: Path,
    *,
    workers: int = 2,
    scheduler: str | None = None,
    retry_failed: bool = False,
    say: Say | None = None,
    show: bool = True,
    verbose: bool = False,
) -> Summary:
    """Execute what is missing of a plan, and return once every point is finished or failed.

    Args:
        out: holds a folder for each point.
        workers: local processes; the cores are divided among them. Of no account with a scheduler.
        scheduler: address of a running Dask scheduler.
        retry_failed: run points again that failed in an earlier batch; they continue from their checkpoints.
        say: is told each event.
        show: print the live table, or one line per finished point, to stderr.
        verbose: print tracebacks of failures too.

    Raises:
        InputError: there is no such scheduler, or a worker of it runs several tasks at a time.
        DFKDError: another batch is at work in `out`, or the scheduler went away.
        KeyboardInterrupt: everything was stopped; the same call continues.
    """
    out = out.resolve()
    begun = time.monotonic()
    summary = Summary(refused=plan.refused)
    with lock(out / ".batch.lock", timeout=0, what=f"batch folder {out}"):
        rows = {}
        for point in plan.points:
            folder = out / point.name
            stands = plans.state(folder)
            if stands == "finished":
                summary.before += 1
            elif stands == "failed" and not retry_failed:
                summary.failed.append((point.name, str(folder), _kept_error(folder)))
            else:
                rows[point.name] = Row(point, folder)
        try:
            if rows:
                _execute(
                    rows,
                    plan,
                    workers,
                    scheduler,
                    Board(rows, summary.before, show, verbose, say or (lambda event: None)),
                )
        finally:
            summary.finished = summary.before + sum(row.now == "done" for row in rows.values())
            summary.failed += [(name, str(r.folder), r.note) for name, r in rows.items() if r.now == "failed"]
            summary.not_run = [(name, str(r.folder), r.note) for name, r in rows.items() if r.now == "not run"]
            summary.seconds = time.monotonic() - begun
            write_json(out / "batch.json", {"plan": plan.name, "when": records.now(), **asdict(summary)})
    return summary


def _execute(rows: dict[str, Row], plan: Plan, workers: int, scheduler: str | None, board: Board) -> None:
    happened: queue.SimpleQueue[Any] = queue.SimpleQueue()
    with connect(scheduler, min(workers, len(rows)), plan.gpus) as client:
        threads = 0 if scheduler else threads_for(min(workers, len(rows)))
        client.subscribe_topic(TOPIC, happened.put)
        for row in rows.values():
            if not (row.folder / "run.json").is_file():
                runs.begin(row.folder, row.point.chapter, row.point.given, row.point.command)
            (row.folder / FAILED).unlink(missing_ok=True)
        futures = {}
        for name, row in rows.items():
            task = Task(row.point, str(row.folder), threads, plan.gpus)
            futures[name] = client.submit(
                run_point,
                task,
                key=f"{name}-{time.time_ns()}",
                pure=False,
                resources={"GPU": plan.gpus} if plan.gpus else None,
            )
            futures[name].add_done_callback(lambda future, name=name: happened.put((name, future)))
        try:
            with board:
                while any(row.now in ("waiting", "running") for row in rows.values()):
                    with contextlib.suppress(queue.Empty):
                        _take(happened.get(timeout=0.5), rows, board)
                    board.draw()
        except BaseException:  # the workers of a scheduler would go on otherwise
            with contextlib.suppress(Exception):
                client.cancel(list(futures.values()), force=True)
                time.sleep(0.2)
            raise


def _take(item: Any, rows: dict[str, Row], board: Board) -> None:
    """Take note of something that happened: what a worker says, or the end of a point."""
    if isinstance(item[0], str):
        name, future = item
        row = rows[name]
        if future.status == "cancelled":
            raise DFKDError("the scheduler is gone; the same command continues the batch")
        outcome = future.result() if future.status == "finished" else _lost(row, future.exception())
        future.release()
        _bring_in(row, outcome)
        if not outcome["error"] and plans.state(row.folder) != "finished":
            outcome |= {"kind": "not run", "error": f"{row.worker} said that it finished, and left nothing here"}
        row.now, row.note = (
            (outcome["kind"], outcome["error"]) if outcome["error"] else ("done", clock(outcome["seconds"]))
        )
        board.ended(row, outcome)
    elif (event := item[1])["name"] in rows:
        row = rows[event["name"]]
        if event["event"] == "begin":
            row.starts += 1
            row.now, row.since, row.worker = "running", time.monotonic(), event["by"]
            row.note = "rerun after a lost worker" if row.starts > 1 else ""
            board.say({"event": "running", "point": row.point.name, "worker": row.worker, "start": row.starts})
        elif row.now == "running":
            row.note = event["text"]


def _lost(row: Row, error: BaseException | None) -> dict[str, Any]:
    """What to say of a point that no worker survived, or that could not be handed to one."""
    about = " ".join(str(error).split())
    killed = type(error).__name__ == "KilledWorker"
    text = f"every worker died that ran it, {row.starts} in all: out of memory?" if killed else about
    return {"error": text, "kind": "failed", "traceback": about, "seconds": 0.0, "files": {}}


def _bring_in(row: Row, outcome: dict[str, Any]) -> None:
    """Write what a worker sent, and what went wrong, into the point's folder."""
    for name, content in outcome["files"].items():
        with replace_file(row.folder / name) as temporary:
            temporary.write_bytes(content)
    if outcome["error"] and outcome["kind"] == "failed":
        facts = {key: outcome[key] for key in ("error", "traceback")}
        write_json(row.folder / FAILED, facts | {"when": records.now(), "worker": row.worker})


def _kept_error(folder: Path) -> str:
    return str(read_json(folder / FAILED, {"error": str})["error"])
