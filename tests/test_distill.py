"""The one call, on networks that the library has never seen."""

from __future__ import annotations

import copy
import json
import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_model
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, ResNet

import dfkd_lib
from dfkd_lib import checking, compiling, data, distillers, distilling, lending, models, records
from dfkd_lib.data import ImageSet
from dfkd_lib.errors import DFKDError, InputError
from dfkd_lib.measures.evaluation import accuracy
from dfkd_lib.methods.dfad import DFAD
from dfkd_lib.methods.one_stage import OneStageDFAD
from dfkd_lib.runtime import Runtime
from dfkd_lib.teachers import RECIPES
from dfkd_lib.training.fit import fit
from dfkd_lib.training.supervised import Supervised

SHAPE = (1, 8, 8)
QUICK = {
    "image_shape": SHAPE, "num_classes": 5, "n_updates": 4, "device": "cpu", "precision": "float32", "progress": False,
    "batch_size": 8, "latent_dim": 8, "ngf": 4,
}  # fmt: skip
FAST = QUICK | {"kd_steps": 2, "g_steps": 2, "synthesis_batch": 10, "warmup": 1}
ONE_DFAD = QUICK | {"k": 2}


class Functional(nn.Module):
    """All in `forward`, one batch-norm layer used twice, layers registered in an order of their own."""

    def __init__(self, width: int = 8, n_classes: int = 5) -> None:
        super().__init__()
        self.last = nn.Linear(4 * width, n_classes)
        self.norm = nn.BatchNorm2d(width)
        self.first = nn.Conv2d(1, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        x = F.relu(self.norm(self.first(x)))
        x = x + F.relu(self.norm(self.second(x)))
        return self.last(F.adaptive_avg_pool2d(F.dropout(x, 0.1, self.training), 2).flatten(1))


class Two(nn.Module):
    """Two convolutions, each with a batch norm of its own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.norm1 = nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width)
        self.second, self.norm2 = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), nn.BatchNorm2d(2 * width)
        self.last = nn.Linear(8 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm2(self.second(F.relu(self.norm1(self.first(x))))))
        return self.last(F.adaptive_avg_pool2d(x, 2).flatten(1))


class Attention(nn.Module):
    """A vision transformer of two layers: layer norm, no batch norm."""

    def __init__(self, width: int = 16, n_classes: int = 5) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 4, stride=4)
        layer = nn.TransformerEncoderLayer(width, 2, 2 * width, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(width, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        torch._assert(x.shape[-1] == 8, f"Wrong image width! Expected 8 but got {x.shape[-1]}!")
        return self.head(self.encoder(self.patches(x).flatten(2).transpose(1, 2)).mean(1))


class Returning(nn.Module):
    """A network whose output is something else."""

    def __init__(self, wrap: Any) -> None:
        super().__init__()
        self.network, self.wrap = Functional(), wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(self.network(x))


def teacher_and_student(kind: type[nn.Module] = Functional, seed: int = 0) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(seed)
    return kind().eval(), kind()


def everything_about(network: nn.Module) -> dict[str, Any]:
    return {
        "tensors": {name: value.clone() for name, value in network.state_dict().items()},
        "places": {name: (p.data_ptr(), p.device, p.dtype, p.stride()) for name, p in network.named_parameters()},
        "flags": {name: p.requires_grad for name, p in network.named_parameters()},
        "grads": {name: p.grad for name, p in network.named_parameters()},
        "modes": {name: module.training for name, module in network.named_modules()},
        "hooks": {name: len(m._forward_hooks) + len(m._forward_pre_hooks) for name, m in network.named_modules()},
    }


def unchanged(network: nn.Module, before: dict[str, Any]) -> None:
    now = everything_about(network)
    for name, value in before.pop("tensors").items():
        assert torch.equal(value, now["tensors"][name]), name
    now.pop("tensors")
    assert before == now


# --- the networks it takes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "options"), [("fast", FAST), ("dfad", ONE_DFAD)])
def test_a_network_never_seen_before_is_distilled(method, options):
    teacher, student = teacher_and_student()
    result = dfkd_lib.distill(teacher, student, method, **options)
    assert isinstance(result, dfkd_lib.Distilled) and type(result.student) is Functional
    assert result.budget.student_updates == 4 and result.budget.images > 0
    assert 0 <= result.agreement <= 1 and result.accuracy == {}
    assert result.images.shape[1:] == SHAPE and result.images.min() >= 0 and result.images.max() <= 1
    assert result.student(torch.rand(3, *SHAPE)).shape == (3, 5)
    assert "4 student updates" in str(result)


def test_the_student_that_is_passed_in_stays_and_a_trained_copy_comes_back():
    teacher, student = teacher_and_student()
    before = everything_about(student)
    result = dfkd_lib.distill(teacher, student, "dfad", **ONE_DFAD)
    unchanged(student, before)
    assert result.student is not student and not result.student.training
    assert not torch.equal(result.student.first.weight, student.first.weight)
    assert {p.device for p in result.student.parameters()} == {torch.device("cpu")}
    assert all(p.grad is None and p.requires_grad for p in result.student.parameters())


@pytest.mark.parametrize(("method", "options"), [("fast", FAST), ("dfad", ONE_DFAD)])
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float64"])
def test_nothing_of_the_teacher_changes(method, options, precision):
    """Not even a counter that its own forward pass raises, the order of its bytes or a mixture of flags."""
    teacher, student = teacher_and_student()
    teacher.first.requires_grad_(False)
    teacher.second.weight.grad = torch.ones_like(teacher.second.weight)
    before = everything_about(teacher)
    dfkd_lib.distill(teacher, student, method, **options | {"precision": precision})
    unchanged(teacher, before)


def test_nothing_of_the_teacher_changes_when_the_run_breaks(monkeypatch):
    teacher, student = teacher_and_student()
    before = [everything_about(network) for network in (teacher, student)]

    def broken(self: DFAD) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(DFAD, "generate", broken)
    with pytest.raises(KeyboardInterrupt):
        dfkd_lib.distill(teacher, student, "dfad", **ONE_DFAD)
    unchanged(teacher, before[0])
    unchanged(student, before[1])


def test_the_working_copy_of_the_teacher_shares_its_weights():
    """So that a large teacher is held once; what a forward pass may write to is copied."""
    teacher = Functional().eval()
    teacher.tied = teacher.first
    lent = lending.borrowed(teacher)
    for mine, theirs in zip(lent.parameters(), teacher.parameters(), strict=True):
        assert mine.data_ptr() == theirs.data_ptr() and mine is not theirs and not mine.requires_grad
    assert lent.tied is lent.first
    assert lent.norm.running_mean.data_ptr() != teacher.norm.running_mean.data_ptr()


def test_half_precision_networks_work_and_keep_their_type():
    teacher, student = (network.bfloat16() for network in teacher_and_student())
    result = dfkd_lib.distill(teacher, student, "dfad", **ONE_DFAD)
    assert {p.dtype for p in (*teacher.parameters(), *result.student.parameters())} == {torch.bfloat16}


def test_a_torchvision_resnet_with_normalised_input():
    torch.manual_seed(0)
    teacher, student = (ResNet(BasicBlock, [1, 1, 1, 1], num_classes=10, width_per_group=64) for _ in range(2))
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    options = FAST | {"image_shape": (3, 32, 32), "num_classes": 10, "n_updates": 2, "mean": mean, "std": std}
    result = dfkd_lib.distill(teacher.eval(), student, "fast", **options)
    assert type(result.student) is ResNet, "the student without what was put in front of it"
    assert result.student.state_dict().keys() == student.state_dict().keys()
    assert result.record["parameters"]["mean"] == list(mean)
    assert result.record["networks"] == {"teacher": models.count_parameters(teacher)} | {
        "student": models.count_parameters(student)
    }


def test_what_stands_in_front_of_the_networks_normalises(monkeypatch):
    teacher, student = teacher_and_student()
    shown = []
    handle = teacher.register_forward_pre_hook(lambda module, inputs: shown.append(inputs[0]))
    dfkd_lib.distill(teacher, student, "dfad", mean=(0.25,), std=(0.5,), **ONE_DFAD)
    handle.remove()
    noise = shown[0]
    assert -0.5 <= noise.min() < -0.4 and 1.4 < noise.max() <= 1.5, "noise in [0, 1]"


@pytest.mark.parametrize("method", ["dfad", "dafl", "zskt"])
def test_a_transformer_without_batch_norm(method):
    teacher, student = teacher_and_student(Attention)
    options = ONE_DFAD if method == "dfad" else QUICK | {"kd_steps": 2}
    result = dfkd_lib.distill(teacher, student, method, preset="paper", **options)
    assert result.budget.student_updates == 4


@pytest.mark.parametrize("method", ["fast", "cmi", "nayer", "cpnet", "deepinversion", "adi", "dfq"])
def test_methods_that_need_batch_norm_say_so_and_what_does_not(method):
    teacher, student = teacher_and_student(Attention)
    options = {key: value for key, value in QUICK.items() if key not in ("batch_size", "latent_dim", "ngf")}
    with pytest.raises(InputError) as e:
        dfkd_lib.distill(teacher, student, method, preset="paper", **options)
    assert "batch-norm" in str(e.value) and "use dfad, dafl or zskt" in str(e.value)


# --- what it measures and keeps -----------------------------------------------------------------------------------


def test_dfad_can_be_played_in_one_stage(monkeypatch):
    played = []
    monkeypatch.setattr(OneStageDFAD, "step", lambda self, step=OneStageDFAD.step: played.append(self) or step(self))
    options = {key: value for key, value in QUICK.items() if key != "kd_steps"}
    result = dfkd_lib.distill(*teacher_and_student(), method="dfad", one_stage=True, **options)
    assert len(played) == result.budget.student_updates == QUICK["n_updates"]
    assert result.record["parameters"]["method"] == "dfad-one-stage"
    for method, settings in (("fast", {}), ("dfad", {"k": 3})):
        with pytest.raises(InputError, match=r"one_stage is a way|k = 1 by definition; choose method 'dfad'"):
            dfkd_lib.distill(*teacher_and_student(), method=method, one_stage=True, **options | settings)


def test_test_images_may_be_bytes_floats_or_a_set():
    teacher, student = teacher_and_student()
    x, y = torch.randint(0, 256, (40, *SHAPE), dtype=torch.uint8), torch.arange(40) % 5
    names = [str(i) for i in range(5)]
    given = [(x, y), (x / 255, y.int()), ImageSet(x, y, classes=names, name="mine", split="test")]
    results = [dfkd_lib.distill(teacher, student, "dfad", test=test, **ONE_DFAD) for test in given]
    measured = [result.accuracy for result in results]
    expected = float((teacher(x / 255).argmax(1) == y).float().mean())
    assert measured[0] == measured[1] == measured[2] and measured[0]["teacher"] == pytest.approx(expected)
    assert "test accuracy" in str(results[0])


def test_images_without_a_class_are_said_to_be_so():
    teacher = Functional().eval()
    with torch.no_grad():
        teacher.last.weight.mul_(1000)  # so sure of itself that a wrong class costs far more than chance
    result = dfkd_lib.distill(teacher, Functional(4), "fast", **FAST | {"bn": 1e9, "synthesis_batch": 40})
    assert any("the class term stayed at chance" in line for line in result.record["warnings"])


def test_a_student_equal_to_its_teacher_agrees_with_it_everywhere():
    teacher, _ = teacher_and_student(Attention)
    result = dfkd_lib.distill(teacher, copy.deepcopy(teacher), "dfad", **ONE_DFAD | {"lr_student": 1e-12})
    assert result.agreement == 1


def test_the_record_and_the_student_are_kept_and_read_back(tmp_path):
    teacher, student = teacher_and_student()
    result = dfkd_lib.distill(teacher, student, "fast", out=tmp_path / "run", seed=3, **FAST)
    record = records.read(tmp_path / "run")
    assert record["seed"] == 3 and record["parameters"]["settings"]["g_steps"] == 2
    assert record["budget"] == result.budget.state_dict()
    named = {"distill/fast/classes named": result.classes_named}
    assert record["metrics"] == {"distill/fast/agreement": result.agreement} | named
    assert {key: record[key] for key in result.record} == json.loads(json.dumps(result.record))
    load_model(student, tmp_path / "run" / "student.safetensors")
    x = torch.rand(2, *SHAPE)
    assert torch.equal(student.eval()(x), result.student(x))


def test_settings_that_json_does_not_know_are_recorded(tmp_path):
    teacher, student = teacher_and_student()
    options = QUICK | {"kd_steps": 2, "clip": float("inf"), "preset": "paper", "out": tmp_path}
    dfkd_lib.distill(teacher, student, "zskt", **options)
    assert records.read(tmp_path)["parameters"]["settings"]["clip"] == "inf"


@pytest.mark.parametrize(("method", "options"), [("fast", FAST), ("dfad", ONE_DFAD)])
def test_an_interrupted_run_continues_to_the_same_result(tmp_path, monkeypatch, method, options):
    options = options | {"n_updates": 8}
    whole = dfkd_lib.distill(*teacher_and_student(), method, **options)
    kind = type(distillers.build(method, *teacher_and_student(), SHAPE, Runtime.choose("cpu"), n_updates=4))
    step, taken = kind.step, []

    def dies(self: Any) -> dict[str, Tensor]:
        if len(taken) == 3:
            raise KeyboardInterrupt
        taken.append(1)
        return step(self)

    def saving(*args: Any, **options: Any) -> Any:
        return fit(*args, **options, checkpoint_every=0)

    monkeypatch.setattr(distilling, "fit", saving)
    monkeypatch.setattr(kind, "step", dies)
    with pytest.raises(KeyboardInterrupt):
        dfkd_lib.distill(*teacher_and_student(), method, out=tmp_path, **options)
    assert not (tmp_path / "record.json").exists()
    monkeypatch.setattr(kind, "step", step)
    resumed = dfkd_lib.distill(*teacher_and_student(seed=0), method, out=tmp_path, **options)
    assert resumed.fit.resumed_at == [3] and resumed.budget.student_updates == 8
    for name, value in whole.student.state_dict().items():
        if name != "calls":  # how often the network was asked, evaluation included
            assert torch.equal(value, resumed.student.state_dict()[name]), name
    assert resumed.agreement == whole.agreement
    again = dfkd_lib.distill(*teacher_and_student(), method, out=tmp_path, **options)
    assert again.fit.history == resumed.fit.history and again.agreement == whole.agreement
    assert list(again.record["resumed"].values()) == [{"at": [3], "sources": again.fit.sources}]


def test_a_folder_of_another_run_is_refused(tmp_path):
    dfkd_lib.distill(*teacher_and_student(), "dfad", out=tmp_path, **ONE_DFAD)
    for changes, networks in (({"lr_student": 0.5}, teacher_and_student()), ({}, teacher_and_student(seed=1))):
        with pytest.raises(DFKDError, match="delete it or choose another folder"):
            dfkd_lib.distill(*networks, "dfad", out=tmp_path, **ONE_DFAD | changes)


def test_the_seed_decides_and_the_global_random_state_stays():
    torch.manual_seed(7)
    before = torch.get_rng_state()
    students = []
    for seed in (0, 0, 1):
        torch.manual_seed(5)
        teacher, student = Functional().eval(), Functional()
        torch.set_rng_state(before)
        students.append(dfkd_lib.distill(teacher, student, "dfad", seed=seed, **ONE_DFAD).student.last.weight)
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(students[0], students[1]) and not torch.equal(students[0], students[2])


def test_the_line_can_be_switched_off(monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    dfkd_lib.distill(*teacher_and_student(), "dfad", **ONE_DFAD)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("shape", "preset"),
    [((1, 8, 8), "digits"), ((3, 8, 8), "digits"), ((1, 28, 28), "mnist"), ((3, 32, 32), "cifar10")],
)
def test_the_preset_goes_by_the_image_size(shape, preset):
    assert distilling._preset(shape) == preset


# --- what it refuses ----------------------------------------------------------------------------------------------


def broken_weights() -> nn.Module:
    network = Functional().eval()
    with torch.no_grad():
        network.last.bias[0] = float("nan")
    return network


IMAGES, LABELS = torch.zeros(4, *SHAPE, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"method": "dfda"}, "unknown method 'dfda'; did you mean 'dfad'"),
        ({"preset": "digit"}, "unknown preset 'digit'; did you mean 'digits'"),
        ({"learning_rate": 1}, "unknown setting of dfad 'learning_rate'"),
        ({"lr_students": 1}, "did you mean 'lr_student'"),
        ({"n_updates": 0}, "n_updates must be at least 1, not 0"),
        ({"num_classes": 10}, "num_classes is 10, but the teacher has 5 logits"),
        ({"num_classes": 1}, "num_classes must be at least 2, not 1"),
        ({"image_shape": (8, 8, 1)}, "give (1, 8, 8)"),
        ({"image_shape": (32, 32, 3)}, "give (3, 32, 32)"),
        ({"image_shape": (8, 8)}, "three whole numbers (channels, height, width)"),
        ({"image_shape": 8}, "three whole numbers"),
        ({"image_shape": (1, 8.0, 8)}, "three whole numbers"),
        ({"image_shape": (3, 8, 8)}, "the teacher fails on images of shape 3x8x8"),
        ({"teacher": Attention().eval(), "image_shape": (1, 12, 12)}, "fails on images of shape 1x12x12: Wrong image"),
        ({"teacher": Functional()}, "training mode, where batch norm and dropout change it; call teacher.eval()"),
        ({"teacher": Functional().state_dict()}, "the teacher is a OrderedDict, not a torch.nn.Module"),
        ({"teacher": Returning(lambda t: (t, t)).eval()}, "the teacher returns a tuple, not one tensor of logits"),
        ({"teacher": Returning(lambda t: {"logits": t}).eval()}, "the teacher returns a dict"),
        ({"teacher": Returning(lambda t: t[..., None]).eval()}, "not logits [2, K]"),
        ({"teacher": broken_weights()}, "NaN or infinite logits"),
        ({"student": Functional(n_classes=3)}, "the student has 3 classes and the teacher 5"),
        ({"student": Returning(lambda t: [t])}, "the student returns a list"),
        ({"mean": (0.5,)}, "mean and std belong together"),
        ({"mean": 0.5, "std": 0.5}, "sequences of 1 numbers"),
        ({"mean": (0.5,) * 3, "std": (0.5,) * 3}, "sequences of 1 numbers"),
        ({"mean": (0.5,), "std": (0.0,)}, "std must be above 0"),
        ({"precision": "float8"}, "unknown precision 'float8'"),
        ({"device": "cuda:99"}, "not present on this machine"),
        ({"test": IMAGES}, "a pair of tensors (images, labels)"),
        ({"test": (IMAGES.float() - 0.5, LABELS)}, "leave normalising to mean and std"),
        ({"test": (IMAGES, LABELS + 5)}, "labels must lie in 0..4"),
        ({"test": (IMAGES[:, :, :4], LABELS)}, "the test images have shape (1, 4, 8)"),
        ({"test": (IMAGES, LABELS[:2])}, "labels of uint8"),
        ({"test": ImageSet(IMAGES, name="mine", split="test")}, "need one label or mask each"),
    ],
)
def test_what_does_not_fit_is_said_at_once(changes, said):
    teacher, student = teacher_and_student()
    arguments = {"teacher": teacher, "student": student, "method": "dfad"} | ONE_DFAD | changes
    before = everything_about(student)
    with pytest.raises(InputError) as e:
        dfkd_lib.distill(**arguments)
    assert said in str(e.value) and "\n" not in str(e.value)
    unchanged(student, before)


def test_teacher_and_student_must_be_two():
    teacher, _ = teacher_and_student()
    with pytest.raises(InputError, match="the same network; give the student its own"):
        dfkd_lib.distill(teacher, teacher, "dfad", **ONE_DFAD)


def test_a_network_that_normalises_itself_is_not_normalised_twice():
    teacher = models.build("digits_cnn", n_classes=5, in_channels=1, mean=(0.5,), std=(0.5,)).eval()
    with pytest.raises(InputError, match="normalises its images itself; leave mean and std out"):
        dfkd_lib.distill(teacher, Functional(), "dfad", mean=(0.5,), std=(0.5,), **ONE_DFAD)


def test_a_network_that_cannot_be_copied_is_refused():
    teacher, student = teacher_and_student()
    teacher.lock = threading.Lock()
    with pytest.raises(InputError, match="the teacher cannot be copied"):
        dfkd_lib.distill(teacher, student, "dfad", **ONE_DFAD)


def test_training_images_cannot_be_touched_while_it_runs(monkeypatch):
    train, step = data.load("digits", "train"), DFAD.step

    def peeks(self: DFAD) -> Any:
        train.batch([0])
        return step(self)

    monkeypatch.setattr(DFAD, "step", peeks)
    with pytest.raises(DFKDError, match="data-free but touched the 'train' images"):
        dfkd_lib.distill(*teacher_and_student(), "dfad", **ONE_DFAD)


# --- what comes out -----------------------------------------------------------------------------------------------


def test_a_network_of_ones_own_is_distilled_far_above_chance():
    """Digits, a network from this file; the margin is far below what was seen."""
    train, test = data.load("digits", "train"), data.load("digits", "test")
    runtime = Runtime.choose("cpu", "float32")
    torch.manual_seed(0)
    teacher, student = Two(16), Two(8)
    supervised = Supervised(teacher, train, RECIPES["digits"], runtime)
    fit(supervised, supervised.n_steps // 2, name="teacher", progress=False)
    result = dfkd_lib.distill(
        teacher.eval(), student, "fast", image_shape=SHAPE, num_classes=10, n_updates=150, warmup=5, test=test,
        device="cpu", precision="float32", progress=False,
    )  # fmt: skip
    assert result.accuracy["teacher"] > 0.95
    assert result.accuracy["student"] > 0.6
    assert result.accuracy["student"] == accuracy(result.student, test, runtime)


def test_a_long_run_on_a_processor_goes_through_compiled_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "true")  # nothing is compiled, but traced
    monkeypatch.setattr(compiling, "BACKEND", "eager")
    written = dfkd_lib.distill(*teacher_and_student(), **FAST)
    assert ", compiled," not in written.record["runtime"]
    monkeypatch.setattr(compiling, "WORTH_IT", written.budget.student_updates * FAST["batch_size"])
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    ours = dfkd_lib.distill(*teacher_and_student(), **FAST)
    assert ", compiled," in ours.record["runtime"] and torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert ours.student._compiled_call_impl is None
    for value, expected in zip(ours.student.state_dict().values(), written.student.state_dict().values(), strict=True):
        assert torch.equal(value, expected)


def test_what_a_run_computes_is_counted_as_its_layers_say() -> None:
    network, runtime = Functional().eval(), Runtime.choose("cpu", "float32")
    per_image = 64 * 9 * 8 * (1 + 8) + 32 * 5  # two convolutions of 3x3 on 8x8 positions, and the last layer
    assert checking.count_macs(network, SHAPE, runtime) == per_image
