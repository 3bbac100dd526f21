"""Generators: noise z [B, latent_dim] -> images [B, C, H, W] in image space.

A and B are those of DFAD (arXiv 1912.11006), DAFL's (1904.01186) is A with another constant, ZSKT (1905.09768) has
its own; the toolbox pair are those of CMI (2105.08584) and its baselines, deep that of MosaicKD (2110.15094) for
large images; its generator for small ones is toolbox_large. Upsampling is nearest-neighbour, LeakyReLU has slope 0.2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..errors import InputError
from .normalize import Denormalize


def generator_a(
    latent_dim: int,
    image_shape: tuple[int, int, int],
    ngf: int,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    eps: float = 1e-5,
) -> nn.Sequential:
    """DFAD's generator for small images: H and W are multiples of 4.

    Its last batch normalisation has no weights: in train mode each channel of the normalised batch has mean 0
    and variance 1. So the images can leave [0, 1]; clamp them to show them.

    Args:
        eps: of the batch normalisation after the first two convolutions; 0.8 makes it the generator of DAFL's code.
    """
    return nn.Sequential(
        *_upsampling(latent_dim, image_shape, start=2 * ngf, ngf=ngf, conv_bias=True, eps=eps),
        nn.Tanh(),
        nn.BatchNorm2d(image_shape[0], affine=False),
        Denormalize(mean, std),
    )


def generator_zskt(
    latent_dim: int, image_shape: tuple[int, int, int], ngf: int, mean: Sequence[float], std: Sequence[float]
) -> nn.Sequential:
    """ZSKT's generator: H and W are multiples of 4, the first map has 5/16 of the sides (10x10 for 32x32 images).

    It ends as generator A does, but for the tanh, so its images too can leave [0, 1].
    """
    channels, height, width = image_shape
    smallest = round(5 * height / 16), round(5 * width / 16)
    return nn.Sequential(
        *_upsampling(latent_dim, image_shape, start=2 * ngf, ngf=ngf, conv_bias=True, smallest=smallest),
        nn.BatchNorm2d(channels, affine=False),
        Denormalize(mean, std),
    )


def toolbox(latent_dim: int, image_shape: tuple[int, int, int], ngf: int, *, start: int) -> nn.Sequential:
    """CMI's generators: H and W are multiples of 4, the sigmoid's images lie in [0, 1].

    Args:
        start: channels of the first feature map in units of ngf: 2 is "small" (CMI, FastDFKD), 4 is "large"
            (the GAN baselines).
    """
    layers = _upsampling(latent_dim, image_shape, start=start * ngf, ngf=ngf, conv_bias=False)
    return nn.Sequential(*layers, nn.Sigmoid())


def generator_b(latent_dim: int, image_shape: tuple[int, int, int], ngf: int) -> nn.Sequential:
    """DFAD's generator for larger images, DCGAN style: H and W are multiples of 16.

    The paper normalises its data with mean and std 0.5, where tanh's [-1, 1] is the range of an image; that
    fixed map ends this generator, so its images fill [0, 1] whatever the teacher's statistics are.
    """
    channels, height, width = image_shape
    _must_divide(16, height, width)
    layers: list[nn.Module] = [
        nn.Linear(latent_dim, 8 * ngf * (height // 16) * (width // 16)),
        nn.Unflatten(1, (8 * ngf, height // 16, width // 16)),
        nn.BatchNorm2d(8 * ngf),
    ]
    for wide, narrow in ((8, 4), (4, 2), (2, 1), (1, 1)):
        layers.append(nn.ConvTranspose2d(wide * ngf, narrow * ngf, 4, stride=2, padding=1, bias=False))
        layers.append(nn.BatchNorm2d(narrow * ngf))
        layers.append(nn.LeakyReLU(0.2))
    layers += [nn.Conv2d(ngf, channels, 3, padding=1), nn.Tanh()]
    network = nn.Sequential(*layers, Denormalize([0.5] * channels, [0.5] * channels))
    draw_weights(network)
    return network


def deep(latent_dim: int, image_shape: tuple[int, int, int], ngf: int) -> nn.Sequential:
    """MosaicKD's generator for large images: H and W are multiples of 4, the sigmoid's images lie in [0, 1].

    One width, ngf, and five doublings as in the paper, or as many as the sides can be halved.
    """
    channels, height, width = image_shape
    _must_divide(4, height, width)
    doublings = next(n for n in (5, 4, 3, 2) if not height % 2**n and not width % 2**n)
    start = ngf, height >> doublings, width >> doublings
    layers: list[nn.Module] = [
        nn.Linear(latent_dim, math.prod(start)),
        nn.Unflatten(1, start),
        nn.BatchNorm2d(ngf),
        nn.LeakyReLU(0.2),
    ]
    for _ in range(doublings):
        layers.append(nn.Upsample(scale_factor=2))
        layers.append(nn.Conv2d(ngf, ngf, 3, padding=1))
        layers.append(nn.BatchNorm2d(ngf))
        layers.append(nn.LeakyReLU(0.2))
    return nn.Sequential(*layers, nn.Conv2d(ngf, channels, 3, padding=1), nn.Sigmoid())


class Middle(nn.Module):
    """Images [B, C, h, w] -> their middle [B, C, height, width]."""

    def __init__(self, height: int, width: int) -> None:
        super().__init__()
        self.height, self.width = height, width

    def forward(self, x: Tensor) -> Tensor:
        top, left = (x.shape[2] - self.height) // 2, (x.shape[3] - self.width) // 2
        # A copy: networks that look at the images with `view` could not look at a window.
        return x[:, :, top : top + self.height, left : left + self.width].contiguous()


def draw_weights(generator: nn.Module, random: torch.Generator | None = None) -> None:
    """Draw all weights of a generator anew: linear and convolutional ones from N(0, 0.02), scales of batch
    normalisation from N(1, 0.02), biases 0, running statistics as new.

    Args:
        random: on the device of the weights; None is torch's own.
    """
    for layer in generator.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            nn.init.normal_(layer.weight, 0.0, 0.02, generator=random)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.BatchNorm2d):
            layer.reset_running_stats()
            if layer.affine:
                nn.init.normal_(layer.weight, 1.0, 0.02, generator=random)
                nn.init.zeros_(layer.bias)


def _upsampling(
    latent_dim: int,
    image_shape: tuple[int, int, int],
    *,
    start: int,
    ngf: int,
    conv_bias: bool,
    smallest: tuple[int, int] | None = None,
    eps: float = 1e-5,
) -> list[nn.Module]:
    """What A, ZSKT's and the toolbox pair share: from a small map up to [C, H, W], before the squashing.

    Args:
        start: channels of the first map.
        smallest: its sides; None is a quarter of the image's.
        eps: of the batch normalisation after the convolutions.
    """
    channels, height, width = image_shape
    _must_divide(4, height, width)
    h, w = smallest or (height // 4, width // 4)
    return [
        nn.Linear(latent_dim, start * h * w),
        nn.Unflatten(1, (start, h, w)),
        nn.BatchNorm2d(start),
        nn.Upsample(size=(height // 2, width // 2)),
        nn.Conv2d(start, 2 * ngf, 3, padding=1, bias=conv_bias),
        nn.BatchNorm2d(2 * ngf, eps),
        nn.LeakyReLU(0.2),
        nn.Upsample(scale_factor=2),
        nn.Conv2d(2 * ngf, ngf, 3, padding=1, bias=conv_bias),
        nn.BatchNorm2d(ngf, eps),
        nn.LeakyReLU(0.2),
        nn.Conv2d(ngf, channels, 3, padding=1),
    ]


def _must_divide(factor: int, height: int, width: int) -> None:
    if height < factor or width < factor or height % factor or width % factor:
        raise InputError(
            f"this generator makes images whose sides are multiples of {factor} px, not {height}x{width}; "
            f"choose such an image size{' or generator_a' if factor > 4 else ''}"
        )
