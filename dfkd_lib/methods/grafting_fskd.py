"""Few Sample Knowledge Distillation (FSKD, arXiv 1812.01839), the rival of NetGraft that learns without descent.

The student is cut out of the teacher: each layer keeps the filters of largest L1 norm. Then, block by block, a 1x1
convolution behind the block's last layer brings its output back to what the teacher has there, by least squares on
the few images, and is multiplied into that layer. The teacher's features come from the teacher, the student's from
the student as it stands, so a block also mends what the blocks before it left.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..models.adapters import set_affine
from ..models.chains import Blocks, Chain, Layer, chain
from ..runtime import Runtime
from .comprehensive import merge
from .feature_amalgamation import Moments
from .grafting import Views
from .grafting_blocks import Scion


def aligned(x: Tensor, y: Tensor, *, ridge: float = 1e-4) -> tuple[Tensor, Tensor]:
    """Q and q of the 1x1 map that brings x nearest to y: min sum |Q x + q - y|^2 + lambda |Q - I|^2.

    Where the images do not say, Q stays the identity, which leaves the layer as it was cut.

    Args:
        x, y: what the student's and the teacher's layer give, [B, C, H, W] or [B, C], the same shape.
        ridge: lambda, as a share of the mean variance of a channel of x times the number of pixels.

    Returns:
        Q [C, C] and q [C], float64, on the processor.
    """
    both = Moments()
    for parts in zip(x.split(256), y.split(256), strict=True):
        both.add(torch.cat(parts, 1))
    mean, covariance = both.result()
    n = x.shape[1]
    held = ridge * covariance[:n, :n].trace() / n * torch.eye(n, dtype=torch.float64)
    q = torch.linalg.lstsq(covariance[:n, :n] + held, covariance[:n, n:] + held, driver="gelsd").solution.T
    return q, mean[n:] - q @ mean[:n]


def fskd(teacher: Blocks, scions: Sequence[Scion], views: Views, runtime: Runtime, *, ridge: float = 1e-4) -> Chain:
    """The student behind the stem: cut out of the teacher, then aligned block after block.

    Args:
        teacher: its blocks, the stem first.
        scions: the student's blocks; they give the shapes and stay as they are.
        views: of the few images.
        ridge: see :func:`aligned`.

    Returns:
        A chain of the shape of the student, without adapters, in eval mode.

    Raises:
        InputError: networks that are no chains of layers, or whose layers do not correspond; the message says which.
    """
    x = views.inputs[:2].to(runtime.dtype)  # a stem in 16 bits gives 16 bits
    theirs = chain(nn.Sequential(*copy.deepcopy([*teacher.values()][1:])).eval(), x)
    ours = chain(nn.Sequential(*copy.deepcopy([scion.body for scion in scions])).eval(), x)
    kept = cut_out(theirs, ours, x.shape[1])
    block_of = [layer.name.split(".")[0] for layer in ours.layers]
    for i, layer in enumerate(ours.layers):
        if block_of[i] in block_of[i + 1 :]:
            continue
        given, wanted = (_features(part, i, views, runtime) for part in (ours, theirs))
        q, offset = aligned(given, wanted[:, kept[i].to(wanted.device)], ridge=ridge)
        fam = nn.Linear(*q.shape).double()
        set_affine(fam, q, offset)
        layer.linear[0] = merge(layer.linear[0], fam)
    return ours


def cut_out(theirs: Chain, ours: Chain, wide: int) -> list[Tensor]:
    """Give each layer of `ours` the filters of largest L1 norm of its layer in `theirs`, on the channels that are left.

    Args:
        wide: channels of the input, which both networks have.

    Returns:
        Of each layer, which filters it keeps: int64, in order.

    Raises:
        InputError: layers that do not correspond.
    """
    if len(theirs.layers) != len(ours.layers):
        raise InputError(
            f"FSKD cuts the student out of the teacher, layer by layer; behind the stem the teacher has "
            f"{len(theirs.layers)} layers and the student {len(ours.layers)}"
        )
    kept, chosen = torch.arange(wide), list[Tensor]()
    for source, layer in zip(theirs.layers, ours.layers, strict=True):
        weight, bias = _without_norm(source)
        target = layer.linear[0]
        narrow = weight.unflatten(1, (wide, -1))[:, kept].flatten(1, 2)  # a linear layer has several columns a channel
        n, wide = len(target.weight), len(weight)
        if len(layer.linear) > 1 or target.bias is None or n > wide or narrow.shape[1:] != target.weight.shape[1:]:
            raise InputError(
                f"layer {layer.name!r} cannot be cut out of the teacher's; FSKD needs a student without batch "
                "normalisation, with biases, whose layers are the teacher's with fewer filters"
            )
        kept = weight.flatten(1).abs().sum(1).topk(n).indices.sort().values
        set_affine(target, narrow[kept], bias[kept])
        chosen.append(kept)
    return chosen


def _without_norm(layer: Layer) -> tuple[Tensor, Tensor]:
    """Weight and bias of a layer, batch normalisation in eval mode multiplied in; float64, on the processor."""
    linear, *norms = layer.linear
    weight = linear.weight.detach().cpu().double()
    bias = weight.new_zeros(len(weight)) if linear.bias is None else linear.bias.detach().cpu().double()
    for norm in norms:
        scale = norm.weight.detach().cpu().double() / (norm.running_var.cpu().double() + norm.eps).sqrt()
        weight = weight * scale.view(-1, *[1] * (weight.ndim - 1))
        bias = (bias - norm.running_mean.cpu().double()) * scale + norm.bias.detach().cpu().double()
    return weight, bias


def _features(part: Chain, i: int, views: Views, runtime: Runtime) -> Tensor:
    """What layer i gives on all views, before its activation."""
    with torch.no_grad(), runtime.autocast():
        return torch.cat([part.features(x.clone())[i] for x in views.inputs.split(256)])
