"""One call: from a trained classifier of your own to a smaller one, without any data."""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_model
from torch import Tensor, nn

from . import records
from .data import ImageSet
from .distillers import DataFreeMethod, build, n_calls, settings_for
from .errors import InputError
from .files import lock, replace_file
from .measures.evaluation import accuracy
from .methods.distiller import BankDistiller, common_classes
from .models import Normalize, count_parameters
from .runtime import Runtime, hardware
from .training.budget import Budget
from .training.fit import Fit, fit, resumed
from .training.players import freeze, no_weight_gradients

_FRESH = 256  # synthetic images on which the networks are compared


@dataclass(frozen=True)
class Distilled:
    """What came out of :func:`distill`.

    Attributes:
        student: a trained copy of the student that was passed in: in eval mode, on that one's device.
        agreement: share of fresh synthetic images on which student and teacher name the same class. It is the only
            figure that can be had without data, and no accuracy: synthetic images are not the images that the
            student is for, and most methods look for those on which the networks still differ.
        accuracy: of "teacher" and "student" on the test images; empty if none were given.
        images: some of the synthetic images, float32 [n, C, H, W] in [0, 1], on the CPU.
        budget: what was spent.
        seconds: wall-clock time, resumed parts included.
        fit: the history of the training metrics.
        record: all this as JSON knows it, with every setting and the versions of code and packages.
    """

    student: nn.Module
    agreement: float
    accuracy: dict[str, float]
    images: Tensor
    budget: Budget
    seconds: float
    fit: Fit
    record: dict[str, Any]

    def __str__(self) -> str:
        asked = self.record["parameters"]
        teacher, student = self.record["networks"]["teacher"], self.record["networks"]["student"]
        lines = [
            f"{asked['method']}: {self.budget.student_updates:,} student updates on {self.budget.images:,} synthetic "
            f"images in {self.seconds:.0f} s",
            f"{teacher:,} -> {student:,} parameters ({teacher / max(1, student):.1f} times fewer)",
            f"agreement on fresh synthetic images {self.agreement:.1%}",
        ]
        if self.accuracy:
            lines.append(f"test accuracy {self.accuracy['student']:.1%}, teacher {self.accuracy['teacher']:.1%}")
        return "\n".join(lines)


def distill(
    teacher: nn.Module,
    student: nn.Module,
    method: str = "fast",
    *,
    image_shape: Sequence[int],
    num_classes: int,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    preset: str | None = None,
    n_updates: int | None = None,
    test: ImageSet | tuple[Tensor, Tensor] | None = None,
    device: str = "auto",
    precision: str = "auto",
    seed: int = 0,
    out: str | Path | None = None,
    progress: bool = True,
    **settings: Any,
) -> Distilled:
    """Train a student to do what a teacher does, on images that are made from the teacher alone.

    Neither network is changed. The student that is trained is a copy; the teacher lends its weights, nothing of it
    is moved or written to.

    Args:
        teacher: a trained classifier in eval mode, images [B, C, H, W] -> logits [B, num_classes].
        student: the same interface, any architecture; its present weights are where training starts.
        method: one of `dfkd_lib.distillers.names()`. "dafl", "zskt" and "dfad" ask nothing of the teacher but
            logits, and of "dafl" a last linear layer; the others read the running statistics of its batch norm.
        image_shape: (C, H, W) of the images that the networks are for; all methods but "deepinversion" and "adi"
            need sides that are multiples of 4.
        mean, std: one number per channel, if both networks expect (x - mean) / std; None if they expect x in [0, 1].
        preset: size of the generator, batch and learning rates: "digits", "mnist" or "cifar10", our scales, or
            "paper", the published settings; None goes by the image size. Colour images are also shown mirrored:
            pass flip=False where left and right matter.
        n_updates: student updates; None takes the preset's number.
        test: images to evaluate both networks on when all is done: a set of dfkd_lib, or (images [N, C, H, W],
            uint8 or floats in [0, 1] before any normalisation; labels [N]).
        device, precision: see :meth:`dfkd_lib.runtime.Runtime.choose`.
        seed: of all random draws; the global random state is left as it was.
        out: folder for `student.safetensors` (its weights), `record.json` and a checkpoint. The same call with the same
            folder continues an interrupted run.
        progress: show a live line, on a terminal or in a notebook.
        settings: any setting of the method, such as batch_size=64 or g_steps=10.

    Raises:
        InputError: something does not fit; one line says what, and what to do.
        NonFiniteLoss: the training diverged.
        DFKDError: the folder is in use, or holds the checkpoint of another run.
    """
    image_shape = _image_shape(image_shape)
    preset = preset or _preset(image_shape)
    chosen = settings_for(method, preset=preset, n_updates=n_updates, image_shape=image_shape, **settings)
    _check_networks(teacher, student)
    if not isinstance(num_classes, int) or num_classes < 2:
        raise InputError(f"num_classes must be a whole number of at least 2, not {num_classes!r}")
    normalization = _normalization(mean, std, image_shape[0], teacher, student)
    test_set = None if test is None else _test_set(test, image_shape, num_classes)
    with _global_random_state_kept(device), ExitStack() as held:
        runtime = Runtime.choose(device, precision, seed=seed)
        trained = _copied(student, "student")
        players = [_wrapped(network, normalization) for network in (_borrowed(teacher), trained)]
        players[0] = freeze(runtime.prepare(players[0]))
        players[1] = runtime.prepare(players[1])
        n_classes = common_classes(players[0], players[1], image_shape, runtime)
        if n_classes != num_classes:
            raise InputError(f"num_classes is {num_classes}, but the teacher has {n_classes} logits")
        asked: dict[str, Any] = {
            "method": method,
            "preset": preset,
            "image_shape": list(image_shape),
            "num_classes": num_classes,
            "mean": normalization and normalization[0],
            "std": normalization and normalization[1],
            "precision": runtime.precision,
            "settings": {key: _plain(value) for key, value in asdict(chosen).items()},
        }
        algorithm = build(method, players[0], players[1], image_shape, runtime, preset=preset, n_updates=n_updates,
                          **settings)  # fmt: skip
        folder, name = None, method
        if out is not None:
            folder = Path(out).expanduser().resolve()
            held.enter_context(lock(folder / ".lock", timeout=0, what=f"folder {folder}"))
            name = f"{method} {_digest(asked | {'seed': seed}, teacher, student)}"
        run = fit(
            algorithm,
            n_calls(algorithm),
            name=name,
            checkpoint=folder / "checkpoint.safetensors" if folder else None,
            identity={"seed": seed, **asked["settings"], **asked},
            progress=progress,
        )
        budget = copy.copy(algorithm.budget)
        fresh = _fresh(algorithm)
        agreement = float((fresh["student"] == fresh["teacher"]).float().mean())
        figures = {}
        if test_set is not None:
            there = test_set.to(runtime.device)
            figures = {who: accuracy(network, there, runtime)
                       for who, network in zip(("teacher", "student"), players, strict=True)}  # fmt: skip
    measured = {"agreement": agreement} | {f"{who} accuracy": value for who, value in figures.items()}
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
        "metrics": {f"distill/{method}/{measure}": value for measure, value in measured.items()},
        "best": {},
        "finished": records.now(),
    }
    _like(trained.eval(), student)
    if folder:
        with replace_file(folder / "student.safetensors") as temporary:
            save_model(trained, str(temporary))  # which, unlike save_file, takes weights that are tied
        records.write(folder, record)
    images = fresh["images"][:64].clamp(0, 1).float().cpu()
    return Distilled(trained, agreement, figures, images, budget, run.seconds, run, record)


def _image_shape(image_shape: Sequence[int]) -> tuple[int, int, int]:
    given = tuple(image_shape) if isinstance(image_shape, Sequence) else (image_shape,)
    if len(given) != 3 or not all(isinstance(side, int) and side > 0 for side in given):
        raise InputError(f"image_shape must be three whole numbers (channels, height, width), not {image_shape!r}")
    channels, height, width = given
    if width in (1, 3) and channels > 4:
        raise InputError(
            f"image_shape is (channels, height, width), and {given} has the channels last; "
            f"give ({width}, {channels}, {height})"
        )
    return channels, height, width


def _preset(image_shape: tuple[int, int, int]) -> str:
    channels, *sides = image_shape
    if max(sides) < 16:
        return "digits"
    return "mnist" if channels == 1 else "cifar10"


def _check_networks(teacher: nn.Module, student: nn.Module) -> None:
    for who, network in (("teacher", teacher), ("student", student)):
        if not isinstance(network, nn.Module):
            raise InputError(f"the {who} is a {type(network).__name__}, not a torch.nn.Module")
    if teacher is student:
        raise InputError("teacher and student are the same network; give the student its own")
    if any(module.training for module in teacher.modules()):
        raise InputError("the teacher is in training mode, where batch norm and dropout change it; call teacher.eval()")


def _normalization(
    mean: Sequence[float] | None, std: Sequence[float] | None, channels: int, *networks: nn.Module
) -> tuple[list[float], list[float]] | None:
    if mean is None and std is None:
        return None
    if mean is None or std is None:
        raise InputError("mean and std belong together; give both, or none if the networks expect images in [0, 1]")
    if isinstance(mean, float | int) or isinstance(std, float | int) or not len(mean) == len(std) == channels:
        raise InputError(f"mean and std must be sequences of {channels} numbers, one per channel")
    if any(isinstance(layer, Normalize) for network in networks for layer in network.modules()):
        raise InputError("a network from dfkd_lib.models normalises its images itself; leave mean and std out")
    return [float(m) for m in mean], [float(s) for s in std]


def _test_set(test: ImageSet | tuple[Tensor, Tensor], image_shape: tuple[int, int, int], n_classes: int) -> ImageSet:
    if not isinstance(test, ImageSet):
        if not (isinstance(test, tuple | list) and len(test) == 2 and all(isinstance(t, Tensor) for t in test)):
            raise InputError("test must be an ImageSet or a pair of tensors (images, labels)")
        images, labels = test
        if images.is_floating_point():
            if not len(images) or images.min() < 0 or images.max() > 1:
                raise InputError("test images must be uint8 or floats in [0, 1]; leave normalising to mean and std")
            images = images.mul(255).round().to(torch.uint8)
        test = ImageSet(images, labels.long(), classes=[str(i) for i in range(n_classes)], name="test", split="test")
    if test.image_shape != image_shape:
        raise InputError(f"the test images have shape {test.image_shape}, and image_shape is {image_shape}")
    if test.labels is None or test.task != "classification" or not len(test):
        raise InputError("the test images need one label each")
    if test.labels.min() < 0 or test.labels.max() >= n_classes:
        raise InputError(f"the test labels must lie in 0..{n_classes - 1}, as the teacher has {n_classes} classes")
    return test


def _copied(network: nn.Module, who: str, memo: dict[int, Any] | None = None) -> nn.Module:
    try:
        return copy.deepcopy(network, memo)
    except (RuntimeError, TypeError, NotImplementedError) as e:
        raise InputError(f"the {who} cannot be copied with copy.deepcopy: {str(e).splitlines()[0]}") from e


def _borrowed(teacher: nn.Module) -> nn.Module:
    """A copy that shares the weights: it can be frozen and moved, and costs no memory where it is not moved.

    The buffers are copies, in case a forward pass writes to them.
    """
    memo = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in teacher.parameters()}
    return _copied(teacher, "teacher", memo)


def _wrapped(network: nn.Module, normalization: tuple[list[float], list[float]] | None) -> nn.Module:
    if normalization is None:
        return network
    return nn.Sequential(OrderedDict(normalize=Normalize(*normalization), network=network))


def _like(network: nn.Module, model: nn.Module) -> None:
    """Bring a trained copy back to the device, data types and memory format of what it was copied from."""
    with torch.no_grad():
        for mine, theirs in (
            *zip(network.parameters(), model.parameters(), strict=True),
            *zip(network.buffers(), model.buffers(), strict=True),
        ):
            mine.data = mine.data.to(theirs.device, theirs.dtype, memory_format=torch.contiguous_format)
            mine.grad = None


def _fresh(method: DataFreeMethod) -> dict[str, Tensor]:
    """Images that the student has not seen, and what the networks say to them; nothing more is learnt."""
    if isinstance(method, BankDistiller):
        method.student.eval()
        with no_weight_gradients(method.student):
            method.synthesize()
        return method.watch(min(_FRESH, method.newest_call))
    return method.watch(_FRESH)


def _digest(asked: dict[str, Any], teacher: nn.Module, student: nn.Module) -> str:
    """Eight hexadecimal digits for the call: its arguments, the teacher's weights, the student's architecture."""
    digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode())
    for name, value in (*teacher.named_parameters(), *teacher.named_buffers()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    digest.update(repr([(name, list(value.shape)) for name, value in student.named_parameters()]).encode())
    return digest.hexdigest()[:8]


def _plain(value: Any) -> Any:
    """A setting as JSON knows it: no infinity, which stands for "no limit"."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def _global_random_state_kept(device: str) -> Iterator[None]:
    states = [(torch.get_rng_state, torch.set_rng_state)]
    if torch.cuda.is_initialized() or (device != "cpu" and torch.cuda.is_available()):
        states.append((torch.cuda.get_rng_state, torch.cuda.set_rng_state))
    before = [take() for take, _ in states]
    try:
        yield
    finally:
        for (_, put), state in zip(states, before, strict=True):
            put(state)
