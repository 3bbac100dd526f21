"""The pages that are made from records."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from dfkd_lib import records
from dfkd_lib.locations import book_root
from dfkd_lib.reproduction import pages

METRICS = {
    "classification/teacher/accuracy": 0.99,
    "classification/KD original/accuracy": 0.985,
    "classification/RANDOM/accuracy": 0.7,
    "classification/DFAD/accuracy": 0.98,
    "classification/DFAD MSE/accuracy": 0.97,
}


@pytest.fixture
def book(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A book with one chapter and its card, and no results."""
    for part in ("papers/dfad.yml", "chapters/dfad.ipynb"):
        (tmp_path / "book" / part).parent.mkdir(parents=True)
        shutil.copy(book_root() / part, tmp_path / "book" / part)
    monkeypatch.setenv("DFKD_BOOK", str(tmp_path / "book"))
    return tmp_path / "book"


def commit(book: Path, run: str, profile: str, seed: int = 0, dataset: str = "mnist", **changed: Any) -> dict[str, Any]:
    """A record under the book's results; `changed` sets accuracies of rows, with _ for a space."""
    changes = {f"classification/{row.replace('_', ' ')}/accuracy": value for row, value in changed.items()}
    record = {
        "chapter": "dfad",
        "profile": profile,
        "parameters": {"seed": seed, "dataset": dataset},
        "seed": seed,
        "seconds": 90.0,
        "finished": "2026-01-02T03:04:05+00:00",
        "metrics": METRICS | changes,
        "best": {"classification/DFAD/accuracy": 0.981},
        "data": [{"name": dataset, "split": "test", "fingerprint": "0"}],
    }
    return records.read(records.write(book / "results" / "dfad" / run, record).parent)


def test_without_records_the_pages_say_so(book: Path) -> None:
    assert "No larger run is committed yet" in pages.results().data
    assert "<table" not in pages.results().data
    claims = pages.claims().data
    assert "No larger run is committed yet" in claims
    assert claims.count("– not tested here") == len(pages.paper("dfad").claims)
    assert "none yet" in pages.chapters().data


def test_comparison_puts_our_figures_beside_the_published_ones(book: Path) -> None:
    runs = [commit(book, f"cpu-{seed}", "cpu", seed, DFAD=value) for seed, value in enumerate((0.97, 0.98, 0.99))]
    frame = pages.comparison("dfad", "classification", runs).set_index("method")
    assert list(frame.columns) == ["final", "best", "Table 2, MNIST"]
    assert list(frame.loc["DFAD"]) == ["98.0 ± 1.0", "98.1 ± 0.0", "98.3 ± 0.2"]
    assert frame.loc["KD original (KD-ORI)", "Table 2, MNIST"] == "98.8 ± 0.1"
    assert list(frame.loc["DAFL"]) == ["", "", "98.1 ± 0.1"]
    assert frame.loc["DFAD MSE", "Table 2, MNIST"] == ""
    assert len(pages.comparison("dfad", "segmentation", runs)) == 0


def test_a_run_of_another_part_of_the_chapter_has_no_table(book: Path) -> None:
    run = commit(book, "scenes", "cpu")
    run["metrics"] = {"classification/teacher/accuracy": 0.99, "segmentation/DFAD log/mean IoU": 0.4}
    assert len(pages.comparison("dfad", "classification", [run])) == 0
    assert len(pages.comparison("dfad", "segmentation", [run])) == 1


def test_comparison_has_every_table_of_the_dataset_or_none(book: Path) -> None:
    cifar = pages.comparison("dfad", "classification", [commit(book, "gpu", "gpu", dataset="cifar10")])
    assert list(cifar.columns) == ["method", "final", "best", "Table 2, CIFAR-10", "mmrazor, CIFAR-10"]
    svhn = pages.comparison("dfad", "classification", [commit(book, "svhn", "gpu", dataset="svhn")])
    assert list(svhn.columns) == ["method", "final", "best"]
    assert len(svhn) == len(METRICS)


def test_diverged_runs_are_shown_not_dropped(book: Path) -> None:
    runs = [commit(book, "a", "cpu", 0, DFAD_MSE=None), commit(book, "b", "cpu", 1)]
    frame = pages.comparison("dfad", "classification", runs).set_index("method")
    assert frame.loc["DFAD MSE", "final"] == "97.0, 1 of 2 diverged"
    alone = pages.comparison("dfad", "classification", runs[:1]).set_index("method")
    assert alone.loc["DFAD MSE", "final"] == "diverged"


def test_a_claim_is_judged_at_the_largest_scale_that_tests_it(book: Path) -> None:
    commit(book, "cpu", "cpu", DFAD=0.98)
    commit(book, "gpu", "gpu", DFAD=0.5, dataset="cifar10")
    claim = pages.paper("dfad").claim("game-matters")
    assert pages.at_largest_scale(claim, records.group(records.committed("dfad")))[1].verdict == "does not hold"
    assert pages.at_largest_scale(pages.paper("dfad").claim("upper-bound"), {})[0] == ""
    page = pages.claims().data
    assert "DFAD 50.0&nbsp;% against RANDOM 70.0&nbsp;%, 1 seed; CIFAR-10" in page
    assert '<span class="verdict does-not-hold">✗ does not hold</span>' in page


def test_landing_table_links_the_chapter_and_counts_verdicts(book: Path) -> None:
    commit(book, "cpu", "cpu")
    page = pages.chapters().data
    assert '<a href="chapters/dfad.html">' in page and "cpu mnist (1 seed)" in page
    assert "✓ holds: 3" in page and "– not tested here: 9" in page


def test_a_card_counts_the_runs_of_all_its_chapters(book: Path) -> None:
    card = book / "papers" / "dfad.yml"
    card.write_text(card.read_text() + "\nchapters: [dfad, comparison]\n")
    run = commit(book, "cpu", "cpu")
    records.write(book / "results" / "comparison" / "a", {**run, "chapter": "comparison", "folder": ""})
    assert "(chapter comparison, " in pages.results().data
    assert pages.results().data.count("<table") == 3, "beside the paper's figures, and as a chapter of its own"


def test_the_same_records_give_the_same_pages(book: Path) -> None:
    commit(book, "cpu", "cpu")
    assert [make().data for make in (pages.results, pages.claims, pages.chapters)] == [
        make().data for make in (pages.results, pages.claims, pages.chapters)
    ]


def test_status_reads_run_folders(book: Path, tmp_path: Path) -> None:
    assert "No chapter was executed" in pages.status(tmp_path / "none").data
    commit(book, "smoke", "smoke")
    page = pages.status(book / "results" / "dfad").data
    assert ">1.5</td>" in page and "2026-01-02 03:04" in page


CHANNELS_LAST = "cpu (a processor, 1 threads), bfloat16, channels-last, seed 0"
CONTIGUOUS = "cpu (a processor, 1 threads), float32, contiguous, seed 0"


@pytest.mark.parametrize(
    ("runtime", "of_teacher", "shape", "more", "marked"),
    [
        (CHANNELS_LAST, CHANNELS_LAST, [3, 32, 32], {}, True),
        (CONTIGUOUS, CHANNELS_LAST, [3, 32, 32], {}, True),
        (CHANNELS_LAST, CONTIGUOUS, [3, 32, 32], {"resumed": {}}, False),
        (CONTIGUOUS, CONTIGUOUS, [3, 32, 32], {}, False),
        (CHANNELS_LAST, CHANNELS_LAST, [40], {}, False),
    ],
)
def test_runs_that_may_have_been_resumed_wrongly_are_named(
    book: Path, runtime: str, of_teacher: str, shape: list[int], more: dict[str, Any], marked: bool
) -> None:
    run = commit(book, "cpu", "cpu")
    teacher = {"runtime": of_teacher, "data": {"name": "x", "shape": shape}}
    records.write(run.pop("folder"), {**run, "runtime": runtime, "teachers": [teacher], **more})
    for page in (pages.results(), pages.status(book / "results" / "dfad")):
        assert ("not those of an uninterrupted run: dfad: cpu." in page.data) is marked


def test_table_escapes_text_and_keeps_figures_on_one_line() -> None:
    text = pages.table_html(pd.DataFrame({"a": ["<b>", "98.3 ± 0.1 %"]}), 'a "caption"')
    assert "&lt;b&gt;" in text and "<b>" not in text
    assert "98.3&nbsp;±&nbsp;0.1&nbsp;%" in text
    assert 'aria-label="a &quot;caption&quot;"' in text


def test_every_committed_run_is_counted_with_its_hours_and_machine(book: Path) -> None:
    commit(book, "a", "cpu", 0)
    commit(book, "b", "cpu", 1)
    page = pages.committed_runs().data
    hours = sum(record["seconds"] for record in records.committed()) / 3600
    assert f"The runs behind the book: 2, {hours:.1f} hours in all" in page
    assert "cpu mnist" in page and '<td class="col-seeds"' in page and ">2</td>" in page
