"""What DAFL, ZSKT and DFQ promise alike: who learns when, and what is counted."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import classifier, same, snapshot
from torch import Tensor

from dfkd_lib.errors import InputError
from dfkd_lib.methods import dafl, dfq, zskt
from dfkd_lib.methods.generative import GenerativeSettings, GeneratorDistiller
from dfkd_lib.runtime import Runtime
from dfkd_lib.training.fit import fit

SHAPE = (1, 8, 8)
KINDS: dict[str, tuple[type[GeneratorDistiller], type[GenerativeSettings], Any]] = {
    "dafl": (dafl.DAFL, dafl.Settings, dafl.PRESETS),
    "zskt": (zskt.ZSKT, zskt.Settings, zskt.PRESETS),
    "dfq": (dfq.DFQ, dfq.Settings, dfq.PRESETS),
}
# Generators that stay within [0, 1], and students that synthesis leaves alone.
QUIET = {"generator": "toolbox_large", "student_trains_in_generation": False}
VARIANTS = {
    "dafl": ("dafl", dafl.TOOLBOX),
    "dafl joint": ("dafl", dafl.TOOLBOX | {"joint": True}),
    "zskt": ("zskt", QUIET),
    "zskt fresh z": ("zskt", QUIET | {"same_z": False, "samples_in_eval": True}),
    "zskt attention": ("zskt", QUIET | {"attention_layers": ("2",)}),
    "dfq": ("dfq", {}),
    "dfq gaussian": ("dfq", {"gaussian": True, "warmup": 2}),
}


def method(variant: str, runtime: Runtime, seed: int = 0, **changes: Any) -> GeneratorDistiller:
    kind, own = VARIANTS[variant]
    cls, settings, _ = KINDS[kind]
    small = {"batch_size": 8, "latent_dim": 6, "ngf": 4, "n_updates": 40}
    steps = {"kd_steps": 1 if own.get("joint") else 3}
    torch.manual_seed(seed)
    return cls(classifier(8), classifier(4), SHAPE, settings(**(own | small | steps | changes)), runtime)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_teacher_never_changes_and_the_student_only_while_it_imitates(variant, float32):
    game = method(variant, float32)
    teacher, student, generator = (snapshot(m) for m in (game.teacher, game.student, game.generator))
    game.student.eval()
    game.synthesize()
    assert same(student, snapshot(game.student))
    assert not same(generator, snapshot(game.generator))
    for _ in range(4):
        game.step()
    assert same(teacher, snapshot(game.teacher))
    assert all(p.grad is None for p in game.teacher.parameters())
    assert not same(student, snapshot(game.student))
    assert game.student.training
    assert all(p.requires_grad for p in game.student.parameters())


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_student_is_neither_read_in_train_mode_nor_given_gradients_by_synthesis(variant, float32):
    game = method(variant, float32)
    seen = {}
    synthesize = game.synthesize

    def watched() -> dict[str, Tensor]:
        before = snapshot(game.student)
        metrics = synthesize()
        seen["unchanged"] = same(before, snapshot(game.student))
        seen["no gradients"] = all(p.grad is None for p in game.student.parameters())
        return metrics

    game.synthesize = watched  # type: ignore[method-assign]
    game.step()
    assert seen == {"unchanged": True, "no gradients": True}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_student_updates_leave_the_weights_of_the_generator_alone(variant, float32):
    game = method(variant, float32)
    game.step()
    weights = [p.detach().clone() for p in game.generator.parameters()]
    game.imitate()
    assert all(torch.equal(a, b) for a, b in zip(weights, game.generator.parameters(), strict=True))


@pytest.mark.parametrize("variant", VARIANTS)
def test_updates_and_images_are_counted(variant, float32):
    game = method(variant, float32)
    for _ in range(4):
        metrics = game.step()
    settings: Any = game.making
    learning = 4 - getattr(settings, "warmup", 0)
    updates = learning * settings.kd_steps
    lessons = learning if getattr(settings, "same_z", False) else updates
    assert game.budget.student_updates == updates
    assert game.budget.images == lessons * settings.batch_size
    assert game.budget.teacher_passes == (4 + lessons) * settings.batch_size
    assert {int(s["step"]) for s in game.generator_optimizer.state.values()} == {4}
    assert all(value.ndim == 0 and not value.requires_grad for value in metrics.values())
    assert {"generator loss", "distillation loss"} <= metrics.keys()


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_seed_decides_the_run(variant):
    def run(seed: int) -> list[float]:
        game = method(variant, Runtime.choose("cpu", "float32", seed=seed), seed)
        return [float(game.step()["generator loss"]) for _ in range(3)]

    assert run(0) == run(0)
    assert run(0) != run(1)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("in_eval", [True, False])
def test_watching_shows_the_same_noise_and_changes_nothing(variant, in_eval, float32):
    game = method(variant, float32, samples_in_eval=in_eval)
    game.step()
    before = copy.deepcopy(game.state_dict())
    seen = [game.watch(5) for _ in range(2)]
    assert torch.equal(seen[0]["images"], seen[1]["images"])
    assert seen[0]["images"].shape == (5, *SHAPE)
    assert seen[0]["images"].min() >= 0
    assert seen[0]["images"].max() <= 1
    assert len(game.pictures(11)) == 11  # more than a batch
    after = game.state_dict()
    assert all(same(before[part], after[part]) for part in ("generator", "student"))
    assert all(torch.equal(before[stream], after[stream]) for stream in ("noise", "augmentation"))


@pytest.mark.parametrize("variant", ["dafl", "zskt fresh z", "dfq"])
@pytest.mark.parametrize("in_eval", [True, False])
def test_samples_are_new_images_in_range_without_gradient_and_training_goes_on_in_train_mode(variant, in_eval, float32):
    game = method(variant, float32, samples_in_eval=in_eval)
    statistics = game.generator[2].running_mean.clone()
    first, second = game.sample(7), game.sample(7)
    assert first.shape == (7, *SHAPE)
    assert not torch.equal(first, second)
    assert not first.requires_grad
    assert first.min() >= 0
    assert first.max() <= 1
    assert game.generator.training is not in_eval
    assert torch.equal(statistics, game.generator[2].running_mean) is in_eval
    statistics = game.generator[2].running_mean.clone()
    game.synthesize()
    assert game.generator.training
    assert not torch.equal(statistics, game.generator[2].running_mean)


def test_samples_in_eval_do_not_depend_on_their_batch(float64):
    game = method("dafl", float64)
    game.step()
    z = game.fresh_noise()
    assert torch.allclose(game.images_of(z)[:3], game.images_of(z[:3]))
    in_train = method("dafl", float64, samples_in_eval=False)
    assert not torch.allclose(in_train.images_of(z)[:3], in_train.images_of(z[:3]))


@pytest.mark.parametrize("kind", KINDS)
def test_a_student_that_is_the_teacher_is_refused(kind, float32):
    cls, settings, _ = KINDS[kind]
    teacher = classifier()
    with pytest.raises(InputError, match="same network"):
        cls(teacher, teacher, SHAPE, settings(), float32)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_guarded_fit_in_mixed_precision_stays_finite(variant):
    game = method(variant, Runtime.choose("cpu", "bfloat16", seed=0))
    result = fit(game, 3, name="digits", watch=game.watch)
    assert result.history[-1]["step"] == 3
    assert result.snapshots[3]["images"].dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
def test_presets_are_settings_of_one_scale_each(kind):
    _, settings, presets = KINDS[kind]
    assert set(presets) == {"digits", "mnist", "cifar10"}
    for preset in presets.values():
        assert settings(**preset, n_updates=400).n_updates == 400


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("bad", "named"),
    [
        ({"latent_dim": 0}, "latent_dim must"),
        ({"generator_steps": 0}, "generator_steps must"),
        ({"lr_generator": -1.0}, "lr_generator must"),
        ({"batch_size": 1}, "batch_size"),
        ({"temperature": 0}, "temperature must"),
    ],
)
def test_bad_settings_are_named(kind, bad, named):
    _, settings, _ = KINDS[kind]
    with pytest.raises(InputError, match=named):
        settings(**bad)
    with pytest.raises(InputError, match=named):
        replace(settings(), **bad)
