"""What a network's batch-norm layers see, and its penultimate features: forward hooks, active only inside `with`.

Nothing in a model changes. A layer that a network uses twice in one pass is seen twice, each time beside its own
running statistics.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .errors import InputError

BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d


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
        x = self.x if self.x.dtype == torch.float64 else self.x.float()
        dims = [d for d in range(x.ndim) if d != 1]
        variance, mean = torch.var_mean(x, dims, correction=0)
        return mean, variance

    def instance_means(self) -> Tensor:
        """Mean of the input over pixels, one row per image: [B, C]."""
        return self.x.flatten(2).mean(2).float() if self.x.ndim > 2 else self.x.float()


def batch_norm_layers(network: nn.Module) -> list[nn.Module]:
    """The batch-norm layers that keep running statistics, in the order of registration.

    Raises:
        InputError: there is none, as in a vision transformer.
    """
    layers: list[nn.Module] = [m for m in network.modules() if isinstance(m, BatchNorm) and m.running_mean is not None]
    if not layers:
        raise InputError(
            "the teacher has no batch-norm layer with running statistics, which this method matches; "
            "use dfad, dafl or zskt, which need none"
        )
    return layers


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
