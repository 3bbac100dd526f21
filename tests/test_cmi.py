"""The verifiable properties of contrastive model inversion."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import classifier, same, snapshot
from torch import Tensor, nn

from dfkd_lib import data, losses, models
from dfkd_lib.data import resized_crop_flip
from dfkd_lib.errors import InputError
from dfkd_lib.measures import diversity
from dfkd_lib.measures.evaluation import accuracy
from dfkd_lib.methods.cmi import CMI, MODES, PRESETS, Discriminator, Settings, features, inversion_terms
from dfkd_lib.methods.inversion import batch_norm_loss
from dfkd_lib.runtime import Runtime
from dfkd_lib.taps import batch_norm_layers, tapped
from dfkd_lib.teachers import RECIPES, train_or_load
from dfkd_lib.training.fit import fit

SMALL = Settings(
    batch_size=8, kd_steps=2, temperature=4.0, lr_student=0.05, latent_dim=6, ngf=4, synthesis_batch=8, inner_steps=3,
    preinvert=1, head_dim=6, negatives=8, memory_size=24, bank_size=24, pad=1, flip=False,
)  # fmt: skip


def method(runtime: Runtime, settings: Settings = SMALL, seed: int = 0, teacher: nn.Module | None = None) -> CMI:
    torch.manual_seed(seed)
    network, student = classifier(8), classifier(4)
    return CMI(teacher or network, student, (1, 8, 8), settings, runtime)


def unit(rows: Tensor) -> Tensor:
    return F.normalize(rows, dim=1)


# --- the contrastive loss ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_new", [3, 7])
def test_coinciding_projections_give_log_n_in_each_mean(n_new):
    rows = unit(torch.ones(7, 4, dtype=torch.float64))
    means = 1 if n_new == 7 else 2
    assert losses.instance_discrimination(rows, rows, n_new).item() == pytest.approx(means * math.log(7))


def test_orthogonal_images_give_the_closed_form():
    rows = torch.eye(6, dtype=torch.float64)
    expected = math.log(1 + 5 * math.exp(-1 / 0.1))
    assert losses.instance_discrimination(rows, rows, 6, 0.1).item() == pytest.approx(expected)


def test_a_single_image_has_nothing_to_be_told_apart_from():
    row = torch.eye(1, 4)
    assert losses.instance_discrimination(row, row, 1).item() == 0


def contrast(runtime: Runtime, **changes: object) -> Discriminator:
    torch.manual_seed(0)
    return Discriminator(5, replace(SMALL, **changes), runtime, runtime.stream("negatives"))


def test_the_head_gives_rows_of_unit_length(float64):
    rows = contrast(float64).project(torch.randn(9, 5, dtype=torch.float64))
    assert torch.allclose(rows.norm(dim=1), torch.ones(9, dtype=torch.float64))


def test_keys_get_no_gradient_and_stored_rows_teach_the_head_only(float64):
    judge = contrast(float64)
    judge.memory.append(torch.randn(12, 2, 5))
    local, whole = torch.randn(2, 4, 5, dtype=torch.float64).requires_grad_()
    local.retain_grad(), whole.retain_grad()
    judge.loss(local, whole).backward()
    assert whole.grad is None
    assert local.grad.abs().sum() > 0
    assert judge.memory.rows.grad is None
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in judge.head.parameters())


def test_an_empty_memory_leaves_the_one_mean_over_the_batch(float64):
    judge = contrast(float64)
    local, whole = torch.randn(2, 4, 5, dtype=torch.float64)
    expected = F.cross_entropy(judge.project(local) @ judge.project(whole).T / 0.1, torch.arange(4))
    assert torch.allclose(judge.loss(local, whole), expected)


def test_no_negatives_ignore_the_memory(float64):
    judge = contrast(float64, negatives=0)
    local, whole = torch.randn(2, 4, 5, dtype=torch.float64)
    before = judge.loss(local, whole)
    judge.memory.append(torch.randn(12, 2, 5))
    assert torch.equal(judge.loss(local, whole), before)


def test_the_new_rows_keep_their_weight_however_many_are_stored():
    torch.manual_seed(0)
    new, stored = unit(torch.randn(3, 8, dtype=torch.float64)), unit(torch.randn(5, 8, dtype=torch.float64))
    keys = unit(torch.randn(8, 8, dtype=torch.float64))

    def gradient_to_new(copies: int) -> Tensor:
        queries = torch.cat([new, *[stored] * copies]).requires_grad_()
        rows = losses.instance_discrimination(queries, torch.cat([keys[:3], *[keys[3:]] * copies]), 3)
        return torch.autograd.grad(rows, queries)[0][:3]

    # Each new row still has weight 1/3: its own key pulls by (1 - p) / (3 tau), whatever the number stored.
    queries = torch.cat([new, stored])
    p = (queries @ keys.T / 0.1).softmax(1)[:3]
    assert torch.allclose(gradient_to_new(1), (p @ keys - keys[:3]) / 0.3)
    twice = torch.cat([keys, keys[3:]])
    p = (new @ twice.T / 0.1).softmax(1)
    assert torch.allclose(gradient_to_new(2), (p @ twice - keys[:3]) / 0.3)


# --- the terms of the inversion ---------------------------------------------------------------------------------


def test_matched_statistics_cost_nothing_and_their_gradient_is_finite(float64):
    teacher = float64.prepare(classifier(8)).eval()
    x = torch.rand(16, 1, 8, 8, dtype=torch.float64).requires_grad_()
    layers = batch_norm_layers(teacher)
    with tapped(layers) as seen:
        teacher(x)
    mean, variance = (v.detach() for v in seen[0].statistics())
    layers[0].running_mean.copy_(mean), layers[0].running_var.copy_(variance)
    loss = batch_norm_loss(seen)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-12)
    assert torch.isfinite(x.grad).all()
    assert torch.allclose(variance, seen[0].x.detach().transpose(0, 1).flatten(1).var(1, correction=0))


def test_statistics_ignore_the_order_of_the_batch_and_see_constants(float64):
    layer = nn.BatchNorm2d(3).double().eval()
    x = torch.randn(6, 3, 4, 4, dtype=torch.float64)

    def loss(x: Tensor) -> Tensor:
        with tapped([layer]) as seen:
            layer(x)
        return batch_norm_loss(seen)

    assert loss(x) > 0
    assert torch.allclose(loss(x), loss(x.flip(0)))
    constant = torch.zeros_like(x)  # the running mean is 0 too, so only the variance part is left
    assert torch.allclose(loss(constant), layer.running_var.norm())


def test_the_pull_on_the_mean_has_unit_length():
    mean = torch.randn(5, dtype=torch.float64).requires_grad_()
    rest = torch.ones(5, dtype=torch.float64)
    (pull,) = torch.autograd.grad(losses.batch_norm_distance(mean, rest, torch.zeros_like(rest), rest), mean)
    assert pull.norm().item() == pytest.approx(1)


def test_the_adversarial_term_counts_only_where_the_networks_agree():
    t = torch.tensor([[4.0, 0.0], [0.0, 4.0]], dtype=torch.float64)
    settings = replace(SMALL, bn=0.0, oh=1.0)

    def term(s: Tensor) -> Tensor:
        return inversion_terms(t, s, [], torch.zeros(2, dtype=torch.int64), settings)["adversarial loss"]

    assert term(t).item() == 0
    assert term(t.flip(1)).item() == 0
    s = torch.tensor([[1.0, 0.0], [3.0, 0.0]], dtype=torch.float64).requires_grad_()
    value = term(s)
    assert torch.allclose(value, -0.5 * F.kl_div(s[0].log_softmax(0), t[0].softmax(0), reduction="sum") / 2)
    (gradient,) = torch.autograd.grad(value, s)
    assert gradient[0].abs().sum() > 0
    assert gradient[1].abs().sum() == 0


def test_terms_of_weight_zero_are_not_computed(float32):
    method_ = method(float32, replace(SMALL, oh=0.0, adv=0.0, preinvert=0))
    assert set(method_.step()) == {"bn loss", "contrastive loss", "inversion loss", "distillation loss"}
    method_ = method(float32, replace(SMALL, bn=0.0, cr=0.0, preinvert=0))
    assert method_.discriminator is None and not method_.layers
    assert set(method_.step()) == {"class loss", "adversarial loss", "inversion loss", "distillation loss"}


def test_a_teacher_without_batch_norm_serves_while_no_term_needs_it(float32):
    plain = nn.Sequential(nn.Flatten(), nn.Linear(64, 5))
    method(float32, replace(SMALL, bn=0.0, cr=0.0, preinvert=0), teacher=plain).step()
    with pytest.raises(InputError, match="batch-norm"):
        method(float32, teacher=plain)


def test_the_views_reach_the_noise_through_the_contrastive_term_alone(float64):
    inverted = method(float64, replace(SMALL, bn=0.0, oh=0.0, adv=0.0))
    z = nn.Parameter(inverted.draw_noise(8, SMALL.latent_dim))
    _, terms, _ = inverted.invert(z, inverted.draw_targets(8))
    assert set(terms) == {"contrastive loss"}
    terms["contrastive loss"].backward()
    assert z.grad.abs().sum() > 0


def test_the_contrastive_term_lets_each_zoomed_view_find_its_whole(float64):
    inverted = method(float64, replace(SMALL, cr=0.7, cr_temperature=0.2, lr_head=3e-3, pad=0))
    x, terms, (local, whole) = inverted.invert(inverted.draw_noise(8, 6), inverted.draw_targets(8))
    with tapped(inverted.layers) as seen:
        inverted.teacher(x)
    assert torch.allclose(whole, features(seen)) and not torch.allclose(local, whole)
    assert inverted.discriminator is not None
    queries, keys = (unit(inverted.discriminator.head(phi)) for phi in (local, whole))
    likeness = (queries @ keys.T / 0.2).exp()
    by_hand = -0.7 * (likeness.diagonal() / likeness.sum(1)).log().sum() / 8
    assert float(terms["contrastive loss"].detach()) == pytest.approx(float(by_hand.detach()), rel=1e-12, abs=0)
    assert inverted.discriminator.optimizer.defaults["lr"] == 3e-3


class Shared(nn.Module):
    """One batch-norm layer used twice in a pass."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.norm, self.last = nn.BatchNorm2d(4), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x)).relu()
        return self.last(self.norm(self.second(x)).relu().mean((2, 3)))


def test_a_layer_that_is_used_twice_counts_twice(float64):
    teacher = Shared()
    shared = method(float64, teacher=teacher)
    assert shared.discriminator.memory.rows.shape[1:] == (2, 8)
    x = torch.rand(8, 1, 8, 8, dtype=torch.float64)
    _, seen = shared.look(x, shared.layers)
    first = teacher.first(x)
    phi = features(seen).double()
    assert torch.allclose(phi[:, :4], first.mean((2, 3)), atol=1e-6)
    assert torch.allclose(phi[:, 4:], teacher.second(teacher.norm(first).relu()).mean((2, 3)), atol=1e-6)
    shared.step()


# --- a call -----------------------------------------------------------------------------------------------------


def test_a_call_adds_its_batch_and_changes_neither_network(float32):
    inverted = method(float32)
    teacher, student = snapshot(inverted.teacher), snapshot(inverted.student)
    drawn = snapshot(inverted.generator)
    inverted.step()  # of the pre-inversion: the student does not learn
    assert same(teacher, snapshot(inverted.teacher)) and same(student, snapshot(inverted.student))
    assert all(p.grad is None for p in inverted.teacher.parameters())
    assert len(inverted.bank) == len(inverted.discriminator.memory) == 8
    assert inverted.budget.images == 8 and inverted.budget.student_updates == 0
    assert not same(drawn, snapshot(inverted.generator))
    inverted.step()
    assert same(teacher, snapshot(inverted.teacher)) and not same(student, snapshot(inverted.student))
    assert inverted.student.training
    assert inverted.budget.images == 16 and inverted.budget.student_updates == 2
    assert inverted.budget.teacher_passes == 2 * 3 * 2 * 8 + 2 * 8


def test_the_student_is_left_alone_by_adversarial_synthesis(float32):
    inverted = method(float32, replace(SMALL, preinvert=0))
    before = snapshot(inverted.student)
    inverted.student.eval()
    assert "adversarial loss" in inverted.synthesize()
    assert same(before, snapshot(inverted.student))


def test_generator_and_optimiser_start_anew_in_each_call_and_the_head_does_not(float32):
    inverted = method(float32, replace(SMALL, inner_steps=1, lr_generator=1e-9, lr_head=1e-9))
    weights, heads = [], []
    for _ in range(2):
        inverted.step()
        weights.append(inverted.generator[0].weight.detach().clone())
        heads.append(inverted.discriminator.head[0].weight.detach().clone())
    assert 0.01 < weights[0].std() < 0.04
    assert (weights[0] - weights[1]).abs().mean() > 0.01
    assert torch.allclose(heads[0], heads[1], atol=1e-6)
    steps = {int(state["step"]) for state in inverted.discriminator.optimizer.state.values()}
    assert steps == {2}


def test_stored_features_belong_to_the_stored_images(float64):
    """Without randomness in the views, the features can be computed again from the images."""
    settings = replace(SMALL, pad=0, local_scale=(1.0, 1.0), inner_steps=5)
    inverted = method(float64, settings)
    inverted.step()
    images = inverted.bank.newest(8).double() / 255
    _, seen = inverted.look(images, inverted.layers)
    stored = inverted.discriminator.memory.newest(8).double()
    for view in (0, 1):  # bytes and two digits: loose, but far closer than any other image
        apart = torch.cdist(stored[:, view], features(seen).double())
        assert torch.equal(apart.argmin(1), torch.arange(8))
        assert apart.diagonal().max() < 0.05


def test_the_best_of_a_call_is_what_is_stored(float64):
    inverted = method(float64, replace(SMALL, inner_steps=8))
    offered, invert = [], inverted.invert

    def recording(*arguments: Tensor):
        x, terms, views = invert(*arguments)
        offered.append((sum(float(term.detach()) for term in terms.values()), x.detach()))
        return x, terms, views

    inverted.invert = recording
    metrics = inverted.step()
    lowest, x = min(offered, key=lambda pair: pair[0])
    assert float(metrics["inversion loss"]) == pytest.approx(lowest)
    assert torch.equal(inverted.bank.newest(8), x.clamp(0, 1).mul(255).round().to(torch.uint8))
    assert len(inverted.trace) == 8


@pytest.mark.parametrize("calls", [0, 2, 3, 4])
def test_negatives_when_the_memory_is_empty_part_full_full_and_wrapped(float32, calls, monkeypatch):
    """The authors' sampler returns none at all while the memory is exactly full."""
    inverted = method(float32, replace(SMALL, negatives=16))
    for _ in range(calls):
        inverted.step()
    drawn, judge = [], losses.instance_discrimination
    monkeypatch.setattr(
        losses, "instance_discrimination", lambda u, v, n, tau: drawn.append((len(u), n)) or judge(u, v, n, tau)
    )
    inverted.step()
    stored = min(8 * calls, 24)
    assert drawn == [(8 + min(16, stored), 8)] * SMALL.inner_steps
    assert len(inverted.discriminator.memory) == min(8 * (calls + 1), 24)


def test_memory_and_bank_keep_the_newest_in_order(float32):
    inverted = method(float32)
    seen = []
    for _ in range(5):
        inverted.step()
        seen.append((inverted.bank.newest(8), inverted.discriminator.memory.newest(8)))
    images, rows = (torch.cat(parts[-3:]) for parts in zip(*seen, strict=True))
    assert torch.equal(inverted.bank.newest(99), images)
    assert torch.equal(inverted.discriminator.memory.newest(99), rows)


# --- the three modes --------------------------------------------------------------------------------------------


def test_the_non_adversarial_mode_distils_on_a_fixed_set(float32):
    inverted = method(float32, replace(SMALL, preinvert=2, grow=False))
    seen = [set(inverted.step()) for _ in range(4)]
    assert seen[:2] == [{"bn loss", "class loss", "contrastive loss", "inversion loss"}] * 2
    assert seen[2:] == [{"distillation loss"}] * 2
    assert inverted.budget.images == 16 and inverted.budget.student_updates == 4


def test_adopted_images_stand_for_the_pre_inversion(float32):
    images = torch.rand(12, 1, 8, 8)
    inverted = method(float32, replace(SMALL, preinvert=3, grow=False))
    inverted.adopt(images)
    assert set(inverted.step()) == {"distillation loss"}
    assert torch.equal(inverted.bank.newest(99), images.mul(255).round().to(torch.uint8))
    assert inverted.budget.images == 0
    growing = method(float32, replace(SMALL, preinvert=3))
    growing.adopt(images)
    assert "adversarial loss" in growing.step()


def test_the_adversarial_term_waits_for_its_call(float32):
    from_scratch = method(float32, replace(SMALL, preinvert=0, adv_from=2))
    assert ["adversarial loss" in from_scratch.step() for _ in range(4)] == [False, False, True, True]
    assert from_scratch.budget.student_updates == 8
    pre_inverted = method(float32)
    assert ["adversarial loss" in pre_inverted.step() for _ in range(3)] == [False, True, True]


def test_published_modes_and_presets_are_valid_settings():
    for mode in MODES.values():
        Settings(**mode)
    assert set(PRESETS) == {"digits", "mnist", "cifar10"}
    for preset in PRESETS.values():
        assert "n_updates" not in preset
        Settings(**preset, n_updates=100)


# --- runs -------------------------------------------------------------------------------------------------------


def test_seeds_decide_the_losses():
    def run(seed: int) -> list[float]:
        inverted = method(Runtime.choose("cpu", "float32", seed=seed))
        return [float(inverted.step()["inversion loss"]) for _ in range(3)]

    assert run(0) == run(0) != run(1)


def test_watching_changes_nothing(float32):
    inverted = method(float32)
    assert inverted.watch(4)["images"].shape == (4, 1, 8, 8)
    inverted.step()
    before = inverted.state_dict()["augmentation"].clone()
    images = inverted.watch(4)["images"]
    assert images.min() >= 0 and images.max() <= 1
    assert torch.equal(before, inverted.augmentation.get_state())


def test_bfloat16_runs_the_same_game():
    inverted = method(Runtime.choose("cpu", "bfloat16", seed=0))
    metrics = [inverted.step() for _ in range(2)][-1]
    assert all(torch.isfinite(value) and value.dtype == torch.float32 for value in metrics.values())


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        ({"bn": -1.0}, "bn"), ({"synthesis_batch": 1}, "synthesis_batch"), ({"inner_steps": 0}, "inner_steps"),
        ({"local_scale": (0.0, 1.0)}, "local_scale"), ({"grow": False, "preinvert": 0}, "preinvert"),
        ({"bn": 0.0, "oh": 0.0, "cr": 0.0}, "nothing drives"), ({"cr_temperature": 0.0}, "cr_temperature"),
        ({"negatives": -1}, "negatives"), ({"batch_size": 1}, "batch_size"),
    ],
)  # fmt: skip
def test_bad_settings_are_named(bad, named):
    with pytest.raises(InputError, match=named):
        Settings(**bad)


# --- digits -----------------------------------------------------------------------------------------------------


@pytest.fixture
def digits() -> tuple[nn.Module, data.ImageSet]:
    train, test = data.load("digits", "train"), data.load("digits", "test")
    recipe = replace(RECIPES["digits"], epochs=8)
    return train_or_load("digits_cnn", train, test, recipe, Runtime.choose("cpu", "float32")).module, test


def on_digits(teacher: nn.Module, seed: int = 0, **changes: object) -> CMI:
    about = data.info("digits")
    runtime = Runtime.choose("cpu", "float32", seed=seed)
    student = models.build("digits_cnn_half", n_classes=10, in_channels=1, mean=about.mean, std=about.std)
    return CMI(teacher, student, (1, 8, 8), Settings(**PRESETS["digits"] | changes), runtime)


def test_digits_are_inverted_told_apart_and_learned_from(digits):
    """The statistics come near, the teacher sees the targets, the contrast separates, the student learns."""
    teacher, test = digits
    runtime = Runtime.choose("cpu", "float32")

    def inverted(cr: float, seed: int) -> CMI:
        method = on_digits(teacher, seed, cr=cr, preinvert=1, inner_steps=30, kd_steps=60, synthesis_batch=64)
        fit(method, 2, name="digits")
        return method

    contrastive, plain = ([inverted(cr, seed) for seed in (0, 1)] for cr in (4.0, 0.0))
    trace = [float(terms["bn loss"]) for terms in plain[0].trace]
    assert trace[-1] < 0.7 * trace[0]
    with torch.no_grad():
        named = teacher(plain[0].bank.newest(64).float() / 255).argmax(1)
    assert (named == plain[0].targets).double().mean() > 0.8
    assert accuracy(contrastive[0].student, test, runtime) > 0.4

    def apart(methods: list[CMI]) -> float:
        return sum(
            diversity.measure(teacher, m.bank.newest(128), test, runtime)["instance discrimination"] for m in methods
        )

    assert apart(contrastive) > apart(plain)


def test_the_local_view_moves_the_picture_and_the_whole_of_it_does_not(float64):
    x = torch.rand(3, 1, 8, 8, dtype=torch.float64)
    stream = float64.stream("views")
    assert torch.allclose(resized_crop_flip(x, scale=(1, 1), flip=False, generator=stream), x)
    assert not torch.allclose(resized_crop_flip(x, scale=(0.25, 0.5), flip=False, generator=stream), x)
