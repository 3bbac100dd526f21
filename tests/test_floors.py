"""What a preset has to reach on test images: a method that stays near chance is a bug in its settings.

These train every method at full length, minutes on the digits and hours beyond: `make test-slow`, or
`pytest -m slow tests/test_floors.py -k digits`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn

from dfkd_lib import data, distillers, models
from dfkd_lib.measures.evaluation import accuracy
from dfkd_lib.runtime import Runtime
from dfkd_lib.teachers import recipe, train_or_load
from dfkd_lib.training.fit import fit

pytestmark = pytest.mark.slow

ABOVE_CHANCE = 0.1
# Asked before the fixtures hide it: the embedded digits are the only data that is always there.
DATA = os.environ.get("DFKD_DATA", "")


@dataclass(frozen=True)
class Scale:
    """Where a preset is at home: data, pair, and the pair with batch norm for the methods that match its statistics."""

    size: int
    plain: tuple[str, str]
    batch_norm: tuple[str, str]


SCALES = {
    "digits": Scale(8, *[("digits_cnn", "digits_cnn_half")] * 2),
    "mnist": Scale(32, ("lenet5", "lenet5_half"), ("lenet5_bn", "lenet5_bn_half")),
    "cifar10": Scale(32, *[("wrn40_2", "wrn16_1")] * 2),
}


@cache
def trained(preset: str, network: str) -> nn.Module:
    scale, runtime = SCALES[preset], Runtime.choose(seed=0)
    splits = [data.load(preset, split, image_size=scale.size, device=runtime.device) for split in ("train", "test")]
    return train_or_load(network, *splits, recipe(preset, network), runtime).module


@pytest.mark.parametrize("name", [name for name in distillers.names() if name != "random"])
@pytest.mark.parametrize("preset", SCALES)
def test_every_preset_lifts_its_method_off_chance(name, preset, monkeypatch):
    if preset != "digits":
        if not Path(DATA, preset, "train.npz").is_file():
            pytest.skip(f"no {preset} in DFKD_DATA")
        monkeypatch.setenv("DFKD_DATA", DATA)
    if preset == "cifar10" and not torch.cuda.is_available():
        pytest.skip("takes hours on a processor")
    scale, runtime = SCALES[preset], Runtime.choose(seed=0)
    test = data.load(preset, "test", image_size=scale.size, device=runtime.device)
    pair = scale.batch_norm if distillers.needs_batch_norm(name) else scale.plain
    about = data.info(preset)
    student = models.build(
        pair[1], n_classes=test.n_classes, in_channels=test.image_shape[0], mean=about.mean, std=about.std
    )
    method = distillers.build(name, trained(preset, pair[0]), student, test.image_shape, runtime, preset=preset)
    fit(method, distillers.n_calls(method), name=f"{name} {preset}", progress=False)
    assert accuracy(student, test, runtime) > 1 / test.n_classes + ABOVE_CHANCE
