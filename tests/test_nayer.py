"""The verifiable properties of NAYER."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import same, settled, snapshot, stream
from torch import Tensor, nn

from dfkd_lib import data, losses, models
from dfkd_lib.errors import InputError
from dfkd_lib.measures.evaluation import accuracy
from dfkd_lib.methods import nayer
from dfkd_lib.methods.class_codes import CLIP_GRAM, CODES, class_codes
from dfkd_lib.methods.inversion import batch_norm_loss
from dfkd_lib.methods.nayer import (
    NAYER,
    PRESETS,
    Embedding,
    NoisyLayers,
    Settings,
    block_targets,
    draw_default_weights,
)
from dfkd_lib.runtime import Runtime
from dfkd_lib.taps import tapped
from dfkd_lib.teachers import RECIPES, train_or_load
from dfkd_lib.training.fit import fit

SMALL = Settings(
    batch_size=8, kd_steps=2, lr_student=0.05, warmup=2, batches_warmup=3, batches=2, synthesis_batch=13, g_steps=3,
    g_life=2, lr_generator=0.01, embedding_dim=7, latent_dim=6, ngf=4, bank_size=60, pad=1, flip=False,
)  # fmt: skip
C = 5


def method(runtime: Runtime, settings: Settings = SMALL, seed: int = 0) -> NAYER:
    return NAYER(settled(seed), settled(seed + 1, 4), (1, 8, 8), settings, runtime)


def noisy_layers(n_layers: int, d_e: int = 7, d_v: int = 6, seed: int = 0) -> NoisyLayers:
    layers = NoisyLayers(n_layers, C, d_e, d_v).double()
    layers.redraw(stream(seed))
    return layers


@pytest.mark.parametrize("n", [4, 5, 15, 23])
def test_targets_come_in_blocks_and_the_rest_holds_no_class_twice(n):
    targets = block_targets(n, C, stream())
    whole = n // C * C
    assert targets[:whole].tolist() == list(range(C)) * (n // C)
    counts = targets.bincount(minlength=C)
    assert len(targets) == n and counts.max() - counts.min() <= 1


@pytest.mark.parametrize("n", [15, 13, 11])
def test_blocks_of_noisy_layers_equal_the_formula_row_by_row(n):
    layers = noisy_layers(3)
    with torch.no_grad():
        layers.bias.normal_(generator=stream(1))
    e = torch.randn(n, 7, dtype=torch.float64)
    by_row = [e[i] @ layers.weight[i // C] + layers.bias[i // C, 0] for i in range(n)]
    assert torch.allclose(layers(e), torch.stack(by_row), atol=1e-12)


def test_a_class_gives_one_image_per_layer_and_the_same_twice_on_one_layer(float64):
    one = method(float64, replace(SMALL, synthesis_batch=15))
    one.generator.eval()
    targets = block_targets(15, C, stream())
    x = one.forward(targets)
    assert not torch.allclose(x[0], x[C], atol=1e-3)
    targets[1] = 0
    twice = one.forward(targets)
    assert torch.equal(twice[0], twice[1])
    assert x.min() >= 0 and x.max() <= 1


def test_a_redraw_changes_the_noisy_layers_alone(float64):
    one = method(float64)
    generator, embedding, before = snapshot(one.generator), snapshot(one.embedding), snapshot(one.noisy)
    with torch.no_grad():
        one.noisy.bias.add_(1)
    one.noisy.redraw(one.noise)
    assert same(generator, snapshot(one.generator)) and same(embedding, snapshot(one.embedding))
    assert not torch.equal(before["weight"], one.noisy.weight) and one.noisy.bias.count_nonzero() == 0
    big = NoisyLayers(40, 10, 32, 32)
    big.redraw(stream())
    n = big.weight.numel()
    assert abs(float(big.weight.detach().mean())) < 5 / math.sqrt(n)
    assert abs(float(big.weight.detach().std()) - 1) < 5 / math.sqrt(2 * n)


def test_a_fresh_layer_sees_embeddings_through_their_gram_matrix():
    e = torch.randn(C, 7, dtype=torch.float64, generator=stream(3))
    layers, total, n_draws, d_v = noisy_layers(20, d_v=50), torch.zeros(C, C, dtype=torch.float64), 20, 50
    for seed in range(n_draws):
        layers.redraw(stream(seed))
        v = layers(e.repeat(20, 1)).detach().view(20, C, d_v)
        total += (v @ v.mT).mean(0) / d_v
    gram = e @ e.T
    assert (total / n_draws - gram).abs().max() < 5 * gram.diag().max() * math.sqrt(2 / (n_draws * 20 * d_v))


def test_with_a_one_hot_code_the_layers_are_a_table_of_latents():
    """The bridge to CMI and FastDFKD: k Adam steps on W equal k Adam steps on the latents."""
    layers, codes = noisy_layers(3, d_e=C), class_codes("onehot", C, 0, random=stream()).double()
    layers.bias.requires_grad_(False)
    e = codes.repeat(3, 1)
    z = layers(e).detach().requires_grad_()
    assert torch.equal(z.detach().view(3, C, 6), layers.weight.detach())
    goal = torch.randn(15, 6, dtype=torch.float64)
    optimizers = [torch.optim.Adam(p, 0.01, (0.5, 0.999)) for p in ([layers.weight], [z])]
    for _ in range(10):
        for optimizer, v in zip(optimizers, (lambda: layers(e), lambda: z), strict=True):
            optimizer.zero_grad()
            (v() - goal).pow(4).sum().backward()
            optimizer.step()
    assert torch.allclose(layers(e), z, atol=1e-9)


def test_embeddings_are_standardised_over_the_classes():
    codes = class_codes("random", C, 7, random=stream()).double()
    targets = block_targets(15, C, stream())
    e = Embedding(codes, C).double()(targets)
    assert e.mean(0).abs().max() < 1e-12
    expected = (codes - codes.mean(0)) / torch.sqrt(codes.var(0, correction=0) + 1e-5)
    assert torch.allclose(e[:C], expected, atol=1e-12)
    moved = Embedding(3 * codes + 2, C).double()(targets)
    assert torch.allclose(e, moved, atol=1e-3)


def test_one_hot_codes_standardised_in_closed_form():
    e = Embedding(torch.eye(C, dtype=torch.float64), C).double()(torch.arange(C))
    expected = torch.full((C, C), -1 / math.sqrt(C - 1), dtype=torch.float64).fill_diagonal_(math.sqrt(C - 1))
    assert torch.allclose(e, expected, atol=1e-3)
    assert torch.allclose(e.norm(dim=1), torch.full((C,), math.sqrt(C), dtype=torch.float64), atol=1e-3)


def test_the_scale_of_the_latents_does_not_matter(float64):
    one = method(float64)
    with torch.no_grad():
        one.generator[0].bias.zero_()
    v = torch.randn(13, 6, dtype=torch.float64)
    assert torch.allclose(one.generator(10 * v), one.generator(1000 * v), atol=1e-3)


def test_codes_are_what_they_say():
    teacher = settled(0, 8, 10)
    d_e = 40
    codes = {kind: class_codes(kind, 10, d_e, teacher, random=stream()).double() for kind in CODES}
    assert {kind: list(e.shape) for kind, e in codes.items()} == {
        kind: [10, 10] if kind == "onehot" else [10, d_e] for kind in CODES
    }
    rows = teacher[-1].weight.detach().double()
    assert torch.allclose(codes["teacher"] @ codes["teacher"].T, rows @ rows.T, atol=1e-5)
    gram = codes["onehot-rotated"] @ codes["onehot-rotated"].T
    assert torch.allclose(gram, d_e * torch.eye(10, dtype=torch.float64), atol=1e-4)
    gram = codes["clip-gram"] @ codes["clip-gram"].T / d_e
    assert (gram - torch.tensor(CLIP_GRAM, dtype=torch.float64)).abs().max() < 0.01
    assert class_codes("teacher", 10, 32, teacher, random=stream()).equal(teacher[-1].weight)
    assert class_codes("teacher", 10, 8, teacher, random=stream()).shape == (10, 8)
    table = torch.tensor(CLIP_GRAM)
    assert table.equal(table.T) and table.sum(0).abs().max() < 0.06


def test_default_weights_are_those_of_a_new_network():
    build = {"latent_dim": 9, "image_shape": (3, 16, 16), "mean": (0.5,) * 3, "std": (0.5,) * 3, "ngf": 4}
    redrawn = models.build_generator("toolbox_small", **build)
    redrawn(torch.randn(8, 9))
    torch.manual_seed(0)
    new = models.build_generator("toolbox_small", **build)
    draw_default_weights(redrawn, stream())
    for (name, a), b in zip(new.state_dict().items(), redrawn.state_dict().values(), strict=True):
        assert torch.allclose(a, b, atol=1e-7), name


def test_the_generator_lives_as_long_as_it_should(float32, monkeypatch):
    one = method(float32)
    renewals, moments, start, end = [], [], [], []
    renew, invert = one.renew, one.invert

    def spied_renew() -> None:
        renewals.append(one.calls)
        renew()

    def spied_invert() -> dict[str, Tensor]:
        start.append(snapshot(one.generator))
        metrics = invert()
        end.append(snapshot(one.generator))
        moments.append({int(state["step"]) for state in one.optimizer.state.values()})
        return metrics

    monkeypatch.setattr(one, "renew", spied_renew)
    monkeypatch.setattr(one, "invert", spied_invert)
    for _ in range(5):
        one.step()
    assert renewals == [2, 4]
    continued = [same(a, b) for a, b in zip(end, start[1:], strict=False)]
    first_of_generation = {6, 10}  # 3 + 3 batches in the warm-up, then 2 + 2, then 2
    assert continued == [batch not in first_of_generation for batch in range(1, 12)]
    assert moments == [{SMALL.g_steps}] * 12, "Adam begins anew with each batch"
    assert any(p is one.noisy.weight for group in one.optimizer.param_groups for p in group["params"])


@pytest.mark.parametrize("redraw", [True, False])
def test_noisy_layers_learn_and_are_redrawn_when_they_should(float32, monkeypatch, redraw):
    one = method(float32, replace(SMALL, redraw=redraw))
    befores, afters, work = [], [], one.inversion.work

    def spied() -> dict[str, Tensor]:
        befores.append(snapshot(one.noisy))
        terms = work()
        afters.append(snapshot(one.noisy))
        return terms

    monkeypatch.setattr(one.inversion, "work", spied)
    one.synthesize()
    assert len(befores) == SMALL.batches_warmup * SMALL.g_steps
    starts, ends = befores[:: SMALL.g_steps], afters[SMALL.g_steps - 1 :: SMALL.g_steps]
    assert all(not torch.equal(a[n], b[n]) for a, b in zip(starts, ends, strict=True) for n in ("weight", "bias"))
    assert [same(a, b) for a, b in zip(ends, starts[1:], strict=False)] == [not redraw] * 2


def test_warm_up_only_synthesises(float32, monkeypatch):
    one = method(float32)
    student = snapshot(one.student)
    asked = []
    opinion = one.opinion
    monkeypatch.setattr(one, "opinion", lambda x: asked.append(one.calls) or opinion(x))
    for _ in range(SMALL.warmup):
        metrics = one.step()
        assert set(metrics) == {"bn loss", "target loss", "best loss"}
    assert same(student, snapshot(one.student)) and not asked and one.budget.student_updates == 0
    metrics = one.step()
    assert {"agreeing KL", "distillation loss"} <= set(metrics)
    assert asked == [SMALL.warmup] * SMALL.batches * SMALL.g_steps
    assert one.budget.student_updates == SMALL.kd_steps and not same(student, snapshot(one.student))


def test_synthesis_leaves_student_and_teacher_alone(float32):
    one = method(float32, replace(SMALL, warmup=0))
    teacher, student = snapshot(one.teacher), snapshot(one.student)
    one.student.eval()
    for _ in range(2):
        one.synthesize()
    assert same(student, snapshot(one.student))
    one.step()
    assert same(teacher, snapshot(one.teacher)) and one.student.training and not one.teacher.training
    assert all(p.grad is None for p in one.teacher.parameters())
    assert all(p.requires_grad for p in one.student.parameters())


@pytest.mark.parametrize("warmup", [0, 1])
def test_one_inner_step_is_adam_on_the_loss_as_written(float64, warmup):
    """Everything once by hand: forward, three terms, Adam; the student takes part only after the warm-up."""
    settings = replace(SMALL, warmup=warmup, batches_warmup=1, batches=1, g_steps=1)
    one, hand = method(float64, settings), method(float64, settings)
    one.student.eval()
    one.synthesize()

    hand.student.eval()
    hand.noisy.redraw(hand.noise)
    targets = block_targets(13, C, hand.noise)
    x = hand.generator(hand.noisy(hand.embedding(targets)))
    view = hand.augment(x)
    with tapped(hand.layers) as seen:
        t = hand.teacher(view)
    s = hand.student(view)
    p_t, p_s = t.softmax(1), s.softmax(1)
    agree = (s.argmax(1) == t.argmax(1)).detach()
    adversarial = -(agree * (p_t * (p_t.log() - p_s.log())).sum(1)).sum() / 13
    loss = 10 * batch_norm_loss(seen) + 0.5 * F.cross_entropy(t, targets) + 1.33 * adversarial * (warmup == 0)
    weights = [p for module in (hand.generator, hand.embedding, hand.noisy) for p in module.parameters()]
    optimizer = torch.optim.Adam(weights, 0.01, (0.5, 0.999))
    loss.backward()
    optimizer.step()

    assert adversarial <= 0
    mine = [p for module in (one.generator, one.embedding, one.noisy) for p in module.parameters()]
    # Adam's first step is the sign of the gradient: entries whose gradient is rounding alone may go either way.
    for a, b in zip(mine, weights, strict=True):
        clear = b.grad.abs() > 1e-9
        assert torch.allclose(a[clear], b[clear], atol=1e-9)
    assert (one.bank.newest(13).float() / 255 - x.detach().float()).abs().max() <= 0.5 / 255 + 1e-6
    mean, variance = seen[0].statistics()
    assert torch.allclose(one.statistics.averages[0][0], mean) and torch.allclose(
        one.statistics.averages[0][1], variance
    )


def test_the_loss_is_the_sum_of_its_terms(float64, monkeypatch):
    one = method(float64, replace(SMALL, warmup=0, bn=2.0, oh=3.0, adv=0.5))
    with tapped(one.layers) as seen:
        one.teacher(torch.rand(13, 1, 8, 8, dtype=torch.float64))
    t, s = torch.randn(2, 13, C, dtype=torch.float64)
    s[:4] = 2 * t[:4]  # some images on whose class the networks agree
    monkeypatch.setattr(one, "look", lambda x, layers: (t, seen))
    monkeypatch.setattr(one, "opinion", lambda x: s)
    found: list[float] = []
    monkeypatch.setattr(nayer, "update", lambda optimizer, loss, scaler: found.append(float(loss)))
    one.best.start()
    one.inversion_step()
    p, q, agree = t.softmax(1), s.softmax(1), t.argmax(1) == s.argmax(1)
    assert 4 <= int(agree.sum()) < 13
    agreeing = (p * (p / q).log()).sum(1)[agree].sum() / 13
    by_hand = 2 * batch_norm_loss(seen) - 3 * p.log()[range(13), one.targets].mean() - 0.5 * agreeing
    assert found == [pytest.approx(float(by_hand), rel=1e-9)]
    assert one.optimizer.defaults["betas"] == (0.5, 0.999)


def test_the_adversarial_term_is_gone_for_equal_networks():
    t = torch.randn(9, C, dtype=torch.float64, requires_grad=True)
    assert losses.agreeing_kl(t, t.detach()) == 0
    apart = t.detach().clone().requires_grad_()
    kl = losses.agreeing_kl(apart.roll(1, 1), t)  # some agree, some do not
    gradient = torch.autograd.grad(kl, apart)[0].roll(1, 1)
    agree = apart.roll(1, 1).argmax(1) == t.argmax(1)
    assert kl >= 0 and gradient[~agree].count_nonzero() == 0


def test_the_best_images_are_stored_as_they_were_before_their_update(float32, monkeypatch):
    one = method(float32, replace(SMALL, warmup=0, batches=1, g_steps=5, lr_generator=0.2))
    offered = []
    offer = nayer.Best.offer

    def spied(best: nayer.Best, loss: Tensor, *tensors: Tensor) -> None:
        offered.append((loss.item(), tensors[0].detach().clone()))
        offer(best, loss, *tensors)

    monkeypatch.setattr(nayer.Best, "offer", spied)
    one.student.eval()
    metrics = one.synthesize()
    loss, x = min(offered, key=lambda pair: pair[0])
    assert metrics["best loss"] == pytest.approx(loss)
    assert (one.bank.newest(13).float() / 255 - x).abs().max() <= 0.5 / 255 + 1e-6
    assert list(one.curve["bn loss"].shape) == [5] and not one.curve["bn loss"].requires_grad


def test_momentum_statistics_are_updated_once_per_batch_and_survive_the_generator(float32, monkeypatch):
    one = method(float32)
    updates, update = [], one.statistics.update
    monkeypatch.setattr(one.statistics, "update", lambda: updates.append(len(one.statistics._newest)) or update())
    for _ in range(2):
        one.step()
    kept = [m.clone() for m, _ in one.statistics.averages]
    one.renew()
    assert updates == [1] * 2 * SMALL.batches_warmup
    assert all(torch.equal(a, b) for a, (b, _) in zip(kept, one.statistics.averages, strict=True))


def test_counts_of_images_updates_and_classes(float32):
    one = method(float32, replace(SMALL, synthesis_batch=15, bank_size=1000))
    for _ in range(4):
        one.step()
    made = 15 * (2 * SMALL.batches_warmup + 2 * SMALL.batches)
    assert len(one.bank) == one.budget.images == made
    assert one.budget.student_updates == 2 * SMALL.kd_steps
    assert one.budget.teacher_passes == made * SMALL.g_steps + 2 * SMALL.kd_steps * SMALL.batch_size
    assert one.pictures(10).shape == one.watch(10)["images"].shape == (10, 1, 8, 8)


def test_a_bounded_bank_keeps_the_newest(float32):
    one, all_of_it = (method(float32, replace(SMALL, bank_size=size)) for size in (30, 1000))
    for each in (one, all_of_it):
        for _ in range(2):
            each.step()
    assert torch.equal(one.bank.newest(30), all_of_it.bank.newest(30)) and len(one.bank) == 30


def test_the_same_seed_gives_the_same_bank():
    def made(seed: int) -> Tensor:
        one = method(Runtime.choose("cpu", "float32", seed=seed))
        for _ in range(3):
            one.step()
        return one.bank.newest(60)

    assert torch.equal(made(0), made(0))
    assert not torch.equal(made(0), made(1))


def test_the_embeddings_are_saved_and_move_with_the_module(float32):
    one = method(float32)
    assert torch.equal(one.embedding.state_dict()["codes"], one.embedding.codes)
    assert one.state_dict()["embedding"]["codes"].shape == (C, 7)
    assert copy.deepcopy(one.embedding).double().codes.dtype == torch.float64


def digits_game(seed: int, **changes: object) -> NAYER:
    runtime = Runtime.choose("cpu", "float32", seed=seed)
    about = data.info("digits")
    recipe = replace(RECIPES["digits"], epochs=5)
    train, test = data.load("digits", "train"), data.load("digits", "test")
    teacher = train_or_load("digits_cnn", train, test, recipe, Runtime.choose("cpu", "float32")).module
    torch.manual_seed(seed)
    student = models.build("digits_cnn_half", n_classes=10, in_channels=1, mean=about.mean, std=about.std)
    return NAYER(teacher, student, (1, 8, 8), Settings(**PRESETS["digits"] | changes), runtime)


@pytest.fixture
def one_teacher(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The digits tests share a teacher."""
    monkeypatch.setenv("DFKD_CACHE", str(tmp_path_factory.getbasetemp() / "nayer-cache"))


def test_on_digits_the_body_keeps_the_style_and_the_layer_holds_the_content(one_teacher):
    one = digits_game(0, synthesis_batch=20, g_steps=40)
    curves = []
    for _ in range(4):
        one.invert()
        curves.append({name: curve.tolist() for name, curve in one.curve.items()})
    assert curves[3]["bn loss"][0] < 0.8 * curves[0]["bn loss"][0]
    assert curves[3]["target loss"][0] > 2, "a new layer does not know its class yet"
    assert min(curves[3]["target loss"]) < 0.2 * curves[3]["target loss"][0]


def test_on_digits_redrawn_layers_make_batches_that_differ_more(one_teacher):
    def distance(redraw: bool, seed: int) -> float:
        one = digits_game(seed, redraw=redraw, synthesis_batch=50)
        for _ in range(2):
            one.invert()
        before, after = one.bank.newest(100).float().div(255).split(50)
        with torch.no_grad():
            a, b = (one.teacher(x) for x in (before, after))
        return float((a - b).norm(dim=1).mean())

    apart, near = (sum(distance(redraw, seed) for seed in range(3)) for redraw in (True, False))
    assert apart > near


def test_on_digits_the_student_learns_from_its_images(one_teacher):
    one = digits_game(0, n_updates=100, warmup=1)
    fit(one, one.settings.warmup + 100 // one.settings.kd_steps, name="digits")
    assert accuracy(one.student, data.load("digits", "test"), one.runtime) > 0.7


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        ({"code": "rnadom"}, "random"),
        ({"g_steps": 0}, "g_steps"),
        ({"synthesis_batch": 1}, "synthesis_batch"),
        ({"warmup": -1}, "warmup"),
        ({"batches_warmup": 0}, "batches_warmup"),
        ({"rho": 1.0}, "rho"),
        ({"adv": -1.0}, "adv"),
        ({"temperature": 0}, "temperature"),
    ],
)
def test_bad_settings_are_named(bad, named):
    with pytest.raises(InputError, match=named):
        Settings(**bad)


def test_refusals(float32):
    with pytest.raises(InputError, match="at least 2"):
        class_codes("random", 1, 8, random=stream())
    with pytest.raises(InputError, match="CIFAR-10"):
        class_codes("clip-gram", 9, 32, random=stream())
    with pytest.raises(InputError, match="embedding_dim"):
        class_codes("onehot-rotated", 10, 9, random=stream())
    with pytest.raises(InputError, match="needs the teacher"):
        class_codes("teacher", 5, 9, random=stream())
    with pytest.raises(InputError, match="rows"):
        class_codes("teacher", 6, 9, settled(), random=stream())
    with pytest.raises(InputError, match="unknown code"):
        class_codes("clip", 5, 9, random=stream())
    with pytest.raises(InputError, match="NaN"):
        Embedding(torch.full((C, 3), torch.nan), C)
    with pytest.raises(InputError, match="one row for each"):
        Embedding(torch.eye(4), C)
    with pytest.warns(UserWarning, match="same code"):
        Embedding(torch.ones(C, 3), C)
    no_batch_norm = nn.Sequential(nn.Flatten(), nn.Linear(64, C))
    with pytest.raises(InputError, match="no batch-norm"):
        NAYER(no_batch_norm, settled(), (1, 8, 8), SMALL, float32)


@pytest.mark.parametrize("name", ["digits", "mnist", "cifar10"])
def test_presets_are_settings(name):
    assert Settings(**PRESETS[name], n_updates=400).n_updates == 400
