"""The quick networks: what whitening does, that it stays, that it is kept, and that students have none."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from dfkd_lib import teachers
from dfkd_lib.data import ImageSet, load
from dfkd_lib.errors import InputError
from dfkd_lib.models import build, count_macs, count_parameters, whiten
from dfkd_lib.models.quick import QuickNet, Whitening
from dfkd_lib.teachers import RECIPES, Teacher, recipe, train_or_load
from dfkd_lib.training.supervised import Recipe, Supervised

TINY = Recipe(epochs=1, batch_size=64, lr=0.05, schedule="one-cycle")


def network(name: str, channels: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return build(name, n_classes=10, in_channels=channels, mean=(0.5,) * channels, std=(0.2,) * channels)


def smooth_images(n: int = 64) -> torch.Tensor:
    """Neighbouring pixels and channels are correlated, as in photographs."""
    coarse = torch.rand(n, 1, 4, 4) + 0.3 * torch.rand(n, 3, 4, 4)
    return nn.functional.interpolate(coarse / 1.3, size=32, mode="bicubic").clamp(0, 1)


def whitening_of(module: nn.Module) -> Whitening:
    return next(layer for layer in module.modules() if isinstance(layer, Whitening))


def test_whitened_responses_are_uncorrelated_with_variance_one():
    torch.manual_seed(0)
    x = smooth_images().double()
    layer = Whitening(3).double()
    layer.fit(x, eps=1e-12)
    responses = layer(x).transpose(0, 1).flatten(1)
    first, second = responses.chunk(2)
    torch.testing.assert_close(torch.cov(first), torch.eye(12, dtype=torch.double), atol=1e-3, rtol=0)
    torch.testing.assert_close(second, -first)


def test_directions_without_variance_are_not_amplified():
    layer = Whitening(3)
    layer.fit(torch.rand(16, 1, 16, 16).expand(-1, 3, -1, -1), eps=1e-2)
    assert layer.weight.isfinite().all()
    assert layer.weight.abs().max() <= 1e-2**-0.5


def test_whitening_sees_normalised_images_and_repeats_itself():
    x = smooth_images()
    one, other = network("quick_net"), network("quick_net")
    whiten(one, x)
    whiten(other, x)
    by_hand = Whitening(3)
    by_hand.fit((x - 0.5) / 0.2)
    assert torch.equal(whitening_of(one).weight, whitening_of(other).weight)
    torch.testing.assert_close(whitening_of(one).weight, by_hand.weight)


def test_training_leaves_the_whitening_alone(float32):
    module = network("quick_net", channels=1)
    images = load("digits", "train", image_size=16)
    whiten(module, images.batch(range(100))[0])
    before = {key: value.clone() for key, value in module.state_dict().items()}
    method = Supervised(module, images, replace(TINY, batch_size=16), float32)
    for _ in range(2):
        method.step()
    kept = {key for key, value in module.state_dict().items() if torch.equal(value, before[key])}
    assert kept == {"normalize.mean", "normalize.std", "network.stem.0.weight"}


def test_the_whitening_is_kept_with_the_teacher(float32, monkeypatch):
    train, test = load("digits", "train", image_size=16).take(256), load("digits", "test", image_size=16).take(64)

    def ask() -> Teacher:
        return train_or_load("quick_net", train, test, TINY, float32)

    trained = ask()
    monkeypatch.setattr(teachers, "_train", None)
    loaded = ask()
    x, _ = test.batch(range(8))
    assert torch.equal(trained.module(x), loaded.module(x))
    expected = Whitening(1)
    expected.fit(loaded.module.get_submodule("normalize")(train.batch(range(256))[0]))
    torch.testing.assert_close(whitening_of(loaded.module).weight, expected.weight)


def test_the_student_holds_nothing_of_the_data():
    module = network("quick_net_half")
    before = {key: value.clone() for key, value in module.state_dict().items()}
    whiten(module, smooth_images())
    assert not any(isinstance(layer, Whitening) for layer in module.modules())
    assert all(torch.equal(before[key], value) for key, value in module.state_dict().items())
    module(smooth_images()).square().sum().backward()
    for key, weight in module.named_parameters():
        assert weight.grad is not None and weight.grad.isfinite().all() and weight.grad.any(), key


@pytest.mark.parametrize(
    ("name", "parameters", "macs", "norms"),
    [("quick_net", 1_122_890, 54_334_624, 6), ("quick_net_half", 284_730, 16_282_784, 7)],
)
def test_size_and_cost(name, parameters, macs, norms):
    module = network(name)
    found = [layer for layer in module.modules() if isinstance(layer, nn.BatchNorm2d)]
    assert (count_parameters(module), count_macs(module, (3, 32, 32)), len(found)) == (parameters, macs, norms)
    assert all(layer.track_running_stats and layer.momentum == 0.1 for layer in found)


@pytest.mark.parametrize("side", [16, 28, 31, 64])
def test_every_pixel_counts_at_every_size(side):
    x = torch.rand(4, 3, side, side, requires_grad=True)
    network("quick_net_half")(x).square().sum().backward()
    assert x.grad is not None and (x.grad.abs().amax((0, 1)) > 0).all()


def test_images_that_are_too_small_are_refused():
    with pytest.raises(InputError, match=r"from 16x16, not 8x12; load the data with image_size=16") as error:
        QuickNet((4, 4, 4), 10, 3)(torch.rand(1, 3, 8, 12))
    assert "\n" not in str(error.value)


def test_recipes_by_dataset_and_network():
    assert recipe("cifar10", "quick_net") == recipe("cifar100", "quick_net_half") != RECIPES["cifar10"]
    assert recipe("cifar10", "resnet34") == RECIPES["cifar10"]
    assert recipe("digits", "quick_net") == RECIPES["digits"]
    assert not recipe("svhn", "quick_net").augment
    with pytest.raises(InputError, match="unknown recipe 'cifar11'; did you mean 'cifar10'"):
        recipe("cifar11", "quick_net")


def test_a_sorted_dataset_is_whitened_on_all_its_classes(float32, monkeypatch):
    """The first half of these images is flat: filters from those alone would be huge."""
    monkeypatch.setattr(teachers, "_WHITENED_ON", 20)
    torch.manual_seed(0)
    images = torch.randint(0, 256, (40, 1, 16, 16), dtype=torch.uint8)
    images[:20] = 128
    labels = torch.arange(40) // 20
    sorted_set = ImageSet(images, labels, classes=("flat", "noise"), name="digits", split="train")
    teacher = train_or_load("quick_net", sorted_set, sorted_set, replace(TINY, batch_size=20), float32)
    assert whitening_of(teacher.module).weight.abs().max() < 5
