"""Plain distillation on a person's own pictures, which need no labels: the other way to teach a student."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from .data import ImageSet, load
from .distillers import UPDATES
from .errors import InputError, unknown
from .runtime import Runtime
from .settings import made, typed
from .training import kd
from .training.budget import Budget
from .training.modes import evaluating

_HELD_BACK = 256  # pictures, at most, on which the networks are compared and the student does not learn
_FEWEST = 10


@dataclass(frozen=True)
class Settings(kd.Settings):
    """Those of :class:`dfkd_lib.training.kd.Settings`, and how many updates there are.

    Attributes:
        n_updates: student updates.
    """

    loss: str = "KL"
    lr: float = 0.05
    n_updates: int = 0


def settings_for(preset: str, n_updates: int | None, given: Mapping[str, Any]) -> Settings:
    """The settings of a run.

    Where `given` says nothing, the learning rate falls tenfold at 60 and at 85 % of the updates, and pictures are
    shifted and mirrored but for the presets "digits" and "mnist".

    Args:
        n_updates: at least 1; None takes the preset's number.
        given: other fields of :class:`Settings`.

    Raises:
        InputError: unknown preset or setting, or a value that cannot be.
    """
    n_updates = checked("kd", preset, n_updates, given, Settings, "crop")
    ours = {
        "milestones": (n_updates * 60 // 100, n_updates * 85 // 100),
        "augment": preset not in ("digits", "mnist"),
    }
    return made(Settings, {**ours, **given, "n_updates": n_updates})


def checked(
    method: str, preset: str, n_updates: int | None, given: Mapping[str, Any], kind: type[Any], *derived: str
) -> int:
    """How many student updates are asked of a method on pictures; None takes the preset's number.

    Args:
        given: settings of the method.
        kind: its dataclass of settings, which has `n_updates`.
        derived: its fields that cannot be given, besides that.

    Raises:
        InputError: unknown preset or setting, or less than one update.
    """
    if preset not in UPDATES:
        raise unknown("preset", preset, UPDATES)
    n_updates = typed("n_updates", UPDATES[preset] if n_updates is None else n_updates, int)
    if n_updates < 1:
        raise InputError(f"n_updates must be at least 1, not {n_updates}")
    known = [f.name for f in fields(kind) if f.name not in ("n_updates", *derived)]
    for key in given:
        if key not in known:
            raise unknown(f"setting of {method}", key, known)
    return n_updates


def pictures(folder: str, image_shape: tuple[int, int, int]) -> ImageSet:
    """The pictures below a folder at the size of `image_shape` (C, H, W); names of sub-folders mean nothing.

    Raises:
        InputError: no such folder, fewer than ten readable pictures in it, or images of neither 1 nor 3 channels.
    """
    channels, *size = image_shape
    if channels not in (1, 3):
        raise InputError(f"pictures have 1 or 3 channels, and the images of these networks have {channels}")
    found = load(f"folder:{folder}", "train", image_size=(size[0], size[1]), channels=channels)
    if len(found) < _FEWEST:
        raise InputError(f"folder {folder} holds {len(found)} pictures; give at least {_FEWEST}, better thousands")
    return found


class OnPictures(kd.KD):
    """Distillation on pictures, some of which are held back to compare the networks on.

    Args:
        teacher, student: images [B, C, H, W] in [0, 1] -> logits [B, K].

    Attributes:
        held_back: every tenth picture, at most 256.
        budget: what has been spent; its images are the pictures that the student may see.
    """

    PARTS = (*kd.KD.PARTS, "budget")

    def __init__(
        self, teacher: nn.Module, student: nn.Module, images: ImageSet, settings: Settings, runtime: Runtime
    ) -> None:
        back = torch.arange(len(images)) % 10 == 0
        back &= back.cumsum(0) <= _HELD_BACK
        super().__init__(teacher, student, images.take((~back).nonzero()[:, 0]), settings, runtime)
        self.held_back = images.take(back.nonzero()[:, 0]).to(runtime.device)
        self.budget = Budget(images=len(self.images))

    def step(self) -> dict[str, Tensor]:
        """See :meth:`dfkd_lib.training.kd.KD.step`."""
        with self.budget.distillation(self.runtime.device):
            metrics = super().step()
        self.budget.student_updates += 1
        self.budget.teacher_passes += self.settings.batch_size
        return metrics

    def watch(self, n: int) -> dict[str, Tensor]:
        """At most n held-back pictures in [0, 1], and the classes that "teacher" and "student" name, as many at a time
        as a step takes."""
        seen: dict[str, list[Tensor]] = {"images": [], "teacher": [], "student": []}
        with evaluating(self.student), self.runtime.autocast():
            for x, _ in self.held_back.take(min(n, len(self.held_back))).batches(self.settings.batch_size):
                prepared = self.runtime.images(x)
                seen["images"].append(x)
                seen["teacher"].append(self.teacher(prepared).argmax(1))
                seen["student"].append(self.student(prepared).argmax(1))
        return {name: torch.cat(parts) for name, parts in seen.items()}
