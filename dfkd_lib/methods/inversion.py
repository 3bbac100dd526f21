"""What inversion methods share: batch-norm statistics as a target, with or without momentum, and the best iterate."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import losses
from ..errors import unknown
from ..runtime import Runtime
from ..taps import Seen


class Best:
    """The tensors of the inner step with the lowest loss, kept on the device without waiting for it.

    Attributes:
        loss: the lowest since the start, a scalar; infinite before the first.
        tensors: those of that step. All of these stay the same tensors, written in place.
    """

    def __init__(self, runtime: Runtime) -> None:
        self.loss = torch.full((), math.inf, device=runtime.device, dtype=runtime.dtype)
        self.tensors: tuple[Tensor, ...] = ()

    def start(self) -> None:
        """Forget what was best: a new call begins."""
        self.loss.fill_(math.inf)

    @torch.no_grad()
    def offer(self, loss: Tensor, *tensors: Tensor) -> None:
        """Keep `tensors`, evaluated before this step's update, if `loss` is lower than all before."""
        better = loss < self.loss
        if not self.tensors:
            self.tensors = tuple(t.detach().clone() for t in tensors)
        for best, new in zip((self.loss, *self.tensors), (loss, *tensors), strict=True):
            best.copy_(torch.where(better, new, best))


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
        device: of the teacher.
        scale: see :func:`batch_norm_loss`.
    """

    def __init__(self, rho: float, device: torch.device, scale: str = "absolute") -> None:
        self.rho, self.device, self.scale = rho, device, scale
        self.averages: list[tuple[Tensor, Tensor]] = []
        self._newest: list[tuple[Tensor, Tensor]] = []

    @property
    def remembering(self) -> bool:
        """Whether there are averages of earlier calls."""
        return bool(self.averages)

    def loss(self, seen: Sequence[Seen]) -> Tensor:
        """L_bn of the mixture for one pass of the teacher, whose statistics :meth:`update` then takes."""
        new = [visit.statistics() for visit in seen]
        with torch.no_grad():
            if not self._newest:
                self._newest = [(torch.empty_like(mean), torch.empty_like(variance)) for mean, variance in new]
            torch._foreach_copy_(_flat(self._newest), _flat(new))
        if self.averages:
            new = [
                ((1 - self.rho) * mean + self.rho * m, (1 - self.rho) * variance + self.rho * v)
                for (mean, variance), (m, v) in zip(new, self.averages, strict=True)
            ]
        return _over_layers(((visit.layer, *mixed) for visit, mixed in zip(seen, new, strict=True)), self.scale)

    @torch.no_grad()
    def update(self) -> None:
        """m <- rho m + (1 - rho) mean, and v likewise, from the last pass of a call; at first m = mean."""
        if not self.averages:
            self.averages = [(mean.clone(), variance.clone()) for mean, variance in self._newest]
            return
        averages = _flat(self.averages)
        torch._foreach_mul_(averages, self.rho)
        torch._foreach_add_(averages, _flat(self._newest), alpha=1 - self.rho)

    def state_dict(self) -> dict[str, Any]:
        """The averages by number of the visit; empty before the first update."""
        return {str(i): {"mean": m, "variance": v} for i, (m, v) in enumerate(self.averages)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` took."""
        saved = [state[str(i)] for i in range(len(state))]
        self.averages = [(one["mean"].to(self.device), one["variance"].to(self.device)) for one in saved]


def _flat(pairs: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
    return [tensor for pair in pairs for tensor in pair]
