"""The search behind the presets: every trial of a plan, one after the other, judged on held-out images.

    python benchmarks/search.py benchmarks/search-mnist.yml

The teachers learn on nine tenths of the training images ("fit"); the students are judged by the last tenth
("held_out"), once, at the end of a trial. The test images take no part. Every method has the same number of trials
and of student updates. Results go into the JSON file beside the plan after each trial; what it holds is not run again.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml

from dfkd_lib import data, distillers, models, records
from dfkd_lib.errors import InputError
from dfkd_lib.files import read_json, write_json
from dfkd_lib.measures.evaluation import accuracy
from dfkd_lib.runtime import Runtime, hardware
from dfkd_lib.teachers import Teacher, recipe, train_or_load
from dfkd_lib.training.fit import fit


def trials_of(plan: dict[str, Any]) -> list[dict[str, Any]]:
    """The trials in the order in which they run, first ones first: {"method", "pair", "trial", "settings"}.

    Raises:
        InputError: the methods do not all have the same number of trials.
    """
    counts = {name: len(of_method["trials"]) for name, of_method in plan["methods"].items()}
    if len(set(counts.values())) != 1:
        raise InputError(f"every method has to get the same number of trials, not {counts}")
    return [
        {"method": name, "pair": of_method["pair"], "trial": i, "settings": of_method["base"] | of_method["trials"][i]}
        for i in range(next(iter(counts.values())))
        for name, of_method in plan["methods"].items()
    ]


def run(trial: dict[str, Any], plan: dict[str, Any], teacher: Teacher, runtime: Runtime) -> dict[str, Any]:
    """One trial: its accuracy on the held-out images, the last batch-norm and class terms, and what it took."""
    held_out = data.load(plan["dataset"], "held_out", image_size=plan["image_size"], device=runtime.device)
    about = data.info(plan["dataset"])
    torch.manual_seed(runtime.seed)
    student = models.build(
        plan["pairs"][trial["pair"]][1], n_classes=held_out.n_classes, in_channels=held_out.image_shape[0],
        mean=about.mean, std=about.std,
    )  # fmt: skip
    start = time.perf_counter()
    method = distillers.build(
        trial["method"], teacher.module, student, held_out.image_shape, runtime, preset="paper",
        n_updates=plan["n_updates"], **trial["settings"],
    )  # fmt: skip
    result = fit(method, distillers.n_calls(method), name=f"{trial['method']} {trial['trial']}")
    return {
        "held-out accuracy": accuracy(method.student, held_out, runtime),
        "terms": {name: value for name, value in result.history[-1].items() if name not in ("step", "seconds")},
        "seconds": round(time.perf_counter() - start, 1),
    }


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("plan", type=Path)
    parser.add_argument("--only", nargs="*", default=[], metavar="METHOD", help="run these methods alone")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args(given)
    plan = yaml.safe_load(arguments.plan.read_text(encoding="utf-8"))
    runtime = Runtime.choose(arguments.device, plan["precision"], seed=plan["seed"])
    learnt, held_out = (data.load(plan["dataset"], part, image_size=plan["image_size"]) for part in ("fit", "held_out"))
    teachers = {}
    for pair, (network, _) in plan["pairs"].items():
        how = replace(recipe(plan["dataset"], network), epochs=plan["teacher_epochs"])
        teachers[pair] = train_or_load(network, learnt, held_out, how, runtime)
    path = arguments.plan.with_suffix(".json")
    done: dict[str, Any] = read_json(path) if path.exists() else {"trials": []}
    for trial in trials_of(plan):
        known = any(all(old[key] == trial[key] for key in trial) for old in done["trials"])
        if known or (arguments.only and trial["method"] not in arguments.only):
            continue
        found = run(trial, plan, teachers[trial["pair"]], runtime)
        done["trials"].append(trial | found)
        done |= {
            "plan": arguments.plan.name,
            "teachers": {pair: teacher.facts["test"]["accuracy"] for pair, teacher in teachers.items()},
            **records.provenance(),
            "hardware": hardware(runtime.device),
            "runtime": runtime.describe(),
        }
        write_json(path, done)
        print(f"{trial['method']:>14} {trial['trial']}: {found['held-out accuracy']:.1%} in {found['seconds']:.0f} s")


if __name__ == "__main__":
    main()
