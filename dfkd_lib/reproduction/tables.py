"""The book's tables, aggregated from records: for the pages across papers and for `dfkd results`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .. import records
from ..locations import repository_root
from . import verdicts
from .cards import Budget, Cell, Claim, Paper
from .display import percent
from .papers import paper, paper_ids
from .site import toc_files
from .verdicts import Record, Verdict, judge, seeds, spread, spreads_of

if TYPE_CHECKING:
    import pandas as pd

_DATASETS = {
    "mnist": "MNIST", "cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "digits": "handwritten digits",
    "agnews": "AG News", "agnews_order": "AG News in order or shuffled", "dbpedia": "DBPedia", "imdb": "IMDb",
    "camvid": "CamVid",
    "digit_sentences": "digits as sentences", "digit_scenes": "scenes of digits",
}  # fmt: skip
_LENGTHS = {"updates": ("n_updates",), "iterations": ("n_steps", "scene_steps"), "batches": ("batches",)}
_APART = ("seed", "device", "threads", "out")


@dataclass(frozen=True)
class Table:
    """A table of texts, as it is shown.

    Attributes:
        kind: "results", "smoke" for those of smoke runs, or "claims".
    """

    kind: str
    caption: str
    frame: pd.DataFrame


def latest(found: Iterable[Record]) -> list[Record]:
    """The records without those that a later run of the same chapter and parameters replaces."""
    kept: dict[str, Record] = {}
    for record in sorted(found, key=lambda record: str(record["finished"])):
        values = {k: v for k, v in record["parameters"].items() if k != "out"} | {"seed": record["seed"]}
        kept[repr((record["chapter"], record["profile"], sorted(values.items())))] = record
    return sorted(kept.values(), key=lambda record: (record["chapter"], str(record["folder"])))


def under(folders: Iterable[Path]) -> list[Record]:
    """The latest record of each run under some folders."""
    return latest(records.read(path.parent) for folder in folders for path in sorted(folder.rglob("record.json")))


def results(found: Sequence[Record]) -> list[Table]:
    """Our figures beside the published ones, then the chapters that tell no paper of their own.

    The first have one table for each paper, group of runs and experiment; the second one for each experiment and
    dataset, the methods down and the pairs of teacher and student across. Cells are mean ± standard deviation over
    the seeds; the caption has their number, or the cell where it differs.
    """
    tables = []
    cards = in_order()
    for card in cards:
        for runs in records.group(_of(found, card.chapters)).values():
            where = "" if runs[0]["chapter"] == card.chapters[0] else f"chapter {runs[0]['chapter']}, "
            for experiment, measure in {table.experiment: table.measure for table in card.tables}.items():
                frame = comparison(card.id, experiment, runs, measure)
                pair = f", {_pair(runs[0])}" if _pair(runs[0]) and experiment != "segmentation" else ""
                scale = f"{where}{scale_in_words(runs[0], experiment)}{pair}, {seeds(len(runs))}"
                caption = f"{card.title}, {experiment}: {measure} in percent ({scale})"
                if len(frame):
                    tables.append(Table(_kind(runs), caption, frame))
    told = {card.chapters[0] for card in cards if card.chapters[0] == card.id}
    for chapter in sorted({record["chapter"] for record in found} - told):
        tables += _across_pairs(chapter, _of(found, [chapter]))
    return sorted(tables, key=lambda table: table.kind == "smoke")


def claims(found: Sequence[Record], chapter: str = "") -> list[Table]:
    """Each claim of each paper, with its verdict at the largest scale at which a run tested it.

    Args:
        chapter: papers that this chapter's runs bear on alone; by default all.
    """
    return [
        Table("claims", _citation(card), claims_of(card, found))
        for card in in_order()
        if not chapter or chapter in card.chapters
    ]


def in_order() -> list[Paper]:
    """The paper cards, in the reading order of the chapters that tell them; by name in an installed package."""
    root = repository_root()
    order = [path.stem for path in toc_files(root)] if root else []
    cards = [paper(id) for id in paper_ids()]
    return sorted(cards, key=lambda card: order.index(card.chapters[0]) if card.chapters[0] in order else len(order))


def claims_of(card: Paper, found: Sequence[Record]) -> pd.DataFrame:
    """The claims of a paper, each at the largest scale at which a run tested it: claim, where, verdict, figures."""
    import pandas as pd

    groups = records.group(_of(found, card.chapters))
    rows = []
    for claim in card.claims:
        run, verdict = at_largest_scale(claim, groups, card.budgets)
        scale = ""
        if run:
            chapter = groups[run][0]["chapter"]
            scale = scale_in_words(groups[run][0]) + (f" (chapter {chapter})" if chapter != card.chapters[0] else "")
        figures = [verdict.figures, scale, verdict.terms]
        if claim.tuned and run:
            figures.append(f"chosen with the outcome in view: {claim.tuned}")
        rows.append((claim.text, claim.where, verdict.verdict, "; ".join(filter(None, figures))))
    return pd.DataFrame(rows, columns=["claim", "where", "verdict", "figures"])


def at_largest_scale(
    claim: Claim, groups: Mapping[str, Sequence[Record]], budgets: Sequence[Budget] = ()
) -> tuple[str, Verdict]:
    """The largest of the groups whose records test the claim, and what they say.

    Groups come with the largest scale first. Of those of one scale and the same data the longest run counts, the first
    of equals. Smoke runs check the code and decide nothing. Where no other run tests the claim, why the largest one
    that has the measures does not.
    """
    spreads = spreads_of(groups.values())
    unmeasured = judge(claim, [])
    why, found = unmeasured, list[tuple[str, Verdict, Record]]()
    for label, runs in groups.items():
        if records.scale(runs[0]) == "smoke" or (found and not _alike(found[0][2], runs[0])):
            continue
        verdict = judge(claim, runs, budgets, spreads)
        if verdict.n:
            found.append((label, verdict, runs[0]))
        why = verdict if why == unmeasured else why
    return max(found, key=lambda one: records.length(one[2]))[:2] if found else ("", why)


def _alike(one: Record, other: Record) -> bool:
    return records.scale(one) == records.scale(other) and records.tested_on(one) == records.tested_on(other)


def scale_in_words(record: Record, experiment: str = "") -> str:
    """Data, image size and length of a run as a reader would say them, such as "MNIST at 28x28, 1,200 updates".

    Args:
        experiment: which of the run's; by default what most of it is about.
    """
    given = record["parameters"]
    segments = "scene_height" in given and (experiment == "segmentation" or given.get("parts") == ["segmentation"])
    name = str(given.get("scenes" if segments else "dataset", ""))
    words = [_DATASETS.get(name, name)]
    if (classes := given.get("classes")) and not segments:
        words[0] = f"{len(classes)} classes of {words[0]}"
    if segments:
        words[0] += f" at {given['scene_height']}x{given['scene_width']}"
    elif size := given.get("image_size"):
        words[0] += f" at {size}x{size}"
    alone = {"iterations": ("target_steps",)} if given.get("parts") == ["B"] else _LENGTHS  # of the amalgamation
    for unit, names in alone.items():
        if found := [given[n] for n in names if isinstance(given.get(n), int) and segments == n.startswith("scene_")]:
            words.append(f"{found[0]:,} {unit}")
            break
    return ", ".join(filter(None, words))


def comparison(paper_id: str, experiment: str, runs: Sequence[Record], measure: str = "") -> pd.DataFrame:
    """Figures of one experiment beside the published ones, in percent.

    Args:
        runs: records that differ by seed alone.
        measure: which figure of each row; by default what the card's first table of the experiment shows.

    Returns:
        method, final, best, and one column for each published table that has the runs' dataset. Where the
        paper names a method otherwise than our chapter does, its name follows in brackets. No rows if nothing
        but the teacher was measured.
    """
    import pandas as pd

    measure = measure or next(table.measure for table in paper(paper_id).tables if table.experiment == experiment)
    keys = dict.fromkeys(key for run in runs for key in run["metrics"])
    rows = [(key.split("/")[1], key) for key in keys if key.split("/")[::2] == [experiment, measure]]
    if {row for row, _ in rows} == {"teacher"}:
        rows = []
    columns = {
        heading: {row: verdicts.percent([run[part][key] for run in runs if key in run[part]]) for row, key in rows}
        for heading, part in (("final", "metrics"), ("best", "best"))
    }
    names: dict[str, str] = {}
    for table in paper(paper_id).tables if rows else ():
        dataset = str(runs[0]["parameters"].get(table.parameter))
        if (table.experiment, table.measure) != (experiment, measure) or dataset not in table.columns:
            continue
        for label, cells in table.rows.items():
            row = table.ours.get(label, label)
            names.setdefault(row, row if row.lower() == label.lower() else f"{row} ({label})")
            if dataset in cells:
                column = columns.setdefault(f"{table.source}, {table.columns[dataset]}", {})
                column[row] = _theirs(cells[dataset])
    names |= {row: names.get(row, row) for row, _ in rows}
    return pd.DataFrame(
        {"method": list(names.values())}
        | {heading: [column.get(row, "") for row in names] for heading, column in columns.items()}
    )


def values(found: Sequence[Record]) -> pd.DataFrame:
    """Every metric of every group of runs that differ by seed: mean, sd and n of final, mean of best.

    `sd` is the sample standard deviation, missing for a single run; a run that diverged counts in `diverged` only.
    """
    import pandas as pd

    rows = []
    for chapter in sorted({record["chapter"] for record in found}):
        for label, runs in records.group(_of(found, [chapter])).items():
            for metric in dict.fromkeys(key for run in runs for key in run["metrics"]):
                final = [run["metrics"][metric] for run in runs if metric in run["metrics"]]
                finite = [value for value in final if value is not None]
                best = [run["best"][metric] for run in runs if run["best"].get(metric) is not None]
                mean, sd = spread(finite) if finite else (None, None)
                rows.append(
                    {
                        "chapter": chapter,
                        "runs": label,
                        "pair": _pair(runs[0]),
                        "metric": metric,
                        "mean": mean,
                        "sd": sd if len(finite) > 1 else None,
                        "n": len(finite),
                        "diverged": len(final) - len(finite),
                        "best": spread(best)[0] if best else None,
                    }
                )
    columns = ["chapter", "runs", "pair", "metric", "mean", "sd", "n", "diverged", "best"]
    return pd.DataFrame(rows, columns=columns)


def each_run(found: Sequence[Record]) -> pd.DataFrame:
    """One row per run and metric."""
    import pandas as pd

    rows = [
        {key: r[key] for key in ("chapter", "run", "profile", "seed")}
        | {"metric": metric, "final": value, "best": r["best"].get(metric)}
        for r in found
        for metric, value in r["metrics"].items()
    ]
    return pd.DataFrame(rows, columns=["chapter", "run", "profile", "seed", "metric", "final", "best"])


def _across_pairs(chapter: str, found: list[Record]) -> list[Table]:
    """A chapter's figures by method, one column for each pair of teacher and student."""
    import pandas as pd

    tables = []
    by_label: dict[str, list[list[Record]]] = {}
    for runs in records.group(found).values():
        by_label.setdefault(records.label(runs[0]), []).append(runs)
    for groups in by_label.values():
        scales = dict.fromkeys(scale_in_words(runs[0]) for runs in groups)
        scale = next(iter(scales)) if len(scales) == 1 else next(iter(scales)).split(", ")[0]
        keys = dict.fromkeys(key for runs in groups for run in runs for key in run["metrics"])
        counts = {len(runs) for runs in groups}
        for experiment in dict.fromkeys(key.split("/")[0] for key in keys):
            own = [key for key in keys if key.split("/")[0] == experiment]
            measure = own[0].split("/")[2]
            if measure.endswith(" term"):
                continue
            shown = [key for key in own if key.split("/")[2] == measure]
            headings = _headings(groups)
            columns: dict[str, list[str]] = {"method": [key.split("/")[1] for key in shown]}
            for heading, runs in zip(headings, groups, strict=True):
                columns[heading] = [_cell(runs, "metrics", key, len(counts) > 1) for key in shown]
            if len(groups) == 1:
                columns["best"] = [_cell(groups[0], "best", key, False) for key in shown]
            n = f", {seeds(counts.pop())}" if len(counts) == 1 else ""
            counts = {len(runs) for runs in groups}
            unit = "" if measure == "value" or measure.endswith("seconds") else " in percent"
            pair = f", {_pair(groups[0][0])}" if len(groups) == 1 and _pair(groups[0][0]) else ""
            caption = f"Chapter {chapter}, {experiment}: {measure}{unit} ({scale}{pair}{n})"
            tables.append(Table(_kind(groups[0]), caption, pd.DataFrame(columns)))
    return tables


def _kind(runs: Sequence[Record]) -> str:
    return "smoke" if records.scale(runs[0]) == "smoke" else "results"


def _headings(groups: Sequence[Sequence[Record]]) -> list[str]:
    """What tells the groups apart: the pair, or else the parameters that differ; "final" for a single group."""
    if len(groups) == 1:
        return ["final"]
    pairs = [_pair(runs[0]) for runs in groups]
    if len(set(pairs)) == len(pairs):
        return pairs
    settings = [{k: v for k, v in runs[0]["parameters"].items() if k not in _APART} for runs in groups]
    differ = [name for name in settings[0] if len({repr(each.get(name)) for each in settings}) > 1]
    return [", ".join(f"{name} {each.get(name)}" for name in differ) or str(i) for i, each in enumerate(settings)]


def _cell(runs: Sequence[Record], part: str, key: str, count: bool) -> str:
    found = [run[part][key] for run in runs if key in run[part]]
    measure = key.split("/")[2]
    if measure == "value" or measure.endswith("seconds"):
        finite = [value for value in found if value is not None]
        text = " ± ".join(f"{x:.3g}" for x in spread(finite)[: 1 + (len(finite) > 1)]) if finite else ""
    else:
        text = verdicts.percent(found)
    return f"{text} ({seeds(len(found))})" if count and found else text


def _pair(record: Record) -> str:
    both = [record["parameters"].get(player) for player in ("teacher", "student")]
    return " to ".join(both) if all(isinstance(name, str) for name in both) else ""


def _of(found: Iterable[Record], chapters: Sequence[str]) -> list[Record]:
    """The records of some chapters, in the order of the chapters."""
    return [record for chapter in chapters for record in found if record["chapter"] == chapter]


def _citation(card: Paper) -> str:
    return f"{card.title} ({card.authors[0]} et al., {card.year}, arXiv {card.arxiv})"


def _theirs(cell: Cell) -> str:
    return "failed" if cell is None else percent(*cell)
