"""Ten minutes of a GPU, used in order of worth: python benchmarks/gpu_trial.py --minutes 9 --out runs/gpu-trial

First what shows that the code is right there (every method: recorded against eager, a resume, float32 against the
processor), then what it costs (milliseconds and kernels per update), then a teacher of CIFAR-10, Fast-5 at its
published length, every method at a tenth of it, and further teachers, as many as fit: a run whose first evaluation
shows that it will not end in time is left. Each record is written when its run ends. `--resume` goes on in the next
ten minutes; `--device cpu --minutes 2` is the same at toy sizes. The data lie where DFKD_DATA says.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn

from dfkd_lib import data, distillers, models
from dfkd_lib.data import ImageSet
from dfkd_lib.distillers import DataFreeMethod
from dfkd_lib.errors import DFKDError, InputError
from dfkd_lib.files import write_json
from dfkd_lib.measures.evaluation import accuracy
from dfkd_lib.methods.dfad import DFAD
from dfkd_lib.reproduction.chapter import Chapter
from dfkd_lib.reproduction.parameters import parameters
from dfkd_lib.runtime import Runtime
from dfkd_lib.teachers import RECIPES, Recipe, Teacher, train_or_load
from dfkd_lib.training import checkpoints
from dfkd_lib.training.kd import KD
from dfkd_lib.training.kd import Settings as KDSettings

LABELS = {
    "fast": "Fast-5", "nayer": "NAYER", "dfq": "DFQ", "cmi": "CMI", "dafl": "DAFL", "dfad": "DFAD", "zskt": "ZSKT",
    "deepinversion": "DeepInversion", "adi": "ADI", "random": "RANDOM",
}  # fmt: skip
"""Rows of the comparison, the ones wanted most first."""

TINY: dict[str, dict[str, Any]] = {
    "fast": {"batch_size": 16, "synthesis_batch": 16, "warmup": 1, "g_steps": 3, "kd_steps": 3},
    "nayer": {"batch_size": 16, "synthesis_batch": 20, "warmup": 1, "g_steps": 4, "kd_steps": 3},
    "cmi": {"batch_size": 16, "synthesis_batch": 16, "preinvert": 1, "inner_steps": 5, "kd_steps": 3, "negatives": 16},
    "deepinversion": {"batch_size": 16, "synthesis_batch": 16, "g_steps": 5, "kd_steps": 3},
    "adi": {"batch_size": 16, "synthesis_batch": 16, "g_steps": 5, "kd_steps": 3},
}


@dataclasses.dataclass(frozen=True)
class Scale:
    """What a trial runs: the real one, or a toy of it."""

    dataset: str
    teacher: str
    student: str
    recipe: Recipe
    more_teachers: tuple[str, ...]
    published_updates: int
    short_updates: int
    preset: str
    batch_size: int  # of every row of the short runs


REAL = Scale(
    dataset="cifar10",
    teacher="wrn40_2",
    student="wrn16_1",
    recipe=RECIPES["cifar10"],
    more_teachers=("cifar100",),
    published_updates=80_000,
    short_updates=8_000,
    preset="cifar10",
    batch_size=128,
)
TOY = Scale(
    dataset="digits",
    teacher="digits_cnn",
    student="digits_cnn_half",
    recipe=Recipe(epochs=2, batch_size=64, lr=0.1, nesterov=True, schedule="cosine"),
    more_teachers=(),
    published_updates=60,
    short_updates=40,
    preset="digits",
    batch_size=64,
)


class TimeIsUp(BaseException):
    """The deadline has come in the middle of a run."""


class TooLong(Exception):
    """A run would end after the deadline."""


class Trial:
    """The clock, the folder and the runtime of one trial.

    Args:
        deadline: in seconds of `time.perf_counter`.
    """

    def __init__(self, out: Path, runtime: Runtime, scale: Scale, deadline: float) -> None:
        self.out, self.runtime, self.scale, self.deadline = out, runtime, scale, deadline
        self.speed: dict[str, dict[str, float]] = {}

    @property
    def left(self) -> float:
        """Seconds to the deadline."""
        return self.deadline - time.perf_counter()

    def say(self, text: str) -> None:
        """One line of the log, with the seconds left."""
        print(f"[{self.left:4.0f} s left] {text}", flush=True)

    @contextmanager
    def limited(self) -> Iterator[None]:
        """Raise :class:`TimeIsUp` inside when the deadline comes."""

        def ring(number: int, frame: FrameType | None) -> None:
            raise TimeIsUp

        before = signal.signal(signal.SIGALRM, ring)
        signal.setitimer(signal.ITIMER_REAL, max(0.01, self.left))
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)


def tiny_method(name: str, runtime: Runtime) -> DataFreeMethod:
    """A method on networks of a moment's work, the same each time."""
    torch.manual_seed(0)
    networks = [
        models.build(kind, n_classes=10, in_channels=1, mean=[0.3], std=[0.3])
        for kind in ("digits_cnn", "digits_cnn_half")
    ]
    with torch.no_grad():
        for _ in range(10):
            networks[0](torch.rand(64, 1, 8, 8))
    settings = TINY.get(name, {"batch_size": 16})
    return distillers.build(name, networks[0].eval(), networks[1], (1, 8, 8), runtime, preset="digits", n_updates=60,
                            **settings)  # fmt: skip


def apart(one: nn.Module, other: nn.Module) -> float:
    """Largest difference of two networks' weights, relative to the largest weight."""
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    floats = [(a.double().cpu(), b.double().cpu()) for a, b in pairs if a.is_floating_point()]
    return max(float((a - b).abs().max()) for a, b in floats) / max(float(a.abs().max()) for a, _ in floats)


def agreement(name: str, device: torch.device, folder: Path) -> dict[str, float]:
    """What one method does on the device: recorded against as written, resumed against uninterrupted, and against
    the processor; relative differences of float32 weights and logits, 0 where there is none."""
    eager = dataclasses.replace(Runtime.choose(str(device), "float32"), graphs=False)
    recorded = dataclasses.replace(eager, graphs=device.type == "cuda")
    methods = {how: tiny_method(name, runtime) for how, runtime in (("eager", eager), ("recorded", recorded))}
    for method in methods.values():
        for _ in range(6):
            method.step()
    first = tiny_method(name, recorded)
    for _ in range(3):
        first.step()
    path = folder / f"{name}.safetensors"
    checkpoints.save(path, first.state_dict())
    resumed = tiny_method(name, recorded)
    resumed.load_state_dict(checkpoints.load(path))
    path.unlink()
    for _ in range(3):
        resumed.step()
    on_cpu = tiny_method(name, Runtime.choose("cpu", "float32"))
    on_cpu.student.load_state_dict(methods["recorded"].student.state_dict())  # copies across devices
    x = torch.rand(32, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        here = [
            network.eval()(x.to(device)).cpu() for network in (methods["recorded"].teacher, methods["recorded"].student)
        ]
        there = [network.eval()(x) for network in (on_cpu.teacher, on_cpu.student)]
    logits = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(here, there, strict=True))
    return {
        "recorded against eager": apart(methods["eager"].student, methods["recorded"].student),
        "resumed against uninterrupted": apart(methods["recorded"].student, resumed.student),
        "device against processor": logits,
    }


def new_student(trial: Trial, test: ImageSet, name: str = "") -> nn.Module:
    """The student (or another network) of the scale, untrained."""
    about = data.info(trial.scale.dataset)
    torch.manual_seed(trial.runtime.seed)
    return models.build(name or trial.scale.student, n_classes=test.n_classes, in_channels=test.image_shape[0],
                        mean=about.mean, std=about.std)  # fmt: skip


def milliseconds(work: Callable[[], Any], device: torch.device, warm_up: int, least: float = 0.2) -> float:
    """Mean time of one call after the calls that make ready, over at least `least` seconds."""
    for _ in range(warm_up):
        work()
    wait(device)
    start, n = time.perf_counter(), 0
    while time.perf_counter() - start < least or n < 2:
        work()
        n += 1
        if n % 10 == 0:
            wait(device)
    wait(device)
    return (time.perf_counter() - start) / n * 1000


def wait(device: torch.device) -> None:
    """Until the device is idle."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def kernels(work: Callable[[], Any], device: torch.device) -> int:
    """Kernels that one call launches as it is written."""
    if device.type != "cuda":
        return 0
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        work()
        wait(device)
    return sum(event.count for event in seen.key_averages() if event.self_device_time_total > 0)


def measure_speed(trial: Trial, name: str, preset: str, test: ImageSet) -> dict[str, float]:
    """Milliseconds of one student update and of one synthesis call, as written and recorded."""
    found: dict[str, float] = {}
    teacher = new_student(trial, test, trial.scale.teacher).eval()
    for how, graphs in (("eager", False), ("recorded", trial.runtime.graphs)):
        if how == "recorded" and not graphs:
            continue
        runtime = dataclasses.replace(trial.runtime, graphs=graphs)
        student = new_student(trial, test)
        method: Any = distillers.build(name, teacher, student, test.image_shape, runtime, preset=preset, n_updates=1000)
        method.step()  # fills the bank
        method.calls = 10_000  # past any warm-up
        per_update = isinstance(method, DFAD)
        imitate = method.imitation if per_update else method.imitate
        synthesize = method.generation if per_update else method.synthesize
        found[f"update, {how}"] = milliseconds(imitate, runtime.device, 5)
        found[f"call, {how}"] = milliseconds(synthesize, runtime.device, 1 if hasattr(method, "bank") else 5)
        if how == "eager":
            found["kernels per update"] = kernels(imitate, runtime.device)
    return found


def teacher_of(trial: Trial, dataset: str) -> tuple[Teacher, ImageSet, ImageSet]:
    """A trained teacher, its training and its test images."""
    size = 8 if dataset == "digits" else 32
    train = data.load(dataset, "train", image_size=size)
    test = data.load(dataset, "test", image_size=size, device=trial.runtime.device)
    started = time.perf_counter()
    teacher = train_or_load(trial.scale.teacher, train, test, trial.scale.recipe, trial.runtime)
    trial.say(f"teacher of {dataset}: {teacher.facts['test']}, {time.perf_counter() - started:.0f} s")
    return teacher, train, test


def chapter_of(trial: Trial, folder: str, **chosen: Any) -> Chapter:
    """A record of the comparison chapter, in a folder of its own."""
    values = {name: known.default for name, known in parameters("comparison").items()}
    values |= {
        "profile": "gpu" if trial.runtime.device.type == "cuda" else "cpu",
        "device": str(trial.runtime.device),
        "precision": trial.runtime.precision,
        "dataset": trial.scale.dataset,
        "image_size": 8 if trial.scale.dataset == "digits" else 32,
        "teacher": trial.scale.teacher,
        "student": trial.scale.student,
        "teacher_epochs": trial.scale.recipe.epochs,
        "seed": trial.runtime.seed,
        "parts": ["methods"],
        "out": str(trial.out / folder),
    }
    return Chapter("comparison", values | chosen)


def distil(trial: Trial, chapter: Chapter, name: str, teacher: Teacher, test: ImageSet, n_evaluations: int,
           **settings: Any) -> None:  # fmt: skip
    """One data-free row: accuracy and what was spent, its curve, its student in half precision."""
    preset, n_updates, row = chapter.parameters["preset"], chapter.parameters["n_updates"], f"comparison/{LABELS[name]}"
    method = distillers.build(name, teacher.module, new_student(trial, test), test.image_shape, chapter.runtime,
                              preset=preset, n_updates=n_updates, **settings)  # fmt: skip
    calls = distillers.n_calls(method)
    start, left = time.perf_counter(), trial.left

    def figures() -> dict[str, float]:
        spent = method.budget
        found = {
            "accuracy": accuracy(method.student, test, chapter.runtime, 2000),
            "student updates": spent.student_updates,
            "images": spent.images,
            "teacher passes": spent.teacher_passes,
            "synthesis seconds": spent.synthesis_seconds,
            "distillation seconds": spent.distillation_seconds,
            "total seconds": spent.synthesis_seconds + spent.distillation_seconds,
        }
        done = getattr(method, "calls", 0) or getattr(method, "steps", 0)
        if calls > done > 0 and (needed := (time.perf_counter() - start) * calls / done) > left:
            raise TooLong(f"{row} would take {needed:.0f} s")
        return found

    try:
        chapter.fit(row, method, calls, evaluate=figures, eval_every=max(1, calls // n_evaluations),
                    watch=lambda: method.watch(40), may_diverge=True)  # fmt: skip
    except TooLong as e:
        trial.say(f"{e}: left out")
        return
    for what, value in settings.items():
        if isinstance(value, int | float):
            chapter.note(f"{row}/{what}", value)
    keep(chapter, name, method.student)
    if chapter.out and row in chapter.fits:
        last = chapter.fits[row].snapshots
        checkpoints.save(chapter.out / f"images-{name}.safetensors", (last[max(last)]["images"] * 255).byte())
    trial.say(f"{row}: {chapter.metrics.get(f'{row}/accuracy')} after {method.budget.student_updates} updates, "
              f"{time.perf_counter() - start:.0f} s")  # fmt: skip


def batch_norm_scale(
    trial: Trial, chapter: Chapter, name: str, teacher: Teacher, test: ImageSet, n_calls: int = 20
) -> str:
    """The form of the batch-norm term under which a published setting still finds images of the classes it asks for:
    the papers', if the class term falls below a half of ln K in `n_calls` calls, else the relative one. No data.
    The terms that decided it go into the record."""
    n_classes = test.n_classes
    for scale in ("absolute", "relative"):
        settings: dict[str, Any] = {"n_updates": 100, "bn_scale": scale, "warmup": n_calls + 1}
        method = distillers.build(name, teacher.module, new_student(trial, test), test.image_shape, trial.runtime,
                                  preset=trial.scale.preset, **settings)  # fmt: skip
        for _ in range(n_calls):
            metrics = method.step()
        target, term = float(metrics["target loss"]), float(metrics["bn loss"])
        chapter.note(f"pilot/{name}, {scale}/batch-norm term", term)
        chapter.note(f"pilot/{name}, {scale}/class term", target)
        trial.say(f"{name}, {scale} batch-norm term {term:.3g}, class term {target:.3g} after {n_calls} calls")
        if target < 0.5 * math.log(n_classes):
            return scale
    return "relative"


def keep(chapter: Chapter, name: str, student: nn.Module) -> None:
    """The student in half precision, and the record as it stands."""
    assert chapter.out
    weights = {key: value.half() if value.is_floating_point() else value for key, value in student.state_dict().items()}
    checkpoints.save(chapter.out / f"student-{name}.safetensors", weights)
    chapter.finish()


def on_data(trial: Trial, chapter: Chapter, teacher: Teacher, train: ImageSet, test: ImageSet, n_updates: int) -> None:
    """The row that has the teacher's training images."""
    settings = KDSettings(batch_size=trial.scale.batch_size, loss="KL", lr=0.1, augment=test.image_shape[0] == 3,
                          milestones=(round(0.6 * n_updates), round(0.85 * n_updates)))  # fmt: skip
    method = KD(teacher.module, new_student(trial, test), train, settings, chapter.runtime)
    chapter.fit("comparison/KD original", method, n_updates, eval_every=max(1, n_updates // 8),
                evaluate=lambda: {"accuracy": accuracy(method.student, test, chapter.runtime, 2000)})  # fmt: skip
    keep(chapter, "kd", method.student)
    trial.say(f"KD original: {chapter.metrics.get('comparison/KD original/accuracy')}")


def run(trial: Trial, parts: list[str], methods: list[str]) -> None:
    """All that fits, in order."""
    scale, runtime = trial.scale, trial.runtime
    if "agreement" in parts:
        found = {}
        for name in methods:
            try:
                found[name] = agreement(name, runtime.device, trial.out)
            except Exception as e:
                found[name] = {"error": f"{type(e).__name__}: {e}"[:500]}  # type: ignore[dict-item]
            trial.say(f"{name}: {found[name]}")
        write_json(trial.out / "agreement.json", found)
    test = data.load(scale.dataset, "test", image_size=8 if scale.dataset == "digits" else 32, device=runtime.device)
    if "speed" in parts:
        for name in methods:
            for preset in (scale.preset, *(["paper"] if name == "fast" and scale is REAL else [])):
                try:
                    trial.speed[f"{name} {preset}"] = measure_speed(trial, name, preset, test)
                except Exception as e:
                    trial.say(f"{name} {preset}: {type(e).__name__}: {e}"[:500])
                    continue
                rounded = {what: round(ms, 2) for what, ms in trial.speed[f"{name} {preset}"].items()}
                trial.say(f"{name} {preset}: {rounded}")
        write_json(trial.out / "speed.json", trial.speed)
    if "teacher" not in parts:
        return
    teacher, train, test = teacher_of(trial, scale.dataset)
    short = None
    if "short" in parts:
        short = chapter_of(trial, f"{scale.dataset}-{scale.short_updates}", methods=methods, preset=scale.preset,
                           n_updates=scale.short_updates, batch_size_kd=scale.batch_size, lr_kd=0.1)  # fmt: skip
        note_teacher(short, teacher)
        on_data(trial, short, teacher, train, test, scale.short_updates)
        distil(trial, short, methods[0], teacher, test, 8, batch_size=scale.batch_size)
    if "published" in parts:
        published = chapter_of(trial, f"{scale.dataset}-fast-{scale.published_updates}", methods=["fast"],
                               preset="paper" if scale is REAL else scale.preset,
                               n_updates=scale.published_updates)  # fmt: skip
        note_teacher(published, teacher)
        more = {"bn_scale": batch_norm_scale(trial, published, "fast", teacher, test)} if scale is REAL else {}
        published.note("comparison/Fast-5/relative batch-norm term", float(more.get("bn_scale") == "relative"))
        distil(trial, published, "fast", teacher, test, 40, **more)
    if short:
        for name in methods[1:]:
            distil(trial, short, name, teacher, test, 8, batch_size=scale.batch_size)
    for dataset in scale.more_teachers if "more" in parts else ():
        teacher_of(trial, dataset)


def note_teacher(chapter: Chapter, teacher: Teacher) -> None:
    """The teacher in the record."""
    chapter.teacher(teacher.facts)
    chapter.note("comparison/teacher/accuracy", teacher.facts["test"]["accuracy"])


def main() -> int:
    """Parse the command line and run the trial; 0 also when the deadline ended it, 2 for what cannot be asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu-trial"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="go on in a folder that holds an earlier trial")
    parser.add_argument("--parts", nargs="+", default=["agreement", "speed", "teacher", "published", "short", "more"])
    parser.add_argument("--methods", nargs="+", default=list(LABELS), choices=list(LABELS))
    args = parser.parse_args()
    deadline = time.perf_counter() + 60 * args.minutes
    try:
        runtime = Runtime.choose(args.device, "auto", seed=args.seed)
        if args.out.is_dir() and any(args.out.iterdir()) and not args.resume:
            print(f"{args.out} is not empty; choose another --out, or --resume", file=sys.stderr)
            return 2
        args.out.mkdir(parents=True, exist_ok=True)
        os.environ.setdefault("DFKD_CACHE", str(args.out / "cache"))
        os.environ.setdefault("DFKD_CHECKPOINT_SECONDS", "60")
        trial = Trial(args.out, runtime, REAL if runtime.device.type == "cuda" else TOY, deadline)
        trial.say(runtime.describe())
        with trial.limited():
            run(trial, args.parts, args.methods)
    except TimeIsUp:
        print("the time is up; --resume goes on")
    except DFKDError as e:
        print(f"gpu_trial: error: {e}", file=sys.stderr)
        return 2 if isinstance(e, InputError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
