"""`dfkd batch`: run a plan, or show what it would run."""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError, unknown
from ..files import output_folder
from ..locations import book_root
from ..training.progress import clock
from .cli_run import check_device
from .messages import coloured

if TYPE_CHECKING:
    from .batch import Summary
    from .plans import Plan


def batch(args: argparse.Namespace) -> int:
    """`dfkd batch`: run what is missing of a plan; returns the exit status."""
    from . import plans
    from .batch import run

    if args.workers is not None and args.workers < 1:
        raise InputError(f"workers must be 1 or more, not {args.workers}")
    if args.scheduler is not None and not args.scheduler.strip():
        raise InputError("the address of the scheduler is empty; it is tcp://HOST:PORT")
    path = _plan_path(args.plan)
    plan = plans.read(path)
    out = args.out or Path("runs") / plan.name
    workers = args.workers or 2
    say = (lambda event: print(json.dumps(event), flush=True)) if args.json else None
    if args.dry_run:
        return _show_plan(plan, out, workers, args.json)
    for label, why in plan.refused:
        print(f"{coloured('dfkd: refused:', '31')} {label}: {why}", file=sys.stderr)
    if not plan.points:
        raise InputError(f"{path} has no point that can run")
    if not args.scheduler:
        for chosen, point in {_chosen(point.values): point for point in plan.points}.items():
            if chosen not in {("auto", "auto"), ("auto", "float32"), ("cpu", "float32")}:
                check_device(point.chapter, point.given)
    out = output_folder(out)
    try:
        summary = run(
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
    with contextlib.suppress(OSError):  # a name that no file can have
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
