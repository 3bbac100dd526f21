"""What records say of a claim, by rules that hold for all: verdict and figures in words.

A verdict needs rows that work (:mod:`.floors`), more than one run could differ by, and says at which share of the
paper's budget it was reached (:mod:`.budgets`).
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from . import budgets, display, floors
from .cards import Budget, Claim, Evidence

Record = dict[str, Any]
Ruling = Literal[
    "holds", "holds in part", "does not hold", "not reached at this budget", "undecided", "not tested here"
]
# The first of these that a piece of evidence has is the claim's.
_RANKING: tuple[Ruling, ...] = (
    "does not hold", "not reached at this budget", "not tested here", "undecided", "holds in part",
)  # fmt: skip
REPEAT = "#*"


@dataclass(frozen=True)
class Verdict:
    """What `n` records, or the `n` repeats within them, say of a claim.

    Attributes:
        figures: what was compared, in words, or why nothing could be.
        terms: at which share of the paper's budget, from which teacher; empty where neither is known.
        share: that share, if it is known.
        n: 0 where the claim was not tested.
    """

    verdict: Ruling
    figures: str
    n: int
    terms: str = ""
    share: float | None = None

    @property
    def words(self) -> str:
        """Figures and terms in one line."""
        return "; ".join(filter(None, (self.figures, self.terms)))


def judge(
    claim: Claim,
    records: Sequence[Record],
    paper_budgets: Sequence[Budget] = (),
    spreads: Mapping[str, float] | None = None,
) -> Verdict:
    """What records that differ by seed alone say of a claim.

    Each record gives a margin over what is asked, or each of its repeats does where the evidence asks for them.
    The piece of evidence *holds* if the mean margin exceeds 0 by more than its standard error, fails if it falls
    short by more than that, and is *undecided* in between. It *holds in part* if a lead is there by that rule but
    not by the number of points asked. A single margin is undecided while it is smaller than what runs of
    other seeds differ by. It is *not tested here* if a row that is compared does not work, see :mod:`.floors`. What
    fails is *not reached at this budget* rather than *does not hold* if the run spent less than a tenth of the
    paper's budget or had a teacher more than five points weaker. Every piece of the evidence must hold. A record
    without the metrics does not count; a metric that is null diverged and counts as 0.

    Args:
        paper_budgets: those of the claim's card.
        spreads: {metric: its standard deviation over seeds elsewhere}, see :func:`spreads_of`.
    """
    if not claim.evidence:
        return Verdict("not tested here", claim.why, 0)
    if claim.only:
        records = [record for record in records if claim.only.items() <= record["parameters"].items()]
    parts = []
    for evidence in claim.evidence:
        part = _judge(evidence, records, spreads or {})
        reason = floors.reason(evidence, records, claim.before, paper_budgets) if part.n else ""
        parts.append(Verdict("not tested here", f"{reason}: {part.figures}", 0) if reason else part)
    for need in claim.needs if any(part.n for part in parts) else ():
        met = _judge(need.evidence, records, {})
        if met.verdict != "holds":
            return Verdict("not tested here", f"{need.otherwise}: {met.figures}", 0)
    verdict: Ruling = next((r for r in _RANKING if any(part.verdict == r for part in parts)), "holds")
    n = 0 if verdict == "not tested here" else min(part.n for part in parts if part.n)
    told = [part for part in parts if part.n == 0] if n == 0 else parts
    terms = budgets.terms(claim, records, paper_budgets) if n else budgets.Terms()
    if verdict == "does not hold" and terms.small:
        verdict = "not reached at this budget"
    return Verdict(verdict, "; ".join(dict.fromkeys(part.figures for part in told)), n, terms.words, terms.share)


def spreads_of(groups: Iterable[Sequence[Record]]) -> dict[str, float]:
    """{metric: the largest standard deviation over seeds that any group of runs shows for it}.

    The key "" holds the median of those of all accuracies, for rows that were never repeated; absent if none was.
    """
    found: dict[str, float] = {}
    for records in groups:
        for key in dict.fromkeys(key for record in records for key in record["metrics"]):
            values = [v for record in records if (v := record["metrics"].get(key)) is not None]
            if len(values) > 1:
                found[key] = max(found.get(key, 0.0), statistics.stdev(values))
    of_accuracies = [sd for key, sd in found.items() if floors.is_accuracy(key) and not floors.is_reference(key)]
    return found | ({"": statistics.median(of_accuracies)} if of_accuracies else {})


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


def _judge(evidence: Evidence, records: Sequence[Record], spreads: Mapping[str, float]) -> Verdict:
    found = [_repeats(evidence, record["metrics"]) for record in records]
    values = list(itertools.chain(*found))
    n = len(values)
    if not n:
        return Verdict("not tested here", "no run has these measures", 0)
    margins = [_margin(evidence, value) for value in values]
    error = spread(margins)[1] / math.sqrt(n) if n > 1 else _of_one_run(evidence, values[0], spreads)
    verdict = _ruling(statistics.fmean(margins), error)
    asks_for_points = evidence.than and evidence.at_least > 0
    if verdict == "does not hold" and asks_for_points:
        lead = statistics.fmean(margins) + evidence.at_least
        verdict = "holds in part" if _ruling(lead, error) == "holds" else verdict
    compared = evidence.than and not evidence.at_least
    if compared and ((n == 1 and _reads_the_same(evidence, values[0])) or not any(margins)):
        verdict = "undecided"
    count = seeds(sum(map(bool, found)))
    if _has_repeats(evidence):
        count = f"{n} repeat{'s' * (n != 1)}, {count}"
    return Verdict(verdict, f"{_figures(evidence, values)}, {count}", n)


def _ruling(margin: float, error: float) -> Ruling:
    if error and -error <= margin <= error:
        return "undecided"
    return "holds" if margin >= 0 else "does not hold"


def _of_one_run(evidence: Evidence, value: dict[str, float | None], spreads: Mapping[str, float]) -> float:
    """How much the margin of a single run is likely to differ from that of another seed; 0 where nothing is known."""
    usual = spreads.get("", 0.0) if floors.is_accuracy(evidence.metric) else 0.0
    apart = [spreads.get(key, 0.0 if floors.is_reference(key) else usual) for key in evidence.metrics]
    if evidence.of:  # a quotient a/b: its parts differ by da/b and by a/b times db/b
        whole = value[evidence.of] or 1.0
        apart = [apart[0] / whole, (value[evidence.metric] or 0.0) / whole * apart[1] / whole]
    return math.hypot(*apart)


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
    if evidence.at_most is not None:
        return round(evidence.at_most - margin, 9)
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
