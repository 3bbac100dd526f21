"""The gradient facts that DFAD's argument rests on, and the limits of each loss."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dfkd_lib.losses import (
    IMITATION,
    batch_norm_distance,
    cross_entropy,
    focal,
    instance_discrimination,
    kl,
    log_compressed,
    mae,
    mse,
    relative_batch_norm_distance,
)

B, C = 7, 5


def logits(seed: int = 0, shape: tuple[int, ...] = (B, C)) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradient(loss, student: Tensor, teacher: Tensor) -> Tensor:
    student = student.clone().requires_grad_()
    (grad,) = torch.autograd.grad(loss(student, teacher), student)
    return grad


@given(scale=st.floats(1e-6, 1e6), seed=st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_mae_gradient_has_constant_entries_and_norm(scale, seed):
    t = logits(seed)
    grad = gradient(mae, t + scale * logits(seed + 1), t)
    assert torch.allclose(grad.abs(), torch.full_like(grad, 1 / (B * C)))
    assert math.isclose(float(grad.norm()), 1 / math.sqrt(B * C), rel_tol=1e-9)


@given(scale=st.floats(1e-3, 1e3))
@settings(max_examples=20, deadline=None)
def test_mse_gradient_scales_with_the_gap(scale):
    t, gap = torch.zeros(B, C, dtype=torch.float64), logits(1)
    assert torch.allclose(gradient(mse, t + scale * gap, t), scale * gradient(mse, t + gap, t))


@pytest.mark.parametrize("temperature", [1.0, 4.0, 20.0])
def test_kl_gradient_is_the_difference_of_beliefs(temperature):
    s, t = logits(0), logits(1)
    expected = temperature * ((s / temperature).softmax(1) - (t / temperature).softmax(1)) / B
    assert torch.allclose(gradient(lambda a, b: kl(a, b, temperature), s, t), expected)


@pytest.mark.parametrize("loss", IMITATION.values(), ids=IMITATION.keys())
def test_agreement_costs_nothing_and_pulls_nowhere(loss):
    t = logits()
    assert float(loss(t, t)) == pytest.approx(0, abs=1e-12)
    assert gradient(loss, t, t).abs().max() == pytest.approx(0, abs=1e-15)


def test_mae_gradient_at_agreement_is_exactly_zero():
    assert torch.equal(gradient(mae, logits(), logits()), torch.zeros(B, C, dtype=torch.float64))


@given(shift=st.floats(-50, 50))
@settings(max_examples=20, deadline=None)
def test_a_common_shift_is_invisible_to_kl_and_costs_mae_its_size(shift):
    t = logits()
    assert float(kl(t + shift, t)) == pytest.approx(0, abs=1e-9)
    assert float(mae(t + shift, t)) == pytest.approx(abs(shift), abs=1e-9)


def test_log_compression_divides_the_gradient():
    d = torch.tensor(3.0, requires_grad=True)
    (grad,) = torch.autograd.grad(log_compressed(d), d)
    assert float(grad) == pytest.approx(1 / 4)
    assert float(log_compressed(torch.tensor(0.0))) == 0


@pytest.mark.parametrize("loss", IMITATION.values(), ids=IMITATION.keys())
def test_segmentation_is_classification_of_every_pixel(loss):
    s, t = logits(0, (2, C, 3, 4)), logits(1, (2, C, 3, 4))
    as_rows = [x.permute(0, 2, 3, 1).reshape(-1, C) for x in (s, t)]
    assert torch.allclose(loss(s, t), loss(*as_rows))


def test_focal_without_focus_is_cross_entropy_and_focus_lowers_it():
    s, y = logits(), torch.arange(B) % C
    assert torch.allclose(focal(s, y, gamma=0), cross_entropy(s, y))
    assert focal(s, y) < cross_entropy(s, y)


def test_focal_counts_void_as_zero_and_cross_entropy_leaves_it_out():
    s, y = logits(0, (1, C, 1, 2)), torch.tensor([[[1, 11]]])
    alone = s[..., :1], y[..., :1]
    assert torch.allclose(focal(s, y, void=11), focal(*alone) / 2)
    assert torch.allclose(cross_entropy(s, y, void=11), cross_entropy(*alone))


def statistics(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean and variance of a batch, and those that a layer remembers, [C]."""
    mean, log_variance, running_mean, running_log_variance = logits(seed, (4, C))
    return mean, log_variance.exp(), running_mean, running_log_variance.exp()


@given(scale=st.floats(1e-6, 1e6), seed=st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_the_relative_distance_does_not_see_the_scale_of_a_layers_input(scale, seed):
    found = statistics(seed)
    scaled = [scale**power * value for power, value in zip((1, 2, 1, 2), found, strict=True)]
    assert torch.allclose(relative_batch_norm_distance(*scaled), relative_batch_norm_distance(*found))


def test_the_papers_distance_sees_the_scale_of_a_layers_input():
    mean, variance, running_mean, running_variance = statistics()
    doubled = batch_norm_distance(2 * mean, 4 * variance, 2 * running_mean, 4 * running_variance)
    assert float(doubled / batch_norm_distance(*statistics())) > 2


def test_the_relative_distance_counts_spreads_and_is_zero_at_equality():
    variance = torch.full((C,), 4.0)
    assert float(relative_batch_norm_distance(torch.full((C,), 2.0), variance, torch.zeros(C), variance)) == 1
    assert float(relative_batch_norm_distance(torch.zeros(C), 3 * variance, torch.zeros(C), variance)) == 2
    assert float(relative_batch_norm_distance(torch.ones(C), variance, torch.ones(C), variance)) == 0


def test_a_layer_that_remembers_no_variance_has_no_relative_distance_and_no_gradient():
    mean = torch.ones(C, requires_grad=True)
    distance = relative_batch_norm_distance(mean, torch.ones(C), torch.zeros(C), torch.zeros(C))
    (pull,) = torch.autograd.grad(distance, mean)
    assert float(distance.detach()) == 0 and not pull.any()


def test_new_and_stored_images_are_told_apart_in_two_means() -> None:
    queries, keys = (rows / rows.norm(dim=1, keepdim=True) for rows in torch.randn(2, 5, 3, dtype=torch.float64))
    likeness = (queries @ keys.T / 0.2).exp()
    costs = -(likeness.diagonal() / likeness.sum(1)).log()
    found = instance_discrimination(queries, keys, 2, 0.2)
    assert torch.allclose(found, costs[:2].sum() / 2 + costs[2:].sum() / 3)
    assert torch.allclose(instance_discrimination(queries, keys, 5, 0.2), costs.mean())
