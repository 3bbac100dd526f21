"""How varied a set of images is, in the features of a given classifier; and how near to real images.

None of these is comparable between classifiers, and the Frechet distance here is not FID, whose features come
from an Inception network. Features are the penultimate ones, [N, D].
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data import ImageSet, resized_crop_flip
from ..errors import InputError
from ..runtime import Runtime
from ..taps import logits_and_features
from ..training.modes import evaluating


def mean_pairwise_distance(features: Tensor, labels: Tensor | None = None) -> float:
    """Mean of 1 - cos over all pairs of different rows, in [0, 2]; with labels, over pairs of one label only.

    Args:
        features: [N, D]; a row of zeros counts as orthogonal to all others.
        labels: int64 [N].

    Returns:
        NaN where there is no pair.
    """
    x = F.normalize(features.double(), dim=1)
    if labels is None:
        labels = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    groups = F.one_hot(labels).double()
    sizes = groups.sum(0)
    # The sum over all ordered pairs of a group is the squared length of its sum, less each row with itself.
    similarity = (groups.T @ x).square().sum() - x.square().sum()
    pairs = float((sizes * (sizes - 1)).sum())
    return 1 - float(similarity) / pairs if pairs else math.nan


def retrieval_accuracy(queries: Tensor, keys: Tensor) -> float:
    """Instance discrimination: share of rows whose most similar key, by cosine, is their own; 1/N by chance.

    Args:
        queries, keys: [N, D], row i of both belongs to image i. Where keys are equal the first counts.
    """
    similarity = F.normalize(queries.float(), dim=1) @ F.normalize(keys.float(), dim=1).T
    own = torch.arange(len(queries), device=queries.device)
    return float((similarity.argmax(1) == own).double().mean())


def vendi_score(features: Tensor) -> float:
    """exp of the entropy of the eigenvalues of K / N, K the Gram matrix of cosines: an effective number of images.

    1 if all point one way, N if all are orthogonal; never above D.

    Args:
        features: [N, D], no row of zeros.
    """
    x = F.normalize(features.double().cpu(), dim=1)
    # K and the D x D matrix below share their eigenvalues other than 0.
    gram = (x @ x.T if len(x) <= x.shape[1] else x.T @ x) / len(x)
    values = torch.linalg.eigvalsh(gram).clamp_min(0)
    return math.exp(-float(torch.special.xlogy(values, values).sum()))


def frechet_distance(features: Tensor, real: Tensor) -> float:
    """||m - m'||^2 + tr(S + S' - 2 (S^1/2 S' S^1/2)^1/2) between Gaussians fitted to two sets: classifier-FID.

    Computed in double precision; 0 for equal sets.

    Args:
        features, real: [N, D] and [M, D], at least 2 rows each.
    """
    a, b = features.double().cpu(), real.double().cpu()
    (mean_a, cov_a), (mean_b, cov_b) = ((x.mean(0), torch.cov(x.T).reshape(x.shape[1], -1)) for x in (a, b))
    root = _root(cov_a)
    shared = torch.linalg.eigvalsh(root @ cov_b @ root).clamp_min(0).sqrt().sum()
    distance = (mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * shared
    return max(0.0, float(distance))


def _root(matrix: Tensor) -> Tensor:
    """The symmetric square root of a symmetric positive semi-definite matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp_min(0).sqrt() @ vectors.T


def label_entropy(labels: Tensor, n_classes: int) -> float:
    """Entropy of the histogram of labels over log n_classes: 1 if all classes are equally frequent, 0 if one has all.

    Args:
        labels: int64 [N].
    """
    shares = torch.bincount(labels.cpu(), minlength=n_classes).double() / len(labels)
    return abs(float(torch.special.xlogy(shares, shares).sum())) / math.log(n_classes)


def coverage(features: Tensor, real: Tensor, k: int = 5) -> float:
    """Share of real points that have a synthetic point no farther away than their k-th nearest real neighbour.

    Args:
        features, real: [N, D] and [M, D], M > k.
    """
    if len(real) <= k:
        raise InputError(f"coverage needs more than {k} real images, not {len(real)}")
    covered = torch.zeros((), dtype=torch.int64, device=real.device)
    for rows in real.split(1024):
        # The nearest real point is the point itself.
        radius = torch.cdist(rows, real).kthvalue(k + 1, dim=1).values
        covered += (torch.cdist(rows, features).min(1).values <= radius).sum()
    return int(covered) / len(real)


def describe(teacher: nn.Module, images: Tensor, runtime: Runtime) -> tuple[Tensor, Tensor]:
    """The classifier's penultimate features [N, D] and its decisions int64 [N], in full precision.

    Args:
        images: float [N, C, H, W] in [0, 1], or bytes.
    """
    parts = []
    with evaluating(teacher):
        for batch in images.split(500):
            x = batch.float() / 255 if batch.dtype == torch.uint8 else batch
            logits, features = logits_and_features(teacher, runtime.images(x))
            parts.append((features.flatten(1), logits.argmax(1)))
    features, labels = (torch.cat(part) for part in zip(*parts, strict=True))
    return features, labels


def measure(
    teacher: nn.Module, images: Tensor, real: ImageSet, runtime: Runtime, *, n_instances: int = 1000
) -> dict[str, float]:
    """All measures of a set of images by their names; nothing is trained, no random stream of a method is touched.

    Args:
        images: float [N, C, H, W] in [0, 1], or bytes; N >= 2.
        real: the test split of what the teacher was trained on.
        n_instances: images, evenly chosen, among which each one's zoomed view has to find its whole.

    Raises:
        InputError: too few images, or a split other than "test".
    """
    if len(images) < 2:
        raise InputError(f"measuring diversity takes at least 2 images, not {len(images)}")
    if real.split != "test":
        raise InputError(f"compare with the test split of {real.name}, not with {real.split!r}")
    features, labels = describe(teacher, images, runtime)
    real_features, _ = describe(teacher, real.images, runtime)
    at = torch.linspace(0, len(images) - 1, min(len(images), n_instances)).long()
    chosen = images[at.to(images.device)]
    chosen = chosen.float() / 255 if chosen.dtype == torch.uint8 else chosen
    zoomed = resized_crop_flip(chosen.to(runtime.device), flip=False, generator=runtime.stream("diversity"))
    return {
        "mean pairwise distance": mean_pairwise_distance(features),
        "mean pairwise distance within class": mean_pairwise_distance(features, labels),
        "instance discrimination": retrieval_accuracy(
            describe(teacher, zoomed, runtime)[0], features[at.to(features.device)]
        ),
        "Vendi score": vendi_score(features),
        "classifier-FID": frechet_distance(features, real_features),
        "label entropy": label_entropy(labels, real.n_classes),
        "coverage": coverage(features, real_features),
    }
