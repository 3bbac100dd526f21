"""QFSL on images, arXiv 1803.11320: the embedding theta is a network, frozen or learning with the bridge.

The loss is that of :mod:`.qfsl`. Labelled and unlabelled images pass theta together, in one batch, so that its batch
norms have one set of statistics for both: with a pass each, source and target images could be told apart by the
statistics alone, and the bias loss would be met without a class being learnt. A theta that learns has its own,
smaller learning rate; the public re-implementation gives it a tenth of the bridge's.
"""

from __future__ import annotations

import copy
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.optim import SGD

from ..data import ImageSet, minibatches
from ..data.augment import crop_flip
from ..errors import InputError
from ..losses import cross_entropy
from ..runtime import Runtime
from ..taps import logits_and_features
from ..training.modes import evaluating
from ..training.players import Resumable, update
from ..training.schedules import cosine
from .qfsl import BIAS, Scoring, Settings, bias_loss, dropped, target_mass


class Embedding(nn.Module):
    """theta: penultimate features of a classifier, centred and divided by one number, [B, C, H, W] -> [B, D].

    Args:
        network: a classifier whose last linear layer reads the features. It must not have learnt from a target class.
        centre, spread: of its features of source images, [D] and a scalar; fixed.
    """

    centre: Tensor
    spread: Tensor

    def __init__(self, network: nn.Module, centre: Tensor, spread: Tensor) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("centre", centre.detach().clone())
        self.register_buffer("spread", spread.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """Features of images in [0, 1]."""
        features = logits_and_features(self.network, x)[1].flatten(1)
        centred: Tensor = (features.to(self.centre.dtype) - self.centre) / self.spread
        return centred


def embedding(network: nn.Module, source: ImageSet, runtime: Runtime) -> Embedding:
    """A copy of a classifier as theta; what centres and divides its features is measured on the source images."""
    network = copy.deepcopy(network).to(runtime.device)
    with evaluating(network):
        parts = [logits_and_features(network, runtime.images(x))[1].flatten(1) for x, _ in source.batches(256)]
    features = torch.cat(parts).float()
    centre = features.mean(0)
    return Embedding(network, centre.clone(), (features - centre).square().mean().sqrt().clone())


class QFSLOnImages(Resumable):
    """QFSL with an embedding that may learn; one update per :meth:`step`.

    Args:
        source: labelled images; `labels`, int64 [N], are their columns among all classes.
        unlabelled: images of target classes, or None. Labels that it carries are not read.
        theta: images [B, C, H, W] in [0, 1] -> features [B, D], as :func:`embedding` makes it; a copy learns.
        phi: [S + T, A], rows of length 1. target: bool [S + T].
        settings: of the bridge and the loss; `target_loss` "bias" alone.
        rate: learning rate of theta as a share of the bridge's; 0 freezes it, batch norms included.
        augmented: random crops and flips, of both kinds of images.

    Raises:
        InputError: a label is that of a target class; lambda without target images; a negative rate; pseudo-labels.
    """

    data_free: ClassVar[bool] = False
    PARTS: tuple[str, ...] = ("theta", "network", "optimizer", "scaler", "drops", "views", "steps")

    def __init__(
        self,
        source: ImageSet,
        labels: Tensor,
        unlabelled: ImageSet | None,
        theta: nn.Module,
        phi: Tensor,
        target: Tensor,
        settings: Settings,
        runtime: Runtime,
        *,
        rate: float = 0.1,
        augmented: bool = True,
    ) -> None:
        self.settings, self.runtime, self.rate, self.augmented = settings, runtime, rate, augmented
        device = runtime.device
        self.target, self.labels = target.to(device), labels.to(device)
        if self.target[self.labels].any():
            raise InputError("a labelled image is of a target class; pass images of target classes without labels")
        if settings.lam and (unlabelled is None or not len(unlabelled)):
            raise InputError("lambda weighs unlabelled images of target classes; pass some, or set lam to 0")
        if settings.target_loss != BIAS:
            raise InputError("pseudo-labels are taken of features that do not change; use QuasiFullySupervised")
        if rate < 0:
            raise InputError(f"rate must be 0 or more, not {rate!r}")
        self.source = source.to(device)
        self.unlabelled = None if unlabelled is None else unlabelled.to(device)
        self.theta = runtime.prepare(copy.deepcopy(theta)).requires_grad_(rate > 0)
        with torch.no_grad(), evaluating(self.theta):
            n_features = self.theta(runtime.images(self.source.batch([0])[0])).shape[1]
        first = torch.Generator().manual_seed(runtime.seed)
        self.network = Scoring(n_features, phi, settings.scale, first).to(device)
        groups = [{"params": list(self.network.parameters()), "lr": settings.lr}]
        if rate:
            groups.append({"params": list(self.theta.parameters()), "lr": settings.lr * rate})
        self.optimizer = SGD(groups, settings.lr, 0.9, weight_decay=settings.weight_decay)
        self.scaler = runtime.scaler()
        self.drops, self.views = runtime.stream("dropout"), runtime.stream("views")
        size = settings.batch_size
        self.batches = minibatches(len(source), size, seed=runtime.seed, device=device)
        n = 0 if self.unlabelled is None else len(self.unlabelled)
        self.target_batches = minibatches(n, size, seed=runtime.seed + 1, device=device) if n else None
        self.steps = 0

    def step(self) -> dict[str, Tensor]:
        """One update of the bridge and, unless it is frozen, of theta.

        Returns:
            As :meth:`.qfsl.QuasiFullySupervised.step`.
        """
        chosen = self.settings
        for group, share in zip(self.optimizer.param_groups, (1.0, self.rate), strict=False):
            group["lr"] = chosen.lr * share * cosine(self.steps, chosen.n_steps)
        at = self.batches(self.steps)
        x, y = self.source.batch(at)[0], self.labels[at]
        if self.unlabelled is not None and self.target_batches is not None:
            x = torch.cat([x, self.unlabelled.batch(self.target_batches(self.steps))[0]])
        s = self.training_scores(self.runtime.images(x))
        of_source, of_target = s[: len(at)], s[len(at) :]
        loss = classification = cross_entropy(of_source, y)
        metrics = {
            "classification": classification.detach(),
            "P_t source": target_mass(of_source.detach(), self.target).mean(),
        }
        if len(of_target):
            target_loss = bias_loss(of_target, self.target)
            loss = classification + chosen.lam_at(self.steps) * target_loss
            metrics["target loss"] = target_loss.detach()
            metrics["P_t target"] = target_mass(of_target.detach(), self.target).mean()
        update(self.optimizer, loss, self.scaler)
        self.steps += 1
        return metrics

    def training_scores(self, x: Tensor) -> Tensor:
        """Scores [B, C] of a batch of both kinds of images in one pass, with crops, flips and dropout."""
        if self.augmented:
            x = crop_flip(x, generator=self.views)
        self.theta.train(self.rate > 0)
        with torch.set_grad_enabled(self.rate > 0), self.runtime.autocast():
            features = self.theta(x).float()
        s: Tensor = self.network(dropped(features, self.settings.dropout, self.drops))
        return s

    def scores(self, images: ImageSet) -> Tensor:
        """Scores of all classes, theta in eval mode: N images -> [N, S + T], on the device."""
        with evaluating(self.theta), self.runtime.autocast():
            parts = [self.network(self.theta(self.runtime.images(x)).float()) for x, _ in images.batches(256)]
        return torch.cat(parts).clone()
