"""Teachers: trained on first use, cached by content, trained once however many processes ask.

A teacher is two files in `<cache>/teachers`: `NAME.safetensors` with the weights and `NAME.json` with the recipe,
the fingerprint of the data, the accuracy and the checksum of the weights. NAME holds a hash of everything that
determines the weights, so a changed recipe is another teacher, never a stale one.

Some teachers come with the book, in `book/teachers`: the same two files, weights in half precision. They are found by
model, data and recipe, whatever precision and hardware they were trained with.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import models
from .data import ImageSet, info
from .errors import DamagedFile, unknown
from .files import lock, read_json, sha256, write_json
from .locations import book_root, cache_root
from .measures.evaluation import evaluate
from .runtime import Runtime
from .training import checkpoints
from .training.fit import fit, resumed
from .training.players import freeze
from .training.supervised import Recipe, Supervised

# Published teachers: 95.5 % ResNet-34 and 94.87 % WRN-40-2 on CIFAR-10, 98.9 % LeNet-5 on MNIST. The authors' own
# commands fall short of theirs (constant learning rate, or weight decay 1e-4), so the CIFAR recipe is ours.
_CIFAR = Recipe(epochs=75, batch_size=256, lr=0.2, nesterov=True, weight_decay=5e-4, schedule="cosine", augment=True)
_GREY = Recipe(epochs=10, batch_size=128, lr=0.05, nesterov=True, weight_decay=1e-4, schedule="one-cycle")
RECIPES = {
    "digits": Recipe(epochs=20, batch_size=64, lr=0.1, nesterov=True, schedule="one-cycle"),
    "digit_scenes": Recipe(epochs=30, batch_size=32, lr=0.1, nesterov=True, schedule="one-cycle"),
    "mnist": _GREY,
    "fashion_mnist": _GREY,
    "kmnist": _GREY,
    "svhn": Recipe(epochs=40, lr=0.1, nesterov=True, schedule="cosine"),
    "cifar10": _CIFAR,
    "cifar100": _CIFAR,
    "camvid": Recipe(epochs=200, batch_size=16, lr=0.1, schedule="one-cycle", crop=128),
}

_QUICK = Recipe(
    epochs=18, batch_size=256, lr=0.25, nesterov=True, schedule="one-cycle", label_smoothing=0.1, augment=True
)
_WHITENED_ON = 5000
_SAME = ("model", "data", "recipe", "pretrained")


def recipe(dataset: str, model: str) -> Recipe:
    """How `model` is trained on `dataset`: in minutes if it is one of the quick networks, else as `RECIPES` says.

    Raises:
        InputError: no recipe for this dataset.
    """
    if model.startswith("quick_net") and dataset in ("cifar10", "cifar100", "svhn"):
        return replace(_QUICK, augment=False) if dataset == "svhn" else _QUICK
    if dataset not in RECIPES:
        raise unknown("recipe", dataset, RECIPES)
    return RECIPES[dataset]


@dataclass(frozen=True)
class Teacher:
    """A trained, frozen network and what is known about it.

    Attributes:
        module: eval mode, no weight gradients, on the run's device.
        path: its weights.
        facts: the JSON beside them: model, recipe, data, figures on the test split, checksum.
    """

    module: nn.Module
    path: Path
    facts: dict[str, Any]


def train_or_load(
    model: str,
    train: ImageSet,
    test: ImageSet,
    recipe: Recipe,
    runtime: Runtime,
    *,
    pretrained: bool = False,
    from_book: bool = True,
) -> Teacher:
    """The teacher of this recipe: from the cache, from the book, or trained now on `train` and evaluated on `test`.

    Training is resumed if an earlier one was cut short. Another process that asks meanwhile waits for it.
    The seed of the runtime belongs to the recipe; pass a runtime with the teacher's own seed.

    Args:
        model: name in `models.names()`.
        pretrained: start from ImageNet weights, where the network has them; they are downloaded.
        from_book: False trains a teacher also where one comes with the book.

    Raises:
        DataUnavailable: pretrained weights that cannot be reached.
        DamagedFile: the cached files are corrupt; the message names them.
    """
    wanted = {
        "model": model,
        "data": {"name": train.name, "shape": list(train.image_shape), "fingerprint": train.fingerprint},
        "recipe": asdict(recipe),
        "seed": runtime.seed,
        "precision": runtime.precision,
        "pretrained": pretrained,
    }
    digest = hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()[:12]
    folder = cache_root() / "teachers"
    path = folder / f"{train.name}-{model}-{digest}.safetensors"
    with lock(path.with_suffix(".lock")):
        if not path.with_suffix(".json").exists():
            if from_book and (shelved := _in_book(wanted)):
                teacher = _load(shelved, runtime)
                measured = ", ".join(f"{what} {value:.4f}" for what, value in teacher.facts["test"].items())
                print(f"{model} on {train.name} comes with the book ({measured})")
                return teacher
            _train(wanted, path, train, test, recipe, runtime)
        return _load(path, runtime)


def from_book(model: str, dataset: str, recipe: Recipe, runtime: Runtime) -> Teacher | None:
    """The teacher of this recipe that comes with the book, or None; its training images are not asked for.

    Raises:
        DamagedFile: its files are corrupt; the message names them.
    """
    wanted = {"model": model, "data": {"name": dataset}, "recipe": asdict(recipe), "pretrained": False}
    shelved = _in_book(wanted)
    return _load(shelved, runtime) if shelved else None


def _in_book(wanted: dict[str, Any]) -> Path | None:
    """The weights of a teacher that comes with the book and was trained by this recipe on these data."""
    as_read = json.loads(json.dumps(wanted))
    for path in sorted((book_root() / "teachers").glob(f"{wanted['data']['name']}-{wanted['model']}-*.json")):
        facts = read_json(path)
        if not isinstance(facts, dict):
            continue
        known = facts | {"data": {key: facts.get("data", {}).get(key) for key in as_read["data"]}}
        if all(known.get(key) == as_read[key] for key in _SAME):
            return path.with_suffix(".safetensors")
    return None


def put_into_book(teacher: Teacher, test: ImageSet, runtime: Runtime, folder: Path | None = None) -> Path:
    """Write a teacher as one that comes with the book: in half precision, evaluated as it is stored.

    Args:
        folder: None is `book/teachers`.

    Returns:
        The path of the weights.
    """
    path = (folder or book_root() / "teachers") / teacher.path.name
    halves = {
        key: value.half() if value.is_floating_point() else value
        for key, value in checkpoints.load(teacher.path).items()
    }
    checkpoints.save(path, halves)
    module = _build(teacher.facts, teacher.facts["n_classes"])
    module.load_state_dict(halves)
    stored = {"stored": "float16", "sha256": sha256(path), "test as trained": teacher.facts["test"]}
    measured = {"test": evaluate(runtime.prepare(module), test, runtime), "evaluated": runtime.describe()}
    write_json(path.with_suffix(".json"), teacher.facts | stored | measured)
    return path


def _build(facts: dict[str, Any], n_classes: int, pretrained: bool = False) -> nn.Module:
    about = info(facts["data"]["name"])
    channels = facts["data"]["shape"][0]
    mean, std = (v * channels if len(v) == 1 else v for v in (about.mean, about.std))
    return models.build(facts["model"], n_classes=n_classes, in_channels=channels, mean=mean, std=std,
                        pretrained=pretrained)  # fmt: skip


def _train(
    wanted: dict[str, Any], path: Path, train: ImageSet, test: ImageSet, recipe: Recipe, runtime: Runtime
) -> None:
    torch.manual_seed(runtime.seed)
    module = _build(wanted, train.n_classes, wanted["pretrained"])
    # Evenly spaced, because some datasets come sorted by class.
    at = torch.linspace(0, len(train) - 1, min(len(train), _WHITENED_ON)).long()
    models.whiten(module, train.batch(at)[0].cpu())
    method = Supervised(module, train, recipe, runtime)
    partial = path.with_suffix(".partial.safetensors")
    result = fit(
        method,
        method.n_steps,
        name=f"teacher {wanted['model']} on {train.name}",
        evaluate=lambda: evaluate(module, test, runtime),
        eval_every=max(1, method.n_steps // 10),
        checkpoint=partial,
        identity=wanted,
    )
    checkpoints.save(path, module.state_dict())
    facts = wanted | {
        "n_classes": train.n_classes,
        "test": {measure: result.final(measure) for measure in result.measures},
        "curve": {measure: result.evaluations(measure) for measure in result.measures},
        "seconds": result.seconds,
        "resumed": resumed(result),
        "runtime": runtime.describe(),
        "sha256": sha256(path),
    }
    write_json(path.with_suffix(".json"), facts)
    partial.unlink(missing_ok=True)


_FACTS = {
    "model": str,
    "data": {"name": str, "shape": [int]},
    "n_classes": int,
    "sha256": str,
    "test": {str: float},
    "curve": {str: [list]},
}


def _load(path: Path, runtime: Runtime) -> Teacher:
    remedy = f"delete {path.with_suffix('.json')} to have the teacher trained anew"
    facts = read_json(path.with_suffix(".json"), _FACTS, remedy)
    if not path.exists() or sha256(path) != facts["sha256"]:
        raise DamagedFile(f"teacher {path} is missing, damaged or cut short (checksum differs); {remedy}")
    module = _build(facts, facts["n_classes"])
    module.load_state_dict(checkpoints.load(path))
    return Teacher(freeze(runtime.prepare(module)), path, facts)
