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
        A new tensor like `x`.
    """
    b, _, h, w = x.shape
    at = torch.randint(0, 2 * pad + 1, (2, b), generator=generator, device=x.device)
    x = _windows(F.pad(x, (pad, pad, pad, pad)), at, h, w)
    return _mirrored(x, _coins(x, generator)) if flip else x


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


def minibatches(n: int, batch_size: int, *, seed: int) -> Callable[[int], Tensor]:
    """An endless order of visits to `n` images, each of them once per epoch.

    The epochs' permutations are laid end to end and cut into batches of one size, so a batch may hold the
    end of one epoch and the start of the next. A batch follows from (seed, step) alone: a resumed run
    needs no stored state to see the same ones.

    Returns:
        A function: step (0, 1, ...) -> indices int64 [batch_size].

    Raises:
        InputError: no images, or a batch without images.
    """
    if n < 1 or batch_size < 1:
        raise InputError(f"cannot draw batches of {batch_size} from {n} images; both must be at least 1")

    @lru_cache(maxsize=2)
    def order(epoch: int) -> np.ndarray:
        digest = hashlib.sha256(f"{seed}/{epoch}".encode()).digest()
        # RandomState, because its stream is promised never to change.
        return np.random.RandomState(np.frombuffer(digest, "<u4")).permutation(n)

    def indices(step: int) -> Tensor:
        position, stop = step * batch_size, (step + 1) * batch_size
        parts = []
        while position < stop:
            epoch, offset = divmod(position, n)
            parts.append(order(epoch)[offset : offset + stop - position])
            position += len(parts[-1])
        return torch.from_numpy(np.concatenate(parts))

    return indices
