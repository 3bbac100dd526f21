"""Nested state to one safetensors file and back: no pickles, and one rename makes it whole.

Tensors go into the file's data; the structure around them (dicts, lists, numbers, strings) goes as JSON into
the file's own metadata, beside a checksum of both.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import DamagedFile, DFKDError
from ..files import replace_file

_TENSOR, _ORDER, _PAIRS, _TUPLE = "__tensor__", "order", "__pairs__", "__tuple__"


def save(path: Path, state: Any) -> None:
    """Write nested dicts, lists, tuples, numbers, strings, None and tensors, whose order in memory is kept.

    Raises:
        DFKDError: the file cannot be written; an earlier one stays as it was.
        TypeError: a value is none of the above.
    """
    tensors: dict[str, Tensor] = {}
    skeleton = json.dumps(_pack(state, tensors))
    with replace_file(path) as temporary:
        try:
            # One entry, because several are written in an order of chance, and equal states shall be equal files.
            save_file(tensors, temporary, metadata={"checked": f"{_digest(skeleton, tensors)} {skeleton}"})
        except SafetensorError as e:
            raise OSError(None, str(e)) from e


def load(path: Path) -> Any:
    """Read what :func:`save` wrote, onto the CPU; no tensor shares memory with another or with the file.

    Raises:
        DFKDError: the file cannot be read.
        DamagedFile: it is not such a file, is cut short, or a bit of it has changed.
    """
    try:
        with safe_open(path, "pt") as f:
            # Copies, because those in the file are not aligned, and some kernels add in another order then.
            tensors = {name: f.get_tensor(name).clone() for name in f.keys()}  # noqa: SIM118 (not a dict)
            metadata = f.metadata()
        if "checked" in metadata:
            checksum, skeleton = metadata["checked"].split(" ", 1)
        else:  # Earlier versions had two entries, and the first a checksum only in the JSON beside a teacher.
            checksum, skeleton = metadata.get("sha256"), metadata["state"]
        if checksum and checksum != _digest(skeleton, tensors):
            raise ValueError("its checksum differs")
        return _unpack(json.loads(skeleton), tensors)
    except OSError as e:
        raise DFKDError(f"cannot read {path}: {e.strerror or e}") from e
    except (SafetensorError, KeyError, TypeError, ValueError) as e:
        raise DamagedFile(f"{path} is damaged or not a checkpoint ({e}); delete it to start that part anew") from e


def _digest(skeleton: str, tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(skeleton.encode())
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _pack(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        name = f"{len(tensors):05d}"
        # Sums run in the order in which a tensor lies, so a resumed run needs it; safetensors takes contiguous
        # tensors only, and no shared storage.
        order = sorted(range(value.ndim), key=value.stride, reverse=True)
        stored = value.detach().permute(order)
        tensors[name] = torch.empty(stored.shape, dtype=stored.dtype).copy_(stored)
        return {_TENSOR: name} if order == sorted(order) else {_TENSOR: name, _ORDER: order}
    if isinstance(value, dict):  # as pairs: optimisers key their state by number, which JSON would make strings
        return {_PAIRS: [[key, _pack(item, tensors)] for key, item in value.items()]}
    if isinstance(value, tuple):
        return {_TUPLE: [_pack(item, tensors) for item in value]}
    if isinstance(value, list):
        return [_pack(item, tensors) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"a checkpoint cannot hold a {type(value).__name__}")


def _unpack(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpack(item, tensors) for item in value]
    if isinstance(value, dict):
        if _TENSOR in value:
            stored, order = tensors[value[_TENSOR]], value.get(_ORDER)
            return stored.permute([order.index(axis) for axis in range(stored.ndim)]) if order else stored
        if _TUPLE in value:
            return tuple(_unpack(item, tensors) for item in value[_TUPLE])
        return {key: _unpack(item, tensors) for key, item in value[_PAIRS]}
    return value


def all_finite(state: Any) -> bool:
    """Whether every floating-point tensor in a nested state is free of NaN and infinity."""
    if isinstance(state, Tensor):
        return not state.is_floating_point() or bool(torch.isfinite(state).all())
    if isinstance(state, dict):
        return all(all_finite(item) for item in state.values())
    if isinstance(state, (list, tuple)):
        return all(all_finite(item) for item in state)
    return True
