"""The searches for settings: the same number of trials for all, no test image, records that are not made twice."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
import yaml

from benchmarks import search, search_text
from dfkd_lib import distillers
from dfkd_lib.errors import InputError
from dfkd_lib.locations import PACKAGE

ROOT = PACKAGE.parent


PLANS = sorted((ROOT / "benchmarks").glob("search-*.yml"))


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_committed_plans_name_settings_that_exist_on_pairs_that_fit(path):
    plan = yaml.safe_load(path.read_text(encoding="utf-8"))
    trials = search.trials_of(plan)
    assert len(trials) == len({json.dumps(trial, sort_keys=True) for trial in trials})
    for trial in trials:
        distillers.settings_for(trial["method"], preset="paper", n_updates=plan["n_updates"], **trial["settings"])
        if distillers.needs_batch_norm(trial["method"]):
            assert trial["pair"] == "batch-norm"


def test_a_method_with_more_trials_than_another_is_refused():
    of_method = {"pair": "plain", "base": {}}
    plan = {"methods": {"dafl": of_method | {"trials": [{}, {}]}, "zskt": of_method | {"trials": [{}]}}}
    with pytest.raises(InputError, match="same number of trials"):
        search.trials_of(plan)


def test_trials_are_recorded_and_run_once(tmp_path):
    tiny = {"batch_size": 8, "latent_dim": 8, "ngf": 2, "kd_steps": 1, "lr_student": 0.01}
    plan = {
        "dataset": "digits", "image_size": 8, "precision": "float32", "seed": 0, "n_updates": 2, "teacher_epochs": 1,
        "pairs": {"plain": ["digits_cnn", "digits_cnn_half"]},
        "methods": {"dafl": {"pair": "plain", "base": tiny, "trials": [{}, {"oh": 1.0}]}},
    }  # fmt: skip
    path = tmp_path / "search-digits.yml"

    def run() -> dict:
        path.write_text(yaml.safe_dump(plan), encoding="utf-8")
        search.main([str(path)])
        return json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))

    first = run()
    assert [trial["settings"] for trial in first["trials"]] == [tiny, tiny | {"oh": 1.0}]
    assert all(0 <= trial["held-out accuracy"] <= 1 for trial in first["trials"])
    plan["methods"]["dafl"]["trials"][1] = {"oh": 2.0}
    second = run()
    assert second["trials"][:2] == first["trials"], "kept, not run again"
    assert len(second["trials"]) == 3


# The best trial of DFAD (KL divergence) collapsed with another seed. In one stage the rate that follows from DFAD's
# collapses over the preset's 1,500 updates; a third of it does not.
INSTEAD = {"dfad": 2, "dfad-one-stage": 1}
# The width of NAYER's generator, which CPNet's takes from the teacher.
UNUSED = {"cpnet": {"ngf": 16}}


@pytest.mark.parametrize("name", ["search-mnist", "search-mnist-cpnet"])
def test_the_presets_are_the_best_trials_of_the_stored_search_or_equal_to_them(name):
    folder = ROOT / "benchmarks"
    plan = yaml.safe_load((folder / f"{name}.yml").read_text())
    trials = json.loads((folder / f"{name}.json").read_text())["trials"]
    for name, asked in plan["methods"].items():
        own = [t for t in trials if t["method"] == name]
        assert [t["settings"] for t in own] == [asked["base"] | trial for trial in asked["trials"]], name
        preset = distillers.settings_for(name, preset="mnist", n_updates=1000)
        (chosen,) = (
            t for t in own
            if distillers.settings_for(name, preset="paper", n_updates=1000, **t["settings"], **UNUSED.get(name, {}))
            == preset
        )  # fmt: skip
        if name in INSTEAD:
            assert chosen["trial"] == INSTEAD[name]
        else:
            best = max(t["held-out accuracy"] for t in own)
            assert best - chosen["held-out accuracy"] < 0.005, name


def test_the_texts_search_judges_every_row_at_every_rate_by_held_out_sentences(tmp_path: Path, monkeypatch) -> None:
    pytest.importorskip("transformers")
    from dfkd_lib.data import text
    from dfkd_lib.models import text as networks

    monkeypatch.setenv("DFKD_DATA", str(tmp_path))
    monkeypatch.setattr(search_text, "FOUND", tmp_path / "search-text.json")
    (tmp_path / "agnews").mkdir()
    rows = [(f"word{i % 4} item {i}", i % 4) for i in range(80)]
    pd.DataFrame(rows, columns=["text", "label"]).to_csv(tmp_path / "agnews" / "train.csv.xz", index=False)
    words = text.tokenizer_for("agnews", 120)
    words.save_pretrained(tmp_path / "encoder")
    network = networks.bert(text.vocabulary_of(words), 2, layers=2, width=8, heads=2, positions=16)
    network.base_model.save_pretrained(tmp_path / "encoder")
    small = {
        "dataset": "agnews", "text_encoder": str(tmp_path / "encoder"), "length": 8, "min_length": 4, "batch_size": 8,
        "student_layers": [1], "teacher_epochs": 1, "replay": 1, "craft_steps": 1,
    }  # fmt: skip
    monkeypatch.setattr(search_text, "profile", lambda chapter, name: small)
    read = []
    monkeypatch.setattr(text, "_read", lambda name, stored, was=text._read: (read.append(stored), was(name, stored))[1])
    for lr in ("0.01", "0.001"):  # the second call keeps what the first one found
        search_text.main(["tiny", "--batches", "2", "--lr", "0.01", lr, "--limit", "6"])
    trials = json.loads((tmp_path / "search-text.json").read_text(encoding="utf-8"))["trials"]
    assert [(trial["row"], trial["lr"]) for trial in trials] == [
        (row, lr) for lr in (0.01, 0.001) for row in search_text.ROWS
    ]
    right = [6 * trial["held-out accuracy"] for trial in trials]
    assert right == pytest.approx([round(n) for n in right]), "six sentences, each once"
    assert set(read) == {"train"}
