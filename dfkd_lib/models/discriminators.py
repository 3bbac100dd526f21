"""Discriminators of MosaicKD (arXiv 2110.15094): images [B, C, H, W] -> a map of logits [B, 1, h, w], one per patch.

How much of an image one logit sees follows from kernels, strides and paddings alone: :func:`receptive_field`
computes it. Networks are named by it, "patch10" being the paper's. In the authors' ablation two classes are named
otherwise: their "psize10" sees 8 pixels and is "patch8" here, their "psize22" sees 15 and is "patch15".
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..errors import InputError, unknown
from .normalize import Normalize

# Per network, its convolutions as (channels in units of ndf, kernel, stride, padding), the head without channels.
# All but the first are followed by batch normalisation and all but the head by LeakyReLU.
_HEAD = (0, 1, 1, 0)
_LAYERS: dict[str, tuple[tuple[int, int, int, int], ...]] = {
    "patch1": ((1, 1, 1, 0), _HEAD),
    "patch2": ((1, 2, 1, 1), _HEAD),
    "patch4": ((1, 4, 2, 1), (2, 1, 1, 1), _HEAD),
    "patch5": ((1, 3, 1, 1), (2, 3, 2, 1), _HEAD),
    "patch8": ((1, 4, 2, 1), (2, 3, 2, 1), _HEAD),
    "patch10": ((1, 4, 2, 1), (2, 4, 2, 1), _HEAD),
    "patch15": ((1, 3, 2, 1), (2, 3, 2, 1), (4, 3, 2, 1), _HEAD),
    "patch18": ((1, 4, 2, 1), (2, 4, 2, 1), (0, 3, 1, 1)),
    "patch22": ((1, 4, 2, 1), (2, 4, 2, 1), (4, 4, 2, 1), _HEAD),
    "patch46": ((1, 4, 2, 1), (2, 4, 2, 1), (4, 4, 2, 1), (8, 4, 2, 1), _HEAD),
}
FULL = "full"


@dataclass(frozen=True)
class Field:
    """What one cell of the map sees: cell (i, j) sees rows `stride * i + offset` and the `size - 1` rows below.

    Columns likewise; what lies outside the image is zeros.
    """

    size: int
    stride: int
    offset: int


def discriminator_names() -> list[str]:
    """The discriminators that :func:`build_discriminator` knows."""
    return [*_LAYERS, FULL]


def build_discriminator(
    name: str, *, image_shape: tuple[int, int, int], mean: Sequence[float], std: Sequence[float], ndf: int = 128
) -> nn.Sequential:
    """A discriminator of images [B, C, H, W] in [0, 1]: logits [B, 1, h, w], positive for real, no sigmoid inside.

    Args:
        name: "patchN" sees N x N pixels with each of its logits. "full" halves the image until its shorter side
            is 2 or 3 and sees all of it with its only logit. The paper's is "patch10"; "patch22" and "patch46" are
            its networks for large images, "patch5" is ours for images of 8 pixels.
        image_shape: (C, H, W).
        mean, std: per channel, the teacher's; the first layer, `normalize`, applies them.
        ndf: channels of the first convolution; the paper's are 128, and 64 for "full", "patch22" and "patch46".

    Raises:
        InputError: unknown name, images that are smaller than the network's strides.
    """
    if name not in (*_LAYERS, FULL):
        raise unknown("discriminator", name, [*_LAYERS, FULL])
    channels, height, width = image_shape
    if ndf < 1:
        raise InputError(f"ndf must be at least 1, not {ndf}")
    layers = _full_layers(height, width) if name == FULL else _LAYERS[name]
    network = nn.Sequential()
    inputs = channels
    for i, (units, kernel, stride, padding) in enumerate(layers):
        outputs = units * ndf or 1
        size = (height, width) if name == FULL and not units else kernel
        network.append(nn.Conv2d(inputs, outputs, size, stride, padding, bias=i == 0))
        height, width = ((side + 2 * padding - kernel) // stride + 1 for side in (height, width))
        if units:
            network.extend([nn.BatchNorm2d(outputs)] if i else [])
            network.append(nn.LeakyReLU(0.2))
        inputs = outputs
    if name != FULL and min(height, width) < 1:
        raise InputError(
            f"discriminator {name!r} reads no images of {image_shape[1]}x{image_shape[2]}; choose a smaller"
        )
    return nn.Sequential(OrderedDict(normalize=Normalize(mean, std), network=network))


def _full_layers(height: int, width: int) -> tuple[tuple[int, int, int, int], ...]:
    shorter, halvings = min(height, width), 0
    while shorter >= 4:
        shorter, halvings = shorter // 2, halvings + 1
    if not halvings:
        raise InputError(f"discriminator 'full' reads images from 4x4, not {height}x{width}")
    return (*((2**i, 4, 2, 1) for i in range(halvings)), _HEAD)


def receptive_field(discriminator: nn.Module) -> Field:
    """Computed from the convolutions, in the order in which they are registered; their kernels must be square."""
    size, stride, offset = 1, 1, 0
    for layer in discriminator.modules():
        if isinstance(layer, nn.Conv2d):
            size += (layer.kernel_size[0] - 1) * stride
            offset -= int(layer.padding[0]) * stride
            stride *= layer.stride[0]
    return Field(size, stride, offset)


def map_shape(discriminator: nn.Module, image_shape: Sequence[int]) -> tuple[int, int]:
    """(h, w) of the map for images (C, H, W); found on a copy without storage."""
    outline = copy.deepcopy(discriminator).to("meta").eval()
    h, w = outline(torch.empty(1, *image_shape, device="meta")).shape[2:]
    return int(h), int(w)
