"""The benchmark's plain loops and the library compute the same, so that their times may be compared."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import classifier
from torch import nn

from benchmarks.plain_games import PlainMosaicKD, PlainTraining
from benchmarks.plain_inversion import PlainCMI, PlainDFQ, PlainFast
from benchmarks.speed import CMI, DFQ, FAST, MOSAIC, RECIPE, Row, measure, noise
from benchmarks.synthesis import METHODS, short
from dfkd_lib import distillers, models
from dfkd_lib.methods import cmi, dfq, fast, mosaickd
from dfkd_lib.runtime import Runtime
from dfkd_lib.taps import Seen
from dfkd_lib.training.supervised import Supervised

TINY = {"batch_size": 8, "synthesis_batch": 12, "latent_dim": 6, "ngf": 4, "pad": 1, "kd_steps": 2, "bank_size": 100}


def players() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    networks = classifier(8), classifier(4)
    with torch.no_grad():
        for _ in range(10):
            for network in networks:
                network(torch.rand(32, 1, 8, 8))
    return networks


def assert_same(a: nn.Module, b: nn.Module) -> None:
    for (name, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert torch.allclose(x, y, rtol=1e-7, atol=1e-9), name


def run_both(ours: fast.Fast | cmi.CMI, plain: PlainFast | PlainCMI) -> None:
    for _ in range(3):
        ours.step()
        plain.synthesize()
        for _ in range(ours.settings.kd_steps):
            plain.distil()
    assert plain.pool is not None and len(plain.pool) == 36
    assert torch.equal(ours.bank.newest(36), (plain.pool * 255).round().to(torch.uint8))
    assert_same(ours.student, plain.student)
    assert_same(ours.generator, plain.generator)


def test_fast_equals_its_plain_loop(float64):
    settings = replace(FAST, **TINY, g_steps=2)
    ours = fast.Fast(*players(), (1, 8, 8), settings, float64)
    run_both(ours, PlainFast(*players(), ours.generator, settings, float64))


def test_cmi_equals_its_plain_loop(float64):
    settings = replace(CMI, **TINY, inner_steps=2, head_dim=6, negatives=10, memory_size=24)
    ours = cmi.CMI(*players(), (1, 8, 8), settings, float64)
    # In the library's memory a feature has 8 bits and the room grows; the plain one keeps all bits from the start.
    memory = ours.discriminator.memory
    memory.rows = memory.rows.new_zeros(24, *memory.rows.shape[1:], dtype=torch.float64)
    plain = PlainCMI(*players(), ours.generator, ours.discriminator.head, settings, float64)
    run_both(ours, plain)
    assert_same(ours.discriminator.head, plain.head)


def colour_players() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    networks = [models.build("lenet5_bn", n_classes=10, in_channels=3, mean=[0.5] * 3, std=[0.25] * 3) for _ in "ts"]
    return networks[0], networks[1]


def test_dfq_equals_its_plain_loop(float64):
    settings = replace(DFQ, batch_size=8, kd_steps=2, latent_dim=6, ngf=4)
    ours = dfq.DFQ(*players(), (1, 8, 8), settings, float64)
    plain = PlainDFQ(*players(), ours.generator, settings, float64)
    for _ in range(3):
        ours.step()
        plain.step()
    assert_same(ours.student, plain.student)
    assert_same(ours.generator, plain.generator)


def test_mosaickd_equals_its_plain_loop(float64):
    settings = replace(MOSAIC, batch_size=4, kd_steps=2, latent_dim=6)

    def four() -> list[nn.Module]:
        pixels = {"image_shape": (3, 32, 32), "mean": [0.5] * 3, "std": [0.25] * 3}
        pair = colour_players()
        generator = models.build_generator("toolbox_large", latent_dim=6, ngf=2, **pixels)
        return [*pair, generator, models.build_discriminator("patch5", ndf=4, **pixels)]

    ours = mosaickd.MosaicKD(*four(), noise(16), settings, float64)
    plain = PlainMosaicKD(*four(), noise(16), settings, float64)
    for _ in range(2):
        ours.step()
        plain.step()
    for player in ("student", "generator", "discriminator"):
        assert_same(getattr(ours, player), getattr(plain, player))


def test_training_equals_its_plain_loop(float64):
    recipe = replace(RECIPE, batch_size=8)
    ours = Supervised(colour_players()[0], noise(16), recipe, float64)
    plain = PlainTraining(colour_players()[0], noise(16), recipe, float64)
    for _ in range(3):
        ours.step()
        plain.step()
    assert_same(ours.student, plain.network)


def test_a_line_of_the_benchmark_tells_ratio_and_rate(float32):
    a, b = torch.rand(64, 64), torch.rand(64, 64)
    row = Row(lambda runtime: None, lambda method: lambda: a @ b, lambda runtime, ours: lambda: [a @ b for _ in "12"])
    line = measure("product", row, {"as written": float32}, float32, rounds=2)
    assert line.startswith("product: plain ") and "as written" in line and "ratio" in line and "rate" in line


@pytest.mark.parametrize("name", METHODS)
def test_the_memory_part_knows_every_method(name):
    runtime = Runtime.choose("cpu", "float32")
    settings = short(name, batch_size=8, synthesis_batch=12, ngf=4)
    method = distillers.build(name, *players(), (1, 8, 8), runtime, preset="paper", **settings)
    method.step()
    assert method.budget.student_updates <= 12


IMAGES = [(6, 5, 4, 8), (64, 3, 8, 8)]
LAYOUTS = [(shape, False) for shape in [*IMAGES, (9, 4), (7, 3, 5), (4, 2, 3, 3, 3)]] + [(s, True) for s in IMAGES]


@pytest.mark.parametrize(("shape", "channels_last"), LAYOUTS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-4)]
)
def test_statistics_in_one_pass_are_those_of_var_mean(shape, dtype, tolerance, channels_last):
    x = 2 * torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype) + 3
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    slow, fast_x = (x.clone().requires_grad_() for _ in range(2))
    full = torch.float64 if dtype == torch.float64 else torch.float32
    variance, mean = torch.var_mean(slow.to(full), [d for d in range(x.ndim) if d != 1], correction=0)
    my_mean, my_variance = Seen(nn.Identity(), fast_x).statistics()
    assert my_mean.dtype == my_variance.dtype == full
    assert torch.allclose(my_mean, mean, rtol=tolerance, atol=0)
    assert torch.allclose(my_variance, variance, rtol=tolerance, atol=0)
    weights = torch.linspace(-1, 1, shape[1], dtype=full)
    (weights * mean + weights.flip(0) * variance).sum().backward()
    (weights * my_mean + weights.flip(0) * my_variance).sum().backward()
    rounding = {torch.bfloat16: 2**-7}.get(dtype, tolerance)
    assert fast_x.grad.dtype == dtype
    assert (fast_x.grad - slow.grad).abs().max() <= rounding * slow.grad.abs().max()


def test_statistics_and_instance_means_have_right_gradients():
    x = torch.randn(4, 3, 2, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: Seen(nn.Identity(), x).statistics(), x)
    assert torch.autograd.gradcheck(lambda x: Seen(nn.Identity(), x).instance_means(), x)
    means = Seen(nn.Identity(), x).instance_means()
    assert means.dtype == torch.float64 and torch.allclose(means, x.mean((2, 3)), atol=1e-15)


@pytest.mark.parametrize("channels_last", [False, True])
def test_instance_means_of_16_bit_activations(channels_last):
    x = (2 * torch.randn(6, 5, 12, 12, generator=torch.Generator().manual_seed(0)) + 3).bfloat16()
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    means = Seen(nn.Identity(), x).instance_means()
    assert means.dtype == torch.float32
    assert torch.allclose(means, x.float().mean((2, 3)), rtol=2**-8)
