"""Run the points of a plan on Dask.distributed: here with a cluster of local processes, or on one that runs already.

Each point is one papermill execution: a kernel of its own, driven by a worker process, in a folder of its own. What
a point came to is read from its folder, so a batch that was stopped, or that lost workers, goes on where it was. A
point whose worker dies is given to another one, and continues from its checkpoints if that one sees the folder. A
worker that does not share the folder sends what it made with its answer.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import shutil
import signal
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from .. import records
from ..errors import DFKDError, InputError
from ..files import lock, replace_file, write_json
from ..locations import cache_root, code_fingerprint
from ..training.progress import clock
from . import plans, runs
from .plans import FAILED, Plan, Point

Now = Literal["waiting", "running", "done", "failed", "not run"]
Say = Callable[[dict[str, Any]], None]

PATIENCE = 30.0  # seconds: the kernel of a dead worker outlives it for a moment
KEPT = 50 * 2**20  # bytes: the largest file that a worker without the shared folder sends back
_TOPIC = "dfkd"
_COLOURS = {"running": "36", "done": "32", "failed": "31", "not run": "31"}
_one_at_a_time = threading.Lock()  # papermill changes the folder of its process


@dataclass(frozen=True)
class Task:
    """What a worker is handed.

    Attributes:
        threads: of the kernel; 0 leaves it to the worker's environment.
        gpus: that the point needs; a local worker takes them by its number.
    """

    point: Point
    folder: str
    threads: int
    gpus: int


@dataclass
class Row:
    """One point as the table shows it."""

    point: Point
    folder: Path
    now: Now = "waiting"
    note: str = ""
    since: float = 0.0
    worker: str = ""
    starts: int = 0


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
                    rows, plan, workers, scheduler, _Board(rows, summary, show, verbose, say or (lambda event: None))
                )
        finally:
            summary.finished = summary.before + sum(row.now == "done" for row in rows.values())
            summary.failed += [(name, str(r.folder), r.note) for name, r in rows.items() if r.now == "failed"]
            summary.not_run = [(name, str(r.folder), r.note) for name, r in rows.items() if r.now == "not run"]
            summary.seconds = time.monotonic() - begun
            write_json(out / "batch.json", {"plan": plan.name, "when": records.now(), **asdict(summary)})
    return summary


def _execute(rows: dict[str, Row], plan: Plan, workers: int, scheduler: str | None, board: _Board) -> None:
    happened: queue.SimpleQueue[Any] = queue.SimpleQueue()
    with _client(scheduler, min(workers, len(rows)), plan.gpus) as client:
        threads = 0 if scheduler else _threads(min(workers, len(rows)))
        client.subscribe_topic(_TOPIC, happened.put)
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


def _take(item: Any, rows: dict[str, Row], board: _Board) -> None:
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
    from ..files import read_json

    return str(read_json(folder / FAILED).get("error", "unknown"))


# On the worker


def run_point(task: Task) -> dict[str, Any]:
    """Execute one point in this process' folder for it; returns "seconds", "error", "traceback" and "files".

    The answer of a failure is an answer too: "kind" says whether running it again as it is could help.
    """
    from distributed import Reschedule, get_worker

    worker = get_worker()
    key = worker.get_current_task()
    name, start = task.point.name, time.perf_counter()
    outcome: dict[str, Any] = {"error": "", "kind": "", "traceback": "", "files": {}, "seconds": 0.0}
    folder = Path(task.folder)
    shared = (folder / "run.json").is_file()  # the batch wrote it
    if not shared:
        folder = cache_root() / "batch" / name

    def tell(event: str, text: str = "") -> None:
        worker.log_event(_TOPIC, {"event": event, "name": name, "text": text, "by": str(worker.name)})

    def wanted() -> bool:
        known = worker.state.tasks.get(key)
        leaving = worker.status.name in ("closing", "closing_gracefully", "closed", "failed")  # at its lifetime's end
        return known is not None and known.state != "cancelled" and not leaving

    with _one_at_a_time:
        try:
            tell("begin")
            _run_in(folder, task, _environment(task, worker.name), lambda text: tell("progress", text), wanted)
        except _NotNow as e:
            outcome |= {"error": str(e), "kind": "not run"}
        except Exception as e:
            if not wanted():
                raise Reschedule from e  # not the point's fault: whoever wants it gets it elsewhere
            outcome |= {"error": _one_line(e), "kind": "failed", "traceback": _traceback(e)}
    outcome["seconds"] = time.perf_counter() - start
    if not outcome["error"]:
        write_json(folder / "batch.json", {"seconds": outcome["seconds"], "worker": str(worker.name)})
    if not shared and folder.is_dir():
        small = [path for path in folder.iterdir() if path.is_file() and path.stat().st_size <= KEPT]
        outcome["files"] = {path.name: path.read_bytes() for path in small if not path.name.startswith(".")}
    return outcome


class _NotNow(DFKDError):
    """A point was not started: its folder is in use, or the code is not that which the batch was laid out for."""


def _run_in(
    folder: Path, task: Task, environment: dict[str, str], tell: Callable[[str], None], wanted: Callable[[], bool]
) -> None:
    from .notebooks import execute

    point = task.point
    code_fingerprint.cache_clear()  # the worker lives longer than an edit of the library takes
    here = runs.made_of(point.chapter)
    if here != point.made_of:
        what = "chapter" if here["notebook"] != point.made_of["notebook"] else "library"
        raise _NotNow(f"the {what} on the worker is another version than the batch began with; start the batch again")
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(lock(folder / runs.LOCK, timeout=PATIENCE, what=f"run folder {folder}"))
        except DFKDError as e:
            raise _NotNow(str(e)) from e
        if runs.is_finished(folder):
            return
        if not (folder / "run.json").is_file():
            runs.begin(folder, point.chapter, point.given, point.command)
        events = folder / "events.jsonl"
        with _Forward(events, tell, wanted):
            variables = {"DFKD_EVENTS": str(events), "DFKD_COMMAND": point.command, **environment}
            execute(point.chapter, folder, point.given, environment=variables)


class _Forward(runs.Follow):
    """Passes on where a chapter is, twice a second at most, and ends its kernel when nobody waits for it any more."""

    def __init__(self, events: Path, tell: Callable[[str], None], wanted: Callable[[], bool]) -> None:
        super().__init__(events)
        self.live = False
        self.tell, self.wanted, self.latest = tell, wanted, ""

    def _work(self) -> None:
        while not self._end.wait(0.5):
            self._drain()
            if self.latest:
                self.tell(self.latest)
                self.latest = ""
            if not self.wanted():
                end_kernels()

    def _show(self, line: str) -> None:
        event = json.loads(line)
        if event["event"] == "progress":
            self.latest = f"{event['fit']} {event['step']}/{event['n_steps']}, {clock(event['eta'])} left"
        elif event["event"] == "done":
            self.latest = f"{event['fit']} done"


def dask_setup(worker: Any) -> None:
    """What Dask calls in each worker of ours: Ctrl-C is for the process that drives, which then ends the workers."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def end_kernels() -> None:
    """Kill the processes that this worker started: the kernel of its point."""
    import psutil

    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            child.kill()


def _environment(task: Task, worker: Any) -> dict[str, str]:
    chosen = {"OMP_NUM_THREADS": str(task.threads)} if task.threads else {}
    if task.gpus and type(worker) is int:  # a worker of ours; others were started with their devices
        mine = visible_gpus()[worker * task.gpus : (worker + 1) * task.gpus]
        chosen["CUDA_VISIBLE_DEVICES"] = ",".join(mine)
    return chosen


def visible_gpus() -> list[str]:
    """Names of the GPUs as CUDA_VISIBLE_DEVICES takes them, found without torch."""
    import subprocess

    if (chosen := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for name in chosen.split(",") if name]
    if not (program := shutil.which("nvidia-smi")):
        return []
    listed = subprocess.run([program, "-L"], capture_output=True, text=True).stdout.splitlines()
    return [str(i) for i in range(sum(line.startswith("GPU ") for line in listed))]


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _traceback(error: BaseException) -> str:
    """The traceback inside the notebook where there is one, else the worker's own; without colours."""
    inside = getattr(error.__cause__, "traceback", None)
    text = "\n".join(inside) if isinstance(inside, list) else "".join(traceback.format_exception(error))
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


# On the machine that drives


def _threads(workers: int) -> int:
    """Threads for each kernel: the environment's choice, or an even share of the cores."""
    chosen = os.environ.get("OMP_NUM_THREADS", "")
    return int(chosen) if chosen.isdigit() else max(1, cores() // workers)


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def _client(scheduler: str | None, workers: int, gpus: int) -> Iterator[Any]:
    """A client of the scheduler at an address, or of workers of our own that end with it."""
    try:
        import dask
        from distributed import Client, LocalCluster
    except ImportError as e:
        raise DFKDError(f"a batch needs Dask ({e}): pip install 'dfkd-lib[batch]'") from e
    import logging

    if scheduler:
        try:
            client = Client(scheduler, timeout=10, set_as_default=False)
        except (OSError, TimeoutError, ValueError) as e:
            raise InputError(
                f"no Dask scheduler answers at {scheduler} ({type(e).__name__}); start one or correct it"
            ) from e
        with client:
            _check_workers(client.scheduler_info(n_workers=-1)["workers"])
            yield client
        return
    resources = None
    if gpus:
        here = len(visible_gpus()) // gpus
        if not here:
            raise InputError(f"the plan needs {gpus} GPU(s) for a point and this machine has none; see --scheduler")
        workers, resources = min(workers, here), {"GPU": gpus}
    # With a saturation of 1 a worker holds no point but the one it runs: no other is blamed for its death.
    settings = {"distributed.scheduler.worker-saturation": 1.0}
    with (
        dask.config.set(settings),
        LocalCluster(
            n_workers=workers,
            threads_per_worker=1,
            memory_limit=0,  # the kernels are processes of their own
            dashboard_address=None,
            silence_logs=logging.CRITICAL,
            resources=resources,
            preload=__name__,
        ) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        yield client


def _check_workers(workers: dict[str, Any]) -> None:
    for address, facts in workers.items():
        if facts["nthreads"] > 1:
            raise InputError(
                f"worker {address} would run {facts['nthreads']} points in one process; start it with --nthreads 1"
            )


class _Board:
    """The live table on a terminal; elsewhere a line for each point that ends."""

    def __init__(self, rows: dict[str, Row], summary: Summary, show: bool, verbose: bool, say: Say) -> None:
        self.rows, self.before, self.say = rows, summary.before, say
        self.show, self.verbose = show, verbose
        self.live = show and sys.stderr.isatty()
        self.colour = self.live and "NO_COLOR" not in os.environ
        self.height = 0

    def __enter__(self) -> _Board:
        self.draw()
        return self

    def __exit__(self, *error: object) -> None:
        self._clear()

    def ended(self, row: Row, outcome: dict[str, Any]) -> None:
        """Say that a point ended, and how."""
        facts = {"point": row.point.name, "folder": str(row.folder), "seconds": round(outcome["seconds"], 1)}
        if outcome["error"]:
            self.say({"event": outcome["kind"], **facts, "error": outcome["error"]})
        else:
            self.say({"event": "done", **facts})
        if not self.show:
            return
        self._clear()
        left = sum(r.now in ("waiting", "running") for r in self.rows.values())
        if not self.live or outcome["error"]:
            how = (
                f"{outcome['kind']}: {outcome['error']}" if outcome["error"] else f"done in {clock(outcome['seconds'])}"
            )
            print(f"{row.point.label}: {how} ({left} left)", file=sys.stderr, flush=True)
        if self.verbose and outcome["traceback"]:
            print(outcome["traceback"], file=sys.stderr, flush=True)

    def draw(self) -> None:
        """Draw the table anew, on a terminal."""
        if not self.live:
            return
        size = shutil.get_terminal_size()
        lines = self.lines(size.lines - 2)
        self._clear()
        self.height = len(lines)
        for text, colour in lines:
            cut = text[: size.columns - 1]
            print(f"\x1b[{colour}m{cut}\x1b[0m" if colour and self.colour else cut, file=sys.stderr)
        sys.stderr.flush()

    def lines(self, height: int) -> list[tuple[str, str]]:
        """(text, colour) of each line: the counts, then running, failed and waiting points as far as there is room."""
        counts = Counter(row.now for row in self.rows.values())
        known: Sequence[Now] = ("waiting", "running", "done", "failed", "not run")
        head = ", ".join(f"{counts[now]} {now}" for now in known if now != "not run" or counts[now])
        lines = [(head + (f", {self.before} done before" if self.before else ""), "1")]
        order: Sequence[Now] = ("running", "failed", "not run", "waiting", "done")
        sorted_rows = sorted(self.rows.values(), key=lambda row: order.index(row.now))
        for row in sorted_rows:
            since = f"{clock(time.monotonic() - row.since)}  " if row.now == "running" else ""
            lines.append((f"{row.now:8} {row.point.label}  {since}{row.note}".rstrip(), _COLOURS.get(row.now, "")))
        if len(lines) > max(height, 2):
            cut = max(height, 2) - 1
            lines = [*lines[:cut], (f"... and {len(lines) - cut} more", "")]
        return lines

    def _clear(self) -> None:
        if self.height:
            print(f"\x1b[{self.height}A\x1b[J", end="", file=sys.stderr, flush=True)
            self.height = 0
