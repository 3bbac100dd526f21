"""The verifiable properties of CPNet, as the released code has it and we repaired it."""

from __future__ import annotations

import copy
import math
from dataclasses import asdict
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import test_nayer
import torch
import torch.nn.functional as F
from conftest import same, settled, snapshot, stream
from host_watch import HostWatch
from op_recorder import OpRecorder
from test_resume import RUNTIMES, by_name, differences
from torch import Tensor, nn

from dfkd_lib import data, distillers, losses, models
from dfkd_lib.data.augment import colour_jitter, crop_flip, cut_mix
from dfkd_lib.errors import InputError
from dfkd_lib.measures.evaluation import accuracy
from dfkd_lib.methods import cpnet
from dfkd_lib.methods.cpnet import (
    PRESETS,
    VARIANTS,
    CoupledBody,
    CPNet,
    Settings,
    choose_nodes,
    damped_inverse,
    feature_cosine,
    feature_line,
    mixed_cross_entropy,
    restored,
)
from dfkd_lib.methods.nayer import NAYER
from dfkd_lib.models import count_parameters
from dfkd_lib.runtime import Runtime
from dfkd_lib.taps import Seen, batch_norm_layers, last_linear, tapped
from dfkd_lib.teachers import RECIPES, train_or_load
from dfkd_lib.training import replay
from dfkd_lib.training.fit import fit

C = 5
DEEPEST_FIRST = [(8, 2, 2), (6, 4, 4), (4, 8, 8)]
full64 = partial(torch.randn, dtype=torch.float64)


def network(seed: int = 0, d: int = 8, bias: bool = True) -> nn.Sequential:
    """Batch norm at three resolutions of 8x8 images, with running statistics that say something."""
    torch.manual_seed(seed)
    made = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(6, d, 3, padding=1), nn.BatchNorm2d(d), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(d, C, bias=bias),
    )  # fmt: skip
    with torch.no_grad():
        made[-1].weight.mul_(3)  # no singular value is damped
        for _ in range(20):
            made(torch.rand(32, 1, 8, 8))
    return made


def small(**changes: Any) -> Settings:
    return Settings(**asdict(test_nayer.SMALL) | {"dist": 0.6} | changes)


def method(runtime: Runtime, **changes: Any) -> CPNet:
    one = CPNet(network(), network(1), (1, 8, 8), small(**changes), runtime)
    one.student.eval()
    return one


def adversarial(runtime: Runtime, **changes: Any) -> CPNet:
    """One that has been through a warm-up of one batch and is about to make its second."""
    one = method(runtime, **{"warmup": 1, "batches_warmup": 1, "batches": 1, "flip": True} | changes)
    one.synthesize()
    one.calls = 1
    return one


# --- the coupled body ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "size", "channels", "nodes", "d_v", "with_embedding"),
    [
        ("resnet34", 32, 3, [(512, 4), (256, 8), (128, 16), (64, 32)], 1000, 9.75e6),
        ("vgg11", 32, 3, [(512, 4), (256, 8), (128, 16), (64, 32)], 1000, 9.75e6),
        ("wrn40_2", 32, 3, [(128, 8), (64, 16), (32, 32), (16, 32)], 1000, 8.30e6),
        ("lenet5_bn", 32, 1, [(16, 10), (6, 28)], 256, 413_187),  # not the third, which sees one pixel
        ("digits_cnn", 8, 1, [(32, 2), (32, 4), (16, 8)], 128, 30_769),
    ],
)
def test_the_rule_gives_the_authors_nodes_and_the_sheets_sizes(name, size, channels, nodes, d_v, with_embedding):
    pixels = {"mean": [0.5] * channels, "std": [0.5] * channels}
    teacher = models.build(name, n_classes=10, in_channels=channels, **pixels).eval()
    with torch.no_grad(), tapped(batch_norm_layers(teacher)) as seen:
        teacher(torch.rand(2, channels, size, size))
    shapes = [tuple(seen[n].x.shape[1:]) for n in choose_nodes(seen)]
    assert shapes == [(c, s, s) for c, s in nodes]
    body = CoupledBody(d_v, shapes, (channels, size, size))
    d_e = 64 if d_v == 128 else 512
    assert count_parameters(body) + 2 * d_e == pytest.approx(with_embedding, rel=0 if d_v == 128 else 1e-3)
    x, trunk = body(torch.randn(3, d_v))
    assert [tuple(u.shape[1:]) for u in trunk] == shapes
    assert x.shape == (3, channels, size, size) and x.min() >= 0 and x.max() <= 1


def test_the_body_is_the_formula(float64):
    one = method(float64)
    v = full64(7, 6)
    with torch.no_grad():
        x, trunk = one.generator(v)
        first, blocks, image = one.generator.blocks[0], one.generator.blocks[1:], one.generator.image
        linear = first[0]

        def norm(y: Tensor) -> Tensor:
            return F.batch_norm(y, None, None, training=True)

        u = norm((v @ linear.weight.T + linear.bias).view(7, 8, 2, 2))
        assert torch.allclose(u, trunk[0])
        for block, made in zip(blocks, trunk[1:], strict=True):
            up = u.repeat_interleave(2, 2).repeat_interleave(2, 3)
            u = F.leaky_relu(norm(F.conv2d(up, block[1].weight, padding=1)), 0.2)
            assert torch.allclose(u, made) and block[1].bias is None
        assert torch.allclose(torch.sigmoid(F.conv2d(u, image[0].weight, image[0].bias, padding=1)), x)
    assert [tuple(u.shape[1:]) for u in trunk] == DEEPEST_FIRST and one.nodes == [2, 1, 0]


def test_any_sides_and_a_network_with_one_node(float32):
    one = CPNet(settled(), settled(1, 4), (1, 8, 8), small(dist=0.0), float32)
    assert one.nodes == [0]
    body = CoupledBody(6, [(5, 1, 1), (4, 5, 3), (3, 11, 7)], (3, 13, 9))
    x, trunk = body(torch.randn(4, 6))
    assert x.shape == (4, 3, 13, 9) and trunk[2].shape == (4, 3, 11, 7)


# --- switches -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["float32", "float64"])
def test_with_all_switches_off_it_is_nayer_bit_for_bit(name, request):
    runtime = request.getfixturevalue(name)
    players = [(network(), network(1)) for _ in range(2)]
    off = CPNet(*players[0], (1, 8, 8), small(**VARIANTS["NAYER"], flip=True), runtime)
    theirs = test_nayer.replace(test_nayer.SMALL, flip=True)
    nayer = NAYER(*players[1], (1, 8, 8), theirs, runtime)
    metrics = [[one.step() for _ in range(4)] for one in (off, nayer)]
    assert not differences(*metrics) and not differences(off.state_dict(), nayer.state_dict())


def test_the_ladder_switches_one_thing_on_at_a_time():
    rows = [asdict(Settings(**VARIANTS[row])) for row in VARIANTS if row != "NAYER + augmentation"]
    changed = [{k for k in one if one[k] != other[k]} for one, other in pairwise(rows)]
    assert changed == [{"coupled"}, {"align"}, {"cutmix", "jitter"}, {"swapped_kl"}, {"dist"}]
    off, control = (asdict(Settings(**VARIANTS[row])) for row in ("NAYER", "NAYER + augmentation"))
    assert {k for k in off if off[k] != control[k]} == {"cutmix", "jitter"}
    assert Settings(**VARIANTS["+ swapped KL"]) == Settings()


# --- the loss of a step -------------------------------------------------------------------------------------------

WEIGHTS = {"bn": 3.0, "oh": 0.7, "kl": -1.9, "feat": 1.9 * 0.6, "al": 0.8}


def terms_by_hand(one: CPNet, state: Tensor, *, swapped: bool = True, wrong: str = "") -> dict[str, Tensor]:
    """Every term of the sheet from its formula, on the view that `state` of the augmentation stream gives."""
    random, c = stream(), one.targets
    random.set_state(state)
    x, trunk = one.generator(one.noisy(one.embedding(c)))
    view = crop_flip(x, pad=1, flip=True, generator=random)
    view = colour_jitter(view, p=0.4, generator=random)
    view, partners, a = cut_mix(view, p=1.0, generator=random)
    with tapped([*one.layers, last_linear(one.teacher)]) as seen:
        t = one.teacher(view)
    s, f = one.student(view), seen[-1].x
    h, norms = [visit.x for visit in seen[:-1]], [visit.layer for visit in seen[:-1]]

    rho, bn, al = 0.9, 0, 0
    for n, (layer, (m, v)) in enumerate(zip(norms, one.statistics.averages, strict=True)):
        mean, biased = 0.1 * h[n].mean((0, 2, 3)) + rho * m, 0.1 * h[n].var((0, 2, 3), correction=0) + rho * v
        bn = bn + (mean - layer.running_mean).norm() + (biased - layer.running_var).norm()
        spread = 0.1 * h[n].var((0, 2, 3)) + rho * v
        if wrong == "no momentum":
            mean, spread = h[n].mean((0, 2, 3)), h[n].var((0, 2, 3))
        at = (1, -1, 1, 1)
        target = (h[n] - mean.view(at)) / spread.sqrt().view(at) * layer.running_var.sqrt().view(at)
        target = (target + layer.running_mean.view(at)).detach()
        al = al + ((trunk[-1 - n] - target) ** 2).mean()

    own, other = F.one_hot(c, C).double(), F.one_hot(c[partners], C).double()
    if wrong == "labels swapped":
        own, other = other, own
    soft = (1 - a)[:, None] * own + a[:, None] * other
    ce = -(soft * t.log_softmax(1)).sum(1).mean()
    p_s, p_t = s.softmax(1), t.softmax(1)
    agree = s.argmax(1) == t.argmax(1)
    kl = agree * ((p_s * (p_s / p_t).log()).sum(1) if swapped else (p_t * (p_t / p_s).log()).sum(1))

    weight, bias = one.teacher[-1].weight, one.teacher[-1].bias
    inverse = torch.linalg.pinv(weight.T)
    delta = math.log(0.9 * (C - 1) / 0.1)
    asked = c[partners] if wrong == "mixed labels in the feature term" else c
    gap = f - (delta * F.one_hot(asked, C).double() - bias) @ inverse
    b = inverse.sum(0)
    cosine = (gap @ b) / (gap.norm(dim=1) * b.norm())
    return {"bn": bn, "oh": ce, "kl": kl.mean(), "feat": cosine.abs().mean(), "al": al}


def test_the_loss_is_the_sheets_sum_and_every_wrong_weight_or_sign_is_noticed(float64, monkeypatch):
    one = adversarial(float64, bn=3.0, oh=0.7, adv=1.9, dist=0.6, align=0.8, cutmix=1.0)
    given: list[Tensor] = []
    monkeypatch.setattr(cpnet, "update", lambda optimizer, loss, scaler: given.append(loss))
    state = one.augmentation.get_state()
    reported = one.inversion_step()
    (loss,) = given
    terms = terms_by_hand(one, state)

    def total(weights: dict[str, float], terms: dict[str, Tensor]) -> float:
        return float(sum(weights[name] * term.detach() for name, term in terms.items()))

    assert loss.item() == pytest.approx(total(WEIGHTS, terms), rel=1e-7)  # shares of CutMix are float32
    names = {"bn": "bn loss", "oh": "target loss", "kl": "agreeing KL", "feat": "feature loss", "al": "alignment loss"}
    for name, label in names.items():
        assert float(reported[label]) == pytest.approx(float(terms[name].detach()), rel=1e-6), label
        for factor in (-1, 0, 0.5, 2):
            mutant = total(WEIGHTS | {name: factor * WEIGHTS[name]}, terms)
            assert abs(mutant - loss.item()) > 1e-4, (name, factor)
    for mutant in (
        {"swapped": False}, {"wrong": "no momentum"}, {"wrong": "labels swapped"},
        {"wrong": "mixed labels in the feature term"},
    ):  # fmt: skip
        assert abs(total(WEIGHTS, terms_by_hand(one, state, **mutant)) - loss.item()) > 1e-4, mutant

    # The gradient too, which tells what is held still.
    weights = [p for part in (one.generator, one.embedding, one.noisy) for p in part.parameters()]
    by_hand = sum(WEIGHTS[name] * term for name, term in terms.items())
    for a, b in zip(*(torch.autograd.grad(value, weights) for value in (loss, by_hand)), strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-7)


def test_without_swapping_it_is_the_other_direction(float64):
    one = adversarial(float64, cutmix=1.0, swapped_kl=False)
    state = one.augmentation.get_state()
    by_hand = [terms_by_hand(one, state, swapped=swapped)["kl"].item() for swapped in (False, True)]
    assert float(one.inversion_step()["agreeing KL"]) == pytest.approx(by_hand[0], rel=1e-6)
    assert min(by_hand) > 0 and abs(by_hand[0] - by_hand[1]) > 1e-4
    t = full64(6, C)
    assert losses.agreeing_kl(t, t) == 0


def test_in_the_warm_up_the_student_is_not_asked(float32, monkeypatch):
    one, asked = method(float32), []
    opinion, student = one.opinion, snapshot(one.student)
    monkeypatch.setattr(one, "opinion", lambda x: asked.append(one.calls) or opinion(x))
    for _ in range(one.settings.warmup):
        assert set(one.step()) == {"bn loss", "target loss", "alignment loss", "best loss"}
    assert not asked and same(student, snapshot(one.student))
    metrics = one.step()
    assert {"agreeing KL", "feature loss", "distillation loss"} <= set(metrics)
    assert asked == [one.settings.warmup] * one.settings.batches * one.settings.g_steps


def test_teacher_and_student_are_left_alone_and_in_eval_mode(float32, monkeypatch):
    one, modes = adversarial(float32), []
    teacher, student, opinion = snapshot(one.teacher), snapshot(one.student), one.opinion
    monkeypatch.setattr(one, "opinion", lambda x: modes.append(one.student.training) or opinion(x))
    one.synthesize()
    assert same(teacher, snapshot(one.teacher)) and same(student, snapshot(one.student))
    one.step()
    assert modes and not any(modes) and not one.teacher.training
    assert all(p.grad is None for p in one.teacher.parameters())


def test_the_best_image_is_stored_unaugmented_and_as_it_was_before_its_update(float32, monkeypatch):
    one, offered, offer = adversarial(float32, g_steps=5, lr_generator=0.2, cutmix=1.0), [], cpnet.nayer.Best.offer

    def spied(best: Any, loss: Tensor, *tensors: Tensor) -> None:
        with torch.no_grad():
            assert torch.equal(one.forward(one.targets), tensors[0]), "not yet updated, nothing pasted or shifted"
        offered.append((loss.item(), tensors[0].detach().clone()))
        offer(best, loss, *tensors)

    monkeypatch.setattr(cpnet.nayer.Best, "offer", spied)
    one.synthesize()
    _, x = min(offered, key=lambda pair: pair[0])
    assert len(offered) == 5
    assert (one.bank.newest(13).float() / 255 - x).abs().max() <= 0.5 / 255 + 1e-6


# --- alignment ----------------------------------------------------------------------------------------------------


def test_alignment_moves_the_trunk_alone(float64):
    one = adversarial(float64)
    one.teacher.requires_grad_()
    one.optimizer.zero_grad()
    x, trunk = one.made(one.targets)
    _, seen = one.look(one.augment(x), one.watched)
    one.alignment(trunk, one.told_apart(seen)[0]).backward()
    trained = [p for part in (one.noisy, one.embedding, one.generator.blocks) for p in part.parameters()]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained)
    still = [*one.generator.image.parameters(), *one.teacher.parameters(), *one.student.parameters()]
    assert all(p.grad is None for p in still)


def visit_of(h: Tensor) -> Seen:
    layer = nn.BatchNorm2d(h.shape[1]).double()
    with torch.no_grad():
        layer.running_mean.copy_(torch.linspace(-1, 2, h.shape[1]))
        layer.running_var.copy_(torch.linspace(0.5, 3, h.shape[1]))
    return Seen(layer, h)


def test_targets_of_the_first_batch_have_the_remembered_statistics():
    h = full64(9, 3, 4, 5, generator=stream()) * 2 + 1
    visit = visit_of(h)
    target = restored(visit, None, 0.9)
    assert torch.allclose(target.mean((0, 2, 3)), visit.layer.running_mean)
    assert torch.allclose(target.var((0, 2, 3)), visit.layer.running_var), "unbiased"
    factor = torch.tensor([0.3, 2.0, 5.0], dtype=torch.float64).view(1, 3, 1, 1)
    assert torch.allclose(restored(visit_of(h * factor - 3 * factor), None, 0.9), target), "an affine change is undone"
    assert torch.allclose(restored(visit_of(target), None, 0.9), target), "what matches stays"
    flat = h.clone()
    flat[:, 0] = 7.0
    assert torch.isfinite(restored(visit_of(flat), None, 0.9)).all(), "a channel that says nothing divides by nothing"


def test_targets_remember_earlier_batches():
    h, m, v = full64(9, 3, 4, 5), full64(3), torch.rand(3, dtype=torch.float64) + 0.5
    visit, at = visit_of(h), (1, 3, 1, 1)
    mean, variance = 0.1 * h.mean((0, 2, 3)) + 0.9 * m, 0.1 * h.var((0, 2, 3)) + 0.9 * v
    by_hand = (h - mean.view(at)) * (visit.layer.running_var / variance).sqrt().view(at)
    assert torch.allclose(restored(visit, (m, v), 0.9), by_hand + visit.layer.running_mean.view(at))
    assert torch.equal(restored(visit, (m, v), 0.0), restored(visit, None, 0.9))


def test_alignment_is_nothing_where_the_trunk_is_the_target(float64):
    one = method(float64)
    _, seen = one.look(torch.rand(13, 1, 8, 8), one.layers)
    targets = [restored(seen[n], None, 0.9) for n in one.nodes]
    assert one.alignment(targets, seen) == 0
    assert one.alignment([u + 0.5 for u in targets], seen).item() == pytest.approx(0.25 * 3)


# --- the feature term ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("d", [C, 9, 40])
def test_the_damped_inverse(d):
    weight = full64(C, d, generator=stream(1))
    assert torch.allclose(damped_inverse(weight, 0.0), torch.linalg.pinv(weight.T))
    assert torch.allclose(weight @ damped_inverse(weight, 0.0).T, torch.eye(C, dtype=torch.float64))
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    values[-1] = 1e-3
    expected = left @ torch.diag(1 / values.clamp(min=0.1)) @ right
    assert torch.allclose(damped_inverse(left @ torch.diag(values) @ right), expected)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("invisible", [False, True])
def test_features_of_the_line_have_the_belief_that_was_asked_for(bias, invisible):
    layer = nn.Linear(12, C, bias=bias).double()
    with torch.no_grad():
        layer.weight.mul_(5)
        if invisible:  # as weight decay leaves W^T 1
            layer.weight.sub_((1 - 1e-5) * layer.weight.mean(0))
    anchors, b = feature_line(layer)
    belief = layer(anchors).softmax(1)
    expected = torch.full((C, C), 0.1 / (C - 1), dtype=torch.float64).fill_diagonal_(0.9)
    assert torch.allclose(belief, expected, atol=1e-4 if invisible else 1e-9)
    rise = layer(anchors + b) - layer(anchors)
    assert torch.allclose(rise, rise[:1, :1].expand(C, C), atol=1e-3 if invisible else 1e-9)
    assert math.log(0.9 * 9 / 0.1) == pytest.approx(4.394, abs=1e-3)
    if invisible:  # 10 sqrt(C) times a unit direction
        assert float(b.norm()) == pytest.approx(10 * math.sqrt(C), rel=1e-3) and rise.abs().max() < 1e-2


def test_the_cosine_sees_one_number_of_the_logits_and_the_length_of_the_rest():
    layer = nn.Linear(12, C).double()
    with torch.no_grad():
        layer.weight.mul_(5)
        f, c = full64(7, 12), torch.arange(7) % C
        anchors, b = feature_line(layer)
        weight, gap = layer.weight, f - anchors[c]
        delta = math.log(0.9 * (C - 1) / 0.1)
        offset = layer(f) - delta * F.one_hot(c, C).double()
        by_logits = offset @ torch.linalg.inv(weight @ weight.T) @ torch.ones(C, dtype=torch.float64)
        assert torch.allclose(gap @ b, by_logits, atol=1e-6)
        assert 0 <= feature_cosine(f, anchors[c], b) <= 1
        assert feature_cosine(anchors[c] - 3 * b, anchors[c], b).item() == pytest.approx(1)
        across = gap - (gap @ b)[:, None] * b / b.dot(b)
        assert feature_cosine(anchors[c] + across, anchors[c], b).item() == pytest.approx(0, abs=1e-12)
        unseen = gap - gap @ torch.linalg.pinv(weight) @ weight
        assert torch.allclose(layer(f + 5 * unseen), layer(f))
        assert feature_cosine(f + 5 * unseen, anchors[c], b) < feature_cosine(f, anchors[c], b)


def test_weight_decay_shrinks_what_the_classifier_sees_of_a_common_offset():
    """The premise of the sheet's doubt about the term: W^T 1 falls by exp(-sum lr wd / (1 - m))."""
    torch.manual_seed(0)
    layer, x, y = nn.Linear(6, C).double(), full64(40, 6), torch.arange(40) % C
    optimizer = torch.optim.SGD(layer.parameters(), 0.01, momentum=0.9, weight_decay=0.01)
    before = layer.weight.detach().sum(0).norm()
    for _ in range(1000):
        optimizer.zero_grad()
        F.cross_entropy(layer(x), y).backward()
        optimizer.step()
    shrunk = float(layer.weight.detach().sum(0).norm() / before)
    assert shrunk == pytest.approx(math.exp(-1000 * 0.01 * 0.01 / 0.1), rel=0.02)


# --- views --------------------------------------------------------------------------------------------------------


def test_pasted_pixels_come_from_the_partner_and_are_counted():
    b, h, w = 200, 6, 5
    x = torch.arange(b * 2 * h * w, dtype=torch.float64).view(b, 2, h, w)
    mixed, partners, share = cut_mix(x, p=1.0, generator=stream())
    assert partners.sort().values.equal(torch.arange(b))
    pasted = mixed == x[partners]
    assert (pasted | (mixed == x)).all() and torch.equal(pasted[:, 0], pasted[:, 1])
    others = partners != torch.arange(b)
    assert torch.allclose(pasted[others, 0].double().mean((1, 2)), share[others].double(), atol=1e-6)
    for i in others.nonzero().flatten().tolist():  # a rectangle
        rows, columns = pasted[i, 0].any(1), pasted[i, 0].any(0)
        assert torch.equal(pasted[i, 0], rows[:, None] & columns[None])
    assert share.max() > 0.6 and share.min() < 0.05
    assert 0.2 < share.mean() < 0.4, "a half on average, less what is cut off and rounded down"


def test_the_whole_batch_is_mixed_or_not_with_the_given_probability():
    x, random = torch.rand(20, 1, 8, 8, generator=stream(1)), stream()
    draws = [cut_mix(x, p=0.5, generator=random) for _ in range(200)]
    changed = [not torch.equal(mixed, x) for mixed, _, _ in draws]
    assert 70 < sum(changed) < 130
    assert all((share.sum() > 0) == was for (_, _, share), was in zip(draws, changed, strict=True))
    assert torch.equal(cut_mix(x, p=0.0, generator=random)[0], x)
    assert torch.equal(*(cut_mix(x, p=1.0, generator=stream())[0] for _ in range(2)))


def test_mixtures_of_labels_are_soft_labels():
    t, a = full64(9, C), torch.rand(9, dtype=torch.float64)
    own, other = torch.arange(9) % C, torch.arange(9) % 3
    soft = (1 - a)[:, None] * F.one_hot(own, C) + a[:, None] * F.one_hot(other, C)
    assert torch.allclose(mixed_cross_entropy(t, own, other, a), F.cross_entropy(t, soft))
    assert torch.allclose(mixed_cross_entropy(t, own, other, 0 * a), losses.cross_entropy(t, own))


def test_colours_are_changed_of_some_images_and_nothing_else():
    x = torch.rand(400, 3, 4, 4, generator=stream(1), dtype=torch.float64) * 0.4 + 0.3
    out = colour_jitter(x, p=0.4, generator=stream())
    changed = (out != x).flatten(1).any(1)
    assert 120 < changed.sum() < 200 and out.min() >= 0 and out.max() <= 1 and out.dtype == x.dtype
    assert torch.equal(colour_jitter(x, p=0.0, generator=stream()), x)
    assert torch.allclose(colour_jitter(x, p=1.0, strength=0.0, generator=stream()), x)
    ratio = out.mean((1, 2, 3)) / x.mean((1, 2, 3))  # contrast, saturation and hue keep the mean
    assert ratio.min() >= 0.9 - 1e-9 and ratio.max() <= 1.1 + 1e-9 and ratio[changed].std() > 0.04


def test_saturation_and_hue_leave_grey_images_grey_and_one_channel_alone():
    x = torch.rand(50, 1, 4, 4, generator=stream(1), dtype=torch.float64) * 0.4 + 0.3
    one, three = (colour_jitter(x.expand(50, n, 4, 4), p=1.0, generator=stream()) for n in (1, 3))
    assert torch.allclose(one.expand_as(three), three)
    mean = x.mean((1, 2, 3), keepdim=True)
    of_contrast = (one - one.mean((1, 2, 3), keepdim=True)) / (x - mean)
    assert (of_contrast.flatten(1).std(1) < 1e-6).all(), "an affine change of each image"


def test_hue_turns_and_saturation_stretches_about_the_axis_of_greys(monkeypatch):
    red = torch.tensor([0.6, 0.4, 0.4], dtype=torch.float64).view(1, 3, 1, 1)
    third = torch.tensor([0.5, 0.5, 0.5, 0.5 + 0.5 / 3, 0.0]).view(5, 1, 1, 1, 1)
    monkeypatch.setattr(torch, "rand", lambda *shape, **_: third)
    turned = colour_jitter(red, p=1.0, strength=1.0, generator=stream())  # a third of a turn
    assert torch.allclose(turned, red.roll(1, 1), atol=1e-6), "red becomes green"
    third[2], third[3] = 1.0, 0.5
    assert torch.allclose(colour_jitter(red, p=1.0, strength=0.5, generator=stream()) - 1.4 / 3, 1.5 * (red - 1.4 / 3))


@pytest.mark.parametrize(
    "view", [partial(colour_jitter, p=1.0), lambda x, generator: cut_mix(x, p=1.0, generator=generator)[0]]
)
def test_the_gradients_of_views_check(view):
    x = (torch.rand(3, 3, 4, 3, generator=stream(), dtype=torch.float64) * 0.4 + 0.3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: view(x, generator=stream(1)), x)


# --- as a method of the library -----------------------------------------------------------------------------------


@pytest.mark.parametrize("row", VARIANTS)
def test_every_row_of_the_ladder_is_recorded_resumed_and_asks_nothing_of_the_processor(row, monkeypatch):
    made: list[OpRecorder] = []
    monkeypatch.setattr(replay, "recorder_of", lambda runtime: made.append(OpRecorder()) or made[-1])
    graphs = Runtime(torch.device("cpu"), graphs=True)
    recorded, written = (by_name("cpnet", graphs, g_steps=4, **VARIANTS[row]) for _ in range(2))
    written.inversion.recorder = written.imitation.recorder = None
    for n_steps in (4, 3):
        metrics = [[one.step() for _ in range(n_steps)] for one in (recorded, written)]
        assert not differences(*metrics) and not differences(recorded.state_dict(), written.state_dict())
        recorded.load_state_dict(copy.deepcopy(written.state_dict()))
    assert recorded.inversion.recorder.replays
    with HostWatch() as watch:
        written.step()
    assert not watch.found


@pytest.mark.parametrize("runtime", RUNTIMES.values(), ids=RUNTIMES)
def test_in_16_bits_the_terms_stay_finite_and_in_full_precision(runtime):
    one = by_name("cpnet", runtime, dist=1.0)
    for _ in range(3):
        metrics = one.step()
    assert {"alignment loss", "feature loss"} <= set(metrics)
    assert all(value.isfinite() and value.dtype == torch.float32 for value in metrics.values())


def digits_game(**changes: Any) -> CPNet:
    about, recipe = data.info("digits"), test_nayer.replace(RECIPES["digits"], epochs=5)
    splits = [data.load("digits", split) for split in ("train", "test")]
    teacher = train_or_load("digits_cnn", *splits, recipe, Runtime.choose("cpu", "float32")).module
    runtime = Runtime.choose("cpu", "float32", seed=0)
    student = models.build("digits_cnn_half", n_classes=10, in_channels=1, mean=about.mean, std=about.std)
    return CPNet(teacher, student, (1, 8, 8), Settings(**PRESETS["digits"] | changes), runtime)


def test_on_digits_the_student_learns_from_its_images():
    one = digits_game(n_updates=100, warmup=1)
    fit(one, 1 + 100 // one.settings.kd_steps, name="digits", progress=False)
    assert accuracy(one.student, data.load("digits", "test"), one.runtime) > 0.7


def test_on_digits_the_generator_comes_nearer_if_it_is_asked_to():
    """Within its life, not within a batch: each new one begins about where the last one ended."""

    def last_alignment(weight: float) -> tuple[float, float]:
        one = digits_game(align=weight)
        curves = []
        for _ in range(6):
            one.invert()
            curves.append(one.curve["alignment loss"])
        return curves[0][0].item(), curves[-1][-1].item()

    (start, asked), (same_start, hardly) = last_alignment(1.0), last_alignment(1e-6)
    assert start == same_start and asked < 0.6 * start < 0.8 * hardly


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_settings_with_nayers_schedule(name):
    ours, theirs = (distillers.settings_for(one, preset=name) for one in ("cpnet", "nayer"))
    assert asdict(theirs).items() <= asdict(ours).items()


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        ({"align": -1.0}, "align"),
        ({"dist": math.nan}, "dist"),
        ({"cutmix": 1.5}, "cutmix is a probability"),
        ({"jitter": -0.1}, "jitter is a probability"),
        ({"coupled": False}, "set align to 0"),
        ({"g_steps": 0}, "g_steps"),
    ],
)
def test_bad_settings_are_named(bad, named):
    with pytest.raises(InputError, match=named):
        Settings(**bad)


def test_refusals_name_the_thing_and_the_remedy(float32):
    def build(teacher: nn.Module, **changes: Any) -> CPNet:
        return CPNet(teacher, network(1), (1, 8, 8), small(**changes), float32)

    with pytest.raises(InputError, match="use dfad, dafl or zskt"):
        build(nn.Sequential(nn.Flatten(), nn.Linear(64, C)))
    rows_alone = nn.Sequential(nn.Flatten(), nn.Linear(64, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, C)).eval()
    with pytest.raises(InputError, match="set coupled to False and align to 0"):
        build(rows_alone)
    assert build(rows_alone, coupled=False, align=0.0).nodes == []
    with pytest.raises(InputError, match="4 features to 5 classes; set dist to 0"):
        build(network(d=4))
    assert build(network(d=4), dist=0.0).classifier is None
    by_convolution = nn.Sequential(*network()[:-3], nn.Conv2d(8, C, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(InputError, match="no linear layer"):
        build(by_convolution)
    build(by_convolution, dist=0.0)
    wider = nn.Sequential(network()[:-1], nn.Linear(8, 9), nn.Unflatten(1, (9, 1)), nn.Flatten(), Cut())
    with pytest.raises(InputError, match="5 logits, which dist above 0 needs; set dist to 0"):
        build(wider)


class Cut(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, :C]


def test_a_last_layer_without_bias_is_one_whose_bias_is_0(float64):
    with_bias, without = network(), network(bias=False)
    without[-1].weight.data.copy_(with_bias[-1].weight.data)
    with_bias[-1].bias.data.zero_()
    for a, b in zip(feature_line(with_bias[-1]), feature_line(without[-1]), strict=True):
        assert torch.equal(a, b)
    CPNet(without, network(1), (1, 8, 8), small(), float64).synthesize()
