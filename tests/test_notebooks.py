"""The set-up cell, running notebooks, keeping stored ones byte-stable. Each execution is a real kernel."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import tiny_book

import dfkd_lib
from dfkd_lib.errors import InputError
from dfkd_lib.reproduction import notebooks
from dfkd_lib.reproduction.notebooks import ChapterFailed


@pytest.fixture
def chapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DFKD_BOOK", str(tmp_path / "book"))
    return tiny_book.write(tmp_path / "book")


def _set_up(monkeypatch: pytest.MonkeyPatch, *, colab: bool, installed: bool, address: str = "") -> list[list[str]]:
    """Run the set-up cell in a pretended place; returns the commands that it started."""
    commands: list[list[str]] = []
    monkeypatch.setattr(subprocess, "run", lambda command, check: commands.append(command))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if installed else None)
    if colab:
        monkeypatch.setitem(sys.modules, "google.colab", types.ModuleType("google.colab"))
    exec(notebooks.SETUP_CELL.replace("{address}", address), {})
    return commands


def test_the_setup_cell_installs_on_colab_only_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DFKD_INSTALL", raising=False)
    assert _set_up(monkeypatch, colab=False, installed=False) == []
    assert _set_up(monkeypatch, colab=True, installed=True) == []
    with pytest.raises(RuntimeError, match="set DFKD_INSTALL"):
        _set_up(monkeypatch, colab=True, installed=False)
    assert _set_up(monkeypatch, colab=True, installed=False, address="git+URL@v1")[0][-1] == "git+URL@v1"
    monkeypatch.setenv("DFKD_INSTALL", "a.whl")
    assert _set_up(monkeypatch, colab=True, installed=False, address="git+URL@v1")[0][-1] == "a.whl"


def test_the_setup_cell_holds_the_address_of_the_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notebooks, "repository_root", lambda: tmp_path)
    config = tmp_path / "_config.yml"
    config.write_text('repository: {url: ""}')
    assert 'REPOSITORY = ""' in notebooks.setup_cell()
    config.write_text("repository: {url: https://host/me/book, branch: v0.1.0}")
    assert 'REPOSITORY = "git+https://host/me/book@v0.1.0"' in notebooks.setup_cell()


def test_a_run_leaves_its_notebook_and_record(chapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "out {1}"
    before = os.getcwd(), dict(os.environ)
    path = notebooks.execute("tiny", out, {"profile": "smoke", "lr": 0.25})
    assert path == out / "notebook.ipynb" and not notebooks.partial_path(path).exists()
    assert json.loads((out / "record.json").read_text())["metrics"]["toy/DFAD/accuracy"] == 0.25
    injected = [c for c in json.loads(path.read_text())["cells"] if "injected-parameters" in c["metadata"]["tags"]]
    assert [c["source"] for c in injected] == [["# Parameters\n", "lr = 0.25\n"]]
    assert (os.getcwd(), dict(os.environ)) == before


def test_the_kernel_is_of_this_interpreter_and_this_library(
    chapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "jupyter" / "kernels" / "python3" / "kernel.json"  # as a hub may have it
    other.parent.mkdir(parents=True)
    other.write_text(json.dumps({"argv": ["/no/python3", "-f", "{connection_file}"], "display_name": "x"}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    monkeypatch.delenv("PYTHONPATH", raising=False)
    asks = (
        "import sys, dfkd_lib\\nPath(folder, 'who').write_text(sys.executable + ' ' + dfkd_lib.__file__)\\nrecord = {"
    )
    chapter.write_text(chapter.read_text().replace("record = {", asks, 1))
    notebooks.execute("tiny", tmp_path / "out", {"profile": "smoke"})
    assert (tmp_path / "out" / "who").read_text() == f"{sys.executable} {dfkd_lib.__file__}"


@pytest.mark.parametrize(
    ("mode", "error", "message"),
    [
        ("fail", ChapterFailed, "ValueError: the toy broke "),
        ("refuse", InputError, "no such dataset"),
        ("die", ChapterFailed, "Kernel died"),
        ("nothing", ChapterFailed, "left no record"),
    ],
)
def test_a_failed_run_keeps_the_partial_notebook(
    chapter: Path, tmp_path: Path, mode: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        notebooks.execute("tiny", tmp_path / "out", {"profile": "smoke", "mode": mode})
    assert not (tmp_path / "out" / "notebook.ipynb").exists()
    assert (tmp_path / "out" / "notebook.partial.ipynb").exists()
    assert "notebook.partial.ipynb" in str(caught.value) and "\n" not in str(caught.value)


def test_refreshing_twice_gives_the_same_bytes(chapter: Path) -> None:
    chapter.write_text(chapter.read_text().replace("# On Colab:", "# In Colab:"))
    notebooks.refresh(chapter)
    once = chapter.read_bytes()
    assert b"# On Colab:" in once and b"papermill" not in once and b"execution_count" in once
    assert "steps 3" in once.decode()
    notebooks.refresh(chapter)
    assert chapter.read_bytes() == once


def test_a_failed_refresh_changes_nothing(chapter: Path) -> None:
    chapter.write_text(chapter.read_text().replace('mode = \\"work\\"', 'mode = \\"fail\\"'))
    before = chapter.read_bytes()
    with pytest.raises(ChapterFailed):
        notebooks.refresh(chapter)
    assert chapter.read_bytes() == before
