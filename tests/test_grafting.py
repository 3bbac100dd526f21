"""The verifiable properties of network grafting, and of merging adapters."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import same
from torch import Tensor, nn

from dfkd_lib import data, graft, models, records
from dfkd_lib.data import ImageSet
from dfkd_lib.errors import InputError
from dfkd_lib.measures.evaluation import accuracy
from dfkd_lib.methods import grafting, grafting_blocks
from dfkd_lib.methods.grafting import NetGraft, Settings, Views
from dfkd_lib.methods.grafting_baselines import OBJECTIVES, Whole, WholeSettings
from dfkd_lib.methods.grafting_blocks import Scion
from dfkd_lib.methods.grafting_fskd import aligned, cut_out, fskd
from dfkd_lib.models import adapters, chains
from dfkd_lib.models.chains import STEM, Blocks
from dfkd_lib.reproduction.cli import main
from dfkd_lib.runtime import Runtime
from dfkd_lib.training.fit import fit
from dfkd_lib.training.supervised import Recipe, Supervised

CUTS = ["network.stages.1", "network.stages.2", "network.pool"]
SMALL = Settings(block_steps=(3,), network_steps=3, batch_size=8, lr_block=1e-3, lr_network=1e-3)


def network(name: str, channels: int = 1) -> nn.Module:
    return models.build(name, n_classes=10, in_channels=channels, mean=[0.3] * channels, std=[0.3] * channels)


def shaken(module: nn.Module) -> nn.Module:
    """Every weight, bias and running statistic away from its special first value."""
    for value in module.state_dict().values():
        if value.dtype.is_floating_point:
            value.add_(0.1 * torch.rand_like(value))
    return module


def images(n: int = 12, channels: int = 1, side: int = 8) -> ImageSet:
    pixels = torch.randint(0, 256, (n, channels, side, side), dtype=torch.uint8)
    return ImageSet(pixels, torch.arange(n) % 10, classes=list("0123456789"), name="noise", split="test")


def pair(runtime: Runtime, seed: int = 0) -> tuple[Blocks, list[Scion], Views]:
    torch.manual_seed(seed)
    x = torch.rand(2, 1, 8, 8, dtype=runtime.dtype)
    teacher = chains.cut(shaken(runtime.prepare(network("netgraft_digits"))).eval(), CUTS, x)
    scions = grafting_blocks.scions(teacher, chains.cut(runtime.prepare(network("netgraft_digits_half")), CUTS, x), x)
    return teacher, scions, grafting.look(teacher, images(), runtime, n_views=24, pad=1)


def game(runtime: Runtime, seed: int = 0) -> NetGraft:
    teacher, scions, views = pair(runtime, seed)
    return NetGraft(teacher, scions, views, SMALL, runtime)


@pytest.mark.parametrize(
    ("name", "parameters", "macs"),
    [
        ("netgraft_vgg16", 14_983_498, 313_463_808),
        ("netgraft_vgg16_half", 5_412_682, 226_038_784),
        ("resnet18_half", 2_929_866, 258_673_152),
    ],
)
def test_networks_have_their_size_and_cost(name, parameters, macs):
    with torch.device("meta"):
        module = network(name, channels=3)
    assert models.count_parameters(module) == parameters
    assert models.count_macs(module, (3, 32, 32)) == macs


def test_the_distance_is_that_of_directions():
    s, t = torch.randn(6, 10, dtype=torch.float64, requires_grad=True), torch.randn(6, 10, dtype=torch.float64)
    loss = grafting.distance(s, t)
    assert torch.allclose(loss, 2 * (1 - F.cosine_similarity(s, t)).sum())
    assert torch.allclose(grafting.distance(3 * s, 0.2 * t), loss)
    assert grafting.distance(t, t) == 0
    assert torch.allclose(grafting.distance(-t, t), torch.tensor(24.0, dtype=torch.float64))
    e = torch.eye(10)
    assert torch.allclose(grafting.distance(e[:5], e[5:]), torch.tensor(10.0))
    assert torch.isfinite(grafting.distance(torch.zeros(1, 10), e[:1]))
    loss.backward()
    assert torch.allclose((s.grad * s).sum(1), torch.zeros(6, dtype=torch.float64), atol=1e-12)


def test_few_shots_are_exact_nested_and_repeatable():
    pool = images(60)
    two, four = (grafting.few_shot(pool, k, seed=3) for k in (2, 4))
    assert torch.bincount(pool.labels[four]).tolist() == [4] * 10
    assert set(two.tolist()) < set(four.tolist())
    assert torch.equal(two, grafting.few_shot(pool, 2, seed=3))
    assert not torch.equal(two, grafting.few_shot(pool, 2, seed=4))
    with pytest.raises(InputError, match="K must be 1 to that, not 7"):
        grafting.few_shot(pool, 7, seed=0)
    unlabelled = ImageSet(pool.images, name="mine", split="all")
    with pytest.raises(InputError, match="no class labels"):
        grafting.few_shot(unlabelled, 1, seed=0)


def test_the_teachers_own_blocks_change_nothing(float32):
    teacher, _, views = pair(float32)
    own = [Scion(name, copy.deepcopy(block), None, None) for name, block in teacher.items()][1:]
    rest = list(teacher.values())[1:]
    expected = chains.through(rest, views.inputs)
    for start in range(3):
        for stop in range(start + 1, 4):
            z = chains.through([*rest[:start], *own[start:stop], *rest[stop:]], views.inputs)
            assert torch.equal(z, expected)
    assert torch.equal(expected, views.logits)


def test_looking_at_shapes_leaves_every_mode_alone(float32):
    torch.manual_seed(0)
    x = torch.rand(2, 1, 8, 8)
    teacher, student = network("resnet18").eval(), network("resnet18_half")
    before = copy.deepcopy(teacher.state_dict())
    cuts = [CUTS[0], CUTS[2]]
    grafting_blocks.scions(chains.cut(teacher, cuts, x), chains.cut(student, cuts, x), x)
    assert not any(module.training for module in teacher.modules())
    assert all(module.training for module in student.modules())
    assert same(before, teacher.state_dict())


def test_phases_go_through_stage_one_and_two(float32):
    phases = grafting.schedule(["a", "b", "c"], Settings(block_steps=(5, 6, 7), network_steps=9))
    assert [(p.start, p.stop, p.n_steps) for p in phases] == [(0, 1, 5), (1, 2, 6), (2, 3, 7), (0, 2, 9), (0, 3, 9)]
    method = game(float32)
    assert method.n_steps == 15
    assert [method._phase_of(step)[0].name for step in (0, 2, 3, 9, 14)] == [
        "block network.stages.1", "block network.stages.1", "block network.stages.2", "up to network.stages.2",
        "up to network.pool",
    ]  # fmt: skip
    with pytest.raises(InputError, match="2 numbers for 3 blocks"):
        grafting.schedule(["a", "b", "c"], Settings(block_steps=(5, 6)))


def test_defaults_are_the_published_values_and_the_rule_of_k_holds_for_the_baselines_too():
    ours, whole = Settings(), WholeSettings("KD", lr=2e-3)
    assert (ours.block_steps, ours.network_steps, ours.batch_size) == ((200, 120, 120), 200, 64)
    assert (ours.lr_block, ours.lr_adapter, ours.lr_network) == (2.5e-4, 2.5e-3, 1e-4)
    assert ours.normalise and ours.adapters_learn
    assert ours.for_shots(10) == ours and whole.for_shots(10) == whole
    for k in (1, 2, 3, 4, 5, 7, 20, 50):
        few, few_whole = ours.for_shots(k), whole.for_shots(k)
        assert few.batch_size == few_whole.batch_size == int(6.4 * k)
        assert (few.lr_block, few.lr_adapter, few.lr_network) == pytest.approx((2.5e-5 * k, 2.5e-4 * k, 1e-4))
        assert few_whole.lr == pytest.approx(2e-4 * k)
        assert (few_whole.n_steps, few.network_steps) == (whole.n_steps, ours.network_steps)
    assert Settings(batch_size=8).for_shots(1).batch_size == 2
    for settings in (ours, whole):
        with pytest.raises(InputError, match="K must be 1 or more images per class, not 0"):
            settings.for_shots(0)


def test_stage_two_may_stand_alone(float32):
    alone = replace(SMALL, block_steps=(0,))
    method = NetGraft(*pair(float32), alone, float32)
    assert [(p.start, p.stop, p.n_steps) for p in method.phases] == [(0, 2, 3), (0, 3, 3)]
    before = [copy.deepcopy(scion.state_dict()) for scion in method.scions]
    method.step()
    assert [same(was, now.state_dict()) for was, now in zip(before, method.scions, strict=True)] == [False, False, True]
    assert {group["lr"] for group in method.optimizer.param_groups} == {SMALL.lr_network}
    with pytest.raises(InputError, match="a single block learns in stage 1 alone"):
        grafting.schedule(["a"], alone)
    with pytest.raises(InputError, match="block_steps"):
        Settings(block_steps=(3, 0, 3))


def test_adapters_may_stay_as_they_were_drawn(float32):
    method = NetGraft(*pair(float32), replace(SMALL, adapters_learn=False), float32)
    before = copy.deepcopy(method.scions)
    for _ in range(method.n_steps):
        method.step()
    for old, scion in zip(before, method.scions, strict=True):
        assert all(torch.equal(p, q) for p, q in zip(old.adapters(), scion.adapters(), strict=True))
        assert not same(old.body.state_dict(), scion.body.state_dict())
    assert sum(len(scion.adapters()) for scion in method.scions) > 0


def test_only_the_grafted_scion_learns_and_the_teacher_stays(float32):
    method = game(float32)
    teacher = [copy.deepcopy(block.state_dict()) for block in method.teacher]
    for step in range(method.n_steps):
        before = [copy.deepcopy(scion.state_dict()) for scion in method.scions]
        method.step()
        phase, _ = method._phase_of(step)
        for i, (was, scion) in enumerate(zip(before, method.scions, strict=True)):
            assert same(was, scion.state_dict()) is not (phase.start <= i < phase.stop)
    assert all(same(was, block.state_dict()) for was, block in zip(teacher, method.teacher, strict=True))
    assert all(p.grad is None for block in method.teacher for p in block.parameters())
    middle = method.scions[1]
    parts = (middle.a_in, middle.body, middle.a_out)
    assert all(any(p.grad.abs().sum() > 0 for p in part.parameters()) for part in parts)


def test_a_student_classifier_can_equal_its_teachers(float64):
    """Both are affine, and of rank C at most: the singular value decomposition gives the weights."""
    teacher, scions, views = pair(float64)
    f = chains.through(list(teacher.values())[1:-1], views.inputs)
    block, scion = list(teacher.values())[-1], scions[-1]
    zero, unit = torch.zeros(1, 128, 1, 1).to(f), torch.eye(128).view(128, 128, 1, 1).to(f)
    c = block(zero)
    u, s, vh = torch.linalg.svd((block(unit) - c).T, full_matrices=False)
    hidden, last = scion.body[1], scion.body[2]
    for value in scion.parameters():
        nn.init.zeros_(value)
    with torch.no_grad():
        scion.a_in.weight[:10] = vh[..., None, None]
        hidden.weight[:10, :10] = s.diag()
        last.weight[:, :10] = u
        last.bias[:] = c[0]
    assert torch.allclose(scion(f), views.logits)
    assert grafting.distance(scion(f), views.logits) < 1e-12


def test_kept_features_give_the_loss_of_two_full_passes(float64):
    method = game(float64)
    for _ in range(4):
        method.step()
    phase, _ = method._phase_of(3)
    assert phase.start == 1
    rest = method.teacher
    grafted = chains.through([rest[0], method.scions[1], rest[2]], method.views.inputs)
    kept = chains.through([*method.learning, *method.behind], method.inputs)
    assert torch.allclose(grafted, kept, atol=1e-12)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_baselines_learn(float32, objective):
    whole = Whole(*pair(float32), WholeSettings(objective, n_steps=4, batch_size=8), float32)
    before = copy.deepcopy(whole.scions.state_dict())
    for _ in range(4):
        assert torch.isfinite(whole.step()["loss"])
    assert not same(before, whole.scions.state_dict())


def test_alignment_is_the_least_squares_solution(float64):
    torch.manual_seed(0)
    x, y = torch.randn(5, 3, 4, 2, dtype=torch.float64), torch.randn(5, 3, 4, 2, dtype=torch.float64)
    a, b = (f.permute(0, 2, 3, 1).reshape(-1, 3) for f in (x, y))
    by_hand = torch.linalg.lstsq(torch.cat([a, torch.ones_like(a[:, :1])], 1), b).solution
    q, offset = aligned(x, y, ridge=0.0)
    assert torch.allclose(q, by_hand[:-1].T) and torch.allclose(offset, by_hand[-1])
    a, b = a - a.mean(0), b - b.mean(0)
    held = 0.3 * a.square().mean() * len(a) * torch.eye(3, dtype=torch.float64)
    assert torch.allclose(aligned(x, y, ridge=0.3)[0].T, torch.linalg.inv(a.T @ a + held) @ (a.T @ b + held))
    assert torch.allclose(aligned(x, y, ridge=1e9)[0], torch.eye(3, dtype=torch.float64), atol=1e-6)
    assert torch.allclose(aligned(x, x)[0], torch.eye(3, dtype=torch.float64))


def tiny_blocks(width: int, seed: int, norm: bool = False) -> Blocks:
    torch.manual_seed(seed)
    norms = [nn.BatchNorm2d(width)] if norm else []
    net = nn.Sequential(
        nn.Conv2d(2, width, 3, padding=1), *norms, nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(4 * width, 3)
    )
    at = 3 + len(norms)
    return {STEM: nn.Conv2d(1, 2, 1), "a": net[:at], "b": net[at:]}


def test_fskd_mends_each_block_by_least_squares(float64):
    teacher = {name: shaken(block.double()).eval() for name, block in tiny_blocks(6, 0, norm=True).items()}
    x = torch.rand(2, 1, 4, 4, dtype=torch.float64)
    scions = grafting_blocks.scions(teacher, {n: b.double() for n, b in tiny_blocks(4, 1).items()}, x)
    views = grafting.look(teacher, images(30, side=4), float64)
    before = copy.deepcopy(nn.ModuleList(scions).state_dict())
    made = fskd(teacher, scions, views, float64, ridge=0.0)
    assert same(before, nn.ModuleList(scions).state_dict())

    conv, norm = teacher["a"][0], teacher["a"][1]
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    weight = conv.weight * scale.view(-1, 1, 1, 1)
    kept = sorted(weight.abs().sum((1, 2, 3)).topk(4).indices.tolist())
    bare = F.conv2d(views.inputs, weight[kept], padding=1)
    wanted = teacher["a"][:2](views.inputs)[:, kept]
    assert torch.allclose(made.features(views.inputs)[0], fitted_by_hand(bare, wanted))
    read = nn.Sequential(nn.ReLU(), nn.MaxPool2d(2), nn.Flatten())(made.features(views.inputs)[0])
    columns = [4 * k + i for k in kept for i in range(4)]
    head = teacher["b"][1]
    assert torch.allclose(made(views.inputs), fitted_by_hand(read @ head.weight[:, columns].T, views.logits))


def fitted_by_hand(x: Tensor, y: Tensor) -> Tensor:
    a, b = (f.detach().movedim(1, -1).flatten(0, -2) for f in (x, y))
    a = torch.cat([a, torch.ones_like(a[:, :1])], 1)
    return (a @ torch.linalg.lstsq(a, b).solution).unflatten(0, x.movedim(1, -1).shape[:-1]).movedim(-1, 1)


def test_a_student_of_the_teachers_widths_is_the_teacher(float64):
    teacher = {name: shaken(block.double()).eval() for name, block in tiny_blocks(6, 0, norm=True).items()}
    x = torch.rand(2, 1, 4, 4, dtype=torch.float64)
    scions = grafting_blocks.scions(teacher, {n: b.double() for n, b in tiny_blocks(6, 1).items()}, x)
    views = grafting.look(teacher, images(20, side=4), float64)
    assert torch.allclose(fskd(teacher, scions, views, float64)(views.inputs), views.logits)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_fskd_mends_in_16_bits_too(precision):
    runtime = Runtime.choose("cpu", precision, seed=0)
    teacher = {n: runtime.prepare(shaken(b)).eval() for n, b in tiny_blocks(6, 0, norm=True).items()}
    x = runtime.images(torch.rand(2, 1, 4, 4))
    scions = grafting_blocks.scions(teacher, tiny_blocks(6, 1), x)
    views = grafting.look(teacher, images(40, side=4), runtime)
    made = fskd(teacher, scions, views, runtime)(views.inputs.float()).detach()
    assert float((made - views.logits).abs().max()) < 0.05 * float(views.logits.abs().max())


def test_what_cannot_be_cut_out_of_the_teacher_is_refused(float32):
    x = torch.rand(2, 2, 4, 4)
    theirs, normed, other = (
        chains.chain(nn.Sequential(*[*blocks.values()][1:]).eval(), x)
        for blocks in (tiny_blocks(6, 0), tiny_blocks(4, 1, norm=True), tiny_blocks(8, 1))
    )
    for ours in (normed, other):
        with pytest.raises(InputError, match=r"layer '0.0' cannot be cut out"):
            cut_out(theirs, ours, 2)
    with pytest.raises(InputError, match="2 layers and the student 1"):
        cut_out(theirs, chains.chain(nn.Sequential(nn.Flatten(), nn.Linear(32, 3)), x), 2)


def test_two_adapters_compose_to_one_of_low_rank(float64):
    torch.manual_seed(0)
    out, into = (shaken(adapters.adapter(*sizes, 4).double()) for sizes in ((3, 8), (8, 5)))
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    matrix, bias = adapters.compose(adapters.affine(out), adapters.affine(into))
    assert torch.allclose(into(out(x)), torch.einsum("mc,bchw->bmhw", matrix, x) + bias.view(1, -1, 1, 1))
    assert torch.linalg.matrix_rank(matrix) <= 3


@pytest.mark.parametrize("side", [1, 2, 3, 7])
@pytest.mark.parametrize(("stride", "padding", "kernel"), [(1, 1, 3), (2, 1, 3), (2, 0, 1), (1, 2, 5)])
def test_the_exact_fold_holds_at_the_border_and_the_naive_one_inside(side, stride, padding, kernel):
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 4, kernel, stride, padding).double()
    matrix, bias = torch.randn(6, 3, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    x = torch.randn(2, 3, side, side, dtype=torch.float64)
    expected = conv(torch.einsum("mc,bchw->bmhw", matrix, x) + bias.view(1, -1, 1, 1))
    exact = adapters.fold(conv, matrix, bias)
    assert torch.allclose(exact(x), expected, atol=1e-12)
    naive = adapters.fold_naively(conv, matrix, bias)(x)
    if side == 7 and padding and stride == 1:
        inside = (..., slice(padding, -padding), slice(padding, -padding))
        assert torch.allclose(naive[inside], expected[inside], atol=1e-12)
        assert (naive - expected).abs().max() > 0.1
    if not padding:
        assert torch.allclose(naive, expected, atol=1e-12)


def test_a_linear_layer_behind_a_flattening_absorbs(float64):
    torch.manual_seed(0)
    block = nn.Sequential(nn.Flatten(), nn.Linear(6 * 4, 5)).double()
    matrix, bias = torch.randn(6, 3, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    x = torch.randn(2, 3, 2, 2, dtype=torch.float64)
    merged = adapters.absorb(block, matrix, bias, x, name="head")
    assert torch.allclose(merged(x), block(torch.einsum("mc,bchw->bmhw", matrix, x) + bias.view(1, -1, 1, 1)))


@pytest.mark.parametrize("names", [("netgraft_digits", "netgraft_digits_half"), ("resnet18", "resnet18_half")])
def test_the_merged_student_has_no_adapter_and_the_same_outputs(float32, names):
    torch.manual_seed(0)
    cuts = [f"network.stages.{i}" for i in ((1, 2) if "digits" in names[0] else (1, 2, 3))] + ["network.pool"]
    x = torch.rand(4, 1, 8, 8)
    teacher = chains.cut(shaken(network(names[0])).eval(), cuts, x)
    scions = grafting_blocks.scions(teacher, chains.cut(network(names[1]), cuts, x), x)
    for scion in scions:
        shaken(scion).eval()
    unmerged = nn.Sequential(teacher[STEM], *scions)
    merged = grafting_blocks.merge(teacher[STEM], scions, teacher[STEM](x))
    with torch.no_grad():
        expected, ours = unmerged(x), merged(x)
    assert (expected - ours).abs().max() <= 1e-5 * expected.abs().max()
    assert not any(isinstance(module, Scion) for module in merged.modules())
    assert models.count_parameters(merged) < models.count_parameters(unmerged)
    small, large = (models.count_parameters(nn.Sequential(*part[1:])) for part in (merged, unmerged))
    assert small < large


class Theirs(nn.Module):
    """A class that the library does not know."""

    def __init__(self, width: int, pool: nn.Module | None = None) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(4, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
            pool or nn.Identity(), nn.Conv2d(width, width, 3, padding=1), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def test_networks_of_a_class_of_ones_own_are_grafted(float32):
    torch.manual_seed(0)
    teacher, unlabelled = shaken(Theirs(8)), ImageSet(images().images, name="mine", split="all")
    quick = {"block_steps": (3,), "network_steps": 3, "batch_size": 8, "n_views": 16}
    student = graft(teacher, Theirs(4), unlabelled, at=["body.3", "body.6", "head"], runtime=float32, **quick)
    assert student(torch.rand(3, 1, 8, 8)).shape == (3, 10)
    assert [name for name, _ in student.named_children()] == [STEM, "body_3", "body_6", "head"]
    assert models.count_parameters(student) < models.count_parameters(Theirs(4)) + 100
    x = torch.rand(2, 1, 8, 8)
    as_blocks = [chains.cut(net, ["body.3", "head"], x) for net in (teacher, Theirs(4))]
    assert graft(*as_blocks, unlabelled, runtime=float32, **quick)(x).shape == (2, 10)


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x)


def test_what_does_not_fit_is_refused_by_the_name_of_the_block(float32):
    x = torch.rand(2, 1, 8, 8)

    def scions(teacher: nn.Module, student: nn.Module, at: list[str], at_student: list[str] | None = None) -> None:
        grafting_blocks.scions(chains.cut(teacher, at, x), chains.cut(student, at_student or at, x), x)

    with pytest.raises(InputError, match=r"block 'body.3': its output is 8x4x4 .* 4x2x2 .* equal resolutions"):
        scions(Theirs(8), Theirs(4, nn.MaxPool2d(2)), ["body.3", "head"])
    with pytest.raises(InputError, match=r"block 'body.6' cannot absorb an adapter"):
        scions(Theirs(8, nn.MaxPool2d(2)), Theirs(4, nn.MaxPool2d(2)), ["body.6"])
    with pytest.raises(InputError, match=r"block 'body.6' cannot absorb an adapter"):
        scions(Theirs(8, Residual(8)), Theirs(4, Residual(4)), ["body.6"])
    with pytest.raises(InputError, match="3 blocks and the student 2"):
        scions(Theirs(8), Theirs(4), ["body.3", "head"], ["head"])
    with pytest.raises(InputError, match=r"unknown place to cut 'body.99'"):
        chains.cut(Theirs(8), ["body.99"], x)
    with pytest.raises(InputError, match="in the order of the network"):
        chains.cut(Theirs(8), ["head", "body.3"], x)
    with pytest.raises(InputError, match="more in forward than apply its children"):
        chains.cut(network("quick_net_half"), ["network.classifier"], torch.rand(2, 1, 16, 16))
    other = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Linear(8, 7))
    with pytest.raises(InputError, match="same classes"):
        scions(nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Linear(8, 10)), other, ["2"])
    with pytest.raises(InputError, match="unknown objective"):
        WholeSettings("hope")
    with pytest.raises(InputError, match="block_steps"):
        Settings(block_steps=())


def test_grafting_few_digits_teaches_the_student(float32):
    train, test = data.load("digits", "fit", image_size=8), data.load("digits", "held_out", image_size=8)
    torch.manual_seed(0)
    teacher = network("netgraft_digits")
    recipe = Recipe(epochs=5, batch_size=64, lr=0.02, nesterov=True, schedule="one-cycle")
    method = Supervised(teacher, train, recipe, float32)
    for _ in range(method.n_steps):
        method.step()
    settings = Settings(
        block_steps=(25,), network_steps=30, batch_size=32, lr_block=1e-3, lr_adapter=1e-2, lr_network=1e-3
    )
    few = train.take(grafting.few_shot(train, 5, seed=0))
    x = few.batch(range(2))[0]
    blocks = chains.cut(teacher.eval(), CUTS, x)
    views = grafting.look(blocks, few, float32, n_views=512, pad=1, flip=False)
    scions = grafting_blocks.scions(blocks, chains.cut(network("netgraft_digits_half"), CUTS, x), x)
    graft = NetGraft(blocks, scions, views, settings, float32)
    first = float(graft.step()["loss"])
    fit(graft, graft.n_steps - 1, name="digits", progress=False)
    z = chains.through(graft.scions, views.inputs).detach()
    assert float(grafting.distance(z, views.logits)) / 512 < first / 2
    assert accuracy(grafting_blocks.merge(blocks[STEM], scions, views.inputs), test, float32) > 0.6


def test_the_chapter_with_a_teacher_of_all_images_and_a_student_cut_elsewhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = {
        "book_teacher": "true", "few_teacher_steps": "0", "shots": "[1]", "detail_k": "1", "draws": "1",
        "baselines": '["KD"]', "baseline_draws": "1", "n_views": "20", "full_views": "64", "block_steps": "[2]",
        "network_steps": "2",
        "student_cuts": '["network.stages.1.0", "network.stages.2.0", "network.pool"]',
    }  # fmt: skip

    def run(folder: str, **changed: str) -> int:
        words = [word for pair in (values | changed).items() for word in ("-p", *pair)]
        return main(["run", "grafting", "--plain", "--quiet", "--out", str(tmp_path / folder), *words])

    assert run("whole") == 0
    record = records.read(tmp_path / "whole")
    rows = {key.split("/")[1] for key in record["metrics"] if key.startswith("seen/")}
    assert rows == {"seen images"} and record["teachers"][0]["recipe"]["epochs"] == 20
    assert {"raw logits", "stage 2 alone", "frozen adapters"} < {
        key.split("/")[1] for key in record["metrics"] if key.startswith("ablation/")
    }
    capsys.readouterr()
    assert run("cut", student_cuts='["network.stages.1", "network.pool"]') == 2
    assert "the teacher has 4 blocks and the student 3" in capsys.readouterr().err
