"""A person's own networks: lent to a run as copies, handed back as they were, told apart and kept."""

from __future__ import annotations

import copy
import hashlib
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_model
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .errors import DFKDError, InputError, first_line
from .files import replace_file
from .models import Normalize
from .training import checkpoints


def bare(network: nn.Module) -> nn.Module:
    """The network without `torch.compile`, `DataParallel` or `DistributedDataParallel` around it.

    They hide its layers from hooks, and their prefix its saved weights from whoever loads them.
    """
    while True:
        if isinstance(inside := getattr(network, "_orig_mod", None), nn.Module):
            network = inside
        elif isinstance(network, nn.DataParallel | nn.parallel.DistributedDataParallel):
            network = network.module
        else:
            return network


def copied(network: nn.Module, who: str) -> nn.Module:
    """A copy that shares nothing.

    Raises:
        InputError: `copy.deepcopy` cannot copy it.
    """
    twin = _copied(network, who, {})
    for mine, theirs in zip(twin.parameters(), network.parameters(), strict=True):
        mine.requires_grad_(theirs.requires_grad)  # which copies of TorchScript forget
    return twin


def borrowed(network: nn.Module, who: str = "teacher") -> nn.Module:
    """A copy that shares the weights: it can be frozen and moved, and costs no memory where it is not moved.

    The buffers are copies, in case a forward pass writes to them; so are the weights of TorchScript.

    Raises:
        InputError: `copy.deepcopy` cannot copy it.
    """
    shared = {}
    for p in network.parameters():
        shared[id(p)] = nn.Parameter(p.detach().clone() if p.is_inference() else p.detach(), requires_grad=False)
    return _copied(network, who, shared)


def _copied(network: nn.Module, who: str, memo: dict[int, Any]) -> nn.Module:
    # What earlier passes left in attributes has a graph, which deepcopy refuses; no pass needs it.
    left = [t for m in network.modules() for t in _tensors(list(vars(m).values())) if not t.is_leaf]
    try:
        with torch.no_grad():  # copies of TorchScript would have a graph
            return copy.deepcopy(network, {id(t): t.detach().clone() for t in left} | memo)
    except Exception as e:
        raise InputError(f"the {who} cannot be copied with copy.deepcopy: {first_line(e)}") from e


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)


def normalizing(network: nn.Module, statistics: tuple[list[float], list[float]] | None) -> nn.Module:
    """The network behind a layer that normalises its images with (mean, std), or the network itself for None."""
    if statistics is None:
        return network
    return nn.Sequential(OrderedDict(normalize=Normalize(*statistics), network=network))


class LogitsAlone(nn.Module):
    """A network that returns a dictionary, with its "out" alone: torchvision's segmenters add others in training."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, K, H, W]."""
        logits: Tensor = self.network(x)["out"]
        return logits


def spare_input(network: nn.Module) -> RemovableHandle:
    """From now on the network works on a copy of its images, which it would overwrite otherwise."""
    return network.register_forward_pre_hook(lambda _, inputs: (inputs[0].clone(), *inputs[1:]))


def like(network: nn.Module, model: nn.Module) -> None:
    """Bring a trained copy back to the device, data types and memory format of what it was copied from."""
    with torch.no_grad():
        for mine, theirs in (
            *zip(network.parameters(), model.parameters(), strict=True),
            *zip(network.buffers(), model.buffers(), strict=True),
        ):
            mine.data = mine.data.to(theirs.device, theirs.dtype, memory_format=torch.contiguous_format)
            mine.grad = None


def save(network: nn.Module, path: Path) -> None:
    """Write the weights as safetensors, for `safetensors.torch.load_model`; tied ones once.

    Raises:
        DFKDError: the file cannot be written, or cannot hold what the network keeps, such as an extra state.
    """
    with replace_file(path) as temporary:
        try:
            save_model(network, str(temporary))
        except OSError:
            raise
        except Exception as e:
            raise DFKDError(f"cannot write {path}: {first_line(e)}") from e


def not_kept(student: nn.Module, folder: Path) -> str:
    """Why no checkpoint in the folder can hold the student's state, or "" if one can; found by writing one.

    Raises:
        DFKDError: the folder cannot be written to.
    """
    state, trial = student.state_dict(), folder / "trial.safetensors"
    if not checkpoints.all_finite(state):
        return "it has infinite values"
    try:
        checkpoints.save(trial, state)
    except TypeError as e:
        return first_line(e)
    trial.unlink()
    return ""


def fingerprint(network: nn.Module) -> str:
    """Hexadecimal SHA-256 of all weights and buffers, with their names, shapes and types."""
    digest = hashlib.sha256()
    for name, value in (*network.named_parameters(), *network.named_buffers()):
        whole = value.detach().cpu()
        whole = whole.to_dense() if whole.layout != torch.strided else whole.resolve_conj()
        digest.update(repr((name, value.dtype, list(value.shape))).encode())
        digest.update(whole.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
