"""`dfkd run`: one chapter, as a notebook or plain, from the start or from where it was."""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
import sys
from pathlib import Path
from typing import Any

from ..errors import DFKDError, InputError, unknown
from ..files import lock, output_folder
from .parameters import check_parameters, parameter_file, parameters, profile, profiles, refuse_places


def run(args: argparse.Namespace) -> None:
    """`dfkd run`: run or resume, then print the final figures."""
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
    from . import notebooks, plain, runs

    given, command, is_plain = _asked(args), args.command, args.plain
    if args.resume:
        folder = args.resume.resolve()
        noted = runs.asked(folder)
        given, command = _agreed(args, noted, given), noted["command"]
        is_plain = is_plain or noted.get("plain", False)
        if not runs.made_of(args.chapter).items() <= noted.items():
            print("dfkd: note: the chapter or the library has changed since this run began", file=sys.stderr)
    check_device(args.chapter, given)
    if not args.resume:
        folder = output_folder(args.out or _default_folder(args.chapter, given))
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
            except InputError:
                runs.refused(folder)
                raise
            except KeyboardInterrupt:
                again = shlex.join(["dfkd", "run", args.chapter, "--resume", str(folder)])
                raise KeyboardInterrupt(f"; continue with: {again}") from None
    return {"out": str(folder), "metrics": records.read(folder)["metrics"]}


def _asked(args: argparse.Namespace) -> dict[str, Any]:
    """The parameters that the command line sets: profile, then file, then --seed and -p."""
    refuse_places(dict(args.pairs), "-p")
    pairs = [*([("seed", args.seed)] if args.seed is not None else []), *map(tuple, args.pairs)]
    chosen = "smoke" if args.profile is None and not args.resume else args.profile
    start = {} if chosen is None else profile(args.chapter, chosen)
    from_file = parameter_file(args.file) if args.file else {}
    return check_parameters(args.chapter, {**start, **from_file}, pairs)


def _agreed(args: argparse.Namespace, noted: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """The parameters of the run to resume; options that say otherwise are an error."""
    if noted["chapter"] != args.chapter:
        raise InputError(f"{args.resume} holds a run of chapter {noted['chapter']}, not of {args.chapter}")
    where = str(args.resume / "run.json")
    refuse_places(noted["parameters"].keys() - {"profile"}, where)
    if noted["parameters"].get("profile") not in profiles(args.chapter):
        raise unknown(
            f"profile of {args.chapter} in {where}", noted["parameters"].get("profile"), profiles(args.chapter)
        )
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


def check_device(chapter: str, given: dict[str, Any]) -> None:
    """Refuse a device or precision that cannot be, before a kernel starts."""
    from ..runtime import Runtime

    chosen = {name: known.default for name, known in parameters(chapter).items()} | given
    Runtime.choose(
        chosen.get("device", "auto"),
        chosen.get("precision", "auto"),
        seed=chosen.get("seed", 0),
        threads=chosen.get("threads", 0),
    )
