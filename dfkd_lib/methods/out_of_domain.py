"""The images at hand that show other things: how they are asked for, chosen and tiled, and which patches they share."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import data
from ..data import ImageSet
from ..data.folders import own_path
from ..errors import InputError, unknown
from ..runtime import Runtime
from .mosaickd import entropies


def ood_images(asked: str, *, image_size: int | tuple[int, int], channels: int) -> ImageSet:
    """Out-of-domain images from what a user asks for.

    Args:
        asked: a dataset, "mnist"; some of its classes by number, "digits:1" or "cifar10:0,1,8,9"; or a folder of
            images, a path with or without "folder:" before it.

    Raises:
        InputError: neither a dataset nor a folder, or no such class.
    """
    name, _, chosen = asked.partition(":")
    if name in data.names():
        images = data.load(name, "train", image_size=image_size, channels=channels)
        try:
            return images.of_classes([int(c) for c in chosen.split(",")]) if chosen else images
        except ValueError:
            raise InputError(f"{asked!r}: classes are numbers with commas between, such as {name}:0,1") from None
    path = chosen if name == "folder" else asked
    if not path or (name != "folder" and not own_path(path).is_dir() and "/" not in path):
        raise unknown("dataset or folder", asked, data.names())
    return data.load(f"folder:{path}", "train", image_size=image_size, channels=channels)


@torch.inference_mode()
def teacher_entropies(teacher: nn.Module, images: ImageSet, runtime: Runtime, batch_size: int = 500) -> Tensor:
    """Entropy of the teacher's belief on each image, unaugmented: [N]; for segmentation the mean over pixels."""
    found = []
    for x, _ in images.batches(batch_size):
        with runtime.autocast():
            logits = teacher(runtime.images(x)).to(runtime.dtype)
        found.append(entropies(logits).flatten(1).mean(1) if logits.ndim > 2 else entropies(logits))
    return torch.cat(found)


def most_uncertain(entropy: Tensor, n: int) -> Tensor:
    """The subset that the authors call truly out of domain: the n images on which the teacher is least certain.

    Args:
        entropy: [N]; what is not a number counts as certain.
        n: if it is N or more, all images are returned.

    Returns:
        Indices int64 [min(n, N)], ascending; of equal images the first is taken.
    """
    order = entropy.nan_to_num(nan=-1.0).argsort(descending=True, stable=True)
    return order[:n].sort().values


def collages(images: ImageSet, size: tuple[int, int], n: int, seed: int = 0) -> ImageSet:
    """n images of the given size, tiled from random images of a set: scenes out of small photographs.

    Raises:
        InputError: the size is no multiple of the images'.
    """
    _, height, width = images.image_shape
    rows, columns = size[0] // height, size[1] // width
    if not rows or not columns or size != (rows * height, columns * width):
        raise InputError(f"images of {height}x{width} do not tile {size[0]}x{size[1]}; choose a multiple")
    at = torch.randint(len(images), (n * rows * columns,), generator=torch.Generator().manual_seed(seed))
    tiles = images.images[at.to(images.device)].unflatten(0, (n, rows, columns))
    whole = tiles.permute(0, 3, 1, 4, 2, 5).reshape(n, -1, *size)
    return ImageSet(whole.contiguous(), name=f"collages of {images.name}", split=images.split)


def cut(x: Tensor, size: int, stride: int) -> Tensor:
    """All patches of a batch of images: [B, C, H, W] -> [B, P, C size size], row by row."""
    return F.unfold(x, size, stride=stride).transpose(1, 2)


def mosaic(x: Tensor, source: Tensor, size: int, stride: int = 1) -> tuple[Tensor, Tensor]:
    """Each image re-assembled from the nearest patches of other images.

    The images are cut into tiles that touch; each is replaced by the patch of `source`, at any place of any of its
    images, that is nearest in the mean squared difference of pixels.

    Args:
        x: [B, C, H, W], sides multiples of `size`.
        source: [N, C, H', W'].
        stride: between the patches of the source.

    Returns:
        The mosaics [B, C, H, W]; root mean squared difference of each tile to its patch [B, P].
    """
    wanted, patches = cut(x, size, size), cut(source.to(x.device), size, stride).flatten(0, 1)
    b, p, d = wanted.shape
    distance = torch.full((b * p,), math.inf, device=x.device)
    at = torch.zeros(b * p, dtype=torch.int64, device=x.device)
    for start in range(0, len(patches), 8192):
        near, where = torch.cdist(wanted.flatten(0, 1), patches[start : start + 8192]).min(1)
        at = torch.where(near < distance, where + start, at)
        distance = torch.minimum(distance, near)
    tiles = patches[at].view(b, p, d).transpose(1, 2)
    return F.fold(tiles, x.shape[2:], size, stride=size), (distance / math.sqrt(d)).view(b, p)
