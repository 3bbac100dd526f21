"""The loop: resuming, stopping on non-finite losses, guarding, saving whole files."""

from __future__ import annotations

import errno
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import classifier, generator

from dfkd_lib import files
from dfkd_lib.data import load
from dfkd_lib.errors import DamagedFile, DataFreeViolation, DFKDError, NonFiniteLoss
from dfkd_lib.locations import code_fingerprint
from dfkd_lib.methods.dfad import DFAD, Settings
from dfkd_lib.runtime import Runtime
from dfkd_lib.training import checkpoints
from dfkd_lib.training.fit import Fit, fit, resumed


def game(**settings) -> DFAD:
    runtime = Runtime.choose("cpu", "float32", seed=0)
    chosen = Settings(latent_dim=6, batch_size=8, k=2, **settings)
    return DFAD(classifier(6), torch.nn.Sequential(classifier(4), torch.nn.Dropout(0.2)), generator(), chosen, runtime)


def weight(method: DFAD) -> dict[str, float]:
    return {"accuracy": float(next(method.student.parameters()).detach().sum())}


def test_an_interrupted_run_resumes_to_the_same_end(tmp_path):
    whole = game()
    expected = fit(whole, 12, name="a", evaluate=lambda: weight(whole), eval_every=4)

    class Killed(Exception):
        pass

    first, path = game(), tmp_path / "a.safetensors"
    step = first.step

    def step_until_killed():
        if first.steps == 7:
            raise Killed
        return step()

    first.step = step_until_killed
    with pytest.raises(Killed):
        fit(first, 12, name="a", evaluate=lambda: weight(first), eval_every=4, checkpoint=path, checkpoint_every=0)
    torch.manual_seed(99)
    second = game()
    resumed = fit(second, 12, name="a", evaluate=lambda: weight(second), eval_every=4, checkpoint=path)
    assert resumed.resumed_at == [7]
    assert resumed.evaluations("accuracy") == expected.evaluations("accuracy")
    for name, value in whole.student.state_dict().items():
        assert torch.equal(value, second.student.state_dict()[name]), name


def test_a_finished_run_is_not_run_again(tmp_path):
    path = tmp_path / "a.safetensors"
    one = game()
    done = fit(one, 5, name="a", evaluate=lambda: weight(one), checkpoint=path)
    two = game()
    two.step = None
    again = fit(two, 5, name="a", evaluate=lambda: weight(two), checkpoint=path)
    assert again.history == done.history and again.resumed_at == []
    assert weight(one) == weight(two)


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    fit(game(), 3, name="a", checkpoint=path)
    with pytest.raises(DamagedFile, match="another run, with n_steps = 3 where this one has n_steps = 4"):
        fit(game(), 4, name="a", checkpoint=path)
    with pytest.raises(DamagedFile, match="with name = 'a' where this one has name = 'b'"):
        fit(game(), 3, name="b", checkpoint=path)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"seed": 1, "lr": 0.1, "parts": ["x"]}, "with seed = 0 where this one has seed = 1"),
        ({"seed": 0, "lr": 0.2, "parts": ["x"]}, "with lr = 0.1 where this one has lr = 0.2"),
        ({"seed": 0, "lr": 0.1, "parts": ["x", "y"]}, "with parts = "),
        ({"seed": 0, "lr": 0.1}, "with parts = .* where this one has no parts"),
        ({"seed": 0, "lr": 0.1, "parts": ["x"], "k": 2}, "with no k where this one has k = 2"),
        (None, "where this one has no seed"),
    ],
)
def test_a_checkpoint_of_other_parameters_is_refused_before_anything_is_touched(tmp_path, asked, said):
    path, identity = tmp_path / "a.safetensors", {"seed": 0, "lr": 0.1, "parts": ["x"]}
    fit(game(), 3, name="a", checkpoint=path, identity=identity)
    before, other = path.read_bytes(), game()
    with pytest.raises(DamagedFile, match=said):
        fit(other, 3, name="a", checkpoint=path, identity=asked)
    assert path.read_bytes() == before and other.steps == 0 and weight(other) == weight(game())
    assert fit(game(), 3, name="a", checkpoint=path, identity=identity).history


@pytest.mark.parametrize("step", [-1, 0, 4, 2.0, "2", True, None])
def test_an_impossible_step_is_refused(tmp_path, step):
    path = tmp_path / "a.safetensors"
    fit(game(), 3, name="a", checkpoint=path)
    checkpoints.save(path, checkpoints.load(path) | {"step": step})
    with pytest.raises(DamagedFile, match=rf"a\.safetensors is damaged: it says step {step!r} of 3"):
        fit(game(), 3, name="a", checkpoint=path)


def test_a_checkpoint_of_other_networks_or_of_no_run_is_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    fit(game(), 3, name="a", checkpoint=path)
    wider = game()
    wider.student = classifier(9)
    with pytest.raises(DamagedFile, match="does not fit this run"):
        fit(wider, 3, name="a", checkpoint=path)
    checkpoints.save(path, game().student.state_dict())
    with pytest.raises(DamagedFile, match="no checkpoint of a run of this version"):
        fit(game(), 3, name="a", checkpoint=path)


def test_every_break_and_every_version_of_the_library_is_kept(tmp_path, monkeypatch):
    path, run = tmp_path / "a.safetensors", {"n_steps": 6, "name": "a", "checkpoint": tmp_path / "a.safetensors"}

    def until(step: int) -> None:
        method = game()
        method_step = method.step
        method.step = lambda: method_step() if method.steps < step else {}["interrupted"]
        with pytest.raises(KeyError):
            fit(method, **run, checkpoint_every=0)

    until(2)
    assert checkpoints.load(path)["step"] == 2
    until(4)
    monkeypatch.setattr("dfkd_lib.training.fit.code_fingerprint", lambda: "changed")
    until(5)
    done = fit(game(), **run)
    assert done.resumed_at == [2, 4, 5] and done.sources == [code_fingerprint(), "changed"]
    assert resumed(done) == {"a": {"at": [2, 4, 5], "sources": done.sources}}
    again = fit(game(), **run)
    assert resumed(again) == resumed(done), "to read a finished run is no break"
    whole = fit(game(), 6, name="b")
    assert resumed(whole) == {}
    assert resumed(Fit("c", sources=["old"])) == {"c": {"at": [], "sources": ["old"]}}


def test_final_and_best_are_kept_apart():
    method = game()
    figures = iter([0.1, 0.7, 0.4])
    result = fit(method, 6, name="a", evaluate=lambda: {"accuracy": next(figures)}, eval_every=2)
    assert (result.final("accuracy"), result.best("accuracy")) == (0.4, 0.7)


def test_a_non_finite_loss_names_step_and_term_and_keeps_the_checkpoint(tmp_path):
    method, path = game(), tmp_path / "a.safetensors"
    step = method.step

    def step_to_nan():
        metrics = step()
        return metrics | ({"discrepancy": torch.tensor(float("nan"))} if method.steps == 3 else {})

    method.step = step_to_nan
    with pytest.raises(NonFiniteLoss, match=r"'discrepancy' is nan at step 3.*kept at"):
        fit(method, 50, name="a", checkpoint=path, checkpoint_every=0)
    assert checkpoints.load(path)["step"] == 2


def test_non_finite_weights_are_never_saved(tmp_path):
    method, path = game(), tmp_path / "a.safetensors"
    step = method.step

    def step_and_break():
        metrics = step()
        if method.steps == 3:
            next(method.student.parameters()).data[0] = float("inf")
        return metrics

    method.step = step_and_break
    with pytest.raises(NonFiniteLoss, match="a weight is not finite at step 3"):
        fit(method, 50, name="a", checkpoint=path, checkpoint_every=0)
    assert checkpoints.load(path)["step"] == 2


def test_a_data_free_method_that_opens_training_data_fails():
    method = game()
    method.step = lambda: load("digits", "train") and {}
    with pytest.raises(DataFreeViolation, match="digits"):
        fit(method, 2, name="cheat")


def test_a_data_free_method_that_kept_training_data_fails():
    method, images = game(), load("digits", "train")
    method.step = lambda: {"loss": images.batch(torch.arange(4))[0].mean()}
    with pytest.raises(DataFreeViolation, match="digits"):
        fit(method, 2, name="cheat")
    assert images.batch(torch.arange(4))[0].shape[0] == 4  # the guard ends with the run


def test_held_out_data_measures_a_data_free_method_and_does_not_teach_it():
    def reads(split, then):
        return lambda: (load("digit_scenes", split), then)[1]

    done = fit(game(), 2, name="measured", evaluate=reads("held_out", {"accuracy": 0.5}), eval_every=1)
    assert [row["accuracy"] for row in done.history] == [0.5, 0.5]
    with pytest.raises(DataFreeViolation, match="train"):
        fit(game(), 2, name="cheat", evaluate=reads("train", {"accuracy": 0.5}))
    method = game()
    method.step = reads("held_out", {})
    with pytest.raises(DataFreeViolation, match="held_out"):
        fit(method, 2, name="cheat", evaluate=reads("held_out", {"accuracy": 0.5}), eval_every=1)


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    fit(game(), 3, name="a", checkpoint=path)
    before = path.read_bytes()

    def full(*_args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(DFKDError, match="No space left on device; the earlier version is intact"):
        checkpoints.save(path, {"x": torch.zeros(3)})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("damage", [lambda b: b[:40], lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"\0" * 64])
def test_damaged_checkpoints_are_named(tmp_path, damage):
    path = tmp_path / "a.safetensors"
    checkpoints.save(path, {"x": torch.zeros(300)})
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DamagedFile, match=r"a\.safetensors is damaged"):
        checkpoints.load(path)


def test_no_flipped_bit_goes_unseen(tmp_path):
    path, random = tmp_path / "a.safetensors", torch.Generator().manual_seed(0)
    state = {"step": 7, "x": torch.rand(6, generator=random), "y": [torch.arange(3), "text", 2.5], "none": []}
    checkpoints.save(path, state)
    whole = bytearray(path.read_bytes())
    missed = []
    for bit in range(0, 8 * len(whole), 13):
        whole[bit // 8] ^= 1 << bit % 8
        path.write_bytes(whole)
        whole[bit // 8] ^= 1 << bit % 8
        try:
            found = checkpoints.load(path)
        except DamagedFile:
            continue
        # The name of the checksum itself may be hit: then there is none, and nothing else has changed.
        same = found.keys() == state.keys() and torch.equal(found["x"], state["x"]) and found["y"][1:] == state["y"][1:]
        if not same or not torch.equal(found["y"][0], state["y"][0]) or found["step"] != 7:
            missed.append(bit)
    assert not missed


@pytest.mark.parametrize("axes", [(0, 1, 2, 3), (0, 2, 3, 1), (3, 0, 2, 1)])
def test_tensors_come_back_in_the_order_in_which_they_lay(tmp_path, axes):
    lying = torch.rand(2, 3, 4, 5).permute(axes)
    checkpoints.save(tmp_path / "s", {"x": lying, "part": lying[:, 1:]})
    loaded = checkpoints.load(tmp_path / "s")
    assert torch.equal(loaded["x"], lying) and loaded["x"].stride() == lying.stride()
    assert torch.equal(loaded["part"], lying[:, 1:])
    assert all(value.data_ptr() % 64 == 0 for value in loaded.values())


def test_nested_state_round_trip(tmp_path):
    shared = torch.arange(3)
    state = {"a": {0: shared, "b": [1, 2.5, None, (shared, "text", True)]}, 7: torch.tensor(2.0, dtype=torch.bfloat16)}
    checkpoints.save(tmp_path / "s", state)
    loaded = checkpoints.load(tmp_path / "s")
    assert torch.equal(loaded["a"][0], shared)
    assert loaded["a"]["b"][:3] == [1, 2.5, None]
    assert torch.equal(loaded["a"]["b"][3][0], shared)
    assert loaded["a"]["b"][3][1:] == ("text", True)
    assert loaded[7].dtype == torch.bfloat16


def test_what_cannot_be_saved_is_refused(tmp_path):
    with pytest.raises(TypeError, match="set"):
        checkpoints.save(tmp_path / "s", {"x": {1, 2}})
    assert not list(tmp_path.iterdir())


def test_progress_writes_events_and_nothing_else(tmp_path, monkeypatch, capfd):
    events = tmp_path / "events.jsonl"
    monkeypatch.setenv("DFKD_EVENTS", str(events))
    method = game()
    fit(method, 4, name="a", evaluate=lambda: weight(method))
    lines = [json.loads(line) for line in events.read_text().splitlines()]
    assert [line["event"] for line in lines if line["event"] != "progress"] == ["start", "done"]
    assert lines[1]["event"] == "progress"
    assert lines[-1]["step"] == 4
    assert capfd.readouterr() == ("", "")


def test_files_appear_whole_or_not_at_all(tmp_path):
    path = tmp_path / "x.json"
    files.write_json(path, {"a": 1})
    with pytest.raises(RuntimeError), files.replace_file(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert files.read_json(path) == {"a": 1}
    assert [p.name for p in Path(tmp_path).iterdir()] == ["x.json"]


def test_runs_of_one_notebook_cell_fold_into_one_line(monkeypatch):
    shell = SimpleNamespace(kernel=True, execution_count=1)
    outputs: list[list[dict[str, str]]] = []  # what each output has shown, oldest first

    def display(bundle, *, raw, display_id):
        assert raw and display_id
        outputs.append([bundle])
        return SimpleNamespace(update=lambda bundle, *, raw, of=outputs[-1]: of.append(bundle))

    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    monkeypatch.setitem(sys.modules, "IPython.display", SimpleNamespace(display=display))
    fit(game(), 2, name="<first>")
    fit(game(), 3, name="second")
    shell.execution_count = 2
    fit(game(), 1, name="third")
    assert [of[0]["text/plain"] for of in outputs] == ["<first>: starting", "third: starting"]
    one, other = (of[-1] for of in outputs)
    assert [line.split(" steps")[0] for line in one["text/plain"].splitlines()] == ["<first>: 2", "second: 3"]
    assert "<summary>2 runs in 0:0" in one["text/html"] and "&lt;first&gt;: 2 steps" in one["text/html"]
    assert "<summary>1 run in 0:0" in other["text/html"] and "second" not in other["text/plain"]
