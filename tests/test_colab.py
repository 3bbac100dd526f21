"""A chapter as Colab meets it: the notebook alone, in an environment that holds what Colab ships and not this library.

The environment is new, and its packages are links to those of this one: nothing is downloaded.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import textwrap
import venv
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from packaging.requirements import Requirement

from dfkd_lib.locations import book_root, repository_root

SHIPPED = ("torch", "torchvision", "ipykernel", "numpy", "pandas", "matplotlib", "scikit-learn", "pip")
ALSO_SHIPPED = ("PyYAML", "filelock", "safetensors")  # of what the library asks for
TO_BUILD = ("hatchling",)  # pip would fetch it
SHORT = {"parts": '["gradients"]', "n_steps": "2", "teacher_epochs": "1", "scratch_epochs": "1"}

pytestmark = pytest.mark.skipif(os.name == "nt" or repository_root() is None, reason="needs links, and a checkout")


def closure(names: tuple[str, ...]) -> dict[str, importlib.metadata.Distribution]:
    """The distributions with these names and all that they require, by normal name."""
    found: dict[str, importlib.metadata.Distribution] = {}
    seen: set[tuple[str, str]] = set()
    todo = [(name, "") for name in names]
    while todo:
        name, extra = todo.pop()
        name = re.sub(r"[-_.]+", "-", name).lower()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        try:
            found[name] = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # of another platform
        for requirement in map(Requirement, found[name].requires or []):
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                todo += [(requirement.name, wanted) for wanted in ("", *requirement.extras)]
    return found


@pytest.fixture
def colab(tmp_path: Path) -> Path:
    """The Python of a new environment, in which `google.colab` is loaded as it is there."""
    folder = tmp_path / "environment"
    venv.create(folder, with_pip=False, symlinks=True)
    packages = next((folder / "lib").glob("python*/site-packages"))
    for distribution in closure(SHIPPED + ALSO_SHIPPED + TO_BUILD).values():
        for top in {path.parts[0] for path in distribution.files or [] if path.parts[0] not in ("..", "__pycache__")}:
            target = Path(str(distribution.locate_file(top)))
            if target.exists() and not (packages / top).exists():
                (packages / top).symlink_to(target)
    (packages / "google" / "colab").mkdir(parents=True)
    (packages / "google" / "colab" / "__init__.py").touch()
    (packages / "sitecustomize.py").write_text("import google.colab\n")
    return folder / "bin" / "python"


def run_all(python: Path, notebook: Path, **environment: str) -> Any:
    """Execute a notebook where it lies, in a kernel of the given Python, as Run all does."""
    from jupyter_client.manager import AsyncKernelManager

    class Manager(AsyncKernelManager):
        def format_kernel_cmd(self, extra_arguments: list[str] | None = None) -> list[str]:
            return [str(python), "-m", "ipykernel_launcher", "-f", self.connection_file]

    stored = nbformat.read(notebook, as_version=4)
    unwanted = ("DFKD_", "PYTHONPATH", "VIRTUAL_ENV")
    clean = {key: value for key, value in os.environ.items() if not key.startswith(unwanted)}
    place = {"metadata": {"path": str(notebook.parent)}}
    client = NotebookClient(stored, kernel_name="python3", kernel_manager_class=Manager, resources=place)
    client.execute(env=clean | environment)
    return stored


def test_the_notebook_alone_installs_the_library_runs_and_continues(colab: Path, tmp_path: Path) -> None:
    code = (
        "import importlib.util as u, sys; print(u.find_spec('dfkd_lib'), u.find_spec('papermill'), u.find_spec('dask'))"
    )
    bare = subprocess.run([colab, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert bare.stdout.split() == ["None"] * 3

    content, drive = tmp_path / "content", tmp_path / "drive"
    content.mkdir()
    notebook = json.loads((book_root() / "chapters" / "dfad.ipynb").read_text(encoding="utf-8"))
    (cell,) = [c for c in notebook["cells"] if "parameters" in c["metadata"].get("tags", [])]
    source = "".join(cell["source"])
    for name, value in {**SHORT, "out": json.dumps(str(drive / "run"))}.items():  # what a reader edits there
        source, n = re.subn(rf"(?m)^{name} = .*?(\s+#.*)?$", rf"{name} = {value}", source)
        assert n == 1, name
    cell["source"] = source
    (content / "dfad.ipynb").write_text(json.dumps(notebook))

    settings = {
        "DFKD_INSTALL": str(repository_root()),
        "DFKD_CACHE": str(drive / "cache"),
        "OMP_NUM_THREADS": "1",
        "PIP_NO_INDEX": "1",  # all that it needs is there
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_NO_BUILD_ISOLATION": "false",  # which is how pip spells: do not isolate
        "PIP_NO_CACHE_DIR": "1",
    }
    first = run_all(colab, content / "dfad.ipynb", **settings)
    said = json.dumps([cell.get("outputs", []) for cell in first.cells])
    assert "dfad, profile smoke: cpu" in said or "dfad, profile smoke: cuda" in said
    where = textwrap.dedent("""
        import dfkd_lib, dfkd_lib.locations
        print(dfkd_lib.__file__)
        print(dfkd_lib.locations.book_root() / "plans" / "smoke.yml")
    """)
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("DFKD_", "PYTHONPATH"))}
    said = subprocess.run(
        [colab, "-c", where], cwd=content, env=clean, capture_output=True, text=True, check=True
    ).stdout
    for line in said.splitlines():
        assert line.startswith(str(tmp_path / "environment")) and Path(line).is_file(), "a copy, not the checkout"

    record = json.loads((drive / "run" / "record.json").read_text())
    assert record["parameters"]["parts"] == ["gradients"] and record["metrics"]
    (drive / "run" / "record.json").unlink()
    run_all(colab, content / "dfad.ipynb", **settings)  # after a disconnect: Run all
    again = json.loads((drive / "run" / "record.json").read_text())
    assert again["metrics"] == record["metrics"]
    assert sys.executable != str(colab)
