"""What a paper claims and published, and what our records say about it.

The facts come from the paper's card, `book/papers/<id>.yml`.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import yaml

from ..errors import DamagedFile, unknown
from ..locations import book_root
from . import display

if TYPE_CHECKING:
    import pandas as pd

Record = dict[str, Any]
Ruling = Literal["holds", "does not hold", "undecided", "not tested here"]
Cell = tuple[float, float | None] | None
Item = TypeVar("Item")
REPEAT = "#*"


@dataclass(frozen=True)
class Evidence:
    """What a run must show: `metric`, less `than` or divided by `of`, is `at_least` a value.

    All three are keys of a record's metrics, `<experiment>/<row>/<measure>`. In a key, `#*` stands for the number of
    a repeat, such as a draw of images, from #0 on; then each repeat within a run counts by itself.
    """

    metric: str
    at_least: float = 0.0
    than: str | None = None
    of: str | None = None

    @property
    def metrics(self) -> list[str]:
        """The keys that a record must have to count."""
        return [key for key in (self.metric, self.than, self.of) if key]


@dataclass(frozen=True)
class Claim:
    """One claim, in our words. Without evidence it cannot be tested here, and `why` says why."""

    id: str
    text: str
    where: str
    evidence: tuple[Evidence, ...]
    why: str = ""


@dataclass(frozen=True)
class PublishedTable:
    """A table of the paper: `rows[label][dataset]` is (mean, standard deviation or None).

    A cell of None means that the source reports a failure; a dataset that a row lacks was not reported.

    Attributes:
        columns: {dataset: the paper's name for it}.
        ours: {label: the row's name in our records}.
        parameter: the chapter's parameter that names the dataset.
    """

    id: str
    source: str
    experiment: str
    measure: str
    parameter: str
    columns: dict[str, str]
    rows: dict[str, dict[str, Cell]]
    ours: dict[str, str]


@dataclass(frozen=True)
class Paper:
    """A paper card.

    Attributes:
        code: the official repository on GitHub, OWNER/NAME, or None.
        chapters: the chapters whose runs bear on its claims; the first one tells the paper.
    """

    id: str
    title: str
    authors: tuple[str, ...]
    year: int
    venue: str
    arxiv: str
    code: str | None
    credits: tuple[str, ...]
    chapters: tuple[str, ...]
    tables: tuple[PublishedTable, ...]
    claims: tuple[Claim, ...]

    def table(self, id: str) -> PublishedTable:
        """A published table by its id."""
        return _named("published table", id, {table.id: table for table in self.tables})

    def claim(self, id: str) -> Claim:
        """A claim by its id."""
        return _named("claim", id, {claim.id: claim for claim in self.claims})


@dataclass(frozen=True)
class Verdict:
    """What `n` records, or the `n` repeats within them, say of a claim, with the figures in words."""

    verdict: Ruling
    figures: str
    n: int


def paper_ids() -> list[str]:
    """The papers that have a card."""
    return sorted(path.stem for path in (book_root() / "papers").glob("*.yml"))


def paper(id: str) -> Paper:
    """Read a paper card.

    Raises:
        InputError: there is no such card.
        DamagedFile: the card is malformed; the message names the file and the key.
    """
    known = paper_ids()
    if id not in known:
        raise unknown("paper", id, known)
    return read_card(book_root() / "papers" / f"{id}.yml")


def published(paper_id: str, table: str, dataset: str) -> pd.DataFrame:
    """One column of a published table: `method`, `mean`, `std`, as fractions; a reported failure is NaN."""
    import pandas as pd

    source = paper(paper_id).table(table)
    if dataset not in source.columns:
        raise unknown(f"dataset of {source.source}", dataset, source.columns)
    cells = {label: row[dataset] or (math.nan, None) for label, row in source.rows.items() if dataset in row}
    means = [mean for mean, _ in cells.values()]
    stds = [math.nan if std is None else std for _, std in cells.values()]
    return pd.DataFrame({"method": list(cells), "mean": means, "std": stds})


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


def claims_table(paper_id: str, records: Sequence[Record]) -> pd.DataFrame:
    """Each claim with the verdict of records that differ by seed: claim, where, verdict, figures."""
    import pandas as pd

    rows = []
    for claim in paper(paper_id).claims:
        verdict = judge(claim, records)
        rows.append((claim.text, claim.where, verdict.verdict, verdict.figures))
    return pd.DataFrame(rows, columns=["claim", "where", "verdict", "figures"])


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


def _named(kind: str, id: str, items: dict[str, Item]) -> Item:
    if id not in items:
        raise unknown(kind, id, items)
    return items[id]


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


def read_card(path: Path) -> Paper:
    """Read and check the paper card at `path`.

    Raises:
        DamagedFile: it is malformed; the message names the file and the key.
    """
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise DamagedFile(f"{path} is not valid YAML: {' '.join(str(e).split())}") from e
    card = _Fields(loaded, str(path))
    read = Paper(
        id=card.take("id", str),
        title=card.take("title", str),
        authors=tuple(card.take("authors", list)),
        year=card.take("year", int),
        venue=card.take("venue", str),
        arxiv=card.take("arxiv", str),
        code=card.take("code", (str, type(None))),
        credits=tuple(card.take("credits", list)),
        chapters=tuple(card.take("chapters", list)) if "chapters" in card.left else (path.stem,),
        tables=tuple(_table(fields) for fields in card.each("tables")),
        claims=tuple(_claim(fields) for fields in card.each("claims")),
    )
    card.done()
    if read.id != path.stem:
        raise card.wrong("id", f"must be {path.stem!r}, as the file is named")
    return read


class _Fields:
    """Takes keys out of a mapping of a card, and says which one is missing, wrong or unknown."""

    def __init__(self, mapping: Any, at: str) -> None:
        self.at = at
        if not isinstance(mapping, dict):
            raise DamagedFile(f"{at}: expected keys and values, got {mapping!r}")
        self.left = dict(mapping)

    def wrong(self, key: str, problem: str) -> DamagedFile:
        return DamagedFile(f"{self.at}: key {key!r} {problem}")

    def take(self, key: str, kind: Any) -> Any:
        if key not in self.left:
            raise self.wrong(key, "is missing")
        value = self.left.pop(key)
        if not isinstance(value, kind):
            names = [k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,))]
            raise self.wrong(key, f"must be {' or '.join(names)}, got {value!r}")
        return value

    def number(self, key: str) -> float:
        return float(self.take(key, (int, float)))

    def metric(self, key: str) -> str:
        value = str(self.take(key, str))
        if value.count("/") != 2:
            raise self.wrong(key, f"must be <experiment>/<row>/<measure>, got {value!r}")
        return value

    def each(self, key: str) -> list[_Fields]:
        return [_Fields(item, f"{self.at}: {key}[{i}]") for i, item in enumerate(self.take(key, list))]

    def done(self) -> None:
        for key in self.left:
            raise self.wrong(str(key), "is not known here")


def _table(fields: _Fields) -> PublishedTable:
    table = PublishedTable(
        id=fields.take("id", str),
        source=fields.take("source", str),
        experiment=fields.take("experiment", str),
        measure=fields.take("measure", str),
        parameter=fields.take("parameter", str),
        columns=fields.take("columns", dict),
        rows=_rows(fields),
        ours=fields.take("ours", dict),
    )
    for label, row in table.rows.items():
        for dataset in row.keys() - table.columns.keys():
            raise fields.wrong("rows", f"has {dataset!r} in row {label!r}, which is not among the columns")
    for label in table.ours.keys() - table.rows.keys():
        raise fields.wrong("ours", f"names {label!r}, which is not a row")
    fields.done()
    return table


def _rows(fields: _Fields) -> dict[str, dict[str, Cell]]:
    rows: dict[str, dict[str, Cell]] = {}
    for label, row in fields.take("rows", dict).items():
        cells = _Fields(row, f"{fields.at}: rows: {label}")
        rows[label] = {dataset: _cell(cells, dataset) for dataset in row}
    return rows


def _cell(cells: _Fields, dataset: str) -> Cell:
    value = cells.take(dataset, (list, type(None)))
    if value is None:
        return None
    if len(value) != 2 or not isinstance(value[0], float) or not isinstance(value[1], float | None):
        raise cells.wrong(dataset, f"must be [mean, standard deviation or null], got {value!r}")
    return value[0], value[1]


def _claim(fields: _Fields) -> Claim:
    id, text, where = (fields.take(key, str) for key in ("id", "text", "where"))
    evidence = fields.take("evidence", (dict, list, type(None)))
    items = evidence if isinstance(evidence, list) else [evidence] if evidence else []
    pieces = tuple(_evidence(_Fields(item, f"{fields.at}: evidence[{i}]")) for i, item in enumerate(items))
    why = "" if pieces else fields.take("why", str)
    fields.done()
    return Claim(id, text, where, pieces, why)


def _evidence(fields: _Fields) -> Evidence:
    if "greater" in fields.left:
        by = fields.number("by") if "by" in fields.left else 0.0
        evidence = Evidence(fields.metric("greater"), by, than=fields.metric("than"))
    elif "ratio" in fields.left:
        evidence = Evidence(fields.metric("ratio"), fields.number("at_least"), of=fields.metric("of"))
    else:
        evidence = Evidence(fields.metric("metric"), fields.number("at_least"))
    fields.done()
    return evidence
