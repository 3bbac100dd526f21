"""The verifiable properties of DeepInversion and its adaptive form."""

from __future__ import annotations

import copy
from dataclasses import replace
from importlib import import_module

import pytest
import torch
from conftest import same, settled, snapshot, stream
from torch import Tensor, nn

from dfkd_lib import data, losses
from dfkd_lib.errors import InputError
from dfkd_lib.methods.deepinversion import PRESETS, DeepInversion, Settings, roll_flip
from dfkd_lib.methods.inversion import MomentumStatistics, batch_norm_loss
from dfkd_lib.runtime import Runtime
from dfkd_lib.taps import batch_norm_layers, tapped
from dfkd_lib.teachers import RECIPES, train_or_load
from dfkd_lib.training.fit import fit

SMALL = Settings(batch_size=8, kd_steps=2, synthesis_batch=12, g_steps=4, jitter=1, pad=1, bank_size=30, pixel_mean=0.4)


def method(runtime: Runtime, settings: Settings = SMALL, seed: int = 0) -> DeepInversion:
    return DeepInversion(settled(seed), settled(seed + 1, 4), (1, 8, 8), settings, runtime)


def test_a_roll_permutes_pixels_and_keeps_within_the_jitter():
    x = torch.rand(3, 2, 6, 5, dtype=torch.float64)
    expected = {(i, j, m): False for i in (-2, -1, 0, 1, 2) for j in (-2, -1, 0, 1, 2) for m in (False, True)}
    for seed in range(400):
        y = roll_flip(x, jitter=2, flip=True, generator=stream(seed))
        assert torch.equal(y.flatten(2).sort().values, x.flatten(2).sort().values)
        matches = [
            key for key in expected if torch.equal(y, torch.roll(x.flip(3) if key[2] else x, key[:2], dims=(2, 3)))
        ]
        assert matches
        expected[matches[0]] = True
    assert all(expected.values())


def test_a_roll_and_its_inverse_are_the_identity():
    x = torch.arange(2 * 7 * 7.0).view(1, 2, 7, 7)
    y = roll_flip(x, jitter=3, flip=False, generator=stream(5))
    down, across = torch.randint(-3, 4, (2, 1), generator=stream(5)).flatten().tolist()
    assert torch.equal(torch.roll(y, (-down, -across), dims=(2, 3)), x)
    assert torch.equal(roll_flip(x, jitter=0, flip=False, generator=stream(0)), x)


def test_the_roll_is_differentiable():
    x = torch.rand(2, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: roll_flip(x, jitter=1, flip=True, generator=stream(1)), x)


@pytest.mark.parametrize("power", [1, 2])
def test_total_variation_of_constant_images_is_zero_and_of_a_step_is_known(power):
    assert float(losses.total_variation(torch.full((2, 3, 5, 5), 0.3), power)) == 0
    step = torch.zeros(1, 1, 2, 2)
    step[..., 1] = 1  # right: 2 differences of 1; below: none; either diagonal: 1
    expected = 1 + 0 + 1 + 1 if power == 1 else 2**0.5 + 0 + 1 + 1
    assert float(losses.total_variation(step, power)) == pytest.approx(expected)


def test_jensen_shannon_vanishes_at_agreement_and_is_symmetric():
    torch.manual_seed(0)
    s, t = torch.randn(2, 9, 5, dtype=torch.float64) * 4
    assert float(losses.jensen_shannon(s, s)) == 0
    assert float(losses.jensen_shannon(s, t)) == pytest.approx(float(losses.jensen_shannon(t, s)), abs=1e-12)
    for scale in (0.01, 1.0, 100.0):  # the clamped beliefs do not sum to 1, so slightly below 0 is possible
        assert -0.05 < float(losses.jensen_shannon(scale * s, scale * t)) < 2
    s = s.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(losses.jensen_shannon(s, s.detach()), s)
    assert gradient.abs().max() < 1e-15


def test_jensen_shannon_is_the_mean_of_both_kl_from_the_middle():
    torch.manual_seed(1)
    s, t = torch.randn(2, 6, 4, dtype=torch.float64)
    p, q = (s / 3).softmax(1).clamp(0.01, 0.99), (t / 3).softmax(1).clamp(0.01, 0.99)
    m = ((p + q) / 2).clamp(0.01, 0.99)
    expected = ((m * (m / p).log()).sum(1) + (m * (m / q).log()).sum(1)).mean() / 2
    assert torch.allclose(losses.jensen_shannon(s, t), expected)


def test_a_student_equal_to_its_teacher_adds_no_gradient(float64):
    teacher = settled()
    gradients = []
    for adv in (0.0, 5.0):
        settings = replace(SMALL, adv=adv)
        one = DeepInversion(copy.deepcopy(teacher), copy.deepcopy(teacher), (1, 8, 8), settings, float64)
        one.student.eval()
        u = one.draw_pixels(6).requires_grad_()
        loss, _ = one.inversion_loss(u, one.draw_targets(6))
        gradients.append(torch.autograd.grad(loss, u)[0])
    assert torch.allclose(*gradients, atol=1e-15)


def test_the_loss_is_the_sum_of_its_terms(float64):
    one = method(
        float64, replace(SMALL, jitter=0, flip=False, bn=2.0, oh=3.0, adv=0.5, tv=0.1, l2=0.2, js_temperature=2.0)
    )
    one.student.eval()
    u, targets = one.draw_pixels(6), one.draw_targets(6)
    loss, terms = one.inversion_loss(u, targets)
    x = one.image(u)
    t, seen = one.look(x, one.layers)
    expected = (
        2 * batch_norm_loss(seen)
        + 3 * nn.functional.cross_entropy(t, targets)
        - 0.5 * losses.jensen_shannon(one.student(x), t, 2.0)
        + 0.1 * losses.total_variation(u)
        + 0.2 * u.norm()
    )
    assert torch.allclose(loss, expected, rtol=1e-9)
    assert set(terms) == {"bn loss", "target loss", "disagreement"}
    assert one.optimizer.defaults["betas"] == (0.5, 0.99) and one.optimizer.defaults["lr"] == SMALL.lr_pixels


def test_clipped_pixels_are_those_of_images_in_the_unit_range(float64):
    one = method(float64, replace(SMALL, pixel_mean=0.3, pixel_std=0.2))
    u = one.clip(100 * one.draw_pixels(50))
    assert float(u.min()) == pytest.approx(-0.3 / 0.2) and float(u.max()) == pytest.approx(0.7 / 0.2)
    x = one.image(u)
    assert x.min() > -1e-12 and x.max() < 1 + 1e-12


@pytest.mark.parametrize("adv", [0.0, 1.0])
def test_what_is_stored_is_the_iterate_of_least_loss(float32, monkeypatch, adv):
    # Large random rolls and so high a rate that the last iterate is not the best one.
    one = method(float32, replace(SMALL, adv=adv, g_steps=13, lr_pixels=8.0, jitter=4))
    seen, inner = [], one.inversion_loss

    def spy(u: Tensor, targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        loss, terms = inner(u, targets)
        seen.append((float(loss.detach()), one.image(u.detach()).clone()))
        return loss, terms

    monkeypatch.setattr(one, "inversion_loss", spy)
    one.student.eval()
    metrics = one.synthesize()
    least, image = min(seen, key=lambda pair: pair[0])
    assert len(seen) == 13 and least < seen[-1][0]
    assert float(metrics["best loss"]) == pytest.approx(least)
    stored = one.bank.newest(12).float() / 255
    assert (stored - image).abs().max() <= 0.5 / 255 + 1e-6
    assert ("disagreement" in metrics) is (adv > 0)


def test_every_call_starts_from_new_pixels(float32):
    one = method(float32, replace(SMALL, g_steps=1))
    one.step(), one.step()
    first, second = one.bank.newest(24).float().split(12)
    assert (first - second).abs().mean() > 10


def test_synthesis_leaves_the_student_as_it_is_and_the_teacher_for_ever(float32):
    one = method(float32)
    teacher, student = snapshot(one.teacher), snapshot(one.student)
    one.distillation = replace(SMALL, lr_student=1e-30, weight_decay=0)
    monkey, one.imitate = one.imitate, lambda: torch.zeros(())  # type: ignore[method-assign]
    one.step()
    assert same(student, snapshot(one.student)) and one.student.training
    one.imitate = monkey  # type: ignore[method-assign]
    one.step()
    assert same(teacher, snapshot(one.teacher)) and not same(student, snapshot(one.student))
    assert all(p.grad is None for p in one.teacher.parameters())
    assert all(p.requires_grad for p in one.student.parameters()) and one.student.training


def test_updates_images_and_passes_are_counted_and_batches_are_images(float32):
    one = method(float32)
    for _ in range(4):
        one.step()
    assert (one.budget.student_updates, one.budget.images, len(one.bank)) == (8, 48, 30)
    assert one.budget.teacher_passes == 4 * (4 * 12 + 2 * 8)
    x = one.sample(8)
    assert x.shape == (8, 1, 8, 8) and x.dtype == torch.float32 and x.min() >= 0 and x.max() <= 1
    assert one.pictures(5).shape == (5, 1, 8, 8)


def test_seeds_decide_the_bank():
    def images(seed: int) -> Tensor:
        one = method(Runtime.choose("cpu", "float32", seed=seed))
        one.step(), one.step()
        return one.bank.newest(24)

    assert torch.equal(images(0), images(0)) and not torch.equal(images(0), images(1))


@pytest.mark.parametrize(
    ("bad", "named"),
    [({"g_steps": 0}, "g_steps"), ({"adv": -1.0}, "adv"), ({"pixel_std": 0.0}, "pixel_std"), ({"jitter": -1}, "jit")],
)
def test_bad_settings_are_named(bad, named):
    with pytest.raises(InputError, match=named):
        Settings(**bad)


def test_a_teacher_without_batch_norm_is_refused(float32):
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(64, 5))
    with pytest.raises(InputError, match="batch-norm"):
        DeepInversion(teacher, settled(), (1, 8, 8), SMALL, float32)


def test_inverted_digits_are_taken_for_what_they_are_meant_to_be():
    """Forty steps: the batch-norm loss at most half of that of noise, and the teacher names the targets."""
    train, test = data.load("digits", "train"), data.load("digits", "test")
    recipe = replace(RECIPES["digits"], epochs=8)
    runtime = Runtime.choose("cpu", "float32", seed=0)
    teacher = train_or_load("digits_cnn", train, test, recipe, runtime).module
    settings = Settings(**{**PRESETS["digits"], "g_steps": 40, "synthesis_batch": 64, "kd_steps": 1})
    student = copy.deepcopy(teacher).requires_grad_(True)
    one = DeepInversion(teacher, student, (1, 8, 8), settings, runtime)
    targets = torch.arange(64) % 10
    one.draw_targets = lambda n: targets  # type: ignore[method-assign]
    noise = one.inversion_loss(one.clip(torch.randn(64, 1, 8, 8)), targets)[1]["bn loss"]
    fit(one, 1, name="digits")
    x = one.bank.newest(64).float() / 255
    with torch.no_grad():
        logits, seen = one.look(x, one.layers)
    assert batch_norm_loss(seen) < noise / 2
    assert (logits.argmax(1) == targets).float().mean() > 0.9


class TwoNorms(nn.Module):
    """Two batch-norm layers whose inputs are `scale` times as large as the network's own weights make them."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)
        )  # fmt: skip
        with torch.no_grad():
            self.layers(torch.rand(64, 1, 8, 8))
            for at in (0, 3):
                for weight in self.layers[at].parameters():
                    weight.mul_(scale)
                self.layers[at + 1].running_mean.mul_(scale)
                self.layers[at + 1].running_var.mul_(scale**2)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


@pytest.mark.parametrize("rho", [None, 0.9])
def test_the_relative_batch_norm_term_is_that_of_the_same_network_at_any_scale(rho):
    """Both in value and in its pull on the images; the papers' form is neither."""

    def term(scale: float, form: str) -> tuple[Tensor, Tensor]:
        network = TwoNorms(scale)
        x = torch.rand(8, 1, 8, 8, generator=stream(1)).requires_grad_()
        with tapped(batch_norm_layers(network)) as seen:
            network(x)
        if rho is None:
            loss = batch_norm_loss(seen, form)
        else:
            statistics = MomentumStatistics(rho, x.device, form)
            statistics.loss(seen)
            statistics.update()
            with tapped(batch_norm_layers(network)) as seen:
                network(x * 0.5)
            loss = statistics.loss(seen)
        return loss, torch.autograd.grad(loss, x)[0]

    # Not far from 1, or the layers' epsilon would count.
    for small, large in zip(term(1.0, "relative"), term(30.0, "relative"), strict=True):
        assert torch.allclose(small, large, rtol=2e-3, atol=1e-6)
    assert term(30.0, "absolute")[0] > 30 * term(1.0, "absolute")[0]


@pytest.mark.parametrize("module", ["cmi", "cpnet", "deepinversion", "dfq", "fast", "nayer"])
def test_an_unknown_scale_of_the_batch_norm_term_is_named(module):
    settings = import_module(f"dfkd_lib.methods.{module}").Settings
    assert settings().bn_scale == "absolute", "the form of the papers"
    with pytest.raises(InputError, match="unknown bn_scale 'relativ'; did you mean 'relative'"):
        settings(bn_scale="relativ")
