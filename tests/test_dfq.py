"""The verifiable properties of DFQ; what it shares with DAFL and ZSKT is in test_generative.py."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import classifier, snapshot
from torch import nn
from torch.distributions import Normal, kl_divergence

from dfkd_lib import data, losses, models
from dfkd_lib.errors import InputError
from dfkd_lib.measures.evaluation import accuracy
from dfkd_lib.methods.dfq import DFQ, PRESETS, Settings, gaussian_batch_norm_loss, generation_loss
from dfkd_lib.runtime import Runtime
from dfkd_lib.taps import Seen, batch_norm_layers, tapped
from dfkd_lib.teachers import RECIPES, train_or_load
from dfkd_lib.training.fit import fit

TERMS = {"one-hot loss", "balance loss", "bn loss", "adversarial loss"}


def method(runtime: Runtime, student: nn.Module | None = None, **changes: Any) -> DFQ:
    small = {"batch_size": 8, "kd_steps": 2, "latent_dim": 6, "ngf": 4}
    torch.manual_seed(0)
    return DFQ(classifier(8), student or classifier(4), (1, 8, 8), Settings(**(small | changes)), runtime)


def test_the_loss_is_the_weighted_sum_of_its_terms(float64):
    game = method(float64, adv=2.0, bn=3.0, oh=0.5, balance=7.0)
    game.student.eval()
    x = game.sample(6)
    with tapped(batch_norm_layers(game.teacher)) as seen:
        t = game.teacher(x)
    s = game.student(x)
    layer: Any = game.teacher[1]
    pre = game.teacher[0](x).transpose(0, 1).flatten(1)
    bn = (pre.mean(1) - layer.running_mean).norm() + (pre.var(1, correction=0) - layer.running_var).norm()
    p, q = t.softmax(1), t.softmax(1).mean(0)
    kl = (p * (p.log() - s.log_softmax(1))).sum(1).mean()
    expected = 3 * bn - 0.5 * p.max(1).values.log().mean() + 7 * (q * q.log()).sum() - 2 * kl
    assert torch.allclose(generation_loss(game.terms(t, s, seen), game.settings), expected)


def test_one_call_is_one_adam_step_on_the_loss_of_one_batch(float64):
    game, plain = method(float64), method(float64)
    for one in (game, plain):
        one.student.eval()
    metrics = game.synthesize()
    x = plain.generator(plain.fresh_noise())
    with tapped(plain.layers) as seen:
        t = plain.teacher(x)
    loss = generation_loss(plain.terms(t, plain.student(x), seen), plain.settings)
    loss.backward()
    torch.optim.Adam(plain.generator.parameters(), 1e-3, (0.5, 0.999)).step()
    assert float(metrics["generator loss"]) == pytest.approx(float(loss.detach()), abs=1e-12)
    assert metrics.keys() == TERMS | {"generator loss"}
    for ours, theirs in zip(game.generator.parameters(), plain.generator.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-12)


def test_with_a_student_equal_to_its_teacher_the_adversarial_term_pulls_nowhere(float64):
    torch.manual_seed(0)
    gradients = []
    for adv in (0.0, 1.0):
        game = method(float64, student=classifier(8), adv=adv)
        game.student.load_state_dict(copy.deepcopy(game.teacher.state_dict()))
        game.student.eval()
        game.descend = lambda loss: loss.backward()  # type: ignore[method-assign]
        game.synthesize()
        gradients.append([p.grad for p in game.generator.parameters()])
    for without, with_term in zip(*gradients, strict=True):
        assert torch.allclose(without, with_term, atol=1e-12)


def remembering(n: int = 3) -> nn.Module:
    torch.manual_seed(1)
    layer = nn.BatchNorm2d(n).double()
    layer(3 + 2 * torch.randn(40, n, 4, 4, dtype=torch.float64))
    return layer.eval()


def test_the_gaussian_statistic_is_that_of_torch():
    layer: Any = remembering()
    x = torch.randn(9, 3, 4, 4, dtype=torch.float64)
    channels = x.transpose(0, 1).flatten(1)
    batch = Normal(channels.mean(1), (channels.var(1, correction=0) + layer.eps).sqrt())
    remembered = Normal(layer.running_mean, (layer.running_var + layer.eps).sqrt())
    expected = kl_divergence(remembered, batch).sum()
    assert torch.allclose(gaussian_batch_norm_loss([Seen(layer, x)]), expected)
    assert torch.allclose(gaussian_batch_norm_loss([Seen(layer, x)] * 2), 2 * expected)


def test_the_gaussian_statistic_is_zero_for_remembered_statistics_only():
    layer: Any = remembering()
    x = torch.randn(9, 3, 4, 4, dtype=torch.float64)
    x = (x - x.mean((0, 2, 3), keepdim=True)) / x.var((0, 2, 3), keepdim=True, correction=0).sqrt()
    fitting = x * layer.running_var.sqrt().view(1, 3, 1, 1) + layer.running_mean.view(1, 3, 1, 1)
    assert float(gaussian_batch_norm_loss([Seen(layer, fitting)])) == pytest.approx(0, abs=1e-12)
    assert float(gaussian_batch_norm_loss([Seen(layer, fitting + 0.1)])) > 1e-4


def test_the_gaussian_statistic_is_finite_for_a_channel_without_variance():
    layer = remembering()
    x = torch.zeros(9, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    loss = gaussian_batch_norm_loss([Seen(layer, x)])
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(x.grad).all()


def test_gaussian_replaces_the_norms_and_nothing_else(float64):
    norms, gaussian = method(float64), method(float64, gaussian=True)
    one, other = norms.synthesize(), gaussian.synthesize()
    differing = {name for name in one if one[name] != other[name]}
    assert differing == {"bn loss", "generator loss"}


def test_in_the_warm_up_only_the_generator_learns_and_not_from_the_student(float32):
    game = method(float32, warmup=2)
    student = snapshot(game.student)
    for _ in range(2):
        generator = snapshot(game.generator)
        metrics = game.step()
        assert metrics.keys() == TERMS - {"adversarial loss"} | {"generator loss"}
        assert any(not torch.equal(generator[name], value) for name, value in game.generator.state_dict().items())
    assert all(torch.equal(student[name], value) for name, value in game.student.state_dict().items())
    assert game.budget.student_updates == game.budget.images == 0
    assert TERMS | {"generator loss", "distillation loss"} == game.step().keys()
    assert game.budget.student_updates == 2


def test_terms_of_weight_zero_are_left_out(float32):
    without_bn = nn.Sequential(nn.Flatten(), nn.Linear(64, 5))
    changes: dict[str, Any] = {"bn": 0.0, "adv": 0.0, "batch_size": 8, "ngf": 4, "latent_dim": 6}
    game = DFQ(without_bn, classifier(4), (1, 8, 8), Settings(**changes), float32)
    asked: list[bool] = []
    game.student.register_forward_hook(lambda *a: asked.append(True))
    assert game.synthesize().keys() == {"generator loss", "one-hot loss", "balance loss"}
    assert not asked
    with pytest.raises(InputError, match="no batch-norm layer"):
        DFQ(without_bn, classifier(4), (1, 8, 8), Settings(), float32)


@pytest.mark.parametrize("name", ["adv", "bn", "oh", "balance", "warmup"])
def test_values_below_zero_are_refused(name):
    with pytest.raises(InputError, match=f"{name} must be 0"):
        Settings(**{name: -1})


def test_digits_are_learnt_without_digits_and_look_like_digits_to_the_teachers_batch_norm():
    train, test = data.load("digits", "train"), data.load("digits", "test")
    about = data.info("digits")
    runtime = Runtime.choose("cpu", "float32", seed=0)
    teacher = train_or_load("digits_cnn", train, test, replace(RECIPES["digits"], epochs=6), runtime).module
    student = models.build("digits_cnn_half", n_classes=10, in_channels=1, mean=about.mean, std=about.std)
    game = DFQ(teacher, student, (1, 8, 8), Settings(**PRESETS["digits"], n_updates=160), runtime)
    first = game.step()
    fit(game, 160 // game.settings.kd_steps - 1, name="digits")
    assert accuracy(student, test, runtime) > 0.5
    game.student.eval()
    last = game.synthesize()
    assert last["bn loss"] < first["bn loss"] / 2
    assert float(losses.class_balance(teacher(game.sample(256)))) < -2
