"""Zero-shot tasks of this book's data: which classes are unseen, which images are labelled, unlabelled, for test."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import data
from ..data import ImageSet
from ..data.attributes import (
    ClassAttributes,
    animal_split,
    cifar100_animals,
    cifar100_attributes,
    digit_attributes,
    sibling_split,
)
from ..data.feature_packages import feature_package
from ..measures.zero_shot import zero_shot_measures
from ..runtime import Runtime
from .qfsl import Fold, QuasiFullySupervised, Settings, best_by_folds, exchanged_halves, fold_measures, train

Embedding = Callable[[ImageSet, Mapping[str, ImageSet]], dict[str, Tensor]]
ANIMALS = ("awa2", "animals60")


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
        sets: the images of all four parts, by name, for an embedding that learns; empty where there are none.
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
    sets: Mapping[str, ImageSet] = field(default_factory=dict)

    @property
    def seen_labels(self) -> Tensor:
        """The source labels counted among the seen classes alone, 0 to S - 1."""
        return ((~self.target).cumsum(0) - 1)[self.source_labels]

    def measures(self, scores: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Of features [N, D] -> scores [N, S + T]: :func:`~..measures.zero_shot.zero_shot_measures`."""
        unseen, seen = (scores(x).cpu() for x in (self.test_unseen, self.test_seen))
        return zero_shot_measures(unseen, self.test_unseen_labels, seen, self.test_seen_labels, self.target)

    def measures_on_images(self, scores: Callable[[ImageSet], Tensor]) -> dict[str, float]:
        """:meth:`measures` of N images -> scores [N, S + T], for a task that has `sets`."""
        unseen, seen = (scores(self.sets[name]).cpu() for name in ("test_unseen", "test_seen"))
        return zero_shot_measures(unseen, self.test_unseen_labels, seen, self.test_seen_labels, self.target)

    def equalised(self, power: float) -> Task:
        """The same with each feature divided by its deviation over the source to a power, and the whole scaled anew.

        Args:
            power: in [0, 1]: 0 leaves the features as they are, 1 gives each of them the same deviation, which is
                whitening where they are principal components.
        """
        if not power:
            return self
        by = self.source.std(0).clamp_min(0.01) ** power  # what hardly varies in the source may vary elsewhere
        spread = (self.source / by).square().mean().sqrt()
        return replace(
            self, **{part: getattr(self, part) / by / spread for part in ("source", "pool", "test_seen", "test_unseen")}
        )

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


def choose_scaling(
    task: Task,
    phi: Tensor,
    folds: Sequence[Fold],
    powers: Sequence[float],
    scales: Sequence[float],
    settings: Settings,
    runtime: Runtime,
) -> tuple[tuple[float, float], dict[tuple[float, float], float]]:
    """The power of :meth:`Task.equalised` and the scale of the scores, chosen on seen classes that play unseen.

    An inductive classifier learns the other classes of each fold; what counts is its conventional accuracy on those
    that play unseen. Neither a test image nor the pool takes part.

    Args:
        phi: semantic vectors of the seen classes, [S, A].
        folds: of :func:`~.qfsl.pseudo_unseen`.

    Returns:
        The pair (power, scale) with the largest mean, and all means; with a single pair nothing is trained.
    """
    pairs = [(power, scale) for power in powers for scale in scales]
    if len(pairs) == 1:
        return pairs[0], {}
    sources = {power: task.equalised(power).source for power in powers}

    def of_pair(fold: Fold) -> Callable[[tuple[float, float]], float]:
        def conventional(pair: tuple[float, float]) -> float:
            x, chosen = sources[pair[0]], replace(settings, lam=0.0, scale=pair[1])
            labels = task.seen_labels
            method = QuasiFullySupervised(x[fold.fit], labels[fold.fit], None, phi, fold.target, chosen, runtime)
            return fold_measures(train(method, chosen.n_steps).scores, x, labels, fold)["conventional"]

        return conventional

    return best_by_folds(pairs, folds, of_pair)


def first_of_each(labels: Tensor, n: int) -> Tensor:
    """Indices of the first n samples of each class, in order: int64 [N] -> [M]."""
    return torch.cat([(labels == c).nonzero()[:n, 0] for c in labels.unique()]).sort().values


def attributes_of(dataset: str, kind: str) -> ClassAttributes:
    """Attributes of "digits" or "cifar100"; kinds "awa2" and "animals60" are of the latter's animals.

    Raises:
        InputError: an unknown kind.
        DataUnavailable: the ratings of AwA2 are not there.
    """
    if dataset == "digits":
        return digit_attributes(kind)
    return cifar100_animals(kind) if kind in ANIMALS else cifar100_attributes(kind)


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
    """One task of CIFAR-100: one sibling of each superclass is unseen, or of the animals four of twenty.

    The pool are training images of target classes, the test images are those of the data set: nothing is halved.

    Args:
        split: 0 to 4, see :func:`~..data.attributes.sibling_split` and :func:`~..data.attributes.animal_split`.
        kind: of attributes; "awa2" and "animals60" are of the same animals and images.
        embedding: what turns images into features, fitted to the source images.
        per_class, test_per_class: images of each class.
    """
    attributes = attributes_of("cifar100", kind)
    train, test = (data.load("cifar100", name) for name in ("train", "test"))
    chosen = [train.classes.index(name) for name in attributes.classes]
    train, test = train.of_classes(chosen), test.of_classes(chosen)
    unseen = animal_split(split) if kind in ANIMALS else sibling_split(split)
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
    task = _task(attributes, target, features, labels, sets["test_unseen"].images)
    return [replace(task, sets=sets)]


def package_tasks(folder: Path) -> list[Task]:
    """AwA2, CUB or SUN from a feature package: one task per half of the images of unseen classes.

    Raises:
        DataUnavailable, DamagedFile: see :func:`~..data.feature_packages.feature_package`.
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
    parts: dict[str, Any] = {name: (x.cpu() - centre.cpu()) / float(spread) for name, x in features.items()}
    parts |= {f"{name}_labels": y for name, y in labels.items()}
    return Task(attributes, target, images=images, **parts)
