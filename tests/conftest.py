"""Shared fixtures: small players, caches of their own, one thread."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import tiny_book
import torch
from torch import Tensor, nn

from dfkd_lib.runtime import Runtime


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _interruptible() -> None:
    """A suite that a script starts in the background ignores Ctrl-C, and so would every process that it starts."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _own_folders(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test sees the user's cache, data or run folder."""
    root: Path = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("DFKD_CACHE", str(root / "cache"))
    for name in ("DFKD_DATA", "DFKD_OUT", "DFKD_EVENTS", "DFKD_BOOK"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with the tiny book, for this process and those that it starts."""
    tiny_book.write(tmp_path / "book")
    monkeypatch.setenv("DFKD_BOOK", str(tmp_path / "book"))
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def classifier(width: int = 8, n_classes: int = 5) -> nn.Module:
    """A small batch-norm classifier of 8x8 grey images."""
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, n_classes),
    )  # fmt: skip


def generator(latent_dim: int = 6) -> nn.Module:
    """A small generator of 8x8 grey images."""
    return nn.Sequential(
        nn.Linear(latent_dim, 4 * 16), nn.Unflatten(1, (4, 4, 4)), nn.Upsample(scale_factor=2),
        nn.Conv2d(4, 1, 3, padding=1), nn.BatchNorm2d(1, affine=False),
    )  # fmt: skip


def settled(seed: int = 0, width: int = 8, n_classes: int = 5) -> nn.Module:
    """A classifier whose batch norm remembers something other than 0 and 1."""
    torch.manual_seed(seed)
    network = classifier(width, n_classes)
    with torch.no_grad():
        for _ in range(20):
            network(torch.rand(32, 1, 8, 8))
    return network


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers as they are now."""
    return {name: value.clone() for name, value in module.state_dict().items()}


def parameters_of(module: nn.Module) -> dict[str, Tensor]:
    """The parameters alone, as they are now."""
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether two snapshots agree bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def stream(seed: int = 0) -> torch.Generator:
    """A stream of random numbers of its own."""
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def float64() -> Runtime:
    """Exact enough to compare two ways of computing the same thing."""
    return Runtime.choose("cpu", "float64", seed=0)


@pytest.fixture
def float32() -> Runtime:
    """What chapters use where outputs are compared."""
    return Runtime.choose("cpu", "float32", seed=0)
