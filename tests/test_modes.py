"""Looking at a network leaves every module in the mode that it was in, whatever happens meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from torch import nn

from dfkd_lib.training.modes import computes_the_same, evaluating, in_eval_mode, still


def partly_frozen() -> nn.Sequential:
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(72, 3)).train()
    network[1].eval()
    return network


@pytest.mark.parametrize("look", [in_eval_mode, evaluating, still])
def test_modes_come_back_one_by_one_even_after_an_error(
    look: Callable[[nn.Module], AbstractContextManager[None]],
) -> None:
    network = partly_frozen()
    with pytest.raises(ZeroDivisionError), look(network):
        assert not any(m.training for m in network.modules())
        raise ZeroDivisionError
    assert [m.training for m in network] == [True, False, True, True] and network.training


def test_what_each_look_leaves_of_gradients() -> None:
    network, x = partly_frozen(), torch.rand(2, 1, 8, 8)
    with in_eval_mode(network):
        assert network(x).requires_grad
    with still(network):
        y = network(x)
    assert not y.requires_grad and not y.is_inference()
    with evaluating(network):
        assert network(x).is_inference()


def test_pieces_that_do_more_or_cannot_run_are_not_the_same() -> None:
    network, x = partly_frozen(), torch.rand(2, 1, 8, 8)
    assert computes_the_same(network, nn.Sequential(*network), x)
    assert not computes_the_same(network, nn.Sequential(*network, nn.ReLU()), x)
    assert not computes_the_same(network, nn.Sequential(*network[:-1]), x)
    assert not computes_the_same(network, nn.Sequential(network[3]), x)


@pytest.mark.parametrize(("apart", "same"), [(0.0, True), (1e-6, True), (1e-3, False), (float("nan"), False)])
def test_layers_that_round_otherwise_are_the_same_and_no_more(apart: float, same: bool) -> None:
    network, x = partly_frozen(), torch.rand(2, 1, 8, 8)

    def elsewhere(x: torch.Tensor) -> torch.Tensor:
        z = network(x)
        return z + apart * z.abs().max()  # small outputs are apart by many times their own size

    assert computes_the_same(network, elsewhere, x) is same


def test_what_gives_no_tensor_is_not_the_same() -> None:
    network, x = partly_frozen(), torch.rand(2, 1, 8, 8)
    assert not computes_the_same(network, lambda x: (network(x),), x)  # type: ignore[arg-type,return-value]
