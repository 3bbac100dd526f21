"""A chapter at work: its runtime, its runs, its figures, and the record it leaves.

A notebook makes one `Chapter` after its parameters cell, sends each experiment through :meth:`Chapter.fit`, and
calls :meth:`Chapter.finish` at its end. With a folder (parameter `out`, or DFKD_OUT), finished experiments are
kept there, a killed chapter continues where it was, and the record appears; without one, nothing is kept. Running
experiments are saved every 20 seconds, or every DFKD_CHECKPOINT_SECONDS.
"""

from __future__ import annotations

import atexit
import os
import re
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .. import data, records
from ..errors import InputError, NonFiniteLoss
from ..files import lock, output_folder, remove_leftovers, replace_file, write_text
from ..locations import PACKAGE
from ..runtime import Runtime, hardware
from ..training.fit import Fit, Method, fit, resumed
from .parameters import check_parameters, parameters

if TYPE_CHECKING:
    from collections.abc import Mapping

    from matplotlib.figure import Figure

FOLDER_PATIENCE = 30.0  # seconds: a killed run's kernel outlives it for a moment
_held: set[Path] = set()  # the folders of this process
_locks = ExitStack()
atexit.register(_locks.close)


class Chapter:
    """One execution of a chapter.

    Args:
        name: of the chapter, such as "dfad".
        namespace: the notebook's `globals()`; the values of the chapter's parameters are taken from it.

    Attributes:
        runtime: chosen from the parameters device, precision, seed and threads, and where the chapter has them
            layout ("auto", "channels-last" or "contiguous") and compile_networks.
        metrics, best: figures so far, `<experiment>/<row>/<measure>`: final ones, and the best of all evaluations.
        fits: the finished runs by name.

    Raises:
        InputError: a parameter of the wrong type or out of range, or a device or precision that cannot be.
        DFKDError: another process is at work in the same folder.
    """

    def __init__(self, name: str, namespace: Mapping[str, Any]) -> None:
        self.name = name
        _same_package()
        self.parameters = check_parameters(name, {key: namespace[key] for key in parameters(name) if key in namespace})
        chosen = self.parameters
        self.runtime = Runtime.choose(
            chosen["device"],
            chosen["precision"],
            seed=chosen["seed"],
            channels_last={"channels-last": True, "contiguous": False}.get(chosen.get("layout", "auto")),
            compile=chosen.get("compile_networks", False),
            threads=chosen["threads"],
        )
        out = chosen["out"] or os.environ.get("DFKD_OUT", "")
        self.out = output_folder(out) if out else None
        self.metrics: dict[str, float | None] = {}
        self.best: dict[str, float | None] = {}
        self.fits: dict[str, Fit] = {}
        self.teachers: list[dict[str, Any]] = []
        self._began = time.perf_counter()
        if self.out:
            _hold(self.out)
            remove_leftovers(self.out)
        print(f"{name}, profile {chosen['profile']}: {self.runtime.describe()}")

    def fit(
        self,
        name: str,
        method: Method,
        n_steps: int,
        *,
        evaluate: Callable[[], dict[str, float]],
        eval_every: int = 0,
        watch: Callable[[], dict[str, Tensor]] | None = None,
        may_diverge: bool = False,
    ) -> Fit | None:
        """Run one experiment, see :func:`dfkd_lib.training.fit.fit`, and note its final and best figures.

        Args:
            name: `<experiment>/<row>`, such as "classification/DFAD".
            may_diverge: a non-finite loss is a result: it is printed, noted as null, and None is returned.
        """
        checkpoint = self.out / "checkpoints" / f"{_file_name(name)}.safetensors" if self.out else None
        try:
            result = fit(
                method,
                n_steps,
                name=name,
                evaluate=evaluate,
                eval_every=eval_every,
                watch=watch,
                checkpoint=checkpoint,
                checkpoint_every=float(os.environ.get("DFKD_CHECKPOINT_SECONDS", "20")),
                identity={"chapter": self.name, **self._asked("out", "device", "threads")},
            )
        except NonFiniteLoss as e:
            if not may_diverge:
                raise
            print(f"diverged: {e}")
            for measure in evaluate():
                self.note(f"{name}/{measure}", None)
            return None
        self.fits[name] = result
        for measure in result.measures:
            self.note(f"{name}/{measure}", result.final(measure), result.best(measure))
        return result

    def note(self, key: str, value: float | None, best: float | None = None) -> None:
        """Put a figure into the record: final, and best where there was a choice of evaluations."""
        self.metrics[key] = None if value is None else records.finite_or_none(value)
        if best is not None:
            self.best[key] = records.finite_or_none(best)

    def teacher(self, facts: dict[str, Any]) -> None:
        """Put a teacher's facts into the record."""
        self.teachers.append(facts)

    def figure(self, figure: Figure, name: str) -> Figure:
        """Keep a figure as `<out>/<name>.png`, of 256 colours; returns it, so that the cell shows it."""
        from PIL import Image

        if self.out:
            with replace_file(self.out / f"{name}.png") as temporary:
                figure.savefig(temporary, format="png", dpi=150, bbox_inches="tight")
                with Image.open(temporary) as picture:
                    small = picture.convert("RGB").quantize(256)
                small.save(temporary, format="png", optimize=True)
        return figure

    def record(self) -> dict[str, Any]:
        """The record of this execution as it stands, in the form of `record.json`.

        Its seconds are those of the training, resumed parts included, or all of this execution's where that is more: a
        chapter may measure more than it trains.
        """
        trained = sum(f.seconds for f in self.fits.values())
        return {
            "chapter": self.name,
            "profile": self.parameters["profile"],
            "parameters": self._asked("out"),
            "seed": self.parameters["seed"],
            "command": os.environ.get("DFKD_COMMAND", "notebook"),
            **records.provenance(),
            "hardware": hardware(self.runtime.device),
            "runtime": self.runtime.describe(),
            "data": [dict(zip(("name", "split", "fingerprint"), opened, strict=True)) for opened in data.opened()],
            "teachers": self.teachers,
            "seconds": round(max(trained, time.perf_counter() - self._began), 1),
            "resumed": resumed(*self.fits.values()),
            "metrics": self.metrics,
            "best": self.best,
            "finished": records.now(),
        }

    def _asked(self, *without: str) -> dict[str, Any]:
        return {key: value for key, value in self.parameters.items() if key not in without}

    def finish(self) -> dict[str, Any]:
        """Write `record.json` and `history.csv` into the run's folder, if it has one; returns the record."""
        record = self.record()
        if self.out:
            write_text(self.out / "history.csv", _history_csv(self.fits))
            records.write(self.out, record)
        return record


def _same_package() -> None:
    """Two installed copies of this library are a trap: the command may be of one, and its chapters of the other.

    Raises:
        InputError: the command that started this chapter runs from another copy.
    """
    asked = os.environ.get("DFKD_PACKAGE")
    if asked and Path(asked) != PACKAGE:
        raise InputError(
            f"two packages dfkd_lib are on the path: dfkd runs from {asked}, and the chapter imports {PACKAGE}; "
            "uninstall one, or take it out of PYTHONPATH"
        )


def _hold(folder: Path) -> None:
    """Keep other processes out of a run's folder until this one ends; it may be entered again, as a cell may."""
    if folder not in _held:
        _locks.enter_context(lock(folder / ".lock", timeout=FOLDER_PATIENCE, what=f"folder {folder}"))
        _held.add(folder)


def _file_name(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9.=-]+", "-", name)


def _history_csv(fits: dict[str, Fit]) -> str:
    import pandas as pd

    rows = [{"fit": name, **row} for name, result in fits.items() for row in result.history]
    return str(pd.DataFrame(rows).to_csv(index=False, float_format="%.6g", lineterminator="\n"))
