"""Looking at a network without changing it: eval mode for a while, with gradients or without."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..compiling import as_written


@contextmanager
def in_eval_mode(module: nn.Module) -> Iterator[None]:
    """Eval mode, gradients as they are; every module inside gets back the mode that it had."""
    modes = {m: m.training for m in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for m, mode in modes.items():
            m.training = mode


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode in inference, nothing compiled: what comes out cannot be learnt from."""
    with in_eval_mode(module), as_written(), torch.inference_mode():
        yield


@contextmanager
def still(module: nn.Module) -> Iterator[None]:
    """Eval mode without gradients, nothing compiled: what comes out is an ordinary tensor, others can learn from it."""
    with in_eval_mode(module), as_written(), torch.no_grad():
        yield


def computes_the_same(network: nn.Module, other: Callable[[Tensor], Tensor], x: Tensor) -> bool:
    """Whether `other`, made of the network's own modules, gives on x what the network gives; False if it cannot run.

    Each output may differ by a ten-thousandth of the largest: the same layers need not round alike on a GPU.
    """
    exact = torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, deterministic=True, allow_tf32=False)
    try:
        with still(network), exact:
            theirs, ours = network(x.clone()), other(x.clone())  # either may write to what it is given
            return ours.shape == theirs.shape and bool((ours - theirs).abs().max() <= 1e-4 * theirs.abs().max())
    except (RuntimeError, TypeError, AttributeError, NotImplementedError):
        return False
