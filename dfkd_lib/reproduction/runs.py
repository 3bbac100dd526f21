"""The folder of one run: what was asked (`run.json`), whether it finished, and following it live."""

from __future__ import annotations

import _thread
import json
import shutil
import signal
import sys
import threading
from pathlib import Path
from types import TracebackType
from typing import Any

from ..errors import InputError
from ..files import misfit, read_json, sha256, write_json
from ..locations import code_fingerprint
from ..training.progress import clock, figures
from .parameters import notebook_path

LOCK = ".run.lock"
PLAIN_OUTPUT = "output.txt"
_ASKED = {
    "chapter": str,
    "profile": str,
    "parameters": dict,
    "command": str,
    "plain?": bool,
    "refused?": bool,
    "notebook?": str,
    "code?": str,
}

_EVENT = {
    "event": str,
    "fit": str,
    "step": int,
    "n_steps": int,
    "seconds?": float,
    "eta?": float,
    "metrics?": {str: float},
}


def begin(folder: Path, chapter: str, parameters: dict[str, Any], command: str, *, plain: bool = False) -> None:
    """Note in a new or empty folder what is about to run; `plain` runs continue without Jupyter.

    The folder of a run that was refused before it trained anything counts as new.

    Raises:
        InputError: the folder holds a run, finished or not, or other files.
    """
    noted = (folder / "run.json").exists()
    if is_finished(folder):
        raise InputError(f"{folder} holds a finished run; choose another --out, or delete it")
    if noted and ((folder / "checkpoints").exists() or not asked(folder).get("refused")):
        raise InputError(f"{folder} holds an unfinished run; continue it with --resume {folder}, or delete it")
    if not noted and folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir()):
        raise InputError(f"{folder} is not empty and holds no run; choose another --out")
    facts = {"chapter": chapter, "profile": parameters["profile"], "parameters": parameters, "command": command}
    write_json(folder / "run.json", facts | made_of(chapter) | ({"plain": True} if plain else {}))


def refused(folder: Path) -> None:
    """Note that the chapter refused what it was given."""
    write_json(folder / "run.json", asked(folder) | {"refused": True})


def asked(folder: Path) -> dict[str, Any]:
    """What `begin` noted: "chapter", "profile", "parameters", "command" and the keys of `made_of`.

    Raises:
        InputError: the folder holds no run.
        DamagedFile: `run.json` lacks something, or holds something else.
    """
    path = folder / "run.json"
    if not path.is_file():
        raise InputError(f"{folder} holds no run to resume: there is no run.json in it")
    facts: dict[str, Any] = read_json(path, _ASKED)
    return facts


def is_finished(folder: Path) -> bool:
    """Whether the run came to its end: its notebook, or the output of a plain run, appears last."""
    ended = any((folder / name).is_file() for name in ("notebook.ipynb", PLAIN_OUTPUT))
    return ended and (folder / "record.json").is_file()


def made_of(chapter: str) -> dict[str, str]:
    """What a run's result depends on besides its parameters: fingerprints of the notebook and of the library."""
    return {"notebook": sha256(notebook_path(chapter))[:12], "code": code_fingerprint()}


class Follow:
    """While it is open, shows the events that a chapter appends to a file.

    On a terminal one line is kept up to date; elsewhere one line per finished fit goes to stderr. With
    `as_json`, every event goes to stdout as it is.
    """

    def __init__(self, events: Path, *, as_json: bool = False) -> None:
        self.events, self.as_json = events, as_json
        self.out, self.err = sys.stdout, sys.stderr  # a plain run redirects what its chapter prints
        self.live = self.err.isatty() and not as_json
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._read = 0
        self._lost: OSError | None = None

    def __enter__(self) -> Follow:
        self.events.write_bytes(b"")
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        self._thread.join()
        if self._lost:
            raise self._lost
        self._drain()
        if self.live:
            print("\r\x1b[2K", end="", file=self.err, flush=True)

    def _work(self) -> None:
        while not self._end.wait(0.2):
            try:
                self._drain()
            except OSError as e:  # what is printed goes nowhere: the chapter ends, as Ctrl-C ends it
                self._lost = e
                _interrupt()
                return

    def _drain(self) -> None:
        with open(self.events, "rb") as f:
            f.seek(self._read)
            whole, newline, _ = f.read().rpartition(b"\n")
        self._read += len(whole) + len(newline)
        for line in whole.decode("utf-8", "replace").splitlines():
            if event := _event(line):
                if self.as_json:
                    print(line, file=self.out, flush=True)
                else:
                    self._show(event)

    def _show(self, event: dict[str, Any]) -> None:
        name, latest = event["fit"], figures(event.get("metrics", {}))
        if event["event"] in ("done", "stopped"):
            clear = "\r\x1b[2K" if self.live else ""
            took = f"{event['event']} after {event['step']} steps, {clock(event.get('seconds', 0.0))}"
            print(f"{clear}{name}: {took}, {latest}", file=self.err, flush=True)
        elif event["event"] == "progress" and self.live:
            text = f"{name}: {event['step']}/{event['n_steps']}, {clock(event.get('eta', 0.0))} left, {latest}"
            width = shutil.get_terminal_size().columns - 1
            print(f"\r\x1b[2K{text[:width]}", end="", file=self.err, flush=True)


def _interrupt() -> None:
    """What Ctrl-C does, from another thread; where there are signals, it wakes the main thread if that waits."""
    if hasattr(signal, "pthread_kill"):
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
    else:
        _thread.interrupt_main()


def _event(line: str) -> dict[str, Any] | None:
    """One line of an events file; None where it is no event, as when a chapter wrote something else there."""
    try:
        event: dict[str, Any] = json.loads(line)
    except ValueError:
        return None
    return None if misfit(event, _EVENT) else event
