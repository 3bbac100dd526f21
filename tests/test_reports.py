"""The page and the card of a distillation, and the ONNX file: whole, true to the figures, readable on a phone."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from browser import PROGRAM, browser, served
from conftest import settled
from torch import nn

import dfkd_lib
from dfkd_lib import Distilled
from dfkd_lib.errors import DFKDError, InputError
from dfkd_lib.exporting import check_onnx_packages, write_onnx
from dfkd_lib.reports import advice, few_classes, model_card, write_report

QUICK: dict[str, Any] = {
    "image_shape": (1, 8, 8), "num_classes": 5, "n_updates": 4, "device": "cpu", "precision": "float32",
    "progress": False, "batch_size": 8, "latent_dim": 8, "ngf": 4, "kd_steps": 2, "g_steps": 2, "synthesis_batch": 10,
    "warmup": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def teacher() -> nn.Module:
    return settled().eval()


@pytest.fixture(scope="module")
def result(teacher: nn.Module) -> Distilled:
    test = torch.rand(20, 1, 8, 8), torch.arange(20) % 5
    return dfkd_lib.distill(teacher, settled(1, width=4), "fast", test=test, mean=[0.5], std=[0.5], **QUICK)


def changed(result: Distilled, record: dict[str, Any] | None = None, **fields: Any) -> Distilled:
    return dataclasses.replace(result, record=result.record | (record or {}), **fields)


@pytest.fixture
def page(teacher: nn.Module, result: Distilled, tmp_path: Path) -> str:
    names = ["<b>tench</b>", *(f"a class with a rather long name, the {i}th" for i in range(1, 5))]
    told = changed(result, {"warnings": ["something <odd> was seen"]}, agreement=0.25)
    write_report(tmp_path / "report.html", told, teacher, names=("mine.py:big", "mine.py:small"), class_names=names)
    return (tmp_path / "report.html").read_text(encoding="utf-8")


def test_the_page_says_what_the_record_says(page: str, result: Distilled) -> None:
    assert "25.0%" in page and f"{result.accuracy['student']:.1%}" in page
    assert "something &lt;odd&gt; was seen" in page and "<b>tench" not in page
    assert "What to try next" in page and "<svg" in page and "distillation loss" in page
    assert page.count('src="data:image/png;base64,') == page.count("<img ") > 0
    assert "http" not in page.replace("http-equiv", ""), "it needs nothing beside it"
    for named, agreed in result.record["by class"].values():
        assert f"{agreed} of {named}" in page


@pytest.mark.skipif(PROGRAM is None, reason="no Chromium is installed here")
def test_a_phone_shows_it_without_sideways_scrolling(page: str, tmp_path: Path) -> None:
    with served(tmp_path) as address, browser(address) as tab:
        tab.width(390)
        tab.open("report.html")
        assert tab.problems == []
        assert tab.run("document.documentElement.scrollWidth") <= 390
        assert tab.run("[...document.images].every(image => image.naturalWidth > 0)")
        assert (
            tab.run("performance.getEntriesByType('resource').map(e => e.name).filter(n => !n.startsWith('data:'))")
            == []
        )


def test_by_class_adds_up_to_the_agreement(result: Distilled) -> None:
    counts = result.record["by class"].values()
    assert sum(agreed for _, agreed in counts) / sum(n for n, _ in counts) == pytest.approx(result.agreement)
    assert len(counts) == result.classes_named


def test_images_of_three_channels_and_of_more_and_bare_names(tmp_path: Path) -> None:
    for channels in (2, 3, 5):
        torch.manual_seed(0)
        net, other = (nn.Sequential(nn.Flatten(), nn.Linear(64 * channels, 5)) for _ in range(2))
        options = {**QUICK, "image_shape": (channels, 8, 8), "k": 2}
        for name in ("kd_steps", "g_steps", "synthesis_batch", "warmup"):
            options.pop(name)
        made = dfkd_lib.distill(net.eval(), other, "dfad", **options)
        write_report(tmp_path / "r.html", made, net)
        assert "takes for class " in (tmp_path / "r.html").read_text(encoding="utf-8")


def test_advice_comes_when_something_is_wrong_and_only_then(result: Distilled) -> None:
    asked = result.record["parameters"]
    fine = changed(result, {"by class": {str(c): [50, 45] for c in range(5)}}, agreement=0.9, classes_named=5)
    fine = changed(fine, accuracy={"teacher": 0.9, "student": 0.85})
    assert advice(fine) == [] and not few_classes(fine)
    (tip,) = advice(changed(fine, accuracy={"teacher": 0.9, "student": 0.5}))
    assert "too narrow" in tip
    (tip,) = advice(changed(fine, accuracy={"teacher": 0.21, "student": 0.2}))
    assert "near guessing" in tip
    one_class = changed(fine, classes_named=1)
    assert few_classes(one_class) and "few of its classes" in advice(one_class)[0]
    assert any("another method" in tip for tip in advice(changed(fine, agreement=0.3)))
    assert asked["settings"]["batch_size"] <= 64
    large = {"parameters": asked | {"minutes": 3.0, "settings": asked["settings"] | {"batch_size": 256}}}
    assert any("smaller batches" in tip for tip in advice(changed(fine, large, agreement=0.3)))
    in_minutes = {"parameters": asked | {"minutes": 3.0}}
    assert not any("smaller batches" in tip for tip in advice(changed(fine, in_minutes, agreement=0.3)))
    for method, word in (("dfad", "batch norm"), ("kd", "more pictures")):
        with_method = {"parameters": asked | {"method": method}}
        assert any(word in tip for tip in advice(changed(fine, with_method, agreement=0.3)))


def test_the_card_says_from_what_how_and_with_what_limits(result: Distilled) -> None:
    card = model_card(result, names=("big", "small"), files=("`student.safetensors`: the weights",))
    assert card.startswith("# small, distilled from big\n") and "mean [0.5]" in card and "`student.safetensors`" in card
    assert "without any data" in card and f"{result.agreement:.1%} of fresh synthetic images" in card
    assert f"the teacher on {result.accuracy['teacher']:.1%}" in card and "never tried" not in card
    assert "never tried on labelled images" in model_card(changed(result, accuracy={}))
    on_pictures = {"parameters": result.record["parameters"] | {"method": "kd", "images": "40 pictures, abc"}}
    assert "on 40 pictures without their labels" in model_card(changed(result, on_pictures))


def test_without_the_packages_one_line_says_how_to_get_them(
    result: Distilled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)  # type: ignore[arg-type]
    for call in (check_onnx_packages, lambda: write_onnx(result.student, tmp_path / "s.onnx", (1, 8, 8))):
        with pytest.raises(InputError, match=r"an ONNX file needs onnx .*: pip install 'dfkd-lib\[onnx\]'"):
            call()
    assert not [*tmp_path.iterdir()]


class Maps(nn.Module):
    """Logits for every pixel in a dictionary, as torchvision's segmenters return them, with an auxiliary head."""

    def __init__(self) -> None:
        super().__init__()
        self.out, self.aux = nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(1, 3, 1)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"aux": self.aux(x), "out": self.out(x)}


def test_the_file_computes_what_the_student_computes(result: Distilled, tmp_path: Path) -> None:
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package)
    runtime = pytest.importorskip("onnxruntime")
    before = {key: value.clone() for key, value in result.student.state_dict().items()}
    assert write_onnx(result.student, tmp_path / "s.onnx", (1, 8, 8)) < 1e-3
    session = runtime.InferenceSession(tmp_path / "s.onnx")
    for n in (1, 4):
        x = torch.rand(n, 1, 8, 8)
        (logits,) = session.run(["logits"], {"images": x.numpy()})
        assert torch.allclose(torch.from_numpy(logits), result.student(x), atol=1e-4)
    assert all(torch.equal(value, before[key]) for key, value in result.student.state_dict().items())

    maps = Maps().eval()
    assert write_onnx(maps, tmp_path / "maps.onnx", (1, 8, 8)) < 1e-3
    (logits,) = runtime.InferenceSession(tmp_path / "maps.onnx").run(["logits"], {"images": x.numpy()})
    assert torch.allclose(torch.from_numpy(logits), maps(x)["out"], atol=1e-4) and logits.shape == (4, 3, 8, 8)

    class Odd(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.flatten(1)[:, : 2 + int(x.sum() > 0)]

    with pytest.raises(DFKDError, match="cannot be written as ONNX"):
        write_onnx(Odd(), tmp_path / "odd.onnx", (1, 8, 8))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["maps.onnx", "s.onnx"]
