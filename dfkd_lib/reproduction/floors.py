"""Which rows of a record work: a comparison with a row at chance says nothing of a method."""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from typing import Any

from .cards import Budget, Evidence

ABOVE_CHANCE = 0.1
_REFERENCES = ("teacher", "KD original", "scratch student", "labels", "fine-tuned student")


def is_accuracy(key: str) -> bool:
    """Whether a metric is a share of test images, pixels or sentences that are classified rightly."""
    measure = key.split("/")[2]
    return measure in ("accuracy", "union", "mean IoU") or measure.startswith("part ")


def is_reference(key: str) -> bool:
    """Whether a row has data or labels, and is there to be measured against."""
    return key.split("/")[1].startswith(_REFERENCES)


def chance(record: dict[str, Any]) -> float | None:
    """Accuracy of a guess: 1 / K for the teacher with the most classes; None if the record knows no teacher's."""
    counts = [teacher["n_classes"] for teacher in record.get("teachers", []) if teacher.get("n_classes")]
    return 1 / max(counts) if counts else None


def reason(evidence: Evidence, records: Sequence[dict[str, Any]], before: str | None, budgets: Sequence[Budget]) -> str:
    """Why the evidence does not count, in plain words; empty if it does.

    A row works if its accuracy is ten points or more above chance and above that of the student before it learned.
    Rows that are judged by another measure, seconds for instance, need an accuracy as well, where the record has it.
    What asks a row to be better than the teacher is no fair question either.

    Args:
        before: key of the untaught student's accuracy.
        budgets: which name the teacher.
    """
    for key in filter(None, (evidence.metric, None if evidence.control else evidence.than, evidence.of)):
        row, accuracy = key.split("/")[1].removesuffix(" #*"), _accuracy_of(key)
        values, guesses = _values(accuracy, records), [c for r in records if (c := chance(r)) is not None]
        if not values or not guesses:
            continue
        mean = statistics.fmean(values)
        if mean < statistics.fmean(guesses) + ABOVE_CHANCE:
            return f"{row} is less than ten points above chance"
        learned = _values(before, records) if before else []
        if learned and not is_reference(key) and accuracy != before and mean <= statistics.fmean(learned):
            return f"{row} is no better than the student before it learned"
    return _more_than_the_teacher(evidence, records, budgets)


def _accuracy_of(key: str) -> str:
    experiment, row, _ = key.split("/")
    return key if is_accuracy(key) else f"{experiment}/{row}/accuracy"


def _values(key: str, records: Sequence[dict[str, Any]]) -> list[float]:
    """The metric of all records, of all repeats where the key has "#*"; what diverged counts as 0."""
    found = []
    pattern = re.escape(key).replace(re.escape("#*"), r"#\d+")
    for record in records:
        for name, value in record["metrics"].items():
            if re.fullmatch(pattern, name):
                found.append(value or 0.0)
    return found


def _more_than_the_teacher(evidence: Evidence, records: Sequence[dict[str, Any]], budgets: Sequence[Budget]) -> str:
    if evidence.at_least <= 0 or evidence.of or not is_accuracy(evidence.metric):
        return ""
    theirs = statistics.fmean(_values(evidence.than, records) or [0.0]) if evidence.than else 0.0
    for budget in budgets:
        teachers = _values(budget.teacher, records)
        same = budget.teacher.split("/")[0] == evidence.metric.split("/")[0]
        if teachers and same and theirs + evidence.at_least > statistics.fmean(teachers):
            return "it asks for more than the teacher has"
    return ""
