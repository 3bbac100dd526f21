"""What the zero-shot classifiers are given: samples, labels, signatures, and an embedding for images."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from sklearn.utils.validation import validate_data
from torch import Tensor, nn

from .data.attributes import normalised
from .errors import InputError, first_line
from .training.modes import evaluating

Array = np.ndarray[Any, Any]
_BATCH = 256


class Refused(InputError, ValueError):
    """An `InputError` that code which knows scikit-learn alone can catch, too."""


def checked(estimator: Any, X: Any, *y: Any, **options: Any) -> Any:
    """scikit-learn's checks, whose complaints become one line; images become features first, see :func:`embedded`."""
    if estimator.embedding is not None:
        X = embedded(estimator.embedding, X)
    try:
        return validate_data(estimator, X, *y, **options)
    except ValueError as e:
        text = " ".join(str(e).split())
        what, _, _ = text.partition(f" {type(estimator).__name__} does not accept")
        raise Refused(text if what == text else f"{what} Remove such rows, or fill in numbers") from e


def named(label: Any) -> str:
    return repr(label.item() if isinstance(label, np.generic) else label)


def normalised_signatures(labels: Array, signatures: Any) -> Tensor:
    """Normalised signatures of checked classes, float32 [C, A]."""
    if signatures.ndim != 2 or len(signatures) != len(labels):
        raise Refused(
            f"signatures are {list(signatures.shape)} for {len(labels)} classes; pass one row per class, [C, A]"
        )
    if len(set(labels.tolist())) < len(labels):
        raise Refused("a class is named twice in classes; name each once, in the order of the rows of signatures")
    try:
        values = torch.from_numpy(signatures.astype(np.float32))
    except (TypeError, ValueError) as e:
        raise Refused("signatures are not numbers; encode each attribute as one") from e
    bad = (~values.isfinite()).nonzero()
    if len(bad):
        c, a = bad[0].tolist()
        raise Refused(f"attribute {a} of class {named(labels[c])} is {float(values[c, a])}; fill in a number")
    phi = normalised(values)
    same = ((phi @ phi.T) > 1 - 1e-6).triu(1).nonzero()
    if len(same):
        one, other = (named(labels[c]) for c in same[0].tolist())
        raise Refused(f"classes {one} and {other} have the same signature; add an attribute that tells them apart")
    return phi


def embedded(embedding: nn.Module, images: Any) -> Array:
    """Features of images by a network in eval mode, on its own device; it stays as it was.

    Args:
        embedding: images [B, C, H, W] -> features [B, D].
        images: [N, C, H, W] in [0, 1], an array or a tensor.

    Returns:
        float64 [N, D].

    Raises:
        Refused: no such images, or the network does not make features of them.
    """
    x = torch.as_tensor(np.asarray(images))
    if x.ndim != 4 or not len(x) or not x.is_floating_point() or not 0 <= float(x.min()) <= float(x.max()) <= 1:
        raise Refused(f"with an embedding X are images [N, C, H, W] in [0, 1], floating-point, not {list(x.shape)}")
    like: Tensor = next(embedding.parameters(), torch.empty(0))
    try:
        with torch.no_grad(), evaluating(embedding):
            features = torch.cat([embedding(part.to(like)) for part in x.split(_BATCH)])
    except Exception as e:  # a network of somebody else's raises what it likes
        raise Refused(f"the embedding fails on images {list(x.shape[1:])}: {first_line(e)}") from e
    if not isinstance(features, Tensor) or features.ndim != 2:
        raise Refused(f"the embedding returns {list(features.shape)}, not features [N, D]; flatten them")
    found: Array = features.cpu().double().numpy()
    return found
