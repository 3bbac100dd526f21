"""Decoding one stage at a time: a linear stage in closed form, and a chain of stages from the top down.

Both are there to be compared with `impression.Decoding`, which matches all stages at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InputError
from ..training.players import adam
from ..training.schedules import cosine, set_lr
from .impression import EMBEDDING, Settings, Template, relative_errors


def paint(t: Tensor, filters: Tensor, image_size: int, *, stride: int = 1, padding: int = 1) -> Tensor:
    """W^T t: each filter painted where, and as strongly as, the impression t says.

    Args:
        t: [B, K, H', W'], responses of a linear stage.
        filters: W [K, C, k, k].

    Returns:
        [B, C, image_size, image_size].
    """
    reached = (t.shape[-1] - 1) * stride - 2 * padding + filters.shape[-1]
    return F.conv_transpose2d(t, filters, None, stride, padding, output_padding=image_size - reached)


def landweber(
    t: Tensor, filters: Tensor, image_size: int, steps: int, *, stride: int = 1, padding: int = 1
) -> list[Tensor]:
    """x <- x + W^T (t - W x) / ||W||^2 from x = 0: decoding one linear stage, in closed form W^+ t.

    The first step is W^T t up to its size; the error never rises, and what no filter sees stays 0.

    Args:
        t: [B, K, H', W'] responses to decode.
        filters: W [K, C, k, k].

    Returns:
        The iterates 0 to `steps`, each [B, C, image_size, image_size].
    """

    def respond(x: Tensor) -> Tensor:
        return F.conv2d(x, filters, None, stride, padding)

    shape = filters.shape[1], image_size, image_size
    units = torch.eye(shape[0] * image_size**2, dtype=t.dtype, device=t.device).view(-1, *shape)
    size = 1 / torch.linalg.matrix_norm(respond(units).flatten(1), 2) ** 2
    iterates = [t.new_zeros(len(t), *shape)]
    for _ in range(steps):
        x = iterates[-1]
        iterates.append(x + size * paint(t - respond(x), filters, image_size, stride=stride, padding=padding))
    return iterates


def cut(template: Template, x: Tensor) -> list[nn.Module]:
    """The stages f_1, ..., f_M as modules, for a network that passes its layers in the order of registration.

    Args:
        x: images [B, C, H, W] to check the cut on. "embedding" does not count as a stage here.

    Raises:
        InputError: applied one after the other, the pieces give other feature maps than the network.
    """
    names = [name for name in template.stages if name != EMBEDDING]
    pieces: list[nn.Module] = []
    layers: list[nn.Module] = []
    for name, module in template.network.named_modules():
        if next(module.children(), None) is None:
            layers.append(module)
            if name in names:
                pieces.append(nn.Sequential(*layers))
                layers = []
    z, found = template.runtime.images(x), template.feature_maps(x, names)
    with torch.no_grad():
        for name, piece in zip(names, pieces, strict=False):
            try:
                z = piece(z)
            except RuntimeError:
                break
            if z.shape != found[name].shape or not torch.allclose(z, found[name], rtol=1e-3, atol=1e-4):
                break
        else:
            if len(pieces) == len(names):
                return pieces
    raise InputError("the network is no chain of its layers, so it cannot be inverted stage by stage; use decode")


def invert_locally(stages: Sequence[nn.Module], z: Tensor, image_shape: Sequence[int], settings: Settings) -> Tensor:
    """The schedule "local": one stage at a time from the top, each from 0, for "full" impressions.

    z_{l-1} = argmin over z >= 0 (in [0, 1] for images) of || f_l(z) - z_l ||^2 / || z_l ||^2. Errors of the deep
    stages are frozen in, which makes it weaker than matching all at once.

    Args:
        stages: f_1, ..., f_M from :func:`cut`, frozen.
        z: [B, C_M, H_M, W_M], what the last stage gave.

    Returns:
        Images [B, C, H, W] in [0, 1].
    """
    shapes = [tuple(image_shape)]
    with torch.no_grad():
        for stage in stages[:-1]:
            shapes.append(tuple(stage(z.new_zeros(1, *shapes[-1])).shape[1:]))
    for depth in reversed(range(len(stages))):
        # Not exactly 0, where a ReLU behind a zero bias has no gradient.
        below = nn.ParameterList([z.new_full((len(z), *shapes[depth]), 1e-2)])
        optimizer = adam(below, settings.lr)
        for step in range(settings.steps):
            set_lr(optimizer, settings.lr_end + (settings.lr - settings.lr_end) * cosine(step, settings.steps))
            error = relative_errors({"": stages[depth](below[0]).flatten(1)}, {"": z.flatten(1)}).sum()
            optimizer.zero_grad()
            error.backward()
            optimizer.step()
            with torch.no_grad():
                below[0].clamp_(0, None if depth else 1)
        z = below[0].detach()
    return z
