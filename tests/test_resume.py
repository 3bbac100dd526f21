"""A run that is interrupted and resumed is the uninterrupted run, bit for bit: every method, in either layout.

Every network here has a convolution of several channels with a 3x3 kernel: only there do the layouts differ.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from test_distillers import tiny
from torch import Tensor, nn

from dfkd_lib import distillers, models, teachers
from dfkd_lib.data import ImageSet, load, text
from dfkd_lib.methods import (
    comprehensive,
    customised,
    fast,
    feature_amalgamation,
    grafting,
    grafting_blocks,
    impression,
)
from dfkd_lib.methods.amalgamation import Amalgam, Tasks
from dfkd_lib.methods.amalgamation import Settings as Amalgamation
from dfkd_lib.methods.as_dfd import ASDFD
from dfkd_lib.methods.as_dfd import Settings as Embeddings
from dfkd_lib.methods.as_dfd_baselines import ModifiedZSKD, ModifiedZSKT, RandomText
from dfkd_lib.methods.common_features import CommonSpace
from dfkd_lib.methods.customised import Adaptive, Source
from dfkd_lib.methods.grafting_baselines import OBJECTIVES, Whole, WholeSettings
from dfkd_lib.methods.mosaickd import DataFreeGame, MosaicKD
from dfkd_lib.methods.mosaickd import Settings as Mosaic
from dfkd_lib.methods.text_distiller import TextDistiller
from dfkd_lib.models import chains
from dfkd_lib.models import text as text_networks
from dfkd_lib.runtime import Runtime
from dfkd_lib.training import finetuning
from dfkd_lib.training.fit import Method, fit
from dfkd_lib.training.kd import KD
from dfkd_lib.training.kd import Settings as Imitation
from dfkd_lib.training.supervised import Recipe, Supervised

SHAPE = (3, 8, 8)
RUNTIMES = {
    "bfloat16 channels-last": Runtime(torch.device("cpu"), "bfloat16", channels_last=True),
    "float32 contiguous": Runtime(torch.device("cpu")),
}


def network(n_classes: int = 5, width: int = 6, seed: int = 0) -> nn.Sequential:
    """Two convolutions and a linear layer in a chain, with running statistics that say something."""
    torch.manual_seed(seed)
    made = nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, n_classes),
    )  # fmt: skip
    with torch.no_grad():
        made(torch.rand(32, *SHAPE))
    return made.eval()


def images(n: int = 40) -> ImageSet:
    pixels = torch.randint(256, (n, *SHAPE), dtype=torch.uint8, generator=torch.Generator().manual_seed(5))
    return ImageSet(pixels, torch.arange(n) % 5, classes=list("abcde"), name="noise", split="train")


# Builders: each makes the same method again and again, in about the state in which a user would begin.


def by_name(name: str, runtime: Runtime, **settings: Any) -> Method:
    players = network(), network(width=4, seed=1)
    return distillers.build(
        name, *players, SHAPE, runtime, preset="paper", **{"n_updates": 20, **tiny(name), **settings}
    )  # fmt: skip


def kd(runtime: Runtime) -> Method:
    return KD(network(), network(width=4, seed=1), images(), Imitation(batch_size=8, augment=True), runtime)


def supervised(runtime: Runtime) -> Method:
    return Supervised(network(), images(), Recipe(epochs=2, batch_size=8, nesterov=True, augment=True), runtime)


def mosaickd(without: str, runtime: Runtime) -> Method:
    torch.manual_seed(0)
    pixels = {"mean": [0.3] * 3, "std": [0.4] * 3}
    generator = models.build_generator("toolbox_large", latent_dim=6, image_shape=SHAPE, ngf=2, **pixels)
    judge = models.build_discriminator("patch5", image_shape=SHAPE, ndf=4, **pixels)
    settings = Mosaic(latent_dim=6, batch_size=8, kd_steps=3, n_steps=10, pad=1, lr_student=0.05)
    players = network(), network(width=4, seed=1), generator
    if without == "images":
        return DataFreeGame(*players, settings, runtime)
    return MosaicKD(*players, None if without else judge, images(), settings, runtime)


def text_method(kind: type[TextDistiller], runtime: Runtime) -> Method:
    pytest.importorskip("transformers")
    settings = Embeddings(
        length=12, min_length=5, batch_size=6, craft_steps=4, eta=0.5, lr=1e-3, n_updates=20, replay=1, memory=2
    )
    vocabulary = text.digit_vocabulary()
    torch.manual_seed(0)
    teacher = text_networks.bert(vocabulary, 5, layers=3, width=16, heads=2, positions=16).eval()
    return kind(teacher, text_networks.cut(teacher, 2), vocabulary, settings, runtime)


def fine_tuning(runtime: Runtime) -> Method:
    pytest.importorskip("transformers")
    sentences = text.load("digit_sentences", "fit", length=10, limit=32)
    torch.manual_seed(0)
    student = text_networks.bert(sentences.vocabulary, 10, layers=2, width=16, heads=2, positions=16)
    recipe = finetuning.Recipe(layers=2, width=16, heads=2, epochs=1, batch_size=8)
    return finetuning.FineTuning(student, sentences, recipe, runtime, n_steps=6)


def grafted(objective: str, runtime: Runtime) -> Method:
    x = runtime.images(torch.rand(2, *SHAPE))
    teacher = chains.cut(runtime.prepare(network()), ["4", "9"], x)
    student = chains.cut(runtime.prepare(network(width=4, seed=1)), ["4", "9"], x)
    scions = grafting_blocks.scions(teacher, student, x)
    views = grafting.look(teacher, images(), runtime, pad=1)
    if objective:
        return Whole(teacher, scions, views, WholeSettings(objective, n_steps=6, batch_size=8), runtime)
    settings = grafting.Settings(block_steps=(2, 1), network_steps=3, batch_size=8)
    return grafting.NetGraft(teacher, scions, views, settings, runtime)


AMALGAMATION = Amalgamation(n_steps=6, batch_size=8, pad=1)
TASKS = Tasks.disjoint([2, 3])


def amalgam(term: str, runtime: Runtime) -> Method:
    parts, student = [network(2), network(3, seed=1)], network(seed=9)
    x, made = torch.rand(2, *SHAPE), None
    if term == "joint":
        made = comprehensive.Joint.between(parts, student, places=["0", "4", "9"], x=x)
    elif term == "common":
        made = CommonSpace.between(parts, student, places=["4", "4", "4"], x=x, width=4)
    return Amalgam(parts, student, images(), TASKS, AMALGAMATION, runtime, made)


def layerwise(runtime: Runtime) -> Method:
    x = torch.rand(2, *SHAPE)
    parts = [runtime.prepare(chains.chain(part, x)) for part in (network(2), network(3, seed=1))]
    student = chains.without_norms(chains.chain(network(seed=9), x))
    codes = [feature_amalgamation.pca(*m.result(), 6) for m in feature_amalgamation.moments(parts, images(), runtime)]
    return comprehensive.Layerwise(parts, student, codes, images(), TASKS, AMALGAMATION, runtime)


def component(runtime: Runtime) -> Method:
    rows = (torch.arange(40) % 3 == 0).long()
    sources = customised.split([Source(network(4), [0, 1, 2]), Source(network(5, seed=1), [1, 2, 0])], rows)
    return Adaptive(sources, network(3, seed=9), images(), AMALGAMATION, runtime, places=[["1", "5"]] * 3,
                    two_sided=True)  # fmt: skip


def target(runtime: Runtime) -> Method:
    sources = [Source(network(2), [0, 1], [0, 1]), Source(network(3, seed=1), [0, 1, 2], [2, 3, 4])]
    return Adaptive(sources, network(seed=9), images(), AMALGAMATION, runtime, places=[["1", "5"]] * 3,
                    two_sided=False)  # fmt: skip


def decoding(schedule: str, runtime: Runtime) -> Method:
    template = impression.Template(network(), ("2", "6", impression.EMBEDDING), runtime)
    x, settings = images(8).batch(range(8))[0], impression.Settings(steps=6, schedule=schedule)
    return impression.Decoding(template, template.encode(runtime.images(x[:4])), x[4:], settings, runtime)


CASES: dict[str, Callable[[Runtime], Method]] = {
    **{name: partial(by_name, name) for name in distillers.names()},
    "dafl, joint": partial(by_name, "dafl", joint=True, kd_steps=1),
    "zskt, fresh noise": partial(by_name, "zskt", same_z=False, samples_in_eval=True),
    "zskt, attention": partial(by_name, "zskt", attention_layers=("6",)),
    "dfq, statistics of a Gaussian": partial(by_name, "dfq", gaussian=True, warmup=2),
    **{f"fast, {meta}": partial(by_name, "fast", meta=meta, reset_l0=4) for meta in fast.META},
    "nayer, noisy layers that stay": partial(by_name, "nayer", redraw=False, g_life=2),
    "cmi, non-adversarial": partial(by_name, "cmi", preinvert=2, adv=0.0, grow=False),
    "cmi, scratch": partial(by_name, "cmi", preinvert=0, oh=1.0),
    "cmi, without contrast": partial(by_name, "cmi", cr=0.0),
    "kd": kd,
    "supervised": supervised,
    "mosaickd": partial(mosaickd, ""),
    **{f"mosaickd without {what}": partial(mosaickd, what) for what in ("discriminator", "images")},
    **{
        f"text, {kind.__name__}": partial(text_method, kind) for kind in (ASDFD, ModifiedZSKT, ModifiedZSKD, RandomText)
    },
    "text, fine-tuning": fine_tuning,
    "grafting": partial(grafted, ""),
    **{f"grafting, whole student on {objective}": partial(grafted, objective) for objective in OBJECTIVES},
    **{f"amalgamation, {term}": partial(amalgam, term) for term in ("plain", "joint", "common")},
    "amalgamation, layerwise": layerwise,
    "amalgamation, component": component,
    "amalgamation, target": target,
    **{f"decoding, {schedule}": partial(decoding, schedule) for schedule in impression.SCHEDULES},
}
STEPS = 6


def differences(one: Any, other: Any, at: str = "") -> list[str]:
    """Where two nested states are not equal bit for bit; time spent does not count."""
    if isinstance(one, Tensor):
        return [] if one.dtype == other.dtype and torch.equal(one, other) else [at]
    if isinstance(one, dict):
        assert one.keys() == other.keys(), at
        return [where for key in one for where in differences(one[key], other[key], f"{at}/{key}")]
    if isinstance(one, list | tuple):
        assert len(one) == len(other), at
        pairs = enumerate(zip(one, other, strict=True))
        return [where for i, pair in pairs for where in differences(*pair, f"{at}/{i}")]
    return [] if one == other or at.endswith("seconds") else [at]


def interrupt(method: Method, after: int) -> None:
    """Have a method stop the process, so to speak, instead of taking another step."""
    step, taken = method.step, iter(range(after))

    def once_more() -> dict[str, Tensor]:
        if next(taken, None) is None:
            raise KeyboardInterrupt
        return step()

    method.step = once_more  # type: ignore[method-assign]


@pytest.mark.parametrize("runtime", RUNTIMES.values(), ids=RUNTIMES)
@pytest.mark.parametrize("build", CASES.values(), ids=CASES)
def test_a_resumed_run_is_the_uninterrupted_one(
    build: Callable[[Runtime], Method], runtime: Runtime, tmp_path: Path
) -> None:
    path = tmp_path / "run.safetensors"
    run = partial(fit, n_steps=STEPS, name="run", checkpoint_every=0, progress=False)
    whole, first = build(runtime), build(runtime)
    run(whole)
    breaks = [1, 3]
    interrupt(first, breaks[0])
    with pytest.raises(KeyboardInterrupt):
        run(first, checkpoint=path)
    second = build(runtime)
    interrupt(second, breaks[1] - breaks[0])
    with pytest.raises(KeyboardInterrupt):
        run(second, checkpoint=path)
    third = build(runtime)
    torch.rand(7)  # where torch's own stream stands must not matter
    assert run(third, checkpoint=path).resumed_at == breaks
    assert not differences(whole.state_dict(), third.state_dict())


@pytest.mark.parametrize("build", CASES.values(), ids=CASES)
def test_what_a_step_reports_holds_no_graph(build: Callable[[Runtime], Method]) -> None:
    method = build(next(iter(RUNTIMES.values())))
    for _ in range(2):
        assert not [name for name, value in method.step().items() if isinstance(value, Tensor) and value.requires_grad]


@pytest.mark.parametrize("runtime", RUNTIMES.values(), ids=RUNTIMES)
def test_a_resumed_teacher_is_the_uninterrupted_one(
    runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, test = load("digits", "train"), load("digits", "test")
    recipe = Recipe(epochs=1, batch_size=256)

    def ask() -> teachers.Teacher:
        return teachers.train_or_load("digits_cnn_half", train, test, recipe, runtime)

    def broken_off(method: Method, *args: Any, **options: Any) -> Any:
        interrupt(method, 2)
        return fit(method, *args, **options, checkpoint_every=0)

    monkeypatch.setenv("DFKD_CACHE", str(tmp_path / "whole"))
    whole = ask()
    assert whole.facts["resumed"] == {}
    monkeypatch.setenv("DFKD_CACHE", str(tmp_path / "broken"))
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(teachers, "fit", broken_off)
        ask()
    resumed = ask()
    assert [about["at"] for about in resumed.facts["resumed"].values()] == [[2]]
    assert not differences(whole.module.state_dict(), resumed.module.state_dict())
    assert resumed.facts["curve"] == whole.facts["curve"]
