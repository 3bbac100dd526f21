"""Where named images come from: embedded sets, files under the data root, torchvision's downloads.

On disk a dataset is `<data root>/<name>/<split>.npz` with images uint8 [N, H, W, C] (or [N, H, W] for one
channel), labels int64 [N] (or masks uint8 [N, H, W]) and classes. A file that is there is used as it is.
"""

from __future__ import annotations

import contextlib
import io
import shutil
import socket
import threading
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from .. import files
from ..errors import DamagedFile, DataUnavailable, DFKDError
from ..locations import data_root
from .catalogue import DatasetInfo, info

DIGIT_NAMES = tuple("0123456789")
PHOTOS = ("china", "flower")
CAMVID_CLASSES = (
    "sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "bicyclist",
)  # fmt: skip
PROBE_SECONDS = 1.5


class Arrays(NamedTuple):
    """Images uint8 [N, H, W, C] or [N, H, W]; labels int64 [N], or masks uint8 [N, H, W]; class names.

    `skipped` counts the files of a folder that are no readable images.
    """

    images: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]
    skipped: int = 0


def arrays(name: str, split: str) -> Arrays:
    """One stored split ("train", "val" for camvid, "test") of a named dataset, fetched if need be."""
    if name in EMBEDDED:
        return EMBEDDED[name](split)
    path = data_root() / name / f"{split}.npz"
    if not path.is_file():
        prepare(name)
    return _read(path, info(name))


def prepare(name: str) -> list[Path]:
    """See that all files of a dataset are on disk: download or convert what is missing.

    Returns:
        The files; none for a dataset that is embedded in the software.

    Raises:
        InputError: there is no such dataset.
        DataUnavailable: it is neither on disk nor reachable; known within two seconds.
    """
    facts = info(name)
    if name in EMBEDDED:
        return []
    folder = data_root() / name
    splits = ("train", "val", "test") if name == "camvid" else ("train", "test")
    paths = [folder / f"{split}.npz" for split in splits]
    missing = [path for path in paths if not path.is_file()]
    if missing:
        _check_origin(facts, folder, missing)
        try:
            with files.lock(folder / ".lock", what=f"dataset {name}"):
                _fetch(name, folder, [path for path in missing if not path.is_file()])
        except DFKDError:
            raise
        except Exception as e:  # of the network, the disk, an archive: torchvision lets all kinds through
            raise DataUnavailable(f"{name}: fetching it into {folder} failed ({_line(e)}); try again") from e
    return paths


def rank_in_class(labels: np.ndarray) -> np.ndarray:
    """For each image, how many of its class come before it: int64 [N] -> int64 [N]."""
    order = np.argsort(labels, kind="stable")
    _, starts, counts = np.unique(labels[order], return_index=True, return_counts=True)
    ranks = np.empty_like(labels)
    ranks[order] = np.arange(len(labels)) - np.repeat(starts, counts)
    return ranks


# --- embedded sets ------------------------------------------------------------------------------------


def digits(split: str) -> Arrays:
    """scikit-learn's digits; every fifth of each class is for test."""
    from sklearn.datasets import load_digits

    raw = load_digits()
    images = np.round(raw.images * (255 / 16)).astype(np.uint8)
    labels = raw.target.astype(np.int64)
    test = rank_in_class(labels) % 5 == 4
    chosen = test if split == "test" else ~test
    return Arrays(images[chosen], labels[chosen], DIGIT_NAMES)


def digit_scenes(split: str) -> Arrays:
    """3x3 grids of digits on 32x32 pixels, a third of the cells empty; scenes of a split use its digits only.

    The mask gives the 10x10 square of a digit to its class (digit + 1) and the rest to the background (0).
    """
    single = digits(split)
    tiles = F.interpolate(torch.from_numpy(single.images)[:, None], (10, 10), mode="bilinear")[:, 0].numpy()
    # RandomState, because its stream is promised never to change.
    n, random = (200, np.random.RandomState(1)) if split == "test" else (1000, np.random.RandomState(0))
    chosen = random.randint(len(tiles), size=(n, 9))
    filled = random.random_sample((n, 9)) < 2 / 3
    images = np.zeros((n, 32, 32), np.uint8)
    masks = np.zeros((n, 32, 32), np.uint8)
    for cell in range(9):
        top, left = 11 * (cell // 3), 11 * (cell % 3)
        square = np.s_[:, top : top + 10, left : left + 10]
        here, tile = filled[:, cell, None, None], chosen[:, cell]
        images[square] = tiles[tile] * here
        masks[square] = (single.labels[tile, None, None] + 1) * here
    return Arrays(images, masks, ("background", *DIGIT_NAMES))


def photo_patches(split: str) -> Arrays:
    """Squares of 32 to 128 pixels, brought to 32x32, from the left 3/4 of each photograph, for test the rest."""
    from sklearn.datasets import load_sample_image

    n, random = (100, np.random.RandomState(1)) if split == "test" else (500, np.random.RandomState(0))
    patches = []
    for name in PHOTOS:
        photo = torch.from_numpy(load_sample_image(f"{name}.jpg").copy()).permute(2, 0, 1)
        border = photo.shape[2] * 3 // 4
        photo = photo[:, :, border:] if split == "test" else photo[:, :, :border]
        for side in random.randint(32, 129, size=n):
            top, left = (random.randint(0, length - side + 1) for length in photo.shape[1:])
            square = photo[None, :, top : top + side, left : left + side]
            patches.append(F.interpolate(square, (32, 32), mode="bilinear", antialias=True)[0])
    images = torch.stack(patches).permute(0, 2, 3, 1).contiguous().numpy()
    return Arrays(images, np.repeat(np.arange(len(PHOTOS)), n), PHOTOS)


EMBEDDED = {"digits": digits, "digit_scenes": digit_scenes, "photo_patches": photo_patches}


# --- files under the data root ------------------------------------------------------------------------


def _read(path: Path, facts: DatasetInfo) -> Arrays:
    target = "masks" if facts.task == "segmentation" else "labels"
    try:
        with np.load(path, allow_pickle=False) as stored:
            read = Arrays(stored["images"], stored[target], tuple(map(str, stored["classes"])))
        wrong = _wrong(read, facts)
    except PermissionError as e:
        raise DataUnavailable(f"{facts.name}: {path} may not be read; change its permissions") from e
    except (OSError, ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as e:
        wrong = _line(e)
    if wrong:
        raise DamagedFile(f"{path} is damaged ({wrong}); delete it and run `dfkd data {facts.name}`")
    return read


def _wrong(read: Arrays, facts: DatasetInfo) -> str:
    """What does not fit, or an empty string."""
    images, labels, classes = read[:3]
    channels = 1 if images.ndim == 3 else images.shape[-1]
    masks = facts.task == "segmentation"
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or channels != facts.image_shape[0]:
        return f"images are {images.dtype} {list(images.shape)}"
    shape, dtype = (images.shape[:3], np.uint8) if masks else (images.shape[:1], np.int64)
    if labels.shape != shape or labels.dtype != dtype:
        return f"{'masks' if masks else 'labels'} are {labels.dtype} {list(labels.shape)}"
    if len(classes) != facts.n_classes:
        return f"{len(classes)} classes instead of {facts.n_classes}"
    known = (labels >= 0) & (labels < facts.n_classes)
    if facts.void is not None:
        known |= labels == facts.void
    return "" if known.all() else f"label {labels[~known][0]} is not a class"


def _line(e: object) -> str:
    return " ".join(str(e).split()) or type(e).__name__


def _check_origin(facts: DatasetInfo, folder: Path, missing: list[Path]) -> None:
    """Raise DataUnavailable if what is missing cannot be had."""
    absent = f"{facts.name}: no {', '.join(path.name for path in missing)} in {folder}"
    if facts.url:
        if reason := unreachable(facts.url):
            host = facts.url.split("/")[2]
            raise DataUnavailable(
                f"{absent}, and {host} is not reachable ({reason}); "
                f"run `dfkd data {facts.name}` on a machine where it is, and copy the files here"
            )
    elif not all((folder / path.stem).is_dir() for path in missing):
        raise DataUnavailable(
            f"{absent}; put the folders train, trainannot, val, valannot, test, testannot of the 360x480 "
            f"version (PNG files) there, and run `dfkd data {facts.name}`"
        )


def unreachable(url: str) -> str:
    """Why `url` gives no answer within `PROBE_SECONDS`; an empty string if it gives one, be it an error."""
    reasons = [f"no answer within {PROBE_SECONDS} s"]

    def ask() -> None:
        try:
            request = urllib.request.Request(url, method="HEAD")
            urllib.request.build_opener().open(request, timeout=PROBE_SECONDS).close()
        except urllib.error.HTTPError as e:
            e.close()
        except Exception as e:
            reasons.append(_line(getattr(e, "reason", e)))
            return
        reasons.append("")

    # In a thread, since no timeout covers the look-up of the host's name.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    return reasons[-1]


def _fetch(name: str, folder: Path, missing: list[Path]) -> None:
    temporary = folder / ".download"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        for path in missing:
            if name == "camvid":
                read = _camvid(folder, path.stem)
            else:
                print(f"downloading {name} ({path.stem}) once, to {path}", flush=True)
                with _patience(30), contextlib.redirect_stderr(io.StringIO()):
                    read = _torchvision(name, temporary, path.stem)
            if wrong := _wrong(read, info(name)):
                raise DataUnavailable(f"{name}: the {path.stem} images in {folder} are not usable: {wrong}")
            target = "masks" if info(name).task == "segmentation" else "labels"
            named: dict[str, Any] = {target: read.labels, "classes": np.array(read.classes)}
            with files.replace_file(path) as part, open(part, "wb") as f:
                np.savez(f, images=read.images, **named)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def _patience(seconds: float) -> Iterator[None]:
    """Give up on a download that stalls for this long; torchvision itself would wait for ever."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _torchvision(name: str, folder: Path, split: str) -> Arrays:
    from torchvision import datasets

    if name == "svhn":
        svhn = datasets.SVHN(folder, split=split, download=True)
        return Arrays(svhn.data.transpose(0, 2, 3, 1), svhn.labels.astype(np.int64), DIGIT_NAMES)
    kinds = {
        "mnist": datasets.MNIST,
        "fashion_mnist": datasets.FashionMNIST,
        "kmnist": datasets.KMNIST,
        "cifar10": datasets.CIFAR10,
        "cifar100": datasets.CIFAR100,
    }
    found = kinds[name](folder, train=split == "train", download=True)
    classes = DIGIT_NAMES if name == "mnist" else tuple(found.classes)
    return Arrays(np.asarray(found.data), np.asarray(found.targets, dtype=np.int64), classes)


def _camvid(folder: Path, split: str) -> Arrays:
    from PIL import Image

    found = sorted((folder / split).glob("*.png"))
    if not found:
        raise DataUnavailable(f"camvid: no PNG files in {folder / split}; put the images of the split there")
    try:
        images = np.stack([np.asarray(Image.open(f).convert("RGB")) for f in found])
        masks = np.stack([np.asarray(Image.open(folder / f"{split}annot" / f.name)) for f in found])
    except (OSError, ValueError, SyntaxError) as e:
        reason = f"the {split} images in {folder} cannot be used ({_line(e)})"
        raise DataUnavailable(f"camvid: {reason}; unpack them anew") from e
    return Arrays(images, masks.astype(np.uint8), CAMVID_CLASSES)
