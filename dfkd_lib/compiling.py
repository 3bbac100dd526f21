"""Networks whose passes go through `torch.compile`; what taps, hooks and checks see stays the same.

:meth:`dfkd_lib.runtime.Runtime.prepare` gives every network of a compiled run a :class:`Compiled`. That of a frozen
teacher has its weights as constants, and its batch norm folded into convolutions, where nothing asks for a gradient.

Measured on one thread of a busy server processor in float32, batch 128, by turns in one process: a WRN-40-2 answers
1.3 times as fast, and gives gradients with respect to its images 1.4 to 1.7 times as fast; an update of a WRN-16-1 is
1.3 times as fast. Constant weights add next to nothing there, because few of its batch norms follow a convolution.
Compiling took one to four minutes a network, and 6 to 21 seconds where torch found its kernels in its cache.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from types import FunctionType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .errors import first_line
from .taps import Seen, tapped

WORTH_IT = 1e14  # multiply-accumulates of a run: a WRN-16-1 learning from a WRN-40-2 for about 2,000 updates of 128
BACKEND = "inductor"
M = TypeVar("M", bound=nn.Module)
_looking = [0]


class Compiled:
    """What a call of a network does in a compiled run, in the place of what `nn.Module.compile` would put there.

    Its passes have a cache of their own: torch counts recompilations by code object, and all networks share that of
    `nn.Module`. While hooks are open that were not there at first, passes run as written, and so they do inside
    :func:`as_written`. What cannot be compiled does so from then on, after one line on standard error.

    Args:
        network: its passes; its hooks as they are now are compiled with it.

    Attributes:
        frozen: whether weights become constants where no gradient is asked for. They are looked at before each such
            pass, which is compiled again if they are not what they were.
    """

    def __init__(self, network: nn.Module, frozen: bool = False) -> None:
        self.network, self.frozen, self.hooks, self.works = network, frozen, _hooks(network), True
        self.usual = _compile(network._call_impl)
        self.constant, self.weights = self.usual, list[tuple[int, int]]()
        self.shows: dict[tuple[nn.Module, ...], _Show] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """One pass."""
        written = self.network._call_impl
        if not self.compiles:
            return written(*args, **kwargs)
        passes = self.usual if torch.is_grad_enabled() or not self.frozen else self._with_constants()
        return self._attempt(passes, written, *args, **kwargs)

    def show(self, layers: Sequence[nn.Module], x: Tensor) -> tuple[Any, list[Seen]]:
        """See :func:`shown`. Before the first, a pass as written tells in what order the layers are visited."""
        written, key = self.network._call_impl, tuple(layers)
        if not self.compiles:
            return _tapped_pass(written, layers, x)
        if key not in self.shows:
            with torch.no_grad():
                self.shows[key] = _Show(written, [visit.layer for visit in _tapped_pass(written, layers, x)[1]])
        known = self.shows[key]
        with known.tapped():
            logits, inputs = self._attempt(known.passes, known.written, x)
        return logits, [Seen(layer, given) for layer, given in zip(known.order, inputs, strict=True)]

    @property
    def compiles(self) -> bool:
        """Whether a pass that begins now is a compiled one."""
        return self.works and not _looking[0] and _hooks(self.network) == self.hooks

    def _with_constants(self) -> Callable[..., Any]:
        tensors = (*self.network.parameters(), *self.network.buffers())
        weights = [(t.data_ptr(), t._version) for t in tensors]
        if weights != self.weights:
            self.constant, self.weights = _compile(self.network._call_impl, freezing=True), weights
        return self.constant

    def _attempt(self, passes: Callable[..., Any], written: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            return passes(*args, **kwargs)
        except torch._dynamo.exc.TorchDynamoException as e:
            print(
                f"dfkd: note: {type(self.network).__name__} cannot be compiled, and runs as written: {first_line(e)}",
                file=sys.stderr,
            )
            self.works = False
            return written(*args, **kwargs)


class _Show:
    """Passes that also return what the layers are given, in the order of visits.

    The taps are open while a pass is traced, and write to one list that is empty before and after; one that is opened
    and closed in the traced pass itself would break it into pieces.
    """

    def __init__(self, passes: Callable[..., Any], order: list[nn.Module]) -> None:
        given: list[Tensor] = []
        self.order, self.given = order, given
        self.tap = lambda module, inputs: given.append(inputs[0])

        def written(x: Tensor) -> tuple[Any, list[Tensor]]:
            logits = passes(x)
            return logits, [*given]

        self.written, self.passes = written, _compile(written)

    @contextmanager
    def tapped(self) -> Iterator[None]:
        hooks = [layer.register_forward_pre_hook(self.tap) for layer in dict.fromkeys(self.order)]
        try:
            yield
        finally:
            self.given.clear()
            for hook in hooks:
                hook.remove()


def compiled(network: M, *, frozen: bool = False) -> M:
    """The network, its passes compiled from now on; what was compiled before is kept.

    Args:
        frozen: nothing of it ever changes.
    """
    before = network._compiled_call_impl
    if not isinstance(before, Compiled) or before.hooks != _hooks(network):
        network._compiled_call_impl = Compiled(network, frozen)
    else:
        before.frozen = before.frozen or frozen
    return network


def shown(network: nn.Module, layers: Sequence[nn.Module], x: Tensor) -> tuple[Any, list[Seen]]:
    """One pass on x: what comes out, and what each visit to one of `layers` was given on the way."""
    passes = network._compiled_call_impl
    return passes.show(layers, x) if layers and isinstance(passes, Compiled) else _tapped_pass(network, layers, x)


def _tapped_pass(passes: Callable[..., Any], layers: Sequence[nn.Module], x: Tensor) -> tuple[Any, list[Seen]]:
    with tapped(layers) as seen:
        return passes(x), seen


@contextmanager
def as_written() -> Iterator[None]:
    """Inside, nothing is compiled: for checks and evaluations, whose batches come once or are of all sizes."""
    _looking[0] += 1
    try:
        yield
    finally:
        _looking[0] -= 1


def pays(macs: float, device: torch.device) -> bool:
    """Whether a run on a processor is long enough to earn back the time of compiling, where that can be done.

    Args:
        macs: multiply-accumulates of the whole run, those of synthesis not counted.
    """
    return device.type == "cpu" and macs >= WORTH_IT and not hindrance(device)


def hindrance(device: torch.device) -> str:
    """Why networks cannot be compiled for a device here; empty if they can."""
    compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    if shutil.which(compiler) is None:
        return f"there is no C++ compiler {compiler}; the environment variable CXX can name one"
    if device.type == "cuda" and find_spec("triton") is None:
        return "the package triton is not installed"
    return ""


def _compile(function: Callable[..., Any], **options: bool) -> Callable[..., Any]:
    def passes(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    own = FunctionType(passes.__code__.replace(), passes.__globals__, closure=passes.__closure__)
    # Random numbers as eager passes draw them. Shapes stay the same, so none is left open.
    chosen: dict[str, Any] = {"fallback_random": True, **options}
    return torch.compile(own, dynamic=False, backend=BACKEND, options=chosen if BACKEND == "inductor" else None)


def _hooks(network: nn.Module) -> list[int]:
    """Which forward hooks are registered now, by their numbers."""
    return [number for m in network.modules() for hooks in (m._forward_pre_hooks, m._forward_hooks) for number in hooks]
