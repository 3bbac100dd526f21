"""The `dfkd` command. Exit status: 0 success, 1 the work failed, 2 wrong input, 130 interrupted."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import shutil
import sys
import textwrap
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from .. import __version__
from ..errors import DFKDError, InputError, unknown
from ..locations import book_root, cache_root, data_root
from ..training.progress import clock
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
    from .batch import Summary
    from .plans import Plan
    from .tables import Table


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see {self.prog} --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one `dfkd` command and return its exit status; an error is one line on stderr."""
    words = list(sys.argv[1:] if argv is None else argv)
    verbose = False
    try:
        args = parser().parse_args(words)
        args.command, verbose = shlex.join(["dfkd", *words]), getattr(args, "verbose", False)
        status = args.work(args)
        return int(status or 0)
    except DFKDError as e:
        if verbose:
            traceback.print_exc()
        print(f"{_coloured('dfkd: error:', '31')} {e}", file=sys.stderr)
        return 2 if isinstance(e, InputError) else 1
    except KeyboardInterrupt as e:
        print(f"dfkd: interrupted{e}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output left; there is nobody to tell
        return 1


def _coloured(text: str, colour: str) -> str:
    """Text for stderr, in colour where that is a terminal and nobody has asked for none (NO_COLOR)."""
    wanted = sys.stderr.isatty() and "NO_COLOR" not in os.environ
    return f"\x1b[{colour}m{text}\x1b[0m" if wanted else text


def parser() -> argparse.ArgumentParser:
    """The parser of the whole command."""
    top = _Parser(
        prog="dfkd",
        description="Distilling Without Data: run the book's chapters, alone or in batches.",
        epilog="Exit status: 0 success, 1 the work failed, 2 wrong input, 130 interrupted.\n"
        "Examples of each command: dfkd COMMAND --help",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"dfkd {__version__}")
    commands = top.add_subparsers(dest="name", metavar="COMMAND", required=True)

    def command(
        name: str, work: Callable[[argparse.Namespace], int | None], about: str, examples: str, as_json: str = ""
    ) -> argparse.ArgumentParser:
        one: argparse.ArgumentParser = commands.add_parser(
            name,
            help=about,
            description=about[0].upper() + about[1:] + ".",
            epilog="examples:\n" + "\n".join(f"  {line}" for line in examples.splitlines()),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        how_much = one.add_mutually_exclusive_group()
        how_much.add_argument("-q", "--quiet", action="store_true", help="no progress; errors and results only")
        how_much.add_argument("-v", "--verbose", action="store_true", help="tracebacks of failures too")
        if as_json:
            one.add_argument("--json", action="store_true", help=as_json)
        one.set_defaults(work=work)
        return one

    one = command(
        "list",
        _list,
        "chapters and their profiles, or the parameters of one chapter",
        "dfkd list\ndfkd list fast\ndfkd list --json",
        "as one JSON value",
    )
    one.add_argument("chapter", nargs="?", metavar="CHAPTER")

    one = command(
        "run",
        _run,
        "run a chapter; leaves notebook.ipynb and record.json in a folder",
        "dfkd run fast\n"
        "dfkd run fast --profile cpu --seed 3 -p n_updates 200 --out mine\n"
        "dfkd run fast --resume mine\n"
        "dfkd run fast --plain              # where there is no Jupyter",
        "print progress and the outcome as JSON lines",
    )
    one.add_argument("chapter", metavar="CHAPTER")
    one.add_argument("--profile", metavar="P", help="smoke (the default), cpu, gpu or paper")
    one.add_argument("--seed", metavar="N", help="short for -p seed N")
    one.add_argument(
        "-p", dest="pairs", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), help="set a parameter"
    )
    one.add_argument("-f", dest="file", type=Path, metavar="FILE.yml", help="set the parameters that a file holds")
    one.add_argument("--plain", action="store_true", help="in this process, without Jupyter: leaves no notebook")
    where = one.add_mutually_exclusive_group()
    where.add_argument("--out", type=Path, metavar="DIR", help="default: runs/CHAPTER-PROFILE-seedN")
    where.add_argument("--resume", type=Path, metavar="DIR", help="continue the unfinished run in DIR")

    one = command(
        "batch",
        _batch,
        "run the points of a plan that are not finished yet; the same command continues a batch that was stopped",
        "dfkd batch book/plans/smoke.yml --dry-run\n"
        "dfkd batch book/plans/smoke.yml --workers 2\n"
        "dfkd batch cifar10 --scheduler tcp://10.0.0.1:8786\n"
        "dfkd batch smoke --retry-failed --json",
        "print every event and the summary as JSON lines",
    )
    one.add_argument("plan", metavar="PLAN.yml", help="a file, or the name of a plan of the book")
    one.add_argument("--out", type=Path, metavar="DIR", help="a folder for each point goes here (default: runs/PLAN)")
    machines = one.add_mutually_exclusive_group()
    machines.add_argument("--workers", type=int, metavar="N", help="points at a time on this machine (default: 2)")
    machines.add_argument("--scheduler", metavar="ADDRESS", help="of a running Dask scheduler, tcp://HOST:PORT")
    one.add_argument("--dry-run", action="store_true", help="print the points and the hours they take, and stop")
    one.add_argument("--retry-failed", action="store_true", help="run points again that failed before")

    one = command(
        "results",
        _results,
        "the book's tables, from the committed runs and one's own: mean and standard deviation over seeds",
        "dfkd results\n"
        "dfkd results fast --runs runs/cifar10\n"
        "dfkd results --format latex > tables.tex\n"
        "dfkd results --format csv > figures.csv     # every metric: mean, sd, n\n"
        "dfkd results --csv > runs.csv               # one line per run and metric",
        "short for --format json",
    )
    one.add_argument("chapter", nargs="?", metavar="CHAPTER")
    one.add_argument(
        "--runs", type=Path, action="append", metavar="DIR", help="folder of run folders (default: runs, if there)"
    )
    one.add_argument("--committed", action="store_true", help="the runs of the book alone, as its pages show them")
    one.add_argument("--claims", action="store_true", help="the claims with their verdicts instead of the figures")
    form = one.add_mutually_exclusive_group()
    form.add_argument("--format", default="text", choices=("text", "csv", "latex", "json"), help="default: text")
    form.add_argument("--csv", action="store_true", help="one line per run and metric")

    one = command(
        "book",
        _book,
        "run every chapter and build the book from what was run",
        "dfkd book\ndfkd book --profile gpu --workers 1\ndfkd book --stored --single",
    )
    one.add_argument("--profile", default="smoke", metavar="P", help="of all chapters (default: smoke)")
    one.add_argument("--workers", type=int, default=2, metavar="N", help="chapters at a time (default: 2)")
    one.add_argument("--stored", action="store_true", help="run nothing: build from the outputs that are stored")
    one.add_argument("--single", action="store_true", help="the whole book as one HTML page to keep, too")

    command(
        "doctor", _doctor, "what is installed, which device, which data are there", "dfkd doctor", "as one JSON value"
    )

    one = command("data", _data, "download and convert a dataset", "dfkd data cifar10", "the paths as one JSON value")
    one.add_argument("dataset", metavar="NAME")

    command("test", _test, "everything that a change must pass", "dfkd test")

    one = command(
        "refresh",
        _refresh,
        "for contributors: run stored notebooks anew, in place",
        "dfkd refresh fast\ndfkd refresh all",
    )
    one.add_argument("notebook", metavar="NAME", help="a chapter, a page such as results, or all")

    one = command(
        "completion",
        _completion,
        "print what a shell needs to complete this command",
        "dfkd completion bash > ~/.local/share/bash-completion/completions/dfkd\n"
        "dfkd completion zsh > ~/.zfunc/_dfkd          # a folder of $fpath\n"
        "dfkd completion tcsh >> ~/.tcshrc",
    )
    one.add_argument("shell", choices=("bash", "zsh", "tcsh"))
    return top


def _completion(args: argparse.Namespace) -> None:
    try:
        import shtab
    except ImportError as e:
        raise DFKDError(f"completion needs shtab ({e}): pip install 'dfkd-lib[batch]'") from e
    print(shtab.complete(_with_names(parser()), args.shell))


def _with_names(top: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """The parser with the names that exist now as choices, and files where files are meant."""
    import shtab

    from ..data import names as datasets
    from .notebooks import stored_notebooks

    known = {
        "chapter": chapters(),
        "profile": sorted({name for chapter in chapters() for name in profiles(chapter)}),
        "dataset": datasets(),
        "notebook": [*(path.stem for path in stored_notebooks()), "all"],
    }
    files = {"plan": shtab.FILE, "file": shtab.FILE, "out": shtab.DIR, "resume": shtab.DIR, "runs": shtab.DIR}
    for action in top._subparsers._group_actions[0].choices.values():  # type: ignore[union-attr]
        for option in action._actions:
            if option.dest in known:
                option.choices = known[option.dest]
            elif option.dest in files:
                option.complete = files[option.dest]
    return top


def _list(args: argparse.Namespace) -> None:
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
    from .. import records
    from ..files import lock
    from . import notebooks, plain, runs

    given, command, is_plain = _asked(args), args.command, args.plain
    folder = (args.resume or args.out or _default_folder(args.chapter, given)).expanduser().resolve()
    if args.resume:
        noted = runs.asked(folder)
        given, command = _agreed(args, noted, given), noted["command"]
        is_plain = is_plain or noted.get("plain", False)
        if not runs.made_of(args.chapter).items() <= noted.items():
            print("dfkd: note: the chapter or the library has changed since this run began", file=sys.stderr)
    _check_device(args.chapter, given)
    with lock(folder / runs.LOCK, timeout=0, what=f"run folder {folder}"):
        if not args.resume:
            runs.begin(folder, args.chapter, given, command, plain=is_plain)
        if runs.is_finished(folder):
            print(f"the run in {folder} is finished", file=sys.stderr)
        else:
            events = folder / "events.jsonl"
            quiet = args.quiet and not args.json
            try:
                with contextlib.nullcontext() if quiet else runs.Follow(events, as_json=args.json):
                    environment = {"DFKD_EVENTS": str(events), "DFKD_COMMAND": command}
                    if is_plain:
                        show = not (args.quiet or args.json)
                        plain.execute(args.chapter, folder, given, environment=environment, show=show)
                    else:
                        notebooks.execute(args.chapter, folder, given, environment=environment)
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
    from ..runtime import Runtime

    chosen = {name: known.default for name, known in parameters(chapter).items()} | given
    Runtime.choose(chosen.get("device", "auto"), chosen.get("precision", "auto"))


def _batch(args: argparse.Namespace) -> int:
    from . import batch, plans

    if args.workers is not None and args.workers < 1:
        raise InputError(f"workers must be 1 or more, not {args.workers}")
    path = _plan_path(args.plan)
    plan = plans.read(path)
    out = (args.out or Path("runs") / plan.name).expanduser()
    workers = args.workers or 2
    say = (lambda event: print(json.dumps(event), flush=True)) if args.json else None
    if args.dry_run:
        return _show_plan(plan, out, workers, args.json)
    for label, why in plan.refused:
        print(f"{_coloured('dfkd: refused:', '31')} {label}: {why}", file=sys.stderr)
    if not plan.points:
        raise InputError(f"{path} has no point that can run")
    if not args.scheduler:
        for chosen, point in {_chosen(point.values): point for point in plan.points}.items():
            if chosen not in {("auto", "auto"), ("auto", "float32"), ("cpu", "float32")}:
                _check_device(point.chapter, point.given)
    try:
        summary = batch.run(
            plan,
            out,
            workers=workers,
            scheduler=args.scheduler,
            retry_failed=args.retry_failed,
            say=say,
            show=not (args.quiet or args.json),
            verbose=args.verbose,
        )
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"; what is finished stays, continue with: {args.command}") from None
    if args.json:
        print(json.dumps({"event": "summary", **asdict(summary)}), flush=True)
    else:
        _print_summary(summary, out)
    return summary.status


def _plan_path(name: str) -> Path:
    """The file of a plan, or the plan of the book that has this name."""
    if Path(name).is_file():
        return Path(name)
    ours = {path.stem: path for path in sorted((book_root() / "plans").glob("*.yml"))}
    if name in ours:
        return ours[name]
    raise unknown("plan", name, ours)


def _show_plan(plan: Plan, out: Path, workers: int, as_json: bool) -> int:
    from . import plans

    known = plans.recorded(out, Path("runs"), Path("_build/runs"))
    states = [plans.state(out / point.name) for point in plan.points]
    took = [plans.estimate(point, known) for point in plan.points]
    left = [seconds for state, seconds in zip(states, took, strict=True) if state not in ("finished", "failed")]
    hours, unknown_hours = sum(seconds[0] for seconds in left if seconds) / 3600, left.count(None)
    status = 2 if plan.refused else 0
    if as_json:
        points = [
            {
                "point": p.name,
                "what": p.label,
                "state": state,
                "hours": t and t[0] / 3600,
                "of this point": bool(t and t[1]),
            }
            for p, state, t in zip(plan.points, states, took, strict=True)
        ]
        facts = {"title": plan.title, "points": points, "refused": plan.refused, "to run": len(left)}
        print(json.dumps(facts | {"hours": hours, "without record": unknown_hours, "workers": workers}, indent=1))
        return status
    if plan.title:
        print(plan.title)
    for point, state, seconds in zip(plan.points, states, took, strict=True):
        shown = f"{seconds[0] / 3600:7.2f} h {'' if seconds[1] else '~'}" if seconds else "  no record"
        print(f"{state:10} {shown:13} {point.label}")
    for label, why in plan.refused:
        print(f"{'refused':10} {'':13} {label}: {why}")
    shared = f", about {hours / workers:.2f} h with {workers} workers" if workers > 1 else ""
    print(f"{len(states)} points, {len(left)} of them to run: {hours:.2f} h of work{shared}")
    if unknown_hours:
        print(f"{unknown_hours} of them have no record of their profile, and are not in these hours")
    if any(seconds and not seconds[1] for seconds in took):
        print("~ is the mean of other runs of the profile; the machine that was recorded may not be yours")
    return status


def _print_summary(summary: Summary, out: Path) -> None:
    counts = [f"{summary.finished} done" + (f" ({summary.before} before)" if summary.before else "")]
    counts += [f"{len(items)} {what}" for what, items in _bad(summary).items() if items]
    print(f"{', '.join(counts)}, in {clock(summary.seconds)}")
    for _, folder, error in summary.failed:
        print(f"failed: {error}\n  kept in {folder}: the partial notebook, and the traceback in failed.json")
    for why in dict.fromkeys(error for _, _, error in summary.not_run):
        print(f"not run: {why}")
    for label, why in summary.refused:
        print(f"refused: {label}: {why}")
    if summary.failed:
        print("--retry-failed runs what failed again")
    if summary.finished:
        print(f"the figures: dfkd results --runs {shlex.quote(str(out))}")


def _bad(summary: Summary) -> dict[str, Sequence[Any]]:
    return {"failed": summary.failed, "not run": summary.not_run, "refused": summary.refused}


def _chosen(values: dict[str, Any]) -> tuple[str, str]:
    return values.get("device", "auto"), values.get("precision", "auto")


def _results(args: argparse.Namespace) -> None:
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
    from . import tables

    if form == "latex":
        sys.stdout.write(tables.latex(shown))
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


def _book(args: argparse.Namespace) -> None:
    from .site import build, build_stored

    if args.stored:
        print(f"the book is at {build_stored(single=args.single)}")
    else:
        build(args.profile, args.workers, single=args.single)


def _doctor(args: argparse.Namespace) -> None:
    from importlib.metadata import PackageNotFoundError, version

    from .. import data
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
    for name in data.names():
        stored = (data_root() / name / "train.npz").is_file()
        sets[name] = (
            "embedded" if name in data.sources.EMBEDDED else "there" if stored else f"not there: dfkd data {name}"
        )
    facts = {
        "dfkd_lib": f"{__version__}, book at {book_root()}",
        "python": f"{sys.version.split()[0]}, {sys.executable}",
    }
    facts |= found | {"runtime": Runtime.choose().describe()} | free
    if args.json:
        print(json.dumps(facts | {"datasets": sets}, indent=1))
        return
    for name, text in facts.items():
        print(f"{name:12} {text}")
    for name, text in sets.items():
        print(f"  {name:14} {text}")


def _data(args: argparse.Namespace) -> None:
    from .. import data

    paths = data.prepare(args.dataset)
    if args.json:
        print(json.dumps([str(path) for path in paths]))
        return
    print("\n".join(map(str, paths)) or f"{args.dataset} is embedded: there is nothing to fetch")


def _test(args: argparse.Namespace) -> int:
    from .checks import check

    return 1 if check() else 0


def _refresh(args: argparse.Namespace) -> None:
    from .notebooks import refresh, stored_notebooks

    known = {path.stem: path for path in stored_notebooks()}
    if args.notebook not in (*known, "all"):
        raise unknown("notebook", args.notebook, [*known, "all"])
    for name in known if args.notebook == "all" else [args.notebook]:
        refresh(known[name])
        print(f"{known[name]}: fresh")
