"""Attribution maps: sums by hand, what each kind is for linear and ReLU networks, networks that stay as they were."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import parameters_of, same, settled, snapshot, stream
from torch import Tensor, nn

from dfkd_lib.errors import InputError
from dfkd_lib.methods import attribution
from dfkd_lib.methods.attribution import (
    ABSOLUTE,
    GRADIENT_INPUT,
    KINDS,
    LRP,
    PENULTIMATE,
    SALIENCY,
    affinity,
    affinity_matrix,
    check_alive,
    cosines,
    explain,
)  # fmt: skip


def images(n: int = 7, channels: int = 1, side: int = 8) -> Tensor:
    return torch.rand(n, channels, side, side, generator=stream(1))


def encoder(activation: Callable[[], nn.Module] = nn.ReLU, bias: bool = True, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1, bias=bias), activation(), nn.MaxPool2d(2), nn.Conv2d(6, 5, 3, bias=bias),
        activation(), nn.Flatten(), nn.Linear(20, 4, bias=bias),
    ).double().eval()  # fmt: skip


class Scaled(nn.Module):
    """A network's output times a number, its units in another order."""

    def __init__(self, network: nn.Module, factor: float = 1.0, order: list[int] | None = None) -> None:
        super().__init__()
        self.network, self.factor, self.order = network, factor, order or [0, 1, 2, 3]

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * self.network(x)[:, self.order]


def maps(network: nn.Module, x: Tensor, **options: Any) -> Tensor:
    return explain(network, x, **options).maps


def test_of_a_linear_encoder_every_map_is_known() -> None:
    x = images(channels=3, side=4).double()
    linear = nn.Linear(48, 5).double()
    network = nn.Sequential(nn.Flatten(), linear)
    g = linear.weight.detach().sum(0).view(3, 4, 4)
    assert torch.allclose(maps(network, x, kind=SALIENCY), g.abs().mean(0).flatten().float().expand(7, -1))
    assert torch.allclose(maps(network, x), (x * g).mean(1).flatten(1).float())
    assert torch.allclose(maps(network, x, mean=ABSOLUTE), (x * g).abs().mean(1).flatten(1).float())


def test_without_biases_gradient_times_input_sums_to_the_units() -> None:
    network, x = encoder(bias=False), images().double()
    explained = explain(network, x)
    assert torch.allclose(explained.maps.sum(1), explained.features.sum(1), rtol=1e-4, atol=1e-6)


def test_lrp_of_relu_networks_is_gradient_times_input_and_of_tanh_networks_is_not() -> None:
    x = images().double()
    relu, tanh = encoder(), encoder(nn.Tanh)
    assert torch.allclose(maps(relu, x, kind=LRP, epsilon=1e-8), maps(relu, x), rtol=1e-3, atol=1e-6)
    assert not torch.allclose(maps(tanh, x, kind=LRP), maps(tanh, x), rtol=0.1)


def test_lrp_by_hand() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(1, 1, bias=False), nn.Tanh(), nn.Linear(1, 1, bias=False)).double()
    with torch.no_grad():
        network[1].weight.fill_(2.0)
        network[3].weight.fill_(-3.0)
    x = torch.full((1, 1, 1, 1), 0.4, dtype=torch.float64)
    u = torch.tensor(0.8, dtype=torch.float64)
    wanted = -3.0 * torch.tanh(u) / (u + 1e-4) * 2.0 * 0.4
    assert float(maps(network, x, kind=LRP)) == pytest.approx(float(wanted), rel=1e-6)
    assert float(maps(network, -x, kind=LRP)) == pytest.approx(-float(wanted), rel=1e-6)


@pytest.mark.parametrize(
    "pair",
    [
        (nn.Tanh, lambda u: u.tanh()),
        (nn.Tanh, lambda u: torch.tanh_(u)),
        (nn.Sigmoid, torch.sigmoid),
        (lambda: nn.ELU(inplace=True), F.elu),
        (lambda: nn.LeakyReLU(0.3, inplace=True), lambda u: F.leaky_relu(u, 0.3)),
        (nn.GELU, F.gelu),
        (nn.Softplus, lambda u: F.softplus(input=u)),
    ],
    ids=["tanh", "tanh_", "sigmoid", "elu in place", "leaky in place", "gelu", "softplus"],
)
def test_lrp_sees_activations_as_modules_and_as_functions(pair: tuple[Any, Callable[[Tensor], Tensor]]) -> None:
    module, function = pair

    class Function(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return function(x)

    x = images().double()
    by_module, by_function = encoder(module), encoder(Function)
    assert torch.equal(maps(by_module, x, kind=LRP), maps(by_function, x, kind=LRP))
    assert not torch.allclose(maps(by_module, x, kind=LRP), maps(by_module, x), rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_is_explained_as_its_images_are_one_by_one(kind: str) -> None:
    network, x = settled(), images()
    assert torch.allclose(
        maps(network, x, kind=kind, batch_size=64), maps(network, x, kind=kind, batch_size=1), rtol=1e-4, atol=1e-7
    )


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_of_the_network_changes(kind: str) -> None:
    network, x = settled(), images()
    network.train()
    network[1].eval()  # a mixture of modes is given back as it was
    network[0].weight.requires_grad_(False)
    network[5].weight.grad = torch.ones_like(network[5].weight)
    before, given, modes = snapshot(network), x.clone(), [m.training for m in network.modules()]
    found = [*explain(network, x, kind=kind, at=PENULTIMATE), *explain(network, x, kind=kind, at="0")]
    assert not any(part.requires_grad for part in found)
    assert same(before, snapshot(network)) and torch.equal(given, x) and not x.requires_grad
    assert modes == [m.training for m in network.modules()]
    assert [p.requires_grad for p in network.parameters()] == [False] + [True] * (len(parameters_of(network)) - 1)
    assert torch.equal(network[5].weight.grad, torch.ones_like(network[5].weight))
    assert all(p.grad is None for name, p in network.named_parameters() if name != "5.weight")
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in network.modules())


def test_gradients_do_not_add_up_over_calls_layers_or_networks() -> None:
    network, other, x = settled(), settled(1), images()
    first = {at: maps(network, x, at=at) for at in ("0", "3", PENULTIMATE)}
    explain(other, x)
    for at in (PENULTIMATE, "0", "3", "3"):
        assert torch.equal(maps(network, x, at=at), first[at])


def test_a_layer_is_seen_before_the_next_one_works_in_place() -> None:
    torch.manual_seed(0)
    convolution = nn.Conv2d(1, 4, 3)
    x = images()
    for inplace in (False, True):
        network = nn.Sequential(convolution, nn.ReLU(inplace), nn.Flatten(), nn.Linear(144, 2)).eval()
        z = explain(network, x, at="0").features
        assert torch.equal(z, convolution(x).flatten(1).detach()) and (z < 0).any()


def test_the_penultimate_features_are_what_the_last_linear_layer_is_given() -> None:
    network, x = settled(), images()
    assert torch.allclose(explain(network, x, at=PENULTIMATE).features, network[:5].eval()(x).detach())


def test_a_network_may_write_to_its_images() -> None:
    network = nn.Sequential(nn.Hardtanh(0.2, 0.8, inplace=True), nn.Flatten(), nn.Linear(64, 3))
    tidy = nn.Sequential(nn.Hardtanh(0.2, 0.8), network[1], network[2])
    x = images()
    assert torch.equal(maps(network, x), maps(tidy, x)) and torch.equal(x, images())


def test_cosines_and_affinity_by_hand() -> None:
    a = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]])
    b = torch.tensor([[0.0, 2.0], [3.0, 3.0], [1.0, 1.0]])
    assert cosines(a, b).tolist() == pytest.approx([0.0, 1.0, 0.0])
    assert affinity(a, b) == pytest.approx(1 / 3)


def test_the_matrix_is_symmetric_bounded_and_knows_duplicates() -> None:
    x = images().double()
    found = [maps(encoder(seed=s), x) for s in (0, 1, 3, 0)]
    s = affinity_matrix(found)
    assert torch.equal(s, s.T) and (s.abs() <= 1).all() and torch.equal(s.diagonal(), torch.ones(4).double())
    assert s[0, 3] == 1.0
    assert torch.equal(affinity_matrix([*found, maps(encoder(seed=9), x)])[:4, :4], s), "insertion moves no bit"


def test_scale_and_order_of_units_do_not_matter_and_a_sign_turns_signed_maps_over() -> None:
    x = images().double()
    network, other = encoder(seed=0), encoder(seed=1)
    of_other = {kind: maps(other, x, kind=kind) for kind in (SALIENCY, GRADIENT_INPUT)}
    for kind, theirs in of_other.items():
        s = affinity(maps(network, x, kind=kind), theirs)
        assert affinity(maps(Scaled(network, 7.0), x, kind=kind), theirs) == pytest.approx(s, rel=1e-5)
        shuffled = maps(Scaled(network, order=[2, 0, 3, 1]), x, kind=kind)
        assert affinity(shuffled, theirs) == pytest.approx(s, rel=1e-5)
        turned = affinity(maps(Scaled(network, -1.0), x, kind=kind), theirs)
        assert turned == pytest.approx(s if kind == SALIENCY else -s, rel=1e-5)


def test_a_common_vector_changes_the_attribution_of_logits_but_not_the_classifier() -> None:
    network, x = encoder(), images().double()
    before, was = maps(network, x), network(x).softmax(1)
    with torch.no_grad():
        network[6].weight += torch.randn(1, 20, generator=stream()).double()
    assert torch.allclose(network(x).softmax(1), was) and affinity(maps(network, x), before) < 0.9


def test_equal_seeds_give_equal_maps() -> None:
    assert torch.equal(maps(settled(3), images()), maps(settled(3), images()))


def test_networks_that_are_dead_or_broken_are_named() -> None:
    alive = maps(settled(), images(40))
    check_alive(alive, "mine")
    alive[:2] = 0
    check_alive(alive, "mine")  # a twentieth
    alive[2] = 0
    with pytest.raises(InputError, match="mine does not depend on the image at all for 3 of 40"):
        check_alive(alive, "mine")
    with pytest.raises(InputError, match="mine has attributions that are NaN"):
        check_alive(torch.full((2, 2), torch.nan), "mine")


class Detached(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.detach().flatten(1)


class Pair(nn.Module):
    def forward(self, x: Tensor) -> Any:
        return x, x


@pytest.mark.parametrize(
    ("network", "options", "said"),
    [
        (nn.Flatten(), {"kind": "gradcam"}, "unknown kind of attribution 'gradcam'"),
        (nn.Flatten(), {"mean": "max"}, "unknown mean over channels 'max'"),
        (nn.Sequential(nn.Flatten()), {"at": "layer9"}, "unknown module 'layer9'"),
        (nn.Sequential(nn.Flatten()), {"at": PENULTIMATE}, "no linear layer.*explain its 'output'"),
        (Detached(), {}, "no gradient reaches the images"),
        (Pair(), {}, "the network's output is tuple"),
    ],
)
def test_what_cannot_be_explained_is_refused(network: nn.Module, options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said) as e:
        explain(network, images(), **options)
    assert "\n" not in str(e.value)


def test_a_module_that_is_not_reached_is_named() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    network.spare = nn.Linear(2, 2)
    network.forward = lambda x: network[1](network[0](x))  # type: ignore[method-assign]
    with pytest.raises(InputError, match="'spare' is not reached"):
        explain(network, images(), at="spare")


def test_maps_of_other_images_cannot_be_compared() -> None:
    with pytest.raises(InputError, match="use the same images"):
        attribution.affinity(torch.ones(3, 4), torch.ones(2, 4))
