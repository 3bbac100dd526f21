"""What is seen of a batch while it runs: a live table on a terminal, else a line for each point that ends."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..training.progress import clock
from .plans import Point

Now = Literal["waiting", "running", "done", "failed", "not run"]
Say = Callable[[dict[str, Any]], None]

_COLOURS = {"running": "36", "done": "32", "failed": "31", "not run": "31"}


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


class Board:
    """The live table on a terminal; elsewhere a line for each point that ends."""

    def __init__(self, rows: dict[str, Row], before: int, show: bool, verbose: bool, say: Say) -> None:
        self.rows, self.before, self.say = rows, before, say
        self.show, self.verbose = show, verbose
        self.live = show and sys.stderr.isatty()
        self.colour = self.live and "NO_COLOR" not in os.environ
        self.height = 0

    def __enter__(self) -> Board:
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
