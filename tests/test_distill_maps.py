"""Networks that name a class for every pixel: distilled by the methods that carry over, refused by the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import settled
from PIL import Image
from torch import Tensor, nn

import dfkd_lib
from dfkd_lib import Distilled, planning
from dfkd_lib.errors import InputError
from dfkd_lib.judging import agreement
from dfkd_lib.own_maps import labelled_maps
from dfkd_lib.reports import model_card, write_report

SHAPE = (3, 16, 16)
QUICK: dict[str, Any] = {
    "image_shape": SHAPE, "num_classes": 4, "n_updates": 4, "device": "cpu", "precision": "float32", "progress": False,
    "batch_size": 4, "latent_dim": 8, "ngf": 4,
}  # fmt: skip


class Maps(nn.Module):
    """Logits [B, 4, H, W], as a dictionary with an auxiliary head in training, as torchvision returns them."""

    def __init__(self, width: int, seed: int, *, as_dictionary: bool = True) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.body = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
            self.head, self.aux = nn.Conv2d(width, 4, 1), nn.Conv2d(width, 4, 1)
        self.as_dictionary = as_dictionary

    def forward(self, x: Tensor) -> Any:
        seen = self.body(x)
        out = self.head(seen)
        if not self.as_dictionary:
            return out
        return {"out": out, "aux": self.aux(seen)} if self.training else {"out": out}


@pytest.fixture(scope="module")
def teacher() -> nn.Module:
    return Maps(12, 0).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 pictures of noise."""
    place = tmp_path_factory.mktemp("other")
    for i in range(24):
        noise = torch.rand(16, 16, 3, generator=torch.Generator().manual_seed(i))
        Image.fromarray(noise.mul(255).byte().numpy()).save(place / f"{i}.png")
    return place


@pytest.fixture(scope="module")
def result(teacher: nn.Module) -> Distilled:
    masks = torch.randint(0, 4, (6, 16, 16), generator=torch.Generator().manual_seed(0))
    masks[:, :2] = 255
    return dfkd_lib.distill(teacher, Maps(4, 1), "dfad", test=(torch.rand(6, *SHAPE), masks), **QUICK)


def test_the_figures_are_those_of_maps(result: Distilled, teacher: nn.Module) -> None:
    assert isinstance(result.student, Maps) and set(result.student(torch.rand(2, *SHAPE))) == {"out"}
    assert result.record["parameters"]["task"] == "segmentation"
    assert result.record["parameters"]["settings"]["log_generator_loss"] is True, "the paper's, for segmentation"
    assert 0 <= result.agreement <= 1 and set(result.accuracy) == {"teacher", "student"}
    assert set(result.record["metrics"]) == {
        "distill/dfad/mean IoU with the teacher", "distill/dfad/classes named", "distill/dfad/teacher mean IoU",
        "distill/dfad/student mean IoU",
    }  # fmt: skip
    assert sum(n for n, _ in result.record["by class"].values()) % (16 * 16) == 0, "pixels"
    assert "mean IoU with the teacher on fresh synthetic images" in str(result) and "test mean IoU" in str(result)


def test_mean_iou_of_two_maps() -> None:
    ours, theirs = torch.tensor([[[0, 0], [1, 1]]]), torch.tensor([[[0, 1], [1, 1]]])
    assert agreement({"teacher": theirs, "student": ours}, 3) == pytest.approx((1 / 2 + 2 / 3) / 2)


def test_the_page_has_the_maps_of_both(result: Distilled, teacher: nn.Module, tmp_path: Path) -> None:
    write_report(tmp_path / "report.html", result, teacher, class_names=["sky", "road", "tree", "car"])
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    n = page.count('alt="an image"')
    assert n > 0 and page.count('alt="the map of the teacher"') == page.count('alt="the map of the student"') == n
    assert "mean IoU" in page and ">accuracy<" not in page
    assert "A segmenter of 4 classes" in model_card(result) and "has a mean IoU of" in model_card(result)


@pytest.mark.parametrize("method", ["mosaickd", "kd"])
def test_pictures_of_ones_own_serve_too(teacher: nn.Module, folder: Path, method: str) -> None:
    options = QUICK | ({"ndf": 4} if method == "mosaickd" else {})
    if method == "kd":
        options = {key: value for key, value in options.items() if key not in ("latent_dim", "ngf")}
    made = dfkd_lib.distill(teacher, Maps(4, 1), method, images=folder, **options)
    assert made.budget.student_updates == 4
    assert ("local" in made.fit.history[-1]) == (method == "mosaickd"), "its patches are judged"
    assert made.images.shape[1:] == SHAPE


def test_mosaickd_serves_classifiers_too(tmp_path: Path) -> None:
    for i in range(12):
        Image.new("L", (8, 8), 20 * i).save(tmp_path / f"{i}.png")
    options = QUICK | {"image_shape": (1, 8, 8), "num_classes": 5, "ndf": 4, "n_updates": 6}
    made = dfkd_lib.distill(settled().eval(), settled(1, width=4), "mosaickd", images=tmp_path, **options)
    assert made.budget.student_updates == 6 and "12 pictures" in made.record["parameters"]["images"]
    assert "of other things" in model_card(made)


@pytest.mark.parametrize("method", ["fast", "dafl", "zskt", "nayer"])
def test_other_methods_refuse_and_name_those_that_can(teacher: nn.Module, method: str) -> None:
    options = {key: QUICK[key] for key in ("image_shape", "num_classes", "device", "precision", "progress")}
    with pytest.raises(InputError, match=r"class for every pixel.* dfad.* mosaickd or kd with images") as refused:
        dfkd_lib.distill(teacher, Maps(4, 1), method, n_updates=4, **options)
    assert "\n" not in str(refused.value)


class Pooled(Maps):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).mean((2, 3))


class Coarse(Maps):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[:, :, ::2, ::2]


@pytest.mark.parametrize(
    ("student", "options", "said"),
    [
        (Pooled(4, 1, as_dictionary=False), {}, "for every pixel and the student for every image"),
        (Coarse(4, 1, as_dictionary=False), {}, r"returns \[2, 4, 8, 8\] .* not logits \[2, K\] or \[2, K, 16, 16\]"),
        (Maps(4, 1), {"test": (torch.rand(3, *SHAPE), torch.arange(3))}, "need a mask each"),
        (Maps(4, 1), {"test": (torch.rand(1, *SHAPE), torch.full((1, 16, 16), 4))}, "labels must lie in 0..3"),
    ],
)
def test_what_does_not_fit_is_one_line(teacher: nn.Module, student: nn.Module, options: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        dfkd_lib.distill(teacher, student, "dfad", **QUICK, **options)


def test_mosaickd_without_pictures_is_told(teacher: nn.Module) -> None:
    with pytest.raises(InputError, match="'mosaickd' needs images"):
        dfkd_lib.distill(teacher, Maps(4, 1), "mosaickd", **QUICK)


def test_masks_are_read_with_their_pictures(tmp_path: Path) -> None:
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    for i in range(3):
        Image.new("RGB", (32, 32), (i, i, i)).save(tmp_path / "images" / f"{i}.png")
        Image.new("L", (32, 32), (i, 3, 255)[i]).save(tmp_path / "masks" / f"{i}.png")
    found = labelled_maps(tmp_path, SHAPE, 4)
    assert found.task == "segmentation" and found.labels is not None and found.void == 255
    assert found.labels[:, 0, 0].tolist() == [0, 3, 255] and found.images[:, 0, 0, 0].tolist() == [0, 1, 2]
    (tmp_path / "masks" / "1.png").unlink()
    with pytest.raises(InputError, match=r"no mask 1\.png"):
        labelled_maps(tmp_path, SHAPE, 4)
    assert "dfad" in planning.PER_PIXEL and "fast" not in planning.PER_PIXEL
