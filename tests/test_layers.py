"""Who may import whom: the floors of the library, from the roof down. An arrow that is not drawn here is an error."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from dfkd_lib.locations import PACKAGE

GROUND = ["compiling", "errors", "files", "locations", "runtime", "settings"]
TENSORS = ["data", "losses", "taps", "banks"]
WORK = ["training", "models", "measures"]
OWN = ["arguments", "checking", "lending"]
FRONT = [
    "distilled",
    "distilling",
    "distilling_text",
    "deadlines",
    "distillers",
    "exporting",
    "judging",
    "loading_networks",
    "other_images",
    "own_images",
    "own_maps",
    "planning",
    "prepared",
    "report_images",
    "reports",
    "reusing",
    "teachers",
    "transferring",
    "zero_shot",
    "zero_shot_input",
]

ARROWS = {
    "errors": [],
    "files": ["errors"],
    "locations": ["errors"],
    "compiling": ["errors", "taps"],
    "runtime": ["compiling", "errors"],
    "settings": ["errors"],
    "data": GROUND,
    "losses": [],
    "taps": ["errors"],
    "banks": ["errors"],
    "records": ["__init__", "errors", "files", "locations"],
    "training": [*GROUND, *TENSORS],
    "arguments": [*GROUND, *TENSORS, "models"],
    "lending": ["errors", "files", "models", "training"],
    "checking": [*GROUND, *TENSORS, "lending", "training"],
    "models": [*GROUND, *TENSORS, "training"],
    "measures": [*GROUND, *TENSORS, "training"],
    "methods": [*GROUND, *TENSORS, *OWN, *WORK],
    "distillers": [*GROUND, "methods"],
    "teachers": [*GROUND, *TENSORS, *WORK],
    "prepared": ["runtime", "checking", "lending", "training"],
    "own_images": [*GROUND, "data", "training", "distillers"],
    "other_images": [*GROUND, "data", "models", "methods", "own_images"],
    "deadlines": [],
    "own_maps": ["arguments", "data", "errors"],
    "planning": [
        *GROUND,
        "data",
        "training",
        "measures",
        "methods",
        "distillers",
        "own_images",
        "other_images",
        "prepared",
        "deadlines",
    ],
    "distilled": ["errors", "lending", "records", "training"],
    "judging": ["measures", "methods", "planning", "training"],
    "distilling": [
        *GROUND,
        *TENSORS,
        *OWN,
        *WORK,
        "distilled",
        "methods",
        "planning",
        "deadlines",
        "judging",
        "prepared",
        "own_images",
        "records",
    ],
    "distilling_text": [*GROUND, *TENSORS, *OWN, *WORK, "distilled", "methods", "records"],
    "loading_networks": ["errors"],
    "exporting": ["checking", "errors", "files", "runtime", "lending", "training"],
    "report_images": ["distilled", "judging", "lending", "training"],
    "reports": ["distilled", "files", "training", "distillers", "report_images"],
    "reusing": [*GROUND, *TENSORS, *OWN, *WORK, "methods"],
    "transferring": [*GROUND, *TENSORS, *OWN, *WORK, "methods"],
    "zero_shot_input": ["data", "errors", "training"],
    "zero_shot": [*GROUND, *TENSORS, *WORK, "methods", "zero_shot_input"],
    "__init__": ["distilled", "distilling", "distilling_text", "reusing", "transferring", "zero_shot"],
    "reproduction": ["__init__", "records", *GROUND, *TENSORS, *OWN, *WORK, "methods", *FRONT],
    "__main__": ["reproduction"],
}


def floor(path: Path, package: Path) -> str:
    """The part of the library that a file belongs to: its folder, or its own name."""
    parts = path.relative_to(package).with_suffix("").parts
    return parts[0]


def imported(path: Path, package: Path) -> Iterator[str]:
    """The parts of the library that a file imports anywhere, also inside functions and for types alone."""
    here = path.relative_to(package).parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for name in node.names:
                if name.name.split(".")[0] == "dfkd_lib":
                    yield ".".join(name.name.split(".")[1:2]) or "__init__"
        elif isinstance(node, ast.ImportFrom):
            module = (node.module or "").split(".") if node.module else []
            if node.level:
                module = [*here[: len(here) - node.level + 1], *module]
            elif module[:1] == ["dfkd_lib"]:
                module = module[1:]
            else:
                continue
            for name in [module[0]] if module else [alias.name for alias in node.names]:
                yield name if name in ARROWS else "__init__"


def wrong_arrows(package: Path) -> list[str]:
    """Imports that `ARROWS` does not know, as "file imports part"."""
    found = []
    for path in sorted(package.rglob("*.py")):
        own = floor(path, package)
        for name in imported(path, package):
            if name != own and name not in ARROWS[own]:
                found.append(f"{path.relative_to(package)} imports {name}")
    return found


def test_imports_point_downwards() -> None:
    assert wrong_arrows(PACKAGE) == []


def test_no_floor_reaches_itself_through_others() -> None:
    def below(name: str, seen: tuple[str, ...] = ()) -> None:
        assert name not in seen, " -> ".join([*seen, name])
        for lower in ARROWS[name]:
            if lower != "__init__":  # the front door's names, loaded when they are asked for
                below(lower, (*seen, name))

    for name in ARROWS:
        below(name)


@pytest.mark.parametrize(
    ("file", "line", "complaint"),
    [
        ("losses.py", "from .reproduction import cli", "losses.py imports reproduction"),
        ("training/fit.py", "from ..methods import dfad", "training/fit.py imports methods"),
        ("methods/dfad.py", "def f():\n    import dfkd_lib.distilling", "methods/dfad.py imports distilling"),
        ("data/text.py", "from dfkd_lib.models import text", "data/text.py imports models"),
    ],
)
def test_a_wrong_arrow_is_named(tmp_path: Path, file: str, line: str, complaint: str) -> None:
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(line + "\n")
    assert wrong_arrows(tmp_path) == [complaint]
