"""The data-free methods by name, all with one calling form, so that a loop over names is a fair comparison.

    for name in distillers.names():
        method = distillers.build(name, teacher, new_student(), (1, 8, 8), runtime, preset="digits")
        fit(method, distillers.n_calls(method), name=name)

Equal for all: the number of student updates, and the cosine over them that takes the student's learning rate to 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from importlib import import_module
from typing import Any

from torch import nn

from .errors import InputError, unknown
from .methods.dfad import DFAD
from .methods.distiller import Distiller
from .runtime import Runtime
from .settings import made, typed

DataFreeMethod = Distiller | DFAD


@dataclass(frozen=True)
class _Entry:
    """Where a method is found; a name may stand for a method with some settings `fixed`."""

    module: str
    constructor: str
    fixed: Mapping[str, Any] = field(default_factory=dict)
    instead: str = ""


_ENTRIES = {
    "dafl": _Entry("dafl", "DAFL"),
    "zskt": _Entry("zskt", "ZSKT"),
    "deepinversion": _Entry("deepinversion", "DeepInversion", {"adv": 0.0}, "adi"),
    "adi": _Entry("deepinversion", "DeepInversion"),
    "dfq": _Entry("dfq", "DFQ"),
    "fast": _Entry("fast", "Fast"),
    "cmi": _Entry("cmi", "CMI"),
    "nayer": _Entry("nayer", "NAYER"),
    "cpnet": _Entry("cpnet", "CPNet"),
    "dfad": _Entry("dfad", "DFAD"),
    "dfad-one-stage": _Entry("one_stage", "OneStageDFAD", {"k": 1, "generator_steps": 1}, "dfad"),
    "random": _Entry("dfad", "DFAD", {"generator_steps": 0}, "dfad"),
}

UPDATES = {"digits": 400, "mnist": 1500, "cifar10": 8000, "paper": 80_000}
"""The presets, and the student updates of each: small scales with settings of our own, and "paper", the published
settings of each method for CIFAR, or MNIST where its authors have them (200 epochs of 400 updates, the length of the
toolbox's runs). "cifar10" is "paper" with the loop cut down to a tenth of the updates, and with the batch-norm term
in its relative form at weight 10: in the papers' form it is 17 on real images for this book's WRN-40-2, about 1 for the
authors' networks, and drowns the class term."""


def names() -> list[str]:
    """The methods that :func:`build` knows; "random" is DFAD's generator left as it was drawn."""
    return list(_ENTRIES)


def needs_batch_norm(name: str) -> bool:
    """Whether a method matches the running statistics of the teacher's batch norm.

    Raises:
        InputError: unknown method.
    """
    return hasattr(settings_for(name), "bn")


def settings_for(
    name: str,
    *,
    preset: str = "cifar10",
    n_updates: int | None = None,
    image_shape: Sequence[int] = (3, 32, 32),
    **settings: Any,
) -> Any:
    """The settings of a method: its published ones, changed by the preset, changed by what is given here.

    Args:
        preset: one of `UPDATES`.
        n_updates: student updates, at least 1; None takes the preset's number.
        image_shape: (C, H, W). "paper" stands for the published MNIST settings where C is 1, if there are any.
        settings: any other fields of the method's `Settings`.

    Returns:
        A `Settings` of the method's module. Its updates per outer iteration are at most as many as asked for, and
        spread evenly over the iterations, so that the last one does not overshoot `n_updates` by much.

    Raises:
        InputError: unknown method, preset or setting, or a value that cannot be.
    """
    if typed("method", name, str) not in _ENTRIES:
        raise unknown("method", name, _ENTRIES)
    if typed("preset", preset, str) not in UPDATES:
        raise unknown("preset", preset, UPDATES)
    n_updates = typed("n_updates", UPDATES[preset] if n_updates is None else n_updates, int)
    if n_updates < 1:
        raise InputError(f"n_updates must be at least 1, not {n_updates}")
    entry, module = _ENTRIES[name], _module(name)
    known = [f.name for f in fields(module.Settings) if f.name != "n_updates"]
    for key in settings:
        if key not in known:
            raise unknown(f"setting of {name}", key, known)
        if key in entry.fixed:
            raise InputError(f"{name} has {key} = {entry.fixed[key]!r} by definition; choose method {entry.instead!r}")
    published = getattr(module, "PAPER_MNIST", {}) if image_shape[0] == 1 else {}
    given = (published if preset == "paper" else module.PRESETS[preset]) | settings | dict(entry.fixed)
    chosen = made(module.Settings, given | {"n_updates": n_updates})
    per_call = _updates_per_call(chosen)
    evenly = math.ceil(n_updates / math.ceil(n_updates / per_call))
    if evenly != per_call:
        chosen = made(module.Settings, given | {"n_updates": n_updates, _per_call_field(chosen): evenly})
    if name == "adi" and not chosen.adv > 0:
        raise InputError("adi needs adv above 0; without the term it is method 'deepinversion'")
    return chosen


def build(
    name: str,
    teacher: nn.Module,
    student: nn.Module,
    image_shape: Sequence[int],
    runtime: Runtime,
    *,
    preset: str = "cifar10",
    n_updates: int | None = None,
    **settings: Any,
) -> DataFreeMethod:
    """A method ready to run: `fit(method, n_calls(method), name=...)`.

    The teacher is frozen and the student trained in place, as by every method's own constructor.

    Args:
        teacher, student: images [B, C, H, W] in [0, 1] -> logits [B, K].
        image_shape: (C, H, W).
        preset, n_updates, settings: see :func:`settings_for`.

    Raises:
        InputError: see :func:`settings_for`; networks that do not fit each other, the images or the method.
    """
    chosen = settings_for(name, preset=preset, n_updates=n_updates, image_shape=image_shape, **settings)
    method: DataFreeMethod = _constructor(name)(teacher, student, tuple(image_shape), chosen, runtime)
    return method


def n_calls(method: DataFreeMethod, n_updates: int | None = None) -> int:
    """How many outer iterations give `n_updates` student updates, those included that only synthesise.

    Args:
        n_updates: None takes the number that the method's learning rate is scheduled for.
    """
    settings: Any = method.settings  # type: ignore[union-attr]
    # CMI calls its warm-up the pre-inversion.
    warm_up = getattr(settings, "warmup", 0) or getattr(settings, "preinvert", 0)
    return int(warm_up) + math.ceil((n_updates or settings.n_updates) / _updates_per_call(settings))


def _module(name: str) -> Any:
    return import_module(f".methods.{_ENTRIES[name].module}", __package__)


def _constructor(name: str) -> Callable[..., DataFreeMethod]:
    found: Any = getattr(_module(name), _ENTRIES[name].constructor)
    return getattr(found, "for_images", found)


def _per_call_field(settings: Any) -> str:
    return "kd_steps" if hasattr(settings, "kd_steps") else "k"


def _updates_per_call(settings: Any) -> int:
    return int(getattr(settings, _per_call_field(settings)))
