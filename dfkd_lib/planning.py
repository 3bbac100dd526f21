"""Before a run begins: the memory that it takes, and the student updates for which a number of minutes suffices."""

from __future__ import annotations

import contextlib
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from .compiling import as_written
from .data import ImageSet
from .deadlines import Plan
from .distillers import DataFreeMethod, build, n_calls, settings_for
from .errors import InputError
from .files import read_json, write_json
from .methods.distiller import BankDistiller
from .other_images import OnOtherPictures
from .other_images import settings_for as settings_on_others
from .own_images import OnPictures
from .own_images import Settings as PictureSettings
from .own_images import settings_for as settings_on_pictures
from .prepared import Players
from .runtime import Runtime, random_state_kept
from .training.modes import in_eval_mode
from .training.progress import in_notebook

WORTH_A_WORD = 1e9  # bytes: what a run takes is said from here on
_LONGEST_TRIAL = 0.05  # of the time that is left
_MOST_STEPS = 40
_PLAN = "plan.json"
clock: Callable[[], float] = time.perf_counter

Run = DataFreeMethod | OnPictures | OnOtherPictures
ON_PICTURES = ("kd", "mosaickd")
PER_PIXEL = ("dfad", "dfad-one-stage", "random", *ON_PICTURES)
"""The methods that learn on a person's pictures, and those for networks that name a class for every pixel."""

# As in the segmentation runs of the chapter.
_DFAD_PER_PIXEL = {"log_generator_loss": True, "batch_size": 32, "ngf": 32, "weight_decay": 5e-4}


@dataclass(frozen=True)
class Way:
    """How the student is taught: by a data-free method, or on pictures.

    Attributes:
        image_shape: (C, H, W).
        given: settings of the method that the caller set.
        pictures: for the methods of `ON_PICTURES` alone.
        dense: whether the networks name a class for every pixel.
    """

    method: str
    preset: str
    image_shape: tuple[int, int, int]
    given: Mapping[str, Any]
    pictures: ImageSet | None = None
    dense: bool = False

    def settings(self, n_updates: int | None) -> Any:
        """The method's settings for a number of student updates; None takes the preset's.

        Raises:
            InputError: an unknown setting, or a value that cannot be.
        """
        if self.method == "kd":
            return settings_on_pictures(self.preset, n_updates, self.given)
        if self.method == "mosaickd":
            return settings_on_others(self.preset, n_updates, self.image_shape, self.given, dense=self.dense)
        return settings_for(self.method, preset=self.preset, n_updates=n_updates, image_shape=self.image_shape,
                            **self._given())  # fmt: skip

    def begun(self, players: Players, runtime: Runtime, n_updates: int | None) -> tuple[Run, int]:
        """The run, ready for its first step, and how many steps it takes.

        Raises:
            InputError: the networks do not fit the method.
        """
        if self.pictures is not None:
            chosen = self.settings(n_updates)
            kind: Any = OnPictures if self.method == "kd" else OnOtherPictures
            return kind(players.teacher, players.student, self.pictures, chosen, runtime), self.steps(chosen)
        run = build(self.method, players.teacher, players.student, self.image_shape, runtime, preset=self.preset,
                    n_updates=n_updates, **self._given())  # fmt: skip
        return run, n_calls(run)

    def steps(self, chosen: Any) -> int:
        """How many steps a run on pictures takes with these settings."""
        return int(chosen.n_updates if self.method == "kd" else chosen.n_steps)

    def _given(self) -> Mapping[str, Any]:
        ours = _DFAD_PER_PIXEL if self.dense else {}
        return {**ours, **self.given}


def asks_gradient(settings: Any) -> bool:
    """Whether a method makes images by the teacher's gradient."""
    return not isinstance(settings, PictureSettings) and getattr(settings, "generator_steps", 1) > 0


# --- minutes --------------------------------------------------------------------------------------------------------


def updates_within(
    seconds: float, way: Way, players: Callable[[], Players], runtime: Runtime, test: ImageSet | None
) -> Plan:
    """How many student updates end within a time, found by taking a few steps that are thrown away.

    Their own time is counted; so are the images of the final comparison and the evaluation on test images.

    Args:
        seconds: what is left.
        players: gives networks that the trial may change.

    Raises:
        InputError: the time does not suffice for one step, and the message says how many minutes would; or the memory
            does not, see :func:`check_memory`.
    """
    begun_at, usual = clock(), way.settings(None)
    idle = next((name for name in ("warmup", "preinvert") if getattr(usual, name, 0)), "")
    trial = Way(way.method, way.preset, way.image_shape, {**way.given, idle: 2} if idle else way.given, way.pictures)
    with random_state_kept(runtime.device):
        cast = players()
        run, _ = trial.begun(cast, runtime, None)
        check_memory(memory(run, cast, way.image_shape, 1), runtime.device)
        silent = [_timed(run) for _ in range(2)][-1] if idle else 0.0
        before, taken = run.budget.student_updates, [_timed(run)]
        per_step = run.budget.student_updates - before
        while len(taken) < _MOST_STEPS and clock() - begun_at < _LONGEST_TRIAL * seconds:
            taken.append(_timed(run))
        step = statistics.mean(taken[1:] or taken)
        after = step + (_evaluation(cast, test, runtime) if test is not None else 0.0)
    warm_up = getattr(usual, idle, 0) * silent
    training = seconds - (clock() - begun_at) - after
    n_steps = math.floor((training - warm_up) / step)
    if n_steps < 1:
        least = (clock() - begun_at + after + warm_up + step) / 60
        raise InputError(
            f"the minutes do not suffice for {way.method}, one step of which takes {step:.1f} s here; give at least "
            f"{math.ceil(10 * least) / 10:g}, or choose smaller settings"
        )
    return Plan(n_steps * per_step, training)


def _timed(run: Run) -> float:
    start = clock()
    for value in run.step().values():
        float(value)  # waits for the device
    return clock() - start


def _evaluation(players: Players, test: ImageSet, runtime: Runtime) -> float:
    """Seconds in which both networks see all test images, by those that some take."""
    from .measures.evaluation import evaluate

    some, start = test.take(min(len(test), 200)).to(runtime.device), clock()
    for network in (players.teacher, players.student):
        evaluate(network, some, runtime)
    return (clock() - start) * len(test) / len(some)


def planned(folder: Path | None, call: str) -> Plan | None:
    """What an earlier call with these arguments planned for its minutes, None if there is none.

    Args:
        call: what stands for the arguments.

    Raises:
        InputError: the folder holds a checkpoint of a call with other arguments.
        DamagedFile: the note cannot be read.
    """
    if folder is None or not (folder / _PLAN).exists():
        return None
    noted = read_json(folder / _PLAN, {"call": str, "n_updates": int, "seconds": float})
    if noted["call"] == call:
        return Plan(int(noted["n_updates"]), float(noted["seconds"]))
    if (folder / "checkpoint.safetensors").exists():
        raise InputError(f"{folder} holds a run with other arguments or other weights; choose another folder")
    return None


def note(folder: Path, call: str, plan: Plan) -> None:
    """Write down for :func:`planned` what was chosen.

    Raises:
        DFKDError: the folder cannot be written to.
    """
    write_json(folder / _PLAN, {"call": call, "n_updates": plan.n_updates, "seconds": plan.seconds})


def say(line: str, show: bool) -> None:
    """A line for the person who waits, before a long part begins: on stdout in a notebook, else on stderr."""
    if show:
        print(f"dfkd: note: {line}", file=sys.stdout if in_notebook() else sys.stderr, flush=True)


# --- memory ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Memory:
    """Bytes that a run holds at once, from below: what libraries take for themselves is not in it.

    Attributes:
        images: of the bank or the pictures, one byte a value, and how many there are.
        activations: what the backward pass through the networks needs, at the largest batch.
        weights: of both networks and a generator, with gradients and momentum of those that learn.
    """

    images: float
    n_images: int
    activations: float
    batch: int
    weights: float

    @property
    def total(self) -> float:
        return self.images + self.activations + self.weights

    def __str__(self) -> str:
        bank = f"{self.images / 1e9:.2f} for {self.n_images:,} stored images, " if self.n_images else ""
        return (
            f"the run takes about {self.total / 1e9:.2f} GB: {bank}{self.activations / 1e9:.2f} for activations at a "
            f"batch of {self.batch}, {self.weights / 1e9:.2f} for weights"
        )


def memory(run: Run, players: Players, image_shape: Sequence[int], n_steps: int) -> Memory:
    """What a run will take, by what a pass over two images keeps.

    Args:
        image_shape: (C, H, W).
        n_steps: that it will take.
    """
    settings: Any = run.settings  # type: ignore[union-attr]
    runtime, batch = run.runtime, int(settings.batch_size)
    x = runtime.images(torch.rand(2, *image_shape, generator=torch.Generator().manual_seed(0)))
    with random_state_kept(runtime.device):
        of_student = _kept(run.student, x, runtime) / 2
        activations = batch * of_student
        if not isinstance(run, OnPictures) and asks_gradient(settings):
            together = int(getattr(settings, "synthesis_batch", batch))
            made = together * (_kept(players.teacher, x, runtime) / 2 + of_student + _of_generator(run))
            activations, batch = max((activations, batch), (made, together))
    generator = getattr(run, "generator", None)
    learning = sum(map(_size, filter(None, (players.student, generator))))
    n_images = stored_images(run, n_steps)
    return Memory(
        n_images * math.prod(image_shape), n_images, activations, batch, _size(players.teacher) + 3 * learning
    )


def stored_images(run: Run, n_steps: int) -> int:
    """How many images a run holds at its end."""
    if isinstance(run, OnPictures | OnOtherPictures):
        return 0 if run.images is None else len(run.images)
    if not isinstance(run, BankDistiller):
        return 0
    return min(int(run.settings.bank_size), n_steps * run.images_per_call)  # type: ignore[attr-defined]


def free_memory(device: torch.device) -> float:
    """Bytes that are free on a device; infinite where the system does not say."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    try:
        with open("/proc/meminfo", encoding="ascii") as f:
            return next(float(line.split()[1]) * 1024 for line in f if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        pass
    try:
        return float(os.sysconf("SC_PAGE_SIZE")) * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return math.inf


def check_memory(need: Memory, device: torch.device) -> None:
    """Refuse a run that cannot end well.

    Raises:
        InputError: the device has less free memory; the message names both figures and what takes less.
    """
    free = free_memory(device)
    if need.total > free:
        where = "this machine" if device.type != "cuda" else "the GPU"
        raise InputError(
            f"{need}, and {where} has {free / 1e9:.2f} GB free; lower batch_size, synthesis_batch or bank_size"
        )


def _kept(network: nn.Module, x: Tensor, runtime: Runtime) -> float:
    """Bytes that autograd keeps of one pass over x, weights not counted."""
    own = {t.untyped_storage().data_ptr() for t in (*network.parameters(), *network.buffers())}
    held: dict[int, Tensor] = {}

    def keep(t: Tensor) -> Tensor:
        if t.layout == torch.strided and t.untyped_storage().data_ptr() not in own:
            held[t.untyped_storage().data_ptr()] = t
        return t

    with (
        contextlib.suppress(Exception),  # an estimate from below; where it is in earnest, the error is named
        in_eval_mode(network),
        as_written(),
        torch.enable_grad(),
        runtime.autocast(),
        saved_tensors_hooks(keep, lambda t: t),
    ):
        network(x.clone().requires_grad_().clone())
    return float(sum(t.untyped_storage().nbytes() for t in held.values()))


def _of_generator(run: DataFreeMethod | OnOtherPictures) -> float:
    """Bytes for one image; 0 without a generator, or for one whose noise is not plain to see."""
    generator = getattr(run, "generator", None)
    first = next((m for m in generator.modules() if isinstance(m, nn.Linear)), None) if generator is not None else None
    if generator is None or first is None:
        return 0.0
    z = torch.zeros(2, first.in_features, device=run.runtime.device, dtype=run.runtime.dtype)
    return _kept(generator, z, run.runtime) / 2


def _size(network: nn.Module) -> float:
    return float(sum(t.nbytes for t in (*network.parameters(), *network.buffers())))
