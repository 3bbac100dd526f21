"""The verifiable properties of the DFAD game."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import classifier, generator, parameters_of, same, snapshot
from torch import nn

from benchmarks.plain_games import PlainDFAD
from benchmarks.speed import DFAD as SETTINGS
from benchmarks.speed import generator as benchmark_generator
from benchmarks.speed import players as benchmark_players
from dfkd_lib import data, models
from dfkd_lib.errors import InputError
from dfkd_lib.measures.evaluation import accuracy
from dfkd_lib.methods.dfad import DFAD, Settings
from dfkd_lib.runtime import Runtime
from dfkd_lib.teachers import RECIPES, train_or_load
from dfkd_lib.training.fit import fit

SMALL = Settings(latent_dim=6, batch_size=16, k=3, lr_student=0.05)


def players(seed: int = 0) -> tuple[nn.Module, nn.Module, nn.Module]:
    torch.manual_seed(seed)
    return classifier(8), classifier(4), generator()


def game(runtime: Runtime, settings: Settings = SMALL, seed: int = 0) -> DFAD:
    return DFAD(*players(seed), settings, runtime)


def test_a_student_equal_to_its_teacher_gives_no_gradient(float64):
    teacher = classifier(8)
    method = DFAD(teacher, copy.deepcopy(teacher), generator(), replace(SMALL, momentum=0, weight_decay=0), float64)
    method.student.eval()
    x = method.generator(method.sample_noise())
    loss = F.l1_loss(method.student(x), method.teacher(x))
    loss.backward()
    assert loss.item() == 0
    for player in (method.student, method.generator):
        assert all(torch.count_nonzero(p.grad) == 0 for p in player.parameters())


def test_imitation_moves_only_the_student(float32):
    method = game(float32)
    generator_before, student_before = parameters_of(method.generator), parameters_of(method.student)
    method.imitate()
    assert same(generator_before, parameters_of(method.generator))
    assert not same(student_before, parameters_of(method.student))


def test_each_step_leaves_the_gradients_of_others_alone(float32):
    method = game(float32)
    method.imitate()
    assert all(p.grad is None for p in method.generator.parameters())
    before = [p.grad.clone() for p in method.student.parameters()]
    method.generate()
    assert all(torch.equal(p.grad, was) for p, was in zip(method.student.parameters(), before, strict=True))


@pytest.mark.parametrize("in_train_mode", [True, False])
def test_generation_moves_only_the_generator(float32, in_train_mode):
    method = game(float32, replace(SMALL, student_trains_in_generation=in_train_mode))
    student, teacher = parameters_of(method.student), snapshot(method.teacher)
    generator_before = parameters_of(method.generator)
    running_mean = method.student[1].running_mean.clone()
    method.generate()
    assert same(student, parameters_of(method.student))
    assert same(teacher, snapshot(method.teacher))
    assert not same(generator_before, parameters_of(method.generator))
    assert torch.equal(running_mean, method.student[1].running_mean) is not in_train_mode
    assert method.student.training


def test_the_teacher_never_changes_and_never_accumulates_gradients(float32):
    method = game(float32)
    before = snapshot(method.teacher)
    for _ in range(5):
        method.step()
    assert same(before, snapshot(method.teacher))
    assert all(p.grad is None for p in method.teacher.parameters())


def test_updates_and_noise_are_counted(float32, monkeypatch):
    method = game(float32)
    noises, sample = [], method.sample_noise
    monkeypatch.setattr(method, "sample_noise", lambda: noises.append(sample()) or noises[-1])
    for _ in range(4):
        method.step()
    student_steps = {int(s["step"]) for s in method.generator_optimizer.state.values()}
    assert student_steps == {4}
    assert len(noises) == 4 * (SMALL.k + 1)
    assert len({tuple(z.flatten().tolist()) for z in noises}) == len(noises)


def test_log_generator_loss_divides_the_generator_gradient(float64):
    gradients = []
    for log in (False, True):
        method = game(float64, replace(SMALL, log_generator_loss=log))
        method.generator_optimizer.step = lambda *a, **k: None
        loss = method.generate()
        gradients.append([p.grad.clone() for p in method.generator.parameters()])
    discrepancy = torch.expm1(-loss)
    for plain, compressed in zip(*gradients, strict=True):
        assert torch.allclose(compressed, plain / (1 + discrepancy), atol=1e-12)


def test_three_iterations_equal_the_plain_loop(float64):
    ours, plain = game(float64), PlainDFAD(*players(), SMALL, float64)
    for _ in range(3):
        ours.step()
        plain.step()
    for mine, theirs in ((ours.student, plain.student), (ours.generator, plain.generator)):
        for name, value in theirs.state_dict().items():
            assert torch.allclose(mine.state_dict()[name], value, atol=1e-12), name


def test_three_iterations_of_wide_resnets_equal_the_plain_loop(float64):
    """The benchmark's own networks, at a batch that a test can afford."""
    small = replace(SETTINGS, batch_size=4, k=2)
    names = ("wrn16_2", "wrn16_1")
    ours = DFAD(*benchmark_players(*names), benchmark_generator(), small, float64)
    plain = PlainDFAD(*benchmark_players(*names), benchmark_generator(), small, float64)
    for _ in range(3):
        ours.step()
        plain.step()
    for name, value in plain.student.state_dict().items():
        assert torch.allclose(ours.student.state_dict()[name], value, rtol=1e-7, atol=1e-9), name


def test_seeds_decide_the_losses():
    def losses(seed: int) -> list[float]:
        method = game(Runtime.choose("cpu", "float32", seed=seed))
        return [float(method.step()["discrepancy"]) for _ in range(3)]

    assert losses(0) == losses(0)
    assert losses(0) != losses(1)


def test_generator_steps_raise_the_discrepancy_and_student_steps_lower_it(float32):
    method = game(float32)
    method.student.eval()
    z = method.sample_noise(64)
    optimizer = torch.optim.Adam(method.generator.parameters(), 1e-3)

    def discrepancy() -> torch.Tensor:
        x = method.generator(z)
        return F.l1_loss(method.student(x), method.teacher(x))

    before = discrepancy().item()
    for _ in range(20):
        optimizer.zero_grad()
        (-discrepancy()).backward()
        optimizer.step()
    raised = discrepancy().item()
    assert raised > before

    fake = method.generator(z).detach()
    optimizer = torch.optim.SGD(method.student.parameters(), 0.05)
    for _ in range(20):
        optimizer.zero_grad()
        F.l1_loss(method.student(fake), method.teacher(fake)).backward()
        optimizer.step()
    with torch.no_grad():
        assert F.l1_loss(method.student(fake), method.teacher(fake)) < raised


def test_the_game_beats_random_images_on_digits():
    """Equal student updates, averaged over seeds; the margin is far below what was seen."""
    train, test = data.load("digits", "train"), data.load("digits", "test")
    about = data.info("digits")
    recipe = replace(RECIPES["digits"], epochs=8)
    teacher = train_or_load("digits_cnn", train, test, recipe, Runtime.choose("cpu", "float32")).module

    def reached(generator_steps: int, seed: int) -> float:
        runtime = Runtime.choose("cpu", "float32", seed=seed)
        build = {"mean": about.mean, "std": about.std}
        student = models.build("digits_cnn_half", n_classes=10, in_channels=1, **build)
        made = models.build_generator("generator_a", latent_dim=32, image_shape=(1, 8, 8), ngf=16, **build)
        settings = Settings(latent_dim=32, batch_size=64, lr_student=0.3, generator_steps=generator_steps)
        method = DFAD(teacher, student, made, settings, runtime)
        fit(method, 60, name="digits")
        return accuracy(student, test, runtime)

    game, unplayed = (sum(reached(steps, seed) for seed in (0, 1)) / 2 for steps in (1, 0))
    assert game > unplayed + 0.03


def test_random_never_trains_its_generator(float32):
    method = game(float32, replace(SMALL, generator_steps=0))
    before = parameters_of(method.generator)
    metrics = method.step()
    assert same(before, parameters_of(method.generator))
    assert "generator loss" not in metrics


def test_learning_rates_fall_at_the_milestones(float32):
    method = game(float32, replace(SMALL, milestones=(1, 3)))
    seen = []
    for _ in range(4):
        method.step()
        seen.append((method.student_optimizer.param_groups[0]["lr"], method.generator_optimizer.param_groups[0]["lr"]))
    assert seen == [pytest.approx((0.05 * f, 1e-3 * f)) for f in (1, 0.1, 0.1, 0.01)]


def test_state_round_trip_continues_the_same_game(float32):
    one = game(float32)
    one.step()
    other = DFAD(players()[0], *players(9)[1:], SMALL, float32)
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    for _ in range(2):
        assert {k: float(v) for k, v in one.step().items()} == {k: float(v) for k, v in other.step().items()}
    assert same(snapshot(one.student), snapshot(other.student))


@pytest.mark.parametrize(
    ("bad", "named"),
    [({"loss": "MEA"}, "MAE"), ({"k": 0}, "k must"), ({"batch_size": 1}, "batch_size"), ({"lr_student": -1}, "lr_")],
)
def test_bad_settings_are_named(bad, named):
    with pytest.raises(InputError, match=named):
        Settings(**bad)
