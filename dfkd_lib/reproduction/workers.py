"""A point on the worker that was handed it: one papermill execution, a kernel of its own, in a folder of its own."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import DFKDError
from ..files import lock, write_json
from ..locations import cache_root, code_fingerprint
from ..training.progress import clock
from . import runs
from .plans import Point

TOPIC = "dfkd"
PATIENCE = 30.0  # seconds: the kernel of a dead worker outlives it for a moment
KEPT = 50 * 2**20  # bytes: the largest file that a worker without the shared folder sends back
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
        worker.log_event(TOPIC, {"event": event, "name": name, "text": text, "by": str(worker.name)})

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

    def _show(self, event: dict[str, Any]) -> None:
        if event["event"] == "progress":
            self.latest = f"{event['fit']} {event['step']}/{event['n_steps']}, {clock(event.get('eta', 0.0))} left"
        elif event["event"] == "done":
            self.latest = f"{event['fit']} done"


def dask_setup(worker: Any) -> None:
    """What Dask calls in each worker of ours: it serves no pages, and Ctrl-C is for the process that drives."""
    worker.http_server.stop()
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
