"""Learning-rate factors as functions of the step alone, so that a resumed run needs no schedule state."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor
from torch.optim import Optimizer


def set_lr(optimizer: Optimizer, lr: float) -> None:
    """Give all parameter groups one learning rate."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):  # read by a recorded update, so it stays the same tensor
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def drops(step: int, milestones: Sequence[int], factor: float = 0.1) -> float:
    """factor to the power of the number of milestones that `step` (counted from 0) has reached."""
    return factor ** sum(step >= milestone for milestone in milestones)


def cosine(step: int, n_steps: int) -> float:
    """From 1 at step 0 to 0 after the last step along half a cosine."""
    return 0.5 * (1 + math.cos(math.pi * step / n_steps))


def one_cycle(step: int, n_steps: int, warmup: float = 0.25) -> float:
    """A linear rise from near 0 to 1 over the first `warmup` share of the steps, then a linear fall to 0."""
    peak = max(1, round(warmup * n_steps))
    return (step + 1) / peak if step < peak else (n_steps - step) / max(1, n_steps - peak)
