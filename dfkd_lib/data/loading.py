"""From a name to an `ImageSet`: source, split, size, channels, device."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError, unknown
from . import catalogue, folders, guard, sources
from .imageset import ImageSet

SPLITS = ("train", "fit", "held_out", "test")
FOLDER = "folder:"


def load(
    name: str,
    split: str,
    *,
    image_size: int | tuple[int, int] | None = None,
    channels: int | None = None,
    device: str | torch.device = "cpu",
) -> ImageSet:
    """Load one split of a dataset, downloading it on first use.

    Args:
        name: one of `names()`; or "folder:PATH", images of your own: sub-folders become classes (without
            any, the images have no labels), and all images are used whichever split is asked for.
        split: "train" (all training images), its two parts "fit" and "held_out", or "test". The parts do
            not depend on any seed: every tenth image of each class is held out. For camvid, whose frames
            follow one another, the published validation split is held out and "fit" is all of "train".
        image_size: height and width, one number for a square; None keeps the stored size. Images are
            resized bilinearly with antialiasing, masks to the nearest pixel. Images of a folder are
            cropped to these proportions first, around the centre.
        channels: 1 or 3; colour becomes luma, grey is repeated. None keeps the stored number.

    Returns:
        The images on `device`, in one piece.

    Raises:
        InputError: unknown name, split, size or number of channels.
        DataUnavailable: neither on disk nor reachable.
        DamagedFile: a file is there but cannot be used.
        DataFreeViolation: inside `no_training_data`, unless the split is "test" of a named dataset.
    """
    if split not in SPLITS:
        raise unknown("split", split, SPLITS)
    if channels not in (None, 1, 3):
        raise InputError(f"channels must be 1, 3 or None, not {channels}")
    size = _size(image_size)
    void = None
    if name.startswith(FOLDER):
        split = "all"
        guard.check(name, split)
        if size is None:
            raise InputError(f"{name}: images of a folder have many sizes; give image_size")
        arrays = folders.folder(name.removeprefix(FOLDER), size, channels or 3)
    else:
        void = catalogue.info(name).void
        guard.check(name, split)
        arrays = _split(name, split)
    images, labels = _converted(arrays, size, channels)
    loaded = ImageSet(images, labels, classes=arrays.classes, name=name, split=split, void=void)
    loaded.skipped = arrays.skipped
    guard.note(name, split, loaded.fingerprint)
    return loaded.to(device)


def _size(image_size: int | tuple[int, int] | None) -> tuple[int, int] | None:
    if image_size is None:
        return None
    h, w = (image_size, image_size) if isinstance(image_size, int) else image_size
    if h < 1 or w < 1:
        raise InputError(f"image_size must be at least 1, not {image_size}")
    return h, w


def _split(name: str, split: str) -> sources.Arrays:
    if name == "camvid":
        return sources.arrays(name, {"fit": "train", "held_out": "val"}.get(split, split))
    if split in ("train", "test"):
        return sources.arrays(name, split)
    whole = sources.arrays(name, "train")
    # A scene has no class of its own: scenes count as one class.
    one_per_image = whole.labels if whole.labels.ndim == 1 else np.zeros(len(whole.labels), np.int64)
    held_out = sources.rank_in_class(one_per_image) % 10 == 9
    chosen = held_out if split == "held_out" else ~held_out
    return sources.Arrays(whole.images[chosen], whole.labels[chosen], whole.classes)


def _converted(
    arrays: sources.Arrays, size: tuple[int, int] | None, channels: int | None
) -> tuple[Tensor, Tensor | None]:
    images = torch.from_numpy(arrays.images)
    images = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2)
    labels = torch.from_numpy(arrays.labels) if len(arrays.classes) else None
    if images.shape[1] == 3 and channels == 1:
        images = torch.cat([_luma(part) for part in torch.split(images, 1024)])
    if size is not None and size != tuple(images.shape[2:]):
        images = F.interpolate(images, size, mode="bilinear", antialias=True)
    if labels is not None and labels.ndim == 3 and labels.shape[1:] != images.shape[2:]:
        labels = F.interpolate(labels[:, None], tuple(images.shape[2:]), mode="nearest-exact")[:, 0]
    if images.shape[1] == 1 and channels == 3:
        images = images.expand(-1, 3, -1, -1)
    return images.contiguous(), labels


def _luma(images: Tensor) -> Tensor:
    """ITU-R 601 luma in Pillow's integer arithmetic: uint8 [B, 3, H, W] -> [B, 1, H, W]."""
    r, g, b = images.int().unbind(1)
    luma = torch.bitwise_right_shift(r * 19595 + g * 38470 + b * 7471 + 32768, 16)
    return luma.to(torch.uint8)[:, None]
