"""What a person says beside the networks, fit to use or refused: the shape of images, their statistics, test images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .data import ImageSet
from .errors import InputError
from .models import Normalize
from .settings import typed

VOID = 255  # in masks: no label


def shape_of_images(image_shape: Sequence[int]) -> tuple[int, int, int]:
    """(C, H, W).

    Raises:
        InputError: not three whole numbers above 0, or the channels seem to stand last.
    """
    try:
        channels, height, width = typed("image_shape", list(image_shape), tuple[int, int, int])
    except (InputError, TypeError):
        channels = height = width = 0
    if min(channels, height, width) < 1:
        raise InputError(f"image_shape must be three whole numbers (channels, height, width), not {image_shape!r}")
    if width in (1, 3) and channels > 4:
        raise InputError(
            f"image_shape is (channels, height, width), and {channels, height, width} has the channels last; "
            f"give ({width}, {channels}, {height})"
        )
    return channels, height, width


def minutes_of_run(minutes: float | None, n_updates: int | None) -> float | None:
    """Minutes of wall-clock time, above 0 and finite, or None.

    Raises:
        InputError: something else, or a number of updates beside them.
    """
    if minutes is None:
        return None
    minutes = typed("minutes", minutes, float)
    if not 0 < minutes < float("inf"):
        raise InputError(f"minutes must be above 0, not {minutes:g}")
    if n_updates is not None:
        raise InputError("minutes and n_updates both say how long to train; give one of them")
    return minutes


def statistics_of_images(
    mean: Sequence[float] | None, std: Sequence[float] | None, channels: int, *networks: nn.Module
) -> tuple[list[float], list[float]] | None:
    """Mean and std per channel, of images in [0, 1]; None if neither is given.

    Raises:
        InputError: one without the other; not one number per channel; out of the range of such images, as they are
            for pixels in 0..255; one of the networks normalises already.
    """
    if mean is None and std is None:
        return None
    if mean is None or std is None:
        raise InputError("mean and std belong together; give both, or none if the networks expect images in [0, 1]")
    try:
        means, stds = [float(m) for m in mean], [float(s) for s in std]
    except (TypeError, ValueError):
        means, stds = [], []
    if not len(means) == len(stds) == channels:
        raise InputError(f"mean and std must be sequences of {channels} numbers, one per channel")
    if not all(s > 0 for s in stds):
        raise InputError(f"std must be above 0 in every channel, not {tuple(stds)}")
    if not all(0 <= m <= 1 for m in means) or not all(s <= 1 for s in stds):
        raise InputError(
            f"mean {means} and std {stds} are not those of images in [0, 1]; if they are of pixels in 0..255, divide "
            "both by 255"
        )
    if any(isinstance(layer, Normalize) for network in networks for layer in network.modules()):
        raise InputError("a network from dfkd_lib.models normalises its images itself; leave mean and std out")
    return means, stds


def labelled_images(
    test: ImageSet | tuple[Tensor, Tensor], image_shape: tuple[int, int, int], n_classes: int
) -> ImageSet:
    """Images to test on, as a set.

    Args:
        test: a set, or images [N, C, H, W], uint8 or floats in [0, 1], and labels [N] or masks [N, H, W], whole numbers
            of any type; 255 in a mask stands for no label.

    Raises:
        InputError: anything else, another shape, or a label outside 0..n_classes - 1.
    """
    if not isinstance(test, ImageSet):
        if not (isinstance(test, tuple | list) and len(test) == 2 and all(isinstance(t, Tensor) for t in test)):
            raise InputError("test must be an ImageSet or a pair of tensors (images, labels)")
        images, labels = (t.detach() for t in test)
        if images.is_floating_point():
            if not len(images) or not (images.min() >= 0 and images.max() <= 1):
                raise InputError("test images must be uint8 or floats in [0, 1]; leave normalising to mean and std")
            images = images.float().mul(255).round().to(torch.uint8)
        if labels.is_complex() or (labels.is_floating_point() and not torch.equal(labels, labels.round())):
            raise InputError("the test labels must be whole numbers, one per image")
        classes = [str(i) for i in range(n_classes)]
        if labels.ndim == 3:
            if labels.min() < 0 or labels.max() > VOID:
                raise InputError(f"masks must lie in 0..{VOID}, {VOID} for pixels without a label")
            test = ImageSet(images, labels.byte(), classes=classes, name="test", split="test", void=VOID)
        else:
            test = ImageSet(images, labels.long(), classes=classes, name="test", split="test")
    if test.image_shape != image_shape:
        raise InputError(f"the test images have shape {test.image_shape}, and image_shape is {image_shape}")
    if test.labels is None or not len(test):
        raise InputError("the test images need one label or mask each")
    known = test.labels if test.void is None else test.labels[test.labels != test.void]
    if not known.numel() or known.min() < 0 or known.max() >= n_classes:
        raise InputError(f"the test labels must lie in 0..{n_classes - 1}, as the teacher has {n_classes} classes")
    if test.task == "segmentation" and test.n_classes != n_classes:
        raise InputError(f"the test masks have {test.n_classes} classes and the teacher {n_classes}")
    return test
