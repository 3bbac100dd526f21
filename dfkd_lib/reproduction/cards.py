"""Paper cards, `book/papers/<id>.yml`: what they hold, and reading them strictly."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml

from ..errors import DamagedFile, unknown

Cell = tuple[float, float | None] | None
Item = TypeVar("Item")


@dataclass(frozen=True)
class Evidence:
    """What a run must show: `metric`, less `than` or divided by `of`, is `at_least` a value, or `at_most` one.

    All three are keys of a record's metrics, `<experiment>/<row>/<measure>`. In a key, `#*` stands for the number of
    a repeat, such as a draw of images, from #0 on; then each repeat within a run counts by itself.

    Attributes:
        control: `than` is a negative control, such as an untrained generator: it may well be at chance.
    """

    metric: str
    at_least: float = 0.0
    than: str | None = None
    of: str | None = None
    at_most: float | None = None
    control: bool = False

    @property
    def metrics(self) -> list[str]:
        """The keys that a record must have to count."""
        return [key for key in (self.metric, self.than, self.of) if key]


@dataclass(frozen=True)
class Need:
    """What the rows of reference must show before a claim can be tested, and the reason to give `otherwise`."""

    evidence: Evidence
    otherwise: str


@dataclass(frozen=True)
class Claim:
    """One claim, in our words. Without evidence it cannot be tested here, and `why` says why.

    Attributes:
        needs: without these the claim is not tested.
        before: key of the student's accuracy before it learned, above which the compared rows have to be.
        tuned: what of the claim's set-up was chosen while its outcome was in view; empty if nothing was.
        only: {parameter: value} of the runs that bear on the claim; empty if all do.
    """

    id: str
    text: str
    where: str
    evidence: tuple[Evidence, ...]
    why: str = ""
    needs: tuple[Need, ...] = ()
    before: str | None = None
    tuned: str = ""
    only: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Budget:
    """What the paper spent, and where a record of one chapter says what we spent.

    Attributes:
        experiments: to which of the chapter's experiments this applies; all, if empty.
        counted: what is counted, in words.
        ours: parameters of the chapter, or metrics of its records, whose product is our number; a list counts as its
            sum.
        theirs: {dataset: the paper's number}; "any" stands for the datasets that are not named.
        dataset: the parameter that names the dataset.
        teacher: key of our teacher's measure.
        published: {dataset: that measure of the paper's teacher}.
    """

    chapter: str
    experiments: tuple[str, ...]
    counted: str
    ours: tuple[str, ...]
    theirs: dict[str, float]
    dataset: str
    teacher: str
    published: dict[str, float]


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
    budgets: tuple[Budget, ...] = ()

    def table(self, id: str) -> PublishedTable:
        """A published table by its id."""
        return _named("published table", id, {table.id: table for table in self.tables})

    def claim(self, id: str) -> Claim:
        """A claim by its id."""
        return _named("claim", id, {claim.id: claim for claim in self.claims})


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
        budgets=tuple(_budget(fields) for fields in card.each("budgets")) if "budgets" in card.left else (),
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

    def optional(self, key: str, kind: Any, default: Any) -> Any:
        return self.take(key, kind) if key in self.left else default

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
    needs = tuple(_need(need) for need in fields.each("needs")) if "needs" in fields.left else ()
    before = fields.metric("before") if "before" in fields.left else None
    tuned, only = fields.optional("tuned", str, ""), fields.optional("only", dict, {})
    fields.done()
    return Claim(id, text, where, pieces, why, needs, before, tuned, only)


def _need(fields: _Fields) -> Need:
    otherwise = fields.take("otherwise", str)
    return Need(_evidence(fields), otherwise)


def _evidence(fields: _Fields) -> Evidence:
    if "greater" in fields.left:
        by = fields.number("by") if "by" in fields.left else 0.0
        control = fields.optional("control", bool, False)
        evidence = Evidence(fields.metric("greater"), by, than=fields.metric("than"), control=control)
    elif "ratio" in fields.left:
        evidence = Evidence(fields.metric("ratio"), fields.number("at_least"), of=fields.metric("of"))
    elif "at_most" in fields.left:
        evidence = Evidence(fields.metric("metric"), at_most=fields.number("at_most"))
    else:
        evidence = Evidence(fields.metric("metric"), fields.number("at_least"))
    fields.done()
    return evidence


def _budget(fields: _Fields) -> Budget:
    budget = Budget(
        chapter=fields.take("chapter", str),
        experiments=tuple(fields.optional("experiments", list, [])),
        counted=fields.take("counted", str),
        ours=tuple(fields.take("ours", list)),
        theirs=fields.take("theirs", dict),
        dataset=fields.optional("dataset", str, "dataset"),
        teacher=fields.metric("teacher"),
        published=fields.take("published", dict),
    )
    fields.done()
    return budget


def _named(kind: str, id: str, items: dict[str, Item]) -> Item:
    if id not in items:
        raise unknown(kind, id, items)
    return items[id]
