"""One call: from a trained classifier of your own to a smaller one, without any data."""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import arguments, checking, lending, planning, records
from .compiling import pays
from .data import ImageSet
from .errors import DFKDError, InputError, unknown
from .files import lock, output_folder
from .measures.evaluation import accuracy
from .methods.diagnosis import without_classes
from .methods.distiller import BankDistiller
from .models import count_parameters
from .own_images import pictures
from .planning import Run, Way
from .prepared import prepared
from .runtime import Runtime, hardware, random_state_kept
from .settings import typed
from .training.budget import Budget
from .training.fit import Fit, fit, resumed
from .training.players import no_weight_gradients

_FRESH = 256  # synthetic images on which the networks are compared
_LARGE_BANK = 1e9  # bytes of stored images that are worth a word before the run
_LAYOUTS = {"auto": None, "channels-last": True, "contiguous": False}


@dataclass(frozen=True)
class Distilled:
    """What came out of :func:`distill`.

    Attributes:
        student: a trained copy of the student that was passed in: in eval mode, on that one's device, without a
            `torch.compile` or `DataParallel` around it.
        agreement: share of fresh synthetic images, or of held-back pictures, on which student and teacher name the
            same class. It is the only figure that can be had without labels, and no accuracy: synthetic images are not
            the images that the student is for, and most methods look for those on which the networks still differ.
        classes_named: how many different classes the teacher names on those images. Where they are few, agreement
            is easy and says little.
        accuracy: of "teacher" and "student" on the test images; empty if none were given.
        images: some of the images on which the networks were compared, float32 [n, C, H, W] in [0, 1], on the CPU.
        budget: what was spent.
        seconds: wall-clock time, resumed parts included.
        fit: the history of the training metrics.
        record: all this as JSON knows it, with every setting, the versions of code and packages, and "warnings".
    """

    student: nn.Module
    agreement: float
    classes_named: int
    accuracy: dict[str, float]
    images: Tensor
    budget: Budget
    seconds: float
    fit: Fit
    record: dict[str, Any]

    def __str__(self) -> str:
        asked = self.record["parameters"]
        teacher, student = self.record["networks"]["teacher"], self.record["networks"]["student"]
        seen, fresh = "synthetic images", "fresh synthetic images"
        if "images" in asked:
            seen, fresh = "pictures", "held-back pictures"
        lines = [
            f"{asked['method']}: {self.budget.student_updates:,} student updates on {self.budget.images:,} {seen} in "
            f"{self.seconds:.0f} s",
            f"{teacher:,} -> {student:,} parameters ({teacher / max(1, student):.1f} times fewer)",
            f"agreement on {fresh} {self.agreement:.1%}, where the teacher names {self.classes_named} "
            f"of {asked['num_classes']} classes",
        ]
        if self.accuracy:
            lines.append(f"test accuracy {self.accuracy['student']:.1%}, teacher {self.accuracy['teacher']:.1%}")
        return "\n".join([*lines, *(f"warning: {line}" for line in self.record["warnings"])])


def distill(
    teacher: nn.Module,
    student: nn.Module,
    method: str | None = None,
    *,
    image_shape: Sequence[int],
    num_classes: int,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    preset: str | None = None,
    n_updates: int | None = None,
    minutes: float | None = None,
    images: str | Path | None = None,
    test: ImageSet | tuple[Tensor, Tensor] | None = None,
    device: str | torch.device = "auto",
    precision: str = "auto",
    layout: str = "auto",
    seed: int = 0,
    out: str | Path | None = None,
    progress: bool = True,
    **settings: Any,
) -> Distilled:
    """Train a student to do what a teacher does, on images that are made from the teacher alone.

    Neither network is changed. The student that is trained is a copy; the teacher lends its weights, nothing of it
    is moved or written to. Both are examined by a few small passes first. A network that writes to its images is
    given a copy of them.

    Args:
        teacher: a trained classifier in eval mode, images [B, C, H, W] -> logits [B, num_classes].
        student: the same interface, any architecture; its present weights are where training starts.
        method: one of `dfkd_lib.distillers.names()`; None is "fast". "dafl", "zskt" and "dfad" ask nothing of the
            teacher but logits, and of "dafl" a last linear layer; the others read the running statistics of its batch
            norm.
        image_shape: (C, H, W) of the images that the networks are for.
        mean, std: one number per channel, of images in [0, 1], if both networks expect (x - mean) / std; None if they
            expect x in [0, 1]. Networks that expect x in 0..255 have mean 0 and std 1/255.
        preset: size of the generator, batch and learning rates: "digits", "mnist" or "cifar10", our scales, or
            "paper", the published settings; None goes by the image size. Colour images are also shown mirrored:
            pass flip=False where left and right matter.
        n_updates: student updates; None takes the preset's number.
        minutes: instead of n_updates: a few steps are measured, and as many updates are taken as end in that time,
            which a line says beforehand. Nothing is compiled then.
        images: folder of pictures of your own, without labels: the student learns the teacher's logits on them, and
            nothing is synthesised. The method is then "kd", whose settings are those of
            :class:`dfkd_lib.own_images.Settings`; a tenth of the pictures, at most 256, is kept to compare on.
        test: images to evaluate both networks on when all is done: a set of dfkd_lib, or (images [N, C, H, W],
            uint8 or floats in [0, 1] before any normalisation; labels [N]).
        device, precision: see :meth:`dfkd_lib.runtime.Runtime.choose`. On a processor with a C++ compiler the networks
            of a long run are compiled (:func:`dfkd_lib.compiling.pays`), which `record["runtime"]` says.
        layout: memory format of images and weights, "channels-last" or "contiguous"; "auto" is the first for 16-bit
            precisions, if both networks can work with it.
        seed: of all random draws; the global random state is left as it was.
        out: folder for `student.safetensors` (its weights), `record.json` and a checkpoint. The same call with the same
            folder continues an interrupted run.
        progress: show a live line, on a terminal or in a notebook.
        settings: any setting of the method, such as batch_size=64 or g_steps=10; for "dfad", one_stage=True updates
            both players from one backward pass, which is method "dfad-one-stage".

    Raises:
        InputError: something does not fit; one line says what, and what to do.
        NonFiniteLoss: the training diverged.
        DFKDError: the folder is in use, or holds the checkpoint of another run, such as from a student with other
            weights.

    Warns:
        UserWarning: a network may not be what it should, or a file could not be written; also in `record["warnings"]`.
    """
    began = planning.clock()
    if settings.pop("one_stage", False):
        if method != "dfad":
            raise InputError(f"one_stage is a way to train method 'dfad'; {method!r} has no such setting")
        method = "dfad-one-stage"
    shape = arguments.shape_of_images(image_shape)
    preset, minutes = preset or _preset(shape), arguments.minutes_of_run(minutes, n_updates)
    if images is not None and method not in (None, "kd"):
        raise InputError(f"method {method!r} makes its images, so it takes none; leave method or images out")
    own = None if images is None else pictures(str(images), shape)
    method = "kd" if own is not None else "fast" if method is None else method
    way = Way(method, preset, shape, settings, own)
    chosen = way.settings(n_updates)
    for who, network in (("teacher", teacher), ("student", student)):
        checking.check_module(network, who)
    teacher, student = lending.bare(teacher), lending.bare(student)
    checking.check_roles(teacher, student)
    num_classes, seed = typed("num_classes", num_classes, int), typed("seed", seed, int)
    if num_classes < 2 or not -(2**63) <= seed < 2**63:
        raise InputError(f"num_classes must be at least 2, not {num_classes}, and seed of 64 bits, not {seed}")
    where = typed("device", str(device) if isinstance(device, torch.device) else device, str)
    precision, progress = typed("precision", precision, str), typed("progress", progress, bool)
    if typed("layout", layout, str) not in _LAYOUTS:
        raise unknown("layout", layout, _LAYOUTS)
    statistics = arguments.statistics_of_images(mean, std, shape[0], teacher, student)
    test_set = None if test is None else arguments.labelled_images(test, shape, num_classes)
    folder = None if out is None else output_folder(out)
    with random_state_kept(where), torch.inference_mode(False), torch.enable_grad(), ExitStack() as held:
        runtime = Runtime.choose(where, precision, seed=seed, channels_last=_LAYOUTS[layout])
        look = partial(prepared, teacher, student, shape, statistics, asks_gradient=planning.asks_gradient(chosen))
        try:
            players = look(runtime)
        except InputError:
            if layout != "auto" or not runtime.channels_last:
                raise
            runtime = replace(runtime, channels_last=False)
            players = look(runtime)
        if players.n_classes != num_classes:
            raise InputError(f"num_classes is {num_classes}, but the teacher has {players.n_classes} logits")
        told = players.warnings
        asked: dict[str, Any] = {
            "method": method,
            "preset": preset,
            "image_shape": list(shape),
            "num_classes": num_classes,
            "mean": statistics and statistics[0],
            "std": statistics and statistics[1],
            "precision": runtime.precision,
            "layout": "channels-last" if runtime.channels_last else "contiguous",
        }
        if own is not None:
            asked["images"] = f"{len(own)} pictures, {own.fingerprint}"
        if folder:
            held.enter_context(lock(folder / ".lock", timeout=0, what=f"folder {folder}"))
        if minutes is not None:
            asked["minutes"] = minutes
            call = _digest(asked | {"seed": seed, "settings": _recorded(chosen)}, teacher, student)
            n_updates = planning.planned(folder, call)
            if n_updates is None:
                left = 60 * minutes - (planning.clock() - began)
                n_updates = planning.updates_within(left, way, partial(look, runtime), runtime, test_set)
                if folder:
                    planning.note(folder, call, n_updates)
            chosen = way.settings(n_updates)
            planning.say(f"{n_updates:,} student updates of {method} fit into {minutes:g} minutes here", progress)
        asked["settings"] = _recorded(chosen)
        macs = [checking.count_macs(network, shape, runtime) for network in (players.teacher, players.student)]
        if minutes is None and pays(chosen.n_updates * chosen.batch_size * (macs[0] + 3 * macs[1]), runtime.device):
            runtime = replace(runtime, compile=True)
            for network in (players.teacher, players.student):
                runtime.prepare(network)
        algorithm, n_steps = way.begun(players, runtime, n_updates)
        checking.check_visits(algorithm.teacher, _read_layers(algorithm), shape, runtime)
        need = planning.memory(algorithm, players, shape, n_steps)
        planning.check_memory(need, runtime.device)
        planning.say(str(need), progress and need.total >= planning.WORTH_A_WORD)
        told += _large_bank(algorithm, n_steps)
        checkpoint = None
        if folder:
            if why := lending.not_kept(players.trained, folder):
                told.append(f"no checkpoint can hold the student ({why}), so a run that is stopped starts anew")
            else:
                checkpoint = folder / "checkpoint.safetensors"
        for line in told:
            warnings.warn(line, stacklevel=2)
        run = fit(
            algorithm,
            n_steps,
            name=f"{method} {_digest(asked | {'seed': seed}, teacher, student)}" if folder else method,
            checkpoint=checkpoint,
            identity={"seed": seed, **asked["settings"], **asked},
            progress=progress,
        )
        if warning := without_classes(run.history, chosen, num_classes):
            told.append(warning)
        budget = Budget()
        budget.load_state_dict(algorithm.budget.state_dict())
        fresh = _fresh(algorithm)
        agreement = float((fresh["student"] == fresh["teacher"]).float().mean())
        classes_named = len(fresh["teacher"].unique())
        if classes_named < _expected_classes(num_classes, len(fresh["teacher"])) / 2:
            told.append(f"the teacher names {classes_named} of {num_classes} classes on fresh images, so agreement on "
                        "them says little")  # fmt: skip
        figures = {}
        if test_set is not None:
            there = test_set.to(runtime.device)
            figures = {"teacher": accuracy(players.teacher, there, runtime),
                       "student": accuracy(players.student, there, runtime)}  # fmt: skip
    measured = {"agreement": agreement, "classes named": classes_named}
    measured |= {f"{who} accuracy": value for who, value in figures.items()}
    record = {
        "chapter": "distill",
        "profile": preset,
        "parameters": asked,
        "seed": seed,
        **records.provenance(),
        "hardware": hardware(runtime.device),
        "runtime": runtime.describe(),
        "networks": {"teacher": count_parameters(teacher), "student": count_parameters(student)},
        "budget": budget.state_dict(),
        "seconds": round(run.seconds, 1),
        "resumed": resumed(run),
        "by class": _by_class(fresh),
        "metrics": {f"distill/{method}/{measure}": value for measure, value in measured.items()},
        "best": {},
        "warnings": told,
        "finished": records.now(),
    }
    trained = players.handed_back(student)
    if folder:
        for what, write in (("student", partial(lending.save, trained, folder / "student.safetensors")),
                            ("record", partial(records.write, folder, record))):  # fmt: skip
            try:
                write()
            except DFKDError as e:
                told.append(f"{e}; the {what} is in the result all the same: keep it from there")
                warnings.warn(told[-1], stacklevel=2)
    some = torch.linspace(0, len(fresh["images"]) - 1, min(64, len(fresh["images"]))).round().long()
    shown = fresh["images"].cpu()[some].clamp(0, 1).float()
    return Distilled(trained, agreement, classes_named, figures, shown, budget, run.seconds, run, record)


def _preset(image_shape: tuple[int, int, int]) -> str:
    channels, *sides = image_shape
    if max(sides) < 16:
        return "digits"
    return "mnist" if channels == 1 else "cifar10"


def _read_layers(method: Run) -> list[nn.Module]:
    """The layers of the teacher whose inputs the method reads: batch norms, or DAFL's last linear one."""
    head = getattr(method, "head", None)
    return getattr(method, "layers", []) if not isinstance(head, nn.Linear) else [head]


def _large_bank(method: Run, n_steps: int) -> list[str]:
    """What the images that a run stores will take, one byte a value, as a line if it is much."""
    if not isinstance(method, BankDistiller):
        return []
    images = planning.stored_images(method, n_steps)
    need = images * math.prod(method.image_shape)
    line = f"the image bank will take {need / 1e9:.1f} GB for {images:,} images; a smaller bank_size keeps fewer"
    return [line] if need >= _LARGE_BANK else []


def _fresh(method: Run) -> dict[str, Tensor]:
    """Images that the student has not seen, and what the networks say to them; nothing more is learnt."""
    if isinstance(method, BankDistiller):
        method.student.eval()
        with no_weight_gradients(method.student):
            method.synthesize()
        return method.watch(min(_FRESH, method.newest_call))
    return method.watch(_FRESH)


def _by_class(fresh: dict[str, Tensor]) -> dict[str, list[int]]:
    """{class: [images on which the teacher names it, those of them on which the student does]}."""
    teacher, same = fresh["teacher"], fresh["teacher"] == fresh["student"]
    return {str(c): [int((teacher == c).sum()), int(same[teacher == c].sum())] for c in teacher.unique().tolist()}


def _expected_classes(n_classes: int, n: int) -> float:
    """How many different classes n uniform draws name, on average."""
    return n_classes * (1 - (1 - 1 / n_classes) ** n)


def _digest(asked: dict[str, Any], teacher: nn.Module, student: nn.Module) -> str:
    """Eight hexadecimal digits for the call: its arguments and the weights of both networks."""
    parts = [json.dumps(asked, sort_keys=True), lending.fingerprint(teacher), lending.fingerprint(student)]
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:8]


def _recorded(settings: Any) -> dict[str, Any]:
    return {key: _plain(value) for key, value in asdict(settings).items()}


def _plain(value: Any) -> Any:
    """A setting as JSON knows it: no infinity, which stands for "no limit"."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
