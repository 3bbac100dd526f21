"""What the data-free methods share: synthesise, then distil; the loop of every harness of this field.

One outer iteration synthesises (a few updates of a generator, or one inverted batch) and then takes `kd_steps`
updates of the student on what was synthesised. A paper's module says how to synthesise and what the student
sees; all else is here, so that no method gets a better student schedule, evaluation or accounting than another.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .. import losses
from ..banks import ImageBank
from ..checking import common_classes
from ..compiling import shown
from ..data import crop_flip
from ..errors import InputError, unknown
from ..runtime import Runtime
from ..taps import Seen
from ..training.budget import Budget
from ..training.modes import evaluating
from ..training.players import (
    Resumable,
    adam,
    check_positive,
    freeze,
    in_compute_type,
    no_weight_gradients,
    recordable,
    sgd,
    update,
)
from ..training.replay import Replay
from ..training.schedules import cosine, set_lr

OPTIMIZERS = ("sgd", "adam")


@dataclass(frozen=True)
class Distillation:
    """How the student learns, the same for all methods.

    Attributes:
        batch_size: images per student update.
        kd_steps: student updates per outer iteration.
        n_updates: student updates over which a cosine takes the learning rate to 0; 0 keeps it constant.
        temperature: of the KL divergence between teacher and student, whose factor T^2 is included.
        optimizer: of the student: "sgd", or "adam", which knows neither momentum nor weight decay.
        lr_student, momentum, weight_decay: of that optimizer.
    """

    batch_size: int = 256
    kd_steps: int = 5
    n_updates: int = 0
    temperature: float = 1.0
    optimizer: str = "sgd"
    lr_student: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4

    def __post_init__(self) -> None:
        check_positive(self, "kd_steps", "temperature", "lr_student")
        if self.optimizer not in OPTIMIZERS:
            raise unknown("optimizer", self.optimizer, OPTIMIZERS)
        if self.batch_size < 2:
            raise InputError(f"batch_size must be at least 2 (batch normalisation), not {self.batch_size}")


class Distiller(Resumable, ABC):
    """A data-free method, one outer iteration per :meth:`step`.

    A subclass implements :meth:`synthesize`, :meth:`sample` and :meth:`pictures`, and adds to `PARTS` what it
    owns.

    Args:
        teacher: images [B, C, H, W] in [0, 1] -> logits [B, K]; frozen here, nothing of it ever changes.
        student: the same interface, any architecture.
        image_shape: (C, H, W).
        runtime: where and how to compute; the players are moved there.

    Attributes:
        n_classes: K, as many as the teacher has logits.
        calls: outer iterations done.
        budget: what has been spent.

    Raises:
        InputError: teacher or student does not give finite logits [B, K] for such images, or they differ in K;
            teacher and student are the same object.
    """

    data_free: ClassVar[bool] = True
    PARTS: tuple[str, ...] = (
        "student",
        "student_optimizer",
        "student_scaler",
        "noise",
        "augmentation",
        "calls",
        "budget",
    )

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        image_shape: Sequence[int],
        settings: Distillation,
        runtime: Runtime,
    ) -> None:
        channels, height, width = image_shape
        self.runtime, self.distillation, self.image_shape = runtime, settings, (channels, height, width)
        teacher = freeze(runtime.prepare(teacher))
        self.student = runtime.prepare(student)
        self.student.train()  # whose own train() may return nothing
        self.n_classes = common_classes(teacher, self.student, self.image_shape, runtime)
        self.teacher = in_compute_type(teacher, runtime)
        self.student_optimizer = recordable(student_optimizer(self.student, settings), runtime)
        self.student_scaler = runtime.scaler()
        self.noise = runtime.stream("noise")
        self.augmentation = runtime.stream("augmentation")
        self.calls = 0
        self.budget = Budget()
        self.imitation = Replay(self.imitation_step, runtime, [self.noise, self.augmentation])

    @abstractmethod
    def synthesize(self) -> dict[str, Tensor]:
        """One synthesis call, the student in eval mode and not learning; returns its detached metrics."""

    @abstractmethod
    def sample(self, n: int) -> Tensor:
        """What the student sees next: n images in [0, 1], augmented if the method does so; no gradient."""

    @abstractmethod
    def pictures(self, n: int) -> Tensor:
        """n images to look at, [n, C, H, W] in [0, 1], drawn without touching any random stream."""

    @property
    def warming_up(self) -> bool:
        """Whether this call only synthesises, and the student does not learn yet."""
        return False

    def step(self) -> dict[str, Tensor]:
        """One synthesis call, then `kd_steps` student updates.

        Returns:
            The metrics of :meth:`synthesize`, and after the warm-up "distillation loss", the mean over the
            student updates. Detached scalars on the device.
        """
        self.student.eval()
        with self.budget.synthesis(self.runtime.device), no_weight_gradients(self.student):
            metrics = self.synthesize()
        self.student.train()
        if not self.warming_up:
            with self.budget.distillation(self.runtime.device):
                imitated = [self.imitate() for _ in range(self.distillation.kd_steps)]
            metrics["distillation loss"] = torch.stack(imitated).mean()
        self.calls += 1
        return metrics

    def imitate(self) -> Tensor:
        """One student update on T^2 KL(teacher || student); returns the loss, detached."""
        set_lr(self.student_optimizer, self.distillation.lr_student * self.decay())
        loss: Tensor = self.imitation(*self.sampled_from())
        self.count_update()
        return loss

    def count_update(self) -> None:
        """Put one student update into the budget."""
        self.budget.student_updates += 1
        self.budget.teacher_passes += self.distillation.batch_size

    def imitation_step(self) -> Tensor:
        """The update itself, a :class:`~..training.replay.Replay`'s work."""
        settings = self.distillation
        with self.runtime.autocast():
            with torch.no_grad():
                x = self.runtime.images(self.sample(settings.batch_size))
                t = self.teacher(x).to(self.runtime.dtype)
            s = self.student(x).to(self.runtime.dtype)
        loss = losses.kl(s, t, settings.temperature)
        update(self.student_optimizer, loss, self.student_scaler)
        return loss.detach()

    def sampled_from(self) -> tuple[int, ...]:
        """What :meth:`sample` depends on beyond tensors that stay where they are: the key of the recorded update."""
        return ()

    def decay(self) -> float:
        """The factor of the student's cosine at its present update; 1 without `n_updates`."""
        done, n_updates = self.budget.student_updates, self.distillation.n_updates
        return cosine(min(done, n_updates), n_updates) if n_updates else 1.0

    def look(self, x: Tensor, layers: Sequence[nn.Module] = ()) -> tuple[Tensor, list[Seen]]:
        """The teacher's logits on x in full precision, and what it showed its batch-norm layers on the way."""
        t, seen = shown(self.teacher, layers, self.runtime.images(x))
        return t.to(self.runtime.dtype), seen

    def opinion(self, x: Tensor) -> Tensor:
        """The student's logits on x in full precision."""
        return self.student(self.runtime.images(x)).to(self.runtime.dtype)

    def draw_noise(self, n: int, latent_dim: int) -> Tensor:
        """z ~ N(0, I), [n, latent_dim]."""
        return torch.randn(n, latent_dim, generator=self.noise, device=self.runtime.device, dtype=self.runtime.dtype)

    def draw_targets(self, n: int) -> Tensor:
        """n random classes in ascending order, int64 [n]: sorted only so that grids show a class side by side."""
        targets = torch.randint(self.n_classes, (n,), generator=self.noise, device=self.runtime.device)
        return targets.sort().values

    def watch(self, n: int = 16) -> dict[str, Tensor]:
        """What was synthesised, and what the networks say to it; changes nothing.

        Returns:
            "images" [n, C, H, W]; "teacher" and "student", predicted classes [n].
        """
        with evaluating(self.student), self.runtime.autocast():
            x = self.pictures(n)
            prepared = self.runtime.images(x)
            opinions = {"teacher": self.teacher(prepared).argmax(1), "student": self.student(prepared).argmax(1)}
        return {"images": x.to(self.runtime.dtype), **opinions}


class BankDistiller(Distiller):
    """A method that stores what it inverts and distils on random batches of the whole bank.

    Args:
        bank_size: images kept; the oldest make room.
        pad, flip: augmentation of what the student sees, and by default of what the teacher judges: a shift by up
            to `pad` pixels, a mirror image for every second one.
    """

    PARTS: tuple[str, ...] = (*Distiller.PARTS, "bank")

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        image_shape: Sequence[int],
        settings: Distillation,
        runtime: Runtime,
        *,
        bank_size: int,
        pad: int,
        flip: bool,
    ) -> None:
        super().__init__(teacher, student, image_shape, settings, runtime)
        self.bank = ImageBank(bank_size, self.image_shape, runtime.device)
        self.pad, self.flip = pad, flip

    def augment(self, x: Tensor) -> Tensor:
        """The training transform of real data, shift and mirror, zeros coming in; differentiable."""
        return crop_flip(x, pad=self.pad, flip=self.flip, generator=self.augmentation)

    def store(self, x: Tensor) -> None:
        """Put a synthesised batch into the bank."""
        self.bank.append(x)
        self.budget.images += len(x)

    def sample(self, n: int) -> Tensor:
        """See :meth:`Distiller.sample`: random images of the whole bank, augmented."""
        return self.augment(self.bank.images(n, self.augmentation))

    def sampled_from(self) -> tuple[int, ...]:
        """See :meth:`Distiller.sampled_from`: the bank's memory, which grows into another place."""
        return (len(self.bank.rows),)

    def pictures(self, n: int) -> Tensor:
        """See :meth:`Distiller.pictures`: an even selection of the newest call; grey before the first."""
        if not len(self.bank):
            return torch.full((n, *self.image_shape), 0.5, device=self.runtime.device)
        newest = self.bank.newest(max(n, self.newest_call))
        at = torch.linspace(0, len(newest) - 1, n, device=newest.device).round().long()
        return newest[at].float().div_(255)

    @property
    @abstractmethod
    def newest_call(self) -> int:
        """How many images were made together last, and are shown together."""

    @property
    def images_per_call(self) -> int:
        """How many images one synthesis call stores."""
        return self.newest_call


def student_optimizer(student: nn.Module, settings: Distillation) -> Optimizer:
    """What the settings say the student learns with."""
    if settings.optimizer == "adam":
        return adam(student, settings.lr_student)
    return sgd(student, settings.lr_student, settings.weight_decay, settings.momentum)
