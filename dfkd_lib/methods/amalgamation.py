"""Knowledge amalgamation: several trained classifiers become one student over all their classes, without labels.

Common ground of three papers: comprehensive classification (arXiv 1811.02796, :mod:`.comprehensive`), customised
students (arXiv 1908.07121, :mod:`.customised`) and common feature learning (arXiv 1906.10546,
:mod:`.common_features`). Every unlabelled image goes through every frozen teacher; their logits, side by side, are the
target over the union of the classes. What a paper adds to that is a :class:`FeatureTerm`: a loss between features.
:mod:`.ensembles` is what the students are measured by and against.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..data import ImageSet, crop_flip, minibatches
from ..errors import InputError, first_line, unknown
from ..losses import kl
from ..runtime import Runtime
from ..training.modes import still
from ..training.players import Resumable, adam, check_positive, freeze
from ..training.schedules import cosine, set_lr


@dataclass(frozen=True)
class Tasks:
    """Which outputs of the union belong to which teacher.

    Attributes:
        columns: for each teacher, the places of its classes among the union's outputs, in its own order.
    """

    columns: tuple[tuple[int, ...], ...]

    @classmethod
    def disjoint(cls, sizes: Sequence[int]) -> Tasks:
        """Teachers without a class in common: their outputs one after another."""
        starts = itertools.accumulate(sizes, initial=0)
        return cls(tuple(tuple(range(o, o + n)) for o, n in zip(starts, sizes, strict=False)))

    @classmethod
    def named(cls, classes: Sequence[Sequence[str]]) -> Tasks:
        """Teachers that may share classes: the union has each name once, in the order of first appearance.

        Raises:
            InputError: no list of names for each teacher, an empty one, or the same name twice in one teacher.
        """
        if isinstance(classes, str) or not isinstance(classes, Sequence) or not classes:
            raise InputError(f"classes must be a list of lists of names, one for each teacher, not {classes!r}")
        for t, names in enumerate(classes, 1):
            if isinstance(names, str) or not isinstance(names, Sequence) or not names:
                raise InputError(f"the classes of teacher {t} must be a list of names, not {names!r}")
            for name in names:
                if not isinstance(name, str):
                    raise InputError(f"the classes of teacher {t} must be names, not {name!r}")
                if names.count(name) > 1:
                    raise InputError(
                        f"teacher {t} has two classes {name!r}; outputs of one teacher need different names"
                    )
        place = {name: i for i, name in enumerate(dict.fromkeys(itertools.chain(*classes)))}
        return cls(tuple(tuple(place[name] for name in names) for names in classes))

    @property
    def n_classes(self) -> int:
        """Classes of the union, C."""
        return 1 + max(itertools.chain(*self.columns))

    def places(self, task: int, device: torch.device) -> Tensor:
        """The columns of a task as int64 on a device, the same tensor each time: it is brought there once."""
        return _on_device(self.columns[task], device)

    def holds(self, task: int, labels: Tensor) -> Tensor:
        """Whether labels (int64, of the union) belong to a task."""
        return torch.isin(labels, self.places(task, labels.device))


@lru_cache
def _on_device(columns: tuple[int, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # what inference makes could not be used where something learns
        return torch.tensor(columns, device=device)


def centred(logits: Tensor) -> Tensor:
    """z - mean_c z_c, image by image: the offset, which a teacher's own training never fixes, is gone."""
    return logits - logits.mean(1, keepdim=True)


def union(logits: Sequence[Tensor], tasks: Tasks, *, centre: bool = True) -> Tensor:
    """The target s_a = [z_1; ...; z_N]; a class that several teachers know gets the mean of their logits.

    Args:
        logits: [B, C_t] of each teacher.
        centre: centre each teacher's logits first; without, a constant added to one teacher changes the target.

    Returns:
        [B, C].
    """
    total = logits[0].new_zeros(len(logits[0]), tasks.n_classes)
    known = torch.zeros(tasks.n_classes, device=total.device, dtype=total.dtype)
    for t, z in enumerate(logits):
        at = tasks.places(t, total.device)
        total = total.index_add(1, at, centred(z) if centre else z)
        known = known.index_add(0, at, torch.ones_like(known[at]))
    return total / known


def decompose(target: Tensor, student: Tensor, tasks: Tasks) -> tuple[Tensor, Tensor]:
    """The soft-target loss in two parts: CE(p, q) = CE(P, Q) + sum_t P_t CE(p_{.|t}, q_{.|t}).

    P_t and Q_t are the masses of block t, so the first part decides between the teachers and the second within them.

    Args:
        target, student: logits over the union [B, C]; the tasks have no class in common.

    Returns:
        Both parts, means over the batch.
    """
    blocks = [(target[:, list(c)], student[:, list(c)]) for c in tasks.columns]
    log_mass = [torch.stack([pair[i].logsumexp(1) for pair in blocks], 1).log_softmax(1) for i in (0, 1)]
    mass = log_mass[0].exp()
    within = torch.stack([-(z.softmax(1) * s.log_softmax(1)).sum(1) for z, s in blocks], 1)
    return -(mass * log_mass[1]).sum(1).mean(), (mass * within).sum(1).mean()


@contextmanager
def tapped_at(network: nn.Module, places: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """While the context is open, a pass through the network leaves the outputs of the named modules in the dict.

    They are copies: an activation that works in place behind a place does not change them.

    Raises:
        InputError: no such module; the message names it.
    """
    modules = dict(network.named_modules())
    seen: dict[str, Tensor] = {}
    with ExitStack() as hooks:
        for place in places:
            if place not in modules:
                raise unknown(f"place in {type(network).__name__}", place, [name for name in modules if name])

            def keep(module: nn.Module, inputs: Any, output: Any, place: str = place) -> None:
                if not isinstance(output, Tensor):
                    kind = type(output).__name__
                    raise InputError(f"place {place!r} gives a {kind}, not one tensor; choose a module inside it")
                seen[place] = output.clone()

            hooks.callback(modules[place].register_forward_hook(keep).remove)
        yield seen


def look(network: nn.Module, x: Tensor, places: Sequence[str]) -> tuple[Tensor, list[Tensor]]:
    """One pass: logits [B, C], and the outputs of the named modules in their order."""
    with tapped_at(network, places) as seen:
        logits = network(x)
    for place in places:
        if place not in seen:
            raise InputError(f"{type(network).__name__} does not call its module {place!r}; choose another place")
    return logits, [seen[place] for place in places]


def features_at(network: nn.Module, x: Tensor, places: Sequence[str]) -> list[Tensor]:
    """The outputs of the named modules for images x, brought to the network's type and device; it stays as it is."""
    weight = next(network.parameters(), x)
    with still(network):
        return look(network, x.to(weight.device, weight.dtype, copy=True), places)[1]


class FeatureTerm(nn.Module, ABC):
    """A loss between the student's features and all teachers', with weights of its own that are thrown away.

    Attributes:
        places: names of the modules whose outputs are its features: of the student first, then of each teacher.
        weights: factor of each term that :meth:`forward` returns.
    """

    places: Sequence[Sequence[str]]
    weights: dict[str, float]

    @abstractmethod
    def forward(self, f_s: list[Tensor], f_t: list[list[Tensor]]) -> dict[str, Tensor]:
        """Terms by name, scalars.

        Args:
            f_s: the student's features at its places.
            f_t: of each teacher, its features at its places; without gradient.
        """


@dataclass(frozen=True)
class Settings:
    """How a student learns from several teachers.

    Attributes:
        n_steps: updates; the learning rates fall to 0 along half a cosine.
        batch_size: images per update.
        lr: Adam of the student.
        lr_term: Adam of a feature term's own weights.
        weight_decay: of both Adams. 1e-4 in the authors' engine for comprehensive classification and in their code
            for common features; their code for customised students names none.
        centre: whether the teachers' logits are centred before they are put side by side; the authors do not.
        pad: largest shift of an image in pixels.
        flip: whether images are mirrored at random.
    """

    n_steps: int
    batch_size: int = 64
    lr: float = 1e-3
    lr_term: float = 1e-3
    weight_decay: float = 0.0
    centre: bool = True
    pad: int = 0
    flip: bool = False

    def __post_init__(self) -> None:
        check_positive(self, "n_steps", "lr", "lr_term")
        if not self.weight_decay >= 0:
            raise InputError(f"weight_decay must be 0 or more, not {self.weight_decay!r}")
        if self.batch_size < 2:
            raise InputError(f"batch_size must be at least 2 (batch normalisation), not {self.batch_size}")


class Views:
    """The stream of training images: batches without labels, shifted and mirrored as the settings say."""

    def __init__(self, images: ImageSet, settings: Settings, runtime: Runtime, name: str, n: int | None = None) -> None:
        self.images, self.settings, self.runtime = images.to(runtime.device), settings, runtime
        self.order = minibatches(len(images), n or settings.batch_size, seed=runtime.seed, device=runtime.device)
        self.randomness = runtime.stream(name)

    def batch(self, step: int) -> Tensor:
        """Images of a step [B, C, H, W]; the draws of the augmentation come from :attr:`randomness`."""
        x, _ = self.images.batch(self.order(step))
        if self.settings.pad or self.settings.flip:
            x = crop_flip(x, pad=self.settings.pad, flip=self.settings.flip, generator=self.randomness)
        return self.runtime.images(x)


def descend(loss: Tensor, optimizers: Sequence[tuple[Optimizer, float]], scaler: torch.amp.GradScaler) -> None:
    """One backward pass and a step of every optimiser at its learning rate."""
    for optimizer, lr in optimizers:
        set_lr(optimizer, lr)
        optimizer.zero_grad(set_to_none=True)
    scaler.scale(loss).backward()
    for optimizer, _ in optimizers:
        scaler.step(optimizer)
    scaler.update()


class Amalgam(Resumable):
    """A student learns the union of its teachers, from soft targets and, where given, from a feature term.

    Without a term this is plain distillation on concatenated logits.
    """

    data_free: ClassVar[bool] = False
    PARTS: tuple[str, ...] = ("student", "optimizer", "scaler", "randomness", "steps")

    def __init__(
        self,
        teachers: Sequence[nn.Module],
        student: nn.Module,
        images: ImageSet,
        tasks: Tasks,
        settings: Settings,
        runtime: Runtime,
        term: FeatureTerm | None = None,
    ) -> None:
        self.settings, self.runtime, self.tasks, self.n_steps = settings, runtime, tasks, settings.n_steps
        self.teachers = [freeze(runtime.prepare(teacher)) for teacher in teachers]
        self.student = runtime.prepare(student)
        self.student.train()  # whose own train() may return nothing
        self.views = Views(images, settings, runtime, "amalgamation views")
        self.randomness = self.views.randomness
        x = runtime.images(images.batch(range(1))[0])
        must_fit(self.teachers, self.student, tasks, x)
        for t in range(len(teachers)):
            tasks.places(t, x.device)  # brought there now, not in the first step
        self.optimizer = adam(self.student, settings.lr, weight_decay=settings.weight_decay)
        self.scaler, self.steps = runtime.scaler(), 0
        self.term = None if term is None else runtime.prepare(term).train()
        self.places: list[list[str]] = (
            [[] for _ in range(len(teachers) + 1)] if term is None else [list(p) for p in term.places]
        )
        if self.term is not None:
            self.term_optimizer = adam(self.term, settings.lr_term, weight_decay=settings.weight_decay)
            self.PARTS += ("term", "term_optimizer")
            self._must_fit(self.term, x)

    def _must_fit(self, term: FeatureTerm, x: Tensor) -> None:
        networks = [self.student, *self.teachers]
        if len(self.places) != len(networks):
            raise InputError(f"the feature term has {len(self.places)} lists of places for {len(networks)} networks")
        f_s, *f_t = [features_at(network, x, at) for network, at in zip(networks, self.places, strict=True)]
        try:
            with torch.no_grad(), self.runtime.autocast():
                term(f_s, f_t)
        except (RuntimeError, ValueError) as e:
            raise InputError(f"the feature term was not made for these networks: {first_line(e)}") from e

    def step(self) -> dict[str, Tensor]:
        """One update of the student and of the term; returns {"soft targets": ..., and the terms}, detached."""
        settings, dtype = self.settings, self.runtime.dtype
        x = self.views.batch(self.steps)
        with self.runtime.autocast():
            with torch.no_grad():
                seen = [look(teacher, x, at) for teacher, at in zip(self.teachers, self.places[1:], strict=True)]
            s, f_s = look(self.student, x, self.places[0])
            terms = self.term(f_s, [f for _, f in seen]) if self.term is not None else {}
        target = union([z.to(dtype) for z, _ in seen], self.tasks, centre=settings.centre)
        soft = kl(s.to(dtype), target)
        loss, weights = soft, {} if self.term is None else self.term.weights
        for name, value in terms.items():
            loss = loss + weights[name] * value
        fall = cosine(self.steps, self.n_steps)
        optimizers = [(self.optimizer, fall * settings.lr)]
        if self.term is not None:
            optimizers.append((self.term_optimizer, fall * settings.lr_term))
        descend(loss, optimizers, self.scaler)
        self.steps += 1
        return {name: value.detach() for name, value in ({"soft targets": soft} | terms).items()}


def must_fit(teachers: Sequence[nn.Module], student: nn.Module, tasks: Tasks, x: Tensor) -> None:
    """Refuse networks whose outputs are not the classes they are said to have.

    Raises:
        InputError: naming the network, its outputs and the outputs it should have.
    """
    if len(teachers) != len(tasks.columns):
        raise InputError(f"there are {len(teachers)} teachers and {len(tasks.columns)} lists of classes; give one each")
    wanted = [len(columns) for columns in tasks.columns]
    named = [(f"teacher {t + 1}", teacher, n) for t, (teacher, n) in enumerate(zip(teachers, wanted, strict=True))]
    for name, network, n in [*named, ("the student", student, tasks.n_classes)]:
        try:
            with still(network):
                z = network(x)
        except (RuntimeError, ValueError) as e:
            size = "x".join(map(str, x.shape[1:]))
            raise InputError(f"{name} cannot read images of {size}: {' '.join(str(e).split())}") from None
        if z.ndim != 2 or z.shape[1] != n:
            raise InputError(f"{name} gives {'x'.join(map(str, z.shape[1:]))} outputs for {n} classes; they must agree")
