"""Ten minutes of a GPU, used in order of worth: python -m benchmarks.gpu_trial --minutes 9 --out runs/gpu-trial

First what shows that the code is right there (every method: recorded against eager, a resume, float32 against the
processor), then what it costs (milliseconds and kernels per update), then a teacher of CIFAR-10, Fast-5 at its
published length, every method at a tenth of it, and further teachers, as many as fit: a run whose evaluations show
that it will not end in time is left. Each record is written when its run ends. `--resume` goes on in the next
ten minutes; `--device cpu --minutes 2` is the same at toy sizes. The data lie where DFKD_DATA says; a teacher that
comes with the book needs no training images. `side_by_side.py` runs several of these at a time.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn

from benchmarks.gpu_checks import agreement, measure_speed
from dfkd_lib import data, distillers, models, teachers
from dfkd_lib.data import ImageSet
from dfkd_lib.errors import DFKDError, InputError
from dfkd_lib.files import write_json
from dfkd_lib.measures.evaluation import accuracy
from dfkd_lib.methods import diagnosis
from dfkd_lib.reproduction.chapter import Chapter
from dfkd_lib.reproduction.parameters import parameters
from dfkd_lib.runtime import Runtime
from dfkd_lib.teachers import RECIPES, Recipe, Teacher
from dfkd_lib.training import checkpoints
from dfkd_lib.training.kd import KD
from dfkd_lib.training.kd import Settings as KDSettings

LABELS = {
    "fast": "Fast-5", "nayer": "NAYER", "dfq": "DFQ", "cmi": "CMI", "dafl": "DAFL", "dfad": "DFAD", "zskt": "ZSKT",
    "deepinversion": "DeepInversion", "adi": "ADI", "cpnet": "CPNet", "dfad-one-stage": "DFAD, one stage",
    "random": "RANDOM",
}  # fmt: skip
"""Rows of the comparison, the ones wanted most first."""


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


PARTS = ("agreement", "speed", "teacher", "kd", "published", "short", "more")


class TimeIsUp(BaseException):
    """The deadline has come in the middle of a run."""


class TooLong(Exception):
    """A run would end after the deadline."""


class Trial:
    """The clock, the folder and the runtime of one trial.

    Args:
        deadline: in seconds of `time.perf_counter`.
        updates: of the student in every short run; 0 takes the scale's.
        shared: other trials run on the device at the same time.
    """

    def __init__(
        self, out: Path, runtime: Runtime, scale: Scale, deadline: float, updates: int = 0, shared: bool = False
    ) -> None:
        self.out, self.runtime, self.scale, self.deadline = out, runtime, scale, deadline
        self.updates, self.shared = updates or scale.short_updates, shared
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


def new_student(trial: Trial, test: ImageSet, name: str = "") -> nn.Module:
    """The student (or another network) of the scale, untrained."""
    about = data.info(trial.scale.dataset)
    torch.manual_seed(trial.runtime.seed)
    return models.build(name or trial.scale.student, n_classes=test.n_classes, in_channels=test.image_shape[0],
                        mean=about.mean, std=about.std)  # fmt: skip


def teacher_of(trial: Trial, dataset: str) -> Teacher:
    """A trained teacher: the book's, else one trained here."""
    size = 8 if dataset == "digits" else 32
    started = time.perf_counter()
    name, runtime = trial.scale.teacher, dataclasses.replace(trial.runtime, seed=0)
    teacher = teachers.from_book(name, dataset, trial.scale.recipe, runtime)
    if teacher is None:
        train = data.load(dataset, "train", image_size=size)
        test = data.load(dataset, "test", image_size=size, device=runtime.device)
        teacher = teachers.train_or_load(name, train, test, trial.scale.recipe, runtime)
    trial.say(f"teacher of {dataset}: {teacher.facts['test']}, {time.perf_counter() - started:.0f} s")
    return teacher


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
    method: Any = distillers.build(name, teacher.module, new_student(trial, test), test.image_shape, chapter.runtime,
                              preset=preset, n_updates=n_updates, **settings)  # fmt: skip
    calls = distillers.n_calls(method)
    start, began = time.perf_counter(), dict[str, float]()

    def figures() -> dict[str, float]:
        spent = method.budget
        found = {
            "accuracy": accuracy(method.student, test, chapter.runtime, 2000),
            "student updates": spent.student_updates,
            "images": spent.images,
            "teacher passes": spent.teacher_passes,
        }
        if not trial.shared:  # seconds beside others say nothing of a method
            found |= {
                "synthesis seconds": spent.synthesis_seconds,
                "distillation seconds": spent.distillation_seconds,
                "total seconds": spent.synthesis_seconds + spent.distillation_seconds,
            }
        done = getattr(method, "calls", 0) or getattr(method, "steps", 0)
        if first := began.get("calls"):  # the calls before it drew warm-up batches and were recorded
            needed = (time.perf_counter() - began["time"]) / (done - first) * (calls - done)
            if needed > trial.left:
                raise TooLong(f"{row} would take {needed:.0f} s more")
        elif done:
            began.update({"calls": done, "time": time.perf_counter()})
        return found

    try:
        done = chapter.fit(row, method, calls, evaluate=figures, eval_every=max(1, calls // n_evaluations),
                    watch=lambda: method.watch(40), may_diverge=True)  # fmt: skip
    except TooLong as e:
        trial.say(f"{e}: left out")
        return
    for what, value in settings.items():
        if isinstance(value, int | float):
            chapter.note(f"{row}/{what}", value)
    if done:
        terms = diagnosis.terms_of_a_run(teacher.module, done.history, method.settings, test, chapter.runtime)
        for what, value in terms.items():
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


def on_data(trial: Trial, chapter: Chapter, teacher: Teacher, test: ImageSet, n_updates: int) -> None:
    """The row that has the teacher's training images."""
    train = data.load(trial.scale.dataset, "train", image_size=test.image_shape[-1])
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
                    trial.speed[f"{name} {preset}"] = measure_speed(
                        name, preset, new_student(trial, test, scale.teacher).eval(), lambda: new_student(trial, test),
                        test.image_shape, runtime,
                    )  # fmt: skip
                except Exception as e:
                    trial.say(f"{name} {preset}: {type(e).__name__}: {e}"[:500])
                    continue
                rounded = {what: round(ms, 2) for what, ms in trial.speed[f"{name} {preset}"].items()}
                trial.say(f"{name} {preset}: {rounded}")
        write_json(trial.out / "speed.json", trial.speed)
    if not {"teacher", "published", "kd", "short"}.isdisjoint(parts):
        teacher = teacher_of(trial, scale.dataset)
    if not {"kd", "short"}.isdisjoint(parts):
        short = chapter_of(trial, f"{scale.dataset}-{trial.updates}", methods=methods, preset=scale.preset,
                           n_updates=trial.updates, batch_size_kd=scale.batch_size, lr_kd=0.1)  # fmt: skip
        note_teacher(short, teacher)
    if "kd" in parts:
        on_data(trial, short, teacher, test, trial.updates)
    if "short" in parts:
        distil(trial, short, methods[0], teacher, test, 8, batch_size=scale.batch_size)
    if "published" in parts:
        published = chapter_of(trial, f"{scale.dataset}-fast-{scale.published_updates}", methods=["fast"],
                               preset="paper" if scale is REAL else scale.preset,
                               n_updates=scale.published_updates)  # fmt: skip
        note_teacher(published, teacher)
        more = {"bn_scale": batch_norm_scale(trial, published, "fast", teacher, test)} if scale is REAL else {}
        published.note("comparison/Fast-5/relative batch-norm term", float(more.get("bn_scale") == "relative"))
        distil(trial, published, "fast", teacher, test, 40, **more)
    if "short" in parts:
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
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--methods", nargs="+", default=list(LABELS), choices=list(LABELS))
    parser.add_argument("--updates", type=int, default=0, help="student updates of the short runs; 0: a tenth")
    parser.add_argument("--shared", action="store_true", help="others use the device meanwhile: note no seconds")
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
        scale = REAL if runtime.device.type == "cuda" else TOY
        trial = Trial(args.out, runtime, scale, deadline, args.updates, args.shared)
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
