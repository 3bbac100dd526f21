"""Feature amalgamation, the first step of comprehensive classification (arXiv 1811.02796).

At each layer the features of all teachers are stacked along the channels and compressed by a linear auto-encoder to
the width of the student. Being linear, its optimum is a principal component analysis, in closed form.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data import ImageSet
from ..errors import InputError
from ..models.adapters import adapter, set_affine
from ..models.chains import Chain
from ..runtime import Runtime
from ..training.players import adam


@dataclass(frozen=True)
class Code:
    """A linear auto-encoder of channel vectors: F_a = W_e (F - mu), F~ = W_d F_a + mu.

    Attributes:
        encode: W_e [C_a, C]; decode: W_d [C, C_a]; mean: mu [C].
    """

    encode: Tensor
    decode: Tensor
    mean: Tensor

    def error(self, covariance: Tensor) -> float:
        """L_A in expectation, mean over the channels: tr((I - W_d W_e) Sigma (I - W_d W_e)^T) / C."""
        lost = torch.eye(len(covariance), dtype=covariance.dtype) - self.decode @ self.encode
        return float((lost @ covariance @ lost.T).trace()) / len(covariance)

    def modules(self, ndim: int) -> tuple[nn.Module, nn.Module]:
        """enc and dec as 1x1 convolutions (ndim 4) or linear layers (ndim 2) with bias."""
        shapes = ((self.encode, -self.encode @ self.mean), (self.decode, self.mean))
        made = [adapter(w.shape[1], w.shape[0], ndim) for w, _ in shapes]
        for layer, (weight, bias) in zip(made, shapes, strict=True):
            set_affine(layer, weight, bias)
        return made[0], made[1]


def pca(mean: Tensor, covariance: Tensor, width: int) -> Code:
    """Direct feature amalgamation in closed form: the top eigenvectors of the channel covariance.

    No linear auto-encoder of this width has a smaller error than what the other eigenvalues add up to.

    Args:
        mean, covariance: of the stacked channels, [C] and [C, C], float64.
        width: C_a, at most C.
    """
    _, vectors = torch.linalg.eigh(covariance)
    top = vectors[:, -width:].flip(1)
    return Code(top.T, top, mean)


def incremental(mean: Tensor, covariance: Tensor, sizes: Sequence[int], width: int) -> Code:
    """Incremental feature amalgamation in closed form: G_2 = enc([F_1; F_2]), G_n = enc([G_{n-1}; F_n]).

    A new teacher costs one more step and leaves the earlier ones as they are. For two teachers this is :func:`pca`;
    for more it is one of the encoders that direct amalgamation could have chosen, and so never better.

    Args:
        sizes: channels of each teacher; they add up to C.
    """
    eye = torch.eye(len(covariance), dtype=covariance.dtype)
    encode, decode, stop = eye[: sizes[0]], eye[:, : sizes[0]], sizes[0]
    for size in sizes[1:]:
        new = eye[stop : stop + size]
        seen = torch.cat([encode, new])
        step = pca(mean.new_zeros(len(seen)), seen @ covariance @ seen.T, min(width, len(seen)))
        encode, decode = step.encode @ seen, torch.cat([decode, new.T], 1) @ step.decode
        stop += size
    return Code(encode, decode, mean)


def learned_errors(features: Tensor, width: int, *, n_steps: int, lr: float, seed: int) -> list[float]:
    """L_A of an auto-encoder that learns by Adam, as the paper has it, after each step; :func:`pca` is its bound.

    Args:
        features: stacked, [B, C, H, W] or [B, C]: the whole training set of the auto-encoder.
        width: C_a.
    """
    torch.manual_seed(seed)
    channels = features.shape[1]
    enc, dec = (adapter(a, b, features.ndim).to(features) for a, b in ((channels, width), (width, channels)))
    optimizer, errors = adam(nn.Sequential(enc, dec), lr), []
    for _ in range(n_steps):
        loss = F.mse_loss(dec(enc(features)), features)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        errors.append(loss.detach())
    return torch.stack(errors).tolist()


class Moments:
    """Mean and covariance of channel vectors, gathered batch by batch in float64."""

    def __init__(self) -> None:
        self.n, self.total, self.products = 0, torch.zeros(()), torch.zeros(())

    def add(self, features: Tensor) -> None:
        """Count every pixel of features [B, C, H, W] or [B, C]."""
        rows = features.detach().flatten(2).transpose(1, 2).flatten(0, 1) if features.ndim == 4 else features.detach()
        rows = rows.double().cpu()
        self.n, self.total = self.n + len(rows), self.total + rows.sum(0)
        self.products = self.products + rows.T @ rows

    def result(self) -> tuple[Tensor, Tensor]:
        """mean [C] and covariance [C, C], biased."""
        mean = self.total / self.n
        return mean, self.products / self.n - torch.outer(mean, mean)


def stack(features: Sequence[list[Tensor]], names: Sequence[str]) -> list[Tensor]:
    """F^l = [F^l_1; ...; F^l_N] along the channels, for every layer.

    Raises:
        InputError: numbers of layers or sizes differ; the message names the layer.
    """
    numbers = [len(f) for f in features]
    if set(numbers) != {len(names)}:
        raise InputError(f"the teachers have {', '.join(map(str, numbers))} layers and the student {len(names)}; equal "
                         "numbers are needed, or common features for different architectures")  # fmt: skip
    for name, at in zip(names, zip(*features, strict=True), strict=True):
        if len({f.shape[2:] for f in at}) > 1:
            sizes = ", ".join(f"{'x'.join(map(str, f.shape[1:]))} in teacher {t + 1}" for t, f in enumerate(at))
            raise InputError(f"layer {name!r}: {sizes}; features can be stacked at equal height and width only")
    return [torch.cat(at, 1) for at in zip(*features, strict=True)]


def moments(teachers: Sequence[Chain], images: ImageSet, runtime: Runtime) -> list[Moments]:
    """Moments of the stacked features of every layer but the last: one pass over the images.

    Raises:
        InputError: the teachers' shapes differ; the message names the layer.
    """
    names = [str(layer.name) for layer in teachers[0].layers][:-1]
    gathered = [Moments() for _ in names]
    with torch.no_grad():
        for x, _ in images.batches(250):
            found = [teacher.features(runtime.images(x))[:-1] for teacher in teachers]
            for moment, f in zip(gathered, stack(found, names), strict=True):
                moment.add(f)
    return gathered
