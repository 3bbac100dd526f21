"""Drive chapters through papermill, one execution in this process at a time; keep stored chapters byte-stable."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from ..errors import DFKDError, InputError
from ..files import write_text
from ..locations import PACKAGE, book_root, repository_root
from .parameters import notebook_path, parameters

# The first code cell of every chapter, tagged `setup` and `remove-input`.
SETUP_CELL = """\
# On Colab: install the library that this chapter runs on, once.
import importlib.util
import os
import subprocess
import sys

REPOSITORY = "{address}"
if "google.colab" in sys.modules and not importlib.util.find_spec("dfkd_lib"):
    source = os.environ.get("DFKD_INSTALL") or REPOSITORY
    if not source:
        raise RuntimeError("set DFKD_INSTALL to what pip shall install: a wheel, or git+https://...")
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", source], check=True)"""


class ChapterFailed(DFKDError):
    """A notebook did not run to its end; what it did is in the partial notebook that the message names."""


def setup_cell() -> str:
    """The source of the set-up cell, with the repository address and branch of `_config.yml`."""
    root = repository_root()
    config = yaml.safe_load((root / "_config.yml").read_text(encoding="utf-8")) if root else {}
    repository = config.get("repository") or {}
    url, branch = repository.get("url") or "", repository.get("branch") or "main"
    return SETUP_CELL.replace("{address}", f"git+{url}@{branch}" if url else "")


def execute(chapter: str, out: Path, given: Mapping[str, Any], *, environment: Mapping[str, str] | None = None) -> Path:
    """Run a chapter with papermill, in a kernel of its own, and return `out/notebook.ipynb`.

    The chapter keeps its checkpoints and its record in `out`, and continues from what it finds there.

    Args:
        given: parameters that passed `check_parameters`; those at their defaults are not injected.
        environment: further variables of the kernel.

    Raises:
        ChapterFailed: a cell raised, the kernel died, or no record came out; `out/notebook.partial.ipynb` is kept,
            and what the kernel itself said in `out/kernel.log`.
        InputError: the chapter itself refused its input.
    """
    defaults = {name: parameter.default for name, parameter in parameters(chapter).items()}
    notebook = execute_file(
        notebook_path(chapter),
        out / "notebook.ipynb",
        {name: value for name, value in given.items() if value != defaults[name]},
        environment={"DFKD_OUT": str(out.resolve()), **(environment or {})},
    )
    if not (out / "record.json").is_file():
        notebook.replace(partial := partial_path(notebook))
        raise ChapterFailed(f"{chapter} ran but left no record.json in {out}; see {partial}")
    return notebook


def partial_path(notebook: Path) -> Path:
    """Where a notebook is written until it has run to its end."""
    return notebook.with_suffix(".partial.ipynb")


def execute_file(
    source: Path,
    target: Path,
    given: Mapping[str, Any],
    *,
    environment: Mapping[str, str],
    folder: Path | None = None,
) -> Path:
    """Run one notebook in its own folder, or in `folder`; `target` appears only when every cell has run.

    Raises:
        ChapterFailed, InputError: see `execute`.
    """
    papermill, failures = _jupyter()
    for logger in ("papermill", "asyncio"):  # what they log of a failure is raised here as well
        logging.getLogger(logger).setLevel(logging.CRITICAL)
    partial = partial_path(target.resolve())
    partial.parent.mkdir(parents=True, exist_ok=True)
    try:
        notebook = papermill.execute_notebook(
            _literal_path(source),
            _literal_path(partial),
            dict(given),
            kernel_name="python3",
            cwd=str(folder or source.resolve().parent),
            progress_bar=False,
            coalesce_streams=True,
            start_timeout=180,
            kernel_manager_class=_kernel_manager(partial.with_name("kernel.log"), environment),
        )
    except papermill.PapermillExecutionError as e:
        message = f"{e.ename}: {e.evalue}".splitlines()[0]
        kind = InputError if e.ename == InputError.__name__ else ChapterFailed
        raise kind(f"{source.stem} failed: {message} (see {partial})") from e
    except failures as e:
        message = " ".join(str(e).split())
        raise ChapterFailed(f"{source.stem} failed: {type(e).__name__}: {message} (see {partial})") from e
    if any(c.cell_type == "code" and c.source.strip() and c.execution_count is None for c in notebook.cells):
        raise ChapterFailed(f"{source.stem} failed: not every cell was run (see {partial})")
    return partial.replace(target)


def _literal_path(path: Path) -> str:
    """Papermill fills in braces in paths; doubled ones stand for themselves."""
    return str(path.resolve()).replace("{", "{{").replace("}", "}}")


def refresh(source: Path) -> None:
    """Run a stored notebook as it is, in place, on one thread; the same results give the same bytes.

    The set-up cell is brought in line with the repository address of `_config.yml`.
    """
    import nbformat

    notebook = nbformat.read(source, as_version=4)
    for cell in notebook.cells:
        if "setup" in cell.metadata.get("tags", []):
            cell.source = setup_cell()
    with tempfile.TemporaryDirectory(prefix="dfkd-") as name:
        fresh = Path(name) / source.name
        nbformat.write(notebook, fresh)
        target = Path(name) / "run.ipynb"
        execute_file(fresh, target, {}, environment={"OMP_NUM_THREADS": "1"}, folder=source.resolve().parent)
        write_text(source, stripped(target))


def stripped(path: Path) -> str:
    """The text of a notebook without what changes at every run: times, local paths, patch versions."""
    import nbformat

    notebook = nbformat.read(path, as_version=4)
    for key in ("papermill", "widgets"):
        notebook.metadata.pop(key, None)
    notebook.metadata.get("language_info", {}).pop("version", None)
    for cell in notebook.cells:
        for key in ("papermill", "execution"):
            cell.metadata.pop(key, None)
        if not cell.metadata.get("tags", True):
            del cell.metadata["tags"]
    return str(nbformat.writes(notebook)) + "\n"


def stored_notebooks() -> list[Path]:
    """Every notebook of the book: the pages, then the chapters."""
    return sorted(book_root().glob("*.ipynb")) + sorted((book_root() / "chapters").glob("*.ipynb"))


def _jupyter() -> tuple[Any, tuple[type[Exception], ...]]:
    """The papermill module, and the errors by which a kernel or its client gives up."""
    try:
        import papermill
        from nbclient.exceptions import CellControlSignal, CellTimeoutError, DeadKernelError
    except ImportError as e:
        raise DFKDError(f"running a chapter needs Jupyter ({e}): pip install 'dfkd-lib[book]'") from e
    return papermill, (CellControlSignal, CellTimeoutError, DeadKernelError, RuntimeError, OSError)


def _kernel_manager(log: Path, environment: Mapping[str, str]) -> type:
    """A class of kernels with further environment variables, whose own messages go to a file.

    They run in this interpreter, whatever a kernel of the same name is installed as, and import this library where
    this process has it from. They talk over files rather than ports: many can start at once, and nobody else can
    connect. Not on Windows, nor where the path of a socket would be too long for the system.
    """
    from jupyter_client.kernelspec import KernelSpec
    from jupyter_client.manager import AsyncKernelManager

    here = KernelSpec(
        argv=[sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"],
        display_name="Python 3 (ipykernel)",
        language="python",
    )
    own = {"DFKD_PACKAGE": str(PACKAGE), **environment}
    if repository_root():  # a checkout, not installed packages, which would hide modules of Python itself
        own["PYTHONPATH"] = os.pathsep.join(filter(None, [str(PACKAGE.parent), os.environ.get("PYTHONPATH")]))

    files_work = sys.platform != "win32" and len(tempfile.gettempdir()) <= 60

    class Manager(AsyncKernelManager):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self._folder = tempfile.TemporaryDirectory(prefix="k")
            if files_work:
                kwargs |= {"transport": "ipc", "connection_file": f"{self._folder.name}/c.json"}
            super().__init__(*args, **kwargs)

        @property
        def kernel_spec(self) -> KernelSpec:
            return here

        async def start_kernel(self, **kwargs: Any) -> None:  # type: ignore[override]
            with open(log, "wb") as f:
                await super().start_kernel(env={**os.environ, **own}, stdout=f, stderr=f, **kwargs)

    return Manager
