"""Records: written whole, refused when damaged, grouped by everything but the seed."""

from __future__ import annotations

import json
import math

import pytest
from conftest import classifier, generator

from dfkd_lib import records
from dfkd_lib.errors import DamagedFile, DFKDError, InputError
from dfkd_lib.files import lock
from dfkd_lib.methods.dfad import DFAD, Settings
from dfkd_lib.reproduction import pages
from dfkd_lib.reproduction.chapter import Chapter
from dfkd_lib.reproduction.parameters import parameters


def record(**changes) -> dict:
    return {
        "chapter": "dfad", "profile": "cpu", "parameters": {"dataset": "mnist"}, "seed": 0, "metrics": {}, "best": {},
        "seconds": 1.0, "finished": "2026-01-01T00:00:00+00:00",
        "data": [{"name": "mnist", "split": "test", "fingerprint": "0"}],
    } | changes  # fmt: skip


def test_round_trip(tmp_path):
    records.write(tmp_path / "run", record(metrics={"a/b/c": None}))
    read = records.read(tmp_path / "run")
    assert read["metrics"] == {"a/b/c": None}
    assert (read["run"], read["folder"]) == ("run", tmp_path / "run")


@pytest.mark.parametrize("text", ["{", "[]", "{}", json.dumps({"schema": 99} | record())])
def test_what_is_no_record_is_refused(tmp_path, text):
    (tmp_path / "record.json").write_text(text)
    with pytest.raises(DamagedFile, match=r"record\.json"):
        records.read(tmp_path)


def test_groups_differ_by_more_than_the_seed_and_come_largest_first():
    runs = [
        record(seed=1),
        record(seed=0),
        record(profile="smoke"),
        record(profile="paper-mnist"),
        record(parameters={"dataset": "mnist", "k": 9}),
    ]
    groups = records.group(runs)
    assert list(groups) == ["paper-mnist mnist", "cpu mnist", "cpu mnist (2)", "smoke mnist"]
    assert [r["seed"] for r in groups["cpu mnist"]] == [0, 1]


def test_runs_of_the_same_words_stay_apart(monkeypatch):
    """Two kinds of students may have the same words, and a chapter that keeps runs by them must lose neither."""
    runs = [record(profile=name, parameters={"dataset": "mnist"}) for name in ("gpu", "gpu-cut")]
    monkeypatch.setattr(records, "committed", lambda *chapters: runs)
    larger = pages.larger_runs("dfad")
    assert [found for _, found in larger] == [[runs[0]], [runs[1]]]
    (one, other) = (words for words, _ in larger)
    assert one.removesuffix(", profile gpu") == other.removesuffix(", profile gpu-cut") != one
    monkeypatch.setattr(records, "committed", lambda *chapters: runs[:1])
    assert "profile" not in pages.larger_runs("dfad")[0][0]


def test_provenance_names_code_and_packages():
    facts = records.provenance()
    assert len(facts["code"]["source"]) == 12
    assert facts["packages"]["torch"] != "absent"


def namespace(**changes) -> dict:
    values = {name: parameter.default for name, parameter in parameters("dfad").items()}
    return values | {"device": "cpu", "unrelated_variable": 1} | changes


def game(chapter: Chapter, lr: float = 0.05) -> DFAD:
    settings = Settings(latent_dim=6, batch_size=8, k=1, lr_student=lr)
    return DFAD(classifier(6), classifier(4), generator(), settings, chapter.runtime)


def test_a_chapter_leaves_its_record_history_and_checkpoints(tmp_path):
    chapter = Chapter("dfad", namespace(out=str(tmp_path)))
    figures = iter([0.2, 0.9, 0.5, 0.5, 0.5, 0.5])
    method = game(chapter)
    chapter.fit("a/DFAD", method, 6, evaluate=lambda: {"accuracy": next(figures)}, eval_every=2)
    chapter.note("a/nothing/value", math.nan)
    chapter.finish()
    kept = records.read(tmp_path)
    assert kept["metrics"] == {"a/DFAD/accuracy": 0.5, "a/nothing/value": None}
    assert kept["best"] == {"a/DFAD/accuracy": 0.9} and kept["resumed"] == {}
    assert "out" not in kept["parameters"] and "unrelated_variable" not in kept["parameters"]
    assert (tmp_path / "history.csv").read_text().startswith("fit,step,")
    assert (tmp_path / "checkpoints" / "a-DFAD.safetensors").is_file()


def test_a_record_says_where_a_run_was_resumed_and_other_parameters_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("DFKD_CHECKPOINT_SECONDS", "0")

    def begin(**changes) -> Chapter:
        return Chapter("dfad", namespace(out=str(tmp_path), **changes))

    chapter = begin()
    method = game(chapter)
    step = method.step
    method.step = lambda: step() if method.steps < 3 else {}["killed"]
    run = {"n_steps": 5, "evaluate": lambda: {"accuracy": 0.5}}
    with pytest.raises(KeyError):
        chapter.fit("a/DFAD", method, **run)
    for changes, said in (({"seed": 1}, "seed = 0 where this one has seed = 1"), ({"k": 7}, "has k = 7")):
        other = begin(**changes)
        with pytest.raises(DamagedFile, match=said):
            other.fit("a/DFAD", game(other), **run)
    again = begin(threads=1)
    again.fit("a/DFAD", game(again), **run)
    assert again.finish()["resumed"] == {"a/DFAD": {"at": [3], "sources": [records.provenance()["code"]["source"]]}}


def test_every_choice_of_the_runtime_is_a_parameter():
    chosen = namespace(precision="bfloat16", layout="contiguous", compile_networks=True, seed=4)
    runtime = Chapter("dfad", chosen).runtime
    assert (runtime.precision, runtime.channels_last, runtime.compile, runtime.seed) == ("bfloat16", False, True, 4)
    assert Chapter("dfad", namespace(precision="bfloat16")).runtime.channels_last


def test_a_chapter_without_a_folder_keeps_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    chapter = Chapter("dfad", namespace())
    chapter.fit("a/DFAD", game(chapter), 2, evaluate=lambda: {"accuracy": 0.0})
    chapter.finish()
    assert not list(tmp_path.iterdir())


def test_divergence_is_a_result_only_where_it_is_expected(capsys):
    chapter = Chapter("dfad", namespace())
    evaluate = dict.fromkeys(["accuracy"], 0.1).copy
    assert chapter.fit("a/wild", game(chapter, lr=1e30), 9, evaluate=evaluate, may_diverge=True) is None
    assert chapter.metrics["a/wild/accuracy"] is None
    assert "diverged" in capsys.readouterr().out
    with pytest.raises(DFKDError, match="step 1; lower the learning rate"):
        chapter.fit("a/wilder", game(chapter, lr=1e30), 9, evaluate=evaluate)


def test_one_folder_serves_one_process_at_a_time(tmp_path, monkeypatch):
    from dfkd_lib.reproduction import chapter as module

    monkeypatch.setattr(module, "FOLDER_PATIENCE", 0.1)
    with lock(tmp_path / ".lock"), pytest.raises(DFKDError, match="in use by another process"):
        Chapter("dfad", namespace(out=str(tmp_path)))
    Chapter("dfad", namespace(out=str(tmp_path)))
    Chapter("dfad", namespace(out=str(tmp_path)))  # its cell was run again
    with pytest.raises(DFKDError, match="in use by another process"), lock(tmp_path / ".lock", timeout=0):
        pass


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seed": 1.5}, "parameter seed: 1.5 must be of type int"),
        ({"parts": ["gradient"]}, "parameter parts"),
        ({"parts": "gradients"}, "must be a list"),
        ({"lr_student": 0.0}, "must be in"),
        ({"seed": 2**70}, "more than 63 bits"),
    ],
)
def test_a_notebook_that_papermill_runs_checks_its_parameters_too(changes, words):
    with pytest.raises(InputError, match=words):
        Chapter("dfad", namespace(**changes))


def test_a_chapter_of_another_copy_of_the_library_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv("DFKD_PACKAGE", str(tmp_path / "dfkd_lib"))
    with pytest.raises(InputError, match="two packages dfkd_lib are on the path"):
        Chapter("dfad", namespace())
