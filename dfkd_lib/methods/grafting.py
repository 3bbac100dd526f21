"""Progressive Network Grafting for Few-Shot Knowledge Distillation (NetGraft), arXiv 2012.04915.

A student with as many blocks as its teacher learns from K unlabelled images per class. It never learns as a whole:
one student block at a time is grafted into the frozen teacher, between two adapters where the widths differ, and the
loss is taken at the teacher's output (block grafting). Then the learned blocks are joined, front to back, until the
teacher is used up (network grafting). In the end the adapters are multiplied into the student's own layers.

Both networks come as blocks, see :func:`dfkd_lib.models.chains.cut`. The first one is the *stem*, which the student
takes over from its teacher as it is; the others are grafted.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Adam

from ..data import ImageSet, crop_flip, minibatches
from ..errors import InputError
from ..models.chains import Blocks, through
from ..runtime import Runtime
from ..training.modes import still
from ..training.players import Resumable, check_positive, freeze, update
from .grafting_blocks import Scion


@dataclass(frozen=True)
class Settings:
    """The hyper-parameters of one run; the defaults are the published ones for K = 10 on CIFAR-10.

    Attributes:
        block_steps: updates of each block in stage 1; a single number holds for every block, (0,) leaves stage 1 out.
            Published: 100, 60 and 60 epochs of 2 steps.
        network_steps: updates of each growth in stage 2; 100 epochs of 2 steps.
        batch_size: views per step; int(6.4 K).
        lr_block, lr_adapter: Adam of the student's block and of its adapters in stage 1; x K / 10.
        lr_network: Adam of everything in stage 2, whatever K.
        normalise: whether logits are compared by their direction; False compares them as they are.
        adapters_learn: whether the adapters do; False keeps them as they were drawn.
    """

    block_steps: tuple[int, ...] = (200, 120, 120)
    network_steps: int = 200
    batch_size: int = 64
    lr_block: float = 2.5e-4
    lr_adapter: float = 2.5e-3
    lr_network: float = 1e-4
    normalise: bool = True
    adapters_learn: bool = True

    def __post_init__(self) -> None:
        check_positive(self, "network_steps", "lr_block", "lr_adapter", "lr_network")
        if self.batch_size < 2:
            raise InputError(f"batch_size must be at least 2 (batch normalisation), not {self.batch_size}")
        if not self.block_steps or (self.block_steps != (0,) and min(self.block_steps) < 1):
            raise InputError(f"block_steps must be numbers above 0, or (0,) for none, not {self.block_steps}")

    def for_shots(self, k: int) -> Settings:
        """The authors' rule, from what holds at K = 10: the rates of stage 1 times K / 10, the batch int(B K / 10)."""
        return replace(
            self,
            batch_size=batch_for_shots(self.batch_size, k),
            lr_block=self.lr_block * k / 10,
            lr_adapter=self.lr_adapter * k / 10,
        )


def batch_for_shots(batch_size: int, k: int) -> int:
    """int(B K / 10) views for K images per class, B at K = 10; at least 2, which batch normalisation needs.

    Raises:
        InputError: K below 1.
    """
    if k < 1:
        raise InputError(f"K must be 1 or more images per class, not {k}")
    return max(2, batch_size * k // 10)


def distance(student: Tensor, teacher: Tensor, *, normalise: bool = True) -> Tensor:
    """l(z^s, z^t) = sum_n || z^s_n / |z^s_n| - z^t_n / |z^t_n| ||^2 = 2 sum_n (1 - cos(z^s_n, z^t_n)).

    The scale of a grafted network's logits is arbitrary and does not count. A sum over the batch, not a mean.

    Args:
        student, teacher: logits [B, C].
        normalise: False gives the ablation sum_n || z^s_n - z^t_n ||^2.

    Returns:
        Scalar in [0, 4 B]; without normalisation, any >= 0.
    """
    if normalise:
        student, teacher = F.normalize(student, dim=1), F.normalize(teacher, dim=1)
    return (student - teacher).square().sum()


def few_shot(images: ImageSet, k: int, *, seed: int) -> Tensor:
    """Indices int64 of K images per class, class by class. A larger K takes the same images and more.

    Raises:
        InputError: no labels to draw by, or a class with fewer than K images.
    """
    if images.labels is None or images.labels.ndim != 1:
        raise InputError(
            f"{images.name} has no class labels, so K images per class cannot be drawn; use all its images"
        )
    labels, chosen = images.labels.cpu(), []
    for c in range(images.n_classes):
        members = (labels == c).nonzero()[:, 0]
        if not 0 < k <= len(members):
            raise InputError(f"class {images.classes[c]!r} has {len(members)} images; K must be 1 to that, not {k}")
        stream = torch.Generator().manual_seed(seed * 1_000_003 + c)
        chosen.append(members[torch.randperm(len(members), generator=stream)[:k]])
    return torch.cat(chosen)


@dataclass(frozen=True)
class Views:
    """Augmented views of a few images, and what the teacher makes of them: computed once, used by every step.

    Attributes:
        inputs: what the stem gives, [N, c, H, W].
        logits: of the teacher, [N, C].
        labels: int64 [N]; only the baseline that learns from labels reads them.
    """

    inputs: Tensor
    logits: Tensor
    labels: Tensor


def look(
    teacher: Blocks,
    images: ImageSet,
    runtime: Runtime,
    *,
    n_views: int = 0,
    pad: int = 4,
    flip: bool = True,
) -> Views:
    """Views of all images: each image as it is, or `n_views` in all, shifted and mirrored at random.

    The stem is the same in teacher and student and never learns, so what it gives is kept in place of the pixels.
    """
    randomness = runtime.stream("grafting views")
    stem, *rest = teacher.values()
    n = max(n_views, len(images)) if n_views else len(images)
    parts = []
    for start in range(0, n, 256):
        x, y = images.batch(torch.arange(start, min(start + 256, n)) % len(images))
        x, y = x.to(runtime.device), y.to(runtime.device)
        if n_views:
            x = crop_flip(x, pad=pad, flip=flip, generator=randomness)
        with torch.no_grad(), runtime.autocast():
            inputs = stem(runtime.images(x))
            parts.append((inputs, through(rest, inputs.clone()).to(runtime.dtype), y))
    inputs, logits, labels = (torch.cat(part) for part in zip(*parts, strict=True))
    return Views(inputs, logits, labels)


def accuracy(blocks: Sequence[nn.Module], views: Views, runtime: Runtime) -> float:
    """Share of views whose largest logit, after the blocks behind the stem, is at the label."""
    correct = torch.zeros((), dtype=torch.int64, device=views.labels.device)
    with still(nn.ModuleList(blocks)), runtime.autocast():
        for x, y in zip(views.inputs.split(500), views.labels.split(500), strict=True):
            correct += (through(blocks, x.clone()).argmax(1) == y).sum()
    return int(correct) / len(views.labels)


@dataclass(frozen=True)
class Phase:
    """Scions `start` to `stop` - 1 stand in the teacher's place and learn for `n_steps` updates."""

    name: str
    start: int
    stop: int
    n_steps: int


def schedule(names: Sequence[str], settings: Settings) -> list[Phase]:
    """Stage 1, a phase for each block alone; stage 2, a phase for each growth from the front.

    Raises:
        InputError: block_steps has neither one number nor one for each block, or nothing would learn.
    """
    n, steps = len(names), settings.block_steps
    if len(steps) not in (1, n):
        raise InputError(f"block_steps has {len(steps)} numbers for {n} blocks ({', '.join(names)}); give 1 or {n}")
    if n == 1 and steps == (0,):
        raise InputError("a single block learns in stage 1 alone; give block_steps above 0")
    alone = [Phase(f"block {names[i]}", i, i + 1, steps[i % len(steps)]) for i in range(n)] if any(steps) else []
    grown = [Phase(f"up to {names[i]}", 0, i + 1, settings.network_steps) for i in range(1, n)]
    return alone + grown


class NetGraft(Resumable):
    """Block grafting, then network grafting: one update per :meth:`step`, one of :attr:`phases` after another.

    Attributes:
        scions: the student's blocks between their adapters.
        phases: what learns when.
        n_steps: updates in all.
    """

    data_free: ClassVar[bool] = False
    PARTS: tuple[str, ...] = ("steps", "scions", "optimizer", "scaler")

    def __init__(
        self, teacher: Blocks, scions: Sequence[Scion], views: Views, settings: Settings, runtime: Runtime
    ) -> None:
        self.settings, self.runtime, self.views = settings, runtime, views
        self.teacher = [freeze(runtime.prepare(block)) for block in teacher.values()][1:]
        self.scions = runtime.prepare(nn.ModuleList(scions))
        for scion in scions:
            for parameter in scion.adapters():
                parameter.requires_grad_(settings.adapters_learn)
        self.phases = schedule([scion.name for scion in scions], settings)
        self.n_steps = sum(phase.n_steps for phase in self.phases)
        self.batches = minibatches(len(views.logits), settings.batch_size, seed=runtime.seed, device=runtime.device)
        self.scaler = runtime.scaler()
        self.optimizer: Adam | None = None
        self.steps = 0

    def step(self) -> dict[str, Tensor]:
        """One update of the scions of this phase; returns {"loss": l / B}, detached."""
        phase, is_new = self._phase_of(self.steps)
        if is_new:
            self._enter(phase)
        assert self.optimizer is not None
        rows = self.batches(self.steps)
        with self.runtime.autocast():
            z_s = through(self.behind, through(self.learning, self.inputs[rows])).to(self.runtime.dtype)
        loss = distance(z_s, self.views.logits[rows], normalise=self.settings.normalise)
        update(self.optimizer, loss, self.scaler)
        self.steps += 1
        return {"loss": loss.detach() / len(rows)}

    def _phase_of(self, step: int) -> tuple[Phase, bool]:
        """The phase that a step belongs to, and whether it is that phase's first."""
        starts = itertools.accumulate((phase.n_steps for phase in self.phases), initial=0)
        start, phase = max((s, i) for i, s in zip(range(len(self.phases)), starts, strict=False) if s <= step)
        return self.phases[phase], start == step

    def _enter(self, phase: Phase) -> None:
        """Graft this phase's scions in, with a new Adam. What the blocks before them give never changes: kept."""
        settings = self.settings
        before, self.behind = self.teacher[: phase.start], self.teacher[phase.stop :]
        self.learning = [*self.scions[phase.start : phase.stop]]
        if phase.start == 0:
            self.inputs = self.views.inputs
        else:
            with torch.no_grad(), self.runtime.autocast():
                self.inputs = torch.cat([through(before, x.clone()) for x in self.views.inputs.split(256)])
        for scion in self.learning:
            scion.train()
        if len(self.learning) > 1:
            groups = [{"params": [p for scion in self.learning for p in scion.parameters()], "lr": settings.lr_network}]
        else:
            (scion,) = self.learning
            groups = [{"params": [*scion.body.parameters()], "lr": settings.lr_block}]
            groups += [{"params": scion.adapters(), "lr": settings.lr_adapter}] if scion.adapters() else []
        self.optimizer = Adam(groups, fused=True)

    def grafted(self) -> list[nn.Module]:
        """The blocks behind the stem as the last step left them: T^B_l in stage 1, T^N_l in stage 2."""
        phase, _ = self._phase_of(max(0, self.steps - 1))
        return [*self.teacher[: phase.start], *self.scions[phase.start : phase.stop], *self.teacher[phase.stop :]]

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See :class:`dfkd_lib.training.fit.Method`."""
        if state["steps"]:
            self._enter(self._phase_of(state["steps"] - 1)[0])
        super().load_state_dict(state)
