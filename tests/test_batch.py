"""Batches with real workers and kernels: losses, failures, interrupts, a second run, a scheduler elsewhere."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from tiny_book import refused

from dfkd_lib import records
from dfkd_lib.reproduction import batch, board, cluster, plans, runs, workers
from dfkd_lib.reproduction.cli import main

pytest.importorskip("cryptography", reason="workers of our own talk through TLS: pip install 'dfkd-lib[batch]'")
pytestmark = [
    pytest.mark.skipif(os.name == "nt", reason="signals differ"), pytest.mark.usefixtures("here"),
]  # fmt: skip

FORTY = """# forty points
chapters: [tiny]
seeds: [{seeds}]
include:
  - {{seed: 100, mode: wait}}
  - {{seed: 101, mode: fail}}
  - {{seed: 102, lr: 2.0}}
"""


class Batch:
    """A `dfkd batch --json` in another process; its events as they come."""

    def __init__(self, *words: str) -> None:
        command = [sys.executable, "-m", "dfkd_lib", "batch", "plan.yml", "--json", *words]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        self.process = subprocess.Popen(command, text=True, start_new_session=True, **pipes)
        self.events: list[dict[str, Any]] = []
        self.reader = threading.Thread(target=self._read)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self.events.append(json.loads(line))

    def count(self, event: str, point: str = "") -> int:
        return sum(e["event"] == event and e.get("point", "").startswith(point) for e in list(self.events))

    def end(self) -> str:
        """Wait until it is over; returns what it said on stderr."""
        assert self.process.stderr
        said = self.process.stderr.read()
        self.process.wait()
        self.reader.join()
        return said


def until(what: Callable[[], Any], seconds: float = 300) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)
    return found


def folder_of(seed: int) -> Path:
    return next(path for path in Path("runs/plan").iterdir() if f"-seed{seed}-" in path.name)


def kernel_of(folder: Path) -> psutil.Process | None:
    """The process that executes the notebook of a folder."""
    for process in psutil.process_iter():
        try:
            if process.environ().get("DFKD_OUT") == str(folder.resolve()):
                return process
        except psutil.Error:
            continue
    return None


@contextmanager
def in_the_middle(*words: str) -> Iterator[tuple[Batch, Path]]:
    """A batch whose waiting point has taken its first step, and that point's folder."""
    running = Batch(*words)
    try:
        until(lambda: running.count("running", "tiny-smoke-seed100-") or running.process.poll() is not None)
        folder = folder_of(100)
        until(lambda: (folder / "done.txt").exists() and kernel_of(folder))
        yield running, folder
    finally:
        running.process.kill()
        running.end()


def finished() -> dict[str, int]:
    found = Path("runs/plan").glob("*/record.json")
    return {path.parent.name: path.stat().st_mtime_ns for path in found if runs.is_finished(path.parent)}


def test_forty_points_with_a_killed_worker_a_failure_and_a_wrong_parameter() -> None:
    Path("plan.yml").write_text(FORTY.format(seeds=", ".join(map(str, range(37)))))
    with in_the_middle("--workers", "2") as (running, folder):
        kernel = kernel_of(folder)
        worker = kernel.parent() if kernel else None
        assert worker and worker.pid != running.process.pid
        worker.kill()
        (folder / "go").touch()
        said = running.end()
    assert running.process.returncode == 1
    assert "refused: tiny smoke seed 102, lr 2.0: parameter lr: 2.0 must be in (0..1]" in said
    summary = running.events[-1]
    assert (summary["event"], summary["finished"], summary["before"]) == ("summary", 38, 0)
    assert [name.split("-")[2] for name, _, _ in summary["failed"]] == ["seed101"] and len(summary["refused"]) == 1

    starts = {e["point"]: e["start"] for e in running.events if e["event"] == "running"}
    assert len(starts) == 39 and [name for name, n in starts.items() if n > 1] == [folder.name]
    assert running.count("done") == 38 and len(finished()) == 38
    assert records.read(folder)["metrics"]["toy/resumed/value"] == 1, "it went on where the killed worker was"
    failed = folder_of(101)
    assert not (failed / "notebook.ipynb").exists() and (failed / "notebook.partial.ipynb").exists()
    kept = json.loads((failed / "failed.json").read_text())
    assert "ValueError: the toy broke" in kept["error"] and "Traceback" in kept["traceback"]
    assert 'raise ValueError("the toy broke' in kept["traceback"] and "\x1b" not in kept["traceback"]

    before = finished()
    again = Batch()
    again.end()
    assert again.process.returncode == 1 and [e["event"] for e in again.events] == ["summary"]
    assert again.events[-1]["before"] == 38 and again.events[-1]["failed"] == summary["failed"]
    (next(iter(Path("runs/plan").glob("*seed5-*"))) / "notebook.ipynb").unlink()
    retry = Batch("--retry-failed")
    retry.end()
    assert {e["point"].split("-")[2] for e in retry.events if e["event"] == "running"} == {"seed101", "seed5"}
    same = {name: when for name, when in finished().items() if "-seed5-" not in name}
    assert same.items() <= before.items(), "nothing else was run again"


@pytest.fixture
def scheduler() -> Iterator[str]:
    """A scheduler and two workers, each a process of its own."""

    def start(part: str, *words: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", f"distributed.cli.dask_{part}", "--no-dashboard", "--scheduler-file", "s.json"]
        return subprocess.Popen([*command, *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    processes = [start("scheduler", "--host", "127.0.0.1", "--port", "0")]
    try:
        until(Path("s.json").exists)
        processes += [start("worker", "--nthreads", "1", "--memory-limit", "0") for _ in range(2)]
        yield str(until(lambda: json.loads(Path("s.json").read_text() or "{}").get("address")))
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait()


def test_a_scheduler_by_address_and_an_interrupt(scheduler: str) -> None:
    Path("plan.yml").write_text(FORTY.format(seeds="0, 1, 2, 3"))
    with in_the_middle("--scheduler", scheduler) as (running, folder):
        running.process.send_signal(signal.SIGINT)
        said = running.end()
    assert running.process.returncode == 130
    assert f"continue with: dfkd batch plan.yml --json --scheduler {scheduler}" in said
    until(lambda: kernel_of(folder) is None, 60)
    assert not (folder / "failed.json").exists(), "what was stopped did not fail"
    (folder / "go").touch()
    before = finished()

    again = Batch("--scheduler", scheduler)
    again.end()
    assert again.process.returncode == 1
    summary = again.events[-1]
    assert summary["finished"] == 5 and len(summary["failed"]) == len(summary["refused"]) == 1
    ran = {e["point"] for e in again.events if e["event"] == "running"}
    assert before.items() <= finished().items() and not ran & before.keys(), "what was finished is not run again"
    # A point on the other worker may have come to its end after the interrupt, and even after `before`.
    assert summary["before"] == 5 - again.count("done") >= len(before)
    assert records.read(folder)["metrics"]["toy/resumed/value"] == 1
    assert len({e["worker"] for e in running.events + again.events if e["event"] == "running"}) == 2


def test_an_interrupted_batch_of_our_own_goes_on() -> None:
    Path("plan.yml").write_text(FORTY.format(seeds="0"))
    with in_the_middle("--workers", "1") as (running, folder):
        os.killpg(running.process.pid, signal.SIGINT)  # Ctrl-C on a terminal reaches the workers too
        said = running.end()
    assert running.process.returncode == 130
    assert said.splitlines()[-1] == "dfkd: interrupted; what is finished stays, continue with: dfkd batch plan.yml " + (
        "--json --workers 1"
    )
    assert "Traceback" not in said
    until(lambda: kernel_of(folder) is None, 60)
    assert plans.state(folder) == "unfinished" and plans.state(folder_of(101)) == "to run"


def test_workers_of_our_own_let_nobody_else_in_and_serve_no_pages() -> None:
    from distributed.comm import connect
    from distributed.security import Security

    async def say_hello(address: str, security: Security, patience: float = 3) -> None:
        comm = await connect(address, timeout=patience, **security.get_connection_args("client"))
        comm.abort()

    with cluster.connect(None, 1, 0) as client:
        client.wait_for_workers(1)
        scheduler = client.cluster.scheduler
        mine = [scheduler.address, *scheduler.workers]
        assert all(address.startswith("tls://") for address in mine)
        for address in mine:
            asyncio.run(say_hello(address, client.security, patience=60))
            for stranger, at in (
                (Security(), address.replace("tls://", "tcp://")),
                (Security(), address),
                (Security.temporary(), address),
            ):
                with pytest.raises((OSError, TypeError)):
                    asyncio.run(say_hello(at, stranger))
        ours = {os.getpid(), *(child.pid for child in psutil.Process().children(recursive=True))}
        open_ports = {
            c.laddr.port for pid in ours for c in psutil.Process(pid).net_connections() if c.status == "LISTEN"
        }
        pages = {scheduler.http_server.port, *client.run(lambda dask_worker: dask_worker.http_server.port).values()}
        assert not open_ports & pages


def test_what_cannot_start_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    Path("plan.yml").write_text("chapters: [tiny]\ngpus: 1\n")
    assert "unknown plan 'plam'" in refused(capsys, *["batch", "plam"])
    assert "workers must be 1 or more" in refused(capsys, *["batch", "plan.yml", "--workers", "0"])
    assert "not allowed with" in refused(capsys, *["batch", "plan.yml", "--workers", "2", "--scheduler", "tcp://a:1"])
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    try:
        assert "this machine has none" in refused(capsys, *["batch", "plan.yml"])
    finally:
        del os.environ["CUDA_VISIBLE_DEVICES"]
    assert not list(Path("runs").glob("*/*/run.json"))
    Path("plan.yml").write_text("chapters: [tiny]\nseeds: [-1]\n")
    assert main(["batch", "plan.yml"]) == 2
    said = capsys.readouterr().err
    assert "seed: -1 must be in [0..]" in said and "has no point that can run" in said


def test_a_worker_without_the_folder_sends_what_it_made(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import distributed

    said: list[dict[str, Any]] = []
    state = SimpleNamespace(tasks={"key": SimpleNamespace(state="executing")})
    worker = SimpleNamespace(
        name=1,
        status=SimpleNamespace(name="running"),
        state=state,
        get_current_task=lambda: "key",
        log_event=lambda topic, event: said.append(event),
    )
    monkeypatch.setattr(distributed, "get_worker", lambda: worker)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    Path("plan.yml").write_text("chapters: [tiny]\n")
    (point,) = plans.read(Path("plan.yml")).points
    task = workers.Task(point, str(here / "elsewhere" / point.name), threads=3, gpus=2)
    outcome = workers.run_point(task)
    assert not outcome["error"] and said[0]["event"] == "begin"
    assert json.loads(outcome["files"]["record.json"])["threads"] == "3"
    row = board.Row(point, here / "runs" / point.name)
    batch._bring_in(row, outcome)
    assert plans.state(row.folder) == "finished"
    assert workers._environment(task, 1)["CUDA_VISIBLE_DEVICES"] == "6,7"

    chapter = here / "book/chapters/tiny.ipynb"
    chapter.write_text(chapter.read_text() + "\n")
    assert "another version" in workers.run_point(task)["error"], "a worker does not run what it was not asked for"


def test_the_table_shows_what_matters_first(here: Path) -> None:
    Path("plan.yml").write_text("chapters: [tiny]\nseeds: [0, 1, 2, 3, 4, 5]\n")
    rows = {point.name: board.Row(point, here) for point in plans.read(Path("plan.yml")).points}
    of = list(rows.values())
    of[3].now, of[3].note, of[3].since = "running", "toy 1/3, 0:10 left", time.monotonic()
    of[4].now, of[4].note = "failed", "it broke"
    of[0].now = "done"
    shown = board.Board(rows, 2, False, False, lambda event: None)
    texts = [text for text, _ in shown.lines(6)]
    assert texts == [
        "3 waiting, 1 running, 1 done, 1 failed, 2 done before",
        "running  tiny smoke seed 3  0:00  toy 1/3, 0:10 left",
        "failed   tiny smoke seed 4  it broke",
        "waiting  tiny smoke seed 1",
        "waiting  tiny smoke seed 2",
        "... and 2 more",
    ]
