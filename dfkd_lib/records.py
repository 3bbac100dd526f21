"""What a run was and what came out: the only source of numbers in the book."""

from __future__ import annotations

import importlib.metadata
import math
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from . import __version__
from .errors import DamagedFile
from .files import read_json, write_json
from .locations import book_root, code_fingerprint

SCHEMA = 1
_REMEDY = "run the chapter again to write it anew"
SCALES = ("paper", "gpu", "cpu", "smoke")
_FIGURES = {str: (float, type(None))}
_SHAPE = {
    "schema": int,
    "chapter": str,
    "profile": str,
    "parameters": dict,
    "seed": int,
    "metrics": _FIGURES,
    "best": _FIGURES,
    "seconds": float,
    "finished": str,
    "runtime?": str,
    "hardware?": dict,
    "packages?": {str: str},
    "data?": [{"name": str, "split": str}],
}


def provenance() -> dict[str, Any]:
    """Versions of the code, of Python and of the packages that can move a number."""
    packages = {}
    for name in ("torch", "torchvision", "numpy", "scikit-learn"):
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            packages[name] = "absent"
    code = {"version": __version__, "source": code_fingerprint()}
    return {"code": code, "packages": {"python": platform.python_version(), **packages}}


def now() -> str:
    """The time in UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def finite_or_none(value: float) -> float | None:
    """JSON knows no NaN: a figure that does not exist is null."""
    return value if math.isfinite(value) else None


def write(folder: Path, record: dict[str, Any]) -> Path:
    """Write `folder/record.json`, whole or not at all, and return its path."""
    path = folder / "record.json"
    write_json(path, {"schema": SCHEMA, **record})
    return path


def read(folder: Path) -> dict[str, Any]:
    """Read `folder/record.json`; adds "run" (the folder's name) and "folder".

    Raises:
        DamagedFile: the file is no record of this schema; the message names what is wrong.
    """
    path = folder / "record.json"
    record = read_json(path, _SHAPE, remedy=_REMEDY)
    if record["schema"] != SCHEMA:
        raise DamagedFile(f"{path} is not a record of schema {SCHEMA}; {_REMEDY}")
    for key in (*record["metrics"], *record["best"]):
        if key.count("/") != 2:
            raise DamagedFile(f"{path} is damaged: {key!r} is no <experiment>/<row>/<measure>; {_REMEDY}")
    return {**record, "run": folder.name, "folder": folder}


def committed(*chapters: str) -> list[dict[str, Any]]:
    """The records under `book/results`, of the named chapters or of all, ordered by folder."""
    root = book_root() / "results"
    found = [path for chapter in chapters or ("*",) for path in sorted(root.glob(f"{chapter}/*/record.json"))]
    return [read(path.parent) for path in found]


def perhaps_mixed(record: dict[str, Any]) -> bool:
    """Whether a record is from before resumed runs were marked, and resuming them could still mix up the momentum.

    That was so for image networks in channels-last layout: where the layout is that of the run or of one of its
    teachers, and the teachers have images [C, H, W] as their data.
    """
    teachers = record.get("teachers", [])
    of_images = any(len(teacher.get("data", {}).get("shape", ())) == 3 for teacher in teachers)
    layouts = [made.get("runtime", "") for made in (record, *teachers)]
    return "resumed" not in record and of_images and any("channels-last" in layout for layout in layouts)


def tested_on(record: dict[str, Any]) -> list[str]:
    """The datasets that a record was evaluated on."""
    return [*dict.fromkeys(opened["name"] for opened in record.get("data", []) if opened["split"] == "test")]


def label(record: dict[str, Any]) -> str:
    """Profile of a record and the datasets it was evaluated on, such as "cpu mnist"."""
    return " ".join([record["profile"], *tested_on(record)])


def length(record: dict[str, Any]) -> int:
    """The updates that its parameters ask for, those of all parts together: to compare runs of one chapter."""
    asked = [value for name, value in record["parameters"].items() if name.endswith(("steps", "n_updates"))]
    each = [number for value in asked for number in (value if isinstance(value, list) else [value])]
    return sum(number for number in each if type(number) is int)


def scale(record: dict[str, Any]) -> str:
    """Which of `SCALES` the record's profile is a variant of, such as "cpu" for "cpu-mnist"."""
    return str(record["profile"]).split("-")[0]


def on_gpu(record: dict[str, Any]) -> bool:
    """Whether the run was made on a CUDA device."""
    return str(record.get("hardware", {}).get("device", "")).startswith("cuda")


def group(records: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Records that differ by seed only, by label, the largest scale first.

    Where the records come from several chapters, the label names the chapter too. Two groups that share profile
    and dataset but not the other parameters get a number behind the label.
    """
    several = len({record["chapter"] for record in records}) > 1
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for record in records:
        rest = {k: v for k, v in record["parameters"].items() if k not in ("seed", "out", "device", "threads")}
        groups.setdefault((record["chapter"], label(record), repr(sorted(rest.items()))), []).append(record)

    def order(key: tuple[str, str, str]) -> tuple[int, str, int, str]:
        of = scale(groups[key][0])
        return SCALES.index(of) if of in SCALES else len(SCALES), key[1], -len(groups[key]), key[2]

    named: dict[str, list[dict[str, Any]]] = {}
    for key in sorted(groups, key=order):
        first = f"{key[1]}, {key[0]} chapter" if several else key[1]
        name, number = first, 2
        while name in named:
            name, number = f"{first} ({number})", number + 1
        named[name] = sorted(groups[key], key=lambda record: record["seed"])
    return named
