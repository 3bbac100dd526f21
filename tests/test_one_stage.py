"""One backward pass for two players: the gradients are those of two stages, and where they are not it is said."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import classifier, generator, parameters_of, same, snapshot
from op_recorder import OpRecorder
from torch import Tensor, nn

from dfkd_lib import losses
from dfkd_lib.errors import InputError
from dfkd_lib.methods import dfad, one_stage
from dfkd_lib.methods.one_stage import (
    DIRECT,
    FORMS,
    LOSSES,
    MIXED,
    TWO_BACKWARDS,
    GANLoss,
    GradientRatio,
    OneStageDFAD,
    choose_form,
    one_stage_gradients,
    scaled_gradient,
    why_not_one_stage,
)
from dfkd_lib.runtime import Runtime
from dfkd_lib.training import replay
from dfkd_lib.training.replay import WARM_UP

B = 6
NORMS = ("none", "GN", "BN")
Gradients = tuple[Tensor, Tensor]


def layer_norm(norm: str, channels: int) -> nn.Module:
    made = {"none": nn.Identity(), "GN": nn.GroupNorm(2, channels), "BN": nn.BatchNorm2d(channels)}
    return made[norm]


def maker() -> nn.Sequential:
    """A generator of 8x8 images with batch norm."""
    return nn.Sequential(
        nn.Linear(5, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Unflatten(1, (4, 4, 4)),
        nn.ConvTranspose2d(4, 1, 4, stride=2, padding=1), nn.Tanh(),
    )  # fmt: skip


def judge(norm: str = "none", bias: float = 0.7, patches: bool = False) -> nn.Sequential:
    """A discriminator whose logits lie about `bias`: one per image, or a map of 2x2."""
    head = nn.Conv2d(4, 1, 1 if patches else 2)
    with torch.no_grad():
        head.weight.mul_(0.3)
        head.bias.fill_(bias)
    return nn.Sequential(
        nn.Conv2d(1, 4, 4, stride=2, padding=1), nn.LeakyReLU(0.2),
        nn.Conv2d(4, 4, 4, stride=2, padding=1), layer_norm(norm, 4), nn.LeakyReLU(0.2),
        head, nn.Identity() if patches else nn.Flatten(0),
    )  # fmt: skip


def play(
    runtime: Runtime, *args: object, seed: int = 0, **options: object
) -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    """G, D, z and as many real images."""
    torch.manual_seed(seed)
    made, judging = runtime.prepare(maker()), runtime.prepare(judge(*args, **options))  # type: ignore[arg-type]
    z, x = torch.randn(B, 5), torch.rand(B, 1, 8, 8) * 2 - 1
    return made, judging, z.to(runtime.dtype), x.to(runtime.dtype)


def flat(tensors: Iterable[Tensor | None]) -> Tensor:
    return torch.cat([t.flatten() for t in tensors if t is not None])


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def gradient(loss: Tensor, module: nn.Module) -> Tensor:
    return flat(torch.autograd.grad(loss, list(module.parameters()), retain_graph=True, allow_unused=True))


def left(module: nn.Module) -> Tensor:
    return flat(p.grad for p in module.parameters())


def of_two_stages(made: nn.Module, judging: nn.Module, z: Tensor, x: Tensor, loss: GANLoss) -> Gradients:
    """Gradients of L_D and L_G from one forward pass, the reference."""
    s, r = judging(made(z)), judging(x)
    d = loss.rho(r).mean() + loss.a(s).mean()
    return gradient(d, judging), gradient(loss.b(s).mean(), made)


# --- R_gamma ---


def test_forward_is_the_input_bit_for_bit():
    x = torch.randn(3, 2, 4, 4)
    x[0, 0, 0, 0] = -0.0
    assert torch.equal(scaled_gradient(x, -3.5).view(torch.int32), x.view(torch.int32))


@pytest.mark.parametrize("gamma", [-1.0, 0.0, 1.0, 2.5, torch.tensor(-0.5), torch.tensor([3.0, -1.0, 0.0])])
def test_backward_multiplies_each_samples_gradient(gamma):
    x = torch.randn(3, 2, 4, requires_grad=True)
    weights = torch.randn(3, 2, 4)
    (scaled_gradient(x, gamma) * weights).sum().backward()
    factor = gamma.view(-1, 1, 1) if isinstance(gamma, Tensor) else gamma
    assert torch.equal(x.grad, weights * factor)


def test_reversal_twice_is_the_identity_and_one_passes_gradcheck():
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    scaled_gradient(scaled_gradient(x, -1.0), -1.0).sin().sum().backward()
    assert torch.equal(x.grad, x.detach().cos())
    assert torch.autograd.gradcheck(lambda x: scaled_gradient(x, 1.0).sin() * 3, x)


def test_zero_silences_the_generator_and_leaves_the_discriminator(float64):
    made, judging, z, _ = play(float64)
    judging(made(z)).sum().backward()
    plain = left(judging)
    for player in (made, judging):
        player.zero_grad()
    judging(scaled_gradient(made(z), 0.0)).sum().backward()
    assert torch.equal(left(judging), plain)
    assert torch.count_nonzero(left(made)) == 0


def test_gamma_may_come_after_the_forward_pass_and_holders_are_apart():
    x = torch.ones(2, 3, requires_grad=True)
    one, other = GradientRatio(), GradientRatio()
    outputs = scaled_gradient(x, one), scaled_gradient(x, other)
    one.gamma, other.gamma = torch.tensor([2.0, 3.0]), 10.0
    (outputs[0] + outputs[1]).sum().backward()
    assert torch.equal(x.grad, torch.tensor([[12.0], [13.0]]).expand(2, 3))


def test_gradients_of_16_bits_are_multiplied_in_32():
    x = torch.ones(2, 3, dtype=torch.bfloat16, requires_grad=True)
    gamma = torch.tensor([1e-30, 3.0], requires_grad=True)
    (scaled_gradient(x, gamma) * 1e30).sum().backward()
    assert x.grad.dtype == torch.bfloat16
    assert x.grad[0].float().tolist() == pytest.approx([1.0] * 3, rel=0.01)
    assert gamma.grad is None


@pytest.mark.parametrize(("gamma", "said"), [(None, "no gamma yet"), ((2, 1), "one per sample"), ((5,), r"\[2\]")])
def test_a_missing_or_misshapen_gamma_is_said(gamma, said):
    x = torch.ones(2, 3, requires_grad=True)
    ratio = GradientRatio(None if gamma is None else torch.ones(gamma))
    with pytest.raises(InputError, match=said):
        scaled_gradient(x, ratio).sum().backward()


def test_the_generators_weights_feel_it_where_a_full_backward_hook_does_nothing(float64):
    made, judging, z, _ = play(float64)
    z.requires_grad_()

    def cosine(ratio: float) -> float:
        made.zero_grad()
        judging(scaled_gradient(made(z), ratio)).mean().backward()
        return float(F.cosine_similarity(left(made), plain, dim=0))

    plain = gradient(judging(made(z)).mean(), made)
    assert cosine(-1.0) == pytest.approx(-1)
    made.register_full_backward_hook(lambda module, given, out: tuple(g if g is None else -g for g in given))
    assert cosine(1.0) == pytest.approx(1)


def test_simultaneous_descent_spirals_out_of_the_bilinear_game():
    """min over x, max over y of x y: the radius grows by sqrt(1 + eta^2) a step; alternating, it stays bounded."""
    eta, (x, y) = 0.5, (torch.tensor([v], dtype=torch.float64, requires_grad=True) for v in (0.6, 0.8))
    for step in range(1, 6):
        gradients = torch.autograd.grad((x * scaled_gradient(y, -1.0)).sum(), (x, y))
        x, y = ((v.detach() - eta * g).requires_grad_() for v, g in zip((x, y), gradients, strict=True))
        assert math.hypot(x.item(), y.item()) == pytest.approx((1 + eta**2) ** (step / 2))
    u, v, radii = 0.6, 0.8, []
    for _ in range(1000):
        u = u - eta * v
        v = v + eta * u
        radii.append(math.hypot(u, v))
    assert max(radii) < 2 and min(radii) > 0.5


# --- losses and ratios ---


def derivative(f, s: Tensor) -> Tensor:
    s = s.clone().requires_grad_()
    return torch.autograd.grad(f(s).sum(), s)[0]


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_ratios_are_those_of_the_derivatives(loss):
    s = torch.linspace(-0.95, 4, 34, dtype=torch.float64)
    s = s[s.abs() > 0.1]
    expected = derivative(loss.b, s) / derivative(loss.a, s)
    assert torch.allclose(loss.gamma(s).expand_as(s), expected, rtol=1e-12)
    assert loss.symmetric == bool(torch.allclose(loss.a(s) + loss.b(s), torch.zeros_like(s)))
    # D pushes real logits up and fake ones down, G the fake ones up.
    at_half = torch.tensor([0.5], dtype=torch.float64)
    assert derivative(loss.rho, at_half) < 0 < derivative(loss.a, at_half) and derivative(loss.b, at_half) < 0


def test_the_non_saturating_mixture_is_the_logit():
    loss, s = LOSSES["non-saturating"], torch.linspace(-20, 20, 41, dtype=torch.float64)
    assert torch.allclose(loss.a(s) - loss.b(s), s, atol=1e-12)
    assert torch.allclose(1 / (1 - loss.gamma(s)), s.sigmoid(), rtol=1e-12)
    assert float(loss.gamma(torch.zeros(1))) == -1


def test_ratios_are_held_at_the_floor_and_counted():
    loss = LOSSES["non-saturating"]
    s = torch.tensor([-100.0, -60.0, -30.0, -29.0, 5.0], requires_grad=True)
    gamma = loss.gamma(s)
    assert not gamma.requires_grad
    assert gamma[0] == gamma[1] == gamma[2] == -torch.exp(torch.tensor(30.0))
    assert int(loss.clamped(s)) == 2
    assert all(int(other.clamped(s)) == 0 for name, other in LOSSES.items() if name != loss.name)


# --- exactness ---


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_one_stage_equals_two(float64, loss, norm):
    made, judging, z, x = play(float64, norm)
    s = judging(made(z)).detach()
    assert s.abs().min() > 0.1 and s.min() > -1 and s.std() > 1e-3
    d, g = of_two_stages(made, judging, z, x, loss)
    uniform = len(loss.gamma(s).unique()) == 1
    for form in FORMS:
        one_stage_gradients(made, judging, z, x, loss, float64, form=form)
        assert error(left(judging), d) < 1e-10
        if norm != "BN" or uniform or form == TWO_BACKWARDS:
            assert error(left(made), g) < 1e-10
        else:
            assert error(left(made), g) > 1e-3


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_the_ratio_is_the_same_at_every_layer(float64, loss):
    made, judging, z, _ = play(float64, "GN")
    seen = [made(z)]
    for layer in judging:
        seen.append(layer(seen[-1]))
    s = seen[-1]
    of_d, of_g = (torch.autograd.grad(f(s).mean(), seen, retain_graph=True) for f in (loss.a, loss.b))
    gamma = loss.gamma(s).expand(B)
    for d, g in zip(of_d, of_g, strict=True):
        assert d.norm() > 0
        assert torch.allclose(g, gamma.view(-1, *[1] * (d.ndim - 1)) * d, rtol=1e-10, atol=1e-16)


def test_losses_are_the_same_in_every_form(float64):
    values = []
    for form in FORMS:
        found = one_stage_gradients(*play(float64, "GN"), LOSSES["non-saturating"], float64, form=form)
        assert not any(value.requires_grad for value in found.values())
        values.append({name: float(value) for name, value in found.items()})
    assert values[0] == values[1] == values[2]


def test_one_step_is_that_of_simultaneous_descent_and_near_that_of_alternating(float64):
    loss = LOSSES["non-saturating"]

    def displaced(lr: float) -> tuple[float, float]:
        made, judging, z, x = play(float64, "GN")
        two = copy.deepcopy(made), copy.deepcopy(judging)
        d, g = of_two_stages(*two, z, x, loss)
        one_stage_gradients(made, judging, z, x, loss, float64)
        for player in (made, judging):
            torch.optim.SGD(player.parameters(), lr).step()
        before_d, before_g = (flat(p.detach() for p in player.parameters()) for player in two[::-1])
        with torch.no_grad():
            nn.utils.vector_to_parameters(before_d - lr * d, two[1].parameters())
        alternating = gradient(loss.b(two[1](two[0](z))).mean(), two[0])
        now_d, now_g = (flat(p.detach() for p in player.parameters()) for player in (judging, made))
        assert torch.allclose(now_d, before_d - lr * d, rtol=1e-14, atol=1e-14)
        simultaneous = error(now_g, before_g - lr * g)
        return simultaneous, error(lr * alternating, before_g - now_g)

    (exact, coarse), (_, fine) = displaced(0.01), displaced(0.001)
    assert exact < 1e-14
    assert 5 < coarse / fine < 20


@pytest.mark.parametrize("form", [MIXED, DIRECT, TWO_BACKWARDS])
@pytest.mark.parametrize("s", [-60.0, -100.0])
def test_a_discriminator_that_has_won_gives_finite_gradients(float32, s, form):
    loss = LOSSES["non-saturating"]
    made, judging, z, x = play(float32, bias=s)
    found = one_stage_gradients(made, judging, z, x, loss, float32, form=form)
    assert int(found["held ratios"]) == B
    assert left(made).isfinite().all() and left(judging).isfinite().all()
    _, g = of_two_stages(made, judging, z, x, loss)
    towards_s = gradient(-judging(made(z)).mean(), made)
    assert error(g, towards_s) < 1e-5  # b' = -1 there
    if form != DIRECT:
        assert error(left(made), g) < 1e-4


@pytest.mark.parametrize("form", [MIXED, DIRECT])
def test_a_ratio_that_does_not_exist_is_loud(float64, form):
    """The hinge where D is sure of the fakes: nothing to scale, and G shall not learn from a wrong number."""
    made, judging, z, x = play(float64, bias=-5.0)
    d, _ = of_two_stages(made, judging, z, x, LOSSES["hinge"])
    one_stage_gradients(made, judging, z, x, LOSSES["hinge"], float64, form=form)
    assert error(left(judging), d) < 1e-10
    assert left(made).isnan().any()


def test_each_image_is_made_once_and_judged_once(float64):
    made, judging, z, x = play(float64)
    calls = []
    for name, player in (("G", made), ("D", judging)):
        player.register_forward_hook(lambda *_, name=name: calls.append(name))
    for form in FORMS:
        one_stage_gradients(made, judging, z, x, LOSSES["non-saturating"], float64, form=form)
        assert sorted(calls) == ["D", "D", "G"]
        calls.clear()


# --- where one stage is not exact ---


def test_no_ratio_scales_the_gradient_of_a_map_of_logits(float64):
    loss = LOSSES["non-saturating"]
    made, judging, z, _ = play(float64, patches=True)
    image = made(z)
    s = judging(image)
    d, g = (torch.autograd.grad(f(s).mean(), image, retain_graph=True)[0].flatten(1) for f in (loss.a, loss.b))
    best = (g * d).sum(1, keepdim=True) / (d * d).sum(1, keepdim=True)
    assert ((g - best * d).norm(dim=1) > 1e-3 * g.norm(dim=1)).all()


@pytest.mark.parametrize("bias", [0.7, -5.0])
@pytest.mark.parametrize("norm", ["none", "BN"])
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_two_backwards_need_no_assumption(float64, loss, norm, bias):
    made, judging, z, x = play(float64, norm, bias, patches=True)
    d, g = of_two_stages(made, judging, z, x, loss)
    one_stage_gradients(made, judging, z, x, loss, float64, form=TWO_BACKWARDS)
    assert error(left(judging), d) < 1e-10
    assert error(left(made), g) < 1e-10


@pytest.mark.parametrize("norm", ["none", "BN"])
@pytest.mark.parametrize("name", ["saturating", "WGAN"])
def test_symmetric_losses_take_maps_of_logits(float64, name, norm):
    made, judging, z, x = play(float64, norm, patches=True)
    d, g = of_two_stages(made, judging, z, x, LOSSES[name])
    one_stage_gradients(made, judging, z, x, LOSSES[name], float64)
    assert error(left(judging), d) < 1e-10 and error(left(made), g) < 1e-10


def test_a_ratio_per_patch_is_refused_in_one_pass(float64):
    with pytest.raises(InputError, match="one number or one per sample"):
        one_stage_gradients(*play(float64, patches=True), LOSSES["non-saturating"], float64)


class Mixing(nn.Module):
    """What minibatch discrimination does: an image's features depend on the others'."""

    def forward(self, x: Tensor) -> Tensor:
        return x + x.mean(0)


@pytest.mark.parametrize(
    ("name", "judging", "said"),
    [
        ("non-saturating", judge(), ""),
        ("non-saturating", judge("GN"), ""),
        ("non-saturating", judge("BN").eval(), ""),
        ("non-saturating", nn.Sequential(nn.Flatten(), nn.Linear(64, 1)), ""),
        ("non-saturating", judge("BN"), "mixes images"),
        ("non-saturating", nn.Sequential(Mixing(), judge()), "mixes images"),
        ("non-saturating", judge(patches=True), "4 logits per image"),
        ("saturating", judge("BN", patches=True), ""),
        ("WGAN", judge("BN"), ""),
        ("LSGAN", judge(), "pole at s = 0"),
        ("hinge", judge("GN"), "s <= -1"),
    ],
)
def test_what_one_stage_cannot_do_is_said(name, judging, said):
    x = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    found = why_not_one_stage(LOSSES[name], judging, x)
    assert said in found and bool(said) == bool(found) and "\n" not in found
    assert choose_form(LOSSES[name], judging, x, fallback=True) == (TWO_BACKWARDS if said else MIXED)
    if said:
        with pytest.raises(InputError, match="fallback"):
            choose_form(LOSSES[name], judging, x, fallback=False)


def test_asking_changes_nothing():
    judging = nn.Sequential(judge("BN"), nn.Dropout(0.5))
    before, random = snapshot(judging), torch.get_rng_state()
    why_not_one_stage(LOSSES["non-saturating"], judging, torch.rand(5, 1, 8, 8))
    drawn = torch.rand(5, 1, 8, 8), torch.get_rng_state()
    torch.set_rng_state(random)
    torch.rand(5, 1, 8, 8), torch.rand(5, 1, 8, 8)
    assert torch.equal(torch.get_rng_state(), drawn[1])
    assert same(before, snapshot(judging)) and all(p.grad is None for p in judging.parameters())


def test_an_unknown_form_is_named(float32):
    with pytest.raises(InputError, match="mixed"):
        one_stage_gradients(*play(float32), LOSSES["WGAN"], float32, form="mix")


# --- distillation without data ---

SMALL = dfad.Settings(latent_dim=6, batch_size=16, k=1, lr_student=0.05)
DISCREPANCIES = [
    pytest.param({"loss": loss, "log_generator_loss": log}, id=f"{loss}{' log' if log else ''}")
    for loss in losses.IMITATION
    for log in (False, True)
]


def game(runtime: Runtime, seed: int = 0, **changes: object) -> OneStageDFAD:
    torch.manual_seed(0)
    teacher = classifier(8)
    torch.manual_seed(seed)
    return OneStageDFAD(teacher, classifier(4), generator(), replace(SMALL, **changes), runtime)


def still_game(runtime: Runtime, **changes: object) -> tuple[OneStageDFAD, Tensor]:
    """A game whose players do not move, and the noise that it draws first."""
    method = game(runtime, **changes)
    state = method.noise.get_state()
    z = method.sample_noise()
    method.noise.set_state(state)
    method.student_optimizer.step = method.generator_optimizer.step = lambda *a, **k: None
    return method, z


@pytest.mark.parametrize("changes", DISCREPANCIES)
def test_student_and_generator_get_the_gradients_of_the_game(float64, changes):
    method, z = still_game(float64, **changes)
    x = method.generator(z)
    s, t = method.student(x), method.teacher(x)
    of_s = gradient(dfad.imitation_loss(s, t, method.settings), method.student)
    of_g = gradient(dfad.generation_loss(s, t, method.settings), method.generator)
    without_teacher = gradient(dfad.generation_loss(s, t.detach(), method.settings), method.generator)
    metrics = method.step()
    assert error(left(method.student), of_s) < 1e-12
    assert error(left(method.generator), of_g) < 1e-12
    assert error(without_teacher, of_g) > 1e-3
    assert metrics["discrepancy"].item() == pytest.approx(dfad.imitation_loss(s, t, method.settings).item())
    assert metrics["generator loss"].item() == pytest.approx(dfad.generation_loss(s, t, method.settings).item())


@pytest.mark.parametrize("changes", DISCREPANCIES)
@pytest.mark.parametrize("teacher_passes", [1, 2])
def test_a_term_of_the_generator_alone_joins_the_same_backward_pass(float64, changes, teacher_passes):
    """On the images themselves for a second pass of the teacher, or divided by gamma on what the first one saw."""
    method, z = still_game(float64, **changes)
    teacher, settings = method.teacher, method.settings
    x = method.generator(z)
    s, t = method.student(x), teacher(x)
    of_s = gradient(dfad.imitation_loss(s, t, settings), method.student)
    of_g = gradient(dfad.generation_loss(s, t, settings) + losses.one_hot(t), method.generator)

    ratio = GradientRatio()
    x = method.generator(z)
    seen = scaled_gradient(x, ratio)
    t = teacher(seen)
    loss = dfad.imitation_loss(method.student(seen), t, settings)
    ratio.gamma = one_stage.distillation_ratio(loss, settings)
    term = losses.one_hot(teacher(x)) if teacher_passes == 2 else losses.one_hot(t) / ratio.gamma
    (loss + term).backward()
    assert error(left(method.student), of_s) < 1e-12
    assert error(left(method.generator), of_g) < 1e-12


def test_both_players_move_the_teacher_never_does_and_all_is_counted(float32):
    method = game(float32)
    teacher, student, made = snapshot(method.teacher), parameters_of(method.student), parameters_of(method.generator)
    passes: list[str] = []
    for name in ("teacher", "student", "generator"):
        getattr(method, name).register_forward_hook(lambda *_, name=name: passes.append(name))
    for _ in range(3):
        method.step()
    assert same(teacher, snapshot(method.teacher)) and all(p.grad is None for p in method.teacher.parameters())
    assert not same(student, parameters_of(method.student)) and not same(made, parameters_of(method.generator))
    assert sorted(passes) == ["generator"] * 3 + ["student"] * 3 + ["teacher"] * 3
    budget = method.budget
    assert (method.steps, budget.student_updates, budget.images, budget.teacher_passes) == (3, 3, 48, 48)


def test_gradient_scaling_changes_nothing(float64):
    """What float16 does on a GPU, on the processor: scale, go back, unscale."""
    games = [game(float64), game(float64)]
    games[1].student_scaler = torch.amp.GradScaler("cpu", enabled=True)
    for method in games:
        for _ in range(2):
            method.step()
    for name in ("student", "generator"):
        for one, other in zip(*(getattr(method, name).parameters() for method in games), strict=True):
            assert torch.allclose(one, other, rtol=1e-12, atol=1e-14)


def test_one_stage_distils_in_bfloat16():
    method = game(Runtime.choose("cpu", "bfloat16", seed=0), loss="KL", log_generator_loss=True)
    assert all(value.isfinite() for _ in range(2) for value in method.step().values())


@pytest.mark.parametrize("log", [False, True])
def test_a_recorded_game_is_the_game_as_written(monkeypatch, float32, log):
    monkeypatch.setattr(replay, "recorder_of", lambda runtime: OpRecorder())
    changes = {"loss": "KL", "log_generator_loss": log, "milestones": (5,)}
    recorded, written = (game(replace(float32, graphs=True), **changes) for _ in range(2))
    written.both.recorder = None
    for _ in range(WARM_UP + 4):
        assert {k: float(v) for k, v in recorded.step().items()} == {k: float(v) for k, v in written.step().items()}
    assert recorded.both.recorder.replays
    for name in ("student", "generator"):
        assert same(snapshot(getattr(recorded, name)), snapshot(getattr(written, name)))


def test_a_resumed_game_goes_on_as_if_nothing_had_been(float32):
    one = game(float32)
    one.step()
    other = game(float32, seed=9)
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    for _ in range(2):
        assert {k: float(v) for k, v in one.step().items()} == {k: float(v) for k, v in other.step().items()}
    assert same(snapshot(one.student), snapshot(other.student))


@pytest.mark.parametrize("changes", [{"k": 5}, {"generator_steps": 0}, {"student_trains_in_generation": False}])
def test_settings_of_two_stages_are_refused(float32, changes):
    with pytest.raises(InputError, match=next(iter(changes))):
        game(float32, **changes)


@pytest.mark.parametrize("scale", one_stage.PRESETS)
def test_presets_cut_the_generators_rate_by_the_steps_that_it_no_longer_waits_for(scale):
    one, two = dfad.Settings(**one_stage.PRESETS[scale]), dfad.Settings(**dfad.PRESETS[scale])
    slower = 3 if scale == "mnist" else 1  # by the search; cut by k alone it collapses over 1,500 updates
    assert one.k == 1 and one.lr_generator == pytest.approx(two.lr_generator / two.k / slower)
    assert replace(one, k=two.k, lr_generator=two.lr_generator) == two
