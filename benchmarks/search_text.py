"""The students' learning rate of the text chapter's pretrained profiles, chosen by held-out sentences.

    python -m benchmarks.search_text cpu-minilm --batches 40 --lr 0.0003 0.001

Each row takes each rate once, with the profile's first student and its settings otherwise, judged once, at the end of a
trial, on a share of the training file that the teacher did not see. The test sentences take no part. The chapter has
one rate for all its rows; those here stand for their kinds: crafted, random and real sentences. Results go into
`search-text.json` beside this file after each trial; what it holds is not run again.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dfkd_lib import records
from dfkd_lib.data import text
from dfkd_lib.data.sentences import SentenceSet
from dfkd_lib.files import read_json, write_json
from dfkd_lib.measures.evaluation import agreement
from dfkd_lib.methods.as_dfd import ASDFD, Settings
from dfkd_lib.methods.as_dfd_baselines import RandomText, RealText
from dfkd_lib.models import text as networks
from dfkd_lib.reproduction.parameters import parameters, profile
from dfkd_lib.runtime import Runtime, hardware
from dfkd_lib.training.finetuning import Recipe
from dfkd_lib.training.fit import fit

FOUND = Path(__file__).with_name("search-text.json")
ROWS = ("AS-DFD", "random text, L_ss", "KD original")
TEACHER = ("layers", "width", "heads", "epochs", "lr", "lr_head", "hidden", "dropout")
SETTINGS = ("min_length", "batch_size", "craft_steps", "eta", "beta", "lambda_ss", "mask_rate", "temperature", "replay")


def build(row: str, teacher: Any, student: Any, real: SentenceSet, settings: Settings, runtime: Runtime) -> Any:
    """One row's method, as the chapter has it; only the last sees `real`."""
    if row == "KD original":
        return RealText(teacher, student, real, replace(settings, beta=0.0, lambda_ss=0.0), runtime)
    kind = ASDFD if row == "AS-DFD" else RandomText
    return kind(teacher, student, real.vocabulary, settings, runtime)


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("profile")
    parser.add_argument("--batches", type=int, required=True)
    parser.add_argument("--lr", type=float, nargs="+", required=True)
    parser.add_argument("--limit", type=int, default=500, help="held-out sentences")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, mps")
    parser.add_argument("--out", type=Path, default=FOUND, help="where the results go")
    arguments = parser.parse_args(given)
    p = {name: known.default for name, known in parameters("as-dfd").items()} | profile("as-dfd", arguments.profile)
    runtime = Runtime.choose(arguments.device, p["precision"], threads=torch.get_num_threads())
    out: Path = arguments.out
    tokenizer = text.tokenizer_of(p["text_encoder"])
    real, held_out = (
        text.load(p["dataset"], split, length=p["length"], tokenizer=tokenizer, limit=limit, device=device)
        for split, limit, device in (("fit", p["fit_limit"], "cpu"), ("held_out", arguments.limit, runtime.device))
    )
    recipe = Recipe(**{name: p[f"teacher_{name}"] for name in TEACHER}, batch_size=p["teacher_batch"])
    teacher = networks.train_or_load(real, held_out, recipe, runtime, text_encoder=p["text_encoder"])
    truth = networks.labels_of(held_out)
    done: dict[str, Any] = read_json(out) if out.exists() else {"trials": []}
    for lr in arguments.lr:
        for row in ROWS:
            trial = {"profile": arguments.profile, "batches": arguments.batches, "row": row, "lr": lr}
            if any(all(old[key] == trial[key] for key in trial) for old in done["trials"]):
                continue
            settings = Settings(
                length=real.length, pool=min(p["pool"], arguments.batches), memory=arguments.batches, lr=lr,
                n_updates=arguments.batches * (1 + p["replay"]), **{name: p[name] for name in SETTINGS},
            )  # fmt: skip
            student = networks.cut(teacher.module, p["student_layers"][0], p["keep"][0], dropout=p["dropout"])
            method = build(row, teacher.module, student, real, settings, runtime)
            start = time.perf_counter()
            fit(method, arguments.batches, name=f"{row}, {lr:g}")
            found = {
                "held-out accuracy": agreement(networks.predictions(method.student, held_out, runtime), truth),
                "teacher": teacher.facts["test"]["accuracy"],
                "seconds": round(time.perf_counter() - start, 1),
            }
            done["trials"].append(trial | found)
            done |= {**records.provenance(), "hardware": hardware(runtime.device), "runtime": runtime.describe()}
            write_json(out, done)
            print(f"{row:>18} {lr:g}: {found['held-out accuracy']:.1%} in {found['seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    main()
