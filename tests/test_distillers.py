"""Every method by its name, with one student budget and one calling form."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from conftest import classifier
from torch import nn

from dfkd_lib import distillers
from dfkd_lib.errors import InputError
from dfkd_lib.methods.dfad import DFAD
from dfkd_lib.runtime import Runtime
from dfkd_lib.training.fit import fit
from dfkd_lib.training.modes import evaluating

SHAPE = (1, 8, 8)
# What makes any method small, as far as the method has it.
TINY = {
    "batch_size": 8, "kd_steps": 4, "k": 4, "latent_dim": 8, "ngf": 4, "synthesis_batch": 10, "g_steps": 2,
    "inner_steps": 2, "warmup": 1, "preinvert": 1, "batches": 1, "batches_warmup": 1, "embedding_dim": 8,
}  # fmt: skip


def tiny(name: str) -> dict[str, int]:
    known = distillers.settings_for(name, preset="paper")
    fixed = {"k"} if name == "dfad-one-stage" else set()
    return {key: value for key, value in TINY.items() if hasattr(known, key) and key not in fixed}


def players(seed: int = 0) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(seed)
    return classifier(8), classifier(4)


def built(name: str, runtime: Runtime, n_updates: int = 10, **settings: object) -> distillers.DataFreeMethod:
    chosen = {**tiny(name), **settings}
    return distillers.build(name, *players(), SHAPE, runtime, preset="paper", n_updates=n_updates, **chosen)


@pytest.mark.parametrize("name", distillers.names())
def test_each_method_takes_the_same_number_of_student_updates(float32, name):
    method = built(name, float32)
    before = {key: value.clone() for key, value in method.teacher.state_dict().items()}
    result = fit(method, distillers.n_calls(method), name=name, progress=False)
    assert 10 <= method.budget.student_updates < 10 + 4
    assert method.budget.images > 0 and method.budget.teacher_passes > 0 and result.history
    assert method.student_optimizer.param_groups[0]["lr"] < 0.1 * method.settings.lr_student
    assert all(torch.equal(before[key], value) for key, value in method.teacher.state_dict().items())
    seen = method.watch(4)
    assert seen["images"].shape[1:] == SHAPE and len(seen["teacher"]) == len(seen["student"])


@pytest.mark.parametrize("name", distillers.names())
@pytest.mark.parametrize("preset", distillers.UPDATES)
def test_each_preset_sets_what_the_method_knows(name, preset):
    settings = distillers.settings_for(name, preset=preset)
    assert settings.n_updates == distillers.UPDATES[preset]
    per_call = getattr(settings, "kd_steps", None) or settings.k
    assert settings.n_updates % per_call == 0, "all methods end at exactly the same number of updates"


def test_a_loop_over_names_needs_nothing_but_the_name(float32):
    """The students of all methods start from the same weights if they are built so."""
    starts = []
    for name in ("dfad", "random"):
        method = distillers.build(name, *players(3), SHAPE, float32, preset="digits", n_updates=5)
        assert isinstance(method, DFAD)
        starts.append(method.student.state_dict()["0.weight"].clone())
    assert torch.equal(*starts)


@pytest.mark.parametrize(("n_updates", "per_call", "calls"), [(10, 5, 2), (11, 4, 3), (3, 3, 1), (1, 1, 1), (12, 4, 3)])
def test_updates_are_spread_evenly_over_the_calls(n_updates, per_call, calls):
    settings = distillers.settings_for("fast", preset="paper", n_updates=n_updates, kd_steps=5)
    assert settings.kd_steps == per_call
    assert math.ceil(n_updates / per_call) == calls


def test_calls_that_only_synthesise_are_counted(float32):
    method = built("fast", float32, n_updates=8, warmup=3)
    assert distillers.n_calls(method) == 3 + 2
    assert distillers.n_calls(method, 20) == 3 + 5
    cmi = built("cmi", float32, n_updates=8, preinvert=2)
    assert distillers.n_calls(cmi) == 2 + 2


def test_the_published_settings_are_those_of_the_dataset():
    """DFAD's and DAFL's authors have a script for MNIST and one for CIFAR-10."""

    def published(name: str, shape: tuple[int, int, int], *fields: str) -> list[object]:
        settings = distillers.settings_for(name, preset="paper", image_shape=shape)
        return [getattr(settings, field) for field in fields]

    dfad = ("batch_size", "lr_student", "latent_dim", "weight_decay")
    for name in ("dfad", "random"):
        assert published(name, (3, 32, 32), *dfad) == [256, 0.1, 256, 5e-4]
        assert published(name, (1, 32, 32), *dfad) == [512, 0.01, 100, 1e-4]
    dafl = ("batch_size", "lr_generator", "latent_dim", "optimizer", "oh")
    assert published("dafl", (3, 32, 32), *dafl) == [1024, 0.02, 1000, "sgd", 0.05]
    assert published("dafl", (1, 32, 32), *dafl) == [512, 0.2, 100, "adam", 1.0]
    assert published("fast", (1, 32, 32), "lr_student") == published("fast", (3, 32, 32), "lr_student")


def test_the_methods_that_match_batch_norm_are_those_that_refuse_a_teacher_without_it(float32):
    for name in distillers.names():
        networks = [nn.Sequential(nn.Flatten(), nn.Linear(64, 5)) for _ in range(2)]
        try:
            distillers.build(name, *networks, SHAPE, float32, preset="digits")
        except InputError as e:
            assert "no batch-norm layer" in str(e) and distillers.needs_batch_norm(name)
        else:
            assert not distillers.needs_batch_norm(name)


def test_a_method_is_built_with_the_published_settings_of_its_images(float32):
    for channels, expected in ((1, 512), (3, 256)):
        networks = [nn.Sequential(nn.Conv2d(channels, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()) for _ in range(2)]
        method = distillers.build("dfad", *networks, (channels, 8, 8), float32, preset="paper", ngf=2)
        assert method.settings.batch_size == expected


def test_random_is_dfad_whose_generator_does_not_learn(float32):
    method = built("random", float32)
    before = [p.detach().clone() for p in method.generator.parameters()]
    method.step()
    assert all(torch.equal(a, b) for a, b in zip(before, method.generator.parameters(), strict=True))
    assert method.budget.images == method.budget.teacher_passes == 4 * 8


def test_dfad_counts_what_it_spends_and_follows_the_harness_schedule(float32):
    method = built("dfad", float32, n_updates=8)
    rates = []
    for _ in range(3):
        method.step()
        rates.append((method.student_optimizer.param_groups[0]["lr"], method.generator_optimizer.param_groups[0]["lr"]))
    budget = method.budget
    assert budget.student_updates == 3 * 4 and budget.images == 3 * 4 * 8
    assert budget.teacher_passes == 3 * (4 + 1) * 8, "the generator's updates ask the teacher too"
    assert budget.synthesis_seconds > 0 and budget.distillation_seconds > 0
    full = method.settings.lr_student, method.settings.lr_generator
    assert rates == [pytest.approx((full[0] * f, full[1] * f)) for f in (1, 0.5, 0)]
    other = built("dfad", float32, n_updates=8)
    other.load_state_dict(method.state_dict())
    assert other.budget == budget


def test_adi_competes_with_the_student_and_deepinversion_does_not(float32):
    assert built("adi", float32).settings.adv > 0
    assert built("deepinversion", float32).settings.adv == 0


def test_dfad_makes_images_with_the_statistics_of_the_teacher(float32):
    """Generator A ends in what the teacher's first layer undoes."""
    from dfkd_lib import models

    teacher, student = (
        models.build("digits_cnn", n_classes=5, in_channels=1, mean=(0.2,), std=(0.4,)) for _ in range(2)
    )
    method = distillers.build("dfad", teacher, student, SHAPE, float32, preset="digits", n_updates=5)
    with evaluating(method.student):
        normalised = method.teacher.normalize(method.generator(method.sample_noise(400)))
    assert normalised.mean().item() == pytest.approx(0, abs=1e-4)
    assert normalised.std().item() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("fats", {}, "unknown method 'fats'; did you mean 'fast'"),
        ("fast", {"preset": "cifar"}, "unknown preset 'cifar'; did you mean 'cifar10'"),
        ("fast", {"gsteps": 3}, "unknown setting of fast 'gsteps'; did you mean 'g_steps'"),
        ("dfad", {"kd_steps": 3}, "unknown setting of dfad 'kd_steps'"),
        ("fast", {"n_updates": 0}, "n_updates must be at least 1, not 0"),
        ("fast", {"n_updates": 2.5}, "n_updates must be a whole number, not 2.5"),
        ("fast", {"batch_size": "many"}, "batch_size must be a whole number, not 'many'"),
        ("fast", {"kd_steps": 0}, "kd_steps must be above 0"),
        ("deepinversion", {"adv": 1.0}, "choose method 'adi'"),
        ("adi", {"adv": 0.0}, "method 'deepinversion'"),
        ("random", {"generator_steps": 1}, "choose method 'dfad'"),
    ],
)
def test_what_is_unknown_or_cannot_be_is_named(float32, name, options, said):
    with pytest.raises(InputError) as e:
        distillers.build(name, *players(), SHAPE, float32, **{"preset": "paper"} | options)
    assert said in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("name", ["dfad", "fast"])
def test_networks_that_do_not_fit_are_refused(float32, name):
    teacher, _ = players()
    with pytest.raises(InputError, match="the student has 7 classes and the teacher 5; build the student with 5"):
        distillers.build(name, teacher, classifier(4, n_classes=7), SHAPE, float32, preset="paper")
    with pytest.raises(InputError, match="the same network"):
        distillers.build(name, teacher, teacher, SHAPE, float32, preset="paper")


def test_importing_the_library_stays_light():
    script = (
        "import sys, dfkd_lib; assert 'torch' not in sys.modules; dfkd_lib.distill; "
        "print(*sorted({'sklearn', 'pandas', 'matplotlib', 'IPython', 'papermill'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.split() == []
