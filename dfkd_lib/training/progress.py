"""Live progress: one line that rewrites itself on a terminal or in a notebook, and nothing anywhere else.

The runs of one notebook cell share one line, which unfolds to a summary of each. A driving process that wants to
follow sets DFKD_EVENTS to a file; each update is one JSON line in it.
"""

from __future__ import annotations

import html
import json
import os
import sys
import time
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, ClassVar


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
        self.cell: _Cell | None = None
        self.shows = show
        self.metrics: dict[str, float] = {}
        self.start = self.shown = time.perf_counter()

    def __enter__(self) -> Progress:
        emit("start", fit=self.name, step=self.first, n_steps=self.n_steps)
        if self.shows and in_notebook():
            self.cell = _Cell.at_work()
            self.cell.update(f"{self.name}: starting")
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
        if self.cell is not None:
            self.cell.update(line)
        elif self.shows and sys.stderr.isatty():
            print(f"\r\x1b[2K{line}", end="", file=sys.stderr, flush=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        seconds = time.perf_counter() - self.start
        ended = "done" if error is None else "stopped"
        emit(ended, fit=self.name, step=self.step, n_steps=self.n_steps, seconds=seconds, metrics=self.metrics)
        took = f"{'' if error is None else 'stopped after '}{self.step - self.first} steps in {clock(seconds)}"
        summary = f"{self.name}: {took}, {figures(self.metrics)}"
        if self.cell is not None:
            self.cell.close(summary, seconds)
            return
        self._show(summary)
        if self.shows and sys.stderr.isatty():
            print(file=sys.stderr)


@dataclass
class _Cell:
    """What one execution of a notebook cell shows of its runs: a line at work, and a fold of those that ended."""

    execution: int
    handle: Any = None
    ended: list[str] = field(default_factory=list)
    seconds: float = 0.0
    latest: ClassVar[_Cell | None] = None

    @classmethod
    def at_work(cls) -> _Cell:
        execution = sys.modules["IPython"].get_ipython().execution_count
        if cls.latest is None or cls.latest.execution != execution:
            cls.latest = cls(execution)
        return cls.latest

    def update(self, line: str) -> None:
        """Show the line of the run at work."""
        self._show(line, [*self.ended, line])

    def close(self, summary: str, seconds: float) -> None:
        """Keep the summary of a run that ended."""
        self.ended.append(summary)
        self.seconds += seconds
        runs = f"{len(self.ended)} run{'s' * (len(self.ended) > 1)}"
        self._show(f"{runs} in {clock(self.seconds)}", self.ended)

    def _show(self, head: str, lines: list[str]) -> None:
        from IPython.display import display

        text = "\n".join(lines)
        folded = f"<details><summary>{html.escape(head)}</summary><pre>{html.escape(text)}</pre></details>"
        bundle = {"text/plain": text, "text/html": f'<div class="dfkd-runs">{folded}</div>'}
        if self.handle is None:
            self.handle = display(bundle, raw=True, display_id=True)
        else:
            self.handle.update(bundle, raw=True)


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
