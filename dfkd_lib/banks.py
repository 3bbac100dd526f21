"""Banks: bounded first-in first-out stores on the device; appending writes the new rows and copies nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .errors import InputError


class Bank:
    """A ring of at most `size` rows of one shape; the memory grows with what is stored, by doubling.

    Attributes:
        rows: the memory, [reserved, ...].
        appended: rows appended since the beginning, overwritten ones included.
        stored: len(self) as a scalar on the device, for drawing without asking the processor.
    """

    def __init__(self, size: int, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
        if size < 1:
            raise InputError(f"a bank must have room for at least 1 row, not {size}")
        self.size = size
        self.rows = torch.zeros(0, *shape, dtype=dtype, device=device)
        self.appended = 0
        self.stored = torch.zeros((), dtype=torch.int64, device=device)

    def __len__(self) -> int:
        """Rows stored: min(appended, size)."""
        return min(self.appended, self.size)

    def append(self, rows: Tensor) -> None:
        """Store rows [N, ...]; the oldest make room. Of more than `size` rows the last `size` remain."""
        size = self.size
        self._reserve(min(self.appended + len(rows), size))
        first = self.appended + max(0, len(rows) - size)
        kept = rows[-size:].detach().to(self.rows)
        start = first % size
        head = min(len(kept), size - start)
        self.rows[start : start + head] = kept[:head]
        self.rows[: len(kept) - head] = kept[head:]
        self.appended += len(rows)
        self.stored.fill_(len(self))

    def _reserve(self, n: int) -> None:
        """Make room for n rows, as much as follows from n alone, so that a restored bank draws as this one does.

        As long as there is room to grow, no row was overwritten and they lie in order.
        """
        if n > len(self.rows):
            room = min(self.size, 1 << (n - 1).bit_length()) - len(self.rows)
            self.rows = torch.cat([self.rows, self.rows.new_zeros(room, *self.rows.shape[1:])])

    def newest(self, n: int) -> Tensor:
        """The last min(n, stored) rows, oldest of them first."""
        n = min(n, len(self))
        at = torch.arange(self.appended - n, self.appended, device=self.rows.device) % self.size
        return self.rows[at]

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """min(n, stored) different rows, at random.

        Args:
            generator: on the device of the bank.
        """
        keys = torch.rand(len(self.rows), generator=generator, device=self.rows.device)
        empty = torch.arange(len(keys), device=keys.device) >= self.stored
        return self.rows[keys.masked_fill(empty, 2.0).topk(min(n, len(self)), largest=False).indices]

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """n rows at random, with replacement; for training batches, where the order of an epoch does not matter.

        Raises:
            InputError: the bank is empty.
        """
        if not len(self):
            raise InputError("the bank is empty; synthesise images before drawing from it")
        # From the count on the device and not randint of len(self), which a recorded update would draw for ever.
        at = torch.rand(n, generator=generator, device=self.rows.device) * self.stored
        return self.rows[torch.minimum(at.long(), self.stored - 1)]

    def state_dict(self) -> dict[str, Any]:
        """The stored rows and the count, oldest row first."""
        return {"rows": self.newest(len(self)), "appended": self.appended}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` took."""
        self.rows = self.rows[:0]  # and reserve what the other bank had: samples depend on it
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
