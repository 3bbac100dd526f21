"""The two ends of the image convention: images live in [0, 1], and each network normalises for itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..errors import InputError


class _ChannelAffine(nn.Module):
    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if len(mean) != len(std):
            raise InputError(f"mean has {len(mean)} values and std {len(std)}; give one each per channel")
        if min(std, default=0.0) <= 0:
            raise InputError(f"std must be above 0 in every channel, not {tuple(std)}")
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(-1, 1, 1))

    def extra_repr(self) -> str:
        return f"channels={len(self.mean)}"


class Normalize(_ChannelAffine):
    """Images [B, C, H, W] in [0, 1] -> (x - mean) / std per channel, what the convolutions see.

    Raises:
        InputError: mean and std of different lengths, or a std that is not positive.
    """

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


class Denormalize(_ChannelAffine):
    """The inverse of `Normalize`: normalised [B, C, H, W] -> image space, mean + std * x per channel."""

    def forward(self, x: Tensor) -> Tensor:
        return x * self.std + self.mean


def pixel_statistics(teacher: nn.Module, channels: int) -> tuple[list[float], list[float]]:
    """Mean and std per channel that the teacher's first `Normalize` takes images to have; without one, 0.5 and 0.25."""
    known = next((layer for layer in teacher.modules() if isinstance(layer, Normalize)), None)
    if known is None:
        return [0.5] * channels, [0.25] * channels
    return known.mean.flatten().tolist(), known.std.flatten().tolist()
