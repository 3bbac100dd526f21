"""Features and attributes that others computed: AwA2, CUB and SUN in the common package of zero-shot learning."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import DamagedFile, DataUnavailable, first_line
from .attributes import ClassAttributes


@dataclass(frozen=True)
class FeaturePackage:
    """Features and attributes of AwA2, CUB or SUN in the common package of zero-shot learning.

    Attributes:
        features: float32 [N, D]. labels: int64 [N], 0 to C - 1.
        attributes: of the C classes.
        trainval, test_seen, test_unseen: which samples are for training, and for test of seen and unseen classes;
            int64, counted from 0. The last are of classes that the first two lack.
    """

    features: Tensor
    labels: Tensor
    attributes: ClassAttributes
    trainval: Tensor
    test_seen: Tensor
    test_unseen: Tensor


def feature_package(folder: Path) -> FeaturePackage:
    """Read `res101.mat` and `att_splits.mat` from the folder of one data set; needs scipy.

    Raises:
        DataUnavailable: a file is not there.
        DamagedFile: a file lacks something, a label has no class, or a class of the unseen test is trained on.
    """
    images = _mat(folder / "res101.mat", ("features", "labels"))
    splits = _mat(
        folder / "att_splits.mat",
        ("original_att", "allclasses_names", "trainval_loc", "test_seen_loc", "test_unseen_loc"),
    )
    features = torch.from_numpy(np.ascontiguousarray(images["features"].T, dtype=np.float32))
    labels = torch.from_numpy(images["labels"].ravel().astype(np.int64) - 1)
    values = torch.from_numpy(np.ascontiguousarray(splits["original_att"].T, dtype=np.float32)).clamp_min(0)
    classes = tuple(str(np.ravel(name)[0]) for name in splits["allclasses_names"].ravel())
    attributes = ClassAttributes(classes, tuple(f"attribute {i + 1}" for i in range(values.shape[1])), values)
    trainval, seen, unseen = (
        torch.from_numpy(splits[f"{name}_loc"].ravel().astype(np.int64) - 1)
        for name in ("trainval", "test_seen", "test_unseen")
    )
    if not (len(features) == len(labels) and len(classes) == len(values)):
        raise DamagedFile(f"{folder}: features and labels, or classes and attributes, do not fit; fetch the files anew")
    places = torch.cat([trainval, seen, unseen])
    for what, numbers, end in (("label", labels, len(classes)), ("sample", places, len(labels))):
        if int(numbers.min()) < 0 or int(numbers.max()) >= end:
            raise DamagedFile(f"{folder}: a {what} is outside 1..{end}; fetch the files anew")
    if set(labels[unseen].tolist()) & set(labels[torch.cat([trainval, seen])].tolist()):
        raise DamagedFile(f"{folder}: a class of test_unseen_loc is among the seen ones; fetch the files anew")
    return FeaturePackage(features, labels, attributes, trainval, seen, unseen)


def _mat(path: Path, keys: tuple[str, ...]) -> dict[str, Any]:
    from scipy.io import loadmat

    if not path.is_file():
        raise DataUnavailable(
            f"{path.name} is not in {path.parent}; unpack the feature package of the data set there (xlsa17)"
        )
    try:
        stored = loadmat(path)
    except Exception as e:  # scipy lets many kinds through
        raise DamagedFile(f"{path} cannot be read ({first_line(e)}); fetch it anew") from e
    for key in keys:
        if key not in stored:
            raise DamagedFile(f"{path} has no {key!r}; fetch it anew")
    return {key: np.asarray(stored[key]) for key in keys}
