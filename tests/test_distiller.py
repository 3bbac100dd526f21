"""What all data-free methods share, shown on two that do as little as they can."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from conftest import classifier, same, snapshot
from torch import Tensor, nn

from dfkd_lib import losses
from dfkd_lib.checking import n_logits
from dfkd_lib.errors import InputError
from dfkd_lib.methods.distiller import BankDistiller, Distillation, Distiller
from dfkd_lib.runtime import Runtime
from dfkd_lib.training.fit import fit

SHAPE = (1, 8, 8)
PLAN = Distillation(batch_size=8, kd_steps=3, lr_student=0.05)


class Noise(Distiller):
    """Its images are noise, its synthesis is a pass of both networks; the first `warmup` calls are without student."""

    warmup = 0

    @property
    def warming_up(self) -> bool:
        return self.calls < self.warmup

    def synthesize(self) -> dict[str, Tensor]:
        self.during = {
            "training": self.student.training,
            "learns": any(p.requires_grad for p in self.student.parameters()),
        }
        x = self.sample(4).requires_grad_()
        t, _ = self.look(x)
        losses.kl(self.opinion(x), t).backward()
        assert x.grad is not None and x.grad.abs().sum() > 0, "gradients do reach the images"
        self.budget.images += 4
        self.budget.teacher_passes += 4
        return {"value": x.detach().mean()}

    def count_update(self) -> None:
        super().count_update()
        self.budget.images += self.distillation.batch_size

    def sample(self, n: int) -> Tensor:
        return self.draw_noise(n, 64).view(n, *SHAPE).sigmoid()

    def pictures(self, n: int) -> Tensor:
        return torch.full((n, *SHAPE), 0.5)


class Storing(BankDistiller):
    """Stores four images per call."""

    newest_call = 4

    def synthesize(self) -> dict[str, Tensor]:
        self.store(self.draw_noise(4, 64).view(4, *SHAPE).sigmoid())
        return {}


def networks(seed: int = 0) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(seed)
    return classifier(8), classifier(4)


def noise(runtime: Runtime, plan: Distillation = PLAN, seed: int = 0) -> Noise:
    return Noise(*networks(seed), SHAPE, plan, runtime)


def storing(runtime: Runtime, plan: Distillation = PLAN, seed: int = 0, **bank: Any) -> Storing:
    return Storing(*networks(seed), SHAPE, plan, runtime, **{"bank_size": 10, "pad": 1, "flip": False} | bank)


# --- one outer iteration ------------------------------------------------------------------------------------------


def test_while_images_are_made_the_student_neither_learns_nor_takes_statistics(float32):
    method = noise(float32)
    before, weights = snapshot(method.student), list(method.student.parameters())
    method.warmup = 1
    method.step()
    assert method.during == {"training": False, "learns": False}
    assert same(before, snapshot(method.student)) and all(p.grad is None for p in weights)
    assert method.student.training and all(p.requires_grad for p in weights)


def test_the_teacher_is_frozen_and_never_changes(float32):
    method = noise(float32)
    before = snapshot(method.teacher)
    for _ in range(4):
        method.step()
    assert same(before, snapshot(method.teacher)) and not method.teacher.training
    assert all(p.grad is None and not p.requires_grad for p in method.teacher.parameters())


def test_an_iteration_counts_what_it_spends(float32):
    method = noise(float32)
    for _ in range(4):
        method.step()
    budget = method.budget
    assert method.calls == 4 and budget.student_updates == 12
    assert budget.teacher_passes == budget.images == 4 * (4 + 3 * 8)
    assert budget.synthesis_seconds > 0 and budget.distillation_seconds > 0
    steps = {int(state["momentum_buffer"].isfinite().all()) for state in method.student_optimizer.state.values()}
    assert steps == {1}


def test_the_warm_up_spends_nothing_on_the_student(float32):
    method = noise(float32)
    method.warmup = 2
    metrics = [method.step() for _ in range(3)]
    assert ["distillation loss" in m for m in metrics] == [False, False, True]
    assert method.budget.student_updates == 3 and method.calls == 3


def test_the_student_descends_the_softened_divergence(float64):
    """One update by hand."""
    plan = replace(PLAN, kd_steps=1, temperature=4.0, momentum=0.0, weight_decay=0.0)
    method = noise(float64, plan)
    x = torch.rand(8, *SHAPE, dtype=torch.float64)
    method.sample = lambda n: x
    twin, student = copy.deepcopy(method.student), method.student
    loss = losses.kl(twin(x), method.teacher(x), 4.0)
    loss.backward()
    assert float(method.imitate()) == pytest.approx(loss.item())
    for mine, theirs in zip(student.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(mine, theirs - 0.05 * theirs.grad, atol=1e-12)


def test_a_cosine_takes_the_learning_rate_to_zero_over_the_updates(float32):
    method = noise(float32, replace(PLAN, n_updates=6))
    rates = []
    for _ in range(8):
        method.imitate()
        rates.append(method.student_optimizer.param_groups[0]["lr"])
    expected = [0.05 * (1 + math.cos(math.pi * i / 6)) / 2 for i in range(6)]
    assert rates == pytest.approx([*expected, 0.0, 0.0])
    before = [p.detach().clone() for p in method.student.parameters()]
    method.imitate()
    assert all(torch.equal(a, b) for a, b in zip(before, method.student.parameters(), strict=True))


def test_without_a_length_the_learning_rate_stays(float32):
    method = noise(float32)
    for _ in range(4):
        method.step()
    assert method.student_optimizer.param_groups[0]["lr"] == 0.05


def test_warm_up_calls_leave_the_schedule_alone(float32):
    """It follows the student's updates, not the calls."""
    method = noise(float32, replace(PLAN, n_updates=6))
    method.warmup = 5
    for _ in range(6):
        method.step()
    assert method.student_optimizer.param_groups[0]["lr"] == pytest.approx(0.05 * (1 + math.cos(math.pi * 2 / 6)) / 2)


def test_metrics_are_detached_scalars(float32):
    metrics = noise(float32).step()
    assert all(m.ndim == 0 and not m.requires_grad for m in metrics.values())


# --- draws, pictures, state ---------------------------------------------------------------------------------------


def test_targets_are_sorted_classes_of_the_teacher(float32):
    targets = noise(float32).draw_targets(400)
    assert targets.dtype == torch.int64 and torch.equal(targets, targets.sort().values)
    assert set(targets.tolist()) == set(range(5))


def test_seeds_decide_the_run():
    def run(seed: int) -> list[float]:
        method = noise(Runtime.choose("cpu", "float32", seed=seed))
        return [float(method.step()["distillation loss"]) for _ in range(3)]

    assert run(0) == run(0) and run(0) != run(1)


@pytest.mark.parametrize("build", [noise, storing])
def test_watching_changes_nothing(float32, build):
    watched, other = build(float32), build(float32)
    for _ in range(3):
        seen = watched.watch(6)
        assert seen["images"].shape == (6, *SHAPE) and seen["teacher"].shape == seen["student"].shape == (6,)
        assert watched.student.training
        watched.step()
        other.step()
    assert same(snapshot(watched.student), snapshot(other.student))


@pytest.mark.parametrize("build", [noise, storing])
def test_a_resumed_run_equals_an_uninterrupted_one(float32, tmp_path, build):
    plan = replace(PLAN, n_updates=15)
    whole = build(float32, plan)
    fit(whole, 5, name="run", progress=False)
    first = build(float32, plan)
    for _ in range(2):
        first.step()
    from dfkd_lib.training import checkpoints

    checkpoints.save(tmp_path / "state", first.state_dict())
    second = build(float32, plan, seed=9)
    second.load_state_dict(checkpoints.load(tmp_path / "state"))
    assert second.calls == 2
    second.teacher.load_state_dict(first.teacher.state_dict())
    for _ in range(3):
        second.step()
    assert same(snapshot(whole.student), snapshot(second.student))
    assert second.budget.student_updates == whole.budget.student_updates == 15
    assert second.budget.images == whole.budget.images
    assert second.budget.synthesis_seconds > first.budget.synthesis_seconds


def test_a_method_has_to_say_how_it_makes_images(float32):
    with pytest.raises(TypeError, match=r"abstract methods .*pictures.*, .*sample.*, .*synthesize"):
        Distiller(*networks(), SHAPE, PLAN, float32)
    with pytest.raises(TypeError, match="newest_call"):
        BankDistiller(*networks(), SHAPE, PLAN, float32)


# --- with a bank --------------------------------------------------------------------------------------------------


def test_stored_images_are_counted_once_and_kept_up_to_the_size(float32):
    method = storing(float32)
    for _ in range(4):
        method.step()
    assert method.budget.images == 16 and len(method.bank) == 10
    assert method.budget.teacher_passes == 4 * 3 * 8


def test_the_student_sees_shifted_images_of_the_bank(float32):
    method = storing(float32)
    method.store(torch.full((4, *SHAPE), 0.2))
    x = method.sample(64)
    assert x.shape == (64, *SHAPE) and x.dtype == torch.float32
    assert set(x.unique().mul(255).round().tolist()) == {0, 51}, "what comes in from outside is zero"
    flat = storing(float32, pad=0)
    flat.store(torch.full((4, *SHAPE), 0.2))
    assert flat.sample(8).unique().mul(255).round().tolist() == [51]


def test_pictures_are_of_the_newest_call_and_grey_before_it(float32):
    method = storing(float32)
    assert method.pictures(3).unique().tolist() == [0.5]
    method.store(torch.zeros(4, *SHAPE))
    method.store(torch.linspace(0.2, 0.8, 4).view(4, 1, 1, 1).expand(4, *SHAPE))
    shown = method.pictures(2)[:, 0, 0, 0]
    assert shown.tolist() == pytest.approx([0.2, 0.8], abs=1e-6)
    assert method.pictures(4).shape == (4, *SHAPE)


# --- what it refuses ----------------------------------------------------------------------------------------------


class Answers(nn.Module):
    """A network with a fixed answer, or a failure."""

    def __init__(self, answer: Any) -> None:
        super().__init__()
        self.answer = answer
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Any:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ((torch.zeros(2, 3),), "returns a tuple, not one tensor of logits; wrap it"),
        ({"logits": torch.zeros(2, 3)}, "returns a dict"),
        (None, "returns a NoneType"),
        (torch.zeros(2, 3, 4, 4), r"returns \[2, 3, 4, 4\] for 2 images of shape 1x8x8, not logits \[2, K\]"),
        (torch.zeros(2), "not logits"),
        (torch.zeros(3, 4), "not logits"),
        (torch.zeros(2, 1), "not logits"),
        (torch.zeros(2, 3, dtype=torch.int64), r"returns \[2, 3\] of torch.int64 for 2"),
        (torch.full((2, 3), float("nan")), "NaN or infinite logits; check its weights"),
        (torch.full((2, 3), float("inf")), "NaN or infinite"),
        (RuntimeError("mat1 and mat2\nshapes"), "fails on images of shape 1x8x8: mat1 and mat2$"),
        (AssertionError("Wrong image height!"), "fails on images of shape 1x8x8: Wrong image height!"),
        (AssertionError(), "fails on images of shape 1x8x8: AssertionError"),
        (TypeError("missing argument"), "fails on images of shape 1x8x8: missing argument"),
        (InputError("too small"), "fails on images of shape 1x8x8: too small"),
    ],
)
def test_a_network_that_gives_no_logits_is_told_so(float32, answer, said):
    network = Answers(answer)
    with pytest.raises(InputError, match=f"^the teacher .*{said}"):
        n_logits(network, SHAPE, float32, "teacher")
    assert network.training


def test_logits_are_counted_without_touching_running_statistics(float32):
    network = classifier(8).train()
    before = snapshot(network)
    assert n_logits(network, SHAPE, float32, "student") == 5
    assert same(before, snapshot(network)) and network.training


def test_players_that_do_not_fit_are_refused(float32):
    teacher, student = networks()
    with pytest.raises(InputError, match="the same network; give the student its own"):
        Noise(teacher, teacher, SHAPE, PLAN, float32)
    with pytest.raises(InputError, match="the student has 3 classes and the teacher 5; build the student with 5"):
        Noise(teacher, classifier(4, 3), SHAPE, PLAN, float32)
    with pytest.raises(InputError, match=r"^the teacher fails on images of shape 3x8x8"):
        Noise(teacher, student, (3, 8, 8), PLAN, float32)
    with pytest.raises(InputError, match=r"^the student returns a tuple"):
        Noise(teacher, Answers((1,)), SHAPE, PLAN, float32)


@pytest.mark.parametrize("bad", [{"batch_size": 1}, {"kd_steps": 0}, {"temperature": 0.0}, {"lr_student": -1.0}])
def test_bad_settings_are_named(bad):
    with pytest.raises(InputError, match=next(iter(bad))):
        Distillation(**bad)


def test_a_subclass_adds_settings_and_parts(float32):
    @dataclass(frozen=True)
    class More(Distillation):
        extra: int = 3

    class Counting(Noise):
        PARTS: ClassVar[tuple[str, ...]] = (*Noise.PARTS, "count")
        count = 0

    method = Counting(*networks(), SHAPE, More(batch_size=8), float32)
    method.count = 5
    other = Counting(*networks(), SHAPE, More(batch_size=8), float32)
    other.load_state_dict(method.state_dict())
    assert other.count == 5
