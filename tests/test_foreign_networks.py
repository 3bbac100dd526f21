"""Networks that the library does not know: each works, or is named in one line before anything is computed."""

from __future__ import annotations

import io
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_model
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torchvision.ops import FrozenBatchNorm2d

import dfkd_lib
from dfkd_lib import checking, distilling, judging, lending, records
from dfkd_lib.errors import DFKDError, InputError
from dfkd_lib.runtime import Runtime

SHAPE = (1, 8, 8)
QUICK: dict[str, Any] = {
    "image_shape": SHAPE, "num_classes": 5, "n_updates": 2, "device": "cpu", "precision": "float32", "progress": False,
    "batch_size": 8, "k": 2,
}  # fmt: skip
TINY: dict[str, dict[str, Any]] = {
    "dfad": {"latent_dim": 8, "ngf": 4, "k": 2},
    "random": {"latent_dim": 8, "ngf": 4, "k": 2},
    "zskt": {"latent_dim": 8, "ngf": 4},
    "dafl": {"latent_dim": 8, "ngf": 4},
    "dfq": {"latent_dim": 8, "ngf": 4},
    "fast": {"latent_dim": 8, "ngf": 4, "synthesis_batch": 8, "warmup": 1, "g_steps": 2},
    "nayer": {"latent_dim": 8, "ngf": 4, "synthesis_batch": 8, "warmup": 1, "g_steps": 2, "embedding_dim": 8},
    "cpnet": {"latent_dim": 8, "synthesis_batch": 8, "warmup": 1, "g_steps": 2, "embedding_dim": 8},
    "cmi": {"latent_dim": 8, "ngf": 4, "synthesis_batch": 8, "preinvert": 1, "inner_steps": 2},
    "deepinversion": {"synthesis_batch": 8, "g_steps": 2},
    "adi": {"synthesis_batch": 8, "g_steps": 2},
}
SYNTHESISING = sorted(TINY.keys() - {"random"})


def net(width: int = 8, channels: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.AdaptiveAvgPool2d(2),
        nn.Flatten(), nn.Linear(4 * width, 5),
    )  # fmt: skip


class Around(nn.Module):
    """A forward pass of one's own around a network."""

    def __init__(self, forward: Callable[[Any, Tensor], Any], network: nn.Module | None = None) -> None:
        super().__init__()
        self.inside, self.how = network or net(), forward

    def forward(self, x: Tensor) -> Any:
        return self.how(self.inside, x)


def distilled(
    teacher: nn.Module | None = None, student: nn.Module | None = None, method: str = "dfad", **changes: Any
) -> dfkd_lib.Distilled:
    options = {key: value for key, value in QUICK.items() if key != "k"} | TINY[method] | changes
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return dfkd_lib.distill(teacher or net().eval(), student or net(4), method, **options)


def refused(said: str, *arguments: Any, **changes: Any) -> None:
    with pytest.raises(InputError) as e:
        distilled(*arguments, **changes)
    assert said in str(e.value) and "\n" not in str(e.value)


def state(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in network.state_dict().items()}


# --- memory layout ------------------------------------------------------------------------------------------------


class Views(nn.Module):
    """It flattens with `view`, which channels-last activations do not allow."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(1, width, 3, 2, 1), nn.BatchNorm2d(width), nn.Linear(16 * width, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(x)).relu().view(len(x), -1))


class NoViewBackwards(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.view(-1).view(gradient.shape)


@pytest.mark.parametrize("method", ["dfad", "fast"])
@pytest.mark.parametrize(("teacher", "student"), [(Views, Views), (net, Views), (Views, lambda: net(4))])
def test_contiguous_is_taken_where_channels_last_does_not_work(teacher, student, method):
    result = distilled(teacher().eval(), student(), method, precision="bfloat16")
    assert result.record["parameters"]["layout"] == "contiguous" and "contiguous" in result.record["runtime"]


def test_a_backward_pass_that_needs_contiguous_counts_too():
    """In training mode alone: nothing but the student's own update goes through it."""
    student = net(4)
    student.insert(1, Around(lambda m, x: NoViewBackwards.apply(x) if m.training else x, nn.Identity()))
    assert distilled(student=student, precision="bfloat16").record["parameters"]["layout"] == "contiguous"


def test_channels_last_is_kept_where_it_works_and_said_where_it_was_asked_for():
    assert distilled(precision="bfloat16").record["parameters"]["layout"] == "channels-last"
    assert distilled(precision="bfloat16", layout="contiguous").record["parameters"]["layout"] == "contiguous"
    assert distilled(layout="channels-last").record["parameters"]["layout"] == "channels-last"
    refused("view size is not compatible", Views().eval(), layout="channels-last")
    refused("unknown layout 'channels_last'; did you mean 'channels-last'", layout="channels_last")


@pytest.mark.parametrize("method", ["dfad", "fast"])
def test_convolutions_of_other_dimensions_work_in_any_layout(method):
    volume = nn.Sequential(
        nn.Unflatten(1, (1, 1)), nn.Conv3d(1, 4, 1), nn.BatchNorm3d(4), nn.Flatten(), nn.Linear(256, 5)
    )
    line = nn.Sequential(nn.Flatten(2), nn.Conv1d(1, 4, 3), nn.BatchNorm1d(4), nn.Flatten(), nn.Linear(248, 5))
    result = distilled(volume.eval(), line, method, precision="bfloat16")
    assert result.record["parameters"]["layout"] == "channels-last"


# --- the input ----------------------------------------------------------------------------------------------------


def overwriting(network: nn.Module) -> Around:
    return Around(lambda inside, x: inside(x.sub_(0.3).div_(0.3)), network)


@pytest.mark.parametrize("method", ["dfad", "zskt", "fast", "deepinversion"])
def test_a_network_that_writes_to_its_images_learns_as_one_that_does_not(method):
    """Bit for bit, so nothing of the images that the other network sees was spoilt."""
    results = []
    for form in (overwriting, lambda network: Around(lambda inside, x: inside((x - 0.3).div(0.3)), network)):
        torch.manual_seed(0)
        results.append(distilled(form(net()).eval(), form(net(4)), method))
    for name, value in state(results[0].student).items():
        assert torch.equal(value, results[1].student.state_dict()[name]), name
    assert not results[0].student._forward_pre_hooks, "what protected the images is gone again"


@pytest.mark.parametrize(
    "writes", [lambda x: x.relu_(), lambda x: x.data.mul_(0.5), lambda x: np.negative(x.numpy(), out=x.numpy())]
)
def test_writing_is_noticed_however_it_is_done(writes, float32):
    def forward(inside: nn.Module, x: Tensor) -> Tensor:
        writes(x if not x.requires_grad else x.data)
        return inside(x)

    network = Around(forward, net()).eval().requires_grad_(False)
    assert checking.examine_teacher(network, SHAPE, float32, gradient=False).overwrites
    assert not checking.examine_teacher(net().eval(), SHAPE, float32).overwrites
    assert checking.examine_student(Around(forward, net()), SHAPE, float32).overwrites


def no_grad(inside: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return inside(x)


def inference(inside: nn.Module, x: Tensor) -> Tensor:
    with torch.inference_mode():
        return inside(x)


@pytest.mark.parametrize("method", SYNTHESISING)
def test_a_teacher_without_gradient_to_the_image_is_refused_by_all_that_need_one(method):
    refused("no gradient with respect to the image", Around(no_grad).eval(), method=method)


@pytest.mark.parametrize(
    "forward",
    [inference, lambda m, x: m((x * 255).round() / 255), lambda m, x: m(x.detach()), lambda m, x: m((9 * x).trunc())],
)
def test_however_the_gradient_is_lost(forward):
    refused("use method 'random'", Around(forward).eval())


@pytest.mark.parametrize("forward", [no_grad, inference])
def test_random_needs_no_gradient_of_the_teacher(forward):
    assert distilled(Around(forward).eval(), method="random").budget.student_updates == 2


@pytest.mark.parametrize(
    ("teacher", "said"),
    [
        (Around(lambda m, x: 0 * m(x)), "the same for all images"),
        (Around(lambda m, x: m(x) / 0), "NaN or infinite logits"),
        (Around(lambda m, x: m(x).argmax(1)), "returns [2] of torch.int64 for 2 images"),
        (Around(lambda m, x: m(x.reshape(4, 1, 8, 8))), "fails on images"),
        (Around(lambda m, x: {}["logits"]), "fails on images of shape 1x8x8: no key 'logits'"),
        (Around(lambda m, x: 1 / 0), "fails on images of shape 1x8x8: division by zero"),
        (Around(lambda m, x, *, mask: m(x)), "missing 1 required keyword-only argument: 'mask'"),
        (Around(lambda m, x: (m[1].train(), m(x))[1]), "puts 'inside.1' into training mode"),
        (Around(lambda m, x: {"logits": m(x)}), "the teacher returns a dict, not one tensor"),
        (net(channels=3), "expected input[2, 1, 8, 8] to have 3 channels"),
    ],
)
def test_a_teacher_that_cannot_teach_is_told_so(teacher, said):
    refused(said, teacher.eval())


@pytest.mark.parametrize(
    ("forward", "said"),
    [
        (lambda m, x: m(x).softmax(1), "seems to return probabilities"),
        (lambda m, x: F.dropout(m(x), 0.5), "differ between two passes"),
        (lambda m, x: m((x - 123) / 58), "hardly depend on the image"),
    ],
)
def test_what_may_be_meant_is_a_warning_and_stays_in_the_record(forward, said):
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match=said):
        result = dfkd_lib.distill(Around(forward).eval(), net(4), "dfad", **QUICK, latent_dim=8, ngf=4)
    assert said in result.record["warnings"][0] and "warning: the teacher" in str(result)


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: m(x).log_softmax(1), lambda m, x: m(x) / 8, lambda m, x: F.normalize(m(x)),
        lambda m, x: m((x - x.mean((1, 2, 3), True)) / x.std((1, 2, 3), keepdim=True)),
    ],
)  # fmt: skip
def test_what_is_only_unusual_is_not_complained_of(forward, float32):
    torch.manual_seed(0)
    assert checking.examine_teacher(Around(forward).eval(), SHAPE, float32).warnings == ()


@pytest.mark.parametrize(
    ("mean", "std", "said"),
    [
        ((123.7,), (58.4,), "divide both by 255"),
        ((0.0,), (255.0,), "divide both by 255"),
        ((-0.1,), (0.5,), "not those of images in [0, 1]"),
        ((float("nan"),), (0.5,), "not those of images in [0, 1]"),
        ((0.5,), (float("nan"),), "std must be above 0"),
        (("a",), (0.5,), "sequences of 1 numbers"),
        (torch.tensor(0.5), torch.tensor(0.5), "sequences of 1 numbers"),
    ],
)
def test_statistics_that_are_not_of_images_in_0_to_1_are_refused(mean, std, said):
    refused(said, mean=mean, std=std)


def test_statistics_may_be_tensors_and_those_of_a_network_for_bytes():
    assert distilled(mean=torch.tensor([0.5]), std=torch.tensor([0.25])).record["parameters"]["mean"] == [0.5]
    seen = []
    teacher = Around(lambda m, x: (seen.append(x), m(x / 255))[1])
    distilled(teacher.eval(), mean=(0,), std=(1 / 255,))
    assert seen[0].max() == pytest.approx(255, abs=10)


def test_a_teacher_that_names_few_classes_is_told():
    teacher = net().eval()
    with torch.no_grad():
        teacher[-1].bias[3] = 1e3
    result = distilled(teacher)
    assert result.classes_named == 1 and result.record["metrics"]["distill/dfad/classes named"] == 1
    assert "the teacher names 1 of 5 classes" in str(result) and "agreement on them says little" in str(result)


def test_how_many_classes_chance_would_name():
    assert judging.expected_classes(10, 256) == pytest.approx(10, abs=1e-6)
    assert judging.expected_classes(2, 1) == 1


# --- students -----------------------------------------------------------------------------------------------------


class Auxiliary(nn.Module):
    """Two outputs in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.network = net(4)

    def forward(self, x: Tensor) -> Any:
        return (self.network(x), x) if self.training else self.network(x)


def frozen() -> nn.Module:
    return net(4).requires_grad_(False)


@pytest.mark.parametrize(
    ("student", "said"),
    [
        (Auxiliary, "the student returns a tuple in training mode"),
        (lambda: Around(no_grad, net(4)), "no gradient reaches the student's weights"),
        (frozen, "no weight of the student can learn; call student.requires_grad_(True)"),
        (lambda: nn.Sequential(nn.Flatten(), nn.AdaptiveAvgPool1d(5)), "no weight of the student can learn"),
        (lambda: nn.Sequential(nn.Flatten(), nn.LazyLinear(5)), "the student's '1.weight' has no shape yet"),
        (lambda: net(4).to("meta"), "the student's '0.weight' has no values"),
        (lambda: net(4, channels=3), "the student fails on images of shape 1x8x8"),
        (lambda: nn.Linear, "the student is a type, not a torch.nn.Module"),
        (lambda: nn.Sequential(nn.Conv2d(1, 4, 8), nn.Flatten(), nn.Linear(4, 3)), "the student has 3 classes"),
    ],
)
def test_a_student_that_cannot_learn_is_told_so(student, said):
    refused(said, student=student())


def test_the_look_in_training_mode_leaves_no_trace(float32):
    """Neither in the running statistics, nor in the draws of dropout, nor in the gradients."""
    student = nn.Sequential(*net(4)[:4], nn.Dropout(0.5), *net(4)[4:]).train()
    before, random = state(student), torch.get_rng_state()
    checking.examine_student(student, SHAPE, float32)
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    assert torch.equal(random, torch.get_rng_state()) and student.training
    assert all(p.grad is None for p in student.parameters())


def test_a_student_that_is_partly_frozen_learns_with_the_rest():
    student = net(4)
    student[0].requires_grad_(False)
    result = distilled(student=student)
    assert torch.equal(result.student[0].weight, student[0].weight)
    assert not torch.equal(result.student[-1].weight, student[-1].weight)
    assert not result.student[0].weight.requires_grad


class Silent(nn.Sequential):
    """Its `train` returns nothing, as many people's do."""

    def train(self, mode: bool = True) -> None:  # type: ignore[override]
        super().train(mode)


@pytest.mark.parametrize("method", ["dfad", "fast"])
def test_a_train_that_returns_nothing_does_no_harm(method):
    teacher = Silent(*net())
    teacher.eval()
    assert distilled(teacher, Silent(*net(4)), method).budget.student_updates == 2


# --- kinds of networks --------------------------------------------------------------------------------------------


def test_torchscript_teaches_and_learns(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        teacher, student = torch.jit.script(net()).eval(), torch.jit.script(net(4))
        held = torch.jit.freeze(teacher)
    assert distilled(teacher, net(4)).budget.student_updates == 2
    refused("outside TorchScript", teacher, method="fast")
    refused("no linear layer", teacher, method="dafl")
    refused("frozen TorchScript", held)
    before = state(student)
    result = distilled(net().eval(), student, out=tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    assert not torch.equal(result.student.state_dict()["5.weight"], before["5.weight"])
    load_model(net(4), tmp_path / "student.safetensors")


class Own(nn.Module):
    """A batch norm of nobody's class, over the second dimension or over the last."""

    def __init__(self, last: bool = False) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(8))
        self.register_buffer("running_var", torch.ones(8))
        self.last = last

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.last else x.movedim(1, -1)
        x = (x - self.running_mean) / (self.running_var + 1e-5).sqrt()
        return x if self.last else x.movedim(-1, 1)


def with_norm(norm: nn.Module) -> nn.Module:
    network = net()
    network[1] = norm
    return network.eval()


@pytest.mark.parametrize("norm", [FrozenBatchNorm2d, nn.SyncBatchNorm, lambda _: Own()])
@pytest.mark.parametrize("method", ["fast", "dfq", "deepinversion", "cmi", "nayer", "cpnet"])
def test_every_batch_norm_with_running_statistics_is_matched(norm, method):
    assert distilled(with_norm(norm(8)), method=method).budget.student_updates == 2


def last_dimension() -> nn.Module:
    rows = Around(lambda norm, x: norm(x.movedim(1, -1)).movedim(-1, 1), Own(last=True))
    return with_norm(rows)


class ByFunction(nn.BatchNorm2d):
    """Statistics that another layer applies."""


def by_function() -> nn.Module:
    norm = ByFunction(8)
    forward = lambda _, x: F.batch_norm(x, norm.running_mean, norm.running_var)  # noqa: E731
    return with_norm(Around(forward, norm))


@pytest.mark.parametrize(
    ("teacher", "said"),
    [
        (lambda: with_norm(nn.InstanceNorm2d(8, track_running_stats=True)), "no batch-norm layer"),
        (lambda: with_norm(nn.BatchNorm2d(8, track_running_stats=False)), "no batch-norm layer"),
        (lambda: with_norm(nn.GroupNorm(2, 8)), "use dfad, dafl or zskt"),
        (last_dimension, "has statistics of 8 channels and is given [4, 12, 12, 8]"),
        (by_function, "does not call its ByFunction layers as modules"),
    ],
)
def test_statistics_that_cannot_be_matched_are_told(teacher, said):
    refused(said, teacher(), method="fast", image_shape=(1, 12, 12))


def test_a_last_linear_layer_that_is_used_by_function_is_told():
    network = net()
    network.unused = nn.Linear(3, 3)
    whole = Around(lambda m, x: nn.Sequential(*list(m)[:6])(x), network).eval()
    refused("does not call its Linear layers as modules", whole, method="dafl")


@pytest.mark.parametrize("wrap", [lambda s: torch.compile(s, backend="eager"), nn.DataParallel])
def test_a_wrapper_leaves_no_prefix(wrap, tmp_path):
    result = distilled(wrap(net()).eval(), wrap(net(4)), "fast", out=tmp_path)
    bare = net(4)
    load_model(bare, tmp_path / "student.safetensors")
    assert type(result.student) is nn.Sequential
    assert torch.equal(bare[0].weight, result.student[0].weight)
    refused("the same network", shared := net().eval(), wrap(shared))


class Stateful(nn.Sequential):
    extra: Any = None

    def get_extra_state(self) -> Any:
        return self.extra

    def set_extra_state(self, extra: Any) -> None:
        pass


@pytest.mark.parametrize(("extra", "lines"), [({"version": 1}, 1), (io.BytesIO(b"x"), 2)])
def test_a_student_that_cannot_be_saved_comes_back_all_the_same(extra, lines, tmp_path):
    student = Stateful(*net(4))
    student.extra = extra
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        result = dfkd_lib.distill(net().eval(), student, "dfad", **QUICK, latent_dim=8, ngf=4, out=tmp_path)
    assert not torch.equal(result.student[0].weight, student[0].weight)
    assert "the student is in the result all the same" in str(told[-1].message)
    kept = [line for line in records.read(tmp_path)["warnings"] if "names" not in line]
    assert len(kept) == lines and "cannot write" in kept[-1]
    assert (tmp_path / "checkpoint.safetensors").exists() == (lines == 1)
    assert not list(tmp_path.glob("trial*"))


def test_a_full_disk_at_the_end_loses_nothing(tmp_path, monkeypatch):
    def full(*_: Any) -> None:
        raise DFKDError("cannot write student.safetensors: no space left on device")

    monkeypatch.setattr(lending, "save", full)
    monkeypatch.setattr(records, "write", full)
    lost = [line for line in distilled(out=tmp_path).record["warnings"] if "no space left" in line]
    assert ["the student is in the result" in lost[0], "the record is in the result" in lost[1]] == [True, True]


def test_a_mask_of_infinities_is_no_divergence(tmp_path):
    student = net(4)
    student.register_buffer("mask", torch.full((2, 2), -torch.inf))
    result = distilled(student=student, out=tmp_path)
    assert "no checkpoint can hold the student" in result.record["warnings"][0]
    assert (tmp_path / "student.safetensors").exists()


@pytest.mark.parametrize(
    "norm",
    [
        parametrizations.weight_norm, parametrizations.spectral_norm, nn.utils.weight_norm, nn.utils.spectral_norm,
        lambda layer: prune.l1_unstructured(layer, "weight", 0.3),
    ],
)  # fmt: skip
def test_weights_that_are_computed_from_others(norm, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        teacher, student = net(), net(4)
        for network in (teacher, student):
            norm(network[0])
            network(torch.rand(2, *SHAPE))  # what this leaves behind is no leaf
    result = distilled(teacher.eval(), student, "fast", out=tmp_path)
    x = torch.rand(3, *SHAPE)
    load_model(student, tmp_path / "student.safetensors")
    torch.testing.assert_close(student.eval()(x), result.student(x))


def test_activations_that_a_hook_has_kept_are_no_obstacle():
    teacher = net().eval()
    teacher.register_forward_hook(lambda module, _, y: setattr(module, "kept", [y, {"logits": y}]))
    teacher(torch.rand(2, *SHAPE))
    kept = teacher.kept[0]
    assert distilled(teacher).budget.student_updates == 2
    assert teacher.kept[0] is kept


def complex_weights() -> nn.Module:
    network = net()
    network.filter = nn.Parameter(torch.ones(2, dtype=torch.cfloat))
    return network.eval()


def test_complex_weights_are_refused_and_complex_buffers_stay_complex():
    """Bringing a network to float32 would drop the imaginary part without a word."""
    refused("the teacher's weight 'filter' is complex", complex_weights())
    phase = torch.polar(torch.ones(5), torch.arange(5.0))
    network = net()
    network.register_buffer("phase", phase)
    seen = []
    rotating = Around(lambda m, x: (seen.append(m.phase), (m(x) * m.phase).real)[1], network).eval()
    distilled(rotating)
    assert torch.equal(seen[0], phase)


@pytest.mark.parametrize(
    "changed", [lambda t: t.half(), lambda t: t.bfloat16(), lambda t: t.double(), lambda t: t.requires_grad_(False)]
)
def test_data_types_and_flags_of_either_network_come_back(changed):
    teacher, student = changed(net()).eval(), net(4).bfloat16()
    before = {name: (p.dtype, p.requires_grad, p.data_ptr()) for name, p in teacher.named_parameters()}
    result = distilled(teacher, student)
    assert before == {name: (p.dtype, p.requires_grad, p.data_ptr()) for name, p in teacher.named_parameters()}
    assert {p.dtype for p in result.student.parameters()} == {torch.bfloat16}


def test_buffers_that_are_no_floats_stay_what_they_are(tmp_path):
    student = net(4)
    student.register_buffer("index", torch.arange(4))
    student.register_buffer("mask", torch.ones(3, dtype=torch.bool))
    result = distilled(student=student, precision="bfloat16", out=tmp_path)
    assert result.student.index.dtype == torch.int64 and result.student.mask.dtype == torch.bool


def test_networks_made_in_inference_mode_and_a_call_in_it():
    with torch.inference_mode():
        assert distilled(net().eval(), net(4), "fast").budget.student_updates == 2
    with torch.no_grad():
        assert distilled(method="zskt").budget.student_updates == 2


def test_a_student_that_shares_layers_with_the_teacher_leaves_them_alone():
    teacher = net().eval()
    before = state(teacher)
    student = nn.Sequential(teacher[0], nn.Flatten(), nn.Linear(512, 5))
    result = distilled(teacher, student)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert not torch.equal(result.student[0].weight, teacher[0].weight)


def test_what_cannot_be_copied_is_refused():
    teacher = net().eval()
    teacher.lock = threading.Lock()
    refused("the teacher cannot be copied with copy.deepcopy", teacher)


# --- other arguments ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seed": None}, "seed must be a whole number, not None"),
        ({"seed": 2**64}, "seed of 64 bits"),
        ({"num_classes": 5.0}, "num_classes must be a whole number, not 5.0"),
        ({"n_updates": True}, "n_updates must be a whole number, not True"),
        ({"n_updates": 1e3}, "n_updates must be a whole number, not 1000.0"),
        ({"batch_size": 64.0}, "batch_size must be a whole number, not 64.0"),
        ({"momentum": 2.0}, "momentum must be in [0, 1)"),
        ({"weight_decay": -1}, "weight_decay must be 0 or more"),
        ({"precision": torch.bfloat16}, "precision must be text"),
        ({"precision": None}, "precision must be text"),
        ({"device": None}, "device must be text"),
        ({"progress": "no"}, "progress must be True or False"),
        ({"layout": None}, "layout must be text"),
        ({"image_shape": "188"}, "three whole numbers"),
        ({"image_shape": None}, "three whole numbers"),
        ({"test": (torch.rand(4, *SHAPE), torch.full((4,), 0.5))}, "labels must be whole numbers"),
        ({"test": (torch.full((4, *SHAPE), torch.nan), torch.zeros(4))}, "floats in [0, 1]"),
        ({"out": ""}, "cannot write into folder : its path is empty"),
        ({"out": 5}, "cannot write into folder"),
        ({"out": "a\0b"}, "cannot write into folder"),
        ({"out": __file__}, "File exists; choose another"),
        ({"out": __file__ + "/below"}, "Not a directory; choose another"),
        ({"out": "~nobody-of-this-name/x"}, "cannot write into folder"),
        ({"out": "x" * 300}, "File name too long; choose another"),
    ],
)
def test_arguments_of_the_wrong_kind(changes, said):
    refused(said, **changes)


def test_labels_of_any_type_that_are_whole_numbers():
    x = torch.rand(6, *SHAPE)
    measured = [
        distilled(test=(images, labels)).accuracy
        for images, labels in ((x, torch.ones(6)), (x.requires_grad_(), torch.ones(6, dtype=torch.uint8)))
    ]
    assert measured[0].keys() == {"teacher", "student"} and len(measured) == 2


@pytest.mark.parametrize("method", sorted(TINY))
@pytest.mark.parametrize("shape", [(1, 9, 13), (3, 2, 5)])
def test_images_of_any_size_with_every_method(method, shape):
    result = distilled(net(8, shape[0]).eval(), net(4, shape[0]), method, image_shape=shape)
    assert result.images.shape[1:] == shape


def test_a_large_bank_is_announced(monkeypatch):
    """By what the run will store, not by what the bank could hold."""
    assert all("bank" not in line for line in distilled(method="fast").record["warnings"])
    monkeypatch.setattr(distilling, "_LARGE_BANK", 16 * 64)
    assert "for 16 images; a smaller bank_size" in distilled(method="fast").record["warnings"][0], "2 calls of 8"
    assert all("bank" not in line for line in distilled(method="fast", bank_size=15).record["warnings"])
    assert all("bank" not in line for line in distilled(method="dfad").record["warnings"])


def test_another_student_in_the_same_folder_is_another_run(tmp_path):
    torch.manual_seed(0)
    teacher, student = net().eval(), net(4)
    first, again = (distilled(teacher, student, out=tmp_path) for _ in range(2))
    assert again.fit.history == first.fit.history, "the same seconds, so it was not run again"
    with torch.no_grad():
        student[1].running_mean[0] = 1
    with pytest.raises(DFKDError, match="delete it or choose another folder"):
        distilled(teacher, student, out=tmp_path)


def test_a_fingerprint_knows_values_names_types_and_ties():
    torch.manual_seed(0)
    first = net()
    prints = {lending.fingerprint(first)}
    prints.add(lending.fingerprint(nn.Sequential(*first, nn.Identity())))
    assert len(prints) == 1, "layers without weights say nothing"
    prints.add(lending.fingerprint(nn.Sequential(nn.Identity(), *first)))
    prints.add(lending.fingerprint(lending.copied(first, "student").double()))
    prints.add(lending.fingerprint(lending.copied(first, "student").bfloat16()))
    changed = lending.copied(first, "student")
    with torch.no_grad():
        changed[0].bias[0] += 1
    prints.add(lending.fingerprint(changed))
    assert len(prints) == 5
    last = lending.copied(first, "student").to(memory_format=torch.channels_last)
    assert lending.fingerprint(last) == lending.fingerprint(first), "the order of bytes in memory is no difference"
    tied = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    tied[1].weight = tied[0].weight
    loose = lending.copied(tied, "student")
    loose[1].weight = nn.Parameter(loose[0].weight.detach().clone())
    assert lending.fingerprint(tied) != lending.fingerprint(loose)
    odd = nn.Module()
    odd.register_buffer("sparse", torch.eye(3).to_sparse())
    odd.register_buffer("phase", torch.ones(2, dtype=torch.cfloat).conj())
    odd.register_buffer("nothing", torch.empty(0))
    odd.register_buffer("yes", torch.tensor(True))
    assert len(lending.fingerprint(odd)) == 64


def test_the_layout_is_chosen_before_the_random_state_is_used():
    """The fall-back trains as a run that was contiguous from the start, bit for bit."""
    torch.manual_seed(0)
    teacher, student = Views(8).eval(), Views(4)
    auto, asked = (
        distilled(teacher, student, precision="bfloat16", layout=layout) for layout in ("auto", "contiguous")
    )
    assert torch.equal(auto.student.head.weight, asked.student.head.weight)
    assert Runtime.choose("cpu", "bfloat16").channels_last, "otherwise this tests nothing"


def test_the_folder_is_made_and_kept_in_order(tmp_path: Path):
    distilled(out=tmp_path / "deep" / "er")
    assert sorted(p.name for p in (tmp_path / "deep" / "er").iterdir() if p.name[0] != ".") == [
        "checkpoint.safetensors", "record.json", "student.safetensors",
    ]  # fmt: skip
