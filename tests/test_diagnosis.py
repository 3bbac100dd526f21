"""The two terms that tell whether an inversion worked, and the warning when it did not."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import classifier, settled

from dfkd_lib import distillers
from dfkd_lib.data import ImageSet
from dfkd_lib.methods.diagnosis import matching_terms, matching_terms_of, terms_of_a_run, without_classes
from dfkd_lib.methods.inversion import batch_norm_loss
from dfkd_lib.taps import batch_norm_layers, tapped

TINY = {
    "batch_size": 8, "kd_steps": 4, "latent_dim": 8, "ngf": 4, "synthesis_batch": 10, "g_steps": 2, "inner_steps": 2,
    "warmup": 1, "preinvert": 1, "batches": 1, "batches_warmup": 1, "embedding_dim": 8,
}  # fmt: skip


def built(name, runtime, **settings):
    known = distillers.settings_for(name, preset="paper")
    tiny = {key: value for key, value in TINY.items() if hasattr(known, key)}
    return distillers.build(
        name, settled(), classifier(4), (1, 8, 8), runtime, preset="paper", n_updates=4, **tiny | settings
    )


@pytest.mark.parametrize("name", [name for name in distillers.names() if distillers.needs_batch_norm(name)])
def test_the_terms_of_every_method_that_has_them_are_found_unweighted(name, float32):
    """With weights a thousand times as large the terms of the first step are the same."""
    found = []
    for factor in (1, 1000):
        settings = {"bn": 0.01 * factor, "oh": 0.01 * factor, "g_steps": 1, "inner_steps": 1}
        known = distillers.settings_for(name, preset="paper")
        method = built(name, float32, **{key: value for key, value in settings.items() if hasattr(known, key)})
        metrics = {key: float(value) for key, value in method.synthesize().items()}
        found.append(matching_terms(metrics, method.settings))
    assert found[0] == pytest.approx(found[1], rel=1e-4)
    assert min(found[0]) > 0


def test_methods_without_the_terms_have_none(float32):
    method = built("dafl", float32)
    metrics = {key: float(value) for key, value in method.synthesize().items()}
    assert matching_terms(metrics, method.settings) is None
    assert without_classes([metrics], method.settings, 5) == ""


@pytest.mark.parametrize("scale", ["absolute", "relative"])
def test_the_terms_of_real_images_are_the_teachers(scale, float32):
    teacher, x, labels = settled().eval(), torch.rand(20, 1, 8, 8), torch.arange(20) % 5
    with tapped(batch_norm_layers(teacher)) as seen:
        t = teacher(x)
    of_bn, of_class = matching_terms_of(teacher, x, labels, float32, scale=scale)
    assert of_bn == pytest.approx(float(batch_norm_loss(seen, scale).detach()))
    assert of_class == pytest.approx(float(-t.log_softmax(1)[range(20), labels].mean().detach()))


def test_a_run_has_its_terms_at_both_ends_and_on_as_many_real_images(float32):
    teacher, x, labels = settled().eval(), torch.rand(30, 1, 8, 8), torch.arange(30) % 5
    real = ImageSet((255 * x).byte(), labels, classes=tuple("abcde"), name="mine", split="test")
    settings = distillers.settings_for("fast", preset="paper", synthesis_batch=12, bn=3.0, bn_scale="relative")
    history = [
        {"bn loss": 7.0, "target loss": 3.0},
        {"bn loss": 9.0, "target loss": 8.0},
        {"bn loss": 2.0, "target loss": 1.0},
    ]
    found = terms_of_a_run(teacher, history, settings, real, float32)
    of_bn, of_class = matching_terms_of(teacher, *real.batch(torch.arange(12)), float32, scale="relative")
    assert found == {
        "batch-norm term, first": 7.0, "class term, first": 3.0, "batch-norm term, last": 2.0, "class term, last": 1.0,
        "batch-norm term, real": of_bn, "class term, real": of_class, "batch-norm weight": 3.0,
    }  # fmt: skip
    assert terms_of_a_run(teacher, [{"generator loss": 1.0}], settings, real, float32) == {}


def test_images_without_a_class_are_said_to_be_so_in_one_line():
    settings = distillers.settings_for("deepinversion", preset="paper")
    history = [{"bn loss": 7335.0, "target loss": 3.0}, {"bn loss": 90.0, "target loss": 2.4}]
    said = without_classes(history, settings, 10)
    assert "stayed at chance (cross-entropy 2.4, ln 10 = 2.3)" in said and "weighs 900" in said
    assert 'lower bn, or choose bn_scale="relative"' in said and "\n" not in said
    assert without_classes(history, settings, 100) == "", "below ln 100"
    assert without_classes([*history, {"bn loss": 90.0, "target loss": 2.2}], settings, 10) == ""
    relative = distillers.settings_for("deepinversion", preset="paper", bn_scale="relative")
    assert without_classes(history, relative, 10).endswith("lower bn")


def test_the_class_term_of_cmi_is_judged_without_its_weight():
    settings = distillers.settings_for("cmi", preset="paper")
    assert settings.oh == 0.5
    assert without_classes([{"bn loss": 5.0, "class loss": 1.3}], settings, 10)
    assert not without_classes([{"bn loss": 5.0, "class loss": 1.1}], settings, 10)


def test_the_guess_of_dfq_is_never_above_chance_and_not_judged():
    settings = distillers.settings_for("dfq", preset="paper")
    assert not without_classes([{"bn loss": 5.0, "one-hot loss": math.log(10)}], settings, 10)
