"""`graft` and `amalgamate` on networks that the library does not know: what is kept, what is refused and how."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from conftest import same
from torch import Tensor, nn

from dfkd_lib import amalgamate, graft
from dfkd_lib.data import ImageSet
from dfkd_lib.errors import InputError
from dfkd_lib.methods.amalgamation import FeatureTerm
from dfkd_lib.methods.common_features import CommonSpace
from dfkd_lib.methods.comprehensive import Joint
from dfkd_lib.models import Normalize
from dfkd_lib.models.chains import STEM
from dfkd_lib.runtime import Runtime

MEAN, STD = [0.3], [0.2]
AT = ["body.3", "head"]
NAMES = [["rust", "moss"], ["lichen", "fern", "ivy"]]


class Mine(nn.Module):
    """A class that the library does not know."""

    def __init__(self, n_classes: int, width: int = 6, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(4, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, n_classes))
        with torch.no_grad():
            self(torch.rand(32, 1, 8, 8))
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


class Wrapper(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network


class Overwrites(Wrapper):
    def forward(self, x: Tensor) -> Tensor:
        return self.network(x.sub_(0.3).div_(0.2))


class Normalises(Wrapper):
    def forward(self, x: Tensor) -> Tensor:
        return self.network((x - 0.3) / 0.2)


class Pair(Wrapper):
    def forward(self, x: Tensor) -> Any:
        return self.network(x), x


class Auxiliary(Wrapper):
    def forward(self, x: Tensor) -> Any:
        return (self.network(x), x) if self.training else self.network(x)


class WithoutGradient(Wrapper):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.network(x)


class FlattensByView(Wrapper):
    def forward(self, x: Tensor) -> Tensor:
        maps = self.network.body(x)
        return self.network.head[2](nn.functional.adaptive_avg_pool2d(maps, 2).view(len(x), -1))


def images(n: int = 40) -> ImageSet:
    g = torch.Generator().manual_seed(1)
    return ImageSet(torch.randint(0, 256, (n, 1, 8, 8), generator=g, dtype=torch.uint8), name="mine", split="train")


def x(n: int = 3) -> Tensor:
    return torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(2))


def grafted(teacher: Any = None, student: Any = None, pool: Any = None, **options: Any) -> nn.Sequential:
    options = {"at": AT, "block_steps": [2], "network_steps": 2, "batch_size": 8, "n_views": 16, "pad": 1} | options
    teacher = Mine(5, 8) if teacher is None else teacher
    student = Mine(5, 4, seed=1) if student is None else student
    return graft(teacher, student, images() if pool is None else pool, progress=False, **options)


def amalgamated(teachers: Any = None, student: Any = None, pool: Any = None, **options: Any) -> nn.Module:
    options = {"classes": NAMES, "n_steps": 3, "batch_size": 8} | options
    teachers = [Mine(2), Mine(3, seed=1)] if teachers is None else teachers
    student = Mine(5, seed=2) if student is None else student
    made, _ = amalgamate(teachers, student, images() if pool is None else pool, progress=False, **options)
    return made


def kept(network: nn.Module) -> list[Any]:
    """All that a person could see of a network."""
    state = [(name, value.clone(), value.dtype, value.device) for name, value in network.state_dict().items()]
    asks = [(p.requires_grad, p.grad) for p in network.parameters()]
    return [
        state,
        asks,
        [m.training for m in network.modules()],
        [len(m._forward_pre_hooks) for m in network.modules()],
    ]


def equal(before: list[Any], after: list[Any]) -> bool:
    (values, *rest), (values_now, *rest_now) = before, after
    tensors = all(torch.equal(old[1], new[1]) for old, new in zip(values, values_now, strict=True))
    facts = [(name, *others) for name, _, *others in values] == [(name, *others) for name, _, *others in values_now]
    return tensors and facts and rest == rest_now


@pytest.mark.parametrize("precision", ["float32", "float64", "bfloat16"])
def test_networks_stay_as_they_were(precision: str) -> None:
    runtime = Runtime.choose("cpu", precision, channels_last=True)
    teacher, student = Mine(5, 8).half(), Mine(5, 4, seed=1).train()
    student.body[4].eval()
    before = kept(teacher), kept(student)
    made = grafted(teacher, student, runtime=runtime)
    assert equal(before[0], kept(teacher)) and equal(before[1], kept(student))
    assert {p.dtype for p in made.parameters()} == {torch.float32} and not made.training
    assert made(x()).shape == (3, 5)

    teachers, student = [Mine(2).half(), Mine(3, seed=1)], Mine(5, seed=2).double()
    teachers[1].requires_grad_(False)
    networks = [*teachers, student]
    before_all = [kept(network) for network in networks]
    term = Joint.between(teachers, student, places=["body.3"], x=x())
    weights = copy.deepcopy(term.state_dict())
    union = amalgamated(teachers, student, runtime=runtime, term=term)
    assert all(equal(old, kept(network)) for old, network in zip(before_all, networks, strict=True))
    assert same(weights, term.state_dict())
    assert {p.dtype for p in union.parameters()} == {torch.float64} and not union.training
    assert not same(student.state_dict(), union.state_dict())
    assert kept(union)[3] == kept(student)[3]


@pytest.mark.parametrize("kind", ["graft", "amalgamate"])
def test_the_result_follows_from_the_seed_and_the_random_state_is_kept(kind: str) -> None:
    make = grafted if kind == "graft" else amalgamated
    networks = [Mine(5, 8), Mine(5, 4, seed=1)] if kind == "graft" else [[Mine(2), Mine(3, seed=1)], Mine(5, seed=2)]
    torch.manual_seed(7)
    before = torch.get_rng_state()
    one = make(*networks)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(8)
    assert same(one.state_dict(), make(*networks).state_dict())


def test_mean_and_std_are_those_of_the_networks() -> None:
    normal = Normalize(MEAN, STD)
    teacher, student = Mine(5, 8), Mine(5, 4, seed=1)
    outside = grafted(teacher, student, mean=MEAN, std=STD)
    within = grafted(*(nn.Sequential(Normalises(nn.Identity()), n.body, n.head) for n in (teacher, student)),
                     at=["1.3", "2"])  # fmt: skip
    assert torch.allclose(outside(normal(x())), within(x()), atol=1e-5)
    assert not torch.allclose(outside(x()), within(x()), atol=1e-2)

    teachers, student = [Mine(2), Mine(3, seed=1)], Mine(5, seed=2)
    outside = amalgamated(teachers, student, mean=MEAN, std=STD)
    within = amalgamated([Normalises(t) for t in teachers], Normalises(student))
    assert torch.allclose(outside(normal(x())), within(x()), atol=1e-5)
    assert not torch.allclose(outside(x()), within(x()), atol=1e-2)


def test_places_are_names_in_the_network_with_mean_and_std_too() -> None:
    teachers, student = [Mine(2), Mine(3, seed=1)], Mine(5, seed=2)
    for term in (
        Joint.between(teachers, student, places=["body.3"], x=x()),
        CommonSpace.between(teachers, student, places=["body"] * 3, x=x(), width=2),
    ):
        assert amalgamated(teachers, student, term=term, mean=MEAN, std=STD)(x()).shape == (3, 5)


def test_networks_that_write_to_their_images_are_given_copies() -> None:
    teachers, student = [Mine(2), Mine(3, seed=1)], Mine(5, seed=2)
    spared = amalgamated([Overwrites(t) for t in teachers], Overwrites(student))
    pure = amalgamated([Normalises(t) for t in teachers], Normalises(student))
    assert torch.allclose(spared(x()), pure(x()), atol=1e-5)

    def blocks(kind: type[Wrapper], network: Mine) -> dict[str, nn.Module]:
        return {STEM: nn.Sequential(kind(nn.Identity()), *network.body[:3]), "a": network.body[3:], "b": network.head}

    pairs = [[blocks(kind, Mine(5, 8)), blocks(kind, Mine(5, 4, seed=1))] for kind in (Overwrites, Normalises)]
    spared, pure = (grafted(*pair, at=()) for pair in pairs)
    assert torch.allclose(spared(x()), pure(x()), atol=1e-5)


def test_wrapped_networks_and_those_that_flatten_by_view() -> None:
    made = grafted(nn.DataParallel(Mine(5, 8)), Mine(5, 4, seed=1))
    assert [name for name, _ in made.named_children()] == [STEM, "body_3", "head"]
    union = amalgamated([nn.DataParallel(Mine(2)), FlattensByView(Mine(3))], nn.DataParallel(Mine(5, seed=2)))
    assert union.state_dict().keys() == Mine(5).state_dict().keys()


class Silent(Mine):
    """Its train(), and with it eval(), forgets to return the network."""

    def train(self, mode: bool = True) -> None:  # type: ignore[override]
        super().train(mode)


def test_a_train_that_returns_nothing_is_put_up_with() -> None:
    assert not amalgamated([Silent(2), Mine(3, seed=1)], Silent(5, seed=2)).training
    assert grafted(Silent(5, 8), Silent(5, 4, seed=1))(x()).shape == (3, 5)


def test_numbers_of_other_kinds_count() -> None:
    made = grafted(block_steps=[np.int64(2)], batch_size=np.int32(8), lr_block=np.float32(1e-3), n_views=np.int64(16))
    assert made(x()).shape == (3, 5)
    assert amalgamated(n_steps=np.int64(2), lr=1)(x()).shape == (3, 5)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"batch_size": 8.0}, "batch_size must be a whole number, not 8.0"),
        ({"batch_size": True}, "batch_size must be a whole number, not True"),
        ({"batch_size": "8"}, "batch_size must be a whole number"),
        ({"batch_size": 1}, "batch_size must be at least 2"),
        ({"flip": "False"}, "flip must be True or False, not 'False'"),
        ({"pad": -1}, "pad"),
        ({"pad": 1.5}, "pad must be a whole number"),
        ({"batchsize": 8}, "unknown setting 'batchsize'; did you mean 'batch_size'"),
        ({"runtime": "cuda"}, "runtime must be a dfkd_lib.runtime.Runtime"),
        ({"mean": MEAN}, "mean and std belong together"),
        ({"mean": [0.3] * 3, "std": [0.2] * 3}, "mean and std must be sequences of 1 numbers"),
        ({"mean": [120.0], "std": [60.0]}, "not those of images in"),
        ({"mean": 0.5, "std": 0.2}, "mean and std must be sequences"),
        ({"mean": [0.3], "std": [0.0]}, "std must be above 0"),
    ],
)
@pytest.mark.parametrize("make", [grafted, amalgamated])
def test_a_setting_that_cannot_be_is_refused_by_name(
    make: Callable[..., nn.Module], setting: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message) as e:
        make(**setting)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: grafted(block_steps=200), "block_steps must be a sequence"),
        (lambda: grafted(block_steps=[2, 0]), "block_steps must be numbers above 0"),
        (lambda: grafted(block_steps=[1, 2, 3]), "3 numbers for 2 blocks"),
        (lambda: grafted(lr_block=float("nan")), "lr_block"),
        (lambda: grafted(lr_network=float("inf")), "lr_network must be finite"),
        (lambda: grafted(network_steps=0), "network_steps must be above 0"),
        (lambda: grafted(n_views=0), "n_views must be at least 1"),
        (lambda: grafted(at="head"), "cuts of the teacher must be a sequence"),
        (lambda: grafted(at=["heads"]), "unknown place to cut 'heads'; did you mean 'head'"),
        (lambda: grafted(at_student=["head"]), "3 blocks and the student 2"),
        (lambda: grafted(at=()), "1 blocks and the student 1"),
        (lambda: grafted(at=[0, 1]), "cuts of the teacher must be text, not 0"),
        (lambda: grafted(pool=images().images), "images must be an ImageSet, not a Tensor"),
        (lambda: grafted(pool=images(1).take(0)), "mine has no images"),
        (lambda: grafted(Mine(5).state_dict()), "the teacher's blocks must be a dict from name to module"),
        (lambda: grafted(student={"first": Mine(5).body}), "the student's blocks must be a dict"),
        (lambda: grafted("resnet18"), "the teacher is a str, not a torch.nn.Module"),
        (lambda: grafted(Mine(5, 8), Mine(4)), "'head' gives 5 in the teacher and 4 in the student"),
        (lambda: grafted(Pair(Mine(5))), "the teacher returns a tuple"),
        (lambda: grafted(student=Mine(5).requires_grad_(False)), "no weight of the student can learn"),
        (lambda: grafted(nn.Sequential(Normalize(MEAN, STD), Mine(5)), mean=MEAN, std=STD),
         "normalises its images itself"),
        (lambda: grafted(nn.Sequential(Mine(5, 8).body, WithoutGradient(Mine(5, 8).head)),
                         nn.Sequential(Mine(5, 4).body, Mine(5, 4).head), at=["0.3", "1"]),
         "the teacher's block '1' gives no gradient"),
        (lambda: grafted(pool=ImageSet(images().images.repeat(1, 3, 1, 1), name="mine", split="train")),
         "the teacher fails on images of shape 3x8x8"),
    ],
)  # fmt: skip
def test_what_cannot_be_grafted_is_refused_by_name(call: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(InputError, match=message) as e:
        call()
    assert "\n" not in str(e.value)


def two() -> list[nn.Module]:
    return [Mine(2), Mine(3, seed=1)]


def broken(network: nn.Module) -> nn.Module:
    with torch.no_grad():
        next(network.parameters()).fill_(float("nan"))
    return network


def foreign_term() -> FeatureTerm:
    return Joint.between([Mine(2, 9), Mine(3, 9)], Mine(5, 9), places=["body.3"], x=x())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: amalgamated(n_steps=0), "n_steps must be above 0"),
        (lambda: amalgamated(lr="fast"), "lr must be a number, not 'fast'"),
        (lambda: amalgamated(lr=-1), "lr must be"),
        (lambda: amalgamated(centre=1), "centre must be True or False, not 1"),
        (lambda: amalgamated(classes=[["a", "a"], ["b", "c", "d"]]), "teacher 1 has two classes 'a'"),
        (lambda: amalgamated(classes=["ab", "cde"]), "classes of teacher 1 must be a list of names, not 'ab'"),
        (lambda: amalgamated(classes=[[0, 1], [2, 3, 4]]), "classes of teacher 1 must be names, not 0"),
        (lambda: amalgamated(classes=[["a", "b"], []]), r"classes of teacher 2 must be a list of names, not \[\]"),
        (lambda: amalgamated(classes=None), "classes must be a list of lists of names"),
        (lambda: amalgamated(classes=NAMES[:1]), "2 teachers and 1 lists of classes"),
        (lambda: amalgamated(Mine(2)), "teachers must be a list of networks, not a Mine"),
        (lambda: amalgamated([Mine(2), None]), "teacher 2: the teacher is a NoneType"),
        (lambda: amalgamated([Mine(2), Mine(4)]), "teacher 2 gives 4 outputs for 3 classes"),
        (lambda: amalgamated([Mine(2), Pair(Mine(3))]), "teacher 2: the teacher returns a tuple"),
        (lambda: amalgamated([Mine(2), broken(Mine(3))]), "teacher 2: the teacher returns NaN"),
        (lambda: amalgamated([nn.Linear(3, 2), Mine(3)]), "teacher 1: the teacher fails on images of shape 1x8x8"),
        (lambda: amalgamated(student=Mine(4)), "the student gives 4 outputs for 5 classes"),
        (lambda: amalgamated((both := two()), both[1]), "the student is one of the teachers"),
        (lambda: amalgamated(student=Auxiliary(Mine(5))), "the student returns a tuple in training mode"),
        (lambda: amalgamated(student=WithoutGradient(Mine(5))), "no gradient reaches the student's weights"),
        (lambda: amalgamated(student=nn.Sequential(nn.Flatten(), nn.LazyLinear(5))), "no shape yet"),
        (lambda: amalgamated(pool=[1, 2]), "images must be an ImageSet, not a list"),
        (lambda: amalgamated(term="joint"), "term must be a FeatureTerm"),
        (lambda: amalgamated(term=foreign_term()), "the feature term was not made for these networks"),
        (lambda: amalgamated([Mine(2)], classes=[list("ab")], student=Mine(2), term=foreign_term()),
         "3 lists of places for 2 networks"),
        (lambda: Joint.between([Pair(Mine(2))], Pair(Mine(2)), places=[""], x=x()), "gives a tuple, not one tensor"),
        (lambda: Joint.between([FlattensByView(Mine(2))], Mine(2), places=["network.head"], x=x()),
         "place in Mine 'network.head'|does not call its module"),
        (lambda: CommonSpace.between([FlattensByView(Mine(2))], Mine(2), places=["body", "network.head"], x=x()),
         "does not call its module 'network.head'"),
    ],
)  # fmt: skip
def test_what_cannot_be_amalgamated_is_refused_by_name(call: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(InputError, match=message) as e:
        call()
    assert "\n" not in str(e.value)
