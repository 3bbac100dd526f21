"""The `dfkd` command. Exit status: 0 success, 1 the work failed, 2 wrong input, 130 interrupted."""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from . import __version__
from .errors import DFKDError, InputError
from .locations import book_root, cache_root, data_root
from .parameters import (
    cells,
    chapters,
    check_parameters,
    notebook_path,
    parameters,
    profile,
    profile_note,
    profiles,
    read_yaml,
)

if TYPE_CHECKING:
    import pandas as pd


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see {self.prog} --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one `dfkd` command and return its exit status; an error is one line on stderr."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        args = _parser().parse_args(words)
        args.command = shlex.join(["dfkd", *words])
        status = args.work(args)
        return int(status or 0)
    except DFKDError as e:
        print(f"dfkd: error: {e}", file=sys.stderr)
        return 2 if isinstance(e, InputError) else 1
    except KeyboardInterrupt as e:
        print(f"dfkd: interrupted{e}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output left; there is nobody to tell
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="dfkd", description="Distilling Without Data: run the book's chapters.")
    parser.add_argument("--version", action="version", version=f"dfkd {__version__}")
    commands = parser.add_subparsers(dest="name", metavar="COMMAND", required=True)

    one = commands.add_parser("list", help="chapters and their profiles, or the parameters of one chapter")
    one.add_argument("chapter", nargs="?", metavar="CHAPTER")
    one.set_defaults(work=_list)

    one = commands.add_parser("run", help="run a chapter; leaves notebook.ipynb and record.json in a folder")
    one.add_argument("chapter", metavar="CHAPTER")
    one.add_argument("--profile", metavar="P", help="smoke (the default), cpu, gpu or paper")
    one.add_argument("--seed", metavar="N", help="short for -p seed N")
    one.add_argument(
        "-p", dest="pairs", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), help="set a parameter"
    )
    one.add_argument("-f", dest="file", type=Path, metavar="FILE.yml", help="set the parameters that a file holds")
    where = one.add_mutually_exclusive_group()
    where.add_argument("--out", type=Path, metavar="DIR", help="default: runs/CHAPTER-PROFILE-seedN")
    where.add_argument("--resume", type=Path, metavar="DIR", help="continue the unfinished run in DIR")
    one.add_argument("--json", action="store_true", help="print progress and the outcome as JSON lines")
    one.set_defaults(work=_run)

    one = commands.add_parser("results", help="figures of the committed runs and of one's own")
    one.add_argument("chapter", nargs="?", metavar="CHAPTER")
    one.add_argument(
        "--runs", type=Path, action="append", metavar="DIR", help="folder of run folders (default: runs, if there)"
    )
    one.add_argument("--csv", action="store_true", help="one line per run and metric")
    one.set_defaults(work=_results)

    one = commands.add_parser("book", help="run every chapter and build the book from what was run")
    one.add_argument("--profile", default="smoke", metavar="P", help="of all chapters (default: smoke)")
    one.add_argument("--workers", type=int, default=2, metavar="N", help="chapters at a time (default: 2)")
    one.set_defaults(work=_book)

    one = commands.add_parser("doctor", help="what is installed, which device, which data are there")
    one.set_defaults(work=_doctor)

    one = commands.add_parser("data", help="download and convert a dataset")
    one.add_argument("dataset", metavar="NAME")
    one.set_defaults(work=_data)

    one = commands.add_parser("test", help="everything that a change must pass")
    one.set_defaults(work=_test)

    one = commands.add_parser("refresh", help="for contributors: run stored notebooks anew, in place")
    one.add_argument("notebook", metavar="NAME", help="a chapter, a page such as results, or all")
    one.set_defaults(work=_refresh)
    return parser


def _list(args: argparse.Namespace) -> None:
    if args.chapter:
        for known in parameters(args.chapter).values():
            about = " ".join(filter(None, [known.range, known.help]))
            print(f"{known.name} = {known.default!r} ({known.type})  {about}".rstrip())
        return
    for chapter in chapters():
        print(f"{chapter}: {_title(chapter)}")
        for name in profiles(chapter):
            print(f"  {name:6} {profile_note(chapter, name)}".rstrip())


def _title(chapter: str) -> str:
    texts = (source for kind, source, _ in cells(notebook_path(chapter)) if kind == "markdown")
    headings = (line[2:].strip() for text in texts for line in text.split("\n") if line.startswith("# "))
    return next(headings, chapter)


def _run(args: argparse.Namespace) -> None:
    try:
        outcome = _run_or_resume(args)
    except DFKDError as e:
        if args.json:
            print(json.dumps({"event": "failed", "error": str(e)}), flush=True)
        raise
    if args.json:
        print(json.dumps({"event": "finished", **outcome}), flush=True)
        return
    width = max(map(len, outcome["metrics"]), default=0)
    for name, value in outcome["metrics"].items():
        print(f"{name:{width}}  {'diverged' if value is None else f'{value:.4g}'}")
    print(f"kept in {outcome['out']}")


def _run_or_resume(args: argparse.Namespace) -> dict[str, Any]:
    """Check everything that can be checked, then run; returns "out" and the record's "metrics"."""
    from . import records, runs
    from .files import lock
    from .notebooks import execute

    given, command = _asked(args), args.command
    folder = (args.resume or args.out or _default_folder(args.chapter, given)).expanduser().resolve()
    if args.resume:
        noted = runs.asked(folder)
        given, command = _agreed(args, noted, given), noted["command"]
        if not runs.made_of(args.chapter).items() <= noted.items():
            print("dfkd: note: the chapter or the library has changed since this run began", file=sys.stderr)
    _check_device(args.chapter, given)
    with lock(folder / runs.LOCK, timeout=0, what=f"run folder {folder}"):
        if not args.resume:
            runs.begin(folder, args.chapter, given, command)
        if runs.is_finished(folder):
            print(f"the run in {folder} is finished", file=sys.stderr)
        else:
            try:
                with runs.Follow(folder / "events.jsonl", as_json=args.json):
                    environment = {"DFKD_EVENTS": str(folder / "events.jsonl"), "DFKD_COMMAND": command}
                    execute(args.chapter, folder, given, environment=environment)
            except KeyboardInterrupt:
                again = shlex.join(["dfkd", "run", args.chapter, "--resume", str(folder)])
                raise KeyboardInterrupt(f"; continue with: {again}") from None
    return {"out": str(folder), "metrics": records.read(folder)["metrics"]}


def _asked(args: argparse.Namespace) -> dict[str, Any]:
    """The parameters that the command line sets: profile, then file, then --seed and -p."""
    for name, instead in {"profile": "--profile", "out": "--out"}.items():
        if name in dict(args.pairs):
            raise InputError(f"set {name} with {instead}, not with -p")
    pairs = [*([("seed", args.seed)] if args.seed is not None else []), *map(tuple, args.pairs)]
    start = profile(args.chapter, args.profile or "smoke") if not args.resume or args.profile else {}
    from_file = read_yaml(args.file) if args.file else {}
    return check_parameters(args.chapter, {**start, **from_file}, pairs)


def _agreed(args: argparse.Namespace, noted: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """The parameters of the run to resume; options that say otherwise are an error."""
    if noted["chapter"] != args.chapter:
        raise InputError(f"{args.resume} holds a run of chapter {noted['chapter']}, not of {args.chapter}")
    before = check_parameters(args.chapter, noted["parameters"])
    for name, known in parameters(args.chapter).items():
        kept = before.get(name, known.default)
        if name in given and given[name] != kept:
            raise InputError(
                f"{args.resume} was begun with {name} = {kept!r}, not {given[name]!r}; resume it without options"
            )
    return before


def _default_folder(chapter: str, given: dict[str, Any]) -> Path:
    seed = given.get("seed", parameters(chapter)["seed"].default)
    return Path("runs") / f"{chapter}-{given['profile']}-seed{seed}"


def _check_device(chapter: str, given: dict[str, Any]) -> None:
    """Refuse a device or precision that cannot be, before a kernel starts."""
    from .runtime import Runtime

    chosen = {name: known.default for name, known in parameters(chapter).items()} | given
    Runtime.choose(chosen.get("device", "auto"), chosen.get("precision", "auto"))


def _results(args: argparse.Namespace) -> None:
    import pandas as pd

    from . import records

    if args.chapter:
        notebook_path(args.chapter)
    for folder in args.runs or []:
        if not folder.is_dir():
            raise InputError(f"there is no folder {folder}")
    folders = args.runs or [Path("runs")]
    own = [records.read(path.parent) for folder in folders for path in sorted(folder.rglob("record.json"))]
    found = records.committed(*filter(None, [args.chapter])) + [r for r in own if args.chapter in (None, r["chapter"])]
    if args.csv:
        rows = [
            {key: r[key] for key in ("chapter", "run", "profile", "seed")}
            | {"metric": metric, "final": value, "best": r["best"].get(metric)}
            for r in found
            for metric, value in r["metrics"].items()
        ]
        columns = ["chapter", "run", "profile", "seed", "metric", "final", "best"]
        sys.stdout.write(pd.DataFrame(rows, columns=columns).to_csv(index=False))
    elif not found:
        print("no runs yet: dfkd run CHAPTER makes one")
    for chapter in sorted({r["chapter"] for r in found}) if not args.csv else ():
        for label, group in records.group([r for r in found if r["chapter"] == chapter]).items():
            runs = ", ".join(r["run"] for r in group)
            print(f"{chapter}, {label} ({runs})\n{_summary(group).to_string(na_rep='-')}\n")


def _summary(group: list[dict[str, Any]]) -> pd.DataFrame:
    """Runs that differ by seed alone, a row per metric: mean and standard deviation of final, mean of best."""
    import pandas as pd

    final = pd.DataFrame([r["metrics"] for r in group], dtype=float)
    best = pd.DataFrame([r["best"] for r in group], dtype=float).mean()
    columns = {"final": final.mean(), "sd": final.std(), "best": best.reindex(final.columns), "runs": final.count()}
    return pd.DataFrame(columns).round(4)


def _book(args: argparse.Namespace) -> None:
    from .book import build

    build(args.profile, args.workers)


def _doctor(args: argparse.Namespace) -> None:
    from importlib.metadata import PackageNotFoundError, version

    from . import data
    from .runtime import Runtime

    print(f"dfkd_lib     {__version__}, book at {book_root()}")
    print(f"python       {sys.version.split()[0]}, {sys.executable}")
    for name in ("torch", "torchvision", "numpy", "scikit-learn", "papermill", "ipykernel", "jupyter-book"):
        try:
            print(f"{name:12} {version(name)}")
        except PackageNotFoundError:
            print(f"{name:12} absent: pip install 'dfkd-lib[book]'")
    print(f"runtime      {Runtime.choose().describe()}")
    for what, folder in {"data": data_root(), "cache": cache_root()}.items():
        there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
        print(f"{what:12} {folder}, {shutil.disk_usage(there).free / 2**30:.1f} GiB free")
    for name in data.names():
        stored = (data_root() / name / "train.npz").is_file()
        state = "embedded" if name in data.sources.EMBEDDED else "there" if stored else f"not there: dfkd data {name}"
        print(f"  {name:14} {state}")


def _data(args: argparse.Namespace) -> None:
    from . import data

    paths = data.prepare(args.dataset)
    print("\n".join(map(str, paths)) or f"{args.dataset} is embedded: there is nothing to fetch")


def _test(args: argparse.Namespace) -> int:
    from .checks import check

    return 1 if check() else 0


def _refresh(args: argparse.Namespace) -> None:
    from .errors import unknown
    from .notebooks import refresh, stored_notebooks

    known = {path.stem: path for path in stored_notebooks()}
    if args.notebook not in (*known, "all"):
        raise unknown("notebook", args.notebook, [*known, "all"])
    for name in known if args.notebook == "all" else [args.notebook]:
        refresh(known[name])
        print(f"{known[name]}: fresh")
