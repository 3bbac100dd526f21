"""What inversion methods share: batch-norm statistics as a target, with or without momentum, and the best iterate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import losses
from ..taps import Seen


class Best:
    """The tensors of the inner step with the lowest loss, kept on the device without waiting for it."""

    def __init__(self) -> None:
        self.loss: Tensor | None = None
        self.tensors: tuple[Tensor, ...] = ()

    def offer(self, loss: Tensor, *tensors: Tensor) -> None:
        """Keep `tensors`, evaluated before this step's update, if `loss` is lower than all before."""
        loss, tensors = loss.detach(), tuple(t.detach() for t in tensors)
        if self.loss is None:
            self.loss, self.tensors = loss, tuple(t.clone() for t in tensors)
            return
        better = loss < self.loss
        self.loss = torch.where(better, loss, self.loss)
        self.tensors = tuple(torch.where(better, new, old) for new, old in zip(tensors, self.tensors, strict=True))


def batch_norm_loss(seen: Sequence[Seen]) -> Tensor:
    """L_bn = sum over layers of r_l, see :func:`dfkd_lib.losses.batch_norm_distance`."""
    terms = [
        losses.batch_norm_distance(*visit.statistics(), visit.layer.running_mean, visit.layer.running_var)  # type: ignore[arg-type]
        for visit in seen
    ]
    return torch.stack(terms).sum()


class MomentumStatistics:
    """FastDFKD's batch-norm loss: not each batch but the running mixture of batches has to match the teacher.

    r_l = ||var_run - (1 - rho) var - rho v|| + ||mean_run - (1 - rho) mean - rho m||, where m, v are averages of
    the statistics of earlier calls; plain r_l until the first :meth:`update`. The gradient is that of r_l times
    (1 - rho). NAYER uses the same loss.

    Args:
        rho: momentum in [0, 1); 0 is the plain loss.
    """

    def __init__(self, rho: float) -> None:
        self.rho = rho
        self.averages: list[tuple[Tensor, Tensor]] = []

    def loss(self, seen: Sequence[Seen]) -> Tensor:
        """Sum over layers of r_l for one pass of the teacher."""
        if not self.averages:
            return batch_norm_loss(seen)
        terms = []
        for visit, averages in zip(seen, self.averages, strict=True):
            mean, variance = (
                (1 - self.rho) * now + self.rho * before
                for now, before in zip(visit.statistics(), averages, strict=True)
            )
            remembered = visit.layer.running_mean, visit.layer.running_var
            terms.append(losses.batch_norm_distance(mean, variance, *remembered))  # type: ignore[arg-type]
        return torch.stack(terms).sum()

    @torch.no_grad()
    def update(self, seen: Sequence[Seen]) -> None:
        """m <- rho m + (1 - rho) mean, and v likewise, from the last pass of a call; at first m = mean."""
        new = [visit.statistics() for visit in seen]
        if self.averages:
            new = [
                (self.rho * m + (1 - self.rho) * mean, self.rho * v + (1 - self.rho) * variance)
                for (m, v), (mean, variance) in zip(self.averages, new, strict=True)
            ]
        self.averages = [(mean.detach(), variance.detach()) for mean, variance in new]

    def state_dict(self) -> dict[str, Any]:
        """The averages by number of the visit; empty before the first update."""
        return {str(i): {"mean": m, "variance": v} for i, (m, v) in enumerate(self.averages)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` took."""
        self.averages = [(state[str(i)]["mean"], state[str(i)]["variance"]) for i in range(len(state))]
