"""The verifiable properties of knowledge amalgamation: its three papers and their common ground."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import same
from torch import Tensor, nn

from dfkd_lib import amalgamate
from dfkd_lib.data import ImageSet
from dfkd_lib.errors import InputError
from dfkd_lib.losses import kl
from dfkd_lib.methods import amalgamation as ka
from dfkd_lib.methods import comprehensive, customised, ensembles
from dfkd_lib.methods import feature_amalgamation as fa
from dfkd_lib.methods.amalgamation import Amalgam, Settings, Tasks
from dfkd_lib.methods.common_features import CommonSpace, flat, mmd2
from dfkd_lib.methods.comprehensive import Joint, Layerwise
from dfkd_lib.methods.customised import Adaptive, Source
from dfkd_lib.models import adapters, chains
from dfkd_lib.reproduction.cli import main
from dfkd_lib.runtime import Runtime
from dfkd_lib.training.fit import fit

TASKS = Tasks.disjoint([2, 3])
QUICK = Settings(n_steps=4, batch_size=8, pad=1)


def network(n_classes: int, width: int = 6, side: int = 2, seed: int = 0) -> nn.Sequential:
    """A chain of two convolutions and a linear layer, with running statistics that say something."""
    torch.manual_seed(seed)
    made = nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(side), nn.Flatten(), nn.Linear(side**2 * width, n_classes),
    )  # fmt: skip
    with torch.no_grad():
        made(torch.rand(32, 1, 8, 8))
    return made.eval()


def images(n: int = 40, classes: int = 5, seed: int = 0) -> ImageSet:
    """A pattern for each class, in noise."""
    g, labels = torch.Generator().manual_seed(seed), torch.arange(n) % classes
    patterns = 150 * torch.randint(0, 2, (classes, 1, 8, 8), generator=torch.Generator().manual_seed(99))
    pixels = torch.randint(0, 105, (n, 1, 8, 8), generator=g) + patterns[labels]
    return ImageSet(pixels.to(torch.uint8), labels, classes=list("abcde")[:classes], name="noise", split="test")


def teachers(seed: int = 0) -> list[nn.Module]:
    return [network(2, seed=seed), network(3, seed=seed + 1)]


def state(module: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(module.state_dict())


def x64(n: int = 4) -> Tensor:
    return torch.rand(n, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


# Common ground


def test_the_soft_target_loss_falls_into_two_parts() -> None:
    torch.manual_seed(0)
    z, s = 3 * torch.randn(7, 5, dtype=torch.float64), torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    whole = -(z.softmax(1) * s.log_softmax(1)).sum(1).mean()
    assert torch.allclose(sum(ka.decompose(z, s, TASKS)), whole, atol=1e-6)  # type: ignore[arg-type]
    for loss in (whole, kl(s, z)):
        (gradient,) = torch.autograd.grad(loss, s, retain_graph=True)
        assert torch.allclose(gradient, (s.softmax(1) - z.softmax(1)) / 7)


def test_centring_makes_the_target_blind_to_a_teachers_offset() -> None:
    torch.manual_seed(0)
    z, labels = [torch.randn(9, 2), torch.randn(9, 3)], torch.arange(9) % 5
    moved = [z[0] + 7, z[1]]
    assert torch.allclose(ka.union(z, TASKS), ka.union(moved, TASKS), atol=1e-5)
    assert not torch.allclose(ka.union(z, TASKS, centre=False), ka.union(moved, TASKS, centre=False))
    before, after = (ensembles.measures(ka.union(part, TASKS, centre=False), labels, TASKS) for part in (z, moved))
    assert all(before[name] == after[name] for name in before if name.endswith(" known"))
    assert after["assignment"] == pytest.approx(4 / 9)


def test_the_order_of_the_teachers_does_not_matter() -> None:
    torch.manual_seed(0)
    z, labels = [torch.randn(50, 2), torch.randn(50, 3)], torch.arange(50) % 5
    turned = (labels + 3) % 5
    one = ensembles.measures(ka.union(z, TASKS), labels, TASKS)
    other = ensembles.measures(ka.union(z[::-1], Tasks.disjoint([3, 2])), turned, Tasks.disjoint([3, 2]))
    assert one["union"] == other["union"] and one["part 1 known"] == other["part 2 known"]


def test_measures_by_hand() -> None:
    scores = torch.tensor([[5.0, 0, 9, 0, 0], [0, 5, 0, 0, 0], [0, 0, 5, 0, 0], [0, 0, 5, 1, 0]])
    found = ensembles.measures(scores, torch.tensor([0, 1, 2, 3]), TASKS)
    assert found["union"] == 0.5 and found["assignment"] == 0.75
    assert found["part 1 known"] == 1 and found["part 1 unknown"] == 0.5
    assert found["part 2 known"] == found["part 2 unknown"] == 0.5
    weighted = (2 * found["part 1 unknown"] + 2 * found["part 2 unknown"]) / 4
    assert weighted == found["union"]


def test_a_shared_class_gets_the_mean_of_its_logits() -> None:
    tasks = Tasks.named([["cat", "dog"], ["dog", "car"]])
    assert tasks.columns == ((0, 1), (1, 2)) and tasks.n_classes == 3
    target = ka.union([torch.tensor([[1.0, 3]]), torch.tensor([[4.0, 0]])], tasks)
    assert target.tolist() == [[-1, 1.5, -2]]


def test_entropy() -> None:
    torch.manual_seed(0)
    z = torch.randn(6, 4)
    assert torch.allclose(ensembles.entropy(z), ensembles.entropy(z + 100), atol=1e-5)
    assert ensembles.entropy(torch.zeros(1, 4)).item() == pytest.approx(math.log(4))
    assert ensembles.entropy(torch.tensor([[1e4, 0, 0, -1e4]])).item() == 0
    assert ensembles.entropy(z).min() >= 0 and ensembles.entropy(z).max() <= math.log(4)


def test_equals_are_decided_for_the_first() -> None:
    z = torch.randn(6, 4)
    assert ensembles.least_ambiguous([z, z.clone(), z]).tolist() == [0] * 6
    assert ensembles.least_ambiguous([torch.zeros(6, 4), z]).tolist() == [1] * 6


def test_ensembles() -> None:
    sure, unsure = torch.tensor([[4.0, 0]]), torch.tensor([[1.0, 0, 0]])
    found = ensembles.ensembles([sure, unsure + 9], TASKS, [1.0, 1.0])
    assert {name: int(scores.argmax()) for name, scores in found.items()} == {
        "raw logits": 2, "centred logits": 0, "probabilities": 0, "lowest entropy": 0, "calibrated": 0,
    }  # fmt: skip
    for scores in found.values():
        assert scores[0, 2:].argmax() == 0 and scores[0, :2].argmax() == 0


def test_calibrated_logits_are_divided_by_their_temperatures() -> None:
    z = [torch.tensor([[4.0, 0]]), torch.tensor([[3.0, 0, 0]])]
    found = ensembles.ensembles(z, TASKS, [2.0, 0.5])["calibrated"]
    assert torch.allclose(found, torch.tensor([[1.0, -1, 4, -2, -2]]))


def test_temperature_of_an_overconfident_classifier_is_above_one() -> None:
    torch.manual_seed(0)
    z = torch.randn(4000, 3)
    labels = torch.multinomial(z.softmax(1), 1)[:, 0]
    assert ensembles.best_temperature(3 * z, labels) == pytest.approx(3, rel=0.15)
    faultless = 5 * torch.eye(3)
    assert 0.5 < ensembles.best_temperature(faultless.repeat(10, 1), torch.arange(3).repeat(10)) < 3


def test_margin() -> None:
    ours, theirs = torch.tensor([1, 1, 1, 0]).bool(), torch.tensor([1, 0, 0, 1]).bool()
    deviation = math.sqrt((0.25**2 + 2 * 0.75**2 + 1.25**2) / 3)
    assert ensembles.margin(ours, theirs) == pytest.approx((0.25, 1.96 * deviation / 2))
    assert ensembles.margin(ours, ours) == (0, 0)


def test_features_are_kept_from_what_works_in_place() -> None:
    net, x = network(2), torch.rand(2, 1, 8, 8)
    _, (f,) = ka.look(net, x, ["5"])
    assert f.min() < 0
    with pytest.raises(InputError, match="place in Sequential '55'"):
        ka.look(net, x, ["55"])


# Every method: teachers untouched, resumable


def plain(runtime: Runtime) -> Amalgam:
    return Amalgam(teachers(), network(5, seed=9), images(), TASKS, QUICK, runtime)


def joint(runtime: Runtime) -> Amalgam:
    t, s = teachers(), network(5, seed=9)
    torch.manual_seed(1)
    term = Joint.between(t, s, places=["0", "4", "9"], x=torch.rand(2, 1, 8, 8))
    return Amalgam(t, s, images(), TASKS, QUICK, runtime, term)


def common(runtime: Runtime, *weights: float) -> Amalgam:
    t: list[nn.Module] = [network(2), network(3, width=4, side=1)]
    s = network(5, seed=9)
    torch.manual_seed(1)
    mmd, rebuild = weights or (10.0, 10.0)
    term = CommonSpace.between(t, s, places=["6", "4", "6"], x=torch.rand(2, 1, 8, 8), width=4, mmd=mmd,
                               reconstruction=rebuild)  # fmt: skip
    return Amalgam(t, s, images(), TASKS, QUICK, runtime, term)


def layerwise(runtime: Runtime, **options: bool) -> Layerwise:
    x = torch.rand(2, 1, 8, 8)
    as_chains = [chains.chain(t, x) for t in teachers()]
    student = chains.without_norms(chains.chain(network(5, seed=9), x))
    as_chains = [runtime.prepare(c) for c in as_chains]
    codes = [fa.pca(*m.result(), 6) for m in fa.moments(as_chains, images(), runtime)]
    return Layerwise(as_chains, student, codes, images(), TASKS, QUICK, runtime, **options)


def component(runtime: Runtime, norm: float = 1.0) -> Adaptive:
    torch.manual_seed(1)
    rows = torch.arange(40) % 3 == 0
    sources = customised.split([Source(network(4), [0, 1, 2]), Source(network(5, seed=1), [1, 2, 0])], rows.long())
    return Adaptive(sources, network(3, seed=9), images(), QUICK, runtime, places=[["1", "5"]] * 3, two_sided=True,
                    norm=norm)  # fmt: skip


def target(runtime: Runtime) -> Adaptive:
    torch.manual_seed(1)
    sources = [Source(network(2), [0, 1], [0, 1]), Source(network(3, seed=1), [0, 1, 2], [2, 3, 4])]
    return Adaptive(sources, network(5, width=8, seed=9), images(), QUICK, runtime, places=[["1", "5"]] * 3,
                    two_sided=False)  # fmt: skip


METHODS = [plain, joint, common, layerwise, component, target]


@pytest.mark.parametrize("make", METHODS)
def test_teachers_stay_as_they_are_and_the_student_learns(make: Callable[..., Amalgam], float32: Runtime) -> None:
    method = make(float32)
    networks = getattr(method, "teachers", None) or method.networks  # type: ignore[attr-defined]
    before, student = [state(t) for t in networks], state(method.student)
    for _ in range(3):
        assert all(not value.requires_grad for value in method.step().values())
    assert all(same(old, state(t)) for old, t in zip(before, networks, strict=True))
    assert all(p.grad is None for t in networks for p in t.parameters())
    assert not same(student, state(method.student))


def test_one_teacher_is_plain_distillation(float64: Runtime) -> None:
    teacher, student = network(3), network(3, seed=9)
    method = Amalgam([teacher], student, images(), Tasks.disjoint([3]), Settings(2, batch_size=8), float64)
    x = method.views.batch(0)
    expected = kl(method.student(x), teacher(x))
    method.student.load_state_dict(network(3, seed=9).double().state_dict())
    assert method.step()["soft targets"] == pytest.approx(float(expected.detach()), abs=1e-9)


# A


def covariance(n: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(2)
    rows = torch.randn(500, n, dtype=torch.float64) @ torch.randn(n, n, dtype=torch.float64) + 3
    moments = fa.Moments()
    for part in rows.split(150):
        moments.add(part)
    return rows, *moments.result()


def test_moments_are_those_of_all_pixels() -> None:
    rows, mean, cov = covariance()
    assert torch.allclose(mean, rows.mean(0)) and torch.allclose(cov, torch.cov(rows.T, correction=0))
    maps = fa.Moments()
    maps.add(rows.view(5, 10, 10, 8).permute(0, 3, 1, 2))
    assert torch.allclose(maps.result()[1], cov)


def test_linear_amalgamation_is_pca() -> None:
    rows, mean, cov = covariance()
    for width in range(1, 9):
        code = fa.pca(mean, cov, width)
        tail = float(torch.linalg.eigvalsh(cov)[: 8 - width].sum()) / 8
        assert code.error(cov) == pytest.approx(tail, abs=1e-9)
        enc, dec = (layer.double() for layer in code.modules(2))
        rebuilt = (dec(enc(rows)) - rows).square().mean()
        assert float(rebuilt.detach()) == pytest.approx(tail, rel=1e-4, abs=1e-9)
    assert code.error(cov) == pytest.approx(0, abs=1e-9)


def test_descent_does_not_get_below_pca_and_comes_near() -> None:
    rows, mean, cov = covariance()
    bound = fa.pca(mean, cov, 3).error(cov)
    errors = fa.learned_errors(rows, 3, n_steps=600, lr=0.03, seed=0)
    assert min(errors) >= bound - 1e-9 and errors[-1] < 1.1 * bound


def test_incremental_and_direct() -> None:
    _, mean, cov = covariance()
    one, two = fa.pca(mean, cov, 3), fa.incremental(mean, cov, [4, 4], 3)
    assert torch.allclose(one.decode @ one.encode, two.decode @ two.encode)
    four = fa.incremental(mean, cov, [2, 2, 2, 2], 3)
    assert four.error(cov) >= one.error(cov)
    assert fa.incremental(mean, cov, [2, 2, 2, 2], 8).error(cov) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("linear", [nn.Conv2d(3, 4, 3, padding=1, stride=2), nn.Linear(3, 4)])
def test_merging_an_adaptation_module_changes_nothing(linear: nn.Module) -> None:
    ndim = 4 if isinstance(linear, nn.Conv2d) else 2
    linear, fam = copy.deepcopy(linear).double(), adapters.adapter(4, 4, ndim).double()
    nn.init.normal_(fam.bias)  # type: ignore[arg-type]
    x = torch.rand(2, 3, *[5] * (ndim - 2), dtype=torch.float64)
    assert torch.allclose(comprehensive.merge(linear, fam)(x), fam(linear(x)), atol=1e-12)


@pytest.mark.parametrize("adapt", [True, False])
def test_the_merged_student_is_the_adapted_one(adapt: bool, float64: Runtime) -> None:
    method = layerwise(float64, adapt=adapt)
    for _ in range(4):
        method.step()
    x = x64()
    assert torch.allclose(method.merged()(x), method.adapted(x), atol=1e-10)
    if adapt:
        assert not torch.allclose(method.adapted(x), method.student(x))


def test_the_first_layer_has_a_closed_form_without_error(float64: Runtime) -> None:
    method = layerwise(float64)
    x = x64(8)
    conv = method.student.layers[0].linear[0]
    with torch.no_grad():
        code = method.targets(x)[0]
    residual = comprehensive.least_squares(conv, method.student.before(x), code)
    assert residual == pytest.approx(0, abs=1e-12)
    assert float(method.errors(x)[0].detach()) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("layer", [nn.Conv2d(2, 3, 3, padding=1), nn.Linear(4, 3)])
def test_least_squares_is_where_the_gradient_vanishes(layer: nn.Conv2d | nn.Linear) -> None:
    torch.manual_seed(0)
    layer = copy.deepcopy(layer).double()
    x = torch.rand(20, 2, 4, 4).double() if isinstance(layer, nn.Conv2d) else torch.rand(20, 4).double()
    y = torch.randn_like(layer(x))
    least = comprehensive.least_squares(layer, x, y)
    loss = F.mse_loss(layer(x), y)
    loss.backward()
    assert loss.item() == pytest.approx(least)
    assert all(p.grad is not None and p.grad.abs().max() < 1e-10 for p in layer.parameters())


def test_a_chain_is_the_network(float64: Runtime) -> None:
    net = float64.prepare(network(3))
    made = chains.chain(net, x64())
    assert [layer.name for layer in made.layers] == ["0", "4", "9"]
    assert torch.equal(made(x64()), net(x64()))
    shapes = [tuple(f.shape[1:]) for f in chains.without_norms(made).double().features(x64())]
    assert shapes == [(6, 8, 8), (6, 4, 4), (3,)]


class Branched(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 1, 3, padding=1), nn.Linear(64, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((x + self.conv(x)).flatten(1))


def test_what_cannot_be_amalgamated_layer_by_layer_is_refused(float32: Runtime) -> None:
    x = torch.rand(2, 1, 8, 8)
    with pytest.raises(InputError, match="Branched does more in forward"):
        chains.chain(Branched(), x)
    with pytest.raises(InputError, match=r"layer '4': 6x4x4 in the student.*6x8x8 in teacher 2"):
        other = nn.Sequential(*(m for i, m in enumerate(network(3)) if i != 3))
        named = nn.Sequential(*other[:3], nn.Identity(), *other[3:])
        Joint.between([network(2), named], network(5), places=["0", "4"], x=x)
    as_chains = [chains.chain(t, x) for t in (network(2), named)]
    with pytest.raises(InputError, match="layer '4': 6x4x4 in teacher 1, 6x8x8 in teacher 2"):
        fa.moments(as_chains, images(), float32)
    with pytest.raises(InputError, match="layer '0': 4x8x8 in the student, 6x8x8 amalgamated"):
        as_chains = [chains.chain(t, x) for t in teachers()]
        codes = [fa.pca(*m.result(), 6) for m in fa.moments(as_chains, images(), float32)]
        thin = chains.without_norms(chains.chain(network(5, width=4), x))
        Layerwise(as_chains, thin, codes, images(), TASKS, QUICK, float32)


def test_weights_of_the_terms_are_the_authors() -> None:
    t, s, x = teachers(), network(5), torch.rand(2, 1, 8, 8)
    assert Joint.between(t, s, places=["0"], x=x).weights == {"amalgamation": 1.0, "reconstruction": 1.0}
    for term in (
        CommonSpace.between(t, s, places=["6"] * 3, x=x),
        CommonSpace(["6"] * 3, [6, 6, 6]),
    ):
        assert term.weights == {"MMD": 10.0, "reconstruction": 10.0}
    with pytest.raises(InputError, match="weight_decay must be 0 or more, not -1"):
        Settings(n_steps=1, weight_decay=-1)


def test_only_reconstruction_shapes_the_encoder(float32: Runtime) -> None:
    method = joint(float32)
    term = method.term
    assert isinstance(term, Joint)
    x = method.views.batch(0)
    with torch.no_grad():
        f_t = [ka.look(t, x, ["0", "4", "9"])[1] for t in method.teachers]
    found = term(ka.look(method.student, x, ["0", "4", "9"])[1], f_t)
    found["amalgamation"].backward(retain_graph=True)
    assert all(p.grad is None for p in term.enc.parameters()) and term.fam[0].weight.grad is not None
    found["reconstruction"].backward()
    assert term.enc[0].weight.grad is not None


# B


def test_subsets_partition_the_images(float32: Runtime) -> None:
    sources = [Source(network(4), [0, 1, 2]), Source(network(5, seed=1), [0, 1, 2])]
    chosen = customised.select(sources, images(), float32)
    rows = [s.rows for s in customised.split(sources, chosen)]
    assert sorted(torch.cat([r for r in rows if r is not None]).tolist()) == list(range(40))
    twins = [sources[0], Source(copy.deepcopy(sources[0].network), [0, 1, 2])]
    assert customised.select(twins, images(), float32).tolist() == [0] * 40
    assert len(customised.split(twins, torch.zeros(40))) == 1
    assert customised.batch_sizes([99, 1], 64) == [63, 2]


@pytest.mark.parametrize("make", [component, target])
def test_one_batch_of_different_images_and_one_pass_of_the_student(
    make: Callable[..., Adaptive], float32: Runtime
) -> None:
    method = make(float32)
    seen: list[list[Tensor]] = [[] for _ in range(3)]
    for network, given in zip([method.student, *method.networks], seen, strict=True):
        network.register_forward_pre_hook(lambda _, inputs, given=given: given.append(inputs[0]))
    method.step()
    (x,), *shares = seen
    assert len(x.flatten(1).unique(dim=0)) == len(x) == QUICK.batch_size
    (first,), (second,) = shares
    if make is target:
        assert torch.equal(first, x) and torch.equal(second, x)
    else:
        assert torch.equal(torch.cat([first, second]), x) and 2 <= len(first) < len(x)


class Says(nn.Module):
    """The same logits for every image."""

    def __init__(self, *logits: float) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits))

    def forward(self, x: Tensor) -> Tensor:
        return self.logits.expand(len(x), -1)


def test_only_the_wanted_outputs_decide_which_source_is_surest(float32: Runtime) -> None:
    """The first is sure of an output that nobody wants, and undecided between those that are wanted."""
    sources = [Source(Says(1.0, 1.0, 9.0), [0, 1]), Source(Says(0.0, 1.0, 0.0), [1, 2])]
    assert customised.select(sources, images(6), float32).tolist() == [1] * 6
    assert customised.select(sources[::-1], images(6), float32).tolist() == [0] * 6


def test_a_target_wider_than_its_sources() -> None:
    source, x = network(3, width=8).double(), x64()
    target = customised.widened(source, 9 / 8, x)
    assert [f.shape[1] for f in chains.chain(target, x).features(x)] == [9, 9, 3]
    assert target(x).shape == source(x).shape == (4, 3)
    assert [name for name, _ in target.named_modules()] == [name for name, _ in source.named_modules()]
    assert [f.shape[1] for f in chains.chain(source, x).features(x)] == [8, 8, 3]
    grouped = nn.Sequential(nn.Conv2d(2, 4, 1, groups=2), nn.Flatten(), nn.Linear(64, 3))
    with pytest.raises(InputError, match="2 groups"):
        customised.widened(grouped, 2, torch.rand(1, 2, 4, 4))


def test_the_norm_penalty_and_the_trivial_solution() -> None:
    bridge = nn.Conv2d(4, 2, 1)
    with torch.no_grad():
        bridge.weight.copy_(F.normalize(bridge.weight, dim=1))
    assert customised.unit_norm(bridge).item() == pytest.approx(0, abs=1e-10)
    nn.init.zeros_(bridge.weight)
    assert customised.unit_norm(bridge).item() == 1
    nn.init.constant_(bridge.weight, 1e-3)
    customised.unit_norm(bridge).backward()
    assert bridge.weight.grad is not None and (bridge.weight.grad < 0).all()
    both = customised.Bridges([4], [4], two_sided=True)
    for p in [*both.student.parameters(), *both.source.parameters()]:
        nn.init.zeros_(p)
    assert both([torch.rand(2, 4, 3, 3)], [torch.rand(2, 4, 3, 3)]).item() == 0
    assert both.norm().item() == 1 and customised.Bridges([4], [4], two_sided=False).norm().item() == 0


def test_what_cannot_be_bridged_is_refused(float32: Runtime) -> None:
    sources = [Source(network(3), [0, 1, 2])]
    with pytest.raises(InputError, match="place '5': 6x4x4 in the student, 6x8x8 in source 1"):
        Adaptive(sources, network(3), images(), QUICK, float32, places=[["5"], ["1"]], two_sided=True)
    with pytest.raises(InputError, match="source 1 gives 3 outputs; output 7 is asked of it"):
        Adaptive([Source(network(3), [7])], network(3), images(), QUICK, float32, two_sided=True)


# C


def unit(n: int, d: int, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(n, d, generator=g).abs().double(), dim=1)


def test_mmd() -> None:
    x, y = unit(64, 2000, 0), unit(64, 2000, 1)
    assert mmd2(x, x).item() == pytest.approx(0, abs=1e-9)
    assert mmd2(x, y).item() == pytest.approx(mmd2(y, x).item())
    assert mmd2(x, y[torch.randperm(64)]).item() == pytest.approx(mmd2(x, y).item())
    assert mmd2(x, y).item() == pytest.approx(0.17, abs=0.03)
    assert 0 <= mmd2(x, -x).item() <= 14
    away = [mmd2(x, F.normalize(x + t * y, dim=1)).item() for t in (0.0, 0.2, 1.0)]
    assert away == sorted(away)
    x.requires_grad_(True)
    (gradient,) = torch.autograd.grad(mmd2(x, x.detach().clone()), x)
    assert torch.isfinite(gradient).all()


def test_without_its_terms_it_is_plain_distillation(float32: Runtime) -> None:
    t: list[nn.Module] = [network(2), network(3, width=4, side=1)]
    alone = Amalgam(t, network(5, seed=9), images(), TASKS, QUICK, float32)
    zero = common(float32, 0.0, 0.0)
    for _ in range(3):
        alone.step()
        zero.step()
    assert same(state(alone.student), state(zero.student))


def test_one_teacher_gives_one_discrepancy_and_one_decoder() -> None:
    torch.manual_seed(0)
    term = CommonSpace(["a", "b"], [4, 6], width=4)
    ours, theirs = torch.rand(8, 4, 3, 3), torch.rand(8, 6, 5, 5)
    found = term([ours], [[theirs]])
    h_s, h_t = term.embed([ours, theirs])
    assert torch.allclose(found["MMD"], mmd2(flat(h_s), flat(h_t)), atol=1e-5)
    rebuilt = F.mse_loss(term.decode[0](h_t), F.adaptive_avg_pool2d(theirs, 3))
    assert torch.allclose(found["reconstruction"], rebuilt)


def test_reconstruction_does_not_reach_the_student(float32: Runtime) -> None:
    method = common(float32)
    term = method.term
    assert isinstance(term, CommonSpace)
    x = method.views.batch(0)
    with torch.no_grad():
        f_t = [ka.look(t, x, at)[1] for t, at in zip(method.teachers, (["4"], ["6"]), strict=True)]
    s = ka.look(method.student, x, ["6"])[1]
    found = term(s, f_t)
    found["reconstruction"].backward(retain_graph=True)
    assert all(p.grad is None for p in method.student.parameters())
    assert term.align[0][0].weight.grad is None  # type: ignore[index]
    found["MMD"].backward()
    assert all(p.grad is not None for p in term.align.parameters())
    assert flat(term.embed([s[0], *(f[0] for f in f_t)])[0]).shape == (8, 4 * 4 * 4)


def test_a_place_without_a_feature_map_is_refused() -> None:
    with pytest.raises(InputError, match="place '9' of teacher 2 gives 3, which is no feature map"):
        CommonSpace.between(teachers(), network(5), places=["6", "6", "9"], x=torch.rand(2, 1, 8, 8))
    with pytest.raises(InputError, match="3 networks need 3 places"):
        CommonSpace.between(teachers(), network(5), places=["6"], x=torch.rand(2, 1, 8, 8))


# Your own


def trained(classes: list[int], runtime: Runtime, seed: int) -> nn.Module:
    """A classifier of some of the classes, whose answers to the others are its own affair."""
    net, part = network(len(classes), width=8, seed=seed), images(100).of_classes(classes)
    optimizer = torch.optim.Adam(net.train().parameters(), 0.01)
    for _ in range(60):
        x, y = part.batch(range(len(part)))
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
    return net.eval()


@pytest.mark.parametrize("kind", ["plain", "common"])
def test_two_classifiers_of_your_own_become_one(kind: str, float32: Runtime) -> None:
    own = [trained([0, 1], float32, 0), trained([2, 3, 4], float32, 1)]
    student, x = network(5, width=8, seed=5), torch.rand(2, 1, 8, 8)
    term = CommonSpace.between(own, student, places=["6", "6", "6"], x=x, width=4) if kind == "common" else None
    blind = ImageSet(images(200, seed=7).images, name="mine", split="train")
    made, classes = amalgamate(
        own, student, blind, classes=[["rust", "moss"], ["lichen", "fern", "ivy"]], term=term,
        n_steps=150, batch_size=32, lr=5e-3, runtime=float32,
    )  # fmt: skip
    assert classes == ["rust", "moss", "lichen", "fern", "ivy"] and not made.training
    test = images(100, seed=8)
    assert test.labels is not None
    found = ensembles.measures(ensembles.predict(made, test, float32), test.labels, TASKS)
    assert found["part 1 known"] > 0.8 and found["part 2 known"] > 0.6
    assert found["union"] > 1.3 / 5


def test_layerwise_learns_before_the_joint_stage(float32: Runtime) -> None:
    own = [trained([0, 1], float32, 0), trained([2, 3, 4], float32, 1)]
    x = torch.rand(2, 1, 8, 8)
    as_chains = [chains.chain(t, x) for t in own]
    student = chains.without_norms(chains.chain(network(5, width=8), x))
    codes = [fa.pca(*m.result(), 8) for m in fa.moments(as_chains, images(), float32)]
    settings = Settings(n_steps=200, batch_size=32, lr=1e-2)
    method = Layerwise(as_chains, student, codes, images(), TASKS, settings, float32)
    result = fit(method, 200, name="layers", progress=False)
    assert result.history[-1]["L_B 4"] < 0.5 * result.history[0]["L_B 4"]
    test = images(100, seed=8)
    assert test.labels is not None
    assert ensembles.measures(ensembles.predict(method.merged(), test, float32), test.labels, TASKS)["union"] > 1.3 / 5


def test_the_part_on_transfer_sets_needs_the_part_whose_students_it_repeats(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["run", "amalgamation", "--plain", "--quiet", "-p", "parts", '["A", "transfer"]', "--out", str(tmp_path)]
    assert main(asked) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "add C to parts" in err
