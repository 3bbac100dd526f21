"""What stands for a class at the entrance of NAYER's generator: rows that need say no more than which class it is."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..errors import InputError, unknown
from ..taps import last_linear

CODES = ("random", "teacher", "onehot", "onehot-rotated", "clip-gram")

# Gram matrix / 512 of the standardised text embeddings of the ten class names of CIFAR-10: airplane, automobile,
# bird, cat, deer, dog, frog, horse, ship, truck. Cat and dog, automobile and truck, deer and horse are similar.
CLIP_GRAM = (
    (1.16, -0.02, -0.03, -0.27, -0.27, -0.22, -0.17, -0.16, 0.04, -0.07),
    (-0.02, 0.98, -0.25, -0.14, -0.26, -0.18, -0.20, -0.12, -0.08, 0.27),
    (-0.03, -0.25, 0.85, -0.01, -0.07, -0.10, 0.02, -0.09, -0.14, -0.18),
    (-0.27, -0.14, -0.01, 0.91, -0.05, 0.16, -0.12, -0.08, -0.18, -0.22),
    (-0.27, -0.26, -0.07, -0.05, 1.14, -0.03, -0.05, 0.08, -0.29, -0.21),
    (-0.22, -0.18, -0.10, 0.16, -0.03, 0.75, -0.07, 0.01, -0.18, -0.14),
    (-0.17, -0.20, 0.02, -0.12, -0.05, -0.07, 1.22, -0.21, -0.19, -0.23),
    (-0.16, -0.12, -0.09, -0.08, 0.08, 0.01, -0.21, 0.87, -0.14, -0.17),
    (0.04, -0.08, -0.14, -0.18, -0.29, -0.18, -0.19, -0.14, 1.18, -0.02),
    (-0.07, 0.27, -0.18, -0.22, -0.21, -0.14, -0.23, -0.17, -0.02, 0.95),
)


def class_codes(
    kind: str, n_classes: int, d_e: int, teacher: nn.Module | None = None, *, random: torch.Generator
) -> Tensor:
    """The class embeddings E, one row per class; with two classes all kinds come to the same.

    Args:
        kind: "random", N(0, 1): dense, without meaning; "teacher", the class rows of the teacher's last linear
            layer, rotated into d_e dimensions: the teacher's own similarities; "onehot", the identity, which
            ignores d_e; "onehot-rotated", dense but all classes equally far apart; "clip-gram", a code with the
            Gram matrix of the text embeddings of CIFAR-10's classes, already standardised.
        teacher: only for "teacher".

    Returns:
        [n_classes, d_e], for "onehot" [n_classes, n_classes]; on the device of `random`.

    Raises:
        InputError: unknown kind, or a number of classes or dimensions for which there is no such code.
    """
    if kind not in CODES:
        raise unknown("code", kind, CODES)
    if n_classes < 2:
        raise InputError(f"class codes tell classes apart, and there are {n_classes}; at least 2 are needed")
    if kind == "onehot":
        return torch.eye(n_classes, device=random.device)
    if kind == "random":
        return torch.randn(n_classes, d_e, generator=random, device=random.device)
    if kind == "teacher":
        if teacher is None:
            raise InputError("code 'teacher' needs the teacher")
        rows = last_linear(teacher).weight.detach().to(random.device, torch.float32)
        if len(rows) != n_classes:
            raise InputError(
                f"the teacher's last linear layer has {len(rows)} rows for {n_classes} classes; choose code 'random'"
            )
        return rows if rows.shape[1] == d_e else rows @ orthonormal(rows.shape[1], d_e, random)
    if d_e < n_classes:
        raise InputError(f"code {kind!r} needs embedding_dim of at least {n_classes}, the number of classes")
    if kind == "clip-gram":
        if n_classes != len(CLIP_GRAM):
            raise InputError(f"code 'clip-gram' is for the ten classes of CIFAR-10, not {n_classes}; choose another")
        values, vectors = torch.linalg.eigh(torch.tensor(CLIP_GRAM, device=random.device))
        root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    else:
        root = torch.eye(n_classes, device=random.device)
    return math.sqrt(d_e) * root @ orthonormal(n_classes, d_e, random)


def orthonormal(rows: int, columns: int, random: torch.Generator) -> Tensor:
    """A random matrix [rows, columns] whose rows, or columns if these are fewer, are orthonormal."""
    long, short = max(rows, columns), min(rows, columns)
    basis = torch.linalg.qr(torch.randn(long, short, generator=random, device=random.device)).Q
    return basis if rows == long else basis.T
