"""The `dfkd` command: its words, and how it ends. Exit status: 0 success, 1 the work failed, 2 wrong input,
130 interrupted. What the commands do is in `cli_run`, `cli_distill`, `cli_batch` and `cli_show`.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn, TextIO

from .. import __version__
from ..errors import DFKDError, InputError, unknown
from . import cli_batch, cli_distill, cli_run, cli_show
from .messages import coloured
from .parameters import chapters, profiles


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{' '.join(message.split())}; see {self.prog} --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one `dfkd` command and return its exit status; an error is one line on stderr."""
    _open_streams()
    words = list(sys.argv[1:] if argv is None else argv)
    verbose = False
    try:
        args = parser().parse_args(words)
        args.command, verbose = shlex.join(["dfkd", *words]), getattr(args, "verbose", False)
        status = args.work(args)
        sys.stdout.flush()
        return int(status or 0)
    except KeyboardInterrupt as e:
        _say(f"dfkd: interrupted{e}")
        return 130
    except BrokenPipeError:  # the reader of our output left; there is nobody to tell
        _drop(sys.stdout)
        return 1
    except Exception as e:
        if verbose:
            traceback.print_exc()
        _say(f"{coloured('dfkd: error:', '31')} {_line(e)}")
        if isinstance(e, OSError):
            _drop(sys.stdout)
        return 2 if isinstance(e, InputError) else 1


def _line(error: Exception) -> str:
    """An error in one line: those of the project say it themselves, the system's name the file."""
    text = " ".join(str(error).split())
    if isinstance(error, DFKDError):
        return text
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror or text}"
    return f"{type(error).__name__}: {text} (a fault of this program; -v shows where)"


def _open_streams() -> None:
    """A closed stream swallows what is printed; what a terminal has no letter for becomes a question mark."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def _drop(stream: TextIO) -> None:
    """Let go of what could not be written, which Python would try again, and complain of, as it ends."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _say(line: str) -> None:
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)


def _path(text: str) -> Path:
    """A path of the command line; `~` is the home folder.

    Raises:
        argparse.ArgumentTypeError: no file could have it.
    """
    try:
        path = Path(text).expanduser()
        path.exists()
        if not text:
            raise ValueError("an empty name")
    except (OSError, RuntimeError, ValueError) as e:
        why = e.strerror if isinstance(e, OSError) else e
        raise argparse.ArgumentTypeError(f"{text[:100]!r} cannot be used: {why}") from None
    return path


def parser() -> argparse.ArgumentParser:
    """The parser of the whole command."""
    top = _Parser(
        prog="dfkd",
        description="Distilling Without Data: run the book's chapters, or distil a network of your own.",
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
        cli_show.list_chapters,
        "chapters and their profiles, or the parameters of one chapter",
        "dfkd list\ndfkd list fast\ndfkd list --json",
        "as one JSON value",
    )
    one.add_argument("chapter", nargs="?", metavar="CHAPTER")

    one = command(
        "run",
        cli_run.run,
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
    one.add_argument("-f", dest="file", type=_path, metavar="FILE.yml", help="set the parameters that a file holds")
    one.add_argument("--plain", action="store_true", help="in this process, without Jupyter: leaves no notebook")
    where = one.add_mutually_exclusive_group()
    where.add_argument("--out", type=_path, metavar="DIR", help="default: runs/CHAPTER-PROFILE-seedN")
    where.add_argument("--resume", type=_path, metavar="DIR", help="continue the unfinished run in DIR")

    one = command(
        "distill",
        cli_distill.distill,
        "a smaller network from a trained one of your own, without its data",
        "dfkd distill torchvision:resnet34 torchvision:resnet18 --weights mine.pth --image-shape 3x32x32 \\\n"
        "    --classes 10 --mean 0.49,0.48,0.45 --std 0.25,0.24,0.26 --minutes 60 --out small\n"
        "dfkd distill nets.py:teacher nets.py:student --weights mine.safetensors --image-shape 1x28x28 \\\n"
        "    --classes 10 --method dafl --updates 2000 --test pictures/test --onnx --out small",
    )
    cli_distill.add_arguments(one, _path)

    one = command(
        "batch",
        cli_batch.batch,
        "run the points of a plan that are not finished yet; the same command continues a batch that was stopped",
        "dfkd batch book/plans/smoke.yml --dry-run\n"
        "dfkd batch book/plans/smoke.yml --workers 2\n"
        "dfkd batch cifar10 --scheduler tcp://10.0.0.1:8786\n"
        "dfkd batch smoke --retry-failed --json",
        "print every event and the summary as JSON lines",
    )
    one.add_argument("plan", metavar="PLAN.yml", help="a file, or the name of a plan of the book")
    one.add_argument("--out", type=_path, metavar="DIR", help="a folder for each point goes here (default: runs/PLAN)")
    machines = one.add_mutually_exclusive_group()
    machines.add_argument("--workers", type=int, metavar="N", help="points at a time on this machine (default: 2)")
    machines.add_argument("--scheduler", metavar="ADDRESS", help="of a running Dask scheduler, tcp://HOST:PORT")
    one.add_argument("--dry-run", action="store_true", help="print the points and the hours they take, and stop")
    one.add_argument("--retry-failed", action="store_true", help="run points again that failed before")

    one = command(
        "results",
        cli_show.results,
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
        "--runs", type=_path, action="append", metavar="DIR", help="folder of run folders (default: runs, if there)"
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
        "doctor",
        cli_show.doctor,
        "what is installed, which device, which data are there",
        "dfkd doctor",
        "as one JSON value",
    )

    one = command(
        "data", cli_show.data, "download and convert a dataset", "dfkd data cifar10", "the paths as one JSON value"
    )
    one.add_argument("dataset", metavar="NAME")

    command("test", _test, "everything that a change must pass", "dfkd test")

    one = command(
        "refresh",
        _refresh,
        "for contributors: run stored notebooks anew, in place",
        "dfkd refresh fast\ndfkd refresh all",
    )
    one.add_argument("notebook", metavar="NAME", help="a chapter, a page such as results, README, or all")

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
    files |= {"weights": shtab.FILE, "student_weights": shtab.FILE, "images": shtab.DIR, "test": shtab.DIR}
    for action in top._subparsers._group_actions[0].choices.values():  # type: ignore[union-attr]
        for option in action._actions:
            if option.dest in known:
                option.choices = known[option.dest]
            elif option.dest in files:
                option.complete = files[option.dest]
    return top


def _book(args: argparse.Namespace) -> None:
    from .site import build, build_stored

    if args.stored:
        print(f"the book is at {build_stored(single=args.single)}")
    else:
        build(args.profile, args.workers, single=args.single)


def _test(args: argparse.Namespace) -> int:
    from .checks import check

    return 1 if check() else 0


def _refresh(args: argparse.Namespace) -> None:
    from . import readme
    from .notebooks import refresh, stored_notebooks

    known = {path.stem: path for path in stored_notebooks()}
    if args.notebook not in (*known, "README", "all"):
        raise unknown("notebook", args.notebook, [*known, "README", "all"])
    if args.notebook in ("README", "all"):
        print(f"{readme.refresh()}: fresh")
    for name in known if args.notebook == "all" else [args.notebook] if args.notebook in known else []:
        refresh(known[name])
        print(f"{known[name]}: fresh")
