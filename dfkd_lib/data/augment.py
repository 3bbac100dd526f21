"""Random crops, flips, colours and mixtures of a whole batch on its device; the order in which images are visited."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError


def crop_flip(x: Tensor, *, pad: int = 4, flip: bool = True, generator: torch.Generator) -> Tensor:
    """Shift each image by up to `pad` pixels either way, zeros coming in, and mirror every second one.

    Args:
        x: [B, C, H, W], float or uint8.
        generator: on the device of `x`; the same state gives the same result.

    Returns:
        A new tensor like `x`; differentiable with respect to it.
    """
    b, c, h, w = x.shape
    top, left = torch.randint(0, 2 * pad + 1, (2, b, 1), generator=generator, device=x.device)
    rows = top + torch.arange(h, device=x.device)
    columns = left + torch.arange(w, device=x.device)
    if flip:
        columns = torch.where(_coins(x, generator).view(b, 1), columns.flip(1), columns)
    # One gather: the gradient of a fancy-indexed window costs eighty times as much on a processor.
    at = (rows[:, :, None] * (w + 2 * pad) + columns[:, None, :]).view(b, 1, h * w).expand(b, c, h * w)
    return F.pad(x, (pad, pad, pad, pad)).flatten(2).gather(2, at).view(b, c, h, w)


def resized_crop_flip(
    x: Tensor, *, scale: tuple[float, float] = (0.25, 1.0), flip: bool = True, generator: torch.Generator
) -> Tensor:
    """Blow a random square of each image up to the whole, and mirror every second one: CMI's local view.

    Args:
        x: float [B, C, H, W].
        scale: least and largest share of the area that the square covers; (1, 1) without flip gives x back.
        generator: on the device of `x`; the same state gives the same result.

    Returns:
        [B, C, H, W], bilinear, differentiable with respect to x.
    """
    b = len(x)
    area = torch.rand(b, generator=generator, device=x.device) * (scale[1] - scale[0]) + scale[0]
    side = area.sqrt().to(x.dtype)
    room = 1 - side
    across, down = (2 * torch.rand(2, b, generator=generator, device=x.device).to(x.dtype) - 1) * room
    mirror = torch.where(_coins(x, generator).flatten(), -1.0, 1.0).to(x.dtype) if flip else torch.ones_like(side)
    zero = torch.zeros_like(side)
    rows = (torch.stack([side * mirror, zero, across], 1), torch.stack([zero, side, down], 1))
    where = F.affine_grid(torch.stack(rows, 1), list(x.shape), align_corners=False)
    return F.grid_sample(x, where, padding_mode="border", align_corners=False)


def colour_jitter(x: Tensor, *, p: float, strength: float = 0.1, generator: torch.Generator) -> Tensor:
    """Change brightness, contrast, saturation and hue of some images, in this order.

    The first three are factors from [1 - strength, 1 + strength], hue is turned about the axis of greys by up to
    `strength` of a whole turn either way; grey is the mean of the channels. Of one channel, saturation and hue change
    nothing.

    Args:
        x: float [B, C, H, W] in [0, 1], C 1 or 3.
        p: probability with which an image is changed.
        generator: on the device of `x`; the same state gives the same result.

    Returns:
        Like x, changed images clamped to [0, 1]; differentiable with respect to it.
    """
    draws = torch.rand(5, len(x), 1, 1, 1, generator=generator, device=x.device)
    brightness, contrast, saturation = 1 + strength * (2 * draws[:3] - 1)
    angle = 2 * math.pi * strength * (2 * draws[3] - 1)
    y = brightness * x
    y = contrast * y + (1 - contrast) * y.mean((1, 2, 3), keepdim=True)
    grey = y.mean(1, keepdim=True)
    across = (y.roll(1, 1) - y.roll(-1, 1)) / math.sqrt(3)
    y = grey + saturation * (angle.cos() * (y - grey) + angle.sin() * across)
    return torch.where(draws[4] < p, y.clamp(0, 1).to(x.dtype), x)


def cut_mix(x: Tensor, *, p: float, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """With probability p for the whole batch, paste into each image a patch of another one, at the same place.

    The partners are a random permutation of the batch. An image's patch has floor(sqrt(l) H) rows and floor(sqrt(l) W)
    columns, l from U(0, 1), about a random pixel, and is cut off at the edges.

    Args:
        x: float [B, C, H, W].
        generator: on the device of `x`; the same state gives the same result.

    Returns:
        The images, differentiable with respect to x; the number of each one's partner, int64 [B]; the share of
        its pixels that were pasted, float32 [B] in [0, 1].
    """
    b, _, h, w = x.shape
    draws = torch.rand(4, b, generator=generator, device=x.device)
    mixes = torch.rand((), generator=generator, device=x.device) < p
    partners, side = draws[0].argsort(), draws[1].sqrt()
    rows, columns = _stretch(h, side, draws[2]), _stretch(w, side, draws[3])
    pasted = rows[:, :, None] & columns[:, None, :] & mixes
    mixed = torch.where(pasted[:, None], x.index_select(0, partners), x)
    return mixed, partners, pasted.sum((1, 2)) / (h * w)


def _stretch(n: int, share: Tensor, place: Tensor) -> Tensor:
    """Which of n pixels lie in a stretch of floor(share n) about the pixel floor(place n); bool [B, n]."""
    length = (share * n).floor()
    first = (place * n).floor() - (length / 2).floor()
    at = torch.arange(n, device=share.device)
    return (at >= first[:, None]) & (at < (first + length)[:, None])


def paired_crop_flip(
    x: Tensor, y: Tensor, *, size: int, flip: bool = True, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Cut the same random square out of each image and its mask, and mirror every second pair.

    Args:
        x: images [B, C, H, W].
        y: masks [B, H, W].
        size: side of the square in pixels, at most H and W.
        generator: on the device of `x`; the same state gives the same result.

    Returns:
        [B, C, size, size] and [B, size, size].

    Raises:
        InputError: the square does not fit.
    """
    b, _, h, w = x.shape
    if not 0 < size <= min(h, w):
        raise InputError(f"crop size {size} does not fit images of {h}x{w}; choose at most {min(h, w)}")
    top = torch.randint(0, h - size + 1, (b,), generator=generator, device=x.device)
    left = torch.randint(0, w - size + 1, (b,), generator=generator, device=x.device)
    at = torch.stack([top, left])
    x, y = _windows(x, at, size, size), _windows(y[:, None], at, size, size)
    if flip:
        coins = _coins(x, generator)
        x, y = _mirrored(x, coins), _mirrored(y, coins)
    return x, y[:, 0]


def _windows(x: Tensor, at: Tensor, h: int, w: int) -> Tensor:
    """One h x w window per image: [B, C, H, W], corners [2, B] -> [B, C, h, w]."""
    views = x.unfold(2, h, 1).unfold(3, w, 1)
    return views[torch.arange(len(x), device=x.device), :, at[0], at[1]]


def _coins(x: Tensor, generator: torch.Generator) -> Tensor:
    return torch.rand(len(x), 1, 1, 1, generator=generator, device=x.device) < 0.5


def _mirrored(x: Tensor, coins: Tensor) -> Tensor:
    return torch.where(coins, x.flip(3), x)


def minibatches(n: int, batch_size: int, *, seed: int, device: torch.device | str = "cpu") -> Callable[[int], Tensor]:
    """An endless order of visits to `n` images, each of them once per epoch.

    The epochs' permutations are laid end to end and cut into batches of one size, so a batch may hold the
    end of one epoch and the start of the next. A batch follows from (seed, step) alone: a resumed run
    needs no stored state to see the same ones.

    Args:
        device: where the indices shall be; an epoch's order goes there in one piece.

    Returns:
        A function: step (0, 1, ...) -> indices int64 [batch_size].

    Raises:
        InputError: no images, or a batch without images.
    """
    if n < 1 or batch_size < 1:
        raise InputError(f"cannot draw batches of {batch_size} from {n} images; both must be at least 1")

    @lru_cache(maxsize=2)
    def order(epoch: int) -> Tensor:
        digest = hashlib.sha256(f"{seed}/{epoch}".encode()).digest()
        # RandomState, because its stream is promised never to change.
        random = np.random.RandomState(np.frombuffer(digest, "<u4"))
        return torch.from_numpy(random.permutation(n)).to(device)

    def indices(step: int) -> Tensor:
        position, stop = step * batch_size, (step + 1) * batch_size
        parts = []
        while position < stop:
            epoch, offset = divmod(position, n)
            parts.append(order(epoch)[offset : offset + stop - position])
            position += len(parts[-1])
        return torch.cat(parts)

    return indices
