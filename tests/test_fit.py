"""The loop: resuming, stopping on non-finite losses, guarding, saving whole files."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from conftest import classifier, generator

from dfkd_lib import files
from dfkd_lib.data import load
from dfkd_lib.errors import DamagedFile, DataFreeViolation, DFKDError, NonFiniteLoss
from dfkd_lib.methods.dfad import DFAD, Settings
from dfkd_lib.runtime import Runtime
from dfkd_lib.training import checkpoints
from dfkd_lib.training.fit import fit


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
    assert resumed.resumed_at == 7
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
    assert again.history == done.history
    assert weight(one) == weight(two)


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    fit(game(), 3, name="a", checkpoint=path)
    with pytest.raises(DamagedFile, match="belongs to 'a' with 3 steps"):
        fit(game(), 4, name="a", checkpoint=path)


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
    assert [line["event"] for line in lines] == ["start", "progress", "done"]
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
