"""A zoo of networks, one encoder trained on many tasks, and what each is worth to each task: measured, not predicted.

The ground truth of :mod:`.attribution` and :mod:`.depara`. For every pair (s, t) the encoder of s is frozen and a small
readout is trained on a few labelled images of t; readouts of all sources learn at once, from the same images in the
same order and from the same first weights. Encoders and measurements are kept in the cache, as teachers are.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..data import ImageSet, minibatches
from ..errors import InputError, unknown
from ..files import lock
from ..lending import fingerprint
from ..locations import cache_root
from ..models.resnet import ResidualBlock
from ..models.small import conv_bn_relu
from ..runtime import Runtime
from ..training import checkpoints
from ..training.fit import fit
from ..training.modes import still
from ..training.players import Resumable, adam, check_positive, freeze, update
from .zoo_tasks import CLASSES, NOT_ASKED, PIXELS, Grey, Heads, Task, tasks

SECOND_SEED, RANDOM, SHUFFLED = "class-all again", "random", "shuffled labels"
CONTROLS = (SECOND_SEED, RANDOM, SHUFFLED)
Z_CHANNELS = 16


def _plain(channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, Z_CHANNELS, 3, padding=1), nn.ReLU(),
    )  # fmt: skip


def _residual(channels: int, stem: int, widths: Sequence[int], blocks: int) -> nn.Sequential:
    network, width = nn.Sequential(conv_bn_relu(channels, stem)), stem
    for stage, next_width in enumerate(widths):
        for block in range(blocks):
            network.append(ResidualBlock(width, next_width, 2 if stage and not block else 1))
            width = next_width
    return network.append(conv_bn_relu(width, Z_CHANNELS, 1))


ENCODERS = {
    "plain": _plain,
    "residual": lambda channels: _residual(channels, 8, (8, 16, 32), 1),
    "residual-wide": lambda channels: _residual(channels, 32, (32, 64, 128), 2),
}


@dataclass(frozen=True)
class Training:
    """How a member of the zoo is trained.

    Attributes:
        encoder: name in `ENCODERS`: images [B, C, H, W] in [0, 1] -> z [B, 16, H/2 or H/4, ...], 0 or more. "plain"
            halves the sides, for 8x8; the others divide them by 4.
        n_steps, batch_size: updates, and images in each.
        lr: of Adam, constant.
        head_width: hidden units of the head, which is thrown away.
    """

    encoder: str = "plain"
    n_steps: int = 200
    batch_size: int = 64
    lr: float = 2e-3
    head_width: int = 256

    def __post_init__(self) -> None:
        check_positive(self, "n_steps", "batch_size", "lr", "head_width")
        if self.encoder not in ENCODERS:
            raise unknown("encoder", self.encoder, ENCODERS)


@dataclass(frozen=True)
class Readout:
    """How transfers are measured.

    Attributes:
        n_images: labelled images of the target, others in each repeat.
        n_repeats: measurements of everything, each on images of its own.
        n_steps, batch_size, lr, weight_decay: Adam.
        width: hidden units.
    """

    n_images: int = 200
    n_repeats: int = 2
    n_steps: int = 150
    batch_size: int = 64
    lr: float = 2e-3
    weight_decay: float = 1e-4
    width: int = 64

    def __post_init__(self) -> None:
        check_positive(self, "n_images", "n_repeats", "n_steps", "batch_size", "lr", "width")


class TaskTraining(Resumable):
    """Encoder and head learn a task together, one update per :meth:`step`."""

    data_free: ClassVar[bool] = False
    PARTS: tuple[str, ...] = ("encoder", "head", "optimizer", "randomness", "steps")

    def __init__(self, encoder: nn.Module, task: Task, images: ImageSet, settings: Training, runtime: Runtime) -> None:
        self.settings, self.runtime, self.task, self.images = settings, runtime, task, images.to(runtime.device)
        self.encoder = runtime.prepare(encoder).train()
        z_shape = _z_shape(encoder, images)
        self.head = runtime.prepare(Heads(1, task, z_shape, images.image_shape[1], settings.head_width))
        self.optimizer = adam(nn.ModuleList([self.encoder, self.head]), settings.lr)
        self.scaler = runtime.scaler()
        self.batches = minibatches(len(images), settings.batch_size, seed=runtime.seed, device=runtime.device)
        self.randomness = runtime.stream(f"zoo {task.name}")
        self.steps = 0

    def step(self) -> dict[str, Tensor]:
        """One update on the next batch; returns {"loss": ...}, detached."""
        x, labels = self.images.batch(self.batches(self.steps))
        x, y = self.task.make(x, labels, self.randomness)
        with self.runtime.autocast():
            out = self.head(self.encoder(self.runtime.images(x))[None]).to(self.runtime.dtype)
        loss = self.head.losses(out, y).mean()
        update(self.optimizer, loss, self.scaler)
        self.steps += 1
        return {"loss": loss.detach()}


def _z_shape(encoder: nn.Module, images: ImageSet) -> tuple[int, int, int]:
    weight = next(encoder.parameters())
    with still(encoder):
        _, c, h, w = encoder(torch.zeros(1, *images.image_shape, dtype=weight.dtype, device=weight.device)).shape
    return c, h, w


def member(name: str, images: ImageSet, settings: Training, runtime: Runtime) -> tuple[nn.Module, float]:
    """A trained encoder of the zoo, from the cache or trained now: frozen, in eval mode; and the seconds it took.

    Every member has first weights of its own. Training is resumed if an earlier one was cut short; another process that
    asks meanwhile waits.

    Args:
        name: of a task of the images' dataset, or one of `CONTROLS`: class-all with another seed (the positive
            control), never trained, or class-all with the labels of other images.
        images: the first of a training set. A task of another dataset takes as many of that.

    Raises:
        InputError: unknown name.
        DamagedFile: the cached file is corrupt; the message names it.
    """
    known = tasks(images.name, images.image_shape[0])
    if name not in (*known, *CONTROLS):
        raise unknown("member of the zoo", name, [*known, *CONTROLS])
    task = known["class-all" if name in CONTROLS else name]
    images = task.images_of(images)
    wanted: dict[str, Any] = {
        "member": name, "data": images.name, "fingerprint": images.fingerprint, "training": asdict(settings),
        "seed": runtime.seed, "precision": runtime.precision,
    }  # fmt: skip
    path = _place(f"{images.name}-{name}", wanted)
    with lock(path.with_suffix(".lock")):
        if not path.exists():
            _train(name, task, images, settings, runtime, wanted, path)
        stored = checkpoints.load(path)
    encoder = _encoder(task, images, settings)
    encoder.load_state_dict(stored["encoder"])
    return freeze(runtime.prepare(encoder)), float(stored["seconds"])


def _encoder(task: Task, images: ImageSet, settings: Training) -> nn.Sequential:
    encoder = ENCODERS[settings.encoder](images.image_shape[0])
    return nn.Sequential(Grey(), *encoder) if task.grey else encoder


def _train(
    name: str, task: Task, images: ImageSet, settings: Training, runtime: Runtime,
    wanted: dict[str, Any], path: Path,
) -> None:  # fmt: skip
    torch.manual_seed(int.from_bytes(hashlib.sha256(f"{runtime.seed}/{name}".encode()).digest()[:7], "big"))
    encoder = _encoder(task, images, settings)
    seconds = 0.0
    if name != RANDOM:
        labels = images.labels
        if name == SHUFFLED and labels is not None:
            order = torch.randperm(len(images), generator=torch.Generator().manual_seed(runtime.seed))
            images = ImageSet(
                images.images, labels[order.to(labels.device)], classes=images.classes, name=images.name,
                split=images.split,
            )  # fmt: skip
        method, partial = TaskTraining(encoder, task, images, settings, runtime), path.with_suffix(".partial")
        fitted = fit(method, settings.n_steps, name=f"zoo {name}", checkpoint=partial, identity={"of": path.stem})
        seconds = fitted.seconds
        partial.unlink(missing_ok=True)
    checkpoints.save(path, {"encoder": encoder.state_dict(), "seconds": seconds, "of": json.dumps(wanted)})


def _place(name: str, wanted: Mapping[str, Any]) -> Path:
    digest = hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()[:12]
    return cache_root() / "zoo" / f"{name.replace(' ', '_').replace(',', '')}-{digest}.safetensors"


@dataclass(frozen=True)
class Transfers:
    """What was measured.

    Attributes:
        scores: float64 [R, T, N] for repeats, targets and sources: accuracy, of images or pixels, where the target has
            classes, else R^2 = 1 - MSE / variance, which may be below 0.
        losses: per target, [N, R n_test]: of each source on each test image.
        seconds: of all readouts.
    """

    scores: Tensor
    losses: list[Tensor] = field(repr=False)
    seconds: float

    @property
    def mean(self) -> Tensor:
        """[T, N], the mean over repeats."""
        return self.scores.mean(0)


def transfers(
    encoders: Mapping[str, nn.Module], targets: Sequence[str], train: ImageSet, test: ImageSet, settings: Readout,
    runtime: Runtime,
) -> Transfers:  # fmt: skip
    """What each frozen encoder is worth to each target: from the cache, or measured now.

    Args:
        encoders: {name: network}, in eval mode, of one shape of z.
        targets: names of tasks of the dataset.
        train: labelled images that no encoder was trained on, n_images for each repeat. A target of another dataset
            takes as many from the end of that.
        test: images to measure on, the first of their split.

    Raises:
        InputError: too few images, or an unknown task.
    """
    if len(train) < settings.n_images * settings.n_repeats:
        raise InputError(
            f"{settings.n_repeats} repeats with {settings.n_images} images each need "
            f"{settings.n_repeats * settings.n_images} images, and there are {len(train)}; ask for fewer"
        )
    known = tasks(train.name, train.image_shape[0])
    if missing := [t for t in targets if t not in known]:
        raise unknown("task", missing[0], known)
    wanted: dict[str, Any] = {
        "encoders": {name: fingerprint(network) for name, network in encoders.items()}, "targets": list(targets),
        "train": train.fingerprint, "test": test.fingerprint, "readout": asdict(settings), "seed": runtime.seed,
        "precision": runtime.precision,
    }  # fmt: skip
    path = _place(f"{train.name}-transfers", wanted)
    with lock(path.with_suffix(".lock")):
        if not path.exists():
            checkpoints.save(path, _measure(encoders, [known[t] for t in targets], train, test, settings, runtime))
        return Transfers(**checkpoints.load(path))


def _measure(
    encoders: Mapping[str, nn.Module], targets: Sequence[Task], train: ImageSet, test: ImageSet, settings: Readout,
    runtime: Runtime,
) -> dict[str, Any]:  # fmt: skip
    start, scores, losses = time.perf_counter(), [], []
    sources = Sources(encoders, runtime)
    for task in targets:
        labelled, asked = task.images_of(train, last=True), task.images_of(test)
        # What is tested on is the same in every repeat, and costs more to look at than a readout to train.
        tested = sources.see(asked, 0, len(asked), task, runtime.stream(f"test {task.name}"))
        found = [read_out(sources, task, labelled, tested, settings, runtime, r) for r in range(settings.n_repeats)]
        scores.append(torch.stack([score for score, _ in found]))
        losses.append(torch.cat([loss for _, loss in found], 1))
    return {"scores": torch.stack(scores, 1), "losses": losses, "seconds": time.perf_counter() - start}


class Sources:
    """What all sources make of images, side by side; of images that a task leaves as they are, computed once."""

    def __init__(self, encoders: Mapping[str, nn.Module], runtime: Runtime) -> None:
        self.encoders, self.runtime = list(encoders.values()), runtime
        self.as_they_are: dict[tuple[str, int], Tensor] = {}

    def see(self, images: ImageSet, start: int, n: int, task: Task, stream: torch.Generator) -> tuple[Tensor, Tensor]:
        """z [N, n, C, h, w] and targets of n images from `start` on."""
        x, labels = images.batch(range(start, start + n))
        x = self.runtime.images(x)
        given, y = task.make(x, labels.to(self.runtime.device), stream)
        if given is not x:
            return self._encode(given), y
        key = images.fingerprint, start
        if key not in self.as_they_are:
            self.as_they_are[key] = self._encode(x)
        return self.as_they_are[key], y

    def _encode(self, x: Tensor) -> Tensor:
        found = []
        for encoder in self.encoders:
            with still(encoder), self.runtime.autocast():
                found.append(torch.cat([encoder(part).to(self.runtime.dtype) for part in x.split(256)]))
        return torch.stack(found)


def read_out(
    sources: Sources, task: Task, train: ImageSet, tested: tuple[Tensor, Tensor], settings: Readout, runtime: Runtime,
    repeat: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Train the readouts of one target, all sources at once, and test them.

    A readout sees representations less their mean over the training images, divided by one number per source.

    Args:
        tested: z [N, n_test, C, h, w] and targets of the test images, as :meth:`Sources.see` gives them.

    Returns:
        Scores float64 [N] and losses float32 [N, n_test], on the CPU.
    """
    n = settings.n_images
    z, y = sources.see(train, repeat * n, n, task, runtime.stream(f"readout {task.name} {repeat}"))
    mean = z.mean(1, keepdim=True)
    scale = (z - mean).flatten(1).std(1).clamp_min(1e-6).view(-1, 1, 1, 1, 1)
    torch.manual_seed(runtime.seed + repeat)
    c, h, w = z.shape[2:]
    heads = runtime.prepare(Heads(len(z), task, (c, h, w), train.image_shape[1], settings.width))
    optimizer = torch.optim.Adam(heads.parameters(), settings.lr, weight_decay=settings.weight_decay)
    scaler = runtime.scaler()
    z, batches = (z - mean) / scale, minibatches(n, settings.batch_size, seed=repeat, device=runtime.device)
    for step in range(settings.n_steps):
        at = batches(step)
        # A sum over sources: each readout has the gradient that it would have alone.
        loss = heads.losses(heads(z[:, at]), y[at]).mean(1).sum()
        update(optimizer, loss, scaler)
    z, y = tested
    with torch.no_grad():
        out = heads((z - mean) / scale)
        losses = heads.losses(out, y)
        if task.kind == CLASSES:
            asked = y != NOT_ASKED
            scores = (out.argmax(2) == y)[:, asked].double().mean(1)
            losses = losses[:, asked]
        elif task.kind == PIXELS:
            scores = (out.argmax(2) == y).flatten(1).double().mean(1)
        else:
            scores = 1 - losses.double().mean(1) / (y - y.mean(0)).square().double().mean()
    return scores.cpu(), losses.cpu()
