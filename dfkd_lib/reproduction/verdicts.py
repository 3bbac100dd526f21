"""What records say of a claim: holds, does not hold, undecided, not tested here; and their figures in words."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from . import display
from .cards import Claim, Evidence

Record = dict[str, Any]
Ruling = Literal["holds", "does not hold", "undecided", "not tested here"]
REPEAT = "#*"


@dataclass(frozen=True)
class Verdict:
    """What `n` records, or the `n` repeats within them, say of a claim, with the figures in words."""

    verdict: Ruling
    figures: str
    n: int


def judge(claim: Claim, records: Sequence[Record]) -> Verdict:
    """What records that differ by seed alone say of a claim.

    Each record gives a margin, or each of its repeats does where the evidence asks for them. The claim holds if the
    mean margin exceeds 0 by more than its standard error, does not hold if it falls short by more than that, and is
    undecided in between. A single margin decides by its sign, unless the two figures that are compared read the same
    in print: then it is undecided. Every piece of the evidence must hold. A record without the metrics does not
    count; a metric that is null diverged and counts as 0.
    """
    if not claim.evidence:
        return Verdict("not tested here", claim.why, 0)
    parts = [_judge(evidence, records) for evidence in claim.evidence]
    ranking: tuple[Ruling, ...] = ("does not hold", "not tested here", "undecided")
    verdict: Ruling = next((r for r in ranking if any(part.verdict == r for part in parts)), "holds")
    figures = "; ".join(dict.fromkeys(part.figures for part in parts))
    return Verdict(verdict, figures, min(part.n for part in parts))


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (0 for a single value)."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def percent(values: Sequence[float | None], unit: str = "") -> str:
    """Fractions over seeds as "98.3 ± 0.1", or "98.3" for a single one; None is a run that diverged.

    The mean is that of the runs that came to an end; how many did not is said behind it.
    """
    finite = [value for value in values if value is not None]
    diverged = len(values) - len(finite)
    if not finite:
        return "diverged" if diverged else ""
    mean, sd = spread(finite)
    text = display.percent(mean, sd if len(finite) > 1 else None) + unit
    return f"{text}, {diverged} of {len(values)} diverged" if diverged else text


def seeds(n: int) -> str:
    """ "1 seed", "3 seeds"."""
    return f"{n} seed{'s' * (n != 1)}"


def _judge(evidence: Evidence, records: Sequence[Record]) -> Verdict:
    found = [_repeats(evidence, record["metrics"]) for record in records]
    values = list(itertools.chain(*found))
    n = len(values)
    if not n:
        return Verdict("not tested here", "no run has these measures", 0)
    mean, sd = spread([_margin(evidence, value) for value in values])
    error = sd / math.sqrt(n)
    tie = n == 1 and evidence.than and not evidence.at_least and _reads_the_same(evidence, values[0])
    tie = tie or (mean == error == 0 and evidence.than and not evidence.at_least)
    if tie or (error and -error <= mean <= error):
        verdict: Ruling = "undecided"
    else:
        verdict = "holds" if mean >= 0 else "does not hold"
    count = seeds(sum(map(bool, found)))
    if _has_repeats(evidence):
        count = f"{n} repeat{'s' * (n != 1)}, {count}"
    return Verdict(verdict, f"{_figures(evidence, values)}, {count}", n)


def _repeats(evidence: Evidence, metrics: dict[str, float | None]) -> list[dict[str, float | None]]:
    """The figures that the evidence compares, once for a run, or once for each repeat within it."""
    found: list[dict[str, float | None]] = []
    for i in itertools.count() if _has_repeats(evidence) else (0,):
        keys = {key: key.replace(REPEAT, f"#{i}") for key in evidence.metrics}
        if not metrics.keys() >= set(keys.values()) or (evidence.of and not metrics[keys[evidence.of]]):
            break
        found.append({key: metrics[place] for key, place in keys.items()})
    return found


def _has_repeats(evidence: Evidence) -> bool:
    return any(REPEAT in key for key in evidence.metrics)


def _margin(evidence: Evidence, value: dict[str, float | None]) -> float:
    """How far above the bound a run is, 0 for what diverged; rounded, so that equality meets the bound."""
    margin = value[evidence.metric] or 0.0
    if evidence.than:
        margin -= value[evidence.than] or 0.0
    if evidence.of:
        margin /= value[evidence.of] or 1.0
    return round(margin - evidence.at_least, 9)


def _reads_the_same(evidence: Evidence, value: dict[str, float | None]) -> bool:
    return len({_amount(key, [value[key]]) for key in evidence.metrics}) == 1


def _figures(evidence: Evidence, values: Sequence[dict[str, float | None]]) -> str:
    texts = {}
    for key in evidence.metrics:
        found = [value[key] for value in values]
        if _has_repeats(evidence) and REPEAT not in key:  # one figure for all repeats of a run
            found = list(dict.fromkeys(found))
        texts[key] = f"{key.split('/')[1].removesuffix(' ' + REPEAT)} {_amount(key, found)}"
    ours = texts[evidence.metric]
    if evidence.than:
        return f"{ours} against {texts[evidence.than]}"
    if evidence.of:
        ratios = [(value[evidence.metric] or 0.0) / (value[evidence.of] or 1.0) for value in values]
        ratio = _seconds(ratios, " times") if evidence.of.endswith("seconds") else percent(ratios, " %")
        return f"{ours} of {texts[evidence.of]}, a ratio of {ratio}"
    return ours


def _amount(key: str, values: Sequence[float | None]) -> str:
    """Values of a metric in words: a bare number where the measure is called `value`, else seconds or percent."""
    if key.endswith("seconds"):
        return _seconds([value or 0.0 for value in values], " s")
    if not key.endswith("/value"):
        return percent(values, " %")
    mean, sd = spread([value or 0.0 for value in values])
    return f"{mean:.2g} ± {sd:.1g}" if sd else f"{mean:.2g}"


def _seconds(values: Sequence[float], unit: str) -> str:
    mean, sd = spread(values)
    return f"{mean:.3g} ± {sd:.2g}{unit}" if sd else f"{mean:.3g}{unit}"
