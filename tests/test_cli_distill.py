"""`dfkd distill`: from files to a folder that has everything, minutes kept by a clock of the test, and wrong input."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import settled
from PIL import Image
from safetensors.torch import load_model, save_file
from tiny_book import refused
from torch import Tensor

import dfkd_lib
from dfkd_lib import planning
from dfkd_lib.errors import InputError
from dfkd_lib.methods.dfad import DFAD
from dfkd_lib.own_images import OnPictures, pictures
from dfkd_lib.own_images import settings_for as settings_on_pictures
from dfkd_lib.reproduction.cli import main
from dfkd_lib.reproduction.cli_distill import labelled_folder
from dfkd_lib.runtime import Runtime
from dfkd_lib.training import fit as fitting
from dfkd_lib.training.fit import fit

SOURCE = """
from torch import nn

def made(width):
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, 5),
    )

def big():
    return made(8)

def small():
    return made(4)
"""
COMMAND = (
    "distill mine.py:big mine.py:small --weights big.safetensors --image-shape 1x8x8 --classes 5 --device cpu "
    "--method dfad --set batch_size=8 --set latent_dim=8 --set ngf=4 --set k=2"
)
TINY: dict[str, Any] = {
    "image_shape": (1, 8, 8), "num_classes": 5, "device": "cpu", "precision": "float32", "progress": False,
    "batch_size": 8, "latent_dim": 8, "ngf": 4, "k": 2,
}  # fmt: skip


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a network, its weights, and pictures with and without labels."""
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(SOURCE)
    save_file(settled().state_dict(), "big.safetensors")
    torch.manual_seed(0)
    for i in range(30):
        pixels = torch.randint(0, 256, (8, 8), dtype=torch.uint8).numpy()
        for folder in ("pictures", f"test/{i % 5}"):
            Path(folder).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(Path(folder) / f"{i}.png")
    return tmp_path


def test_from_files_to_a_folder_with_everything(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(f"{COMMAND} --updates 6 --test test --out out".split()) == 0
    said = capsys.readouterr()
    assert "dfad: 6 student updates" in said.out and "test accuracy" in said.out and "report.html" in said.out
    assert said.err == "dfkd: note: no mean and std are known, so the networks get images in [0, 1]\n"
    there = {path.name for path in Path("out").iterdir()}
    assert {"student.safetensors", "record.json", "report.html", "MODEL_CARD.md", "checkpoint.safetensors"} <= there
    record = json.loads(Path("out/record.json").read_text())
    assert record["parameters"]["settings"]["batch_size"] == 8 and record["budget"]["student_updates"] == 6
    assert "mine.py:small, distilled from mine.py:big" in Path("out/MODEL_CARD.md").read_text()
    load_model(settled(width=4), "out/student.safetensors")

    assert main(f"{COMMAND} --updates 6 --test test --out out -q".split()) == 0, "a finished run is read again"
    again = json.loads(Path("out/record.json").read_text())
    assert again["metrics"] == record["metrics"] and capsys.readouterr().err == ""


def test_a_stopped_run_goes_on_with_the_same_command(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    usual, left = DFAD.step, [3]

    def stops(self: DFAD) -> dict[str, Tensor]:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return usual(self)

    assert fit.__kwdefaults__
    monkeypatch.setitem(fit.__kwdefaults__, "checkpoint_every", 0.0)  # a checkpoint at every reading
    monkeypatch.setattr(DFAD, "step", stops)
    assert main(f"{COMMAND} --updates 12 --out out".split()) == 130
    assert "interrupted; the same command continues it" in capsys.readouterr().err
    left[0] = 100
    assert main(f"{COMMAND} --updates 12 --out out -q".split()) == 0
    assert left[0] == 100 - 3, "three of six steps were left"
    resumed = json.loads(Path("out/record.json").read_text())
    assert main(f"{COMMAND} --updates 12 --out other -q".split()) == 0
    assert json.loads(Path("other/record.json").read_text())["metrics"] == resumed["metrics"]


class Watch:
    """A clock that stands still but for steps, which take 2 s each."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Iterator[Watch]:
    clock, usual = Watch(), DFAD.step

    def step(self: DFAD) -> dict[str, Tensor]:
        clock.now += 2
        return usual(self)

    monkeypatch.setattr(planning, "clock", clock)
    monkeypatch.setattr(fitting.time, "perf_counter", clock)
    monkeypatch.setattr(DFAD, "step", step)
    yield clock


def test_a_run_ends_when_its_minutes_do(watch: Watch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    teacher, student = settled().eval(), settled(1, width=4)
    options = TINY | {"minutes": 2, "out": tmp_path, "progress": True}
    result = dfkd_lib.distill(teacher, student, "dfad", **options)
    assert 0.8 * 120 <= watch.now <= 1.2 * 120
    n = result.budget.student_updates
    assert f"note: {n:,} student updates of dfad fit into 2 minutes here" in capsys.readouterr().err
    assert result.record["parameters"]["minutes"] == 2

    ended = watch.now
    again = dfkd_lib.distill(teacher, student, "dfad", **options | {"progress": False})
    assert watch.now == ended and again.fit.history == result.fit.history, "neither measured nor run again"
    with pytest.raises(InputError, match="holds a run with other arguments"):
        dfkd_lib.distill(teacher, student, "dfad", **options | {"minutes": 3})
    fixed = dfkd_lib.distill(teacher, student, "dfad", **TINY, n_updates=n)
    assert fixed.agreement == result.agreement, "what was measured moves nothing"


def test_minutes_that_do_not_suffice(watch: Watch) -> None:
    with pytest.raises(
        InputError, match=r"do not suffice for dfad, one step of which takes 2.0 s here; give at least 0"
    ):
        dfkd_lib.distill(settled().eval(), settled(1, width=4), "dfad", **TINY, minutes=0.05)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"minutes": 0}, "minutes must be above 0"),
        ({"minutes": "5"}, "minutes must be a number"),
        ({"minutes": 5, "n_updates": 5}, "give one of them"),
        ({"images": "nowhere", "method": None}, "does not exist"),
        ({"images": "nowhere"}, "leave method or images out"),
    ],
)
def test_minutes_and_images_that_cannot_be(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        dfkd_lib.distill(settled().eval(), settled(1, width=4), **{"method": "dfad"} | TINY | wrong)


def test_a_warm_up_is_counted() -> None:
    """Of fast: its first calls only synthesise, and take less time than those that also teach."""
    way = planning.Way("fast", "digits", (1, 8, 8), {"warmup": 20, "kd_steps": 2, "g_steps": 1, "ngf": 4})
    assert way.settings(None).warmup == 20
    teacher, runtime = settled().eval(), Runtime.choose("cpu", "float32")
    players = planning.Players(teacher, settled(1, width=4), settled(1, width=4), 5, False, [], [])
    seconds = iter([1.0] * 2 + [3.0] * 100)
    with pytest.MonkeyPatch.context() as patch:
        now = Watch()

        def timed(run: planning.Run) -> float:
            run.step()
            now.now += (took := next(seconds))
            return took

        patch.setattr(planning, "clock", now)
        patch.setattr(planning, "_timed", timed)
        n = planning.updates_within(600.0, way, lambda: players, runtime, None).n_updates
    trial = 2 * 1.0 + 10 * 3.0  # up to the twentieth part of the time
    assert abs(n / 2 - (600 - trial - 3 - 20) / 3) <= 3


def test_pictures_of_ones_own(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = COMMAND.partition(" --method")[0]
    assert main(f"{command} --images pictures --updates 5 --out out --set batch_size=8".split()) == 0
    assert "kd: 5 student updates on 27 pictures" in (said := capsys.readouterr()).out
    assert "agreement on held-back pictures" in said.out
    record = json.loads(Path("out/record.json").read_text())
    assert record["parameters"]["images"].startswith("30 pictures, ")
    assert record["parameters"]["settings"]["milestones"] == [3, 4]
    assert "held-back pictures" in Path("out/report.html").read_text()
    Image.new("L", (8, 8)).save("pictures/new.png")
    assert "belongs to another run" in failed(
        f"{command} --images pictures --updates 5 --out out --set batch_size=8", capsys
    )


def failed(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(f"{command} -q".split()) == 1
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_the_student_never_learns_from_what_is_held_back(place: Path) -> None:
    images = pictures("pictures", (1, 8, 8))
    settings = settings_on_pictures("digits", 4, {"batch_size": 4})
    run = OnPictures(settled().eval(), settled(1, width=4), images, settings, Runtime.choose("cpu", "float32"))
    assert len(run.held_back) == 3 and len(run.images) == 27
    kept = {bytes(image.numpy()) for image in run.held_back.images}
    assert not kept & {bytes(image.numpy()) for image in run.images.images}
    assert not settings.augment and settings_on_pictures("cifar10", 4, {}).augment


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ("--weights none.pth", "there is no file none.pth with weights"),
        ("--weights mine.py", "holds more than weights"),
        ("--image-shape 8x8", "such as 3x32x32, not '8x8'"),
        ("--classes 1", "classes must be 2 or more"),
        ("--mean 0.5", "--mean and --std belong together"),
        ("--mean a --std 1", "--mean must be numbers with commas"),
        ("--set batch_size", "--set takes NAME=VALUE"),
        ("--threads -1", "threads must be 0 or more"),
        ("--updates 3 --minutes 3", "not allowed with"),
        ("--test pictures", "has no sub-folders"),
        ("--test nowhere", "does not exist"),
    ],
)
def test_wrong_input_is_one_line(place: Path, capsys: pytest.CaptureFixture[str], wrong: str, words: str) -> None:
    assert words in refused(capsys, *f"{COMMAND} --out out {wrong}".split())
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ("--method dfda", "did you mean 'dfad'"),
        ("--set batch_sice=8", "did you mean 'batch_size'"),
        ("--set batch_size=many", "batch_size must be a whole number, not 'many'"),
        ("--set batch_size=9000000000", "GB free; lower batch_size"),
        ("--device abacus", "unknown device"),
        ("--images pictures", "leave method or images out"),
    ],
)
def test_wrong_settings_are_one_line(place: Path, capsys: pytest.CaptureFixture[str], wrong: str, words: str) -> None:
    assert words in refused(capsys, *f"{COMMAND} --out out --mean none --std none -q {wrong}".split())


def test_onnx_without_its_packages_is_refused_before_anything_runs(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert "pip install 'dfkd-lib[onnx]'" in refused(capsys, *f"{COMMAND} --out out --onnx".split())
    assert not Path("out").exists()


def test_test_folders_are_numbers_names_or_all_of_the_classes(place: Path) -> None:
    labels = labelled_folder(Path("test"), (1, 8, 8), 12).labels
    assert labels is not None and sorted(labels.unique().tolist()) == [0, 1, 2, 3, 4]
    for old, new in (("4", "11"), ("3", "2x")):
        Path("test", old).rename(Path("test", new))
        if new == "11":  # which stands before 2 in the alphabet
            labels = labelled_folder(Path("test"), (1, 8, 8), 12).labels
            assert labels is not None and sorted(labels.unique().tolist()) == [0, 1, 2, 3, 11]
            with pytest.raises(InputError, match="has a class 11, and the networks have 0 to 9"):
                labelled_folder(Path("test"), (1, 8, 8), 10)
    with pytest.raises(InputError, match="has 5 sub-folders and the networks 12 classes"):
        labelled_folder(Path("test"), (1, 8, 8), 12)
    labels = labelled_folder(Path("test"), (1, 8, 8), 5).labels
    assert labels is not None and sorted(labels.unique().tolist()) == [0, 1, 2, 3, 4]
    known = labelled_folder(Path("test"), (1, 8, 8), 6, ["x", "2X", "1", "0", "11", "2"])
    assert known.labels is not None and sorted(known.labels.unique().tolist()) == [1, 2, 3, 4, 5]


def test_memory_is_told_for_large_inputs(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    options = TINY | {"n_updates": 2, "progress": True}
    dfkd_lib.distill(settled().eval(), settled(1, width=4), "dfad", **options)
    assert "GB" not in capsys.readouterr().err
    monkeypatch.setattr(planning, "WORTH_A_WORD", 1.0)
    dfkd_lib.distill(settled().eval(), settled(1, width=4), "dfad", **options)
    assert "for activations at a batch of 8, " in capsys.readouterr().err
    monkeypatch.setattr(planning, "free_memory", lambda device: 1.0)
    with pytest.raises(InputError, match=r"and this machine has 0.00 GB free; lower batch_size"):
        dfkd_lib.distill(settled().eval(), settled(1, width=4), "dfad", **options)


def test_memory_counts_what_the_backward_pass_keeps() -> None:
    network = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(64, 10), torch.nn.Sigmoid(), torch.nn.Linear(10, 5)
    )
    kept = planning._kept(network, torch.rand(2, 1, 8, 8), Runtime.choose("cpu", "float32"))
    assert kept == 4 * 2 * (64 + 10), "what the first layer is given, and what the second is"
