"""Nested state to one safetensors file and back: no pickles, and one rename makes it whole.

Tensors go into the file's data; the structure around them (dicts, lists, numbers, strings) goes as JSON into
the file's own metadata.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import DamagedFile
from ..files import replace_file

_TENSOR, _PAIRS, _TUPLE = "__tensor__", "__pairs__", "__tuple__"


def save(path: Path, state: Any) -> None:
    """Write nested dicts, lists, tuples, numbers, strings, None and tensors.

    Raises:
        DFKDError: the file cannot be written; an earlier one stays as it was.
        TypeError: a value is none of the above.
    """
    tensors: dict[str, Tensor] = {}
    skeleton = _pack(state, tensors)
    with replace_file(path) as temporary:
        try:
            save_file(tensors, temporary, metadata={"state": json.dumps(skeleton)})
        except SafetensorError as e:
            raise OSError(None, str(e)) from e


def load(path: Path, device: torch.device | str = "cpu") -> Any:
    """Read what :func:`save` wrote.

    Raises:
        DamagedFile: the file is not such a file, or is cut short.
    """
    try:
        with safe_open(path, "pt", device=str(device)) as f:
            tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118 (not a dict)
            return _unpack(json.loads(f.metadata()["state"]), tensors)
    except (SafetensorError, KeyError, TypeError, ValueError) as e:
        raise DamagedFile(f"{path} is damaged or not a checkpoint ({e}); delete it to start that part anew") from e


def _pack(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        name = f"{len(tensors):05d}"
        tensors[name] = value.detach().contiguous().clone()  # a clone, as safetensors refuses shared storage
        return {_TENSOR: name}
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
            return tensors[value[_TENSOR]]
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
