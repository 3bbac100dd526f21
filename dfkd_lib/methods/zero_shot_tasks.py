"""Zero-shot tasks of this book's data: which classes are unseen, which images are labelled, unlabelled, for test."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from .. import data
from ..data import ImageSet
from ..data.attributes import (
    AWA2_TARGETS,
    ClassAttributes,
    cifar100_animals,
    cifar100_attributes,
    digit_attributes,
    feature_package,
    sibling_split,
)
from ..measures.zero_shot import zero_shot_measures
from .qfsl import exchanged_halves

Embedding = Callable[[ImageSet, Mapping[str, ImageSet]], dict[str, Tensor]]
AWA2 = "awa2"


@dataclass(frozen=True)
class Task:
    """One split of classes and images.

    Attributes:
        attributes: of all S + T classes, whose order is that of the columns of scores.
        target: bool [S + T].
        source, pool, test_seen, test_unseen: features [N, D], centred and scaled by the source's statistics: labelled,
            unlabelled, and held out of source and target classes.
        source_labels, test_seen_labels, test_unseen_labels: int64 [N], columns.
        pool_labels: for the supervised bound and for pools of a given make-up alone; no method is handed them.
        images: uint8 [N, C, H, W] of `test_unseen`, to look at, or None.
    """

    attributes: ClassAttributes
    target: Tensor
    source: Tensor
    source_labels: Tensor
    pool: Tensor
    pool_labels: Tensor
    test_seen: Tensor
    test_seen_labels: Tensor
    test_unseen: Tensor
    test_unseen_labels: Tensor
    images: Tensor | None = None

    @property
    def seen_labels(self) -> Tensor:
        """The source labels counted among the seen classes alone, 0 to S - 1."""
        return ((~self.target).cumsum(0) - 1)[self.source_labels]

    def measures(self, scores: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Of features [N, D] -> scores [N, S + T]: :func:`~..measures.zero_shot.zero_shot_measures`."""
        unseen, seen = (scores(x).cpu() for x in (self.test_unseen, self.test_seen))
        return zero_shot_measures(unseen, self.test_unseen_labels, seen, self.test_seen_labels, self.target)

    def with_pool(self, per_class: int, contamination: float = 0.0) -> Task:
        """The same with the first images of each target class as pool, and a share of the pool taken from the source.

        Args:
            contamination: in [0, 1): what part of the new pool are source images, which are also trained on.
        """
        kept = first_of_each(self.pool_labels, per_class)
        n = round(len(kept) * contamination / (1 - contamination))
        strangers = torch.randperm(len(self.source), generator=torch.Generator().manual_seed(0))[:n]
        return replace(
            self,
            pool=torch.cat([self.pool[kept], self.source[strangers]]),
            pool_labels=torch.cat([self.pool_labels[kept], self.source_labels[strangers]]),
        )


def first_of_each(labels: Tensor, n: int) -> Tensor:
    """Indices of the first n samples of each class, in order: int64 [N] -> [M]."""
    return torch.cat([(labels == c).nonzero()[:n, 0] for c in labels.unique()]).sort().values


def attributes_of(dataset: str, kind: str) -> ClassAttributes:
    """Attributes of "digits" or "cifar100"; kind "awa2" is of the latter's animals.

    Raises:
        InputError: an unknown kind.
        DataUnavailable: the ratings of AwA2 are not there.
    """
    if dataset == "digits":
        return digit_attributes(kind)
    return cifar100_animals() if kind == AWA2 else cifar100_attributes(kind)


def digit_tasks(split: int, kind: str, n_unseen: int = 2) -> list[Task]:
    """Some of the ten digits are unseen, drawn by the number of the split; one task per half of their images.

    Of each other digit, every fifth image is for test. Features are the pixels.
    """
    every = [data.load("digits", name) for name in ("train", "test")]
    x, y = (torch.cat(part) for part in zip(*(s.batch(range(len(s))) for s in every), strict=True))
    generator = torch.Generator().manual_seed(split)
    target = torch.zeros(10, dtype=torch.bool)
    target[torch.randperm(10, generator=generator)[:n_unseen]] = True
    unseen = target[y].nonzero()[:, 0]
    for_test = torch.arange(len(y)) >= len(every[0])
    made = []
    for pool, test in exchanged_halves(len(unseen), generator):
        parts = {
            "source": (~target[y] & ~for_test).nonzero()[:, 0], "pool": unseen[pool],
            "test_seen": (~target[y] & for_test).nonzero()[:, 0], "test_unseen": unseen[test],
        }  # fmt: skip
        images = (x[parts["test_unseen"]] * 255).round().to(torch.uint8)
        features = {name: x[at].flatten(1) for name, at in parts.items()}
        labels = {name: y[at] for name, at in parts.items()}
        made.append(_task(attributes_of("digits", kind), target, features, labels, images))
    return made


def cifar100_tasks(split: int, kind: str, embedding: Embedding, per_class: int, test_per_class: int) -> list[Task]:
    """One task of CIFAR-100: one sibling of each superclass is unseen, or with "awa2" four of twenty animals.

    The pool are training images of target classes, the test images are those of the data set: nothing is halved.

    Args:
        split: 0 to 4, see :func:`~..data.attributes.sibling_split`; "awa2" has one split.
        embedding: what turns images into features, fitted to the source images.
        per_class, test_per_class: images of each class.
    """
    attributes = attributes_of("cifar100", kind)
    train, test = (data.load("cifar100", name) for name in ("train", "test"))
    chosen = [train.classes.index(name) for name in attributes.classes]
    train, test = train.of_classes(chosen), test.of_classes(chosen)
    unseen = AWA2_TARGETS if kind == AWA2 else sibling_split(split)
    target = torch.tensor([name in unseen for name in attributes.classes])
    sets, labels = {}, {}
    for images, n, seen_part, unseen_part in (
        (train, per_class, "source", "pool"), (test, test_per_class, "test_seen", "test_unseen")
    ):  # fmt: skip
        y = images.labels
        assert y is not None  # of a named data set
        few = first_of_each(y, n)
        for part, at in ((seen_part, few[~target[y[few]]]), (unseen_part, few[target[y[few]]])):
            sets[part], labels[part] = images.take(at), y[at]
    features = embedding(sets["source"], {name: images for name, images in sets.items() if name != "source"})
    return [_task(attributes, target, features, labels, sets["test_unseen"].images)]


def package_tasks(folder: Path) -> list[Task]:
    """AwA2, CUB or SUN from a feature package: one task per half of the images of unseen classes.

    Raises:
        DataUnavailable, DamagedFile: see :func:`~..data.attributes.feature_package`.
    """
    read = feature_package(folder)
    target = torch.zeros(len(read.attributes.classes), dtype=torch.bool)
    target[read.labels[read.test_unseen]] = True
    made = []
    for pool, test in exchanged_halves(len(read.test_unseen), torch.Generator().manual_seed(0)):
        parts = {
            "source": read.trainval, "pool": read.test_unseen[pool], "test_seen": read.test_seen,
            "test_unseen": read.test_unseen[test],
        }  # fmt: skip
        features = {name: read.features[at] for name, at in parts.items()}
        made.append(_task(read.attributes, target, features, {name: read.labels[at] for name, at in parts.items()}))
    return made


def _task(
    attributes: ClassAttributes,
    target: Tensor,
    features: Mapping[str, Tensor],
    labels: Mapping[str, Tensor],
    images: Tensor | None = None,
) -> Task:
    centre = features["source"].mean(0)
    spread = (features["source"] - centre).square().mean().sqrt()
    ready = {name: (x.cpu() - centre.cpu()) / float(spread) for name, x in features.items()}
    return Task(attributes, target, images=images, **ready, **{f"{name}_labels": y for name, y in labels.items()})
