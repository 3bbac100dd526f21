"""Reading plans: the grid, what is dropped and added, what is refused, names by content, hours from records."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import tiny_book

from dfkd_lib import records
from dfkd_lib.errors import InputError
from dfkd_lib.locations import book_root
from dfkd_lib.reproduction import plans
from dfkd_lib.reproduction.cli import main
from dfkd_lib.reproduction.parameters import chapters

OURS = sorted((book_root() / "plans").glob("*.yml"))


@pytest.fixture
def book(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    tiny_book.write(tmp_path / "book")
    monkeypatch.setenv("DFKD_BOOK", str(tmp_path / "book"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def read(text: str) -> plans.Plan:
    Path("plan.yml").write_text(text)
    return plans.read(Path("plan.yml"))


def test_a_grid_is_every_combination(book: Path) -> None:
    plan = read("# A title\nchapters: all\nprofiles: [smoke, cpu]\nseeds: [0, 1]\ngrid: {lr: [0.1, 0.2]}\n")
    assert plan.title == "A title" and plan.name == "plan" and not plan.refused
    assert len(plan.points) == 8 and len({point.name for point in plan.points}) == 8
    last = plan.points[-1]
    assert last.label == "tiny cpu seed 1, lr 0.2"
    assert last.given == {"lr": 0.2, "n_steps": 5, "profile": "cpu", "seed": 1}, "the profile's, then the grid's"
    assert last.values["mode"] == "work" and "out" not in last.values
    assert last.command == "dfkd run tiny --profile cpu -p lr 0.2 -p seed 1"


def test_values_that_go_together_excluded_and_added_points(book: Path) -> None:
    plan = read(
        "chapters: [tiny]\nparameters: {sizes: [3]}\n"
        "grid:\n  both: [{lr: 0.1, n_steps: 1}, {lr: 0.2, n_steps: 2}]\n  mode: [work, wait]\n"
        "exclude: [{lr: 0.1, mode: wait}]\ninclude: [{lr: 1, seed: 9}]\n"
    )
    assert [point.label for point in plan.points] == [
        "tiny smoke seed 0, sizes 3, lr 0.1, n_steps 1, mode work",
        "tiny smoke seed 0, sizes 3, lr 0.2, n_steps 2, mode work",
        "tiny smoke seed 0, sizes 3, lr 0.2, n_steps 2, mode wait",
        "tiny smoke seed 9, sizes 3, lr 1",
    ]
    assert all(point.values["sizes"] == [3] for point in plan.points)


def test_several_grids_share_what_they_do_not_set(book: Path) -> None:
    plan = read("seeds: [4]\nchapters: [tiny]\ngrids:\n  - profiles: [cpu]\n  - parameters: {lr: 0.1}\n")
    assert [point.label for point in plan.points] == ["tiny cpu seed 4", "tiny smoke seed 4, lr 0.1"]


def test_the_same_point_is_there_once_and_named_by_its_content(book: Path) -> None:
    plan = read("chapters: [tiny]\ninclude: [{seed: 0}, {lr: 0.5}, {lr: 0.25}]\n")
    names = [point.name for point in plan.points]
    assert len(names) == 2, "lr 0.5 is the default: the first three are one point"
    chapter = book / "book/chapters/tiny.ipynb"
    chapter.write_text(chapter.read_text().replace("A tiny", "A small"))
    changed = [point.name for point in plans.read(Path("plan.yml")).points]
    assert set(changed).isdisjoint(names), "another chapter is another point"


def test_points_that_cannot_run_are_refused_by_name_and_the_others_stay(book: Path) -> None:
    plan = read(
        "chapters: [tiny]\ngrid: {lr: [0.5, 2.0]}\n"
        "include: [{lrr: 1}, {chapter: tinny}, {profile: cqu}, {out: x}, {seed: -1}]\n"
    )
    assert [point.label for point in plan.points] == ["tiny smoke seed 0, lr 0.5"]
    refused = dict(plan.refused)
    assert refused["tiny smoke seed 0, lr 2.0"] == "parameter lr: 2.0 must be in (0..1]"
    assert "did you mean 'lr'?" in refused["tiny smoke seed 0, lrr 1"]
    assert "did you mean 'tiny'?" in refused["tinny smoke seed 0"]
    assert "did you mean 'cpu'?" in refused["tiny cqu seed 0"]
    assert "use --out" in refused["tiny smoke seed 0, out x"]
    assert "[0..]" in refused["tiny smoke seed -1"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("chapter: [tiny]", "did you mean 'chapters'?"),
        ("chapters: tiny", "chapters must be a list"),
        ("chapters: [tiny]\nseeds: 3", "seeds must be a list"),
        ("chapters: [tiny]\ngrid: {lr: 0.1}", "grid: lr must be a list"),
        ("chapters: [tiny]\nparameters: [lr]", "must hold lines"),
        ("chapters: [tiny]\ngpus: many", "gpus must be"),
        ("chapters: [tiny]\nexclude: [{seed: 5}]", "matches no point"),
        ("chapters: [tiny]\nseeds: [0, 1]\ninclude: [{lr: 0.1}]", "must say its seed"),
        ("grids: [{chapters: [tiny], gpus: 1}]", "unknown key of a grid"),
        ("- tiny", "must hold lines"),
    ],
)
def test_a_file_that_is_no_plan_is_refused_whole(book: Path, text: str, words: str) -> None:
    with pytest.raises(InputError, match=re.escape(words)):
        read(text)


def test_hours_come_from_records(book: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = read("chapters: [tiny]\nprofiles: [cpu]\ngrid: {lr: [0.25, 0.5]}\n")
    first, second = plan.points
    assert plans.estimate(first, []) is None
    record = {
        "chapter": "tiny", "profile": "cpu", "seed": 7, "seconds": 3600.0, "metrics": {}, "best": {},
        "parameters": {**first.values, "seed": 7, "threads": 2}, "finished": "2026-01-01T00:00:00+00:00",
    }  # fmt: skip
    records.write(book / "runs" / "a", record)
    found = plans.recorded(book / "runs")
    assert plans.estimate(first, found) == (3600.0, True) and plans.estimate(second, found) == (3600.0, False)
    assert main(["batch", "plan.yml", "--dry-run", "--workers", "2"]) == 0
    out = capsys.readouterr().out
    assert "to run        1.00 h     tiny cpu seed 0, lr 0.25\n" in out
    assert "2 points, 2 of them to run: 2.00 h of work, about 1.00 h with 2 workers" in out
    assert "1.00 h ~" in out and not (book / "runs" / "plan").exists(), "a dry run leaves nothing"


@pytest.mark.parametrize("path", OURS, ids=lambda path: path.stem)
def test_every_plan_of_the_book_can_run(path: Path) -> None:
    plan = plans.read(path)
    assert plan.title and plan.points and not plan.refused


def test_the_plan_that_the_book_explains(tmp_path: Path) -> None:
    page = (book_root() / "how-to" / "batch.md").read_text(encoding="utf-8")
    (tmp_path / "example.yml").write_text(page.split("```yaml\n")[1].split("```")[0])
    plan = plans.read(tmp_path / "example.yml")
    assert len(plan.points) == 2 * 3 * 2 * 2 - 2 + 1 and not plan.refused


def test_the_plans_of_the_book() -> None:
    by_name = {path.stem: plans.read(path) for path in OURS}
    assert {point.chapter for point in by_name["smoke"].points} == set(chapters())
    table = by_name["cifar10"].points
    assert len(table) == 15 and {point.values["seed"] for point in table} == {0, 1, 2}
    assert len({(point.values["teacher"], point.values["student"]) for point in table}) == 5
    assert all(len(point.values["methods"]) >= 10 for point in table)
    with_parts = {point.chapter for point in by_name["ablations"].points}
    assert with_parts >= {"dfad", "cmi", "fast", "comparison"}
