"""How much of a paper's budget a run spent, and how its teacher compares: the terms of a verdict."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .cards import Budget, Claim

SMALL_SHARE = 0.1
WEAKER_TEACHER = 0.05


@dataclass(frozen=True)
class Terms:
    """The terms of a verdict in words, whether they are too small for a negative one, and the share spent if known."""

    words: str = ""
    small: bool = False
    share: float | None = None


def terms(claim: Claim, records: Sequence[dict[str, Any]], budgets: Sequence[Budget]) -> Terms:
    """At which share of the paper's budget, and from which teacher, records that differ by seed test a claim."""
    experiments = {evidence.metric.split("/")[0] for evidence in claim.evidence}
    for budget in budgets if records else ():
        fits = budget.chapter == records[0]["chapter"]
        if fits and (not budget.experiments or experiments <= set(budget.experiments)):
            return _terms(budget, records)
    return Terms()


def share(budget: Budget, record: dict[str, Any]) -> float | None:
    """Our number over the paper's; None where the card does not know it for this dataset."""
    known = record["parameters"] | record["metrics"]
    theirs = budget.theirs.get(str(known.get(budget.dataset)), budget.theirs.get("any"))
    if not theirs or any(known.get(name) is None for name in budget.ours):
        return None
    numbers = [known[name] for name in budget.ours]
    return math.prod(sum(number) if isinstance(number, list) else number for number in numbers) / theirs


def _terms(budget: Budget, records: Sequence[dict[str, Any]]) -> Terms:
    words, small = [], False
    spent = share(budget, records[0])
    if spent is not None:
        words.append(f"at {_percent(spent)} of the paper's {budget.counted}")
        small = spent < SMALL_SHARE
    ours = [v for r in records if (v := r["metrics"].get(budget.teacher)) is not None]
    theirs = budget.published.get(str(records[0]["parameters"].get(budget.dataset)))
    if ours and theirs:
        mean = statistics.fmean(ours)
        words.append(f"teacher {100 * mean:.1f} of {100 * theirs:.1f}")
        small = small or theirs - mean > WEAKER_TEACHER
    return Terms(", ".join(words), small, spent)


def _percent(share: float) -> str:
    """Two figures below 10 %, whole percents above."""
    return f"{100 * share:.0f} %" if share >= 0.0995 else f"{100 * share:.2g} %"
