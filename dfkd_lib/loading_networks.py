"""A network from what a person has of it: a name of torchvision or timm, a folder of transformers, a file of Python."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import json
import pickle
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from .errors import DamagedFile, InputError, first_line, unknown

FORMS = "torchvision:NAME, timm:NAME, hf:FOLDER or FILE.py:FUNCTION"
_WRAPPINGS = ("state_dict", "model_state_dict", "model", "net", "weights")  # what files keep the weights under
_PREFIXES = ("module.", "_orig_mod.")  # of networks that were saved inside DataParallel or torch.compile


@dataclass(frozen=True)
class Loaded:
    """A network, and what comes with it.

    Attributes:
        network: images [B, C, H, W] -> logits [B, K].
        mean, std: one number per channel, of images in [0, 1]; None where nothing is said.
        class_names: by index; empty where nothing is said.
    """

    network: nn.Module
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    class_names: tuple[str, ...] = ()


def load_network(
    name: str, n_classes: int, *, channels: int = 3, weights: str | Path | None = None, trained: bool = False
) -> Loaded:
    """The network that a name stands for.

    Args:
        name: one of `FORMS`. The function takes no arguments and returns the network; running it runs the file.
            "hf:" asks for the extra `text`, which brings transformers, "timm:" for timm.
        n_classes: K. A network from a file of Python is taken as it comes.
        channels: C; only timm builds networks for others than 3.
        weights: file to load weights from, see :func:`load_weights`.
        trained: whether the network must have learnt: without `weights`, those that torchvision or timm publish for the
            name are used, fetched on first use. A function in a file may load its own.

    Raises:
        InputError: an unknown name, a package that is not installed, or weights that do not fit.
    """
    kind, colon, rest = name.partition(":")
    if kind in _LOADERS and colon and rest:
        loaded = _LOADERS[kind](rest, n_classes, channels, trained and weights is None)
    elif ".py:" in name:
        path, _, function = name.rpartition(":")
        loaded = Loaded(_from_file(Path(path).expanduser(), function))
    else:
        raise InputError(f"{name!r} names no network; give {FORMS}")
    if weights is not None:
        load_weights(loaded.network, weights)
    return loaded


def load_weights(network: nn.Module, path: str | Path) -> None:
    """Fill a network from a file of weights, `.safetensors` or what `torch.save(network.state_dict(), ...)` wrote.

    Nothing in the file is executed. A dictionary of training that holds the weights under a usual key, and names that
    begin as `DataParallel` or `torch.compile` has them, are understood.

    Raises:
        InputError: no such file; it holds more than weights; its names or shapes are not those of the network.
        DamagedFile: it cannot be read.
    """
    file = Path(path).expanduser()
    state = _state(file)
    own = network.state_dict()
    for prefix in _PREFIXES:
        if all(key.startswith(prefix) for key in state) and not all(key.startswith(prefix) for key in own):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    # Networks that were saved by an old version of torch do not count batches.
    lacking = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    tied = _tied(own, state)
    lacking = [key for key in lacking if key not in tied]
    other = [key for key in state if key not in own]
    said = [f"{verb} {_some(names)}" for verb, names in (("lacks", lacking), ("has besides", other)) if names]
    if said:
        raise InputError(f"{file} does not fit the {type(network).__name__}: it {' and '.join(said)}")
    for key, value in state.items():
        if value.shape != own[key].shape:
            raise InputError(
                f"{file} does not fit the {type(network).__name__}: {key} is {list(value.shape)} there and "
                f"{list(own[key].shape)} in the network; is the number of classes right?"
            )
    network.load_state_dict(state, strict=False)


def _tied(own: dict[str, Tensor], state: dict[str, Tensor]) -> set[str]:
    """Names of weights that the file has under another name, as safetensors keeps tied ones once."""
    there = {own[key].data_ptr() for key in state if key in own and own[key].numel()}
    return {key for key, value in own.items() if value.numel() and value.data_ptr() in there}


def _some(names: Sequence[str]) -> str:
    return repr(names[0]) + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def _state(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        raise InputError(f"there is no file {file} with weights")
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        found = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as e:
        if "Weights only load failed" in str(e):
            raise InputError(
                f"{file} holds more than weights, and loading it could run foreign code; save its state_dict() alone"
            ) from e
        raise DamagedFile(
            f"{file} cannot be read as weights ({first_line(e)}); give a .safetensors or .pth file"
        ) from e
    except (SafetensorError, OSError, RuntimeError, ValueError, EOFError, KeyError) as e:
        raise DamagedFile(
            f"{file} cannot be read as weights ({first_line(e)}); give a .safetensors or .pth file"
        ) from e
    for key in _WRAPPINGS:
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    if not (isinstance(found, dict) and found and all(isinstance(value, Tensor) for value in found.values())):
        raise InputError(f"{file} holds no weights by name; save network.state_dict()")
    return dict(found)


# --- where names lead -----------------------------------------------------------------------------------------------


def _from_torchvision(name: str, n_classes: int, channels: int, published: bool) -> Loaded:
    from torchvision import models

    if name not in (known := models.list_models(module=models)):
        raise _no_such(name, known, "torchvision")
    _three(channels, name)
    if not published:
        return Loaded(models.get_model(name, weights=None, num_classes=n_classes))
    weights: Any = models.get_model_weights(name).DEFAULT
    _as_many(n_classes, len(weights.meta["categories"]), f"the published {name}")
    network = _fetched(lambda: models.get_model(name, weights=weights), f"torchvision's {name}")
    seen = weights.transforms()
    return Loaded(network, tuple(seen.mean), tuple(seen.std), tuple(weights.meta["categories"]))


def _from_timm(name: str, n_classes: int, channels: int, published: bool) -> Loaded:
    timm = _package("timm", "timm:NAME", "pip install timm")
    if not timm.is_model(name.split(".")[0]):
        raise _no_such(name, timm.list_models(), "timm")
    options = {"pretrained": published, "in_chans": channels}
    if published:
        network: Any = _fetched(lambda: timm.create_model(name, **options), f"timm's {name}")
        _as_many(n_classes, int(network.num_classes), f"the published {name}")
    else:
        network = timm.create_model(name, num_classes=n_classes, **options)
    seen: Any = getattr(network, "pretrained_cfg", None) or getattr(network, "default_cfg", {})
    mean, std = seen.get("mean"), seen.get("std")
    if mean is None or std is None or len(mean) != channels:
        return Loaded(network)
    return Loaded(network, tuple(mean), tuple(std))


def _from_transformers(folder: str, n_classes: int, channels: int, published: bool) -> Loaded:
    root = Path(folder).expanduser()
    if not (root / "config.json").is_file():
        raise InputError(f"folder {root} has no config.json; give a folder that save_pretrained wrote")
    transformers = _package("transformers", "hf:FOLDER", "pip install 'dfkd-lib[text]'")
    builder = transformers.AutoModelForImageClassification
    try:
        config = transformers.AutoConfig.from_pretrained(root, local_files_only=True, trust_remote_code=False)
        if kept := any(root.glob("*.safetensors")) or any(root.glob("pytorch_model*.bin")):
            _as_many(n_classes, int(config.num_labels), f"the classifier in {root}")
            transformers.logging.disable_progress_bar()  # of reading a file
            network = builder.from_pretrained(root, local_files_only=True, trust_remote_code=False)
        else:
            config.num_labels = n_classes
            network = builder.from_config(config, trust_remote_code=False)
    except InputError:
        raise
    except Exception as e:
        raise InputError(f"folder {root} cannot be loaded as an image classifier: {first_line(e)}") from e
    if published and not kept:
        raise InputError(f"folder {root} holds no weights; give their file, or put model.safetensors there")
    names = tuple(str(config.id2label[i]) for i in range(n_classes)) if kept else ()
    return Loaded(_logits_alone(network), *_preprocessing(root), names)


def _preprocessing(root: Path) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    """Mean and std of a preprocessor config, if it normalises."""
    try:
        seen = json.loads((root / "preprocessor_config.json").read_text(encoding="utf-8"))
        if seen.get("do_normalize", True) and "image_mean" in seen:
            return tuple(map(float, seen["image_mean"])), tuple(map(float, seen["image_std"]))
    except FileNotFoundError:
        pass
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as e:
        raise DamagedFile(f"{root / 'preprocessor_config.json'} cannot be read ({first_line(e)})") from e
    return None, None


def _logits_alone(network: nn.Module) -> nn.Module:
    """The network with a forward pass that returns its logits; the names of its weights stay."""
    kind: Any = type(network)

    def forward(self: Any, pixel_values: Tensor) -> Tensor:
        logits: Tensor = kind.forward(self, pixel_values).logits
        return logits

    network.__class__ = type(kind.__name__, (kind,), {"forward": forward})
    return network


def _from_file(path: Path, function: str) -> nn.Module:
    if not path.is_file():
        raise InputError(f"there is no file {path}; give {FORMS}")
    module_name = f"_network_of_{path.stem}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec and spec.loader  # any .py has them
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # where dataclasses and copies of the network look
    sys.path.insert(0, str(path.resolve().parent))
    try:
        spec.loader.exec_module(module)
        if not callable(factory := getattr(module, function, None)):
            defined = [key for key, value in vars(module).items() if getattr(value, "__module__", "") == module_name]
            raise unknown(f"function of {path}", function, defined)
        network = factory()
    except InputError:
        raise
    except Exception as e:
        raise InputError(f"{path}:{function} fails: {type(e).__name__}: {first_line(e)}") from e
    finally:
        sys.path.remove(str(path.resolve().parent))
    if not isinstance(network, nn.Module):
        raise InputError(f"{path}:{function} returns no torch.nn.Module, but {type(network).__name__}")
    return network


def _package(name: str, form: str, remedy: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as e:
        raise InputError(f"{form} needs {name} ({e}): {remedy}") from e


def _fetched(build: Callable[[], nn.Module], what: str) -> nn.Module:
    try:
        return build()
    except Exception as e:  # of a network or of a cache, in words of many libraries
        raise InputError(f"cannot fetch the weights of {what} ({first_line(e)}); give a file of weights") from e


def _no_such(name: str, known: Sequence[str], package: str) -> InputError:
    """As :func:`~.errors.unknown`, for lists that are too long to show."""
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = (
        f"near it are {', '.join(near)}"
        if near
        else f"its list is {package if package == 'timm' else 'torchvision.models'}.list_models()"
    )
    return InputError(f"{package} has no network {name!r}; {hint}")


def _as_many(n_classes: int, found: int, what: str) -> None:
    if found != n_classes:
        raise InputError(f"{what} has {found} classes, not {n_classes}; give that number, or a file of weights")


def _three(channels: int, name: str) -> None:
    if channels != 3:
        raise InputError(
            f"torchvision's {name} takes images of 3 channels, not {channels}; build it in a file of yours"
        )


_LOADERS: dict[str, Callable[[str, int, int, bool], Loaded]] = {
    "torchvision": _from_torchvision,
    "timm": _from_timm,
    "hf": _from_transformers,
}
