"""Channel adapters, 1x1 linear maps between networks of different widths, and how a network absorbs them exactly.

An affine map of channels in front of a block can be multiplied into the layers that read the block's input. The trap
is zero padding: the adapter's bias comes before the padding, so at the border fewer weights see it than inside. A
scalar bias is then wrong; :class:`ConvWithBiasMap` carries one that depends on the position.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InputError
from ..training.modes import still

# Without weights, and equal for x and for any affine map of its channels, taken before or after.
_COMMUTES = (nn.Flatten, nn.AdaptiveAvgPool2d, nn.Identity, nn.Dropout, nn.Dropout2d)
AGREES = 1e-6  # relative, in float64


def adapter(inputs: int, outputs: int, ndim: int) -> nn.Conv2d | nn.Linear:
    """A new adapter for features [B, C, H, W] (ndim 4: a 1x1 convolution) or [B, C] (ndim 2: a linear layer)."""
    layer = nn.Conv2d(inputs, outputs, 1) if ndim == 4 else nn.Linear(inputs, outputs)
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer


def affine(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """Matrix A [c_out, c_in] and bias a [c_out] of an adapter: detached, float64, on the processor."""
    assert isinstance(layer, nn.Conv2d | nn.Linear) and layer.bias is not None
    return layer.weight.detach().flatten(1).cpu().double(), layer.bias.detach().cpu().double()


def set_affine(layer: Any, matrix: Tensor, bias: Tensor) -> None:
    """Give a convolution or linear layer these weights, of any shape with as many numbers, and this bias."""
    with torch.no_grad():
        layer.weight.copy_(matrix.reshape(layer.weight.shape))
        layer.bias.copy_(bias)


def compose(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """One affine map for two: A = A_2 A_1, a = A_2 a_1 + a_2."""
    (a1, b1), (a2, b2) = first, second
    return a2 @ a1, a2 @ b1 + b2


class ConvWithBiasMap(nn.Module):
    """conv(x) + border * 1, the latter convolved with the layer's own zero padding: a bias for each position.

    For 3x3 kernels the map has nine values per channel: corners, edges and the interior.

    Attributes:
        border: [c_out, 1, k, k], sum_m W_omij a_m.
    """

    border: Tensor

    def __init__(self, conv: nn.Conv2d, border: Tensor) -> None:
        super().__init__()
        self.conv = conv
        self.register_buffer("border", border)

    def bias_map(self, height: int, width: int) -> Tensor:
        """What the border adds for inputs of this size: [1, c_out, H', W']."""
        conv, ones = self.conv, self.border.new_ones(1, 1, height, width)
        return F.conv2d(ones, self.border, None, conv.stride, conv.padding, conv.dilation)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + self.bias_map(*x.shape[2:])


def fold(layer: nn.Module, matrix: Tensor, bias: Tensor) -> nn.Module:
    """The layer that gives layer(A x + a) for x: exact, borders included.

    W'_ocij = sum_m W_omij A_mc. A linear layer behind a flattening has its columns in groups, one per channel.

    Args:
        layer: Conv2d without groups and with zero padding, or Linear.
        matrix, bias: A [c_m, c], a [c_m].

    Raises:
        InputError: a convolution with groups or with another padding.
    """
    if isinstance(layer, nn.Conv2d):
        if layer.groups != 1 or layer.padding_mode != "zeros":
            raise InputError(f"{layer} cannot absorb an adapter; it must have groups=1 and padding_mode='zeros'")
        border = torch.einsum("omij,m->oij", layer.weight.detach(), bias)[:, None]
        return ConvWithBiasMap(_narrowed(layer, matrix), border)
    assert isinstance(layer, nn.Linear)
    weight = layer.weight.detach().unflatten(1, (len(bias), -1))
    folded = nn.Linear(matrix.shape[1] * weight.shape[2], layer.out_features).to(weight)
    with torch.no_grad():
        folded.weight.copy_(torch.einsum("oms,mc->ocs", weight, matrix).flatten(1))
        folded.bias.copy_(torch.einsum("oms,m->o", weight, bias) + (0 if layer.bias is None else layer.bias))
    return folded


def fold_naively(conv: nn.Conv2d, matrix: Tensor, bias: Tensor) -> nn.Conv2d:
    """The fold with a scalar bias b + sum W a, right in the interior only. For comparison."""
    folded = _narrowed(conv, matrix)
    scalar = torch.einsum("omij,m->o", conv.weight.detach(), bias)
    folded.bias = nn.Parameter(scalar if conv.bias is None else scalar + conv.bias.detach())
    return folded


def _narrowed(conv: nn.Conv2d, matrix: Tensor) -> nn.Conv2d:
    """A copy of a convolution with A in front of it, without A's bias."""
    folded = copy.deepcopy(conv)
    folded.in_channels = matrix.shape[1]
    folded.weight = nn.Parameter(torch.einsum("omij,mc->ocij", conv.weight.detach(), matrix))
    return folded


def entry_layers(block: nn.Module, x: Tensor) -> list[str]:
    """Names of the convolutions and linear layers of a block that read its input x, as it is, pooled or flattened."""
    names: list[str] = []
    reached = [x]

    def visit(name: str, module: nn.Module, seen: Tensor, output: Tensor) -> None:
        if any(seen is known for known in reached):
            if isinstance(module, nn.Conv2d | nn.Linear):
                names.append(name)
            elif isinstance(module, _COMMUTES):
                reached.append(output)

    hooks = [
        module.register_forward_hook(lambda module, inputs, output, name=name: visit(name, module, inputs[0], output))
        for name, module in block.named_modules()
        if not list(module.children())
    ]
    try:
        with still(block):
            block(x)
    finally:
        for hook in hooks:
            hook.remove()
    return names


def absorb(block: nn.Module, matrix: Tensor, bias: Tensor, x: Tensor, *, name: str, naively: bool = False) -> nn.Module:
    """A copy of a block that takes x and gives what the block gives for A x + a; the result is checked on x.

    Args:
        x: features [B, c, H, W] or [B, c] in front of the adapter; float64, like the block.
        name: of the block, for the message.
        naively: fold convolutions with a scalar bias, unchecked.

    Raises:
        InputError: the block uses its input in a way that cannot absorb the adapter, such as an identity shortcut
            or a pooling of maxima.
    """
    adapted = torch.einsum("mc,bc...->bm...", matrix, x) + bias.view(1, -1, *[1] * (x.ndim - 2))
    merged = nn.Sequential(copy.deepcopy(block))
    for entry in entry_layers(merged, adapted):
        parent, _, child = entry.rpartition(".")
        layer = merged.get_submodule(entry)
        plain = naively and isinstance(layer, nn.Conv2d)
        try:
            folded = fold_naively(layer, matrix, bias) if plain else fold(layer, matrix, bias)  # type: ignore[arg-type]
        except InputError as e:
            raise InputError(f"block {name!r}: {e}") from None
        setattr(merged.get_submodule(parent), child, folded)
    if naively:
        return merged[0]
    try:
        with still(block), still(merged):
            expected, ours = block(adapted), merged(x)
    except RuntimeError:
        agrees = False
    else:
        agrees = bool((expected - ours).abs().max() <= AGREES * expected.abs().max().clamp_min(1e-30))
    if not agrees:
        raise InputError(
            f"block {name!r} cannot absorb an adapter: its input must go to convolutions or linear layers alone "
            "(average pooling and flattening may come first); cut the network where that is so, or give student and "
            "teacher the same number of channels there"
        )
    return merged[0]
