"""The table of headline results, from the committed records: on the page of results, and in the README."""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import records
from ..errors import InputError
from ..files import write_text
from ..locations import repository_root
from .papers import paper, published
from .tables import scale_in_words
from .verdicts import percent, seeds

BEGIN, END = "<!-- headline results, by dfkd refresh README -->", "<!-- end of headline results -->"


@dataclass(frozen=True)
class Headline:
    """One line: what was done, the runs that show it, and the published figure where there is one.

    Attributes:
        runs: how the names of the runs' folders begin.
        published: paper, table, column and row of the figure.
    """

    what: str
    chapter: str
    runs: str
    teacher: str
    student: str
    published: tuple[str, str, str, str] | None = None


HEADLINES = (
    Headline(
        "Fast-5, WRN-40-2 to WRN-16-1", "comparison", "gpu-cifar10-fast-80000", "comparison/teacher/accuracy",
        "comparison/Fast-5/accuracy", ("fast", "comparison", "cifar10", "Fast-5"),
    ),
    Headline(
        "NAYER, WRN-40-2 to WRN-16-1", "comparison", "gpu-cifar10-8000", "comparison/teacher/accuracy",
        "comparison/NAYER/accuracy",
    ),
    Headline(
        "DFAD, LeNet-5 to its half", "dfad", "cpu-mnist", "classification/teacher/accuracy",
        "classification/DFAD/accuracy", ("dfad", "classification", "mnist", "DFAD"),
    ),
    Headline(
        "Fast-5, LeNet-5 to its half", "comparison", "cpu-mnist", "comparison/teacher, batch norm/accuracy",
        "comparison/Fast-5/accuracy",
    ),
    Headline("CMI, adversarial mode", "cmi", "cpu-mnist", "modes/teacher/accuracy", "modes/adversarial/accuracy"),
    Headline("MosaicKD, patches of photographs at hand", "mosaickd", "cpu-cifar10", "comparison/teacher/accuracy",
             "comparison/MosaicKD/accuracy"),
    Headline(
        "NetGraft, ten images per class", "grafting", "cpu-cifar10-vgg16", "shots/teacher/accuracy",
        "shots/NetGraft K=10/accuracy", ("grafting", "shots", "CIFAR-10", "K = 10"),
    ),
    Headline(
        "AS-DFD, MiniLM to its first three layers", "as-dfd", "gpu-minilm-dbpedia-cut",
        "3 layers, pretrained teacher/teacher/accuracy", "3 layers, pretrained teacher/AS-DFD/accuracy",
    ),
)  # fmt: skip


def headlines() -> list[dict[str, str]]:
    """What stands beside each of `HEADLINES`: accuracies in percent, mean ± standard deviation, and what they cost.

    Hours are those of one run, the command that of the first.
    """
    rows = []
    for headline in HEADLINES:
        found = [run for run in records.committed(headline.chapter) if run["run"].startswith(headline.runs)]
        teacher, student = (
            percent([run["metrics"][key] for run in found]) for key in (headline.teacher, headline.student)
        )
        rows.append(
            {
                "what": headline.what,
                "scale": _scale(found),
                "teacher": teacher,
                "student": student,
                "published": _theirs(headline),
                "hours": _hours(found),
                "published where": paper(headline.published[0]).table(headline.published[1]).source
                if headline.published
                else "–",
                "hardware": found[0]["hardware"]["name"],
                "command": found[0]["command"].split(" --out ")[0],
            }
        )
    return rows


def headline_table() -> str:
    """The README's table in Markdown, one line for each of `HEADLINES`."""
    shown = ("scale", "teacher", "student", "published", "hours")
    lines = ["| " + " | ".join(("what", *shown)) + " |", "| --- " * (1 + len(shown)) + "|"]
    for headline, row in zip(HEADLINES, headlines(), strict=True):
        link = f"[{headline.what}](book/chapters/{headline.chapter}.ipynb)"
        lines.append("| " + " | ".join((link, *(row[name] for name in shown))) + " |")
    return "\n".join(lines)


def refresh(path: Path | None = None) -> Path:
    """Write the table between its marks in the README of the checkout; returns the file.

    Raises:
        InputError: this is no checkout, or the marks are not there.
    """
    root = repository_root()
    if path is None and root is None:
        raise InputError("there is no README here: this library runs from an installed package, not from a checkout")
    path = path or Path(str(root)) / "README.md"
    text = path.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise InputError(f"{path} lacks the lines between which its table stands: {BEGIN} and {END}")
    table = f"{BEGIN}\n{headline_table()}\n{END}"
    write_text(path, re.sub(f"{re.escape(BEGIN)}.*{re.escape(END)}", lambda _: table, text, flags=re.DOTALL))
    return path


def _scale(found: Sequence[dict[str, Any]]) -> str:
    threads = found[0]["hardware"]["threads"]
    on = "one GPU" if records.on_gpu(found[0]) else f"{threads} CPU thread{'s' * (threads != 1)}"
    return f"{scale_in_words(found[0])}, {seeds(len(found))}, {on}"


def _theirs(headline: Headline) -> str:
    if not headline.published:
        return "–"
    paper, table, column, row = headline.published
    return f"{100 * published(paper, table, column).set_index('method').loc[row, 'mean']:.2f}"


def _hours(found: Sequence[dict[str, Any]]) -> str:
    return f"{statistics.fmean(run['seconds'] for run in found) / 3600:.2g}"
