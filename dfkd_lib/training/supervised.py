"""Ordinary training on labelled data: how teachers are made, and the scratch student beside them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..data import ImageSet, crop_flip, minibatches, paired_crop_flip
from ..errors import InputError, unknown
from ..losses import cross_entropy, focal
from ..runtime import Runtime
from .players import Resumable, check_positive, recordable, sgd, update
from .replay import Replay
from .schedules import cosine, drops, one_cycle, set_lr

SCHEDULES = ("constant", "milestones", "cosine", "one-cycle")


@dataclass(frozen=True)
class Recipe:
    """How a network is trained on labels.

    Attributes:
        epochs: passes over the training data.
        batch_size: images per step.
        lr, momentum, nesterov, weight_decay: SGD.
        schedule: "constant", "milestones" (x0.1 at each), "cosine" to 0, or "one-cycle".
        milestones: shares of the run in (0, 1) at which the "milestones" schedule drops.
        label_smoothing: in [0, 1).
        augment: pad-crop by 4 and flip; for segmentation, flips of `crop` x `crop` cut-outs.
        crop: side of the cut-outs for segmentation; 0 keeps whole images.
        loss: "cross-entropy" or "focal".
    """

    epochs: int
    batch_size: int = 128
    lr: float = 0.1
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 5e-4
    schedule: str = "cosine"
    milestones: tuple[float, ...] = ()
    label_smoothing: float = 0.0
    augment: bool = False
    crop: int = 0
    loss: str = "cross-entropy"

    def __post_init__(self) -> None:
        check_positive(self, "epochs", "batch_size", "lr")
        if self.schedule not in SCHEDULES:
            raise unknown("schedule", self.schedule, SCHEDULES)
        if self.loss not in ("cross-entropy", "focal"):
            raise unknown("loss", self.loss, ("cross-entropy", "focal"))


class Supervised(Resumable):
    """Training on labels, one update per :meth:`step`.

    Attributes:
        n_steps: updates in the whole recipe.
    """

    data_free: ClassVar[bool] = False
    PARTS: tuple[str, ...] = ("student", "optimizer", "scaler", "randomness", "steps")

    def __init__(self, student: nn.Module, images: ImageSet, recipe: Recipe, runtime: Runtime) -> None:
        if not images.n_classes:
            raise InputError(f"{images.name} has no labels; supervised training needs them")
        self.recipe, self.runtime, self.images = recipe, runtime, images.to(runtime.device)
        self.student = runtime.prepare(student).train()
        self.optimizer = recordable(
            sgd(self.student, recipe.lr, recipe.weight_decay, recipe.momentum, recipe.nesterov), runtime
        )
        self.scaler = runtime.scaler()
        self.batches = minibatches(len(images), recipe.batch_size, seed=runtime.seed, device=runtime.device)
        self.n_steps = recipe.epochs * (len(images) // recipe.batch_size or 1)
        self.void = -100 if images.void is None else images.void
        self.randomness = runtime.stream("supervised augmentation")
        self.steps = 0
        self.at = torch.zeros(recipe.batch_size, dtype=torch.int64, device=runtime.device)
        self.training = Replay(self.training_step, runtime, [self.randomness])

    def lr_factor(self) -> float:
        """Where the schedule stands, as a share of the peak learning rate."""
        if self.recipe.schedule == "cosine":
            return cosine(self.steps, self.n_steps)
        if self.recipe.schedule == "one-cycle":
            return one_cycle(self.steps, self.n_steps)
        milestones = [share * self.n_steps for share in self.recipe.milestones]
        return drops(self.steps, [round(m) for m in milestones])

    def step(self) -> dict[str, Tensor]:
        """One update on the next batch; returns {"loss": ...}, detached."""
        set_lr(self.optimizer, self.recipe.lr * self.lr_factor())
        self.at.copy_(self.batches(self.steps))
        loss = self.training()
        self.steps += 1
        return {"loss": loss}

    def training_step(self) -> Tensor:
        """The update on the images at `self.at`, a :class:`~.replay.Replay`'s work; returns the loss, detached."""
        x, y = self.images.batch(self.at)
        if self.recipe.crop:
            x, y = paired_crop_flip(x, y, size=self.recipe.crop, generator=self.randomness)
        elif self.recipe.augment:
            x = crop_flip(x, generator=self.randomness)
        with self.runtime.autocast():
            logits = self.student(self.runtime.images(x)).to(self.runtime.dtype)
        if self.recipe.loss == "focal":
            loss = focal(logits, y, void=self.void)
        else:
            loss = cross_entropy(logits, y, self.recipe.label_smoothing, self.void)
        update(self.optimizer, loss, self.scaler)
        return loss.detach()
