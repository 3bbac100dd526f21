"""What can be set in a chapter: names, types and ranges, read from the notebook's parameters cell.

The cell tagged `parameters` is the smoke profile. Each of its lines is `name = value  # [range] help`, where the
range is `[1..]`, `[0..1]`, `[..5]`, `(0..]` (a round bracket excludes the bound) or `{a|b|c}`, or is left out; the
range of a list holds for each of its elements, of which there is at least one, unless the help says what `none:` would
mean. The other profiles are `book/profiles/CHAPTER/NAME.yml`.
"""

from __future__ import annotations

import ast
import io
import json
import math
import re
import tokenize
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from ..errors import DamagedFile, InputError, unknown
from ..files import read_json
from ..locations import book_root
from .yaml_files import read_yaml

_NUMBER = r"\s*([-+]?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?)?\s*"
_INTERVAL = re.compile(rf"([\[(]){_NUMBER}\.\.{_NUMBER}([\])])\s*(.*)")
_CHOICES = re.compile(r"\{([^}]*)\}\s*(.*)")


@dataclass(frozen=True)
class Parameter:
    """One line of a parameters cell.

    Attributes:
        default: the value at the smoke profile; its type is the parameter's type, None takes any.
        range: as written, such as "[0..1]", or "".
        help: the rest of the comment.
    """

    name: str
    default: Any
    range: str = ""
    help: str = ""

    @property
    def type(self) -> str:
        """Name of the type, such as "float" or "list of float"."""
        if isinstance(self.default, list):
            return f"list of {type(self._element).__name__}"
        return "any" if self.default is None else type(self.default).__name__

    def check(self, value: Any) -> Any:
        """Return `value` in the parameter's type (an int becomes a float where that is asked for).

        Raises:
            InputError: wrong type, or out of range.
        """
        if self.default is None:
            try:
                json.dumps(value, allow_nan=False)
            except (TypeError, ValueError, RecursionError):
                raise self._error(value, "must be made of numbers, text and lists") from None
            return value
        if not isinstance(self.default, list):
            return self._in_range(self._typed(value, self.default), value)
        if not isinstance(value, list):
            raise self._error(value, f"must be a {self.type}, such as {self.default}")
        if not value and self.default and "none:" not in self.help:
            raise self._error(value, "must have at least one element")
        return [self._in_range(self._typed(v, self._element), value) for v in value]

    def parse(self, text: str) -> Any:
        """Read a value from the command line: `1e-3` is a number where a number is expected, `0012` is 12.

        Raises:
            InputError: wrong type, or out of range.
        """
        return self.check(text if isinstance(self.default, str) else _literal(text, self.default))

    @property
    def _element(self) -> Any:
        """An element of a list; one that is empty by default holds names."""
        return self.default[0] if self.default else ""

    def _typed(self, value: Any, example: Any) -> Any:
        wanted = type(example)
        if wanted is float and type(value) is int:
            return float(value)
        if type(value) is not wanted:
            yaml_trap = wanted is float and isinstance(value, str) and _is_number(value)
            hint = " (YAML reads 1e-3 as text: write 1.0e-3)" if yaml_trap else ""
            raise self._error(value, f"must be of type {self.type}{hint}, such as {self.default!r}")
        if wanted is float and not math.isfinite(value):
            raise self._error(value, "must be finite")
        return value

    def _in_range(self, value: Any, given: Any) -> Any:
        if choices := _CHOICES.fullmatch(self.range):
            inside = str(value) in [choice.strip() for choice in choices[1].split("|")]
        elif interval := _INTERVAL.fullmatch(self.range):
            left, low, high, right, _ = interval.groups()
            above = not low or value > float(low) or (left == "[" and value == float(low))
            inside = above and (not high or value < float(high) or (right == "]" and value == float(high)))
        else:
            inside = True
        if not inside:
            raise self._error(given, f"must be in {self.range}")
        return value

    def _error(self, value: Any, message: str) -> InputError:
        shown = repr(value)
        if len(shown) > 100:
            shown = f"{shown[:97]}..."
        return InputError(f"parameter {self.name}: {shown} {message}")


def chapters() -> list[str]:
    """Names of all chapters of the book."""
    return sorted(path.stem for path in (book_root() / "chapters").glob("*.ipynb"))


def title(chapter: str) -> str:
    """The first heading of the chapter's notebook."""
    first = next(source for kind, source, _ in cells(notebook_path(chapter)) if kind == "markdown")
    return first.splitlines()[0].lstrip("# ")


def notebook_path(chapter: str) -> Path:
    """The chapter's notebook.

    Raises:
        InputError: there is no such chapter.
    """
    path = book_root() / "chapters" / f"{chapter}.ipynb"
    if chapter not in chapters():
        raise unknown("chapter", chapter, chapters())
    return path


def cells(path: Path) -> list[tuple[str, str, list[str]]]:
    """(cell type, source, tags) of each cell of a notebook.

    Raises:
        DamagedFile: the file is no notebook.
    """
    try:
        facts = path.stat()
    except OSError as e:
        raise DamagedFile(f"cannot read {path}: {e.strerror}; restore it") from e
    return _read_cells(path, facts.st_mtime_ns, facts.st_size)


@lru_cache(maxsize=64)
def _read_cells(path: Path, *version: int) -> list[tuple[str, str, list[str]]]:
    """The cells of a notebook, read once for each version of the file: a plan asks a thousand times."""
    cell = {"cell_type": str, "source": (str, [str]), "metadata": {"tags?": [str]}}
    read = read_json(path, {"cells": [cell]}, remedy="restore the notebook")
    return [(c["cell_type"], "".join(c["source"]), c["metadata"].get("tags", [])) for c in read["cells"]]


def parameters(chapter: str) -> dict[str, Parameter]:
    """The parameters of a chapter by name, in the order of the parameters cell.

    Raises:
        InputError: there is no such chapter.
        DamagedFile: the chapter has no single parameters cell, or a line in it is not `name = literal`.
    """
    path = notebook_path(chapter)
    sources = [source for _, source, tags in cells(path) if "parameters" in tags]
    if len(sources) != 1:
        raise DamagedFile(f"{path} has {len(sources)} cells tagged 'parameters'; it needs exactly one")
    return dict(_read_once(sources[0], str(path)))


@lru_cache(maxsize=64)
def _read_once(source: str, where: str) -> dict[str, Parameter]:
    return read_cell(source, where)


def read_cell(source: str, where: str = "the parameters cell") -> dict[str, Parameter]:
    """Parse the source of a parameters cell.

    Raises:
        DamagedFile: a line is not `name = literal`.
    """
    found = {}
    try:
        tokens = tokenize.generate_tokens(io.StringIO(source).readline)
        comments = {t.start[0]: t.string.lstrip("# ") for t in tokens if t.type == tokenize.COMMENT}
        for line in ast.parse(source).body:
            if not (isinstance(line, ast.Assign) and len(line.targets) == 1 and isinstance(line.targets[0], ast.Name)):
                raise ValueError(f"line {line.lineno} is not `name = value`")
            name, comment = line.targets[0].id, comments.get(line.end_lineno or line.lineno, "")
            matched = _INTERVAL.fullmatch(comment) or _CHOICES.fullmatch(comment)
            text = matched.group(matched.re.groups) if matched else comment
            limits = comment[: len(comment) - len(text)].strip()
            found[name] = Parameter(name, ast.literal_eval(line.value), limits, text)
    except (SyntaxError, ValueError, tokenize.TokenError) as e:
        raise DamagedFile(f"{where}: the parameters cell cannot be read ({e})") from e
    return found


def profiles(chapter: str) -> list[str]:
    """Names of the chapter's profiles, smoke first."""
    notebook_path(chapter)
    return ["smoke", *sorted(path.stem for path in (book_root() / "profiles" / chapter).glob("*.yml"))]


def profile(chapter: str, name: str) -> dict[str, Any]:
    """What a profile sets, `profile` itself included; the smoke profile sets nothing else.

    Raises:
        InputError: there is no such profile, or it sets what the chapter does not know or allow.
    """
    if name not in profiles(chapter):
        raise unknown(f"profile of {chapter}", name, profiles(chapter))
    values = {} if name == "smoke" else parameter_file(_profile_path(chapter, name))
    return check_parameters(chapter, {**values, "profile": name})


def profile_note(chapter: str, name: str) -> str:
    """What a profile says about itself in the comment that it opens with, such as the minutes to expect."""
    if name == "smoke":
        text = next((source for _, source, tags in cells(notebook_path(chapter)) if "parameters" in tags), "")
    else:
        text = _profile_path(chapter, name).read_text(encoding="utf-8")
    first = text.split("\n", 1)[0]
    return first.lstrip("# ") if first.startswith("#") else ""


def _profile_path(chapter: str, name: str) -> Path:
    return book_root() / "profiles" / chapter / f"{name}.yml"


def parameter_file(path: Path) -> dict[str, Any]:
    """Read the parameters that a flat YAML file sets.

    Raises:
        InputError: the file is not there, is no such file, or sets what only the command can set.
    """
    values = read_yaml(path)
    refuse_places(values, str(path))
    return values


def refuse_places(names: Iterable[str], where: str) -> None:
    """Profile and folder of a run are options of the command: what sets them elsewhere is an InputError."""
    for name, option in {"profile": "--profile", "out": "--out"}.items():
        if name in names:
            raise InputError(f"set {name} with {option}, not in {where}")


def check_parameters(chapter: str, given: Mapping[str, Any], texts: Iterable[tuple[str, str]] = ()) -> dict[str, Any]:
    """Hold values against the chapter's parameters and return them in the parameters' types.

    Args:
        given: values in their types, as a profile has them.
        texts: (name, text) pairs from a command line; a later one wins.

    Raises:
        InputError: an unknown name (with the nearest known one), a wrong type, a value out of range.
    """
    known = parameters(chapter)

    def named(name: str) -> Parameter:
        if name not in known:
            raise unknown(f"parameter of {chapter}", name, known)
        return known[name]

    checked = {name: named(name).check(value) for name, value in given.items()}
    return checked | {name: named(name).parse(text) for name, text in texts}


def _literal(text: str, example: Any) -> Any:
    """The value that `text` spells, read as the example's type if that is possible."""
    readers: list[Callable[[str], Any]] = [ast.literal_eval, yaml.safe_load]
    if type(example) in (int, float):
        readers = [int, *([float] if type(example) is float else []), *readers]
    for read in readers:
        try:
            value = read(text)
        except (ValueError, SyntaxError, yaml.YAMLError, RecursionError, MemoryError):
            continue
        return list(value) if isinstance(value, tuple) else value
    return text


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
