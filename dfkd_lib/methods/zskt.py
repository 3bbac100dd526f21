"""ZSKT ("Zero-shot Knowledge Transfer via Adversarial Belief Matching"), arXiv 1905.09768.

The generator moves its images to where student and teacher believe different things, and the student follows:

    L_G = -KL(T(x) || S(x)),    L_S = KL(T(x) || S(x)) + beta sum_l mean (a_l^T - a_l^S)^2,    x = G(z).

One outer iteration draws one z, takes one generator step on it, makes the images of z anew and takes ten student
steps on these: the student catches up with the generator before it moves again. Both gradients are clipped. The
attention maps a_l, where some layers of either network look, are optional.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .. import losses
from ..errors import InputError, unknown
from ..runtime import Runtime
from ..training.modes import evaluating
from ..training.players import check_positive, update
from ..training.replay import Replay
from ..training.schedules import set_lr
from .generative import GenerativeSettings, GeneratorDistiller, check_weights


@dataclass(frozen=True)
class Settings(GenerativeSettings):
    """The hyper-parameters of one run; defaults are those of the authors' script for CIFAR-10.

    Their KL is averaged over the classes as well, so it is K times smaller than ours. Adam does not mind; `clip` is
    in our scale, 5 times K = 10. They name no betas; torch's own are taken. Their attention maps are left out by
    default, because the layers' names go with the networks.

    Attributes:
        same_z: all student steps of an iteration are taken on the images of one z, the generator's own, for which
            the teacher is asked once; False draws fresh noise for each, as the toolbox does (with kd_steps 5 and
            samples_in_eval).
        generator_decays: the generator's learning rate follows the student's cosine, as in the authors' code; False
            keeps it constant, as in the toolbox.
        student_trains_in_generation: the student's batch-norm stays in train mode in the generator's step, as in the
            authors' code; False puts it into eval mode there, as the toolbox does.
        clip: largest Euclidean norm of either gradient; math.inf clips nothing, as in the toolbox.
        attention_layers, student_attention_layers: names of the layers (see `named_modules`) whose outputs
            [B, C, H, W] are compared, pair by pair; the student's default to the teacher's names. The authors take
            the outputs of the three groups of a Wide-ResNet, "network.groups.0" and so on here, and say that
            leaving them out costs two points.
        beta: weight of the attention term beside the KL in the authors' scale; beside ours it counts K-fold.
    """

    batch_size: int = 128
    kd_steps: int = 10
    optimizer: str = "adam"
    lr_student: float = 2e-3
    generator: str = "generator_zskt"
    latent_dim: int = 100
    betas: tuple[float, float] = (0.9, 0.999)
    samples_in_eval: bool = False
    same_z: bool = True
    generator_decays: bool = True
    student_trains_in_generation: bool = True
    clip: float = 50.0
    attention_layers: tuple[str, ...] = ()
    student_attention_layers: tuple[str, ...] = ()
    beta: float = 250.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "clip")
        check_weights(self, "beta")
        ours, theirs = len(self.student_attention_layers), len(self.attention_layers)
        if ours and ours != theirs:
            raise InputError(
                f"student_attention_layers names {ours} layers and attention_layers {theirs}; name one of the "
                "student's for each of the teacher's"
            )


PRESETS: dict[str, dict[str, Any]] = {
    "digits": {
        "batch_size": 64, "kd_steps": 2, "optimizer": "sgd", "lr_student": 0.1, "generator": "generator_a",
        "latent_dim": 64, "ngf": 16, "lr_generator": 5e-4, "betas": (0.5, 0.999), "same_z": False,
        "generator_decays": False, "student_trains_in_generation": False, "clip": 5.0,
    },
    "mnist": {
        "batch_size": 64, "generator": "generator_zskt", "ngf": 16, "optimizer": "sgd", "lr_student": 0.05,
        "same_z": False, "kd_steps": 5,
    },
    # Half the steps, so that 8,000 updates still move the generator 1,600 times (the authors': 80,000). Fresh noise for
    # each: on one z the row ended beside RANDOM's; that fresh noise helps is known from MNIST alone.
    "cifar10": {"batch_size": 256, "kd_steps": 5, "same_z": False},
}  # fmt: skip
"""Our settings at each small scale, as changes of the defaults."""


def generation_loss(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """L_G, what the generator descends.

    Args:
        student, teacher: logits [B, K] on one generated batch.
    """
    return -losses.kl(student, teacher, temperature)


def attention_loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Sum over layers of mean (a^T - a^S)^2, the mean over images and places.

    Args:
        student, teacher: attention maps [B, H W] of as many layers.
    """
    return torch.stack([(t - s).square().mean() for s, t in zip(student, teacher, strict=True)]).sum()


@dataclass(frozen=True)
class Lesson:
    """Images [B, C, H, W] and what the teacher says to them: logits [B, K], one attention map [B, H W] per layer."""

    images: Tensor
    logits: Tensor
    attention: list[Tensor]

    def tensors(self) -> list[Tensor]:
        """All of them."""
        return [self.images, self.logits, *self.attention]


class ZSKT(GeneratorDistiller):
    """One call takes a generator step, then the student takes `kd_steps` updates on the images of the same z.

    Args:
        teacher, student, image_shape, runtime: see :class:`dfkd_lib.methods.distiller.Distiller`.

    Raises:
        InputError: the generator cannot make images of this shape; a layer for the attention maps does not exist,
            or those of a pair do not see as many places.
    """

    def __init__(
        self, teacher: nn.Module, student: nn.Module, image_shape: Sequence[int], settings: Settings, runtime: Runtime
    ) -> None:
        super().__init__(teacher, student, image_shape, settings, runtime)
        self.settings = settings
        names = settings.attention_layers
        self.teacher_layers = [_layer(self.teacher, name, "teacher") for name in names]
        self.student_layers = [
            _layer(self.student, name, "student") for name in settings.student_attention_layers or names
        ]
        self._maps_must_match()
        # Noise and lesson live within one outer iteration only, so no checkpoint needs them.
        self.z = torch.zeros(settings.batch_size, settings.latent_dim, device=runtime.device, dtype=runtime.dtype)
        self.lesson: Lesson | None = None
        self.lecture = Replay(self.lecture_step, runtime, [self.noise])

    def synthesize(self) -> dict[str, Tensor]:
        """The generator's updates; returns "generator loss" at the last of them."""
        if self.settings.generator_decays:
            set_lr(self.generator_optimizer, self.settings.lr_generator * self.decay())
        self.student.train(self.settings.student_trains_in_generation)
        if not self.settings.same_z:
            return self.generate()
        self.z.copy_(self.fresh_noise())
        metrics = self.generate()
        new = self.lecture()
        if self.lesson is None:
            self.lesson = Lesson(*new)
        torch._foreach_copy_(self.lesson.tensors(), Lesson(*new).tensors())
        self.budget.teacher_passes += self.settings.batch_size
        self.budget.images += self.settings.batch_size
        return metrics

    def generation_step(self) -> dict[str, Tensor]:
        """See :meth:`GeneratorDistiller.generation_step`; with `same_z`, on the noise of the iteration."""
        with self.runtime.autocast():
            x = self.generator(self.z if self.settings.same_z else self.fresh_noise())
            t, _ = self.look(x)
            s = self.opinion(x)
        loss = generation_loss(s, t, self.settings.temperature)
        self.descend(loss)
        return {"generator loss": loss.detach()}

    def descend(self, loss: Tensor) -> None:
        """One clipped update of the generator."""
        update(self.generator_optimizer, loss, self.generator_scaler, self.settings.clip)

    def sample(self, n: int) -> Tensor:
        """See :meth:`GeneratorDistiller.sample`; with `same_z`, the images of the last z, as they are now."""
        return self.images_of(self.z) if self.settings.same_z else super().sample(n)

    def imitation_step(self) -> Tensor:
        """One clipped student update on L_S; returns the loss, detached."""
        settings = self.settings
        lesson = self.lesson if settings.same_z and self.lesson else Lesson(*self.lecture_step())
        with self.runtime.autocast(), attended(self.student_layers) as attention:
            s = self.opinion(lesson.images)
        loss = losses.kl(s, lesson.logits, settings.temperature)
        if attention:
            loss = loss + settings.beta * self.n_classes * attention_loss(attention, lesson.attention)
        update(self.student_optimizer, loss, self.student_scaler, settings.clip)
        return loss.detach()

    def count_update(self) -> None:
        """See :meth:`GeneratorDistiller.count_update`; with `same_z`, the lecture has counted images and passes."""
        if self.settings.same_z:
            self.budget.student_updates += 1
        else:
            super().count_update()

    @torch.no_grad()
    def lecture_step(self) -> tuple[Tensor, Tensor, list[Tensor]]:
        """The next images, and the teacher's answer to them: the fields of a :class:`Lesson`."""
        x = self.runtime.images(self.sample(self.settings.batch_size))
        with self.runtime.autocast(), attended(self.teacher_layers) as attention:
            t, _ = self.look(x)
        return x, t, attention

    def _maps_must_match(self) -> None:
        x = self.runtime.images(torch.full((2, *self.image_shape), 0.5, device=self.runtime.device))
        with evaluating(self.student), self.runtime.autocast():
            with attended(self.teacher_layers) as theirs:
                self.teacher(x)
            with attended(self.student_layers) as ours:
                self.student(x)
        for name, t, s in zip(self.settings.attention_layers, theirs, ours, strict=True):
            if t.shape != s.shape or not len(t):
                raise InputError(
                    f"attention layer {name!r} of the teacher sees {t.shape[1]} places and its partner in the "
                    f"student {s.shape[1]}; pair layers of one resolution that the networks use"
                )


@contextmanager
def attended(layers: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """While the context is open, the list that it yields holds the attention map of each layer's last output.

    The maps stand in the order of `layers`, whichever is visited first; of a layer not visited, [0, 0].
    """
    maps = [torch.empty(0, 0, device="cpu")] * len(layers)

    def note(at: int, module: nn.Module, inputs: Any, output: Tensor) -> None:
        if output.ndim != 4:
            raise InputError(f"attention needs outputs [B, C, H, W], not {list(output.shape)}; name other layers")
        maps[at] = losses.attention_map(output if output.dtype == torch.float64 else output.float())

    hooks = [layer.register_forward_hook(partial(note, at)) for at, layer in enumerate(layers)]
    try:
        yield maps
    finally:
        for hook in hooks:
            hook.remove()


def _layer(network: nn.Module, name: str, who: str) -> nn.Module:
    layers = {known: layer for known, layer in network.named_modules() if known}
    if name not in layers:
        raise unknown(f"layer of the {who}", name, layers)
    return layers[name]
