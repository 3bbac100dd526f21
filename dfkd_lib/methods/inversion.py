"""What inversion methods share: batch-norm statistics as a target, with or without momentum, and the best iterate."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import losses
from ..errors import unknown
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


def batch_norm_loss(seen: Sequence[Seen], scale: str = "absolute") -> Tensor:
    """L_bn of one pass of the teacher.

    Args:
        scale: "absolute", the sum over layers of r_l, the form of the papers, whose size goes with the width, the
            depth and the activations of the network; or "relative", the mean over layers of
            :func:`dfkd_lib.losses.relative_batch_norm_distance`, ours, whose weight carries over between networks.
    """
    return _over_layers(((visit.layer, *visit.statistics()) for visit in seen), scale)


def _over_layers(found: Iterable[tuple[nn.Module, Tensor, Tensor]], scale: str) -> Tensor:
    """L_bn of layers and the mean and variance found in each."""
    distance = losses.BATCH_NORM_DISTANCES[scale]
    terms = torch.stack(
        [distance(mean, variance, layer.running_mean, layer.running_var) for layer, mean, variance in found]  # type: ignore[arg-type]
    )
    return terms.mean() if scale == "relative" else terms.sum()


def check_bn_scale(scale: str) -> None:
    """Refuse a scale that :func:`batch_norm_loss` does not know.

    Raises:
        InputError: naming the known ones.
    """
    if scale not in losses.BATCH_NORM_DISTANCES:
        raise unknown("bn_scale", scale, losses.BATCH_NORM_DISTANCES)


class MomentumStatistics:
    """FastDFKD's batch-norm loss: not each batch but the running mixture of batches has to match the teacher.

    r_l = ||var_run - (1 - rho) var - rho v|| + ||mean_run - (1 - rho) mean - rho m||, where m, v are averages of
    the statistics of earlier calls; plain r_l until the first :meth:`update`. The gradient is that of r_l times
    (1 - rho). NAYER uses the same loss.

    Args:
        rho: momentum in [0, 1); 0 is the plain loss.
        scale: see :func:`batch_norm_loss`.
    """

    def __init__(self, rho: float, scale: str = "absolute") -> None:
        self.rho, self.scale = rho, scale
        self.averages: list[tuple[Tensor, Tensor]] = []

    def loss(self, seen: Sequence[Seen]) -> Tensor:
        """L_bn of the mixture for one pass of the teacher."""
        if not self.averages:
            return batch_norm_loss(seen, self.scale)
        mixtures = []
        for visit, averages in zip(seen, self.averages, strict=True):
            mean, variance = (
                (1 - self.rho) * now + self.rho * before
                for now, before in zip(visit.statistics(), averages, strict=True)
            )
            mixtures.append((visit.layer, mean, variance))
        return _over_layers(mixtures, self.scale)

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
