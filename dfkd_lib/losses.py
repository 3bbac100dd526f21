"""Every loss of every paper, as plain functions of tensors.

Logits are [B, C] for classification and [B, C, H, W] for segmentation; the class axis is always 1.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def mae(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean absolute difference of logits, the discrepancy D(T, S; G) of DFAD.

    The mean runs over batch, classes and pixels, so each entry of the gradient is +-1/numel wherever
    the two differ, however small the gap, and 0 where they agree.

    Args:
        student, teacher: logits [B, C] or [B, C, H, W], any real values.

    Returns:
        Scalar >= 0.
    """
    return F.l1_loss(student, teacher)


def mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of logits; its gradient is proportional to the gap.

    Args:
        student, teacher: logits [B, C] or [B, C, H, W].

    Returns:
        Scalar >= 0.
    """
    return F.mse_loss(student, teacher)


def kl(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 KL(p_T || p_S) between softened class beliefs, averaged over batch and pixels.

    The gradient with respect to the student's logits is temperature * (p_S - p_T) / B, with the beliefs
    softened; the factor T^2 keeps its size comparable between temperatures.

    Args:
        student, teacher: logits [B, C] or [B, C, H, W].
        temperature: > 0.

    Returns:
        Scalar >= 0.
    """
    log_p_s = F.log_softmax(student / temperature, dim=1)
    log_p_t = F.log_softmax(teacher / temperature, dim=1)
    per_position = F.kl_div(log_p_s, log_p_t, reduction="none", log_target=True).sum(1)
    return per_position.mean() * temperature**2


def log_compressed(discrepancy: Tensor) -> Tensor:
    """log(1 + D): the segmentation form of DFAD's generator loss, up to its sign.

    The gradient is that of D divided by (1 + D): damped while the student is poor, unchanged as D -> 0.

    Args:
        discrepancy: scalar >= 0.
    """
    return torch.log1p(discrepancy)


def cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0, void: int = -100) -> Tensor:
    """Mean negative log-likelihood over labelled positions.

    Args:
        logits: [B, C] or [B, C, H, W].
        labels: int64 [B] or [B, H, W].
        label_smoothing: in [0, 1).
        void: label of positions that do not count.
    """
    return F.cross_entropy(logits, labels, ignore_index=void, label_smoothing=label_smoothing)


def focal(logits: Tensor, labels: Tensor, gamma: float = 2.0, void: int = -100) -> Tensor:
    """(1 - p)^gamma * cross-entropy, averaged over all positions; void ones count as zero.

    The loss that DFAD's segmentation teachers are trained with (gamma = 2).

    Args:
        logits: [B, C] or [B, C, H, W].
        labels: int64 [B] or [B, H, W].
    """
    ce = F.cross_entropy(logits, labels, ignore_index=void, reduction="none")
    return ((1 - torch.exp(-ce)) ** gamma * ce).mean()


IMITATION = {"MAE": mae, "MSE": mse, "KL": kl}
