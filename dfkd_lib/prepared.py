"""The two networks of a run as a method sees them: lent or copied, normalising, examined."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from torch.utils.hooks import RemovableHandle

from . import checking, lending
from .runtime import Runtime
from .training.players import freeze


@dataclass(frozen=True)
class Players:
    """Copies that normalise their images where that was asked for.

    Attributes:
        dense: whether they name a class for every pixel.
        trained: the copy of the student in `student`, without what was put in front of it.
        hooks: what was hooked on them.
    """

    teacher: nn.Module
    student: nn.Module
    trained: nn.Module
    n_classes: int
    dense: bool
    hooks: list[RemovableHandle]
    warnings: list[str]

    def handed_back(self, student: nn.Module) -> nn.Module:
        """The trained copy, in eval mode, otherwise as the student that it was copied from."""
        for hook in self.hooks:
            hook.remove()
        self.trained._compiled_call_impl = None
        self.trained.eval()
        lending.like(self.trained, student)
        return self.trained


def prepared(
    teacher: nn.Module,
    student: nn.Module,
    image_shape: tuple[int, int, int],
    statistics: tuple[list[float], list[float]] | None,
    runtime: Runtime,
    asks_gradient: bool,
    dense: bool = False,
) -> Players:
    """Players of a run, each call with a student of its own.

    Args:
        image_shape: (C, H, W).
        statistics: mean and std per channel of images in [0, 1], or None if the networks expect these.
        asks_gradient: whether the teacher's gradient with respect to the image is needed.
        dense: whether the method serves networks with logits for every pixel.

    Raises:
        InputError: see :mod:`dfkd_lib.checking`.
    """
    trained = lending.copied(student, "student")
    lent, learning = (lending.normalizing(network, statistics) for network in (lending.borrowed(teacher), trained))
    lent, learning = freeze(runtime.prepare(lent)), runtime.prepare(learning)
    lent, learning = (
        lending.LogitsAlone(network).train(network.training)
        if checking.returns_out(network, image_shape, runtime)
        else network
        for network in (lent, learning)
    )
    n_classes, *per_pixel = checking.common_shape(lent, learning, image_shape, runtime, dense=dense)
    looks = checking.examine_teacher(lent, image_shape, runtime, gradient=asks_gradient, dense=dense)
    learns = checking.examine_student(learning, image_shape, runtime, dense=dense)
    overwriting = [network for network, found in ((lent, looks), (learning, learns)) if found.overwrites]
    hooks = [lending.spare_input(network) for network in overwriting]
    return Players(lent, learning, trained, n_classes, bool(per_pixel), hooks, [*looks.warnings])
