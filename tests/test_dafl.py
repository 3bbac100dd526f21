"""The verifiable properties of DAFL; what it shares with ZSKT and DFQ is in test_generative.py."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import classifier

from dfkd_lib import data, losses, models
from dfkd_lib.errors import InputError
from dfkd_lib.measures.evaluation import accuracy
from dfkd_lib.methods.dafl import DAFL, PAPER_MNIST, PRESETS, TOOLBOX, Settings, generation_loss, generation_terms
from dfkd_lib.runtime import Runtime
from dfkd_lib.taps import logits_and_features
from dfkd_lib.teachers import RECIPES, train_or_load
from dfkd_lib.training.fit import fit


def method(runtime: Runtime, **changes: Any) -> DAFL:
    small = TOOLBOX | {"batch_size": 8, "kd_steps": 3, "latent_dim": 6, "ngf": 4}
    torch.manual_seed(0)
    return DAFL(classifier(8), classifier(4), (1, 8, 8), Settings(**(small | changes)), runtime)


def test_defaults_are_the_authors_for_cifar():
    settings = Settings()
    assert (settings.oh, settings.balance, settings.act) == pytest.approx((0.05, 5 / math.log(10), 0.01))
    assert settings.joint and settings.kd_steps == 1 and settings.lr_generator == 0.02


def test_the_loss_is_the_weighted_sum_of_its_terms(float64):
    game = method(float64, oh=0.3, balance=5.0, act=0.1)
    x = game.sample(6)
    t, features = logits_and_features(game.teacher, x)
    p = t.softmax(1)
    q = p.mean(0)
    expected = -0.3 * p.max(1).values.log().mean() + 5 * (q * q.log()).sum() - 0.1 * features.abs().mean()
    ours = generation_loss(generation_terms(t, features), game.settings)
    assert torch.allclose(ours, expected)


def test_one_call_is_one_adam_step_on_the_loss_of_one_batch(float64):
    game, plain = method(float64), method(float64)
    metrics = game.synthesize()
    z = plain.fresh_noise()
    t, features = logits_and_features(plain.teacher, plain.generator(z))
    loss = generation_loss(generation_terms(t, features), plain.settings)
    optimizer = torch.optim.Adam(plain.generator.parameters(), 1e-3, (0.5, 0.999))
    loss.backward()
    optimizer.step()
    assert float(metrics["generator loss"]) == pytest.approx(float(loss.detach()), abs=1e-12)
    for ours, theirs in zip(game.generator.parameters(), plain.generator.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-12)


def test_the_generator_never_hears_of_the_student(float32):
    one, other = method(float32), method(Runtime.choose("cpu", "float32", seed=0))
    with torch.no_grad():
        for p in other.student.parameters():
            p.add_(1)
    assert {k: float(v) for k, v in one.synthesize().items()} == {k: float(v) for k, v in other.synthesize().items()}


def test_joint_players_learn_on_one_batch(float32):
    game = method(float32, joint=True, kd_steps=2)
    game.generator.register_forward_hook(lambda *a: made.append(a[2].detach()))
    game.student.register_forward_hook(lambda *a: learnt.append(a[1][0].detach()))
    made: list[torch.Tensor] = []
    learnt: list[torch.Tensor] = []
    game.step()
    assert len(made) == 1
    assert len(learnt) == 2
    assert all(torch.equal(made[0], x) for x in learnt)
    assert game.budget.images == 16


def test_each_student_update_has_its_own_images_otherwise(float32):
    game = method(float32)
    learnt: list[torch.Tensor] = []
    game.student.register_forward_hook(lambda *a: learnt.append(a[1][0].detach()))
    game.step()
    assert len({tuple(x.flatten().tolist()) for x in learnt}) == 3


@pytest.mark.parametrize("name", ["oh", "balance", "act"])
def test_weights_below_zero_are_refused(name):
    with pytest.raises(InputError, match=f"{name} must be 0"):
        Settings(**{name: -0.1})


def digits_teacher() -> torch.nn.Module:
    train, test = data.load("digits", "train"), data.load("digits", "test")
    recipe = replace(RECIPES["digits"], epochs=6)
    return train_or_load("digits_cnn", train, test, recipe, Runtime.choose("cpu", "float32")).module


def on_digits(teacher: torch.nn.Module, seed: int = 0, **changes: Any) -> DAFL:
    about = data.info("digits")
    runtime = Runtime.choose("cpu", "float32", seed=seed)
    student = models.build("digits_cnn_half", n_classes=10, in_channels=1, mean=about.mean, std=about.std)
    return DAFL(teacher, student, (1, 8, 8), Settings(**(PRESETS["digits"] | changes)), runtime)


def label_entropy(game: DAFL) -> float:
    with torch.no_grad():
        return -float(losses.class_balance(game.teacher(game.sample(256))))


def test_digits_are_learnt_and_balance_is_what_spreads_the_classes():
    teacher = digits_teacher()
    game = on_digits(teacher, n_updates=160)
    fit(game, 160 // game.settings.kd_steps, name="digits")
    assert accuracy(game.student, data.load("digits", "test"), game.runtime) > 0.3
    unbalanced = on_digits(teacher, balance=0.0)
    for _ in range(20):
        unbalanced.student.eval()
        unbalanced.synthesize()
    assert label_entropy(unbalanced) < label_entropy(game) - 0.2


def test_the_authors_weight_of_the_balance_is_for_a_logarithm_of_base_ten():
    logits = torch.randn(8, 10, dtype=torch.float64)
    q = logits.softmax(1).mean(0)
    for settings in (Settings(), Settings(**PAPER_MNIST)):
        ours = settings.balance * float(losses.class_balance(logits))
        assert ours == pytest.approx(5 * float((q * q.log10()).sum()))
