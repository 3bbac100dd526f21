"""`dfkd list`, `results`, `doctor` and `data`: what there is."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

from .. import __version__
from ..errors import InputError
from ..locations import PACKAGE, book_root, cache_root, data_root
from .parameters import cells, chapters, notebook_path, parameters, profile_note, profiles

if TYPE_CHECKING:
    from .tables import Table


def list_chapters(args: argparse.Namespace) -> None:
    """`dfkd list`: the chapters, or the parameters of one."""
    if args.chapter:
        known = parameters(args.chapter).values()
        if args.json:
            facts = {p.name: {"default": p.default, "type": p.type, "range": p.range, "help": p.help} for p in known}
            print(json.dumps(facts, indent=1))
            return
        for one in known:
            about = " ".join(filter(None, [one.range, one.help]))
            print(f"{one.name} = {one.default!r} ({one.type})  {about}".rstrip())
        return
    notes = {chapter: {name: profile_note(chapter, name) for name in profiles(chapter)} for chapter in chapters()}
    if args.json:
        print(json.dumps({c: {"title": _title(c), "profiles": of} for c, of in notes.items()}, indent=1))
        return
    for chapter, of in notes.items():
        print(f"{chapter}: {_title(chapter)}")
        for name, note in of.items():
            print(f"  {name:6} {note}".rstrip())


def _title(chapter: str) -> str:
    texts = (source for kind, source, _ in cells(notebook_path(chapter)) if kind == "markdown")
    headings = (line[2:].strip() for text in texts for line in text.split("\n") if line.startswith("# "))
    return next(headings, chapter)


def results(args: argparse.Namespace) -> None:
    """`dfkd results`: tables from records."""
    from .. import records
    from . import tables

    if args.chapter:
        notebook_path(args.chapter)
    for folder in args.runs or []:
        if not folder.is_dir():
            raise InputError(f"there is no folder {folder}")
    own = [] if args.committed else tables.under(args.runs or [Path("runs")])
    found = records.committed() + own
    if args.chapter and not args.claims:
        found = [record for record in found if record["chapter"] == args.chapter]
    form = "json" if args.json else args.format
    if args.csv:
        sys.stdout.write(tables.each_run(found).to_csv(index=False))
    elif form == "csv" and not args.claims:
        sys.stdout.write(tables.values(found).to_csv(index=False))
    elif form == "json" and not args.claims:
        print(tables.values(found).to_json(orient="records", indent=1))
    else:
        shown = tables.claims(found, args.chapter or "") if args.claims else tables.results(found)
        _print_tables(shown, form)
        if not found and form == "text":
            print("no runs yet: dfkd run CHAPTER makes one")


def _print_tables(shown: list[Table], form: str) -> None:
    from . import latex

    if form == "latex":
        sys.stdout.write(latex.document(shown))
    elif form == "json":
        print(json.dumps([{"caption": t.caption, "rows": t.frame.to_dict("records")} for t in shown], indent=1))
    elif form == "csv":
        sys.stdout.write("\n".join(f"# {table.caption}\n{table.frame.to_csv(index=False)}" for table in shown))
    else:
        for table in shown:
            if table.kind == "claims":
                width = min(shutil.get_terminal_size().columns, 110)
                rows = [f"{r.verdict}: {r.claim} {r.figures}".rstrip() for r in table.frame.itertuples()]
                text = "\n".join(textwrap.fill(row, width, initial_indent="- ", subsequent_indent="  ") for row in rows)
            else:
                text = table.frame.to_string(index=False)
            print(f"{table.caption}\n{text}\n")


def doctor(args: argparse.Namespace) -> None:
    """`dfkd doctor`: what is installed and where things lie."""
    from importlib.metadata import PackageNotFoundError, version

    from .. import data as datasets
    from ..runtime import Runtime

    found: dict[str, str] = {}
    for name in ("torch", "torchvision", "numpy", "scikit-learn", "papermill", "ipykernel", "jupyter-book", "dask"):
        extra = "batch" if name == "dask" else "book"
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = f"absent: pip install 'dfkd-lib[{extra}]'"
    free = {}
    for what, folder in {"data": data_root(), "cache": cache_root()}.items():
        there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
        free[what] = f"{folder}, {shutil.disk_usage(there).free / 2**30:.1f} GiB free"
    sets = {}
    for name in datasets.names():
        stored = (data_root() / name / "train.npz").is_file()
        sets[name] = (
            "embedded" if name in datasets.sources.EMBEDDED else "there" if stored else f"not there: dfkd data {name}"
        )
    facts = {
        "dfkd_lib": f"{__version__}, book at {book_root()}",
        "python": f"{sys.version.split()[0]}, {sys.executable}",
    }
    if others := [path for path in dict.fromkeys(sys.path) if _is_another(Path(path) / "dfkd_lib")]:
        facts["another"] = f"dfkd_lib in {', '.join(others)}: uninstall it, or take it out of PYTHONPATH"
    facts |= found | {"runtime": Runtime.choose().describe()} | free
    if args.json:
        print(json.dumps(facts | {"datasets": sets}, indent=1))
        return
    for name, text in facts.items():
        print(f"{name:12} {text}")
    for name, text in sets.items():
        print(f"  {name:14} {text}")


def _is_another(package: Path) -> bool:
    return (package / "__init__.py").is_file() and package.resolve() != PACKAGE


def data(args: argparse.Namespace) -> None:
    """`dfkd data`: fetch a dataset beforehand."""
    from .. import data as datasets

    paths = datasets.prepare(args.dataset)
    if args.json:
        print(json.dumps([str(path) for path in paths]))
        return
    print("\n".join(map(str, paths)) or f"{args.dataset} is embedded: there is nothing to fetch")
