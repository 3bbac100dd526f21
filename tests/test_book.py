"""Building the book: a real build of a tiny one, what is reused, what a failure says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_book
import yaml

from dfkd_lib.errors import DFKDError, InputError
from dfkd_lib.reproduction import notebooks, site

CONFIG = """
title: Tiny
only_build_toc_files: true
exclude_patterns: [_build, ".*", "**/.*"]
execute: {execute_notebooks: "off", stderr_output: warn}
repository: {url: "", branch: main}
launch_buttons: {colab_url: https://colab.research.google.com}
html: {use_repository_button: true}
"""
TOC = """
format: jb-book
root: book/intro
chapters:
  - file: book/chapters/tiny
  - file: book/page
"""
PAGE = "from pathlib import Path\nprint('made by', Path.cwd().name)"


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with one chapter and one page that is made from code."""
    for module in (site, notebooks):
        monkeypatch.setattr(module, "repository_root", lambda: tmp_path)
    monkeypatch.setenv("DFKD_BOOK", str(tmp_path / "book"))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    (tmp_path / "_config.yml").write_text(CONFIG)
    (tmp_path / "_toc.yml").write_text(TOC)
    (tmp_path / "_static").mkdir()
    tiny_book.write(tmp_path / "book")
    (tmp_path / "book" / "intro.md").write_text("# A tiny book\n\n[Chapter](chapters/tiny.ipynb)\n")
    title = {"cell_type": "markdown", "id": "t", "metadata": {}, "source": "# A page"}
    page = tiny_book.notebook() | {"cells": [title, tiny_book.cell(PAGE, number=1)]}
    (tmp_path / "book" / "page.ipynb").write_text(json.dumps(page))
    return tmp_path


def test_a_book_is_built_from_what_was_just_run(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index = site.build("cpu", workers=2, strict=True)
    assert index == root / "_build" / "html" / "index.html" and index.is_file()
    out = capsys.readouterr().out
    assert "tiny: toy: done after 5 steps" in out and str(index) in out
    assert "chapters: " in out and "pages: " in out and "rendering: " in out
    assert "steps 5" in (root / "_build/html/book/chapters/tiny.html").read_text()
    assert "made by book" in (root / "_build/html/book/page.html").read_text()
    for path in (root / "_build" / "source").rglob("*.ipynb"):
        assert str(root) not in path.read_text()
    stored = json.loads((root / "book" / "chapters" / "tiny.ipynb").read_text())
    assert stored == tiny_book.notebook(), "a build changes nothing in the checkout"

    record = root / "_build" / "runs" / "tiny-cpu" / "record.json"
    before = record.stat().st_mtime_ns
    site._run_chapters(root, ["tiny"], "cpu", 2)
    assert record.stat().st_mtime_ns == before, "an unchanged chapter is not run again"
    chapter = root / "book" / "chapters" / "tiny.ipynb"
    chapter.write_text(chapter.read_text().replace("1.0, ", "2.0, "))
    site._run_chapters(root, ["tiny"], "cpu", 2)
    assert record.stat().st_mtime_ns > before, "a changed one is"


def test_a_failing_chapter_stops_the_build(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "book/profiles/tiny/gpu.yml").write_text("mode: fail\n")
    with pytest.raises(DFKDError, match="failed: tiny"):
        site.build("gpu")
    out = capsys.readouterr().out
    assert "tiny: dfkd: error: tiny failed: ValueError: the toy broke (see " in out
    assert (root / "_build/runs/tiny-gpu/notebook.partial.ipynb").is_file()
    assert not (root / "_build/html").exists()


def test_what_is_wrong_is_said_before_anything_runs(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="unknown profile of tiny 'paper'"):
        site.build("paper")
    with pytest.raises(InputError, match="workers"):
        site.build(workers=0)
    (root / "_toc.yml").write_text(TOC + "  - file: book/chapters/none\n")
    with pytest.raises(DFKDError, match="book/chapters/none"):
        site.build()
    monkeypatch.setattr(site, "repository_root", lambda: None)
    with pytest.raises(InputError, match="checkout"):
        site.build()
    assert not (root / "_build").exists()


def test_links_to_the_repository_appear_with_its_address(root: Path) -> None:
    def configuration() -> dict[str, object]:
        source = site._copy_source(root, root / "_build" / "source")
        return dict(yaml.safe_load((source / "_config.yml").read_text()))

    assert configuration().keys().isdisjoint({"repository", "launch_buttons"})
    assert configuration()["html"] == {}
    (root / "_config.yml").write_text(CONFIG.replace('url: ""', "url: https://host/me/book"))
    with_address = configuration()
    assert with_address["repository"] == {"url": "https://host/me/book", "branch": "main"}
    assert "launch_buttons" in with_address and with_address["html"] == {"use_repository_button": True}


def test_stored_outputs_are_built_with_warnings_as_errors(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "book" / "intro.md").write_text("# A tiny book\n\n[Nowhere](nowhere.md)\n")
    with pytest.raises(DFKDError, match="did not build"):
        site.build_stored()
    assert "nowhere.md" in capsys.readouterr().out
    assert not (root / "_build" / "html").exists() and not (root / "_build" / "runs").exists()
