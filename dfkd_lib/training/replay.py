"""One kind of update, as it is written or, on CUDA, recorded once and replayed: a graph has no launches to wait for.

A small network's update is hundreds of kernels of a few microseconds each, which Python hands out more slowly than
the device works them off. A CUDA graph hands them out all at once.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch.utils._pytree import tree_map_only

from ..runtime import Runtime

WARM_UP = 3  # calls before the recording: optimisers make their state, libraries choose their kernels


class Recorder(Protocol):
    """What records and replays; :class:`CudaRecorder`, or a stand-in where there is no GPU."""

    def around(self) -> AbstractContextManager[Any]:
        """Where calls before the recording run."""

    def record(self, work: Callable[[], Any], streams: Sequence[torch.Generator]) -> tuple[Callable[[], None], Any]:
        """Record `work` without running it; returns what runs it, and where its results then lie."""


class Replay:
    """A function that is called many times, recorded at its fourth call and replayed from then on.

    Args:
        work: takes nothing and returns tensors, nested in dicts or tuples, or one. It reads and writes tensors that
            outlive it, in place, and nothing else that changes from call to call: no Python number, no new tensor
            under an old name. Learning rates are tensors (:func:`~.players.recordable`), batches lie in buffers.
        runtime: which says whether to record, see :attr:`dfkd_lib.runtime.Runtime.graphs`.
        streams: the random generators that `work` draws from.
    """

    def __init__(self, work: Callable[[], Any], runtime: Runtime, streams: Sequence[torch.Generator] = ()) -> None:
        self.work, self.streams = work, streams
        self.recorder: Recorder | None = None
        if runtime.graphs:
            self.recorder = recorder_of(runtime)
        self._calls: dict[tuple[Hashable, ...], int] = {}
        self._recorded: dict[tuple[Hashable, ...], tuple[Callable[[], None], Any]] = {}

    def __call__(self, *key: Hashable) -> Any:
        """Do the work once; what it returns is the caller's.

        Args:
            key: what of the work is decided in Python, such as which terms play. Each key is recorded apart.
        """
        if self.recorder is None:
            return self.work()
        if key not in self._recorded:
            self._calls[key] = self._calls.get(key, 0) + 1
            if self._calls[key] <= WARM_UP:
                with self.recorder.around():
                    return self.work()
            try:
                self._recorded[key] = self.recorder.record(self.work, self.streams)
            except RuntimeError as e:
                print(f"dfkd: note: an update cannot be recorded, and runs as written: {e}".splitlines()[0],
                      file=sys.stderr)  # fmt: skip
                self.recorder = None
                return self.work()
        run, results = self._recorded[key]
        run()
        return tree_map_only(torch.Tensor, torch.clone, results)

    def forget(self) -> None:
        """Record anew, after tensors that the work uses were replaced by others."""
        self._calls.clear()
        self._recorded.clear()


class CudaRecorder:
    """CUDA graphs, recorded on a stream of their own on which the warm-up runs too.

    They share their memory: one is replayed at a time, and between replays nothing lives in it but results, of which
    the caller gets copies. CMI, whose memory grows, records an inner step some twenty times.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)
        self.memory: Any = torch.cuda.graph_pool_handle()

    def around(self) -> AbstractContextManager[Any]:
        """The recording's stream, after and before all other work of the device."""
        return _OnStream(self.stream)

    def record(self, work: Callable[[], Any], streams: Sequence[torch.Generator]) -> tuple[Callable[[], None], Any]:
        """See :class:`Recorder`."""
        graph, before = torch.cuda.CUDAGraph(), [stream.get_state() for stream in streams]
        for stream in streams:
            graph.register_generator_state(stream)
        gc.collect()
        gc.disable()  # an older graph that is collected in the middle of a recording breaks it
        try:
            with torch.cuda.graph(graph, pool=self.memory, stream=self.stream, capture_error_mode="thread_local"):
                results = work()
        except RuntimeError:
            for stream, state in zip(streams, before, strict=True):  # which would believe that it is still recorded
                fresh = torch.Generator(stream.device)
                fresh.set_state(state)
                stream.graphsafe_set_state(fresh.graphsafe_get_state())
            raise
        finally:
            gc.enable()
        return graph.replay, results


class _OnStream:
    def __init__(self, stream: torch.cuda.Stream) -> None:
        self.stream, self.inside = stream, torch.cuda.stream(stream)

    def __enter__(self) -> None:
        self.before = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(self.before)
        self.inside.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.inside.__exit__(*error)
        self.before.wait_stream(self.stream)


def recorder_of(runtime: Runtime) -> Recorder | None:
    """What records on this runtime's device; None where nothing can."""
    if runtime.device.type != "cuda":
        return None
    try:
        return CudaRecorder(runtime.device)
    except (RuntimeError, AssertionError):
        return None
