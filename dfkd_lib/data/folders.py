"""Images of one's own: a folder of them as a dataset, or one file."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from .sources import Arrays, rank_in_class

_LARGE = 2**24  # pixels


def folder(path: str, size: tuple[int, int], channels: int) -> Arrays:
    """All readable images below `path`, cropped to the proportions of `size` and resized, whatever their mode.

    Sub-folders become classes, in alphabetical order; files beside them are not read. The classes take
    turns, so that the first images show all of them. Without sub-folders there are no classes. Files that
    are no readable images are skipped; `skipped` counts them, and a warning of one line says so.

    Raises:
        InputError: no such folder, or no readable image in it.
    """
    root = own_path(path)
    if not root.is_dir():
        raise InputError(f"folder {root} does not exist; give the path of a folder with images")
    classes = tuple(sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")))
    images, classes_of, skipped = [], [], 0
    for label, place in enumerate([root / c for c in classes] or [root]):
        for file in sorted(place.rglob("*")):
            hidden = any(part.startswith(".") for part in file.relative_to(root).parts)
            if hidden or not file.is_file():
                continue
            image = _image(file, size, channels)
            if image is None:
                skipped += 1
            else:
                images.append(image)
                classes_of.append(label)
    if not images:
        what = f"none of its {skipped} files is one" if skipped else "put images there, or sub-folders of images"
        raise InputError(f"folder {root} holds no readable image; {what}")
    if skipped:
        total = skipped + len(images)
        warnings.warn(f"folder {root}: {skipped} of {total} files are not readable images", stacklevel=3)
    labels = np.array(classes_of, dtype=np.int64)
    order = np.lexsort((labels, rank_in_class(labels)))
    return Arrays(np.stack(images)[order], labels[order], classes, skipped)


def read_image(path: str, size: int, channels: int) -> Tensor:
    """One image file, cropped to a square around its centre and resized: [1, channels, size, size] in [0, 1].

    "china.jpg" and "flower.jpg" are the two photographs that come with scikit-learn.

    Raises:
        InputError: no such file, or not an image.
    """
    file = own_path(path)
    if path in ("china.jpg", "flower.jpg"):
        import sklearn.datasets

        file = Path(sklearn.datasets.__file__).parent / "images" / path
    if not file.is_file():
        raise InputError(f"there is no image {file}; give the path of a picture")
    image = _image(file, (size, size), channels)
    if image is None:
        raise InputError(f"cannot read {file} as an image; give another picture")
    pixels = torch.from_numpy(image.reshape(size, size, channels).copy()).float().div(255)
    return pixels.permute(2, 0, 1)[None].contiguous()


def own_path(path: str) -> Path:
    """Where a file or folder is that a user names, whether or not it exists."""
    root = Path(path).expanduser()
    if root.exists() or root.is_absolute():
        return root
    # A chapter runs in its own folder, while its reader names paths from where the command was given.
    return Path(os.environ.get("PWD", ".")) / root


def _image(file: Path, size: tuple[int, int], channels: int) -> np.ndarray | None:
    from PIL import Image, ImageOps

    height, width = size
    try:
        with _no_limit(), Image.open(file) as opened:
            opened.draft(None, (2 * width, 2 * height))  # lets a JPEG be read at a fraction of its size
            image: Image.Image = opened
            if image.mode.startswith("I"):  # 16 bits per pixel, which convert() would clip at 255
                image = Image.fromarray((np.asarray(image) / 257).round().clip(0, 255).astype(np.uint8))
            if image.width * image.height > _LARGE:
                # Reduced first and converted then: a copy in colour of a huge image may not fit into memory.
                image = image.convert({"1": "L"}.get(image.mode, "RGB")) if image.mode in ("1", "P") else image
                while (factor := min(image.width // (2 * width), image.height // (2 * height))) > 1:
                    image = image.reduce(min(factor, 8))  # Pillow's average over much larger squares is dark
            image = ImageOps.exif_transpose(image).convert("L" if channels == 1 else "RGB")
            return np.asarray(ImageOps.fit(image, (width, height), Image.Resampling.BILINEAR))
    except Exception:  # Pillow raises many kinds of errors for damaged files
        return None


@contextlib.contextmanager
def _no_limit() -> Iterator[None]:
    """The images are the user's own: however large, they are not taken for an attack."""
    from PIL import Image

    before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before
