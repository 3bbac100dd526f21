"""What every game needs of its players: freezing, optimisers, one update."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

from ..compiling import compiled
from ..errors import InputError
from ..runtime import PRECISIONS, Runtime
from .replay import Replay

M = TypeVar("M", bound=nn.Module)
Opt = TypeVar("Opt", bound=Optimizer)


def freeze(module: M) -> M:
    """Eval mode, no weight gradients: what a teacher is throughout."""
    module.eval()  # a network's own may return nothing
    for p in module.parameters():
        p.requires_grad_(False)
    return module


def in_compute_type(network: nn.Module, runtime: Runtime) -> nn.Module:
    """A frozen network as this run computes with it, compiled with constant weights if it compiles.

    Under autocast it is a copy whose convolutions and linear layers hold their weights in the 16-bit type that autocast
    would bring them to at each call, otherwise the network itself.
    """
    lowered = _lowered(network, runtime)
    return compiled(lowered, frozen=True) if runtime.compile else lowered


def _lowered(network: nn.Module, runtime: Runtime) -> nn.Module:
    if runtime.precision not in ("bfloat16", "float16"):
        return network
    try:
        lowered = copy.deepcopy(network)
    except (RuntimeError, TypeError, NotImplementedError):  # what cannot be copied is brought there at each call
        return network
    for layer in lowered.modules():
        if type(layer) in (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear) and not hasattr(layer, "parametrizations"):
            layer.to(PRECISIONS[runtime.precision])
    return lowered


@contextmanager
def no_weight_gradients(module: nn.Module) -> Iterator[None]:
    """Gradients pass through the module to its input, none are computed for its weights."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    for p in parameters:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in parameters:
            p.requires_grad_(True)


def sgd(module: nn.Module, lr: float, weight_decay: float, momentum: float = 0.9, nesterov: bool = False) -> SGD:
    """SGD with momentum over a module's weights, fused where the device allows."""
    return SGD(module.parameters(), lr, momentum, weight_decay=weight_decay, nesterov=nesterov, fused=_can_fuse(module))


def adam(module: nn.Module, lr: float, betas: tuple[float, float] = (0.9, 0.999), weight_decay: float = 0.0) -> Adam:
    """Adam over a module's weights, fused where the device allows; the decay is L2, added to the gradient."""
    return Adam(module.parameters(), lr, betas, weight_decay=weight_decay, fused=_can_fuse(module))


def _can_fuse(module: nn.Module) -> bool:
    return all(p.device.type in ("cpu", "cuda", "mps") for p in module.parameters())


def recordable(optimizer: Opt, runtime: Runtime) -> Opt:
    """The optimiser, fit for a :class:`~.replay.Replay` where this run records: rates and counters on the device."""
    if runtime.graphs:
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(float(group["lr"]), device=runtime.device)
            if "capturable" in group:
                group["capturable"] = runtime.device.type == "cuda"
    return optimizer


@torch.no_grad()
def start_anew(optimizer: Optimizer) -> None:
    """Forget moments and counters in place, as if the optimiser had just been made."""
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, Tensor):
                value.zero_()


def update(optimizer: Optimizer, loss: Tensor, scaler: torch.amp.GradScaler, clip: float = math.inf) -> None:
    """One descent step on `loss`, with gradient scaling when the precision is float16.

    Args:
        clip: Euclidean norm, over all weights of the optimiser, to which a longer gradient is shortened.
    """
    optimizer.zero_grad(set_to_none=True)
    scaler.scale(loss).backward()
    if math.isfinite(clip):
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], clip)
    scaler.step(optimizer)
    scaler.update()


def state_of(method: object, parts: tuple[str, ...]) -> dict[str, Any]:
    """The state of the named attributes: modules, optimisers and scalers, random streams, plain numbers."""
    state: dict[str, Any] = {}
    for name in parts:
        part = getattr(method, name)
        if isinstance(part, torch.Generator):
            state[name] = part.get_state()
        else:
            state[name] = part.state_dict() if hasattr(part, "state_dict") else part
    return state


def restore_state(method: object, parts: tuple[str, ...], state: dict[str, Any]) -> None:
    """Put back what :func:`state_of` took, on the devices where the parts are, and have updates recorded anew."""
    for name in parts:
        part = getattr(method, name)
        if isinstance(part, torch.Generator):
            part.set_state(state[name].cpu())
        elif isinstance(part, Optimizer):
            _load_optimizer(part, state[name])
            _as_parameters_lie(part)
        elif hasattr(part, "load_state_dict"):
            part.load_state_dict(state[name])
        elif isinstance(part, Tensor):
            setattr(method, name, state[name].to(part.device))
        else:
            setattr(method, name, state[name])
    for part in vars(method).values():
        if isinstance(part, Replay):
            part.forget()


def _load_optimizer(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Moments and rates of a checkpoint; where rates are tensors, they stay the same ones."""
    groups = [dict(group) for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, before in zip(optimizer.param_groups, groups, strict=True):
        rate = float(group["lr"])
        group |= {key: before[key] for key in ("lr", "capturable") if key in before}
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def _as_parameters_lie(optimizer: Optimizer) -> None:
    """Give momentum and moments the strides of their parameters.

    Fused optimisers pair a parameter with its state by place in memory: where one is channels-last and the other
    contiguous, the momentum of one weight moves another.
    """
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                state[key] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


class Resumable:
    """What `fit` saves and restores of a method: the attributes that `PARTS` names.

    Attributes:
        PARTS: modules, optimisers and scalers, random streams, banks and anything else with a `state_dict`, tensors
            and plain numbers.
    """

    PARTS: tuple[str, ...]

    def state_dict(self) -> dict[str, Any]:
        """See :class:`~.fit.Method`."""
        return state_of(self, self.PARTS)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See :class:`~.fit.Method`."""
        restore_state(self, self.PARTS, state)


def check_positive(settings: Any, *names: str) -> None:
    """Refuse settings that must be above zero and are not.

    Raises:
        InputError: naming the setting and its value.
    """
    for name in names:
        if not getattr(settings, name) > 0:
            raise InputError(f"{name} must be above 0, not {getattr(settings, name)!r}")
