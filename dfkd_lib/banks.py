"""Banks: bounded first-in first-out stores on the device; appending writes the new rows and copies nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .errors import InputError


class Bank:
    """A ring of `size` rows of one shape.

    Attributes:
        appended: rows appended since the beginning, overwritten ones included.
    """

    def __init__(self, size: int, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
        if size < 1:
            raise InputError(f"a bank must have room for at least 1 row, not {size}")
        self.rows = torch.zeros(size, *shape, dtype=dtype, device=device)
        self.appended = 0

    def __len__(self) -> int:
        """Rows stored: min(appended, size)."""
        return min(self.appended, len(self.rows))

    def append(self, rows: Tensor) -> None:
        """Store rows [N, ...]; the oldest make room. Of more than `size` rows the last `size` remain."""
        size = len(self.rows)
        first = self.appended + max(0, len(rows) - size)
        kept = rows[-size:].detach().to(self.rows)
        start = first % size
        head = min(len(kept), size - start)
        self.rows[start : start + head] = kept[:head]
        self.rows[: len(kept) - head] = kept[head:]
        self.appended += len(rows)

    def newest(self, n: int) -> Tensor:
        """The last min(n, stored) rows, oldest of them first."""
        n = min(n, len(self))
        at = torch.arange(self.appended - n, self.appended, device=self.rows.device) % len(self.rows)
        return self.rows[at]

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """min(n, stored) different rows, at random.

        Args:
            generator: on the device of the bank.
        """
        return self.rows[torch.randperm(len(self), generator=generator, device=self.rows.device)[:n]]

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """n rows at random, with replacement; for training batches, where the order of an epoch does not matter.

        Raises:
            InputError: the bank is empty.
        """
        if not len(self):
            raise InputError("the bank is empty; synthesise images before drawing from it")
        return self.rows[torch.randint(len(self), (n,), generator=generator, device=self.rows.device)]

    def state_dict(self) -> dict[str, Any]:
        """The stored rows and the count, oldest row first."""
        return {"rows": self.newest(len(self)), "appended": self.appended}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` took."""
        self.appended = state["appended"] - len(state["rows"])
        self.append(state["rows"])


class ImageBank(Bank):
    """Images as bytes: float [N, C, H, W] in [0, 1] goes in and comes out, rounded to 1/255."""

    def __init__(self, size: int, image_shape: Sequence[int], device: torch.device) -> None:
        super().__init__(size, image_shape, torch.uint8, device)

    def append(self, rows: Tensor) -> None:
        """Store images; float ones are clamped to [0, 1] and rounded, bytes are taken as they are."""
        if rows.is_floating_point():
            rows = rows.detach().float().clamp(0, 1).mul(255).round()
        super().append(rows)

    def images(self, n: int, generator: torch.Generator) -> Tensor:
        """n images at random with replacement, float32 in [0, 1]."""
        return self.draw(n, generator).float().div_(255)
