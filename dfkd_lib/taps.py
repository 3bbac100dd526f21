"""What a network's batch-norm layers see, and its penultimate features: forward hooks, active only inside `with`.

Nothing in a model changes. A layer that a network uses twice in one pass is seen twice, each time beside its own
running statistics.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .errors import InputError


@dataclass(frozen=True)
class Seen:
    """One visit of a batch to a batch-norm layer.

    Attributes:
        layer: the layer; its running statistics are the target.
        x: its input [B, C, ...], with its graph.
    """

    layer: nn.Module
    x: Tensor

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and biased variance of the input over batch and pixels, [C] each, in float32 or better."""
        return _Moments.apply(self.x)

    def instance_means(self) -> Tensor:
        """Mean of the input over pixels, one row per image: [B, C], in float32 or better."""
        x, full = self.x, _full(self.x)
        if x.ndim == 2:
            return x.to(full)
        # A sum and not a mean, and on a processor in the input's own type, which spares copies there and back. It
        # adds up in float32 all the same; the sum of float16, which only GPUs have, could overflow.
        total = x.flatten(2).sum(2, dtype=x.dtype if x.device.type == "cpu" else full)
        return total.to(full) / x[0, 0].numel()


_NOTHING = 1e-30  # an epsilon must be above 0; this one changes no digit of a float64


class _Moments(torch.autograd.Function):
    """x -> mean and biased variance over all axes but the second; once differentiable.

    One or two passes over x as it is. Autograd's own way, through a float32 copy, takes some fifty times as long for
    16-bit channels-last activations on a processor, more than all convolutions, and keeps the copy.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        full = _full(x)
        if x.device.type == "cpu" and (x.dtype != full or x.is_contiguous()):
            ignored = torch.zeros(2, x.shape[1], dtype=full, device=x.device)
            mean, variance = torch.batch_norm_update_stats(x, ignored[0], ignored[1], 0.0)
        elif x.device.type == "cuda" and full == torch.float32 and x.ndim > 2:
            mean, inverse_std = torch.batch_norm_stats(x, _NOTHING)  # one kernel over x as it is
            variance = inverse_std.pow(-2) - _NOTHING
        else:
            variance, mean = torch.var_mean(x.to(full), [d for d in range(x.ndim) if d != 1], correction=0)
        ctx.save_for_backward(x, mean)
        return mean, variance

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_mean: Tensor, of_variance: Tensor) -> Tensor:
        x, mean = ctx.saved_tensors
        n = x.numel() // x.shape[1]
        # (x - mean) * 2 of_variance / n + of_mean / n, which is what batch normalisation computes in one pass.
        return F.batch_norm(x, mean, torch.ones_like(mean), 2 / n * of_variance, of_mean / n, eps=_NOTHING)


def _full(x: Tensor) -> torch.dtype:
    return x.dtype if x.dtype == torch.float64 else torch.float32


def batch_norm_layers(network: nn.Module) -> list[nn.Module]:
    """The batch-norm layers that keep running statistics, in the order of registration.

    Of any class, so that synchronised, frozen and fused ones count: what has vectors `running_mean` and `running_var`
    of one length is a batch norm, unless it normalises each image by itself.

    Raises:
        InputError: there is none that hooks can see, as in a vision transformer or in TorchScript.
    """
    layers = [m for m in network.modules() if _keeps_statistics(m)]
    if not layers:
        hidden = " that can be seen from outside TorchScript" if isinstance(network, torch.jit.ScriptModule) else ""
        raise InputError(
            f"the teacher has no batch-norm layer with running statistics{hidden}, which this method matches; "
            "use dfad, dafl or zskt, which need none"
        )
    return layers


def _keeps_statistics(layer: nn.Module) -> bool:
    if isinstance(layer, torch.jit.ScriptModule | nn.modules.instancenorm._InstanceNorm):
        return False
    mean, variance = getattr(layer, "running_mean", None), getattr(layer, "running_var", None)
    return isinstance(mean, Tensor) and isinstance(variance, Tensor) and mean.ndim == 1 and mean.shape == variance.shape


@contextmanager
def tapped(layers: Sequence[nn.Module]) -> Iterator[list[Seen]]:
    """While the context is open, every visit to one of the layers is appended to the list that it yields."""
    seen: list[Seen] = []
    hooks = [
        layer.register_forward_pre_hook(lambda module, inputs: seen.append(Seen(module, inputs[0]))) for layer in layers
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def last_linear(network: nn.Module) -> nn.Linear:
    """The linear layer that was registered last: of a classifier, the one that gives the logits.

    Raises:
        InputError: the network has no linear layer.
    """
    layers = [m for m in network.modules() if isinstance(m, nn.Linear)]
    if not layers:
        raise InputError("the network has no linear layer, so it has no penultimate features")
    return layers[-1]


def logits_and_features(network: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """One pass: logits [B, C] and penultimate features [B, D], the input of the last linear layer.

    Raises:
        InputError: the network has no linear layer.
    """
    with tapped([last_linear(network)]) as seen:
        logits = network(x)
    return logits, seen[-1].x
