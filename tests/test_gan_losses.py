"""Closed forms, limits and gradients of the losses that DAFL, DFQ and ZSKT add to the game."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from dfkd_lib.losses import activation, attention_map, class_balance, gaussian_kl, kl, one_hot

B, C = 7, 5


def logits(seed: int = 0, shape: tuple[int, ...] = (B, C), scale: float = 1.0) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradient(loss, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(loss(x), x)
    return grad


def certain(labels: list[int], n_classes: int = C) -> Tensor:
    """Logits of beliefs that are one-hot even in float64."""
    return 1e4 * torch.eye(n_classes, dtype=torch.float64)[labels]


@given(seed=st.integers(0, 10**6), scale=st.floats(0.01, 100))
@settings(max_examples=30, deadline=None)
def test_one_hot_is_minus_the_log_of_the_largest_belief(seed, scale):
    t = logits(seed, scale=scale)
    expected = -t.log_softmax(1).max(1).values.mean()
    assert torch.allclose(one_hot(t), expected, atol=1e-12)
    assert one_hot(t) >= 0


def test_one_hot_is_zero_for_certain_beliefs_only_and_log_c_for_none_at_all():
    assert float(one_hot(certain([0, 3, 3]))) == 0
    assert float(one_hot(torch.zeros(B, C))) == pytest.approx(math.log(C))
    assert float(one_hot(logits())) > 0


def test_one_hot_pulls_each_belief_to_its_own_label():
    t = logits()
    label = torch.nn.functional.one_hot(t.argmax(1), C)
    assert torch.allclose(gradient(one_hot, t), (t.softmax(1) - label) / B)


def test_balance_is_least_for_even_batches_and_zero_for_one_class():
    even = certain(list(range(C)) * 3)
    assert float(class_balance(even)) == pytest.approx(-math.log(C))
    assert float(class_balance(torch.zeros(B, C))) == pytest.approx(-math.log(C))  # unsure, and even
    assert float(class_balance(certain([2] * B))) == 0


@given(seed=st.integers(0, 10**6), scale=st.floats(0.01, 1000))
@settings(max_examples=30, deadline=None)
def test_balance_is_minus_the_entropy_of_the_mean_belief(seed, scale):
    t = logits(seed, scale=scale)
    mean_belief = t.softmax(1).mean(0)
    assert float(class_balance(t)) == pytest.approx(-float(torch.special.entr(mean_belief).sum()), abs=1e-9)
    assert -math.log(C) - 1e-12 <= float(class_balance(t)) <= 0


def test_balance_in_base_ten_is_smaller_by_ln_ten():
    mean_belief = logits().softmax(1).mean(0)
    base_ten = (mean_belief * mean_belief.log10()).sum()
    assert float(base_ten) == pytest.approx(float(class_balance(logits())) / 2.302585, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_balance_and_its_gradient_are_finite_where_beliefs_underflow(dtype):
    for t in (certain([2] * B), certain([0, 1]), logits(scale=1e3)):
        t = t.to(dtype)
        assert (t.softmax(1) == 0).any()
        assert torch.isfinite(class_balance(t))
        assert torch.isfinite(gradient(class_balance, t)).all()


def test_balance_pulls_towards_the_class_that_is_missing():
    t = torch.zeros(B, C, dtype=torch.float64)
    t[:, 0] = -2
    pull = -gradient(class_balance, t)
    assert (pull[:, 0] > 0).all()
    assert (pull[:, 1:] < 0).all()


def test_balance_gradient_in_closed_form():
    t = logits()
    p = t.softmax(1)
    per_class = p.mean(0).log() + 1
    expected = p * (per_class - (p * per_class).sum(1, keepdim=True)) / B
    assert torch.allclose(gradient(class_balance, t), expected)


def test_activation_rewards_strong_features_evenly():
    features = logits(shape=(B, 6)).relu()
    assert float(activation(features)) == pytest.approx(-float(features.mean()))
    grad = gradient(activation, features)
    assert (grad <= 0).all()
    assert torch.allclose(grad[features > 0], torch.tensor(-1 / features.numel(), dtype=torch.float64))
    assert torch.equal(activation(-features), activation(features))
    assert float(activation(torch.zeros(B, 6))) == 0


@given(seed=st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_gaussian_kl_is_that_of_torch(seed):
    mean, running_mean = logits(seed, (2, C))
    variance, running_variance = logits(seed + 1, (2, C)).exp()
    remembered, batch = Normal(running_mean, running_variance.sqrt()), Normal(mean, variance.sqrt())
    ours = gaussian_kl(mean, variance, running_mean, running_variance)
    assert float(ours) == pytest.approx(float(kl_divergence(remembered, batch).sum()), rel=1e-9)
    assert float(ours) > 0


def test_gaussian_kl_is_zero_and_flat_at_equality():
    mean, variance = logits(0, (C,)), logits(1, (C,)).exp()
    assert float(gaussian_kl(mean, variance, mean, variance)) == pytest.approx(0, abs=1e-12)
    for at in (0, 1):
        moving = [mean, variance]
        grad = gradient(lambda v, at=at, moving=moving: gaussian_kl(*moving[:at], v, *moving[at + 1 :], mean, variance),
                        moving[at])  # fmt: skip
        assert grad.abs().max() < 1e-12


def test_gaussian_kl_grows_with_either_difference():
    zero, one = torch.zeros(1), torch.ones(1)
    shifts = [float(gaussian_kl(zero + d, one, zero, one)) for d in (0.0, 0.5, 1.0, 2.0)]
    assert shifts == pytest.approx([0, 0.125, 0.5, 2])
    for widths in ((1.0, 2.0, 4.0), (1.0, 0.5, 0.25)):
        values = [float(gaussian_kl(zero, one * w, zero, one)) for w in widths]
        assert values == sorted(values)


@given(seed=st.integers(0, 10**6), scale=st.floats(1e-3, 1e3))
@settings(max_examples=20, deadline=None)
def test_attention_maps_have_unit_length_and_ignore_scale_sign_and_order_of_channels(seed, scale):
    features = logits(seed, (2, 3, 4, 5))
    maps = attention_map(features)
    assert maps.shape == (2, 20)
    assert torch.allclose(maps.norm(dim=1), torch.ones(2, dtype=torch.float64))
    for same in (scale * features, -features, features.flip(1)):
        assert torch.allclose(attention_map(same), maps)


def test_attention_in_closed_form_and_at_nothing():
    features = torch.tensor([[[[1.0, 0.0]], [[1.0, 2.0]]]])  # channel means of squares: 1 and 2
    assert attention_map(features).flatten().tolist() == pytest.approx([1 / math.sqrt(5), 2 / math.sqrt(5)])
    nothing = torch.zeros(1, 2, 3, 3)
    assert torch.equal(attention_map(nothing), torch.zeros(1, 9))
    assert torch.isfinite(gradient(lambda x: attention_map(x).sum(), nothing)).all()


def test_the_adversarial_kl_vanishes_for_both_players_at_equality_and_survives_underflow():
    t = logits()
    assert float(kl(t, t)) == 0
    assert gradient(lambda both: kl(both, both), t).abs().max() < 1e-15
    sure, opposed = certain([0, 1]), certain([1, 0])
    assert torch.isfinite(kl(sure, opposed))
    assert torch.isfinite(gradient(lambda s: kl(s, opposed), sure)).all()
