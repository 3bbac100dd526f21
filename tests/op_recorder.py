"""A stand-in for CUDA graphs on the CPU: records the operations of an update and runs them again on the same tensors.

What a CUDA graph cannot see, this cannot see either: a Python number that changed, a tensor that was replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only


class _Log(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        results = [t for t in tree_flatten(out)[0] if isinstance(t, Tensor)]
        self.operations.append((func, args, kwargs or {}, results))
        return out


class OpRecorder:
    """See :class:`dfkd_lib.training.replay.Recorder`.

    Attributes:
        recordings, replays: how often either happened.
    """

    def __init__(self) -> None:
        self.recordings = self.replays = 0

    def around(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def record(self, work: Callable[[], Any], streams: Sequence[torch.Generator]) -> tuple[Callable[[], None], Any]:
        """Run `work` once under the log, and take back what it changed: a recording does nothing."""
        self.recordings += 1
        before = [stream.get_state() for stream in streams]
        log = _Log()
        touched: dict[int, tuple[Tensor, Tensor]] = {}
        with _Undo(touched), log:
            results = work()
        for tensor, value in touched.values():
            tensor.copy_(value)
        for stream, state in zip(streams, before, strict=True):
            stream.set_state(state)

        @torch.no_grad()
        def run() -> None:
            self.replays += 1
            for func, args, kwargs, old in log.operations:
                new = [t for t in tree_flatten(func(*args, **kwargs))[0] if isinstance(t, Tensor)]
                for mine, fresh in zip(old, new, strict=True):
                    if mine is not fresh and mine.data_ptr() != fresh.data_ptr():
                        mine.detach().copy_(fresh)

        return run, results


class _Undo(TorchDispatchMode):
    """Keeps the value that each tensor had before an operation first wrote to it in place."""

    def __init__(self, touched: dict[int, tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.touched = touched

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for argument, value in [*zip(func._schema.arguments, args, strict=False)] + [
            (a, kwargs[a.name]) for a in func._schema.arguments if a.name in kwargs
        ]:
            if argument.alias_info is not None and argument.alias_info.is_write:
                tree_map_only(Tensor, self._keep, value)
        if func is torch.ops.aten.native_batch_norm.default:  # whose schema is silent about the running statistics
            tree_map_only(Tensor, self._keep, args[3:5])
        return func(*args, **kwargs)

    def _keep(self, tensor: Tensor) -> Tensor:
        if id(tensor) not in self.touched:
            self.touched[id(tensor)] = (tensor.detach(), tensor.detach().clone())
        return tensor
