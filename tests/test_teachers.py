"""Teachers are trained once, found again, and refused when damaged."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, replace

import pytest
import torch

from dfkd_lib import teachers
from dfkd_lib.data import load
from dfkd_lib.errors import DamagedFile, DFKDError
from dfkd_lib.files import sha256
from dfkd_lib.locations import book_root
from dfkd_lib.runtime import Runtime
from dfkd_lib.teachers import Teacher, from_book, put_into_book, recipe, train_or_load
from dfkd_lib.training.supervised import Recipe

QUICK = Recipe(epochs=1, batch_size=64, lr=0.05, schedule="one-cycle")


def ask(recipe: Recipe = QUICK, seed: int = 0) -> Teacher:
    runtime = Runtime.choose("cpu", "float32", seed=seed)
    return train_or_load("digits_cnn_half", load("digits", "train"), load("digits", "test"), recipe, runtime)


def test_the_second_request_trains_nothing(monkeypatch):
    first = ask()
    monkeypatch.setattr(teachers, "_train", None)
    second = ask()
    assert first.facts == second.facts
    for name, value in first.module.state_dict().items():
        assert torch.equal(value, second.module.state_dict()[name])
    assert not second.module.training
    assert not any(p.requires_grad for p in second.module.parameters())


def test_what_determines_the_weights_is_part_of_the_name():
    paths = {ask().path, ask(replace(QUICK, lr=0.06)).path, ask(seed=1).path}
    assert len(paths) == 3


def test_the_facts_tell_recipe_data_and_figure():
    teacher = ask()
    facts = json.loads(teacher.path.with_suffix(".json").read_text())
    assert facts["recipe"]["lr"] == 0.05
    assert facts["data"]["fingerprint"] == load("digits", "train").fingerprint
    assert 0 < facts["test"]["accuracy"] <= 1


@pytest.mark.parametrize("damage", ["weights cut", "weights gone", "facts cut", "facts of something else"])
def test_damaged_files_are_named_with_the_remedy(damage):
    path = ask().path
    facts = path.with_suffix(".json")
    if damage == "weights cut":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "weights gone":
        path.unlink()
    else:
        facts.write_text(facts.read_text()[:40] if damage == "facts cut" else "{}")
    with pytest.raises(DamagedFile, match=r"digits-digits_cnn_half.*delete"):
        ask()


def test_deleting_what_the_message_names_mends_it():
    teacher = ask()
    teacher.path.write_bytes(b"")
    with pytest.raises(DFKDError) as error:
        ask()
    assert str(teacher.path.with_suffix(".json")) in str(error.value)
    teacher.path.with_suffix(".json").unlink()
    assert ask().facts["sha256"] == teacher.facts["sha256"]


def test_two_processes_train_one_teacher_once(tmp_path, monkeypatch):
    monkeypatch.setenv("DFKD_EVENTS", str(tmp_path / "events.jsonl"))
    code = "import torch; torch.set_num_threads(1); import test_teachers; print(test_teachers.ask().facts['sha256'])"
    running = [
        subprocess.Popen([sys.executable, "-c", code], cwd="tests", stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    sums = {process.communicate()[0].strip() for process in running}
    assert len(sums) == 1
    assert all(process.returncode == 0 for process in running)
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert sum(event["event"] == "start" for event in events) == 1


def test_a_teacher_comes_with_the_book_in_any_precision_and_is_trained_when_asked_for(tmp_path, monkeypatch, capsys):
    test = load("digits", "test")
    trained = ask()
    path = put_into_book(trained, test, Runtime.choose("cpu", "float32"), tmp_path / "teachers")
    facts = json.loads(path.with_suffix(".json").read_text())
    assert facts["stored"] == "float16" and facts["test as trained"] == trained.facts["test"]
    assert path.stat().st_size < 0.6 * trained.path.stat().st_size
    monkeypatch.setenv("DFKD_BOOK", str(tmp_path))
    monkeypatch.setenv("DFKD_CACHE", str(tmp_path / "empty"))
    runtime = Runtime.choose("cpu", "bfloat16", seed=5)
    found = train_or_load("digits_cnn_half", load("digits", "train"), test, QUICK, runtime)
    assert found.path == path and "comes with the book" in capsys.readouterr().out
    for name, value in found.module.state_dict().items():
        assert torch.allclose(value, trained.module.state_dict()[name], rtol=1e-3, atol=1e-4)
    own = train_or_load("digits_cnn_half", load("digits", "train"), test, QUICK, runtime, from_book=False)
    assert own.path.parent == tmp_path / "empty" / "teachers"
    other = train_or_load("digits_cnn_half", load("digits", "train"), test, replace(QUICK, lr=0.06), runtime)
    assert other.path != path, "another recipe is another teacher"


def test_a_teacher_of_the_book_needs_no_training_images(tmp_path, monkeypatch):
    trained = ask()
    path = put_into_book(trained, load("digits", "test"), Runtime.choose("cpu", "float32"), tmp_path / "teachers")
    monkeypatch.setenv("DFKD_BOOK", str(tmp_path))
    monkeypatch.setattr("dfkd_lib.data.sources.arrays", lambda *_: pytest.fail("images were asked for"))
    runtime = Runtime.choose("cpu", "float32", seed=5)
    found = from_book("digits_cnn_half", "digits", QUICK, runtime)
    assert found and found.path == path
    assert not any(p.requires_grad for p in found.module.parameters())
    for asked in (("digits_cnn", "digits", QUICK), ("digits_cnn_half", "mnist", QUICK),
                  ("digits_cnn_half", "digits", replace(QUICK, lr=0.06))):  # fmt: skip
        assert from_book(*asked, runtime) is None


def test_the_teachers_of_the_book_are_whole():
    shelved = sorted((book_root() / "teachers").glob("*.json"))
    assert shelved
    for path in shelved:
        facts = json.loads(path.read_text())
        weights = path.with_suffix(".safetensors")
        assert sha256(weights) == facts["sha256"] and weights.stat().st_size < 5e6
        known = json.loads(json.dumps(asdict(recipe(facts["data"]["name"], facts["model"]))))
        assert facts["recipe"] == known, "chapters would not find it"
