"""Live progress: one line that rewrites itself on a terminal or in a notebook, and nothing anywhere else.

A driving process that wants to follow sets DFKD_EVENTS to a file; each update is one JSON line in it.
"""

from __future__ import annotations

import json
import os
import sys
import time
from types import TracebackType
from typing import Any


class Progress:
    """Shows how far a run of `n_steps` is. Use as a context manager around the loop.

    Args:
        name: what is shown in front.
        n_steps: the whole length.
        done: steps that were taken before (a resumed run).
        show: whether there is a line at all; a driving process is told in any case.
    """

    SHOW_EVERY = 0.5  # seconds between two refreshes

    def __init__(self, name: str, n_steps: int, done: int = 0, *, show: bool = True) -> None:
        self.name, self.n_steps, self.first, self.step = name, n_steps, done, done
        self.events = os.environ.get("DFKD_EVENTS")
        self.handle: Any = None
        self.shows = show
        self.metrics: dict[str, float] = {}
        self.start = self.shown = time.perf_counter()

    def __enter__(self) -> Progress:
        emit("start", fit=self.name, step=self.first, n_steps=self.n_steps)
        if self.shows and in_notebook():
            from IPython.display import display

            self.handle = display(_bundle(f"{self.name}: starting"), raw=True, display_id=True)
        return self

    def update(self, step: int, row: dict[str, float]) -> None:
        """Take note of a step and its metrics; refreshes the line at most twice a second."""
        self.step = step
        self.metrics |= {key: value for key, value in row.items() if key not in ("step", "seconds")}
        now = time.perf_counter()
        if now - self.shown < self.SHOW_EVERY and step < self.n_steps:
            return
        self.shown = now
        seconds = now - self.start
        left = seconds / max(1, step - self.first) * (self.n_steps - step)
        facts = {"step": step, "n_steps": self.n_steps, "seconds": seconds, "eta": left, "metrics": self.metrics}
        emit("progress", fit=self.name, **facts)
        self._show(f"{self.name}: {step}/{self.n_steps}, {clock(left)} left{memory()}, {figures(self.metrics)}")

    def _show(self, line: str) -> None:
        if self.handle is not None:
            self.handle.update(_bundle(line), raw=True)
        elif self.shows and sys.stderr.isatty():
            print(f"\r\x1b[2K{line}", end="", file=sys.stderr, flush=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        seconds = time.perf_counter() - self.start
        ended = "done" if error is None else "stopped"
        emit(ended, fit=self.name, step=self.step, n_steps=self.n_steps, seconds=seconds, metrics=self.metrics)
        took = f"{self.step - self.first} steps in {clock(seconds)}"
        self._show(f"{self.name}: {'' if error is None else 'stopped after '}{took}, {figures(self.metrics)}")
        if self.shows and self.handle is None and sys.stderr.isatty():
            print(file=sys.stderr)


def emit(event: str, **facts: Any) -> None:
    """Append one JSON line to the file that DFKD_EVENTS names; does nothing without it."""
    if path := os.environ.get("DFKD_EVENTS"):
        with open(path, "a", encoding="utf-8") as f:
            f.write(json.dumps({"event": event, **facts}) + "\n")


def in_notebook() -> bool:
    """Whether this process is a Jupyter kernel."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return shell is not None and hasattr(shell, "kernel")


def clock(seconds: float) -> str:
    """Seconds as m:ss, or h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def figures(metrics: dict[str, float]) -> str:
    """Metrics in one line, four significant digits."""
    return ", ".join(f"{key} {value:.4g}" for key, value in metrics.items())


def memory() -> str:
    """Peak device memory, on CUDA."""
    import torch  # here: the processes that drive kernels show progress, and need no torch

    return f", {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if torch.cuda.is_initialized() else ""


def _bundle(text: str) -> dict[str, str]:
    return {"text/plain": text}
