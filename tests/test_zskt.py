"""The verifiable properties of ZSKT; what it shares with DAFL and DFQ is in test_generative.py."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import classifier, parameters_of, same, snapshot
from torch import Tensor, nn

from dfkd_lib import data, losses, models
from dfkd_lib.errors import InputError
from dfkd_lib.measures.evaluation import accuracy
from dfkd_lib.methods.zskt import PRESETS, ZSKT, Settings, attended, attention_loss, generation_loss
from dfkd_lib.runtime import Runtime
from dfkd_lib.teachers import RECIPES, train_or_load
from dfkd_lib.training.fit import fit
from dfkd_lib.training.players import update

# The authors' game with plain optimisers, so that its parts can be compared with what they should be.
SMALL = {
    "batch_size": 8, "kd_steps": 10, "latent_dim": 6, "ngf": 4, "generator": "toolbox_large", "optimizer": "sgd",
    "lr_student": 0.1, "betas": (0.5, 0.999), "clip": 5.0, "student_trains_in_generation": False,
    "generator_decays": False,
}  # fmt: skip


def method(runtime: Runtime, student: nn.Module | None = None, **changes: Any) -> ZSKT:
    torch.manual_seed(0)
    return ZSKT(classifier(8), student or classifier(4), (1, 8, 8), Settings(**(SMALL | changes)), runtime)


def inputs_of(module: nn.Module) -> list[Tensor]:
    seen: list[Tensor] = []
    module.register_forward_hook(lambda *a: seen.append(a[1][0].detach().clone()))
    return seen


def test_ten_student_steps_follow_one_generator_step_on_one_z(float32):
    game = method(float32)
    noise, taught, learnt = (inputs_of(m) for m in (game.generator, game.teacher, game.student))
    game.step()
    assert len(noise) == 2  # the generator's own step, then the images for the student
    assert torch.equal(noise[0], noise[1])
    assert len(taught) == 2  # asked once for all ten
    assert len(learnt) == 1 + 10
    assert all(torch.equal(taught[1], x) for x in learnt[1:])
    assert not torch.equal(taught[0], taught[1])  # made anew after the generator's step
    game.step()
    assert not torch.equal(noise[1], noise[2])
    assert torch.equal(noise[2], noise[3])


@pytest.mark.parametrize("trains", [True, False])
def test_the_students_batch_norm_moves_in_the_generators_step_as_the_setting_says(trains, float32):
    game = method(float32, student_trains_in_generation=trains)
    before, weights = snapshot(game.student), parameters_of(game.student)
    game.synthesize()
    assert same(before, snapshot(game.student)) is not trains
    assert same(weights, parameters_of(game.student))
    game.step()
    assert game.student.training


def test_the_defaults_are_the_authors_loop(float64):
    """One iteration of their script, written out: Adam for both, one z, the student in train mode throughout."""
    settings = Settings(batch_size=8, latent_dim=6, ngf=4, n_updates=40)
    torch.manual_seed(0)
    game, plain = (ZSKT(classifier(8), classifier(4), (1, 8, 8), settings, float64) for _ in range(2))
    plain.load_state_dict(copy.deepcopy(game.state_dict()))
    plain.teacher.load_state_dict(game.teacher.state_dict())
    game.step()
    teacher, student, generator = plain.teacher, plain.student.train(), plain.generator.train()
    optimizers = torch.optim.Adam(student.parameters(), 2e-3), torch.optim.Adam(generator.parameters(), 1e-3)

    def learn(at: int, loss: Tensor) -> None:
        for p in (*student.parameters(), *generator.parameters()):
            p.grad = None
        loss.backward()
        nn.utils.clip_grad_norm_((student, generator)[at].parameters(), 50)
        optimizers[at].step()

    z = plain.fresh_noise()
    x = generator(z)
    learn(1, -losses.kl(student(x), teacher(x)))
    x = generator(z).detach()
    for step in range(10):
        optimizers[0].param_groups[0]["lr"] = 2e-3 * (1 + math.cos(math.pi * step / 40)) / 2
        learn(0, losses.kl(student(x), teacher(x)))
    for ours, theirs in ((game.student, student), (game.generator, generator)):
        for name, value in theirs.state_dict().items():
            assert torch.allclose(ours.state_dict()[name], value, atol=1e-9), name


def test_fresh_noise_for_each_step_is_the_toolbox_variant(float32):
    game = method(float32, same_z=False, kd_steps=4)
    noise = inputs_of(game.generator)
    game.step()
    assert len({tuple(z.flatten().tolist()) for z in noise}) == 1 + 4


@pytest.mark.parametrize("same_z", [True, False])
def test_several_generator_steps_share_their_z_only_if_the_student_does(same_z, float32):
    game = method(float32, same_z=same_z, generator_steps=3)
    noise = inputs_of(game.generator)
    game.synthesize()
    assert len({tuple(z.flatten().tolist()) for z in noise}) == (1 if same_z else 3)


@pytest.mark.parametrize("clip", [0.01, 5.0])
def test_gradients_of_both_players_are_clipped(clip, float32, monkeypatch):
    game = method(float32, clip=clip)
    norms: list[tuple[Tensor, Tensor]] = []
    real = nn.utils.clip_grad_norm_

    def noted(weights: Any, limit: float) -> Tensor:
        weights = list(weights)
        before = real(weights, limit)
        norms.append((before, torch.stack([p.grad.norm() for p in weights]).norm()))
        return before

    monkeypatch.setattr(nn.utils, "clip_grad_norm_", noted)
    game.step()
    assert len(norms) == 1 + 10
    assert all(after <= clip * (1 + 1e-4) for _, after in norms)
    assert any(before > clip for before, _ in norms) is (clip == 0.01)


def test_clipping_keeps_the_direction_and_leaves_short_gradients_alone(float64):
    for clip in (0.1, 10.0, math.inf):
        weight = torch.nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64))
        optimizer = torch.optim.SGD([weight], 1.0)
        update(optimizer, weight.square().sum() / 2, float64.scaler(), clip)
        factor = 1 - min(1.0, clip / 5)
        assert torch.allclose(weight, factor * torch.tensor([3.0, 4.0], dtype=torch.float64), atol=1e-5)


def test_the_generator_loss_is_minus_the_students(float64):
    s, t = torch.randn(6, 5, dtype=torch.float64), torch.randn(6, 5, dtype=torch.float64)
    expected = -(t.softmax(1) * (t.log_softmax(1) - s.log_softmax(1))).sum(1).mean()
    assert torch.allclose(generation_loss(s, t), expected)
    assert generation_loss(s, t) <= 0
    assert torch.equal(generation_loss(s, t, 4.0), -losses.kl(s, t, 4.0))


def test_both_players_soften_their_beliefs_at_one_temperature(float64):
    game = method(float64, kd_steps=1, temperature=3.0, student_trains_in_generation=True)
    painter, pupil = copy.deepcopy(game.generator).train(), copy.deepcopy(game.student).train()

    def kl_by_hand(x: Tensor) -> float:
        p, q = ((net(x) / 3).softmax(1) for net in (game.teacher, pupil))
        return float((9 * (p * (p / q).log()).sum() / len(x)).detach())

    found = game.synthesize()["generator loss"]
    assert float(found) == pytest.approx(-kl_by_hand(painter(game.z)), rel=1e-9)
    game.student.train()
    assert game.lesson is not None
    expected = kl_by_hand(game.lesson.images)
    assert float(game.imitate()) == pytest.approx(expected, rel=1e-9)


def test_a_student_equal_to_its_teacher_moves_nobody(float64):
    torch.manual_seed(0)
    game = method(float64, student=classifier(8))
    game.student.load_state_dict(copy.deepcopy(game.teacher.state_dict()))
    game.student.eval()
    game.descend = lambda loss: loss.backward()  # type: ignore[method-assign]
    metrics = game.synthesize()
    assert float(metrics["generator loss"]) == 0
    # Exactly nothing at the logits; what is left are sums of rounding errors.
    assert all(p.grad.abs().max() < 1e-15 for p in game.generator.parameters())


def test_without_attention_and_clipping_the_students_update_is_the_plain_one(float64):
    game = method(float64, kd_steps=1, clip=math.inf, n_updates=10)
    game.synthesize()
    plain = copy.deepcopy(game.student).train()
    x = copy.deepcopy(game.generator)(game.z).detach()
    loss = losses.kl(plain(x), game.teacher(x))
    loss.backward()
    torch.optim.SGD(plain.parameters(), 0.1, 0.9, weight_decay=1e-4).step()
    game.student.train()
    assert float(game.imitate()) == pytest.approx(float(loss.detach()), abs=1e-12)
    for ours, theirs in zip(game.student.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-12)


def test_the_students_learning_rate_follows_the_shared_cosine(float32):
    game = method(float32, kd_steps=2, n_updates=4)
    rates = []
    for _ in range(2):
        game.step()
        rates.append(game.student_optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.1 * 0.5 * (1 + math.cos(math.pi * n / 4)) for n in (1, 3)])


def test_the_generators_learning_rate_follows_it_only_if_asked(float32):
    for decays, expected in ((True, [1e-3, 5e-4]), (False, [1e-3, 1e-3])):
        game = method(float32, kd_steps=2, n_updates=4, generator_decays=decays)
        rates = []
        for _ in range(2):
            game.step()
            rates.append(game.generator_optimizer.param_groups[0]["lr"])
        assert rates == pytest.approx(expected)


def test_attention_adds_its_term_to_the_students_loss(float64):
    plain, attentive = (
        method(float64, kd_steps=1, attention_layers=layers, student_attention_layers=theirs, beta=7.0)
        for layers, theirs in (((), ()), (("2", "0"), ("2", "0")))
    )
    attentive.load_state_dict(copy.deepcopy(plain.state_dict()))
    found = []
    for game in (plain, attentive):
        game.student.eval()  # the same images and the same batch-norm in both passes below
        game.synthesize()
        found.append((float(game.imitate()), game.lesson))
    lesson = found[1][1]
    assert lesson is not None
    reference = method(float64)
    reference.load_state_dict(copy.deepcopy(plain.state_dict()))
    student = method(float64).student.eval()
    expected = 0.0
    for at in (2, 0):
        with torch.no_grad():
            t, s = (net[: at + 1](lesson.images) for net in (attentive.teacher, student))
        maps = [F.normalize(a.square().mean(1).flatten(1)) for a in (t, s)]
        expected += float((maps[0] - maps[1]).square().mean())
    assert found[1][0] - found[0][0] == pytest.approx(7 * 5 * expected, rel=1e-9)


def test_attention_of_equal_networks_costs_nothing_and_hooks_are_gone(float64):
    game = method(float64, attention_layers=("2",))
    x = torch.rand(4, 1, 8, 8, dtype=torch.float64)
    layers = [game.teacher.get_submodule(name) for name in ("2", "0")]
    with attended(layers) as one:
        game.teacher(x)
    with attended(layers[::-1]) as other:
        game.teacher(x)
    assert [m.shape for m in one] == [(4, 64)] * 2
    assert float(attention_loss(one, other[::-1])) == 0
    assert float(attention_loss(one, other)) > 0
    game.step()
    assert not any(m._forward_hooks for net in (game.teacher, game.student) for m in net.modules())


def test_only_the_student_learns_from_attention(float32):
    game = method(float32, attention_layers=("2",))
    game.step()
    assert game.lesson is not None
    assert not any(m.requires_grad for m in game.lesson.attention)


@pytest.mark.parametrize(
    ("names", "named"),
    [
        ({"attention_layers": ("22",)}, "unknown layer of the teacher '22'"),
        ({"attention_layers": ("2",), "student_attention_layers": ("nowhere",)}, "unknown layer of the student"),
        ({"attention_layers": ("2",), "student_attention_layers": ("3",)}, "sees 64 places .* 4; pair"),
        ({"attention_layers": ("5",)}, r"outputs \[B, C, H, W\]"),
        ({"attention_layers": ("2",), "student_attention_layers": ("2", "3")}, "name one of the student's"),
    ],
)
def test_layers_that_cannot_be_compared_are_refused(names, named, float32):
    with pytest.raises(InputError, match=named):
        method(float32, **names)


def test_the_groups_of_wide_resnets_can_be_compared(float32):
    build = {"n_classes": 10, "in_channels": 3, "mean": (0.5,) * 3, "std": (0.5,) * 3}
    teacher, student = models.build("wrn16_2", **build), models.build("wrn16_1", **build)
    groups = tuple(f"network.groups.{i}" for i in range(3))
    settings = Settings(batch_size=2, kd_steps=1, ngf=2, latent_dim=4, attention_layers=groups)
    game = ZSKT(teacher, student, (3, 32, 32), settings, float32)
    game.step()
    assert game.lesson is not None
    assert [m.shape[1] for m in game.lesson.attention] == [32**2, 16**2, 8**2]


@pytest.mark.parametrize(("bad", "named"), [({"clip": 0}, "clip must"), ({"beta": -1}, "beta must")])
def test_bad_settings_are_named(bad, named):
    with pytest.raises(InputError, match=named):
        Settings(**bad)


def test_digits_are_learnt_without_digits():
    """Few updates and a teacher of few epochs; the margin over chance, 0.1, is far below what was seen."""
    train, test = data.load("digits", "train"), data.load("digits", "test")
    about = data.info("digits")
    runtime = Runtime.choose("cpu", "float32", seed=0)
    teacher = train_or_load("digits_cnn", train, test, replace(RECIPES["digits"], epochs=6), runtime).module
    student = models.build("digits_cnn_half", n_classes=10, in_channels=1, mean=about.mean, std=about.std)
    game = ZSKT(teacher, student, (1, 8, 8), Settings(**PRESETS["digits"], n_updates=200), runtime)
    fit(game, 200 // game.settings.kd_steps, name="digits")
    assert accuracy(student, test, runtime) > 0.2
