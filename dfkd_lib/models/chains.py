"""Networks taken apart: those whose modules, applied in order, are their forward pass.

Into *blocks*, a dict from name to module in the order in which they are applied, whose first is the stem; or into
*layers*, each a convolution or linear layer with what follows it. Either is held against the whole network.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..errors import InputError, unknown
from ..training.modes import computes_the_same

Blocks = dict[str, nn.Module]
STEM = "stem"


def cut(network: nn.Module, at: Sequence[str], x: Tensor) -> Blocks:
    """The blocks of a network whose children, applied in order, are its forward pass.

    Args:
        network: nn.Sequential, or any class whose named children in order give its output.
        at: names of the modules at which a block starts, such as ["features.4", "classifier"]; what comes before
            the first is the stem.
        x: images [B, C, H, W] on which the blocks are checked against the network.

    Raises:
        InputError: no such module, or the forward pass does more than apply the children.
    """
    pieces = list(_pieces("", network, at))
    names = [name for name, _ in pieces]
    for name in at:
        if name not in names:
            raise unknown("place to cut", name, names)
    if [*at] != sorted(set(at), key=names.index):
        raise InputError(f"cuts must be in the order of the network, each once, not {[*at]}")
    blocks: Blocks = {STEM: nn.Sequential()}
    for name, module in pieces:
        if name in at:
            blocks[name] = nn.Sequential()
        [*blocks.values()][-1].append(module)  # type: ignore[operator]
    for block in blocks.values():
        block.training = network.training
    if not computes_the_same(network, partial(through, [*blocks.values()]), x):
        raise InputError(
            f"{type(network).__name__} does more in forward than apply its children in order, so it cannot be cut at "
            f"{', '.join(at)}; give the blocks yourself, a dict from name to module whose first key is {STEM!r}"
        )
    return blocks


def _pieces(name: str, module: nn.Module, at: Sequence[str]) -> Iterator[tuple[str, nn.Module]]:
    """The module, or its children where one of the cuts lies inside it."""
    inside = name == "" or any(place.startswith(name + ".") for place in at)
    if not inside or not list(module.children()):
        yield name, module
        return
    for child, inner in module.named_children():
        yield from _pieces(f"{name}.{child}".lstrip("."), inner, at)


def through(blocks: Sequence[nn.Module], x: Tensor) -> Tensor:
    """x sent through blocks, one after another. A block may work in place: clone what is to be kept."""
    for block in blocks:
        x = block(x)
    return x


class Layer(nn.Module):
    """A convolution or linear layer, with the batch normalisation that may follow it, and what comes after.

    Attributes:
        name: of the convolution or linear layer.
        linear: the affine part; its output is the feature F^l.
        rho: the operations without parameters up to the next layer: activation, pooling, flattening.
    """

    linear: Any
    rho: Any

    def __init__(self, name: str, linear: nn.Sequential, rho: nn.Sequential) -> None:
        super().__init__()
        self.name, self.linear, self.rho = name, linear, rho


class Chain(nn.Module):
    """A network as a chain of layers; `before` is what precedes the first, such as normalisation."""

    layers: Any

    def __init__(self, before: nn.Sequential, layers: Iterable[Layer]) -> None:
        super().__init__()
        self.before, self.layers = before, nn.ModuleList(layers)

    def features(self, x: Tensor) -> list[Tensor]:
        """F^1..F^L, the last of them the logits."""
        x, found = self.before(x), []
        for layer in self.layers:
            x = layer.linear(x)
            found.append(x)
            x = layer.rho(x.clone())
        return found

    def forward(self, x: Tensor) -> Tensor:
        return self.features(x)[-1]


def chain(network: nn.Module, x: Tensor) -> Chain:
    """A network whose modules, applied in order, are its forward pass, as a chain of layers; weights are shared.

    Args:
        x: images [B, C, H, W] on which the chain is held against the network.

    Raises:
        InputError: the forward pass does more, as in a residual network.
    """
    before, layers = nn.Sequential(), list[Layer]()
    for name, module in network.named_modules():
        if list(module.children()):
            continue
        if isinstance(module, nn.Conv2d | nn.Linear):
            layers.append(Layer(name, nn.Sequential(module), nn.Sequential()))
        elif not layers:
            before.append(module)
        elif any(True for _ in module.parameters()) and not len(layers[-1].rho):
            layers[-1].linear.append(module)
        else:
            layers[-1].rho.append(module)
    made = Chain(before, layers).train(network.training)
    if not computes_the_same(network, made, x):
        raise InputError(
            f"{type(network).__name__} does more in forward than apply its layers in order, so it cannot learn layer "
            "by layer; use Joint for networks with branches"
        )
    return made


def without_norms(network: Chain) -> Chain:
    """A new chain of the same shape whose layers have a bias and no batch normalisation."""
    layers = []
    for layer in network.layers:
        new = copy.deepcopy(layer.linear[0])
        if new.bias is None:
            new.bias = nn.Parameter(new.weight.new_zeros(len(new.weight)))
        new.reset_parameters()
        layers.append(Layer(layer.name, nn.Sequential(new), copy.deepcopy(layer.rho)))
    return Chain(copy.deepcopy(network.before), layers)
