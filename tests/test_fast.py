"""The verifiable properties of FastDFKD."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from conftest import parameters_of, same, settled, snapshot
from torch import Tensor, nn

from dfkd_lib import data, models
from dfkd_lib.errors import InputError
from dfkd_lib.measures.evaluation import accuracy
from dfkd_lib.methods import fast
from dfkd_lib.methods.fast import META, PRESETS, Fast, Settings, descent, draw_first_layer
from dfkd_lib.methods.inversion import MomentumStatistics, batch_norm_loss
from dfkd_lib.runtime import Runtime
from dfkd_lib.taps import Seen, tapped
from dfkd_lib.teachers import RECIPES, train_or_load
from dfkd_lib.training.fit import fit

CPU = torch.device("cpu")
SMALL = Settings(
    batch_size=8, kd_steps=2, latent_dim=6, ngf=4, synthesis_batch=12, g_steps=3, lr_generator=0.01, lr_z=0.02,
    warmup=2, reset_l0=0, pad=1, bank_size=40,
)  # fmt: skip


def method(runtime: Runtime, settings: Settings = SMALL, seed: int = 0) -> Fast:
    return Fast(settled(seed), settled(seed + 1, 4), (1, 8, 8), settings, runtime)


def visits(seed: int, layers: Sequence[nn.Module]) -> list[Seen]:
    torch.manual_seed(seed)
    return [Seen(layer, torch.randn(9, 3, 4, 4, dtype=torch.float64) * (seed + 1)) for layer in layers]


def two_layers() -> list[nn.Module]:
    torch.manual_seed(9)
    layers = [nn.BatchNorm2d(3).double() for _ in range(2)]
    for layer in layers:
        layer(torch.randn(30, 3, 4, 4, dtype=torch.float64))
    return layers


@pytest.mark.parametrize("rho", [0.0, 0.9])
def test_momentum_statistics_begin_as_the_plain_loss_and_stay_so_without_momentum(rho):
    layers, statistics = two_layers(), MomentumStatistics(rho, CPU)
    assert torch.equal(statistics.loss(visits(0, layers)), batch_norm_loss(visits(0, layers)))
    for call in range(3):
        statistics.loss(visits(call, layers))
        statistics.update()
        plain = torch.allclose(statistics.loss(visits(7, layers)), batch_norm_loss(visits(7, layers)), atol=1e-12)
        assert plain is (rho == 0)


def test_identical_batches_leave_the_loss_and_scale_the_gradient():
    layers, rho = two_layers(), 0.9
    statistics = MomentumStatistics(rho, CPU)
    gradients, values = [], []
    for _ in range(2):
        x = torch.ones(9, 3, 4, 4, dtype=torch.float64) * torch.linspace(0, 1, 9)[:, None, None, None]
        x.requires_grad_()
        loss = statistics.loss([Seen(layer, x) for layer in layers])
        gradients.append(torch.autograd.grad(loss, x)[0])
        values.append(loss.detach())
        statistics.update()
    assert torch.allclose(*values, atol=1e-12)
    assert torch.allclose(gradients[1], (1 - rho) * gradients[0], atol=1e-14)


def test_momentum_statistics_follow_their_closed_form():
    layers, rho = two_layers(), 0.7
    statistics = MomentumStatistics(rho, CPU)
    for call in range(4):
        statistics.loss(visits(call, layers))
        statistics.update()
    # The first call enters with full weight: weights rho^3, rho^2 (1 - rho), rho (1 - rho), 1 - rho.
    weights = [rho**3, rho**2 * (1 - rho), rho * (1 - rho), 1 - rho]
    for i in range(2):
        mean, variance = (
            sum(w * visits(call, layers)[i].statistics()[k] for call, w in enumerate(weights)) for k in (0, 1)
        )
        assert torch.allclose(statistics.averages[i][0], mean) and torch.allclose(statistics.averages[i][1], variance)
    restored = MomentumStatistics(rho, CPU)
    restored.load_state_dict(copy.deepcopy(statistics.state_dict()))
    assert torch.equal(restored.loss(visits(5, layers)), statistics.loss(visits(5, layers)))


def meta_gradients(one: Fast) -> list[Tensor]:
    """Of one call, by the gradients that the meta-generator's optimiser is given."""
    given: list[Tensor] = []

    def take(*_: object) -> None:
        given.extend(p.grad.clone() for p in one.generator.parameters())

    one.meta_optimizer.step = take  # type: ignore[method-assign]
    one.student.eval()
    one.synthesize()
    return given


def test_fomaml_with_one_step_gives_the_ordinary_gradient(float64):
    one, other = (method(float64, replace(SMALL, meta="fomaml", g_steps=1)) for _ in range(2))
    other.generator.load_state_dict(one.generator.state_dict())
    given = meta_gradients(one)
    z = other.draw_noise(12, 6).requires_grad_()
    targets = other.draw_targets(12)
    loss, _ = other.inversion_loss(other.augment(other.generator(z)), targets)
    expected = torch.autograd.grad(loss, list(other.generator.parameters()))
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(given, expected, strict=True))


def test_fomaml_sums_the_gradients_of_the_inner_steps(float64, monkeypatch):
    one = method(float64, replace(SMALL, meta="fomaml", g_steps=4))
    seen: list[list[Tensor]] = []
    inner = one.inner_update

    def spy(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
        inner(optimizer, loss)
        seen.append([p.grad.clone() for p in one.inner.parameters()])

    monkeypatch.setattr(one, "inner_update", spy)
    given = meta_gradients(one)
    assert len(seen) == 4
    for i, gradient in enumerate(given):
        assert torch.allclose(gradient, sum(step[i] for step in seen), atol=1e-12)


def test_reptile_with_one_plain_step_gives_the_gradient_times_its_rate(float64, monkeypatch):
    def plain(generator: nn.Module, z: Tensor, settings: Settings) -> torch.optim.Optimizer:
        return torch.optim.SGD([*generator.parameters(), z], 0.01)

    monkeypatch.setattr(fast, "inner_optimizer", plain)
    one, other = (method(float64, replace(SMALL, meta=meta, g_steps=1)) for meta in ("reptile", "fomaml"))
    other.generator.load_state_dict(one.generator.state_dict())
    for by_reptile, gradient in zip(meta_gradients(one), meta_gradients(other), strict=True):
        assert torch.allclose(by_reptile, fast.REPTILE_SCALE * 0.01 * gradient, atol=1e-12)


@pytest.mark.parametrize("meta", META)
def test_each_call_leaves_the_meta_generator_as_its_mode_says(float32, monkeypatch, meta):
    one = method(float32, replace(SMALL, meta=meta))
    everything, seen_in_call, inner = snapshot(one.generator), [], one.inner_update
    before = parameters_of(one.generator)
    starts: list[dict[str, Tensor]] = []

    def spy(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
        if not seen_in_call:
            starts.append(parameters_of(one.inner))
        inner(optimizer, loss)
        seen_in_call.append(same(everything, snapshot(one.generator)))

    monkeypatch.setattr(one, "inner_update", spy)
    one.student.eval()
    one.synthesize()
    assert seen_in_call == [True] * 3, "the meta-generator moved before the call ended"
    assert same(starts[0], before) is (meta != "reset")
    after = parameters_of(one.generator)
    assert same(after, before) is (meta == "reset")
    assert same(after, parameters_of(one.inner)) is (meta == "sequential")
    for p in one.inner.parameters():
        p.data.add_(1)
    assert same(after, parameters_of(one.generator))


def test_the_copy_takes_buffers_too(float32):
    one = method(float32, replace(SMALL, g_steps=1, meta="fomaml"))
    means = [name for name in one.generator.state_dict() if name.endswith("running_mean")]
    for name in means:
        one.generator.get_buffer(name).add_(100)
    one.student.eval()
    one.synthesize()
    for name in means:  # one train-mode pass later: nine tenths of what was there, and little else
        assert (one.inner.get_buffer(name) - 90).abs().max() < 5
        assert torch.equal(one.generator.get_buffer(name), torch.full_like(one.generator.get_buffer(name), 100))


def test_reset_draws_another_generator_for_each_call(float32, monkeypatch):
    one, starts = method(float32, replace(SMALL, meta="reset", g_steps=1)), []
    inner = one.inner_update
    monkeypatch.setattr(one, "inner_update", lambda *a: starts.append(parameters_of(one.inner)) or inner(*a))
    one.step(), one.step()
    assert not same(*starts)


def test_the_first_layer_is_drawn_anew_before_the_chosen_call(float32):
    one = method(float32, replace(SMALL, reset_l0=2, meta="reptile", lr_generator=1e-12))
    one.step()
    before = parameters_of(one.generator)
    one.step()
    changed = {name for name, p in parameters_of(one.generator).items() if (p - before[name]).abs().max() > 1e-4}
    names = [name for name, _ in one.generator.named_parameters()]
    assert changed - {names[1], names[3]} == {names[0], names[2]}  # the biases may have been 0 already


def test_a_redrawn_first_layer_has_small_scales():
    generator = models.build_generator(
        "toolbox_small", latent_dim=64, image_shape=(1, 8, 8), mean=(0.5,), std=(0.5,), ngf=16
    )
    draw_first_layer(generator, torch.Generator().manual_seed(0))
    linear, scales = generator[0], next(m for m in generator if isinstance(m, nn.BatchNorm2d))
    assert float(linear.weight.detach().std()) == pytest.approx(0.02, rel=0.1) and scales.weight.abs().max() < 0.1
    assert not linear.bias.any() and not scales.bias.any()


def test_warmup_only_synthesises_and_the_adversary_joins_one_call_before_the_student(float32):
    one = method(float32, replace(SMALL, warmup=3))
    learned, opposed = [], []
    for _ in range(5):
        metrics = one.step()
        learned.append("distillation loss" in metrics)
        opposed.append("agreeing KL" in metrics)
    assert learned == [False, False, False, True, True]
    assert opposed == [False, False, True, True, True]
    assert one.budget.student_updates == 4 and one.budget.images == 60


def test_the_adversary_can_be_left_out(float32):
    one = method(float32, replace(SMALL, adv=0.0, warmup=0))
    assert "agreeing KL" not in one.step()


def test_a_student_equal_to_its_teacher_adds_no_gradient(float64):
    teacher, gradients = settled(), []
    for adv in (0.0, 5.0):
        settings = replace(SMALL, adv=adv, warmup=0)
        one = Fast(copy.deepcopy(teacher), copy.deepcopy(teacher), (1, 8, 8), settings, float64)
        one.student.eval()
        x = torch.rand(6, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
        loss, _ = one.inversion_loss(x, torch.arange(6) % 5)
        gradients.append(torch.autograd.grad(loss, x)[0])
    assert torch.allclose(*gradients, atol=1e-15)


def test_the_loss_is_the_sum_of_its_terms(float64, monkeypatch):
    one = method(float64, replace(SMALL, warmup=0, bn=2.0, oh=3.0, adv=0.5))
    x, targets = torch.rand(40, 1, 8, 8, dtype=torch.float64), torch.arange(40) % 5
    with tapped(one.layers) as seen:
        one.teacher(x)
    t, s = torch.randn(2, 40, 5, dtype=torch.float64)  # which agree on some images
    monkeypatch.setattr(one, "look", lambda x, layers: (t, seen))
    monkeypatch.setattr(one, "opinion", lambda x: s)
    loss, terms = one.inversion_loss(x, targets)
    p, q, agree = t.softmax(1), s.softmax(1), t.argmax(1) == s.argmax(1)
    assert 0 < int(agree.sum()) < 40
    agreeing = (p * (p / q).log()).sum(1)[agree].sum() / 40
    expected = 2 * batch_norm_loss(seen) - 3 * p.log()[range(40), targets].mean() - 0.5 * agreeing
    assert torch.allclose(loss, expected, rtol=1e-9)
    assert set(terms) == {"bn loss", "target loss", "agreeing KL"}


def test_what_is_stored_is_the_iterate_of_least_loss_before_its_update(float32, monkeypatch):
    one = method(float32, replace(SMALL, g_steps=9, lr_generator=0.5, lr_z=0.5))
    made, seen, augment, inner = [], [], one.augment, one.inversion_loss
    monkeypatch.setattr(one, "augment", lambda x: made.append(x.detach().clone()) or augment(x))

    def spy(x: Tensor, targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        result = inner(x, targets)
        seen.append(float(result[0].detach()))
        return result

    monkeypatch.setattr(one, "inversion_loss", spy)
    one.student.eval()
    metrics = one.synthesize()
    least = min(range(9), key=seen.__getitem__)
    assert float(metrics["first loss"]) == pytest.approx(seen[0])
    assert float(metrics["best loss"]) == pytest.approx(seen[least])
    assert (one.bank.newest(12).float() / 255 - made[least]).abs().max() <= 0.5 / 255 + 1e-6


def test_noise_moves_at_its_own_rate(float32):
    one = method(float32)
    groups = fast.inner_optimizer(one.inner, torch.zeros(2, 6, requires_grad=True), SMALL).param_groups
    assert [group["lr"] for group in groups] == [0.01, 0.02] and groups[1]["betas"] == (0.5, 0.999)
    assert one.meta_optimizer.param_groups[0]["lr"] == pytest.approx(3 * 0.01)


def test_synthesis_leaves_the_student_as_it_is_and_the_teacher_for_ever(float32):
    one = method(float32, replace(SMALL, warmup=1))
    teacher, student = snapshot(one.teacher), snapshot(one.student)
    one.step()
    assert same(student, snapshot(one.student)) and one.student.training
    one.step()
    assert same(teacher, snapshot(one.teacher)) and not same(student, snapshot(one.student))
    assert all(p.grad is None for p in one.teacher.parameters())
    assert all(p.requires_grad for p in one.student.parameters()) and one.student.training


def test_updates_images_and_passes_are_counted_and_batches_are_images(float32):
    one = method(float32)
    for _ in range(4):
        one.step()
    assert (one.budget.student_updates, one.budget.images, len(one.bank)) == (4, 48, 40)
    assert one.budget.teacher_passes == 4 * 3 * 12 + 2 * 2 * 8
    x = one.sample(8)
    assert x.shape == (8, 1, 8, 8) and x.dtype == torch.float32 and x.min() >= 0 and x.max() <= 1
    assert one.pictures(5).shape == (5, 1, 8, 8)


def test_seeds_decide_the_bank():
    def images(seed: int) -> Tensor:
        one = method(Runtime.choose("cpu", "float32", seed=seed))
        one.step(), one.step()
        return one.bank.newest(24)

    assert torch.equal(images(0), images(0)) and not torch.equal(images(0), images(1))


def test_a_descent_changes_nothing(float32):
    one = method(float32)
    one.step()
    before = copy.deepcopy(one.state_dict())
    trace = descent(one, one.generator, 5)
    assert trace.shape == (5,) and trace[-1] < trace[0]
    assert torch.equal(trace, descent(one, one.generator, 5))
    after = one.state_dict()
    assert same(before["generator"], after["generator"]) and torch.equal(before["noise"], after["noise"])
    assert before["budget"] == after["budget"] and torch.equal(before["augmentation"], after["augmentation"])


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        ({"g_steps": 0}, "g_steps"),
        ({"meta": "maml"}, "fomaml"),
        ({"rho": 1.0}, "rho"),
        ({"synthesis_batch": 1}, "synthesis_batch"),
        ({"warmup": -1}, "warmup"),
    ],
)
def test_bad_settings_are_named(bad, named):
    with pytest.raises(InputError, match=named):
        Settings(**bad)


def test_a_teacher_without_batch_norm_is_refused(float32):
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(64, 5))
    with pytest.raises(InputError, match="batch-norm"):
        Fast(teacher, settled(), (1, 8, 8), SMALL, float32)


def test_calls_share_features_and_the_student_learns_digits():
    """After eight calls the meta-generator starts below a new generator; the student ends well above chance."""
    train, test = data.load("digits", "train"), data.load("digits", "test")
    about, runtime = data.info("digits"), Runtime.choose("cpu", "float32", seed=0)
    teacher = train_or_load("digits_cnn", train, test, replace(RECIPES["digits"], epochs=8), runtime).module
    student = models.build("digits_cnn_half", n_classes=10, in_channels=1, mean=about.mean, std=about.std)
    settings = Settings(**{**PRESETS["digits"], "warmup": 8}, n_updates=120)
    one = Fast(teacher, student, (1, 8, 8), settings, runtime)
    new = copy.deepcopy(one.generator)
    fit(one, 8, name="warm-up")
    for seed in range(3):
        assert descent(one, one.generator, 1, seed=seed)[0] < 0.7 * descent(one, new, 1, seed=seed)[0]
    fit(one, 120 // settings.kd_steps, name="digits")
    assert accuracy(student, test, runtime) > 0.5
