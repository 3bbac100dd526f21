"""The tables of the pages across papers, built from records: results, claims, status, landing page."""

from __future__ import annotations

import html
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import records
from ..locations import repository_root
from . import display, parameters, readme, tables
from .display import HTML
from .papers import paper, paper_ids
from .tables import at_largest_scale
from .tables import comparison as comparison  # chapters call it as pages.comparison
from .verdicts import seeds

if TYPE_CHECKING:
    import pandas as pd

MARKS = {
    "holds": "✓", "holds in part": "◐", "does not hold": "✗", "not reached at this budget": "…", "undecided": "?",
    "not tested here": "–",
}  # fmt: skip
NO_RUNS = "No larger run is committed yet: there are no figures to show."


def results() -> HTML:
    """Our figures beside the published ones: the tables of :func:`.tables.results`, from the committed runs."""
    found = records.committed()
    shown, heading = [], '<h2 id="smoke-runs">Smoke runs: a check of the code</h2>'
    for table in tables.results(found):
        if table.kind == "smoke" and heading not in shown:
            shown.append(heading)
        shown.append(table_html(table.frame, table.caption))
    return _html(*shown or [_line(NO_RUNS)], *_perhaps_mixed(found))


def headlines() -> HTML:
    """The README's headline results, with where the published figure stands, the hardware and the command."""
    import pandas as pd

    caption = "Accuracy in percent, mean ± standard deviation over seeds; the hours are those of one run"
    return _html(table_html(pd.DataFrame(readme.headlines()), caption))


def claims() -> HTML:
    """Each claim of each paper: the tables of :func:`dfkd_lib.reproduction.tables.claims`, from the committed runs."""
    found = records.committed()
    shown = [table_html(table.frame, table.caption) for table in tables.claims(found)]
    return _html(*([] if found else [_line(NO_RUNS)]), *shown)


def verdicts(paper_id: str, caption: str = "") -> HTML:
    """The claims of one paper as the page of all claims has them: from the committed runs, at their largest scale."""
    return _html(table_html(tables.claims_of(paper(paper_id), records.committed()), caption))


def larger_runs(chapter: str) -> list[tuple[str, list[dict[str, Any]]]]:
    """The committed runs of a chapter, smoke runs aside: scale and number of seeds in words, and the records.

    Those that differ by their seed alone stand together; the largest scale comes first. Where two have the same words,
    these name the profile too.
    """
    groups = records.group(records.committed(chapter)).values()
    larger = [runs for runs in groups if records.scale(runs[0]) != "smoke"]
    words = [f"{tables.scale_in_words(runs[0])}, {seeds(len(runs))}" for runs in larger]
    return [
        (said if words.count(said) == 1 else f"{said}, profile {runs[0]['profile']}", runs)
        for said, runs in zip(words, larger, strict=True)
    ]


def standing() -> HTML:
    """How many claims there are, how many were tested, on what and at which share of the papers' budgets."""
    ruled, on_gpu = [], 0
    for card in tables.in_order():
        groups = records.group(records.committed(*card.chapters))
        for claim in card.claims:
            label, verdict = at_largest_scale(claim, groups, card.budgets)
            ruled.append(verdict)
            on_gpu += bool(label) and records.on_gpu(groups[label][0])
    tested = [verdict for verdict in ruled if verdict.n]
    at_scale = sum(verdict.share is not None and verdict.share >= 1 for verdict in tested)
    runs = records.committed()
    tally = ", ".join(f"{name} {sum(verdict.verdict == name for verdict in ruled)}" for name in MARKS)
    return _html(
        f"<p>{len(ruled)} claims of {len(paper_ids())} papers: {tally}. Of the {len(tested)} that were tested, "
        f"{on_gpu} were tested on a GPU and {at_scale} at the paper's full budget; the others at the scale that stands "
        f"beside each. {sum(map(records.on_gpu, runs))} of the {len(runs)} committed runs were made on a GPU.</p>"
    )


def chapters() -> HTML:
    """The chapters that exist, with their committed runs and how the claims of their papers fare."""
    import pandas as pd

    rows = []
    cards = list(map(paper, paper_ids()))
    for chapter in parameters.chapters():
        told = [card for card in cards if card.chapters[0] == chapter]
        runs = [f"{label} ({seeds(len(group))})" for label, group in records.group(records.committed(chapter)).items()]
        found = [
            at_largest_scale(claim, records.group(records.committed(*card.chapters)), card.budgets)[1].verdict
            for card in told
            for claim in card.claims
        ]
        tally = [_badge(verdict, found.count(verdict)) for verdict in MARKS if verdict in found]
        years = f" ({told[0].year})" if len(told) == 1 else ""
        link = f'<a href="chapters/{chapter}.html">{html.escape(parameters.title(chapter))}</a>{years}'
        rows.append((link, html.escape(", ".join(runs) or "none yet"), " ".join(tally)))
    frame = pd.DataFrame(rows, columns=["chapter", "larger runs", "claims"])
    return _html(table_html(frame, escape=False))


def status(folder: Path | None = None) -> HTML:
    """The last execution of each chapter: when, at which profile, how long, on what.

    Args:
        folder: holds one run folder for each chapter; by default the checkout's `_build/runs`.
    """
    import pandas as pd

    root = repository_root()
    folder = folder or (root / "_build" / "runs" if root else None)
    found = sorted(folder.glob("*/record.json")) if folder else []
    rows = []
    runs = [records.read(path.parent) for path in found]
    for run in runs:
        packages = run.get("packages", {})
        shown = [f"{name} {packages[name]}" for name in ("python", "torch") if name in packages]
        rows.append(
            {
                "chapter": run["chapter"],
                "profile": run["profile"],
                "minutes": f"{run['seconds'] / 60:.1f}",
                "runtime": run.get("runtime", ""),
                "hardware": ", ".join(str(value) for value in run.get("hardware", {}).values()),
                "versions": ", ".join(shown),
                "finished (UTC)": str(run["finished"])[:16].replace("T", " "),
            }
        )
    if not rows:
        return _html(_line("No chapter was executed for this build: the outputs shown are the stored ones."))
    return _html(table_html(pd.DataFrame(rows)), *_perhaps_mixed(runs))


def committed_runs() -> HTML:
    """Every group of committed runs: scale, seeds, hours of all its runs together, and the machines."""
    import pandas as pd

    rows, hours = [], 0.0
    for chapter in sorted({record["chapter"] for record in records.committed()}):
        for label, runs in records.group(records.committed(chapter)).items():
            spent = sum(run["seconds"] for run in runs) / 3600
            machines = dict.fromkeys(str(run.get("hardware", {}).get("name", "not recorded")) for run in runs)
            scale = tables.scale_in_words(runs[0])
            rows.append((chapter, label, scale, len(runs), f"{spent:.2f}", ", ".join(machines)))
            hours += spent
    frame = pd.DataFrame(rows, columns=["chapter", "runs", "scale", "seeds", "hours", "hardware"])
    return _html(table_html(frame, f"The runs behind the book: {len(records.committed())}, {hours:.1f} hours in all"))


def _perhaps_mixed(found: Sequence[dict[str, Any]]) -> list[str]:
    """A line that names the runs of :func:`dfkd_lib.records.perhaps_mixed`; none if there are none."""
    by_chapter: dict[str, list[str]] = {}
    for record in filter(records.perhaps_mixed, found):
        by_chapter.setdefault(record["chapter"], []).append(record["run"])
    if not by_chapter:
        return []
    names = "; ".join(f"{chapter}: {', '.join(runs)}" for chapter, runs in by_chapter.items())
    return [
        _line(
            "Made before resumed runs were marked; if one of these was resumed, its figures are not those of an "
            f"uninterrupted run: {names}."
        )
    ]


def versions() -> HTML:
    """Versions of Python, of the library and of the packages that can move a number, here and now."""
    import pandas as pd

    facts = records.provenance()
    ours = {"dfkd_lib": facts["code"]["version"], "system": f"{platform.system()} {platform.machine()}"}
    rows = list((facts["packages"] | ours).items())
    return _html(table_html(pd.DataFrame(rows, columns=["package", "version"])))


def hyperparameters(chapter: str, origins: Mapping[str, str]) -> HTML:
    """Every parameter of a chapter with its value in the paper profile, in each of the others, its origin and meaning.

    Args:
        origins: where the value of the paper profile comes from, for those that come from somewhere; the other
            parameters are this book's own.
    """
    import pandas as pd

    known = parameters.parameters(chapter)
    profiles = sorted(parameters.profiles(chapter), key=lambda name: name != "paper")
    sets = {name: parameters.profile(chapter, name) for name in profiles}
    rows = [
        {"parameter": name}
        | {profile: _plain(values.get(name, parameter.default)) for profile, values in sets.items()}
        | {"origin": origins.get(name, "ours"), "meaning": parameter.help}
        for name, parameter in known.items()
        if name not in ("profile", "seed", "device", "threads", "out")
    ]
    return _html(table_html(pd.DataFrame(rows)))


def distiller_settings() -> HTML:
    """The settings of every data-free method: all published ones, and what each of our scales changes in them."""
    import pandas as pd

    from .. import distillers

    rows = []
    for name in distillers.names():
        published = asdict(distillers.settings_for(name, preset="paper"))
        row = {"method": name, "paper": _settings(published, published)}
        for preset in distillers.UPDATES:
            if preset != "paper":
                ours = asdict(distillers.settings_for(name, preset=preset))
                row[preset] = _settings(ours, {k: v for k, v in ours.items() if v != published[k]})
        rows.append(row)
    return _html(table_html(pd.DataFrame(rows)))


def _settings(values: Mapping[str, Any], shown: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {values[name]}" for name in shown if name not in ("n_updates", "milestones"))


def expectations(chapter: str) -> HTML:
    """What each profile runs, how long it took and on what: from the committed records, where there are any."""
    import pandas as pd

    committed = records.committed(chapter)
    rows = []
    for name in parameters.profiles(chapter):
        runs = [run for run in committed if run["profile"] == name]
        took = [f"{run['seconds'] / 60:.0f} min ({run['run']}, {run['runtime'].split(', seed')[0]})" for run in runs]
        note = parameters.profile_note(chapter, name) or "embedded data, every part of the chapter"
        rows.append((name, note, "; ".join(took) or "not measured"))
    return _html(table_html(pd.DataFrame(rows, columns=["profile", "what it runs", "minutes measured"])))


def _plain(value: Any) -> str:
    """A value of a parameter; of a list that is longer than four, its ends and how many there are."""
    if not isinstance(value, list):
        return str(value)
    return ", ".join(map(str, value)) if len(value) <= 4 else f"{value[0]}, …, {value[-1]} ({len(value)} of them)"


def show(shown: HTML | str) -> None:
    """Display HTML in a notebook."""
    display.show(HTML(shown) if isinstance(shown, str) else shown)


def glue(name: str, shown: HTML) -> None:
    """Show something and give it a name by which other pages of the book include it."""
    display.show(shown, metadata={"scrapbook": {"name": name, "mime_prefix": ""}})


def table_html(frame: pd.DataFrame, caption: str = "", *, escape: bool = True) -> str:
    """A table that scrolls sideways on a narrow screen, or stacks its cells there if it speaks of claims.

    A `verdict` column is shown as badges.

    Args:
        escape: turn off only for cells that are HTML already.
    """
    head = "".join(f'<th scope="col">{html.escape(str(name))}</th>' for name in frame.columns)
    body = "".join(
        f"<tr>{''.join(_cell(name, row[name], escape) for name in frame.columns)}</tr>\n"
        for row in frame.to_dict("records")
    )
    title = html.escape(caption)
    stacked = " dfkd-stack" if {"claim", "claims"} & set(frame.columns) else ""
    return (
        (f'<p class="dfkd-caption">{title}</p>\n' if caption else "")
        + f'<div class="dfkd-table{stacked}" role="region" tabindex="0" aria-label="{title or "table"}">'
        + f'<table class="dataframe">\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody></table></div>'
    )


def _cell(name: Any, value: Any, escape: bool) -> str:
    text = _badge(value) if name == "verdict" else html.escape(str(value)) if escape else str(value)
    text = re.sub(r" (?=[%±])|(?<=±) ", "&nbsp;", text)  # a figure stays on one line
    return f'<td class="col-{_slug(name)}" data-label="{html.escape(str(name))}">{text}</td>'


def _badge(verdict: str, count: int | None = None) -> str:
    number = "" if count is None else f": {count}"
    return f'<span class="verdict {_slug(verdict)}">{MARKS[verdict]} {verdict}{number}</span>'


def _slug(text: Any) -> str:
    return "".join(c if c.isalnum() else "-" for c in str(text).lower()).strip("-")


def _line(text: str) -> str:
    return f'<p class="dfkd-line">{html.escape(text)}</p>'


def _html(*parts: str) -> HTML:
    return HTML("\n".join(parts))
