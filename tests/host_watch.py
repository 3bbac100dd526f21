"""What a step of a method asks of the processor, noticed without a GPU.

On a GPU each of these either fails or makes the processor wait for the device: reading a tensor, choosing rows by a
mask, making a tensor from Python numbers; a new tensor or a random number without the device's or the stream's name.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

READS = {
    "item", "tolist", "numpy", "__array__", "cpu", "__bool__", "__float__", "__int__", "__index__", "__contains__",
    "nonzero", "argwhere", "masked_select", "unique", "unique_consecutive", "bincount", "equal", "allclose",
}  # fmt: skip
FROM_HOST = {"tensor", "as_tensor", "from_numpy", "new_tensor"}
RANDOM = {
    "rand", "randn", "randint", "randperm", "bernoulli", "multinomial", "normal", "rand_like", "randn_like",
    "randint_like", "normal_", "uniform_", "bernoulli_", "random_", "exponential_",
}  # fmt: skip
NEW = {"zeros", "ones", "full", "empty", "arange", "eye", "linspace", "rand", "randn", "randint", "randperm"}


class HostWatch(TorchFunctionMode):
    """While it is open, `found` takes a line for each such call of this project's library.

    What torch does inside its own functions is its own affair; numbers that it reads there a pretended device notices.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        caller = sys._getframe(1)
        at = caller.f_code.co_filename
        # The order of an epoch is made on the processor, once per epoch.
        if "/dfkd_lib/" in at and not (at.endswith("augment.py") and caller.f_code.co_name == "order"):
            for fault in faults(getattr(func, "__name__", ""), args, kwargs):
                self.found.append(f"{at.split('/dfkd_lib/')[1]}:{caller.f_lineno}: {fault}")
        result = func(*args, **kwargs)
        if kwargs.get("device") == "cpu":
            result.of_the_processor = True  # made there on purpose, and free to be read
        return result


def faults(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
    """What is wrong with one call of torch's function `name`."""
    found = []
    reads = name in READS or (name == "to" and "cpu" in args[1:])
    if reads and not getattr(args[0], "of_the_processor", False):
        found.append(f"{name} waits for the device")
    if name in FROM_HOST and not isinstance(args[0], Tensor):
        found.append(f"{name} brings numbers to the device")
    if name in NEW and kwargs.get("device") is None:
        found.append(f"{name} without a device")
    if name in RANDOM and kwargs.get("generator") is None:
        found.append(f"{name} without a generator")
    if name in ("__getitem__", "__setitem__"):
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        if any(isinstance(each, Tensor) and each.dtype == torch.bool for each in index):
            found.append("a choice of rows by a mask waits for the device")
        if any(isinstance(each, list) for each in index):
            found.append("an index that is a list is brought to the device")
    return found
