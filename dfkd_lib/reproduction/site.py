"""Build the book: run every chapter, run the pages that are made from records, and let Jupyter Book render them."""

from __future__ import annotations

import base64
import json
import mimetypes
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from ..errors import DFKDError, InputError
from ..files import lock, write_text
from ..locations import repository_root
from . import runs
from .notebooks import execute_file, stripped
from .parameters import profile as read_profile


def build(profile: str = "smoke", workers: int = 2, *, strict: bool = False, single: bool = False) -> Path:
    """Run all chapters, then build the book from what was run; returns the path of its `index.html`.

    A chapter that was run before at this profile, by the same notebook and library, is not run again; an
    interrupted one is continued.

    Args:
        workers: chapters at a time; they share the processor's cores evenly.
        strict: a warning of Jupyter Book is an error.
        single: the whole book as one page, `book.html`, is put beside the index.

    Raises:
        DFKDError: a chapter failed (its name and its partial notebook are printed), or the build did.
        InputError: a chapter does not have the profile, or there is no checkout to build from.
    """
    if workers < 1:
        raise InputError(f"workers must be 1 or more, not {workers}")
    root = _root()
    notebooks = [path for path in toc_files(root) if path.suffix == ".ipynb"]
    chapters = [path.stem for path in notebooks if path.parent.name == "chapters"]
    for chapter in chapters:
        read_profile(chapter, profile)
    with lock(root / "_build" / ".lock", timeout=0, what="the book's _build folder"):
        with _timed("chapters"):
            _run_chapters(root, chapters, profile, workers)
        source = _copy_source(root, root / "_build" / "source")
        with _timed("pages"):
            for path in notebooks:
                target = source / path.relative_to(root)
                run = _folder(root, target.stem, profile) / "notebook.ipynb"
                if target.stem not in chapters:
                    run = execute_file(path, root / "_build" / "pages" / path.name, {}, environment={})
                target.write_text(stripped(run), encoding="utf-8")
        with _timed("rendering"):
            index = _render(source, root, strict)
            if single:
                print(f"the book in one page is at {_render_single(source, root)}")
    print(f"the book is at {index}")
    return index


def build_stored(*, strict: bool = True, single: bool = False) -> Path:
    """Build the book from the outputs that its notebooks store, under `_build/check`; `single` as in `build`."""
    root = _root()
    with lock(root / "_build" / ".lock", timeout=0, what="the book's _build folder"):
        source = _copy_source(root, root / "_build" / "check" / "source")
        index = _render(source, root / "_build" / "check", strict)
        if single:
            _render_single(source, root / "_build" / "check")
        return index


def toc_files(root: Path) -> list[Path]:
    """The files that `_toc.yml` names, in reading order."""

    def entries(node: Any) -> Iterator[str]:
        if isinstance(node, dict):
            yield from (str(value) for key, value in node.items() if key in ("root", "file"))
            yield from (name for value in node.values() for name in entries(value))
        elif isinstance(node, list):
            yield from (name for value in node for name in entries(value))

    toc = yaml.safe_load((root / "_toc.yml").read_text(encoding="utf-8"))
    found = []
    for name in entries(toc):
        choices = [root / name, *(root / f"{name}{suffix}" for suffix in (".md", ".ipynb"))]
        path = next((path for path in choices if path.is_file()), None)
        if path is None:
            raise DFKDError(f"_toc.yml names {name}, but there is no such page; correct the entry")
        found.append(path)
    return found


def _root() -> Path:
    root = repository_root()
    if root is None:
        raise InputError("the book is built from a checkout of the repository; this is an installed package")
    return root


def _folder(root: Path, chapter: str, profile: str) -> Path:
    return root / "_build" / "runs" / f"{chapter}-{profile}"


def _run_chapters(root: Path, chapters: list[str], profile: str, workers: int) -> None:
    threads = max(1, (os.cpu_count() or 1) // max(1, min(workers, len(chapters))))
    with ThreadPoolExecutor(workers) as pool:
        done = list(pool.map(lambda chapter: _run_chapter(root, chapter, profile, threads), chapters))
    if failed := [chapter for chapter, ok in zip(chapters, done, strict=True) if not ok]:
        raise DFKDError(f"failed: {', '.join(failed)}; the lines above say why and where the partial notebook is")


def _run_chapter(root: Path, chapter: str, profile: str, threads: int) -> bool:
    """Run one chapter in a process of its own, its messages passed on under its name."""
    folder = _folder(root, chapter, profile)
    where = "--resume"
    if not (folder / "run.json").is_file() or not runs.made_of(chapter).items() <= runs.asked(folder).items():
        shutil.rmtree(folder, ignore_errors=True)
        where = "--out"
    elif runs.is_finished(folder):
        print(f"{chapter}: was run before, and nothing has changed", flush=True)
        return True
    command = [sys.executable, "-m", "dfkd_lib", "run", chapter, "--profile", profile, where, str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    start = time.perf_counter()
    with subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            print(f"{chapter}: {line.rstrip()}", flush=True)
    print(f"{chapter}: {time.perf_counter() - start:.0f} s", flush=True)
    return process.returncode == 0


def _copy_source(root: Path, source: Path) -> Path:
    """A fresh copy of what Jupyter Book reads; links to a repository only where there is an address."""
    shutil.rmtree(source, ignore_errors=True)
    source.mkdir(parents=True)
    shutil.copy(root / "_toc.yml", source)
    for name in ("_static", "book"):
        shutil.copytree(root / name, source / name, ignore=shutil.ignore_patterns(".*", "*.partial.ipynb"))
    config = yaml.safe_load((root / "_config.yml").read_text(encoding="utf-8"))
    if not (config.get("repository") or {}).get("url"):
        for key in ("repository", "launch_buttons"):
            config.pop(key, None)
        for key in ("use_repository_button", "use_issues_button", "use_edit_page_button"):
            config.get("html", {}).pop(key, None)
    (source / "_config.yml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    return source


def _describe_figures(source: Path) -> None:
    """Give each figure that a cell shows an alt text: the caption in italics that stands under it."""
    for path in sorted(source.glob("book/**/*.ipynb")):
        notebook = json.loads(path.read_text(encoding="utf-8"))
        for cell, below in pairwise(notebook["cells"]):
            caption = re.match(r"\*([^*].*?)\*$", "".join(below["source"]), flags=re.MULTILINE)
            if caption and any("image/png" in output.get("data", {}) for output in cell.get("outputs", [])):
                words = re.sub(r"\{\w+\}|[`$*]", "", caption.group(1))
                cell["metadata"]["mystnb"] = {"image": {"alt": words}}
        path.write_text(json.dumps(notebook), encoding="utf-8")


def _render(source: Path, target: Path, strict: bool) -> Path:
    """Run Jupyter Book from `source` to `target/_build/html`; prints its warnings."""
    _describe_figures(source)
    html = target / "_build" / "html"
    for stale in (html, html.parent / ".doctrees"):
        shutil.rmtree(stale, ignore_errors=True)
    lines, failed = _jupyter_book(source, target, ["-W", "--keep-going"] if strict else [])
    for line in lines if failed else (line for line in lines if "WARNING" in line or "ERROR" in line):
        print(line)
    if failed or not (html / "index.html").is_file():
        raise DFKDError("Jupyter Book did not build the book; the lines above say why")
    _without_doubles(html)
    return html / "index.html"


def _render_single(source: Path, target: Path) -> Path:
    """Put the whole book as one page, with its pictures inside, beside the index that was built."""
    lines, failed = _jupyter_book(source, target, ["--builder", "singlehtml"])
    page = target / "_build" / "singlehtml" / "book" / "intro.html"
    if failed or not page.is_file():
        print("\n".join(lines))
        raise DFKDError("Jupyter Book did not build the single page; the lines above say why")
    single = target / "_build" / "html" / "book.html"
    write_text(single, _self_contained(page))
    return single


def _self_contained(page: Path) -> str:
    """The text of a page with its local styles, pictures and MathJax inside, and its other local scripts left out."""

    def local(address: str) -> Path:  # Sphinx writes a root page in a folder as if it lay at the top
        name = address.split("?")[0].split("#")[0]
        return next((path for base in page.parents[:2] if (path := base / name).is_file()), page.parent / name)

    def picture(found: re.Match[str]) -> str:
        path = local(found[2])
        if not path.is_file():
            return found[0]
        kind = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
        return f"{found[1]}data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}{found[3]}"

    def script(found: re.Match[str]) -> str:
        path = local(found[1])
        inside = path.parent.name == "mathjax" and "defer" in found[0] and path.is_file()  # it stands there twice
        return f'<script id="mathjax">{path.read_text(encoding="utf-8")}</script>' if inside else ""

    def style(found: re.Match[str]) -> str:
        address = re.search(r'href="([^"]+\.css[^"]*)"', found[0])
        path = local(address[1]) if address else page
        return f"<style>{_plain_style(path)}</style>" if address and path.is_file() else ""

    plain = "<style>.bd-sidebar-primary, .bd-header-article, .skip-link {display: none !important}</style></head>"
    text = re.sub(r"<link[^>]*>", style, page.read_text(encoding="utf-8")).replace("</head>", plain, 1)
    text = re.sub(r"<script>(?!window\.MathJax).*?</script>", "", text, flags=re.S)  # they steer what was left out
    text = re.sub(r'<script[^>]*src="((?!https?:)[^"]*)"[^>]*></script>', script, text)
    return re.sub(r'(<img[^>]*src=")(?!data:|https?:)([^"]+)(")', picture, text)


def _plain_style(path: Path) -> str:
    """A style sheet with those that it imports inside, without the fonts of icons and other files."""
    text = re.sub(
        r'@import (?:url\()?"([^"]+)"\)?;',
        lambda found: _plain_style(path.parent / found[1]) if (path.parent / found[1]).is_file() else "",
        path.read_text(encoding="utf-8"),
    )
    return re.sub(r"url\((?![\"']?(?:data:|#))[^)]*\)", "none", re.sub(r"@font-face\s*\{[^}]*\}", "", text))


def _without_doubles(html: Path) -> None:
    """Take out what Jupyter Book puts in twice, an error in browsers: Thebe, which no page uses, and MathJax, which it
    takes for a script of the book's own beside the deferred one of pages with equations."""
    scripts = (
        r"<script>const THEBE_JS_URL.*?</script>|<script[^>]*sphinx-thebe[^>]*></script>"
        r'|<script src="[^"]*/mathjax/[^"]*"></script>'
    )
    for page in html.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        if (plain := re.sub(scripts, "", text)) != text:
            page.write_text(plain, encoding="utf-8")


def _jupyter_book(source: Path, target: Path, options: list[str]) -> tuple[list[str], bool]:
    """Run Jupyter Book; returns what it said, and whether it failed."""
    call = "import sys; from jupyter_book.cli.main import main; sys.exit(main())"
    run = subprocess.run(
        [sys.executable, "-c", call, "build", str(source), "--path-output", str(target), *options],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return run.stdout.splitlines(), bool(run.returncode)


@contextmanager
def _timed(what: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    print(f"{what}: {time.perf_counter() - start:.0f} s", flush=True)
