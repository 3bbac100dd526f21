"""Knowledge distillation on real images: the reference rows beside every data-free method.

The student imitates the teacher's logits on whatever images it is given: the teacher's own training data
(KD-ORI), related data (KD-REL) or unrelated data (KD-UNR). Labels are never used.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..data import ImageSet, crop_flip, minibatches, paired_crop_flip
from ..errors import unknown
from ..losses import IMITATION
from ..runtime import Runtime
from .players import Resumable, check_positive, freeze, in_compute_type, recordable, sgd, update
from .replay import Replay
from .schedules import drops, set_lr


@dataclass(frozen=True)
class Settings:
    """The hyper-parameters of one run.

    Attributes:
        batch_size: images per step.
        loss: imitation loss: "MAE", "MSE" or "KL".
        lr, momentum, weight_decay: SGD of the student.
        milestones: steps at which the learning rate falls by `drop_factor`.
        augment: pad-crop and flip; for segmentation sets, flips of `crop` x `crop` cut-outs.
        crop: side of the cut-outs for segmentation; 0 keeps whole images.
    """

    batch_size: int = 128
    loss: str = "MAE"
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    milestones: tuple[int, ...] = ()
    drop_factor: float = 0.1
    augment: bool = False
    crop: int = 0

    def __post_init__(self) -> None:
        check_positive(self, "batch_size", "lr", "drop_factor")
        if self.loss not in IMITATION:
            raise unknown("loss", self.loss, IMITATION)


class KD(Resumable):
    """Distillation on a set of images, one student update per :meth:`step`."""

    data_free: ClassVar[bool] = False
    PARTS: tuple[str, ...] = ("student", "optimizer", "scaler", "randomness", "steps")

    def __init__(
        self, teacher: nn.Module, student: nn.Module, images: ImageSet, settings: Settings, runtime: Runtime
    ) -> None:
        self.settings, self.runtime, self.images = settings, runtime, images.to(runtime.device)
        self.teacher = in_compute_type(freeze(runtime.prepare(teacher)), runtime)
        self.student = runtime.prepare(student).train()
        self.optimizer = recordable(sgd(self.student, settings.lr, settings.weight_decay, settings.momentum), runtime)
        self.scaler = runtime.scaler()
        self.batches = minibatches(len(images), settings.batch_size, seed=runtime.seed, device=runtime.device)
        self.randomness = runtime.stream("kd augmentation")
        self.steps = 0
        self.at = torch.zeros(settings.batch_size, dtype=torch.int64, device=runtime.device)
        self.imitation = Replay(self.imitation_step, runtime, [self.randomness])

    def step(self) -> dict[str, Tensor]:
        """One student update on the next batch; returns {"discrepancy": loss}, detached."""
        factor = drops(self.steps, self.settings.milestones, self.settings.drop_factor)
        set_lr(self.optimizer, self.settings.lr * factor)
        self.at.copy_(self.batches(self.steps))
        loss = self.imitation()
        self.steps += 1
        return {"discrepancy": loss}

    def imitation_step(self) -> Tensor:
        """The update on the images at `self.at`, a :class:`~.replay.Replay`'s work; returns the loss, detached."""
        x, _ = self.images.batch(self.at)
        if self.settings.crop:
            x, _ = paired_crop_flip(x, x[:, 0], size=self.settings.crop, generator=self.randomness)
        elif self.settings.augment:
            x = crop_flip(x, generator=self.randomness)
        x = self.runtime.images(x)
        with self.runtime.autocast():
            with torch.no_grad():
                t = self.teacher(x).to(self.runtime.dtype)
            loss = IMITATION[self.settings.loss](self.student(x).to(self.runtime.dtype), t)
        update(self.optimizer, loss, self.scaler)
        return loss.detach()
