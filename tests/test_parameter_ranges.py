"""What a chapter's parameters may be, it can do: values are drawn from the documented ranges, and every cell runs.

Everything takes one step, and of each dataset a part is there. What cannot be is refused with an InputError; nothing
else is raised.
"""

from __future__ import annotations

import contextlib
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from dfkd_lib import teachers
from dfkd_lib.data import sources
from dfkd_lib.errors import InputError
from dfkd_lib.models import text
from dfkd_lib.reproduction import chapter as chapter_module
from dfkd_lib.reproduction import plain
from dfkd_lib.reproduction.parameters import Parameter, chapters, check_parameters, parameters
from dfkd_lib.training.fit import Fit, Method, fit

PER_CLASS = 70  # a tenth of them is held out
OTHERS = 80
# Other values are downloads, or what the machine has, or take the time that this file has for all.
FIXED = {
    "profile", "out", "device", "threads", "dataset", "scenes", "elsewhere", "compile_networks", "scene_pretrained",
    "images", "pair_template", "template_epochs", "verifier_epochs", "preset", "codes", "scene_teacher",
    "scene_student",
}  # fmt: skip
EMBEDDED = dict(sources.EMBEDDED)


@lru_cache
def few(name: str, split: str) -> sources.Arrays:
    """The first images of each class of an embedded dataset; of one without a class per image, the first of all."""
    whole = EMBEDDED[name](split)
    chosen: Any = slice(OTHERS)
    if whole.labels.ndim == 1 and whole.classes:
        chosen = sources.rank_in_class(whole.labels) < PER_CLASS
    return whole._replace(images=whole.images[chosen], labels=whole.labels[chosen])


def one_step(method: Method, n_steps: int, **options: Any) -> Fit:
    """What `fit` does, but one step at most."""
    return fit(method, min(n_steps, 1), **options)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    for module in (chapter_module, teachers, text):
        # Impressions are of images that a network recognises.
        if (module, request.node.callspec.params["chapter"]) != (teachers, "impression"):
            monkeypatch.setattr(module, "fit", one_step)
    monkeypatch.setattr(sources, "digits", lambda split: few("digits", split))
    for name in EMBEDDED:
        monkeypatch.setitem(sources.EMBEDDED, name, lambda split, name=name: few(name, split))
    monkeypatch.setattr(chapter_module.Chapter, "figure", lambda self, figure, name: figure)


def values(parameter: Parameter) -> st.SearchStrategy[Any]:
    """Values within the documented range, the smallest first; without an upper bound they stay small."""
    default = parameter.default
    if parameter.name in FIXED or parameter.name.endswith("precision"):
        return st.just(default)
    if isinstance(default, bool):
        return st.booleans()
    if not isinstance(default, list):
        return elements(default, parameter)
    least = 0 if "none:" in parameter.help else 1
    if parameter.range.startswith("{"):
        each = elements("", parameter)
        some = st.lists(each, min_size=least, max_size=2, unique=True)
        return st.just(default) | some if parameter.name == "parts" else some
    if not default or not isinstance(default[0], int | float):
        return st.just(default)
    each = elements(default[0], parameter)
    return st.lists(each, min_size=len(default), max_size=len(default)) | st.lists(each, min_size=least, max_size=2)


def elements(default: Any, parameter: Parameter) -> st.SearchStrategy[Any]:
    if parameter.range.startswith("{"):
        return st.sampled_from(parameter.range.strip("{}").split("|"))
    if not isinstance(default, int | float):
        return st.just(default)
    low, _, high = parameter.range[1:-1].partition("..")
    least = float(low or 0)
    if isinstance(default, int):
        return st.sampled_from([int(v) for v in (least, least + 1, 5) if v >= least])
    inside = [least] if parameter.range[0] == "[" else []
    return st.sampled_from([*inside, least + (float(high or least + 1) - least) / 2, default])


@pytest.mark.parametrize("chapter", chapters())
@settings(
    max_examples=2,
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(data=st.data())
def test_values_within_their_ranges_work(chapter: str, tmp_path: Path, data: st.DataObject) -> None:
    known = parameters(chapter)
    drawn = {name: data.draw(values(parameter), name) for name, parameter in known.items()}
    given = check_parameters(chapter, {name: value for name, value in drawn.items() if value != known[name].default})
    with contextlib.suppress(InputError):
        plain.execute(chapter, Path(tempfile.mkdtemp(dir=tmp_path)), given, environment={})


@pytest.mark.parametrize(
    ("chapter", "given"),
    [
        ("fast", {"parts": ["features"], "probe_steps": 2}),
        ("comparison", {"parts": ["methods"], "methods": ["random"]}),
        ("comparison", {"parts": ["methods"], "methods": ["nayer"]}),
        ("as-dfd", {"parts": ["crafting"], "test_limit": 5}),
        ("amalgamation", {"moment_images": 2}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_combinations_that_once_broke(chapter: str, given: dict[str, Any], tmp_path: Path) -> None:
    plain.execute(chapter, tmp_path, check_parameters(chapter, given), environment={})


@pytest.mark.parametrize(
    ("chapter", "changes", "words"),
    [
        ("fast", {"warmup": 24}, "none is left for the student"),
        ("fast", {"images": 2}, "none is left for the student"),
        ("fast", {"k_values": [2]}, "go together"),
    ],
)
def test_what_cannot_be_is_refused_by_name(chapter: str, changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    given = check_parameters(chapter, {"parts": ["features"], **changes})
    with pytest.raises(InputError, match=words):
        plain.execute(chapter, tmp_path, given, environment={})
