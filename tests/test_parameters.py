"""Parameters cells, ranges, profiles: what can be set, and what is refused with which words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_book
from hypothesis import given
from hypothesis import strategies as st

from dfkd_lib.errors import DamagedFile, InputError
from dfkd_lib.reproduction import parameters as ps
from dfkd_lib.reproduction.parameters import Parameter


@pytest.fixture
def book(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    tiny_book.write(tmp_path / "book")
    monkeypatch.setenv("DFKD_BOOK", str(tmp_path / "book"))
    return tmp_path / "book"


def test_the_cell_gives_name_default_range_and_help(book: Path) -> None:
    read = ps.parameters("tiny")
    assert list(read)[:3] == ["profile", "seed", "device"]
    assert read["lr"] == Parameter("lr", 0.5, "(0..1]", "learning rate")
    assert read["precision"] == Parameter("precision", "float32", "{auto|float32}", "")
    assert read["device"] == Parameter("device", "auto")
    assert read["sizes"].type == "list of int"


@pytest.mark.parametrize("source", ["lr = 2 * 0.1", "a, b = 1, 2", "print(1)", "lr =", "x = [1,"])
def test_a_cell_that_is_not_plain_assignments_is_damaged(source: str) -> None:
    with pytest.raises(DamagedFile, match="parameters cell"):
        ps.read_cell(source)


def test_a_value_over_several_lines_takes_the_comment_of_its_last_line() -> None:
    read = ps.read_cell("a = [\n    0.1,  # one\n    0.2,\n]  # [0..1] both\nb = '# no comment'")
    assert read["a"] == Parameter("a", [0.1, 0.2], "[0..1]", "both")
    assert read["b"] == Parameter("b", "# no comment")


@pytest.mark.parametrize(
    ("limits", "inside", "outside"),
    [
        ("[1..]", [1, 5], [0, -1]),
        ("(0..1]", [0.5, 1], [0.0, 1.5]),
        ("[..5)", [-3.0, 4.9], [5.0]),
        ("[-1e-3..0.5]", [-0.001, 0.5], [-0.01, 0.51]),
        ("", [-1e9, 1e9], [float("nan"), float("inf")]),
    ],
)
def test_ranges(limits: str, inside: list[float], outside: list[float]) -> None:
    known = Parameter("x", 0.0, limits)
    assert [known.check(v) for v in inside] == inside
    for value in outside:
        with pytest.raises(InputError, match="parameter x"):
            known.check(value)


def test_the_range_of_a_list_holds_for_each_element() -> None:
    known = Parameter("x", ["a"], "{a|b}")
    assert known.check(["b", "a"]) == ["b", "a"]
    with pytest.raises(InputError, match=r"\['a', 'c'\] must be in \{a\|b\}"):
        known.check(["a", "c"])
    with pytest.raises(InputError, match="must be a list of str"):
        known.check("a")


@pytest.mark.parametrize(
    ("default", "value"), [(1, True), (1, 1.0), (1.0, "1e-3"), (1.0, True), ("a", 1), (True, 1), ([1], [1.5])]
)
def test_wrong_types_are_refused(default: Any, value: Any) -> None:
    with pytest.raises(InputError, match="type"):
        Parameter("x", default).check(value)


def test_an_int_becomes_a_float_where_a_float_is_asked_for() -> None:
    assert isinstance(Parameter("x", 0.5).check(1), float)
    assert Parameter("x", None).check({"any": 1}) == {"any": 1}


@pytest.mark.parametrize(
    ("default", "text", "value"),
    [
        (0.1, "1e-3", 0.001),
        (0.1, "2", 2.0),
        (3, "0012", 12),
        (False, "true", True),
        (False, "False", False),
        ("a", "0012", "0012"),
        ([0.1], "[1e-3, 2]", [0.001, 2.0]),
        ([1], "3,4", [3, 4]),
        (["a"], "[mnist, digits]", ["mnist", "digits"]),
        (None, "text", "text"),
    ],
)
def test_the_command_line_spells_values(default: Any, text: str, value: Any) -> None:
    parsed = Parameter("x", default).parse(text)
    assert parsed == value and type(parsed) is type(value)


@given(st.floats(allow_nan=False, allow_infinity=False) | st.integers() | st.booleans() | st.lists(st.integers()))
def test_what_is_printed_can_be_typed(value: Any) -> None:
    assert Parameter("x", value).parse(repr(value)) == value


def test_profiles(book: Path) -> None:
    assert ps.profiles("tiny") == ["smoke", "cpu"]
    assert ps.profile("tiny", "smoke") == {"profile": "smoke"}
    assert ps.profile("tiny", "cpu") == {"lr": 0.25, "n_steps": 5, "profile": "cpu"}
    assert ps.profile_note("tiny", "cpu") == "two seconds"
    with pytest.raises(InputError, match="unknown profile of tiny 'gpo'"):
        ps.profile("tiny", "gpo")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr: 1e-3", r"write 1\.0e-3"),
        ("n_stepz: 3", "did you mean 'n_steps'"),
        ("lr: 7", r"must be in \(0\.\.1\]"),
        ("- 1", "must hold lines"),
        ("a: [", "is not YAML"),
    ],
)
def test_a_faulty_profile_is_refused(book: Path, text: str, message: str) -> None:
    (book / "profiles" / "tiny" / "cpu.yml").write_text(text)
    with pytest.raises(InputError, match=message):
        ps.profile("tiny", "cpu")


def test_a_broken_notebook_is_named(book: Path) -> None:
    path = book / "chapters" / "tiny.ipynb"
    path.write_text(path.read_text()[:500])
    with pytest.raises(DamagedFile, match=r"tiny\.ipynb"):
        ps.parameters("tiny")
    path.write_text("[]")
    with pytest.raises(DamagedFile, match="damaged"):
        ps.parameters("tiny")
    path.write_text('{"cells": []}')
    with pytest.raises(DamagedFile, match="needs exactly one"):
        ps.parameters("tiny")


def test_a_list_is_empty_only_where_the_help_says_what_that_means() -> None:
    assert Parameter("x", [1], "[1..]", "steps; none: all").check([]) == []
    assert Parameter("x", []).check([]) == [] and Parameter("x", []).check(["a"]) == ["a"]
    with pytest.raises(InputError, match="must be of type list of str"):
        Parameter("x", []).check([1])
    with pytest.raises(InputError, match=r"parameter x: \[\] must have at least one element"):
        Parameter("x", [1], "[1..]", "steps").check([])
