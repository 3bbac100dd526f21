"""A device that is not there: `DEVICE` computes on the processor, and its tensors may not meet those of the processor.

PyTorch takes "cpu:0" for the processor, as it does "cpu", but the two devices are unequal. While a
:class:`PretendedDevice` is open, it remembers for each tensor's memory which of them it was asked for, answers
`tensor.device` from that, and refuses what CUDA would refuse: an operation, or a generator, of the two at once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

DEVICE, HOST = torch.device("cpu", 0), torch.device("cpu")
aten = torch.ops.aten
COPIES = {aten.copy_.default, aten.copy.default, aten._to_copy.default, aten._foreach_copy_.default}
READS = {Tensor.numpy, Tensor.tolist, Tensor.__array__}
_REAL_GENERATOR = torch.Generator
_ASKED = Tensor.device.__get__  # type: ignore[attr-defined]
Function = Callable[..., Any]


class MixedDevices(RuntimeError):
    """What CUDA would have refused."""


class PretendedDevice(TorchFunctionMode):
    """Tensors are made, moved and used while it is open; those from before are the processor's.

    Attributes:
        copies: a line for each copy between the device and the processor, and for each read of a number.
    """

    def __init__(self) -> None:
        super().__init__()
        self.copies: list[str] = []
        self._on_device: dict[int, bool] = {}  # by the address of the memory; each new tensor is entered anew
        self._operations = _Operations(self)

    def __enter__(self) -> PretendedDevice:
        torch.Generator = _Generator  # type: ignore[misc]
        self._operations.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._operations.__exit__(*error)
        torch.Generator = _REAL_GENERATOR  # type: ignore[misc]

    def has(self, x: Tensor) -> bool:
        """Whether a tensor lies on the device."""
        with torch._C.DisableTorchFunction():
            return self._on_device.get(x.untyped_storage()._cdata, False)

    def put(self, x: Tensor, on_device: bool) -> Tensor:
        """Say where the memory of a tensor lies."""
        with torch._C.DisableTorchFunction():
            self._on_device[x.untyped_storage()._cdata] = on_device
        return x

    def __torch_function__(self, func: Function, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func == _ASKED:
            return DEVICE if self.has(args[0]) else HOST
        if func is Tensor.cpu:
            return self._moved(args[0], HOST, lambda: func(*args, **kwargs))
        if func is Tensor.to:
            asked = [*args[1:], *kwargs.values()]
            places = [a for a in asked if isinstance(a, str | torch.device)]
            places += [DEVICE if self.has(a) else HOST for a in asked if isinstance(a, Tensor)]
            if places:
                return self._moved(args[0], torch.device(places[0]), lambda: func(*args, **kwargs))
        if func in READS and self.has(args[0]):
            raise MixedDevices(f"{func.__name__} of a tensor that lies on the device")
        result = func(*args, **kwargs)
        if func is Tensor.__deepcopy__:
            return self.put(result, self.has(args[0]))
        if isinstance(result, Tensor) and kwargs.get("device") is not None:
            self.put(result, torch.device(kwargs["device"]) == DEVICE)
        return result

    def _moved(self, x: Tensor, place: torch.device, convert: Callable[[], Tensor]) -> Tensor:
        was, wanted = self.has(x), place == DEVICE
        result = convert()
        # Clipping asks for the device of its groups in C++, where both are the processor.
        if was == wanted or "/torch/nn/utils/" in sys._getframe(2).f_code.co_filename:
            return result
        self.copied("to the device" if wanted else "from the device")
        with torch._C.DisableTorchFunction():
            shared = result.untyped_storage()._cdata == x.untyped_storage()._cdata
            return self.put(result.clone() if shared else result, wanted)

    def copied(self, what: str) -> None:
        """Note a copy, with the library's line that asked for it; the order of an epoch may be brought once for it."""
        frame = sys._getframe(1)
        while frame.f_back and "/dfkd_lib/" not in frame.f_code.co_filename:
            frame = frame.f_back
        if frame.f_code.co_name == "order":
            return
        self.copies.append(f"{frame.f_code.co_filename}:{frame.f_lineno}: {what}")


class _Operations(TorchDispatchMode):
    """Sees every operation, those of the backward pass and of optimisers too."""

    def __init__(self, device: PretendedDevice) -> None:
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, device = kwargs or {}, self.device
        flat = tree_flatten((args, kwargs))[0]
        tensors = [a for a in flat if isinstance(a, Tensor)]
        there = [device.has(x) for x in tensors]
        asked = kwargs.get("device")
        on_device = any(there) if asked is None or tensors else asked == DEVICE
        # A number of the processor may meet tensors of the device.
        if any(there) and not all(on or x.ndim == 0 for on, x in zip(there, tensors, strict=True)):
            if func not in COPIES:
                raise MixedDevices(f"{func} of {[(tuple(x.shape), on) for x, on in zip(tensors, there, strict=True)]}")
            device.copied("between device and processor")
            on_device = there[0]
        if func is aten._local_scalar_dense.default and there[0] and not _in_optimizer():
            device.copied("a number is read")
        for each in flat:
            if isinstance(each, _REAL_GENERATOR) and _Generator.on_device(each) != on_device:
                raise MixedDevices(f"{func} on {'the device' if on_device else 'the processor'}, its generator not")
        result = func(*args, **kwargs)
        with torch._C.DisableTorchFunction():
            known = {x.untyped_storage()._cdata for x in tensors}
            for x in tree_flatten(result)[0]:
                if isinstance(x, Tensor) and x.untyped_storage()._cdata not in known:
                    device.put(x, on_device)
        return result


def _in_optimizer() -> bool:
    """Whether an optimiser is at work, whose fused form reads no number on a GPU."""
    frame = sys._getframe(2)
    while frame.f_back:
        if "/torch/optim/" in frame.f_code.co_filename:
            return True
        frame = frame.f_back
    return False


class _Generator(_REAL_GENERATOR):
    """A generator that remembers for which device it was asked."""

    _places: dict[int, bool] = {}  # noqa: RUF012

    def __new__(cls, device: str | torch.device = HOST) -> _Generator:
        made = super().__new__(cls, device="cpu")
        cls._places[made._cdata] = torch.device(device) == DEVICE
        return made

    @classmethod
    def on_device(cls, generator: torch.Generator) -> bool:
        return cls._places.get(generator._cdata, False)

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return DEVICE if self.on_device(self) else HOST


def on_host(state: Any) -> Any:
    """A nested state as a checkpoint gives it back: copies that lie on the processor."""
    return tree_map_only(Tensor, lambda x: x.detach().cpu().clone(), state)
