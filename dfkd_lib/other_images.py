"""MosaicKD on pictures of other things than the teacher knows: a person's folder in the place of the book's sets."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .data import ImageSet
from .methods import mosaickd
from .models import build_discriminator, build_generator
from .own_images import checked
from .runtime import Runtime
from .settings import made

_LIKE_DIGITS = {"latent_dim": 32, "ngf": 16, "ndf": 16, "batch_size": 64, "lr_generator": 3e-3,
                "lr_discriminator": 3e-3, "flip": False}  # fmt: skip
_PER_PIXEL = {"batch_size": 16, "ngf": 32, "ndf": 32, "weight_decay": 5e-4}  # as the chapter's runs on street scenes


@dataclass(frozen=True)
class Settings(mosaickd.Settings):
    """Those of :class:`dfkd_lib.methods.mosaickd.Settings`, the width of the players that are built, and the length.

    Attributes:
        ngf, ndf: unit of the channel widths of generator and discriminator.
        patch: the discriminator's name, see :func:`dfkd_lib.models.build_discriminator`.
        n_updates: student updates.
    """

    ngf: int = 64
    ndf: int = 64
    patch: str = "patch10"
    n_updates: int = 0


def settings_for(
    preset: str, n_updates: int | None, image_shape: tuple[int, int, int], given: Mapping[str, Any], *, dense: bool
) -> Settings:
    """The settings of a run.

    Args:
        n_updates: at least 1; None takes the preset's number.
        image_shape: (C, H, W); patches have 5 pixels for images below 16, 22 for networks that name a class for every
            pixel of 64 or more, else 10.
        given: other fields of :class:`Settings`.
        dense: whether the networks name a class for every pixel.

    Raises:
        InputError: unknown preset or setting, or a value that cannot be.
    """
    n_updates = checked("mosaickd", preset, n_updates, given, Settings, "n_steps")
    side = min(image_shape[1:])
    ours: dict[str, Any] = {"patch": "patch5" if side < 16 else "patch22" if dense and side >= 64 else "patch10"}
    ours |= _LIKE_DIGITS if preset in ("digits", "mnist") else {}
    ours |= _PER_PIXEL if dense else {}
    chosen = made(Settings, {**ours, **given, "n_updates": n_updates})
    n_steps = math.ceil(n_updates / chosen.kd_steps)
    return made(
        Settings,
        {**ours, **given, "n_updates": n_updates, "n_steps": n_steps, "kd_steps": math.ceil(n_updates / n_steps)},
    )


class OnOtherPictures(mosaickd.MosaicKD):
    """The game with players of its own, for pictures of any things.

    Args:
        teacher, student: images [B, C, H, W] in [0, 1] -> logits [B, K] or [B, K, H, W].
        images: the pictures, of the size that the networks are for.
    """

    def __init__(
        self, teacher: nn.Module, student: nn.Module, images: ImageSet, settings: Settings, runtime: Runtime
    ) -> None:
        shape = images.image_shape
        pixels: dict[str, Any] = {"image_shape": shape, "mean": (0.5,) * shape[0], "std": (0.25,) * shape[0]}
        generator = build_generator("deep", latent_dim=settings.latent_dim, ngf=settings.ngf, **pixels)
        discriminator = build_discriminator(settings.patch, ndf=settings.ndf, **pixels)
        super().__init__(teacher, student, generator, discriminator, images, settings, runtime)

    def watch(self, n: int = 16) -> dict[str, Tensor]:
        """See :meth:`.MosaicKD.watch`, for at most as many images as there are in a batch."""
        return super().watch(min(n, self.settings.batch_size))
