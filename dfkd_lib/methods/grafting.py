"""Progressive Network Grafting for Few-Shot Knowledge Distillation (NetGraft), arXiv 2012.04915.

A student with as many blocks as its teacher learns from K unlabelled images per class. It never learns as a whole:
one student block at a time is grafted into the frozen teacher, between two adapters where the widths differ, and the
loss is taken at the teacher's output (block grafting). Then the learned blocks are joined, front to back, until the
teacher is used up (network grafting). In the end the adapters are multiplied into the student's own layers.

Blocks are a dict from name to module, in the order in which they are applied. The first one is the *stem*, which the
student takes over from its teacher as it is; the others are grafted.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Adam

from ..data import ImageSet, crop_flip, minibatches
from ..errors import InputError, unknown
from ..losses import cross_entropy, kl
from ..models.adapters import absorb, adapter, affine, compose
from ..runtime import Runtime
from ..training.fit import fit
from ..training.modes import computes_the_same, still
from ..training.players import check_positive, freeze, restore_state, state_of, update

Blocks = dict[str, nn.Module]
STEM = "stem"
OBJECTIVES = ("grafting loss", "KD", "labels", "hints")


@dataclass(frozen=True)
class Settings:
    """The hyper-parameters of one run; the defaults are the published ones for K = 10 on CIFAR-10.

    Attributes:
        block_steps: updates of each block in stage 1; a single number holds for every block. Published: 100, 60 and
            60 epochs of 2 steps.
        network_steps: updates of each growth in stage 2; 100 epochs of 2 steps.
        batch_size: views per step; int(6.4 K).
        lr_block, lr_adapter: Adam of the student's block and of its adapters in stage 1; x K / 10.
        lr_network: Adam of everything in stage 2, whatever K.
    """

    block_steps: tuple[int, ...] = (200, 120, 120)
    network_steps: int = 200
    batch_size: int = 64
    lr_block: float = 2.5e-4
    lr_adapter: float = 2.5e-3
    lr_network: float = 1e-4

    def __post_init__(self) -> None:
        check_positive(self, "network_steps", "batch_size", "lr_block", "lr_adapter", "lr_network")
        if not self.block_steps or min(self.block_steps) < 1:
            raise InputError(f"block_steps must be numbers above 0, not {self.block_steps}")


def distance(student: Tensor, teacher: Tensor) -> Tensor:
    """l(z^s, z^t) = sum_n || z^s_n / |z^s_n| - z^t_n / |z^t_n| ||^2 = 2 sum_n (1 - cos(z^s_n, z^t_n)).

    The scale of a grafted network's logits is arbitrary and does not count. A sum over the batch, not a mean.

    Args:
        student, teacher: logits [B, C].

    Returns:
        Scalar in [0, 4 B].
    """
    return (F.normalize(student, dim=1) - F.normalize(teacher, dim=1)).square().sum()


def few_shot(images: ImageSet, k: int, *, seed: int) -> Tensor:
    """Indices int64 of K images per class, class by class. A larger K takes the same images and more.

    Raises:
        InputError: no labels to draw by, or a class with fewer than K images.
    """
    if images.labels is None or images.labels.ndim != 1:
        raise InputError(
            f"{images.name} has no class labels, so K images per class cannot be drawn; use all its images"
        )
    chosen = []
    for c in range(images.n_classes):
        members = (images.labels.cpu() == c).nonzero()[:, 0]
        if not 0 < k <= len(members):
            raise InputError(f"class {images.classes[c]!r} has {len(members)} images; K must be 1 to that, not {k}")
        stream = torch.Generator().manual_seed(seed * 1_000_003 + c)
        chosen.append(members[torch.randperm(len(members), generator=stream)[:k]])
    return torch.cat(chosen)


def cut(network: nn.Module, at: Sequence[str], x: Tensor) -> Blocks:
    """The blocks of a network whose children, applied in order, are its forward pass.

    Args:
        network: nn.Sequential, or any class whose named children in order give its output.
        at: names of the modules at which a block starts, such as ["features.4", "classifier"]; what comes before
            the first is the stem.
        x: images [B, C, H, W] on which the blocks are checked against the network.

    Raises:
        InputError: no such module, or the forward pass does more than apply the children.
    """
    pieces = list(_pieces("", network, at))
    names = [name for name, _ in pieces]
    for name in at:
        if name not in names:
            raise unknown("place to cut", name, names)
    if [*at] != sorted(set(at), key=names.index):
        raise InputError(f"cuts must be in the order of the network, each once, not {[*at]}")
    blocks: Blocks = {STEM: nn.Sequential()}
    for name, module in pieces:
        if name in at:
            blocks[name] = nn.Sequential()
        [*blocks.values()][-1].append(module)  # type: ignore[operator]
    for block in blocks.values():
        block.training = network.training
    if not computes_the_same(network, partial(chain, [*blocks.values()]), x):
        raise InputError(
            f"{type(network).__name__} does more in forward than apply its children in order, so it cannot be cut at "
            f"{', '.join(at)}; give the blocks yourself, a dict from name to module whose first key is {STEM!r}"
        )
    return blocks


def _pieces(name: str, module: nn.Module, at: Sequence[str]) -> Iterator[tuple[str, nn.Module]]:
    """The module, or its children where one of the cuts lies inside it."""
    inside = name == "" or any(place.startswith(name + ".") for place in at)
    if not inside or not list(module.children()):
        yield name, module
        return
    for child, inner in module.named_children():
        yield from _pieces(f"{name}.{child}".lstrip("."), inner, at)


def chain(blocks: Sequence[nn.Module], x: Tensor) -> Tensor:
    """x sent through blocks, one after another. A block may work in place: clone what is to be kept."""
    for block in blocks:
        x = block(x)
    return x


class Scion(nn.Module):
    """H_l = a^{s->t} o h_l o a^{t->s}: a student block between adapters, with the teacher's channels on both sides."""

    def __init__(self, name: str, body: nn.Module, a_in: nn.Module | None, a_out: nn.Module | None) -> None:
        super().__init__()
        self.name, self.body, self.a_in, self.a_out = name, body, a_in, a_out

    def forward(self, x: Tensor) -> Tensor:
        for part in (self.a_in, self.body, self.a_out):
            x = x if part is None else part(x)
        return x

    def adapters(self) -> list[nn.Parameter]:
        """The parameters of both adapters."""
        return [p for part in (self.a_in, self.a_out) if part is not None for p in part.parameters()]


def scions(teacher: Blocks, student: Blocks, x: Tensor) -> list[Scion]:
    """The student's blocks after the stem, with adapters where its channels differ from the teacher's.

    Args:
        x: images [B, C, H, W]; they show the shapes at every cut.

    Raises:
        InputError: numbers of blocks, sizes or classes differ, or an adapter could not be merged; the message names
            the block.
    """
    if len(teacher) != len(student) or len(teacher) < 2:
        raise InputError(
            f"the teacher has {len(teacher)} blocks and the student {len(student)}; cut both into the same number, "
            "2 or more"
        )
    made: list[Scion] = []
    f_t, f_s = _through(teacher[STEM], x, STEM), _through(next(iter(student.values())), x, STEM)
    pairs = list(zip(teacher.items(), student.items(), strict=True))[1:]
    for i, ((name, theirs), (_, ours)) in enumerate(pairs):
        _must_fit(name, "input", f_t, f_s)
        in_t, in_s = f_t.shape[1], f_s.shape[1]
        a_in = None if in_t == in_s else adapter(in_t, in_s, f_t.ndim).to(f_t)
        if a_in is not None:
            _mergeable(name, ours, f_t, a_in)
        f_t, f_s = _through(theirs, f_t, name), _through(ours, f_s, name)
        last = i == len(pairs) - 1
        if last and f_t.shape != f_s.shape:
            raise InputError(f"block {name!r} gives {_size(f_t)} in the teacher and {_size(f_s)} in the student; "
                             "the last block must give the same classes")  # fmt: skip
        _must_fit(name, "output", f_t, f_s)
        out_t, out_s = f_t.shape[1], f_s.shape[1]
        a_out = None if out_t == out_s else adapter(out_s, out_t, f_t.ndim).to(f_t)
        made.append(Scion(name, ours, a_in, a_out))
    return made


def _through(block: nn.Module, x: Tensor, name: str) -> Tensor:
    try:
        with still(block):
            return block(x)
    except RuntimeError as e:
        raise InputError(f"block {name!r} cannot read {_size(x)}: {' '.join(str(e).split())}") from None


def _must_fit(name: str, side: str, f_t: Tensor, f_s: Tensor) -> None:
    if f_t.ndim not in (2, 4) or f_t.shape[2:] != f_s.shape[2:]:
        raise InputError(
            f"block {name!r}: its {side} is {_size(f_t)} in the teacher and {_size(f_s)} in the student; an adapter "
            "changes the number of channels, not the size, so cut both networks at equal resolutions"
        )


def _mergeable(name: str, block: nn.Module, f_t: Tensor, a_in: nn.Module) -> None:
    matrix, _ = affine(a_in)
    bias = torch.linspace(-1, 1, len(matrix)).to(matrix)
    absorb(copy.deepcopy(block).cpu().double(), matrix, bias, f_t.cpu().double().contiguous(), name=name)


def _size(x: Tensor) -> str:
    return "x".join(map(str, x.shape[1:]))


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
    batch_size: int = 256,
) -> Views:
    """Views of all images: each image as it is, or `n_views` in all, shifted and mirrored at random.

    The stem is the same in teacher and student and never learns, so what it gives is kept in place of the pixels.
    """
    randomness = runtime.stream("grafting views")
    stem, *rest = teacher.values()
    n = max(n_views, len(images)) if n_views else len(images)
    parts = []
    for start in range(0, n, batch_size):
        x, y = images.batch(torch.arange(start, min(start + batch_size, n)) % len(images))
        x, y = x.to(runtime.device), y.to(runtime.device)
        if n_views:
            x = crop_flip(x, pad=pad, flip=flip, generator=randomness)
        with torch.no_grad(), runtime.autocast():
            inputs = stem(runtime.images(x))
            parts.append((inputs, chain(rest, inputs.clone()).to(runtime.dtype), y))
    inputs, logits, labels = (torch.cat(part) for part in zip(*parts, strict=True))
    return Views(inputs, logits, labels)


def accuracy(blocks: Sequence[nn.Module], views: Views, runtime: Runtime, batch_size: int = 500) -> float:
    """Share of views whose largest logit, after the blocks behind the stem, is at the label."""
    correct = torch.zeros((), dtype=torch.int64, device=views.labels.device)
    with still(nn.ModuleList(blocks)), runtime.autocast():
        for x, y in zip(views.inputs.split(batch_size), views.labels.split(batch_size), strict=True):
            correct += (chain(blocks, x.clone()).argmax(1) == y).sum()
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
        InputError: block_steps has neither one number nor one for each block.
    """
    n, steps = len(names), settings.block_steps
    if len(steps) not in (1, n):
        raise InputError(f"block_steps has {len(steps)} numbers for {n} blocks ({', '.join(names)}); give 1 or {n}")
    alone = [Phase(f"block {names[i]}", i, i + 1, steps[i % len(steps)]) for i in range(n)]
    grown = [Phase(f"up to {names[i]}", 0, i + 1, settings.network_steps) for i in range(1, n)]
    return alone + grown


class NetGraft:
    """Block grafting, then network grafting: one update per :meth:`step`, one of :attr:`phases` after another.

    Attributes:
        scions: the student's blocks between their adapters.
        phases: what learns when.
        n_steps: updates in all.
    """

    data_free: ClassVar[bool] = False
    PARTS = ("steps", "scions", "optimizer", "scaler")

    def __init__(
        self, teacher: Blocks, scions: Sequence[Scion], views: Views, settings: Settings, runtime: Runtime
    ) -> None:
        self.settings, self.runtime, self.views = settings, runtime, views
        self.teacher = [freeze(runtime.prepare(block)) for block in teacher.values()][1:]
        self.scions = runtime.prepare(nn.ModuleList(scions))
        self.phases = schedule([scion.name for scion in scions], settings)
        self.n_steps = sum(phase.n_steps for phase in self.phases)
        self.batches = minibatches(len(views.logits), settings.batch_size, seed=runtime.seed)
        self.scaler = runtime.scaler()
        self.optimizer: Adam | None = None
        self.steps = 0

    def step(self) -> dict[str, Tensor]:
        """One update of the scions of this phase; returns {"loss": l / B}, detached."""
        phase, is_new = self._phase_of(self.steps)
        if is_new:
            self._enter(phase)
        assert self.optimizer is not None
        rows = self.batches(self.steps).to(self.runtime.device)
        with self.runtime.autocast():
            z_s = chain(self.behind, chain(self.learning, self.inputs[rows])).to(self.runtime.dtype)
        loss = distance(z_s, self.views.logits[rows])
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
                self.inputs = torch.cat([chain(before, x.clone()) for x in self.views.inputs.split(256)])
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

    def state_dict(self) -> dict[str, Any]:
        """See :class:`dfkd_lib.training.fit.Method`."""
        return state_of(self, self.PARTS)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See :class:`dfkd_lib.training.fit.Method`."""
        if state["steps"]:
            self._enter(self._phase_of(state["steps"] - 1)[0])
        restore_state(self, self.PARTS, state)


def merge(stem: nn.Module, scions: Sequence[Scion], inputs: Tensor, *, naively: bool = False) -> nn.Sequential:
    """The student without adapters: each pair of them becomes one affine map, which the next block absorbs.

    Computed and checked in float64, then given back in the type and on the device of the inputs.

    Args:
        stem: of the teacher; the student gets a copy.
        inputs: a few of the stem's outputs, [B, c, H, W].
        naively: with scalar biases, wrong at the border; for comparison.

    Raises:
        InputError: a block that cannot absorb its adapter; the message names it.
    """
    merged = nn.Sequential()
    merged.add_module(STEM, copy.deepcopy(stem))
    x = inputs[:4].cpu().double().contiguous()
    junction: tuple[Tensor, Tensor] | None = None
    for scion in scions:
        block = copy.deepcopy(scion.body).cpu().double().eval()
        if scion.a_in is not None:
            junction = compose(junction, affine(scion.a_in)) if junction else affine(scion.a_in)
            block = absorb(block, *junction, x, name=scion.name, naively=naively)
        with torch.no_grad():
            x = block(x)
        junction = None if scion.a_out is None else affine(scion.a_out)
        merged.add_module(scion.name.replace(".", "_"), block.to(inputs.device, torch.float32))
    return merged.requires_grad_(True).eval()


@dataclass(frozen=True)
class WholeSettings:
    """How the baselines learn.

    Attributes:
        objective: "grafting loss" (the same distance, without grafting), "KD" (KL at `temperature`), "labels"
            (cross-entropy) or "hints" (FitNets: first the block outputs by regression, then KD).
        n_steps, batch_size, lr: updates, views per update, Adam.
        hint_share: share of the updates that are hints.
    """

    objective: str
    n_steps: int = 960
    batch_size: int = 64
    lr: float = 1e-3
    temperature: float = 4.0
    hint_share: float = 0.5

    def __post_init__(self) -> None:
        check_positive(self, "n_steps", "batch_size", "lr", "temperature")
        if self.objective not in OBJECTIVES:
            raise unknown("objective", self.objective, OBJECTIVES)


class Whole:
    """The baselines: the same student behind the same stem, on the same views, all of its blocks at once."""

    data_free: ClassVar[bool] = False
    PARTS = ("steps", "scions", "optimizer", "scaler")

    def __init__(
        self, teacher: Blocks, scions: Sequence[Scion], views: Views, settings: WholeSettings, runtime: Runtime
    ) -> None:
        self.settings, self.runtime, self.views = settings, runtime, views
        self.teacher = [freeze(runtime.prepare(block)) for block in teacher.values()][1:]
        self.scions = runtime.prepare(nn.ModuleList(scions)).train()
        first = scions[0].a_in
        self.student = [*([] if first is None else [first]), *(scion.body for scion in scions)]
        self.optimizer = Adam(self.scions.parameters(), settings.lr, fused=True)
        self.batches = minibatches(len(views.logits), settings.batch_size, seed=runtime.seed)
        self.scaler = runtime.scaler()
        self.n_steps, self.steps = settings.n_steps, 0

    def step(self) -> dict[str, Tensor]:
        """One update of the whole student; returns {"loss": ...}, detached."""
        rows = self.batches(self.steps).to(self.runtime.device)
        x, dtype = self.views.inputs[rows], self.runtime.dtype
        if self.settings.objective == "hints" and self.steps < self.settings.hint_share * self.n_steps:
            with self.runtime.autocast():
                loss = self.hint_loss(x)
        else:
            with self.runtime.autocast():
                z_s = chain(self.student, x).to(dtype)
            z_t = self.views.logits[rows]
            if self.settings.objective == "labels":
                loss = cross_entropy(z_s, self.views.labels[rows])
            elif self.settings.objective == "grafting loss":
                loss = distance(z_s, z_t) / len(rows)
            else:
                loss = kl(z_s, z_t, self.settings.temperature)
        update(self.optimizer, loss, self.scaler)
        self.steps += 1
        return {"loss": loss.detach()}

    def hint_loss(self, x: Tensor) -> Tensor:
        """sum_l mean || a_l(h_l) - t_l ||^2 over the blocks but the last: a_l, the out-adapter, is the regressor."""
        dtype = self.runtime.dtype
        ours = x if self.scions[0].a_in is None else self.scions[0].a_in(x)  # type: ignore[operator]
        losses = []
        for scion, block in zip(self.scions[:-1], self.teacher[:-1], strict=True):
            with torch.no_grad():
                x = block(x)
            ours = scion.body(ours)  # type: ignore[operator]
            guess = ours if scion.a_out is None else scion.a_out(ours)  # type: ignore[operator]
            losses.append(F.mse_loss(guess.to(dtype), x.to(dtype)))
        return torch.stack(losses).sum()

    def state_dict(self) -> dict[str, Any]:
        """See :class:`dfkd_lib.training.fit.Method`."""
        return state_of(self, self.PARTS)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See :class:`dfkd_lib.training.fit.Method`."""
        restore_state(self, self.PARTS, state)


def graft(
    teacher: nn.Module | Blocks,
    student: nn.Module | Blocks,
    images: ImageSet,
    *,
    at: Sequence[str] = (),
    at_student: Sequence[str] | None = None,
    settings: Settings | None = None,
    runtime: Runtime | None = None,
    n_views: int = 2048,
    pad: int = 4,
    flip: bool = True,
) -> nn.Sequential:
    """Graft a student of your own into a teacher of your own, on a few unlabelled images; no adapter is left.

    Args:
        teacher: trained; images [B, C, H, W] in [0, 1] -> logits. It is frozen and stays as it is.
        student: with the same resolutions at the cuts. Everything before the first cut is replaced by the teacher's.
        at: names of the modules at which a block starts, see :func:`cut`; `at_student` if the student's differ. Not
            needed for networks that are given as blocks.
        settings: `block_steps` has one number, or one per cut.
        n_views: shifted (by `pad`) and mirrored (if `flip`) views of the images that are made once.

    Returns:
        The merged student in eval mode: what :func:`merge` gives.

    Raises:
        InputError: the networks cannot be cut there or do not fit; the message names the block.
    """
    runtime = runtime or Runtime.choose()
    x = runtime.images(images.batch(range(min(2, len(images))))[0])
    cuts = {"teacher": at, "student": at_student or at}
    parts = {
        role: {name: runtime.prepare(block) for name, block in given.items()}
        if isinstance(given, dict)
        else cut(runtime.prepare(given), cuts[role], x)
        for role, given in (("teacher", teacher), ("student", student))
    }
    blocks = {name: freeze(block) for name, block in parts["teacher"].items()}
    made = scions(blocks, parts["student"], x)
    views = look(blocks, images, runtime, n_views=n_views, pad=pad, flip=flip)
    method = NetGraft(blocks, made, views, settings or Settings(block_steps=(200,)), runtime)
    fit(method, method.n_steps, name="grafting")
    return merge(blocks[STEM], made, views.inputs)
