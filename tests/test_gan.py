"""The GAN trainer in one stage and in two, and the DCGAN pair."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import parameters_of, same, snapshot
from torch import nn

from dfkd_lib.data import ImageSet
from dfkd_lib.errors import InputError
from dfkd_lib.methods import gan
from dfkd_lib.methods.gan import FROZEN, GAN, ONE_STAGE, REUSED, SCHEMES, TWO_STAGE, Settings
from dfkd_lib.methods.one_stage import LOSSES, MIXED, TWO_BACKWARDS
from dfkd_lib.models import count_macs, count_parameters
from dfkd_lib.models.dcgan import dcgan_discriminator, dcgan_generator
from dfkd_lib.runtime import Runtime
from dfkd_lib.training import checkpoints
from dfkd_lib.training.fit import fit

SHAPE = (1, 8, 8)
SMALL = Settings(latent_dim=6, batch_size=8, lr_generator=1e-3, lr_discriminator=1e-3)


def photographs(n: int = 20) -> ImageSet:
    random = torch.Generator().manual_seed(5)
    return ImageSet(torch.randint(256, (n, *SHAPE), dtype=torch.uint8, generator=random), name="x", split="train")


def game(runtime: Runtime, seed: int = 0, norm: str = "group", **changes: object) -> GAN:
    torch.manual_seed(seed)
    players = dcgan_generator(6, SHAPE, width=4), dcgan_discriminator(SHAPE, width=4, norm=norm)
    return GAN(*players, photographs(), replace(SMALL, **changes), runtime)  # type: ignore[arg-type]


# --- networks ---


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize(("side", "channels", "width"), [(8, 1, 4), (16, 3, 2), (32, 1, 4), (64, 3, 2)])
def test_noise_becomes_images_and_images_logits(side, channels, width, norm):
    shape = (channels, side, side)
    x = dcgan_generator(5, shape, width)(torch.randn(3, 5))
    assert x.shape == (3, *shape) and x.min() >= 0 and x.max() <= 1
    judging = dcgan_discriminator(shape, width, norm)
    assert judging(x).shape == (3,)
    assert judging.eval()(x[:1]).shape == (1,)


def test_the_authors_size_has_their_weights_and_operations():
    with torch.device("meta"):
        made, judging = dcgan_generator(100, (3, 64, 64)), dcgan_discriminator((3, 64, 64), norm="group")
    assert count_parameters(made) / 1e6 == pytest.approx(12.7, abs=0.05)
    assert count_parameters(judging) / 1e6 == pytest.approx(11.0, abs=0.05)
    assert count_macs(made, (100,)) / 1e6 == pytest.approx(411, abs=1)
    assert count_macs(judging, (3, 64, 64)) / 1e6 == pytest.approx(409, abs=1)
    groups = [layer.num_groups for layer in judging.modules() if isinstance(layer, nn.GroupNorm)]
    assert groups == [32, 32, 32]


def test_weights_are_drawn_as_the_authors_draw_them():
    torch.manual_seed(0)
    for network in (dcgan_generator(20, (3, 16, 16), 16), dcgan_discriminator((3, 16, 16), 16)):
        for layer in network.modules():
            if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
                assert layer.weight.std().item() == pytest.approx(0.02, rel=0.1)
                assert torch.count_nonzero(layer.bias) == 0
            elif isinstance(layer, nn.BatchNorm2d):
                assert (layer.weight == 1).all()


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: dcgan_generator(5, (1, 28, 28)), "not 28x28"),
        (lambda: dcgan_discriminator((1, 8, 16)), "not 8x16"),
        (lambda: dcgan_generator(0, SHAPE), "latent_dim"),
        (lambda: dcgan_discriminator(SHAPE, 0), "width"),
        (lambda: dcgan_discriminator(SHAPE, norm="gruop"), "group"),
    ],
)
def test_networks_that_cannot_be_are_refused(build, said):
    with pytest.raises(InputError, match=said):
        build()


# --- training ---


@pytest.mark.parametrize(
    ("scheme", "made", "judged"), [(ONE_STAGE, 1, 2), (TWO_STAGE, 2, 3), (FROZEN, 2, 3), (REUSED, 1, 3)]
)
def test_passes_of_a_step_are_counted(float32, scheme, made, judged):
    method = game(float32, scheme=scheme)
    calls = []
    for name in ("generator", "discriminator"):
        getattr(method, name).register_forward_hook(lambda *_, name=name: calls.append(name))
    method.step()
    assert (calls.count("generator"), calls.count("discriminator")) == (made, judged)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("loss", LOSSES)
def test_both_players_learn_under_every_scheme_and_loss(float32, scheme, loss):
    method = game(float32, scheme=scheme, loss=loss, fallback=True)
    before = parameters_of(method.generator), parameters_of(method.discriminator)
    result = fit(method, 3, name="gan", progress=False)
    assert not same(before[0], parameters_of(method.generator))
    assert not same(before[1], parameters_of(method.discriminator))
    assert {"discriminator loss", "generator loss"} <= set(result.history[-1])
    largest = max(float(p.detach().abs().max()) for p in method.discriminator.parameters())
    assert (largest <= 0.01) == (loss == "WGAN")


BY_HAND = {
    "saturating": (lambda r: (1 + (-r).exp()).log(), lambda s: (1 + s.exp()).log(), lambda s: -(1 + s.exp()).log()),
    "non-saturating": (
        lambda r: (1 + (-r).exp()).log(), lambda s: (1 + s.exp()).log(), lambda s: (1 + (-s).exp()).log(),
    ),
    "WGAN": (lambda r: -r, lambda s: s, lambda s: -s),
    "LSGAN": (lambda r: (1 - r) ** 2, lambda s: s * s, lambda s: (1 - s) ** 2),
    "hinge": (lambda r: (1 - r) * (r < 1), lambda s: (1 + s) * (s > -1), lambda s: -s),
}  # fmt: skip
"""What D pays for real and for generated images, and what G pays."""


@pytest.mark.parametrize("scheme", [TWO_STAGE, FROZEN, REUSED])
@pytest.mark.parametrize("loss", LOSSES)
def test_in_two_stages_each_player_descends_on_its_own_loss_at_its_own_rate(float64, monkeypatch, scheme, loss):
    method = game(float64, scheme=scheme, loss=loss, lr_generator=2e-3, lr_discriminator=5e-4, betas=(0.3, 0.9))
    found, fakes = [], []
    monkeypatch.setattr(method, "fakes", lambda fakes_of=method.fakes: fakes.append(fakes_of()) or fakes[-1])
    monkeypatch.setattr(gan, "update", lambda optimizer, loss, scaler: found.append((optimizer, float(loss.detach()))))
    monkeypatch.setattr(method, "clip_weights", lambda: None)  # so that both judgements are of one discriminator
    real = method.real()
    method.step()
    on_real, on_fake, judged = (method.discriminator(x) for x in (real, fakes[0], fakes[-1]))
    pays_real, pays_fake, generator_pays = BY_HAND[loss]
    by_hand = pays_real(on_real).sum() / 8 + pays_fake(on_fake).sum() / 8, generator_pays(judged).sum() / 8
    assert [value for _, value in found] == pytest.approx([float(value) for value in by_hand], rel=1e-9)
    (of_d, _), (of_g, _) = found
    assert (of_d.defaults["lr"], of_g.defaults["lr"]) == (5e-4, 2e-3)
    assert of_d.defaults["betas"] == of_g.defaults["betas"] == (0.3, 0.9)
    for optimizer, player in ((of_d, method.discriminator), (of_g, method.generator)):
        assert [p for group in optimizer.param_groups for p in group["params"]] == [*player.parameters()]


def test_a_frozen_discriminator_saves_work_alone(float64):
    naive, frozen = game(float64, scheme=TWO_STAGE), game(float64, scheme=FROZEN)
    for _ in range(3):
        naive.step()
        frozen.step()
    for name in ("generator", "discriminator"):
        assert same(snapshot(getattr(naive, name)), snapshot(getattr(frozen, name)))
        assert all(p.requires_grad for p in getattr(frozen, name).parameters())


def test_one_stage_and_reused_fakes_agree_about_the_discriminator(float64):
    """From the same noise and images, the first step of D is the same; G's differs in what D it looks through."""
    one, two = game(float64), game(float64, scheme=REUSED)
    losses = one.step()["discriminator loss"], two.step()["discriminator loss"]
    assert float(losses[0]) == pytest.approx(float(losses[1]), abs=1e-12)
    for a, b in zip(one.discriminator.parameters(), two.discriminator.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-8)  # Adam's first step magnifies what rounds differently
    assert not same(parameters_of(one.generator), parameters_of(two.generator))


@pytest.mark.parametrize(
    ("norm", "loss", "form"),
    [
        ("group", "non-saturating", MIXED),
        ("batch", "saturating", MIXED),
        ("batch", "WGAN", MIXED),
        ("batch", "non-saturating", TWO_BACKWARDS),
        ("group", "LSGAN", TWO_BACKWARDS),
        ("group", "hinge", TWO_BACKWARDS),
    ],
)
def test_two_backward_passes_are_taken_only_where_needed_and_allowed(float32, norm, loss, form):
    assert game(float32, norm=norm, loss=loss, fallback=True).form == form
    if form == TWO_BACKWARDS:
        with pytest.raises(InputError, match="fallback"):
            game(float32, norm=norm, loss=loss)
    assert game(float32, norm=norm, loss=loss, scheme=TWO_STAGE).form == ""


def test_held_ratios_are_reported(float32):
    method = game(float32)
    with torch.no_grad():
        method.discriminator[-2].bias.fill_(-50)
    assert int(method.step()["held ratios"]) == SMALL.batch_size
    assert all(p.isfinite().all() for p in method.generator.parameters())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_resumed_run_is_the_uninterrupted_one(float32, tmp_path, scheme):
    def run(path, *stops: int) -> GAN:
        for seed, n in enumerate(stops):
            method = game(float32, seed=seed, scheme=scheme)
            if seed:
                method.load_state_dict(checkpoints.load(path))
            for _ in range(n):
                method.step()
            checkpoints.save(path, method.state_dict())
        return method

    whole, parts = game(float32, scheme=scheme), run(tmp_path / "state", 2, 3)
    for _ in range(5):
        whole.step()
    assert parts.steps == 5
    for name in ("generator", "discriminator"):
        assert same(snapshot(getattr(whole, name)), snapshot(getattr(parts, name)))


def test_gradient_scaling_changes_nothing(float64):
    games = [game(float64), game(float64)]
    games[1].scaler = torch.amp.GradScaler("cpu", enabled=True)
    for method in games:
        method.step()
    for one, other in zip(*(method.generator.parameters() for method in games), strict=True):
        assert torch.allclose(one, other, atol=1e-8)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_gans_train_in_bfloat16(scheme):
    method = game(Runtime.choose("cpu", "bfloat16", seed=0), scheme=scheme)
    assert all(value.isfinite() for _ in range(2) for value in method.step().values())


def test_pictures_are_the_same_each_time_and_change_nothing(float32):
    method = game(float32)
    before, random = snapshot(method.generator), method.noise.get_state()
    pictures = method.pictures(3)
    assert pictures.shape == (3, *SHAPE) and torch.equal(pictures, method.pictures(3))
    assert same(before, snapshot(method.generator)) and torch.equal(random, method.noise.get_state())


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        ({"scheme": "one stage"}, "one-stage"),
        ({"loss": "wgan"}, "WGAN"),
        ({"batch_size": 1}, "batch_size"),
        ({"lr_generator": 0}, "lr_generator"),
        ({"clip": 0}, "clip"),
        ({"betas": (0.5, 1.0)}, "betas"),
    ],
)
def test_bad_settings_are_named(bad, named):
    with pytest.raises(InputError, match=named):
        Settings(**bad)
