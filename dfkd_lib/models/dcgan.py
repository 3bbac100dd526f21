"""The DCGAN pair of OSGAN (arXiv 2103.00430): noise z [B, latent_dim] -> images in [0, 1] -> one logit per image.

The authors' networks work on [-1, 1]; a fixed map ends the generator and begins the discriminator, so that both
speak of images in [0, 1] as the rest of the library does.
"""

from __future__ import annotations

import math

from torch import nn

from ..errors import InputError, unknown
from .normalize import Denormalize, Normalize

SIDES = (8, 16, 32, 64)
NORMS = ("batch", "group")


def dcgan_generator(latent_dim: int, image_shape: tuple[int, int, int], width: int = 128) -> nn.Sequential:
    """Transposed convolutions from z [B, latent_dim] up to images [B, C, H, W], tanh at the end.

    A map of 4x4 doubles its sides until they are the image's, 8d, 4d, 2d and d channels wide for 64x64. Smaller
    images take one level fewer for each halving; 8x8 starts from 2x2, so that two levels remain.

    Args:
        image_shape: (C, H, W), H = W in `SIDES`; the authors' is 64.
        width: d, channels of the widest map; 128 in the authors' code.

    Raises:
        InputError: sides that are not in `SIDES`, or numbers below 1.
    """
    channels, levels, start = _plan(image_shape, latent_dim=latent_dim, width=width)
    inputs, outputs = latent_dim, width << (levels - 1)
    layers: list[nn.Module] = [nn.Unflatten(1, (latent_dim, 1, 1)), nn.ConvTranspose2d(inputs, outputs, start)]
    for level in reversed(range(levels)):
        layers += [nn.BatchNorm2d(outputs), nn.ReLU()]
        inputs, outputs = outputs, width << (level - 1) if level else channels
        layers.append(nn.ConvTranspose2d(inputs, outputs, 4, stride=2, padding=1))
    return _drawn(nn.Sequential(*layers, nn.Tanh(), Denormalize([0.5] * channels, [0.5] * channels)))


def dcgan_discriminator(image_shape: tuple[int, int, int], width: int = 128, norm: str = "batch") -> nn.Sequential:
    """Strided convolutions from images [B, C, H, W] in [0, 1] down to logits [B], positive for real.

    Args:
        image_shape: (C, H, W), H = W in `SIDES`.
        width: d, channels of the first convolution; each level doubles them.
        norm: "batch", or "group", which asymmetric losses need: 32 groups, fewer in narrow networks, where a group
            has two channels at least. The first convolution and the head have none.

    Raises:
        InputError: unknown norm, sides that are not in `SIDES`, a width below 1.
    """
    if norm not in NORMS:
        raise unknown("norm", norm, NORMS)
    channels, levels, end = _plan(image_shape, width=width)
    layers: list[nn.Module] = [Normalize([0.5] * channels, [0.5] * channels)]
    inputs = channels
    for level in range(levels):
        outputs = width << level
        layers.append(nn.Conv2d(inputs, outputs, 4, stride=2, padding=1))
        if level:
            groups = math.gcd(32, outputs // 2)
            layers.append(nn.BatchNorm2d(outputs) if norm == "batch" else nn.GroupNorm(groups, outputs))
        layers.append(nn.LeakyReLU(0.2))
        inputs = outputs
    # Flattened from the front: `squeeze` would also take the batch of one.
    return _drawn(nn.Sequential(*layers, nn.Conv2d(inputs, 1, end), nn.Flatten(0)))


def _plan(image_shape: tuple[int, int, int], **numbers: int) -> tuple[int, int, int]:
    """Channels, how often the sides are halved, and what is left of them."""
    channels, height, width = image_shape
    for what, number in {"channels": channels, **numbers}.items():
        if number < 1:
            raise InputError(f"{what} must be at least 1, not {number}")
    if height != width or height not in SIDES:
        sizes = ", ".join(f"{side}x{side}" for side in SIDES)
        raise InputError(f"a DCGAN makes images of {sizes}, not {height}x{width}; resize the images")
    levels = max(2, int(math.log2(height)) - 2)
    return channels, levels, height >> levels


def _drawn(network: nn.Sequential) -> nn.Sequential:
    """The network with convolutions from N(0, 0.02) and biases 0; norms stay as they are made."""
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d) and layer.bias is not None:
            nn.init.normal_(layer.weight, 0.0, 0.02)
            nn.init.zeros_(layer.bias)
    return network
