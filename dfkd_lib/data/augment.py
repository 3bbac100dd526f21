"""Random crops and flips of a whole batch on its device, and the order in which images are visited."""

from __future__ import annotations

import hashlib
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
