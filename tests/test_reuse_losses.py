"""What grafting and amalgamation descend on, against sums written out from the papers' equations, and how fast.

A step leaves the gradients of its total loss behind; each test compares them with those of a sum of its own.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from dfkd_lib.data import ImageSet
from dfkd_lib.methods import comprehensive, customised, grafting, grafting_blocks
from dfkd_lib.methods import feature_amalgamation as fa
from dfkd_lib.methods.amalgamation import Amalgam, Settings, Tasks
from dfkd_lib.methods.common_features import CommonSpace
from dfkd_lib.methods.comprehensive import Joint, Layerwise
from dfkd_lib.methods.customised import Adaptive, Source
from dfkd_lib.methods.grafting import NetGraft, Views
from dfkd_lib.methods.grafting_baselines import OBJECTIVES, Whole, WholeSettings
from dfkd_lib.methods.grafting_blocks import Scion
from dfkd_lib.models import chains
from dfkd_lib.models.chains import STEM
from dfkd_lib.runtime import Runtime

TASKS = Tasks.disjoint([2, 3])
B = 6
SETTINGS = Settings(n_steps=4, batch_size=B, lr=3e-3, lr_term=7e-4, pad=1, flip=True)
FIRST, SECOND = 0, 3  # convolutions of `network`


def network(n_classes: int, width: int = 4, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    made = nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
        nn.Conv2d(width, width + 1, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width + 1, n_classes),
    ).double()  # fmt: skip
    with torch.no_grad():
        made(2 * torch.rand(16, 1, 6, 6, dtype=torch.float64))
        made[-1].bias.add_(torch.randn(n_classes))  # so that the mean logit is not 0
    return made.eval()


def images(n: int = 24) -> ImageSet:
    pixels = torch.randint(0, 256, (n, 1, 6, 6), generator=torch.Generator().manual_seed(5), dtype=torch.uint8)
    return ImageSet(pixels, torch.arange(n) % 5, classes=list("abcde"), name="noise", split="test")


def looked(net: nn.Sequential, x: Tensor) -> tuple[list[Tensor], Tensor]:
    """Outputs of both convolutions, and logits."""
    first = net[FIRST](x)
    second = net[FIRST + 1 : SECOND + 1](first)
    return [first, second], net[SECOND + 1 :](second)


def mean_square(x: Tensor) -> Tensor:
    return (x * x).sum() / x.numel()


def soft_targets(s: Tensor, logits: Sequence[Tensor], centre: bool) -> Tensor:
    z = torch.cat([z - z.sum(1, keepdim=True) / z.shape[1] if centre else z for z in logits], 1)
    p, q = z.exp() / z.exp().sum(1, keepdim=True), s.exp() / s.exp().sum(1, keepdim=True)
    return (p * (p.log() - q.log())).sum() / len(s)


def next_batch(method: Amalgam | Layerwise) -> Tensor:
    """What the next step will draw."""
    state = method.randomness.get_state()
    x = method.views.batch(method.steps)
    method.randomness.set_state(state)
    return x


def assert_gradients(modules: Sequence[nn.Module], twins: Sequence[nn.Module], loss: Tensor) -> None:
    """The gradients that a step left in the modules are those of the loss with respect to the twins' weights."""
    mine = [p for module in modules for p in module.parameters()]
    theirs = torch.autograd.grad(loss, [p for twin in twins for p in twin.parameters()], allow_unused=True)
    for p, g in zip(mine, theirs, strict=True):
        assert (p.grad is None and g is None) or torch.allclose(p.grad, g, rtol=1e-7, atol=1e-12)


def assert_rate(module: nn.Module, before: nn.Module, lr: float) -> None:
    """The first step of Adam goes by lr wherever there is a gradient."""
    moved = [
        (new - old).abs()[new.grad.abs() > 1e-4]
        for new, old in zip(module.parameters(), before.parameters(), strict=True)
        if new.grad is not None
    ]
    assert torch.cat(moved).numel()
    assert torch.allclose(torch.cat(moved), torch.tensor(lr, dtype=torch.float64), rtol=1e-3)


def amalgam(runtime: Runtime, kind: str, centre: bool, decay: float = 0.0) -> Amalgam:
    teachers, student = [network(2), network(3, seed=1)], network(5, seed=2)
    x, term = torch.rand(2, 1, 6, 6, dtype=torch.float64), None
    torch.manual_seed(3)
    if kind == "joint":
        term = Joint.between(teachers, student, places=[str(FIRST), str(SECOND)], x=x)
        term.weights = {"amalgamation": 0.6, "reconstruction": 1.7}
    elif kind == "common":
        term = CommonSpace.between(teachers, student, places=["4"] * 3, x=x, width=3, mmd=0.8, reconstruction=2.5)
    settings = replace(SETTINGS, centre=centre, weight_decay=decay)
    return Amalgam(teachers, student, images(), TASKS, settings, runtime, term)


def joint_by_hand(term: Joint, f_s: list[Tensor], f_t: list[list[Tensor]]) -> Tensor:
    """w_2 sum_l ||fam(f_s) - sg[enc(F)]||^2 + w_3 sum_l sum_t ||F~_t - F_t||^2, all means."""
    loss = f_s[0].new_zeros(())
    for i, ours in enumerate(f_s):
        theirs = [f[i] for f in f_t]
        code = term.enc[i](torch.cat(theirs, 1))
        rebuilt = term.dec[i](code)
        width = theirs[0].shape[1]
        loss = loss + 0.6 * mean_square(term.fam[i](ours) - code.detach())
        loss = loss + 1.7 * (mean_square(rebuilt[:, :width] - theirs[0]) + mean_square(rebuilt[:, width:] - theirs[1]))
    return loss


def mmd_by_hand(x: Tensor, y: Tensor) -> Tensor:
    def k(a: Tensor, b: Tensor) -> Tensor:
        squared = ((a - b) ** 2).sum().clamp_min(1e-12)
        return sum(torch.exp(-squared / (2 * s**2)) for s in (0.001, 0.01, 0.05, 0.1, 0.2, 1.0, 2.0))  # type: ignore

    pairs = [(i, j) for i in range(len(x)) for j in range(len(x))]
    return torch.stack([k(x[i], x[j]) + k(y[i], y[j]) - 2 * k(x[i], y[j]) for i, j in pairs]).sum() / len(x) ** 2


def common_by_hand(term: CommonSpace, f_s: list[Tensor], f_t: list[list[Tensor]]) -> Tensor:
    """lambda sum_t MMD^2(h_s, h_t) + lambda beta sum_t ||D_t(h_t) - F_t||^2; here the maps come after the ReLU."""
    features = [f[1].relu() for f in (f_s, *f_t)]
    h = [term.extract(align(f)) for align, f in zip(term.align, features, strict=True)]
    rows = [v.flatten(1) / v.flatten(1).norm(dim=1, keepdim=True) for v in h]
    loss = 0.8 * (mmd_by_hand(rows[0], rows[1]) + mmd_by_hand(rows[0], rows[2]))
    return loss + 2.5 * sum(mean_square(term.decode[t](h[t + 1]) - features[t + 1]) for t in range(2))


@pytest.mark.parametrize("centre", [True, False])
@pytest.mark.parametrize("kind", ["plain", "joint", "common"])
def test_amalgamation_descends_on_soft_targets_and_its_term(kind: str, centre: bool, float64: Runtime) -> None:
    method = amalgam(float64, kind, centre)
    x, student, term = next_batch(method), copy.deepcopy(method.student), copy.deepcopy(method.term)
    f_s, s = looked(student, x)
    with torch.no_grad():
        seen = [looked(teacher, x) for teacher in method.teachers]
    loss = soft_targets(s, [z for _, z in seen], centre)
    assert method.step()["soft targets"] == pytest.approx(float(loss.detach()), rel=1e-9)
    if term is None:
        assert_gradients([method.student], [student], loss)
    else:
        by_hand = joint_by_hand if kind == "joint" else common_by_hand
        loss = loss + by_hand(term, f_s, [f for f, _ in seen])  # type: ignore[operator]
        assert_gradients([method.student, method.term], [student, term], loss)  # type: ignore[list-item]
        assert_rate(method.term, term, 7e-4)  # type: ignore[arg-type]
    assert_rate(method.student, student, 3e-3)


@pytest.mark.parametrize("kind", ["plain", "layerwise", "customised"])
def test_rates_fall_along_half_a_cosine(kind: str, float64: Runtime) -> None:
    method = {"plain": lambda r: amalgam(r, "plain", True), "layerwise": layerwise, "customised": adaptive}[kind](
        float64
    )
    rates = []
    for _ in range(4):
        method.step()
        rates.append(method.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([3e-3 * (1 + math.cos(math.pi * step / 4)) / 2 for step in range(4)])
    if kind == "customised":
        assert method.bridge_optimizer.param_groups[0]["lr"] == pytest.approx(rates[-1] * 7 / 30)


def layerwise(runtime: Runtime, decay: float = 0.0, centre: bool = True) -> Layerwise:
    x = torch.rand(2, 1, 6, 6, dtype=torch.float64)
    teachers = [chains.chain(network(n, seed=i), x) for i, n in enumerate((2, 3))]
    student = chains.without_norms(chains.chain(network(5, seed=2), x))
    codes = [fa.pca(*m.result(), w) for m, w in zip(fa.moments(teachers, images(), runtime), (4, 5), strict=True)]
    settings = replace(SETTINGS, centre=centre, weight_decay=decay)
    method = Layerwise(teachers, student, codes, images(), TASKS, settings, runtime)
    for fam in method.fams:
        comprehensive.set_affine(fam, torch.randn(len(fam.bias), len(fam.bias)), torch.randn(len(fam.bias)))
    return method


@pytest.mark.parametrize("centre", [True, False])
def test_layers_learn_from_the_amalgamated_features_below_them(centre: bool, float64: Runtime) -> None:
    method = layerwise(float64, centre=centre)
    student, fams = copy.deepcopy(method.student), copy.deepcopy(method.fams)
    x = next_batch(method)
    convolutions = [layer.linear[0] for layer in student.layers]
    with torch.no_grad():
        f = [teacher.features(x) for teacher in method.teachers]
        codes = []
        for i, name in enumerate(("first", "second")):
            stacked = torch.cat([f[0][i], f[1][i]], 1)
            w_e, b_e = method.encoders[i].weight.flatten(1), method.encoders[i].bias
            assert w_e.shape[0] == stacked.shape[1] // 2, name
            codes.append(torch.einsum("oc,bchw->bohw", w_e, stacked) + b_e.view(1, -1, 1, 1))
        target = torch.cat([t[2] - t[2].mean(1, keepdim=True) if centre else t[2] for t in f], 1)
    phi = [torch.einsum("oc,bchw->bohw", a.weight.flatten(1), code) + a.bias.view(1, -1, 1, 1)
           for a, code in zip(fams, codes, strict=True)]  # fmt: skip
    below = [x, phi[0].relu(), phi[1].relu().mean((2, 3))]
    wanted = [*codes, target]
    errors = [mean_square(conv(b) - y) for conv, b, y in zip(convolutions, below, wanted, strict=True)]
    found = [float(value) for value in method.step().values()]
    assert found == pytest.approx([float(e.detach()) for e in errors])
    assert_gradients([method.student, method.fams], [student, fams], errors[0] + errors[1] + errors[2])
    assert_rate(method.student, student, 3e-3)


def adaptive(runtime: Runtime, decay: float = 0.0, *, two_sided: bool = True) -> Adaptive:
    rows = [torch.arange(16), torch.arange(16, 24)] if two_sided else [None, None]
    heads: list[Sequence[int]] = [(), ()] if two_sided else [[0, 2], [3, 1]]
    sources = [Source(network(3), [2, 0], heads[0], rows[0]), Source(network(4, 6, seed=1), [1, 3], heads[1], rows[1])]
    torch.manual_seed(4)
    settings = replace(SETTINGS, weight_decay=decay)
    method = Adaptive(sources, network(2 if two_sided else 4, seed=2), images(), settings, runtime,
                      places=[[str(FIRST), str(SECOND)]] * 3, two_sided=two_sided, norm=0.3)  # fmt: skip
    with torch.no_grad():
        for bridges, mu in zip(method.bridges, (1.4, 0.7), strict=True):
            bridges.mu.fill_(mu)
    return method


def mapped(bridge: nn.Module, f: Tensor) -> Tensor:
    return torch.einsum("oc,bchw->bohw", bridge.weight.flatten(1), f) + bridge.bias.view(1, -1, 1, 1)


@pytest.mark.parametrize("two_sided", [True, False])
def test_customised_students_descend_on_features_logits_and_norm(two_sided: bool, float64: Runtime) -> None:
    method = adaptive(float64, two_sided=two_sided)
    student, bridges = copy.deepcopy(method.student), copy.deepcopy(method.bridges)
    states = [view.randomness.get_state() for view in method.views]
    x = torch.cat([view.batch(0) for view in method.views])
    for view, state in zip(method.views, states, strict=True):
        view.randomness.set_state(state)
    f_s, s = looked(student, x)
    shares = [slice(0, 4), slice(4, 6)] if two_sided else [slice(0, 6)] * 2
    outputs, heads = [[2, 0], [1, 3]], [[0, 1], [0, 1]] if two_sided else [[0, 2], [3, 1]]
    features, logits, norm = (torch.zeros((), dtype=torch.float64) for _ in range(3))
    for t, (source, share) in enumerate(zip(method.networks, shares, strict=True)):
        with torch.no_grad():
            f_t, z = looked(source, x[share])
        for k in range(2):
            theirs = mapped(bridges[t].source[k], f_t[k]) if two_sided else f_t[k]
            features = features + mean_square(mapped(bridges[t].student[k], f_s[k][share]) - theirs)
            if two_sided:
                w = bridges[t].source[k].weight.flatten(1)
                norm = norm + ((w**2).sum(1) - 1).pow(2).sum() / len(w)
        logits = logits + mean_square(bridges[t].mu * s[share][:, heads[t]] - z[:, outputs[t]])
    found = method.step()
    by_hand = {"features": features, "logits": logits, "norm": norm}
    assert {name: float(value) for name, value in found.items()} == pytest.approx(
        {name: float(value.detach()) for name, value in by_hand.items()}
    )
    total = features + logits + 0.3 * norm
    assert_gradients([method.student, method.bridges], [student, bridges], total)
    assert_rate(method.student, student, 3e-3)
    assert_rate(method.bridges, bridges, 7e-4)
    assert torch.cat([b.mu.grad.view(1) for b in method.bridges]).abs().min() > 0
    assert customised.batch_sizes([16, 8], B) == [4, 2]


@pytest.mark.parametrize("kind", ["joint", "layerwise", "customised"])
def test_a_decay_without_bound_takes_every_weight_towards_zero(kind: str, float64: Runtime) -> None:
    """It outweighs any gradient, and Adam's first step goes by lr along the sign of both together."""
    made = {"joint": lambda: amalgam(float64, "joint", True, 1e9), "layerwise": lambda: layerwise(float64, 1e9),
            "customised": lambda: adaptive(float64, 1e9)}  # fmt: skip
    method = made[kind]()
    other = {"joint": "term", "layerwise": "fams", "customised": "bridges"}[kind]
    learners = [(method.student, 3e-3), (getattr(method, other), 3e-3 if kind == "layerwise" else 7e-4)]
    before = [copy.deepcopy(learner) for learner, _ in learners]
    method.step()
    for (learner, lr), twin in zip(learners, before, strict=True):
        for new, old in zip(learner.parameters(), twin.parameters(), strict=True):
            if new.grad is not None:
                away = old.abs() > 1e-3
                assert torch.allclose((old - new)[away], lr * old.sign()[away])


def blocks(n_classes: int, width: int, seed: int) -> dict[str, nn.Module]:
    net = network(n_classes, width, seed)
    return {STEM: nn.Identity(), "a": net[:3], "b": net[3:5], "c": net[5:]}


GRAFTING = grafting.Settings(
    block_steps=(2,), network_steps=2, batch_size=B, lr_block=2e-3, lr_adapter=9e-3, lr_network=4e-4
)


def grafted(runtime: Runtime, normalise: bool) -> NetGraft:
    teacher = blocks(5, 6, 0)
    x = torch.rand(2, 1, 6, 6, dtype=torch.float64)
    scions = grafting_blocks.scions(teacher, blocks(5, 3, 1), x)
    views = grafting.look(teacher, images(), runtime, n_views=36, pad=1)
    return NetGraft(teacher, scions, views, replace(GRAFTING, normalise=normalise), runtime)


def distance_by_hand(s: Tensor, t: Tensor) -> Tensor:
    """2 sum_n (1 - cos(z^s_n, z^t_n)): a sum over the batch."""
    cosine = (s * t).sum(1) / (s.norm(dim=1) * t.norm(dim=1))
    return 2 * (1 - cosine).sum()


def joined(parts: Sequence[nn.Module], x: Tensor) -> Tensor:
    for part in parts:
        x = part(x)
    return x


@pytest.mark.parametrize("normalise", [True, False])
def test_each_phase_of_grafting_descends_on_the_distance_at_its_own_rates(normalise: bool, float64: Runtime) -> None:
    method = grafted(float64, normalise)
    spans = [(0, 1), (1, 2), (2, 3), (0, 2), (0, 3)]
    for step in range(method.n_steps):
        start, stop = spans[step // 2]
        rows = method.batches(step)
        scions = copy.deepcopy(method.scions)
        for scion in scions[start:stop]:
            scion.train()
        x, teacher = method.views.inputs[rows], method.teacher
        with torch.no_grad():
            t = joined(teacher, x)
        s = joined([*teacher[:start], *scions[start:stop], *teacher[stop:]], x)
        loss = distance_by_hand(s, t) if normalise else B * s.shape[1] * mean_square(s - t)
        assert method.step()["loss"] == pytest.approx(float(loss.detach()) / B)
        assert_gradients(method.scions[start:stop], scions[start:stop], loss)
        if step % 2 == 0:  # a new Adam
            for scion, before in zip(method.scions[start:stop], scions[start:stop], strict=True):
                alone = stop - start == 1
                assert_rate(scion.body, before.body, 2e-3 if alone else 4e-4)
                for adapter, old in ((scion.a_in, before.a_in), (scion.a_out, before.a_out)):
                    if adapter is not None:
                        assert_rate(adapter, old, 9e-3 if alone else 4e-4)


@pytest.mark.parametrize(("pad", "flip"), [(0, False), (2, False), (1, True)])
def test_views_are_the_images_shifted_and_mirrored_as_asked(pad: int, flip: bool, float64: Runtime) -> None:
    few = images(5)
    views = grafting.look(blocks(5, 6, 0), few, float64, n_views=60, pad=pad, flip=flip)
    x, labels = few.batch(range(5))
    padded = nn.functional.pad(x.double(), (pad,) * 4)
    found = set()
    for i, view in enumerate(views.inputs):
        for mirrored in (False, True) if flip else (False,):
            whole = (padded.flip(3) if mirrored else padded)[i % 5]
            found |= {
                (i, top, left, mirrored)
                for top in range(2 * pad + 1)
                for left in range(2 * pad + 1)
                if torch.allclose(whole[:, top : top + 6, left : left + 6], view)
            }
    assert {i for i, *_ in found} == set(range(60))
    assert {left for _, _, left, _ in found} == {top for _, top, *_ in found} == set(range(2 * pad + 1))
    assert {mirrored for *_, mirrored in found} == ({False, True} if flip else {False})
    assert torch.equal(views.labels, labels.repeat(12))
    as_it_is = grafting.look(blocks(5, 6, 0), few, float64, pad=pad, flip=flip)
    assert torch.equal(as_it_is.inputs, x.double())


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_baselines_descend_on_their_objective(objective: str, float64: Runtime) -> None:
    teacher = blocks(5, 6, 0)
    scions = grafting_blocks.scions(teacher, blocks(5, 3, 1), torch.rand(2, 1, 6, 6, dtype=torch.float64))
    views: Views = grafting.look(teacher, images(), float64, n_views=36, pad=1)
    settings = WholeSettings(objective, n_steps=4, batch_size=B, lr=2e-3, temperature=3.0)
    method = Whole(teacher, scions, views, settings, float64)
    for step in range(4):
        twins = copy.deepcopy(method.scions)
        rows = method.batches(step)
        x, labels = views.inputs[rows], views.labels[rows]
        with torch.no_grad():
            f_t = [method.teacher[0](x)]
            f_t.append(method.teacher[1](f_t[0]))
            t = method.teacher[2](f_t[1])
        first = twins[0].body(x)
        second = twins[1].body(first)
        s = twins[2].body(second)
        if objective == "grafting loss":
            loss = distance_by_hand(s, t) / B
        elif objective == "labels":
            loss = -(s.exp() / s.exp().sum(1, keepdim=True)).log()[range(B), labels].sum() / B
        elif objective == "hints" and step < 2:
            loss = mean_square(twins[0].a_out(first) - f_t[0]) + mean_square(twins[1].a_out(second) - f_t[1])
        else:
            p, q = ((z / 3).softmax(1) for z in (t, s))
            loss = 9 * (p * (p.log() - q.log())).sum() / B
        assert method.step()["loss"] == pytest.approx(float(loss.detach()))
        assert_gradients([method.scions], [twins], loss)
        if step == 0:
            assert_rate(method.scions, twins, 2e-3)


def test_scions_have_adapters_on_both_sides() -> None:
    made: list[Scion] = grafting_blocks.scions(
        blocks(5, 6, 0), blocks(5, 3, 1), torch.rand(2, 1, 6, 6, dtype=torch.float64)
    )
    assert [(s.a_in is None, s.a_out is None) for s in made] == [(True, False), (False, False), (False, True)]
