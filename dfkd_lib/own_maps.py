"""A person's own labelled pictures for segmentation, to test on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .arguments import labelled_images
from .data import ImageSet, load
from .errors import InputError, first_line


def labelled_maps(folder: Path, image_shape: tuple[int, int, int], n_classes: int) -> ImageSet:
    """Test images in the sub-folder "images", and in "masks" a PNG file of the same name for each.

    A mask has one channel, or a palette, whose values are the numbers of the logits, and 255 for pixels without a
    label. Both are cropped to the proportions of `image_shape` and resized, masks to the nearest pixel.

    Args:
        image_shape: (C, H, W).

    Raises:
        InputError: pictures that cannot be read, a mask that is not there or cannot be, or values beyond the classes.
    """
    channels, height, width = image_shape
    if channels not in (1, 3):
        raise InputError(f"pictures have 1 or 3 channels, and the images of these networks have {channels}")
    found = load(f"folder:{folder / 'images'}", "test", image_size=(height, width), channels=channels)
    files = [file for file in sorted((folder / "images").rglob("*")) if file.is_file() and file.name[0] != "."]
    if found.skipped or found.classes or len(files) != len(found):
        raise InputError(f"folder {folder / 'images'} must hold pictures alone, without sub-folders")
    masks = torch.stack([_mask(folder / "masks" / f"{file.stem}.png", (width, height)) for file in files])
    return labelled_images((found.images, masks), image_shape, n_classes)


def _mask(file: Path, size: tuple[int, int]) -> Tensor:
    """uint8 [H, W]; size is (width, height)."""
    from PIL import Image, ImageOps

    if not file.is_file():
        raise InputError(f"there is no mask {file.name} in {file.parent}; each picture needs one of its name")
    try:
        with Image.open(file) as opened:
            mode, fitted = opened.mode, ImageOps.fit(opened, size, Image.Resampling.NEAREST)
    except Exception as e:  # Pillow raises many kinds of errors for damaged files
        raise InputError(f"mask {file} cannot be read ({first_line(e)})") from e
    if mode not in ("L", "P"):
        raise InputError(f"mask {file} has mode {mode}; give one byte a pixel, the number of its class")
    return torch.from_numpy(np.asarray(fitted).copy())
