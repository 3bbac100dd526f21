"""What holds for every stored notebook and chapter of the book. It needs no list of chapters."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_book

from dfkd_lib.locations import repository_root
from dfkd_lib.reproduction import site
from dfkd_lib.reproduction.notebooks import setup_cell, stored_notebooks
from dfkd_lib.reproduction.papers import Paper, paper, paper_ids
from dfkd_lib.reproduction.parameters import chapters, notebook_path, parameters, profile, profile_note, profiles

STANDARD = {"profile": "smoke", "seed": 0, "device": "auto", "threads": 0, "out": ""}
MEGABYTE = 2**20


def problems(path: Path) -> list[str]:
    """What is wrong with the stored outputs of a notebook: it was run once, in order, without errors."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    code = [c for c in notebook["cells"] if c["cell_type"] == "code" and "".join(c["source"]).strip()]
    tags = {tag for c in notebook["cells"] for tag in c["metadata"].get("tags", [])}
    outputs = [output for c in code for output in c["outputs"]]
    metadata = [notebook["metadata"], *(c["metadata"] for c in notebook["cells"])]
    wrong = {
        "cells were not run once and in order": [c["execution_count"] for c in code] != list(range(1, len(code) + 1)),
        "an output is an error": any(o["output_type"] == "error" for o in outputs),
        "an output went to stderr": any(o.get("name") == "stderr" for o in outputs),
        "cells of a papermill run are left": not tags.isdisjoint({"injected-parameters", "papermill-error-cell-tag"}),
        "papermill's metadata are left": any("papermill" in m for m in metadata),
        "the kernel is not python3": notebook["metadata"].get("kernelspec", {}).get("name") != "python3",
        "it is larger than a megabyte": path.stat().st_size > MEGABYTE,
    }
    return [what for what, found in wrong.items() if found]


def first_code_cell(path: Path) -> dict[str, Any]:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return next(c for c in cells if c["cell_type"] == "code")


@pytest.mark.parametrize("path", stored_notebooks(), ids=lambda path: path.stem)
def test_stored_outputs_are_those_of_one_clean_run(path: Path) -> None:
    assert problems(path) == [], f"dfkd refresh {path.stem} may mend it"


@pytest.mark.parametrize("chapter", chapters())
def test_the_first_code_cell_sets_the_chapter_up(chapter: str) -> None:
    cell = first_code_cell(notebook_path(chapter))
    assert {"setup", "remove-input"} <= set(cell["metadata"]["tags"])
    assert "".join(cell["source"]) == setup_cell(), f"dfkd refresh {chapter} brings it in line"


@pytest.mark.parametrize("chapter", chapters())
def test_the_parameters_cell_is_the_smoke_profile(chapter: str) -> None:
    known = parameters(chapter)
    assert {name: known[name].default for name in STANDARD if name in known} == STANDARD
    assert "precision" in known
    for parameter in known.values():
        assert parameter.check(parameter.default) == parameter.default
    without_help = [name for name, parameter in known.items() if not parameter.help]
    assert without_help == [], "each parameter says what it is"


@pytest.mark.parametrize("chapter", chapters())
def test_profiles_set_what_the_chapter_knows(chapter: str) -> None:
    assert {"smoke", "cpu", "gpu", "paper"} <= set(profiles(chapter))
    for name in profiles(chapter):
        assert profile(chapter, name)["profile"] == name
        assert name == "smoke" or profile_note(chapter, name), f"the first line of {name}.yml says what runs"


@pytest.mark.parametrize("chapter", chapters())
def test_a_chapter_has_a_place_in_the_book(chapter: str) -> None:
    root = repository_root()
    assert root is not None
    assert notebook_path(chapter).resolve() in [path.resolve() for path in site.toc_files(root)]


@pytest.mark.parametrize("card", [paper(name) for name in paper_ids()], ids=lambda card: card.id)
def test_a_paper_card_names_chapters_that_exist(card: Paper) -> None:
    assert set(card.chapters) <= set(chapters())


def _edit(change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    notebook: Any = tiny_book.notebook()
    change(notebook)
    return notebook


STDERR = {"output_type": "stream", "name": "stderr", "text": "warning"}
ERROR = {"output_type": "error", "ename": "E", "evalue": "", "traceback": []}


@pytest.mark.parametrize(
    ("notebook", "problem"),
    [
        (_edit(lambda n: n["cells"][2].update(execution_count=None)), "in order"),
        (_edit(lambda n: n["cells"].reverse()), "in order"),
        (_edit(lambda n: n["cells"][3]["outputs"].append(ERROR)), "error"),
        (_edit(lambda n: n["cells"][3]["outputs"].append(STDERR)), "stderr"),
        (_edit(lambda n: n["cells"][3]["metadata"].update(tags=["injected-parameters"])), "papermill run"),
        (_edit(lambda n: n["cells"][3]["metadata"].update(papermill={})), "metadata"),
        (_edit(lambda n: n["metadata"].update(papermill={})), "metadata"),
        (_edit(lambda n: n["metadata"]["kernelspec"].update(name="torch")), "python3"),
        (_edit(lambda n: n["cells"][0].update(source="x" * MEGABYTE)), "megabyte"),
    ],
)
def test_the_checks_find_what_they_look_for(tmp_path: Path, notebook: dict[str, Any], problem: str) -> None:
    path = tmp_path / "n.ipynb"
    path.write_text(json.dumps(tiny_book.notebook()))
    assert problems(path) == []
    path.write_text(json.dumps(notebook))
    assert len(problems(path)) == 1 and problem in problems(path)[0]
