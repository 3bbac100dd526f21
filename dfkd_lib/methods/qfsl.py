"""Transductive Unbiased Embedding for Zero-Shot Learning (QFSL), arXiv 1803.11320.

Source classes have labelled images, target classes have none, and a semantic vector phi(y) of length 1 is known of each
class of either kind. An image is embedded, bridged into the semantic space, v = W theta(x), and scored against all
classes, s_y = scale <v, phi(y)>; phi is fixed. Learning from source images alone teaches the scores of target classes
to be low. QFSL also has unlabelled images of target classes, and asks of each that it be of *some* target class:

    L = mean -ln p_y(x_s)  +  lambda mean -ln sum_{y in Y_t} p_y(x_t)  +  gamma |W|^2.

Here theta is frozen, so a method takes features; :mod:`.qfsl_images` takes images and a theta that may learn along.
:class:`QuasiFullySupervised` is the algorithm; lambda = 0 is the inductive baseline. The other baselines are functions:
calibrated stacking and ESZSL.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from ..data import minibatches
from ..errors import InputError, unknown
from ..losses import cross_entropy
from ..measures.zero_shot import zero_shot_measures
from ..runtime import Runtime
from ..training.fit import Method, fit
from ..training.players import Resumable, check_positive, sgd
from ..training.schedules import cosine, set_lr

M = TypeVar("M", bound=Method)
V = TypeVar("V")
BIAS, PSEUDO_LABELS = "bias", "pseudo-labels"


def bias_loss(s: Tensor, target: Tensor) -> Tensor:
    """L_b = mean -ln P_t(x) = mean [LSE over all classes - LSE over target classes] of the scores, a scalar >= 0.

    Its gradient in a score is p_y for a source class and p_y (1 - 1/P_t) for a target class, over the batch: target
    scores are pushed up in proportion to the share that they have, so an early mistake feeds itself.

    Args:
        s: scores, float [B, S + T].
        target: bool [S + T], which classes are target classes.
    """
    return (s.logsumexp(1) - s.masked_fill(~target, -torch.inf).logsumexp(1)).mean()


def target_mass(s: Tensor, target: Tensor) -> Tensor:
    """P_t(x), the probability of all target classes together: scores [B, S + T] -> [B] in [0, 1]."""
    return s.softmax(1)[:, target].sum(1)


def quasi_fully_supervised_loss(
    source_scores: Tensor, y: Tensor, target_scores: Tensor, target: Tensor, lam: float
) -> Tensor:
    """Cross-entropy of labelled source images over *all* classes plus lambda L_b of unlabelled target images, a scalar.

    Args:
        source_scores: float [B_s, S + T]. y: int64 [B_s].
        target_scores: float [B_t, S + T]. target: bool [S + T].
        lam: lambda >= 0.
    """
    return cross_entropy(source_scores, y) + lam * bias_loss(target_scores, target)


@dataclass(frozen=True)
class Settings:
    """Hyper-parameters; the defaults are those of a public re-implementation, as far as it has them.

    Attributes:
        lam: lambda, the weight of the target images' loss; the paper chooses it per data set.
        warm_up: updates over which lambda rises from 0 in a line (ours): a bias loss that acts before the scores mean
            something locks images into wrong target classes.
        target_loss: "bias", or "pseudo-labels": cross-entropy with the best target class of each image, taken anew once
            per pass over them.
        weight_decay: gamma. scale: of the scores (ours); phi has length 1, v is free.
    """

    lam: float = 0.2
    warm_up: int = 0
    target_loss: str = BIAS
    n_steps: int = 5000
    batch_size: int = 64
    lr: float = 0.001
    weight_decay: float = 5e-4
    dropout: float = 0.2
    scale: float = 10.0

    def __post_init__(self) -> None:
        check_positive(self, "n_steps", "batch_size", "lr", "scale")
        if self.target_loss not in (BIAS, PSEUDO_LABELS):
            raise unknown("target_loss", self.target_loss, (BIAS, PSEUDO_LABELS))
        for name, end in (("lam", None), ("warm_up", None), ("dropout", 1)):
            value = getattr(self, name)
            if value < 0 or (end is not None and value >= end):
                raise InputError(f"{name} must be 0 or more{' and below 1' if end else ''}, not {value!r}")

    def lam_at(self, steps: int) -> float:
        """lambda of the update after `steps` others: it rises in a line over the warm-up."""
        return self.lam * min(1.0, (steps + 1) / max(1, self.warm_up))


def dropped(x: Tensor, p: float, generator: torch.Generator) -> Tensor:
    """Dropout with a random stream of its own: a value becomes nought with probability p, the others grow."""
    if not p:
        return x
    return x * (torch.rand(x.shape, generator=generator, device=x.device) >= p) / (1 - p)


class Scoring(nn.Module):
    """Bridging and fixed scoring: features [B, D] -> scores [B, C], s = scale (W x + b) phi^T.

    Args:
        phi: semantic vectors of all classes, rows of length 1, [C, A]; a buffer, which nothing changes.
        generator: of the first weights, normal with deviation 0.01.
    """

    phi: Tensor

    def __init__(self, n_features: int, phi: Tensor, scale: float, generator: torch.Generator) -> None:
        super().__init__()
        self.bridge = nn.Linear(n_features, phi.shape[1])
        with torch.no_grad():
            self.bridge.weight.copy_(torch.randn(self.bridge.weight.shape, generator=generator) * 0.01)
            self.bridge.bias.zero_()
        self.register_buffer("phi", phi.clone())
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        """Scores of features [B, D]."""
        v: Tensor = self.bridge(x)
        return self.scale * v @ self.phi.T


class QuasiFullySupervised(Resumable):
    """QFSL on features; one update per :meth:`step`.

    Source and target images have random streams of their own, so that lambda = 0 gives the very weights of training
    without target images.

    Args:
        features: theta(x) of labelled source images, float [N, D].
        labels: int64 [N], columns of source classes.
        unlabelled: theta(x) of target images, float [M, D], or None.
        phi: [S + T, A], rows of length 1, as :func:`~..data.attributes.normalised` gives them.
        target: bool [S + T].

    Raises:
        InputError: a label is that of a target class; lambda without target images.
    """

    data_free: ClassVar[bool] = False
    PARTS: tuple[str, ...] = ("network", "optimizer", "drops_source", "drops_target", "pseudo_labels", "steps")

    def __init__(
        self,
        features: Tensor,
        labels: Tensor,
        unlabelled: Tensor | None,
        phi: Tensor,
        target: Tensor,
        settings: Settings,
        runtime: Runtime,
    ) -> None:
        self.settings, self.runtime = settings, runtime
        device, dtype = runtime.device, runtime.dtype
        self.target = target.to(device)
        if self.target[labels.to(device)].any():
            raise InputError("a labelled image is of a target class; pass images of target classes without labels")
        if settings.lam and (unlabelled is None or not len(unlabelled)):
            raise InputError("lambda weighs unlabelled images of target classes; pass some, or set lam to 0")
        self.features, self.labels = features.to(device, dtype), labels.to(device)
        self.unlabelled = None if unlabelled is None else unlabelled.to(device, dtype)
        first = torch.Generator().manual_seed(runtime.seed)
        self.network = Scoring(features.shape[1], phi, settings.scale, first).to(device, dtype)
        self.optimizer = sgd(self.network, settings.lr, settings.weight_decay)
        self.drops_source, self.drops_target = runtime.stream("source dropout"), runtime.stream("target dropout")
        size = settings.batch_size
        self.batches = minibatches(len(features), size, seed=runtime.seed, device=device)
        n = 0 if self.unlabelled is None else len(self.unlabelled)
        self.target_batches = minibatches(n, size, seed=runtime.seed + 1, device=device) if n else None
        self.pseudo_labels = torch.zeros(n, dtype=torch.int64, device=device)
        self.steps = 0

    def step(self) -> dict[str, Tensor]:
        """One update.

        Returns:
            "classification", the source images' loss; "P_t source" and, with target images, "target loss" and
            "P_t target", means over the batch. Detached scalars.
        """
        set_lr(self.optimizer, self.settings.lr * cosine(self.steps, self.settings.n_steps))
        at = self.batches(self.steps)
        s = self.scores_with_dropout(self.features[at], self.drops_source)
        loss = classification = cross_entropy(s, self.labels[at])
        metrics = {"classification": classification.detach(), "P_t source": target_mass(s.detach(), self.target).mean()}
        if self.unlabelled is not None and self.target_batches is not None:
            at = self.target_batches(self.steps)
            s = self.scores_with_dropout(self.unlabelled[at], self.drops_target)
            target_loss = self.target_loss(s, at)
            if self.settings.lam:
                loss = classification + self.settings.lam_at(self.steps) * target_loss
            metrics["target loss"] = target_loss.detach()
            metrics["P_t target"] = target_mass(s.detach(), self.target).mean()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.steps += 1
        return metrics

    def scores_with_dropout(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Scores [B, C] of features [B, D] of which a random part is dropped."""
        s: Tensor = self.network(dropped(x, self.settings.dropout, generator))
        return s

    def target_loss(self, s: Tensor, at: Tensor) -> Tensor:
        """L_b of scores [B, C], or their cross-entropy with the pseudo-labels of the images `at`, int64 [B]."""
        if self.settings.target_loss == BIAS:
            return bias_loss(s, self.target)
        if self.steps % -(-len(self.pseudo_labels) // self.settings.batch_size) == 0 and self.unlabelled is not None:
            self.pseudo_labels = self.scores(self.unlabelled).masked_fill(~self.target, -torch.inf).argmax(1)
        return cross_entropy(s, self.pseudo_labels[at])

    @torch.no_grad()
    def scores(self, features: Tensor) -> Tensor:
        """Scores of all classes, without dropout: features [N, D] -> [N, S + T], on the device."""
        s: Tensor = self.network(features.to(self.runtime.device, self.runtime.dtype))
        return s


def train(method: M, n_steps: int) -> M:
    """Take all steps, with neither progress nor checkpoints; returns the method.

    Raises:
        NonFiniteLoss: a loss or weight became NaN or infinite.
    """
    fit(method, n_steps, name=type(method).__name__, progress=False)
    return method


def calibrated(s: Tensor, target: Tensor, gamma: float) -> Tensor:
    """Calibrated stacking: scores [N, C] less gamma_c where the class is a source class."""
    return s - gamma * (~target).to(s.dtype)


def eszsl(x: Tensor, y: Tensor, s: Tensor, gamma: float, eta: float) -> Tensor:
    """ESZSL's closed form, V = (X^T X + gamma I)^-1 X^T Y S (S^T S + eta I)^-1; scores are x V phi^T.

    Args:
        x: features [N, D]. y: [N, S], 1 for the class of the image and -1 for the others.
        s: semantic vectors of the source classes, [S, A].

    Returns:
        V, [D, A].
    """
    left = x.T @ x + gamma * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    right = s.T @ s + eta * torch.eye(s.shape[1], dtype=x.dtype, device=x.device)
    return torch.linalg.solve(right, torch.linalg.solve(left, x.T @ y @ s).T).T


def signed_one_hot(labels: Tensor, n_classes: int, dtype: torch.dtype) -> Tensor:
    """1 at the label and -1 elsewhere: int64 [N] -> [N, n_classes]."""
    return 2 * nn.functional.one_hot(labels, n_classes).to(dtype) - 1


def exchanged_halves(n: int, generator: torch.Generator) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The transductive protocol: ((unlabelled, test), (unlabelled, test)), two halves of n images with roles exchanged.

    The halves are drawn without labels. Results are averaged over both; no image is trained on and tested by one model.
    """
    order = torch.randperm(n, generator=generator)
    first, second = order[: n // 2].sort().values, order[n // 2 :].sort().values
    return (first, second), (second, first)


class Fold(NamedTuple):
    """Some seen classes play unseen: indices into the labelled images, and which of the seen classes these are.

    `unlabelled` and `test_unseen` are images of the classes that play unseen, `fit` and `test_seen` of the others.
    """

    fit: Tensor
    test_seen: Tensor
    unlabelled: Tensor
    test_unseen: Tensor
    target: Tensor


def pseudo_unseen(labels: Tensor, n_held: int, n_folds: int, seed: int) -> Iterator[Fold]:
    """Folds on which lambda, gamma_c or a temperature can be chosen: no truly unseen class takes part.

    Args:
        labels: int64 [N], 0 to S - 1, all of which occur.
        n_held: classes that play unseen, others in each fold as far as they go.

    Raises:
        InputError: fewer than two classes would be left.
    """
    n_seen = int(labels.max()) + 1
    if not 0 < n_held <= n_seen - 2:
        raise InputError(f"{n_held} of {n_seen} seen classes cannot play unseen; hold out 1 to {n_seen - 2}")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(n_seen, generator=generator)
    for fold in range(n_folds):
        target = torch.zeros(n_seen, dtype=torch.bool)
        target[order.roll(-fold * n_held)[:n_held]] = True
        shuffled = torch.randperm(len(labels), generator=generator)
        held = target[labels.cpu()[shuffled]]
        rest, ours = shuffled[~held], shuffled[held]
        yield Fold(rest[len(rest) // 5 :], rest[: len(rest) // 5], ours[::2], ours[1::2], target)


def best_by_folds(
    candidates: Sequence[V], folds: Sequence[Fold], measured: Callable[[Fold], Callable[[V], float]]
) -> tuple[V, dict[V, float]]:
    """The candidate with the largest mean over folds, and all means.

    Args:
        measured: prepares a fold, such as by training on it, and returns what gives a candidate's figure there.
    """
    figures = [[figure(value) for value in candidates] for figure in map(measured, folds)]
    means = dict(zip(candidates, (sum(column) / len(folds) for column in zip(*figures, strict=True)), strict=True))
    return max(means, key=lambda value: means[value]), means


def fold_measures(s: Callable[[Tensor], Tensor], features: Tensor, labels: Tensor, fold: Fold) -> dict[str, float]:
    """:func:`~..measures.zero_shot.zero_shot_measures` of a fold.

    Args:
        s: features [N, D] -> scores over the seen classes [N, S].
        features, labels: of all labelled images, [N, D] and [N].
    """
    return zero_shot_measures(
        s(features[fold.test_unseen]).cpu(),
        labels[fold.test_unseen].cpu(),
        s(features[fold.test_seen]).cpu(),
        labels[fold.test_seen].cpu(),
        fold.target,
    )
