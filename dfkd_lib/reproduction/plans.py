"""Plans: a grid of chapters, profiles, parameters and seeds, read from YAML and laid out as points.

A plan sets `chapters` (a list, or `all`), `profiles`, `seeds`, `parameters` (fixed, as in a profile) and `grid`
(lists of values to try; a list of mappings sets several parameters together). `exclude` drops the points that
match, `include` adds single points. `grids` holds several such grids, which take what they do not set from the
plan. `gpus` says how many GPUs a point needs.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import shlex
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .. import records
from ..errors import InputError, unknown
from ..files import read_json
from . import parameters, runs
from .yaml_files import read_yaml

State = Literal["finished", "failed", "unfinished", "to run"]
FAILED = "failed.json"
_GRID = {"chapters", "profiles", "seeds", "parameters", "grid", "include", "exclude"}
_PLAN = _GRID | {"grids", "gpus"}
_PLACE = ("chapter", "profile", "seed")
MOST_POINTS = 10_000


@dataclass(frozen=True)
class Point:
    """One execution of a chapter.

    Attributes:
        label: chapter, profile, seed and what the grid sets, for people.
        given: the parameters that differ from the chapter's own, checked; `profile` is among them.
        values: all parameters, `out` excepted.
        made_of: fingerprints of the chapter's notebook and of the library.
    """

    chapter: str
    label: str
    given: dict[str, Any]
    values: dict[str, Any]
    made_of: dict[str, str]

    @property
    def name(self) -> str:
        """Of the point's folder: the same parameters run by the same code have the same name."""
        text = json.dumps([self.chapter, self.values, self.made_of], sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:8]
        return f"{self.chapter}-{self.values['profile']}-seed{self.values['seed']}-{digest}"

    @property
    def command(self) -> str:
        """The command that runs this point alone."""
        start = parameters.profile(self.chapter, self.given["profile"])
        words = ["dfkd", "run", self.chapter, "--profile", self.given["profile"]]
        for name, value in self.given.items():
            if name not in start or start[name] != value:
                words += ["-p", name, value if isinstance(value, str) else json.dumps(value)]
        return shlex.join(words)


@dataclass(frozen=True)
class Plan:
    """What a plan file asks for.

    Attributes:
        title: the comment that the file opens with.
        points: in the order of the file, each once.
        refused: (label, why) of points that no chapter would accept.
        gpus: that a point needs.
    """

    name: str
    title: str
    points: list[Point]
    refused: list[tuple[str, str]]
    gpus: int = 0


def read(path: Path) -> Plan:
    """Read a plan and hold every point of it against its chapter.

    Raises:
        InputError: the file is no plan, or has more than `MOST_POINTS` points, which are counted before they are
            built. A point that cannot run is listed in `refused` instead.
    """
    asked = read_yaml(path)
    _only(asked, _PLAN, f"key of {path}")
    shared = {key: value for key, value in asked.items() if key in _GRID}
    grids = [shared]
    if "grids" in asked:
        grids = [shared | grid for grid in _values(_mappings(asked["grids"], f"{path}: grids"), f"{path}: grids")]
    gpus = asked.get("gpus", 0)
    if type(gpus) is not int or gpus < 0:
        raise InputError(f"{path}: gpus must be a number of GPUs, not {gpus!r}")
    laid_out = [_Grid(grid, str(path)) for grid in grids]
    if (count := sum(grid.count for grid in laid_out)) > MOST_POINTS:
        raise InputError(f"{path} has {count:,} points; at most {MOST_POINTS:,} can be run from one plan: split it")
    points: dict[str, Point] = {}
    refused: dict[str, str] = {}
    chapters = _Chapters()
    for raw in itertools.chain.from_iterable(grid.points() for grid in laid_out):
        try:
            point = chapters.point(raw)
            points.setdefault(point.name, point)
        except InputError as e:
            refused[_label(raw)] = str(e)
    first = path.read_text(encoding="utf-8").split("\n", 1)[0]
    title = first.lstrip("# ") if first.startswith("#") else ""
    return Plan(path.stem, title, list(points.values()), list(refused.items()), gpus)


def state(folder: Path) -> State:
    """How far the run in a point's folder came."""
    if runs.is_finished(folder):
        return "finished"
    if (folder / FAILED).is_file():
        return "failed"
    return "unfinished" if (folder / "events.jsonl").is_file() else "to run"


def estimate(point: Point, recorded: Iterable[Mapping[str, Any]]) -> tuple[float, bool] | None:
    """Seconds that a point takes, from records, and whether they are of this very point.

    The mean over the records that differ by seed and machine alone; where there are none, over those of the same
    chapter and profile; where there are none either, None.
    """
    near = [r for r in recorded if (r["chapter"], r["profile"]) == (point.chapter, point.values["profile"])]
    apart = ("seed", "device", "threads", "out")

    def kept(values: Mapping[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in values.items() if key not in apart}

    same = [r for r in near if kept(r["parameters"]) == kept(point.values)]
    if not near:
        return None
    return statistics.fmean(max(r.get("wall_seconds", 0.0), r["seconds"]) for r in same or near), bool(same)


def recorded(*folders: Path) -> list[dict[str, Any]]:
    """The committed records, and those under some folders with the seconds that their batch measured."""
    found = records.committed()
    for path in sorted({path for folder in folders if folder.is_dir() for path in folder.rglob("record.json")}):
        took = path.with_name("batch.json")
        wall = {"wall_seconds": read_json(took, {"seconds": float})["seconds"]} if took.is_file() else {}
        found.append(records.read(path.parent) | wall)
    return found


class _Grid:
    """One grid of a plan: how many points it has, and the points, each as chapter, profile, seed and parameters."""

    def __init__(self, grid: Mapping[str, Any], where: str) -> None:
        _only(grid, _GRID, f"key of a grid of {where}")
        self.where = where
        chapters = grid.get("chapters", [])
        self.places = {
            "chapter": parameters.chapters() if chapters == "all" else _values(chapters, f"{where}: chapters", str),
            "profile": _values(grid.get("profiles", ["smoke"]), f"{where}: profiles", str),
            "seed": _values(grid.get("seeds", [0]), f"{where}: seeds"),
        }
        self.fixed, axes = ({} if grid.get(key) is None else grid[key] for key in ("parameters", "grid"))
        if not _is_settings(self.fixed) or not _is_settings(axes):
            raise InputError(f"{where}: parameters and grid must hold lines such as `lr: ...`")
        self.axes = [_axis(name, _values(values, f"{where}: grid: {name}")) for name, values in axes.items()]
        self.excluded = _mappings(grid.get("exclude", []), f"{where}: exclude")
        self.included = _mappings(grid.get("include", []), f"{where}: include")
        lengths = [len(values) for values in (*self.places.values(), *self.axes)]
        self.count = math.prod(lengths) + len(self.included)

    def points(self) -> Iterator[dict[str, Any]]:
        """The points that are not excluded, then those that are included."""
        hits = [0] * len(self.excluded)
        for place in itertools.product(*self.places.values()):
            for chosen in itertools.product(*self.axes):
                raw = dict(zip(_PLACE, place, strict=True)) | self.fixed
                for part in chosen:
                    raw |= part
                matches = [i for i, pattern in enumerate(self.excluded) if pattern.items() <= raw.items()]
                for i in matches:
                    hits[i] += 1
                if not matches:
                    yield raw
        for pattern, count in zip(self.excluded, hits, strict=True):
            if not count:
                raise InputError(f"{self.where}: exclude {pattern} matches no point; correct or delete it")
        for extra in self.included:
            single = {key: values[0] for key, values in self.places.items() if len(values) == 1}
            if missing := [key for key in _PLACE if key not in single | extra]:
                raise InputError(f"{self.where}: include {extra} must say its {missing[0]}")
            yield single | self.fixed | extra


def _axis(name: str, values: Sequence[Any]) -> list[dict[str, Any]]:
    """What each value of an axis sets: the parameter of its name, or those that a mapping names."""
    for value in values:
        if isinstance(value, dict) and not _is_settings(value):
            raise InputError(f"grid: {name}: {_short(value)} must map names to values")
    return [value if isinstance(value, dict) else {name: value} for value in values]


class _Chapters:
    """Makes points; what a chapter knows, its profiles and its fingerprints are looked up once."""

    def __init__(self) -> None:
        self.profiles: dict[tuple[str, str], dict[str, Any]] = {}
        self.made_of: dict[str, dict[str, str]] = {}

    def point(self, raw: Mapping[str, Any]) -> Point:
        """The point with these settings, held against its chapter.

        Raises:
            InputError: the chapter would not accept it.
        """
        chapter, profile, seed = (raw[key] for key in _PLACE)
        for name, kind in (("chapter", chapter), ("profile", profile)):
            if not isinstance(kind, str):
                raise InputError(f"{name} must be a name, not {kind!r}")
        if (chapter, profile) not in self.profiles:
            self.profiles[chapter, profile] = parameters.profile(chapter, profile)
        if chapter not in self.made_of:
            self.made_of[chapter] = runs.made_of(chapter)
        own = {key: value for key, value in raw.items() if key not in _PLACE}
        if "out" in own:
            raise InputError("parameter out: the batch gives every point a folder; use --out of dfkd batch")
        known = parameters.parameters(chapter)
        given = self.profiles[chapter, profile] | parameters.check_parameters(chapter, {**own, "seed": seed})
        values = {name: parameter.default for name, parameter in known.items()} | given
        values.pop("out", None)
        return Point(chapter, _label(raw), given, values, self.made_of[chapter])


def _label(raw: Mapping[str, Any]) -> str:
    own = [f"{key} {_words(value)}" for key, value in raw.items() if key not in _PLACE]
    return ", ".join([f"{raw['chapter']} {raw['profile']} seed {raw['seed']}", *own])


def _words(value: Any) -> str:
    return "+".join(map(str, value)) if isinstance(value, list) else str(value)


def _values(value: Any, where: str, kind: type = object) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise InputError(f"{where} must be a list of at least one value, not {_short(value)}")
    for item in value:
        if not isinstance(item, kind):
            raise InputError(f"{where} must be a list of names, not of {_short(item)}")
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def _is_settings(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(key, str) for key in value)


def _mappings(value: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not all(item and _is_settings(item) for item in value):
        raise InputError(f"{where} must be a list of `name: value` mappings")
    return value


def _only(mapping: Mapping[str, Any], known: set[str], what: str) -> None:
    for key in mapping:
        if key not in known:
            raise unknown(what, key, known)
