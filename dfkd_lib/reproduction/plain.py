"""Run a chapter in this process, without Jupyter: on a machine that has none, in a debugger, under a profiler.

What the cells print goes to `output.txt` in the run's folder; pictures and the record are written by the chapter
itself, as in a notebook. Tables and formatted text, which only a notebook can show, are left out.
"""

from __future__ import annotations

import contextlib
import io
import linecache
import os
import sys
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from ..errors import InputError
from .notebooks import ChapterFailed
from .parameters import cells, notebook_path
from .runs import PLAIN_OUTPUT


def execute(
    chapter: str, out: Path, given: Mapping[str, Any], *, environment: Mapping[str, str], show: bool = False
) -> Path:
    """Run the code cells of a chapter one after the other in a namespace of their own; returns `out/output.txt`.

    The chapter keeps its checkpoints and its record in `out`, and continues from what it finds there.

    Args:
        given: parameters that passed `check_parameters`; set after the cell that is tagged `parameters`.
        environment: further environment variables while the chapter runs.
        show: print what the cells print on this process' own output too.

    Raises:
        ChapterFailed: a cell raised, or no record came out; `out/output.partial.txt` is kept, with the traceback.
        InputError: the chapter itself refused its input.
        KeyboardInterrupt: as it came; the chapter can be continued.
    """
    output = out.resolve() / PLAIN_OUTPUT
    partial = output.with_suffix(".partial.txt")
    source = notebook_path(chapter).resolve()
    values = {name: value for name, value in given.items() if name != "out"}
    code = [(text, tags) for kind, text, tags in cells(source) if kind == "code"]
    with (
        open(partial, "w", encoding="utf-8", errors="backslashreplace") as file,
        _at_home(source.parent, {"DFKD_OUT": str(out.resolve()), **environment}),
        _said_to(file, show),
    ):
        namespace: dict[str, Any] = {"__name__": "__main__"}
        for number, (text, tags) in enumerate(code, 1):
            where = f"<{chapter} cell {number}>"
            linecache.cache[where] = (len(text), None, text.splitlines(keepends=True), where)  # tracebacks show it
            try:
                exec(compile(text, where, "exec", dont_inherit=True), namespace)
            except BrokenPipeError:
                raise
            except (Exception, SystemExit) as e:
                traceback.print_exc(file=file)
                message = f"{type(e).__name__}: {e}".splitlines()[0]
                kind = InputError if isinstance(e, InputError) else ChapterFailed
                raise kind(f"{chapter} failed in code cell {number}: {message} (see {partial})") from e
            if "parameters" in tags:
                namespace |= values
            _close_figures()
    if not (out / "record.json").is_file():
        raise ChapterFailed(f"{chapter} ran but left no record.json in {out}; see {partial}")
    return partial.replace(output)


@contextlib.contextmanager
def _at_home(folder: Path, environment: Mapping[str, str]) -> Iterator[None]:
    """In a chapter's folder, with environment variables of its own, and figures that need no screen."""
    before = {name: os.environ.get(name) for name in (*environment, "MPLBACKEND")}
    os.environ.update(environment, MPLBACKEND="agg")
    try:
        with contextlib.chdir(folder):
            yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _said_to(file: TextIO, show: bool) -> Iterator[None]:
    """What is printed goes to a file, and to where it went before if it is to be shown."""
    out, err = (_Both(file, sys.stdout), _Both(file, sys.stderr)) if show else (file, file)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        yield


class _Both(io.TextIOBase):
    """A stream that writes to two."""

    def __init__(self, *streams: TextIO) -> None:
        self.streams = streams

    def write(self, text: str) -> int:
        for stream in self.streams:
            stream.write(text)
            stream.flush()
        return len(text)

    def flush(self) -> None:
        for stream in self.streams:
            stream.flush()


def _close_figures() -> None:
    """Forget the figures of a cell, which nobody can look at any more."""
    if plt := sys.modules.get("matplotlib.pyplot"):
        plt.close("all")
