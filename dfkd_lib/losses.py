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


def one_hot(logits: Tensor) -> Tensor:
    """Cross-entropy against the network's own most likely class: -log max_c p_c, batch mean.

    DAFL's and DFQ's L_oh; 0 only for beliefs that are certain.

    Args:
        logits: [B, C].

    Returns:
        Scalar >= 0.
    """
    return F.cross_entropy(logits, logits.argmax(1))


def class_balance(logits: Tensor) -> Tensor:
    """sum_c q_c ln q_c of the batch's mean belief q: DAFL's information entropy term, natural logarithm.

    Least, -ln C, when the batch holds all classes evenly; 0 when all images belong to one class. DAFL's own
    code uses log10: divide by ln 10 for its scale.

    Args:
        logits: [B, C].

    Returns:
        Scalar in [-ln C, 0].
    """
    mean_belief = logits.softmax(1).mean(0)
    return torch.special.xlogy(mean_belief, mean_belief.clamp_min(1e-12)).sum()


def activation(features: Tensor) -> Tensor:
    """DAFL's L_a = -mean |features|: strong responses are rewarded.

    Args:
        features: [B, D], the input of the teacher's last layer.

    Returns:
        Scalar <= 0.
    """
    return -features.abs().mean()


def agreeing_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(p_T || p_S) where both networks name the same class, 0 elsewhere, mean over the whole batch.

    CMI's decision adversarial loss is minus this. Gradients flow through both networks, none through the mask.

    Args:
        student, teacher: logits [B, C].

    Returns:
        Scalar >= 0.
    """
    log_p_s, log_p_t = F.log_softmax(student, dim=1), F.log_softmax(teacher, dim=1)
    agree = (student.argmax(1) == teacher.argmax(1)).to(log_p_s.dtype)
    return (agree * F.kl_div(log_p_s, log_p_t, reduction="none", log_target=True).sum(1)).mean()


def jensen_shannon(student: Tensor, teacher: Tensor, temperature: float = 3.0) -> Tensor:
    """JS divergence of softened beliefs as adaptive DeepInversion computes it: all beliefs clamped to [0.01, 0.99].

    With P of the student, Q of the teacher and M their mean: half of KL(M || P) plus half of KL(M || Q), the
    direction that the authors' library call produces; the clamped beliefs do not sum to 1, so the value can dip
    slightly below 0.

    Args:
        student, teacher: logits [B, C].
    """
    p, q = (F.softmax(logits / temperature, dim=1).clamp(0.01, 0.99) for logits in (student, teacher))
    m = ((p + q) / 2).clamp(0.01, 0.99)
    return sum(F.kl_div(beliefs.log(), m, reduction="batchmean") for beliefs in (p, q)) / 2  # type: ignore[return-value]


def batch_norm_distance(mean: Tensor, variance: Tensor, running_mean: Tensor, running_variance: Tensor) -> Tensor:
    """r_l = ||var - running_var||_2 + ||mean - running_mean||_2 of one batch-norm layer: norms, not squares.

    Args:
        mean, variance: of the layer's input over batch and pixels, biased, [C].
        running_mean, running_variance: what the layer remembers of its training data, [C].

    Returns:
        Scalar >= 0; its gradient is finite at 0.
    """
    return torch.linalg.vector_norm(variance - running_variance) + torch.linalg.vector_norm(mean - running_mean)


def relative_batch_norm_distance(
    mean: Tensor, variance: Tensor, running_mean: Tensor, running_variance: Tensor
) -> Tensor:
    """r_l in units of what the layer remembers: ||mean - running_mean|| / ||running_std|| + ||var - running_var|| /
    ||running_var||, ours.

    Multiplying the layer's input by any factor, and its running statistics with it, changes nothing, so one weight
    serves layers and networks of any scale; and the norms run over all channels, so a channel that hardly ever
    answers does not outweigh the others, as it would if each were divided by its own variance. About 1 means a
    distance as large as the spread of the training data.

    Args:
        mean, variance, running_mean, running_variance: see :func:`batch_norm_distance`.

    Returns:
        Scalar >= 0; 0 for a layer that remembers no variance at all, which gives no unit.
    """
    norm = torch.linalg.vector_norm
    spread, size = norm(running_variance.sqrt()), norm(running_variance)
    tiny = torch.finfo(size.dtype).tiny
    of_mean = norm(mean - running_mean) / spread.clamp_min(tiny)
    of_variance = norm(variance - running_variance) / size.clamp_min(tiny)
    return torch.where(size > 0, of_mean + of_variance, 0)


def gaussian_kl(mean: Tensor, variance: Tensor, running_mean: Tensor, running_variance: Tensor) -> Tensor:
    """KL from a layer's remembered Gaussian to the batch's, summed over channels: DFQ's original form of r_l.

    log(sigma_batch / sigma) - 1/2 (1 - (var + (mu - mu_batch)^2) / var_batch), with mu, sigma the running ones.

    Args:
        mean, variance, running_mean, running_variance: [C], variances > 0.

    Returns:
        Scalar >= 0, 0 at equality.
    """
    ratio = (running_variance + (running_mean - mean) ** 2) / variance
    return 0.5 * (torch.log(variance / running_variance) - 1 + ratio).sum()


def total_variation(x: Tensor, power: int = 1) -> Tensor:
    """Roughness of images over their four kinds of neighbours: right, below and both diagonals.

    Args:
        x: [B, C, H, W].
        power: 1 sums the mean absolute differences (the toolbox's form); 2 sums the Euclidean norms of the
            differences over the whole batch (DeepInversion's own).

    Returns:
        Scalar >= 0, 0 for constant images.
    """
    differences = (
        x[..., :, :-1] - x[..., :, 1:],
        x[..., :-1, :] - x[..., 1:, :],
        x[..., 1:, :-1] - x[..., :-1, 1:],
        x[..., :-1, :-1] - x[..., 1:, 1:],
    )
    measure = torch.linalg.vector_norm if power == 2 else lambda d: d.abs().mean()
    return torch.stack([measure(d) for d in differences]).sum()


def instance_discrimination(queries: Tensor, keys: Tensor, n_new: int, temperature: float = 0.1) -> Tensor:
    """CMI's contrastive loss L_cr: each image's local view must find its own global view among all others'.

    Cross-entropy of the rows of queries keys^T / temperature against the diagonal. The first `n_new` rows are
    the images being made, the others come from the memory bank; the two groups are averaged apart, so that many
    stored rows do not dilute the gradient of the new ones. No gradient reaches the keys.

    Args:
        queries, keys: [N, D], rows of unit length; row i of both belongs to image i.
        n_new: 1..N.

    Returns:
        Scalar >= 0; 0 when N = 1.
    """
    logits = queries @ keys.detach().T / temperature
    per_row = F.cross_entropy(logits, torch.arange(len(logits), device=logits.device), reduction="none")
    new, stored = per_row[:n_new].mean(), per_row[n_new:]
    return new + stored.mean() if len(stored) else new


def attention_map(features: Tensor) -> Tensor:
    """Where a layer looks: mean over channels of the squared activation, flattened, at unit length (ZSKT).

    Args:
        features: [B, C, H, W].

    Returns:
        [B, H W], rows of unit length.
    """
    return F.normalize(features.square().mean(1).flatten(1), dim=1)


IMITATION = {"MAE": mae, "MSE": mse, "KL": kl}
BATCH_NORM_DISTANCES = {"absolute": batch_norm_distance, "relative": relative_batch_norm_distance}
