"""What DAFL, ZSKT and DFQ share: a generator that is trained all along and makes fresh images for the student."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import models
from ..errors import InputError
from ..models.normalize import pixel_statistics
from ..runtime import Runtime
from ..training.players import adam, check_positive, recordable, update
from ..training.replay import Replay
from .distiller import Distillation, Distiller


@dataclass(frozen=True)
class GenerativeSettings(Distillation):
    """The generator's share of the settings; defaults are those of the scripts of CMI's toolbox for CIFAR.

    Attributes:
        generator: one of :func:`dfkd_lib.models.build_generator`. The toolbox gives all these methods its large one,
            whose sigmoid ends it; those of DAFL's and ZSKT's authors, "generator_dafl" and "generator_zskt", end in a
            batch normalisation without weights.
        latent_dim, ngf: n_z and the unit of width of the generator.
        generator_steps: updates of the generator per outer iteration, each on `batch_size` images.
        lr_generator, betas: Adam of the generator.
        samples_in_eval: the generator's batch-norm uses its running statistics when it makes images for the
            student, as in the toolbox; False takes those of the batch, as in training.
    """

    generator: str = "toolbox_large"
    latent_dim: int = 256
    ngf: int = 64
    generator_steps: int = 1
    lr_generator: float = 1e-3
    betas: tuple[float, float] = (0.5, 0.999)
    samples_in_eval: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "latent_dim", "ngf", "generator_steps", "lr_generator")


class GeneratorDistiller(Distiller):
    """A method whose student learns on fresh images of a generator, none of them stored or augmented.

    A subclass implements :meth:`synthesize`.

    Attributes:
        generator: noise [B, latent_dim] -> images in [0, 1], those of generator_a in and about it.
    """

    PARTS: tuple[str, ...] = (*Distiller.PARTS, "generator", "generator_optimizer", "generator_scaler")

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        image_shape: Sequence[int],
        settings: GenerativeSettings,
        runtime: Runtime,
    ) -> None:
        super().__init__(teacher, student, image_shape, settings, runtime)
        self.making = settings
        channels, height, width = self.image_shape
        mean, std = pixel_statistics(teacher, channels)
        generator = models.build_generator(
            settings.generator,
            latent_dim=settings.latent_dim,
            image_shape=(channels, height, width),
            mean=mean,
            std=std,
            ngf=settings.ngf,
        )
        self.generator = runtime.prepare(generator).train()
        self.generator_optimizer = recordable(adam(self.generator, settings.lr_generator, settings.betas), runtime)
        self.generator_scaler = runtime.scaler()
        self.generation = Replay(self.generation_step, runtime, [self.noise])

    def fresh_noise(self, n: int | None = None) -> Tensor:
        """z ~ N(0, I), [n, latent_dim]; n defaults to the batch size."""
        return self.draw_noise(n or self.making.batch_size, self.making.latent_dim)

    @abstractmethod
    def generation_step(self) -> dict[str, Tensor]:
        """One update of the generator, a :class:`~..training.replay.Replay`'s work; returns its metrics, detached."""

    def generate(self, *key: bool) -> dict[str, Tensor]:
        """All updates of the generator in this iteration; returns the metrics of the last."""
        self.generator.train()
        for _ in range(self.making.generator_steps):
            metrics: dict[str, Tensor] = self.generation(*key)
            self.budget.teacher_passes += self.making.batch_size
        return metrics

    def count_update(self) -> None:
        """See :meth:`Distiller.count_update`; the images of each update are new."""
        super().count_update()
        self.budget.images += self.making.batch_size

    def descend(self, loss: Tensor) -> None:
        """One update of the generator."""
        update(self.generator_optimizer, loss, self.generator_scaler)

    def sample(self, n: int) -> Tensor:
        """See :meth:`Distiller.sample`: n new images, in the generator's mode for samples."""
        return self.images_of(self.fresh_noise(n))

    @torch.no_grad()
    def images_of(self, z: Tensor) -> Tensor:
        """What the student is shown for the noise z."""
        self.generator.train(not self.making.samples_in_eval)
        with self.runtime.autocast():
            return self.generator(z).to(self.runtime.dtype)

    @torch.no_grad()
    def pictures(self, n: int) -> Tensor:
        """See :meth:`Distiller.pictures`: the same noise each time, as the student would be shown it."""
        z = torch.randn(
            (max(n, self.making.batch_size), self.making.latent_dim),
            generator=self.runtime.stream("pictures"),
            device=self.runtime.device,
            dtype=self.runtime.dtype,
        )
        # On a copy, whose running statistics nobody will miss; the whole batch, whose statistics may count.
        painter = copy.deepcopy(self.generator).train(not self.making.samples_in_eval)
        with self.runtime.autocast():
            return painter(z)[:n].to(self.runtime.dtype)


def check_weights(settings: GenerativeSettings, *names: str) -> None:
    """Refuse weights of loss terms below 0, which would turn a term round.

    Raises:
        InputError: naming the setting and its value.
    """
    for name in names:
        if not getattr(settings, name) >= 0:
            raise InputError(f"{name} must be 0 (term left out) or more, not {getattr(settings, name)!r}")
