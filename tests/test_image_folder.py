"""A folder of one's own images, with everything in it that such folders hold."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from dfkd_lib import data
from dfkd_lib.errors import InputError
from dfkd_lib.methods.out_of_domain import ood_images


@pytest.fixture
def folder(tmp_path):
    """Nine usable images of many kinds, five files that are none, one hidden file."""
    red = np.zeros((40, 50, 3), np.uint8)
    red[..., 0] = 200
    Image.fromarray(red).save(tmp_path / "colour.png")
    Image.fromarray(red).save(tmp_path / "photo.jpg", quality=95)
    Image.fromarray(red[..., 0]).save(tmp_path / "grey.png")
    Image.fromarray(red).convert("CMYK").save(tmp_path / "print.jpg", quality=95)
    Image.fromarray(red[:1, :1]).save(tmp_path / "one-pixel.png")
    Image.fromarray(red[:2, :40]).save(tmp_path / "sliver.png")
    Image.fromarray(red).convert("P").save(tmp_path / "palette.gif")
    Image.fromarray(np.dstack([red, red[..., :1]])).save(tmp_path / "transparent.png")
    Image.fromarray(np.full((9, 9), 200 * 257, np.uint16)).save(tmp_path / "sixteen-bit.png")
    whole = (tmp_path / "photo.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "noise.png").write_bytes(bytes(range(256)) * 4)
    (tmp_path / "notes.txt").write_text("not an image")
    (tmp_path / "page.jpg").write_text("<html>not found</html>")
    (tmp_path / ".DS_Store").write_bytes(b"hidden")
    return tmp_path


def test_every_kind_is_converted_and_what_is_broken_is_counted(folder):
    Image.new("L", (14_500, 14_000), 200).save(folder / "huge.png", compress_level=1)  # more than Pillow opens
    with pytest.warns(UserWarning) as said:
        found = ood_images(str(folder), image_size=8, channels=3)
    assert len(found) == 10 and found.skipped == 5 and found.image_shape == (3, 8, 8)
    (warning,) = [str(w.message) for w in said]
    assert "5 of 15 files" in warning and "\n" not in warning
    reddish = {"colour", "photo", "print", "one-pixel", "sliver", "palette", "transparent"}
    names = [p.stem for p in sorted(folder.iterdir()) if p.stem in reddish | {"grey", "sixteen-bit", "huge"}]
    for name, image in zip(names, found.images, strict=True):
        r, g, b = image.float().mean((1, 2)).tolist()
        assert abs(r - 200) < 8, name
        assert (max(g, b) < 60) if name in reddish else (abs(g - 200) < 3 and abs(b - 200) < 3), name


def test_one_channel_is_luma(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        grey = ood_images(f"folder:{folder}", image_size=8, channels=1)
    assert grey.image_shape == (1, 8, 8) and len(grey) == 9
    assert grey.to("cpu").skipped == 5 and grey.take(2).skipped == 5


def test_pillow_s_limit_is_put_back(folder):
    before = Image.MAX_IMAGE_PIXELS
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data.load(f"folder:{folder}", "train", image_size=8)
    assert before == Image.MAX_IMAGE_PIXELS


def test_a_folder_of_nothing_but_rubbish_is_refused(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no")
    with pytest.raises(InputError, match="none of its 1 files"):
        ood_images(str(tmp_path), image_size=8, channels=3)


def test_relative_paths_start_where_the_command_was_given(tmp_path, monkeypatch):
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "pictures" / "a.png")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setenv("PWD", str(tmp_path))
    assert len(ood_images("pictures", image_size=8, channels=3)) == 1
    assert len(ood_images("./pictures", image_size=8, channels=3)) == 1
    assert len(ood_images("folder:pictures", image_size=8, channels=3)) == 1


def test_datasets_and_their_classes_can_be_asked_for():
    ones = ood_images("digits:1", image_size=8, channels=1)
    assert ones.classes == ("1",) and set(ones.labels.tolist()) == {0}
    some = ood_images("digits:9,0", image_size=8, channels=3)
    assert some.classes == ("9", "0") and set(some.labels.tolist()) == {0, 1} and some.image_shape[0] == 3
    assert len(ood_images("digits", image_size=8, channels=1)) == 1442


def test_a_class_keeps_its_own_images():
    whole = data.load("digits", "train")
    part = whole.of_classes([9, 0])
    assert torch.equal(part.images[part.labels == 0], whole.images[whole.labels == 9])
    assert part.name == "digits" and part.fingerprint != whole.fingerprint


@pytest.mark.parametrize(
    ("asked", "named"),
    [("digits:11", "0 to 9"), ("digits:one", "numbers"), ("digitz", "digits"), ("/nowhere/at/all", "does not exist"),
     ("folder:", "folder"), ("digits:1,1", "0 to 9")],
)  # fmt: skip
def test_what_cannot_be_had_is_refused(asked, named):
    with pytest.raises(InputError, match=named):
        ood_images(asked, image_size=8, channels=1)
