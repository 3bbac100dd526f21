"""One call: from a trained classifier of your own to a smaller one, without any data."""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import arguments, checking, judging, lending, planning, records
from .compiling import pays
from .data import ImageSet
from .deadlines import MOST, Deadline
from .distilled import Distilled, keep
from .errors import InputError, unknown
from .files import lock, output_folder
from .measures.evaluation import evaluate
from .methods.diagnosis import without_classes
from .methods.distiller import BankDistiller
from .models import count_parameters
from .own_images import pictures
from .planning import Run, Way
from .prepared import prepared
from .runtime import Runtime, hardware, random_state_kept
from .settings import typed
from .training.budget import Budget
from .training.fit import fit, resumed

_LARGE_BANK = 1e9  # bytes of stored images that are worth a word before the run
_LAYOUTS = {"auto": None, "channels-last": True, "contiguous": False}


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
        teacher: a trained classifier in eval mode, images [B, C, H, W] -> logits [B, num_classes]; or a network for
            semantic segmentation, -> logits [B, num_classes, H, W] or a dictionary that holds them as "out".
        student: the same interface, any architecture; its present weights are where training starts.
        method: one of `dfkd_lib.distillers.names()`; None is "fast". "dafl", "zskt" and "dfad" ask nothing of the
            teacher but logits, and of "dafl" a last linear layer; the others read the running statistics of its batch
            norm. A segmentation network teaches by "dfad", "dfad-one-stage" or "random", and with `images` by "kd" or
            "mosaickd".
        image_shape: (C, H, W) of the images that the networks are for.
        mean, std: one number per channel, of images in [0, 1], if both networks expect (x - mean) / std; None if they
            expect x in [0, 1]. Networks that expect x in 0..255 have mean 0 and std 1/255.
        preset: size of the generator, batch and learning rates: "digits", "mnist" or "cifar10", our scales, or
            "paper", the published settings; None goes by the image size. Colour images are also shown mirrored:
            pass flip=False where left and right matter.
        n_updates: student updates; None takes the preset's number.
        minutes: instead of n_updates: a few steps are measured, and as many updates are taken as end in that time,
            which a line says beforehand. If the machine slows down later, the run is made shorter, with its schedule
            of learning rates, and a warning says by how much. Nothing is compiled then.
        images: folder of pictures of your own, without labels: the student learns the teacher's logits on them, and
            nothing is synthesised. The method is then "kd", whose settings are those of
            :class:`dfkd_lib.own_images.Settings`; a tenth of the pictures, at most 256, is kept to compare on. Where
            the pictures show other things than the teacher knows, method "mosaickd" makes images of their patches
            too; its settings are those of :class:`dfkd_lib.other_images.Settings`.
        test: images to evaluate both networks on when all is done: a set of dfkd_lib, or (images [N, C, H, W],
            uint8 or floats in [0, 1] before any normalisation; labels [N], or masks [N, H, W] with 255 for pixels
            without a label).
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
    if images is not None and method not in (None, *planning.ON_PICTURES):
        raise InputError(f"method {method!r} makes its images, so it takes none; leave method or images out")
    if images is None and method in planning.ON_PICTURES:
        raise InputError(f"method {method!r} needs images; give a folder of pictures")
    own = None if images is None else pictures(str(images), shape)
    method = method or ("kd" if own is not None else "fast")
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
        look = partial(
            prepared, teacher, student, shape, statistics,
            asks_gradient=planning.asks_gradient(chosen), dense=method in planning.PER_PIXEL,
        )  # fmt: skip
        try:
            players = look(runtime)
        except InputError:
            if layout != "auto" or not runtime.channels_last:
                raise
            runtime = replace(runtime, channels_last=False)
            players = look(runtime)
        if players.n_classes != num_classes:
            raise InputError(f"num_classes is {num_classes}, but the teacher has {players.n_classes} logits")
        if test_set is not None and (test_set.task == "segmentation") != players.dense:
            raise InputError(f"the test images need {'a mask' if players.dense else 'one label'} each, as the networks "
                             f"name a class for every {'pixel' if players.dense else 'image'}")  # fmt: skip
        if players.dense:
            way = replace(way, dense=True)
            chosen = way.settings(n_updates)
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
        if players.dense:
            asked["task"] = "segmentation"
        if own is not None:
            asked["images"] = f"{len(own)} pictures, {own.fingerprint}"
        if folder:
            held.enter_context(lock(folder / ".lock", timeout=0, what=f"folder {folder}"))
        plan = None
        if minutes is not None:
            asked["minutes"] = minutes
            call = _digest(asked | {"seed": seed, "settings": _recorded(chosen)}, teacher, student)
            plan = planning.planned(folder, call)
            if plan is None:
                left = 60 * minutes - (planning.clock() - began)
                plan = planning.updates_within(left, way, partial(look, runtime), runtime, test_set)
                if folder:
                    planning.note(folder, call, plan)
            n_updates = plan.n_updates
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
        need = planning.memory(algorithm, players, shape, n_steps if plan is None else MOST * n_steps)
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
            move_end=None if plan is None else Deadline(algorithm, way.settings, plan, n_steps),
        )
        if run.moved_to and algorithm.budget.student_updates < chosen.n_updates:
            told.append(f"the machine was slower than measured before the run: {algorithm.budget.student_updates:,} of "
                        f"{n_updates:,} updates were taken, as many as ended in {minutes:g} minutes")  # fmt: skip
            warnings.warn(told[-1], stacklevel=2)
        if warning := without_classes(run.history, chosen, num_classes):
            told.append(warning)
        budget = Budget()
        budget.load_state_dict(algorithm.budget.state_dict())
        fresh = judging.fresh_images(algorithm, dense=players.dense)
        agreement = judging.agreement(fresh, num_classes)
        classes_named = len(fresh["teacher"].unique())
        if classes_named < judging.expected_classes(num_classes, fresh["teacher"].numel()) / 2:
            told.append(f"the teacher names {classes_named} of {num_classes} classes on fresh images, so agreement on "
                        "them says little")  # fmt: skip
        figures = {}
        if test_set is not None:
            there = test_set.to(runtime.device)
            for who, network in (("teacher", players.teacher), ("student", players.student)):
                ((measure, figures[who]),) = evaluate(network, there, runtime).items()
    agreed = "mean IoU with the teacher" if players.dense else "agreement"
    measured = {agreed: agreement, "classes named": classes_named}
    measured |= {f"{who} {measure}": value for who, value in figures.items()}
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
        "by class": judging.by_class(fresh),
        "metrics": {f"distill/{method}/{measure}": value for measure, value in measured.items()},
        "best": {},
        "warnings": told,
        "finished": records.now(),
    }
    trained = players.handed_back(student)
    if folder:
        keep(trained, record, folder)
    shown = judging.evenly(fresh["images"], 64)
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


def _digest(asked: dict[str, Any], teacher: nn.Module, student: nn.Module) -> str:
    """Eight hexadecimal digits for the call: its arguments and the weights of both networks."""
    parts = [json.dumps(asked, sort_keys=True), lending.fingerprint(teacher), lending.fingerprint(student)]
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:8]


def _recorded(settings: Any) -> dict[str, Any]:
    return {key: _plain(value) for key, value in asdict(settings).items()}


def _plain(value: Any) -> Any:
    """A setting as JSON knows it: no infinity, which stands for "no limit"."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
