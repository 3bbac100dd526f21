"""Taps see what batch-norm layers see, and leave nothing behind."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfkd_lib import models
from dfkd_lib.errors import InputError
from dfkd_lib.taps import Seen, batch_norm_layers, last_linear, logits_and_features, tapped


class Reusing(nn.Module):
    """One batch-norm layer, twice in a pass."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(self.norm(x)))


def n_hooks(network: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in network.modules())


def batch(*shape: int) -> Tensor:
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.7


@pytest.mark.parametrize(
    ("layer", "shape"),
    [(nn.BatchNorm1d(4), (9, 4)), (nn.BatchNorm1d(4), (9, 4, 5)), (nn.BatchNorm2d(4), (9, 4, 5, 3)),
     (nn.BatchNorm3d(4), (9, 4, 2, 5, 3))],
)  # fmt: skip
def test_statistics_are_those_of_batch_norm_itself(layer, shape):
    """Its own update with momentum 1 takes over the batch's mean, and its variance with Bessel's correction."""
    x = batch(*shape)
    with tapped([layer]) as seen:
        layer.double().eval()(x)
    mean, variance = seen[0].statistics()
    n = x.numel() / shape[1]
    running_mean, running_variance = torch.zeros(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    F.batch_norm(x, running_mean, running_variance, training=True, momentum=1.0)
    assert torch.allclose(mean, running_mean, atol=1e-12)
    assert torch.allclose(variance, running_variance * (n - 1) / n, atol=1e-12)
    normalised = F.batch_norm(x, None, None, training=True, eps=1e-30)
    by_hand = (x.transpose(0, 1).flatten(1) - mean[:, None]) / variance.sqrt()[:, None]
    assert torch.allclose(normalised.transpose(0, 1).flatten(1), by_hand, atol=1e-9), "biased, as it normalises with"


def test_statistics_of_a_constant_batch_have_no_variance():
    mean, variance = Seen(nn.BatchNorm2d(2), torch.full((4, 2, 3, 3), 0.3)).statistics()
    assert mean.tolist() == pytest.approx([0.3, 0.3]) and variance.tolist() == pytest.approx([0, 0], abs=1e-12)


def test_sixteen_bits_are_summed_in_thirty_two():
    x = (batch(64, 2, 8, 8) + 40).to(torch.bfloat16)
    mean, variance = Seen(nn.BatchNorm2d(2), x).statistics()
    exact_variance, exact_mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    assert mean.dtype == torch.float32
    assert torch.allclose(mean.double(), exact_mean, rtol=1e-6)
    assert torch.allclose(variance.double(), exact_variance, rtol=1e-4)


def test_instance_means_have_one_row_per_image():
    x = batch(6, 4, 5, 3)
    rows = Seen(nn.BatchNorm2d(4), x).instance_means()
    assert rows.shape == (6, 4) and torch.allclose(rows.double(), x.mean((2, 3)), atol=1e-6)
    flat = batch(6, 4)
    assert torch.allclose(Seen(nn.BatchNorm1d(4), flat).instance_means().double(), flat, atol=1e-6)


def test_gradients_reach_the_images():
    network = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3)).eval()
    x = torch.rand(4, 1, 6, 6, requires_grad=True)
    with tapped(batch_norm_layers(network)) as seen:
        network(x)
    torch.stack(seen[0].statistics()).sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0


def test_a_layer_used_twice_is_registered_once_and_seen_twice():
    network = Reusing().eval()
    layers = batch_norm_layers(network)
    assert layers == [network.norm]
    x = torch.rand(2, 3, 4, 4)
    with tapped(layers) as seen:
        network(x)
    assert [visit.layer for visit in seen] == [network.norm] * 2
    assert torch.equal(seen[0].x, x)
    assert torch.allclose(seen[1].x, network.conv(network.norm(x)))


def test_a_layer_registered_under_two_names_is_seen_once_per_visit():
    shared = nn.BatchNorm2d(3)
    network = nn.ModuleDict({"a": shared, "b": shared})
    assert batch_norm_layers(network) == [shared]
    with tapped(batch_norm_layers(network)) as seen:
        network["b"](network["a"](torch.rand(2, 3, 4, 4)))
    assert len(seen) == 2


def test_several_passes_are_seen_in_their_order():
    network = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3)).eval()
    with tapped(batch_norm_layers(network)) as seen:
        network(torch.rand(4, 3))
        network(torch.rand(5, 3))
    assert [(visit.layer, len(visit.x)) for visit in seen] == [
        (network[0], 4), (network[1], 4), (network[0], 5), (network[1], 5),
    ]  # fmt: skip


def test_layers_without_running_statistics_do_not_count():
    kept = nn.BatchNorm2d(3)
    network = nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False), nn.GroupNorm(1, 3), kept)
    assert batch_norm_layers(network) == [kept]


@pytest.mark.parametrize("network", [nn.Linear(2, 2), nn.BatchNorm2d(3, track_running_stats=False), nn.LayerNorm(3)])
def test_a_network_without_any_is_refused_with_a_remedy(network):
    with pytest.raises(InputError, match=r"no batch-norm layer with running statistics.*use dfad, dafl or zskt"):
        batch_norm_layers(network)


def test_hooks_live_as_long_as_the_context():
    network = Reusing().eval()
    with tapped(batch_norm_layers(network)) as seen:
        assert n_hooks(network) == 1
    assert n_hooks(network) == 0
    network(torch.rand(2, 3, 4, 4))
    assert seen == []


def test_hooks_go_when_the_pass_fails():
    network = Reusing().eval()
    with pytest.raises(RuntimeError), tapped(batch_norm_layers(network)) as seen:
        network(torch.rand(2, 5, 4, 4))
    assert n_hooks(network) == 0 and len(seen) == 1


def test_contexts_may_be_nested():
    network = Reusing().eval()
    with tapped([network.norm]) as outer:
        with tapped([network.norm]) as inner:
            network(torch.rand(2, 3, 4, 4))
        network(torch.rand(2, 3, 4, 4))
    assert len(inner) == 2 and len(outer) == 4 and n_hooks(network) == 0


def test_tapping_changes_nothing_of_the_output():
    network = Reusing().eval()
    x = torch.rand(2, 3, 4, 4)
    with tapped(batch_norm_layers(network)):
        inside = network(x)
    assert torch.equal(inside, network(x))


@pytest.mark.parametrize("name", ["digits_cnn", "resnet18", "wrn16_1", "vgg11", "lenet5"])
def test_logits_are_the_last_layer_of_the_features(name):
    network = models.build(name, n_classes=7, in_channels=1, mean=(0.5,), std=(0.5,)).eval()
    x = torch.rand(3, 1, 32, 32)
    logits, features = logits_and_features(network, x)
    assert torch.equal(logits, network(x))
    assert last_linear(network) is network.network.classifier
    assert torch.allclose(last_linear(network)(features), logits) and features.ndim == 2
    assert n_hooks(network) == 0


def test_a_network_without_a_linear_layer_has_no_features():
    with pytest.raises(InputError, match="no linear layer"):
        logits_and_features(nn.Conv2d(1, 2, 3), torch.rand(1, 1, 4, 4))
