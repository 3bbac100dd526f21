"""The book's tables from records: pairs of networks, the latest run of each, CSV, LaTeX, page and command alike."""

from __future__ import annotations

import html
import io
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from dfkd_lib import records
from dfkd_lib.reproduction import latex, pages, tables
from dfkd_lib.reproduction.cli import main
from dfkd_lib.reproduction.display import percent


def record(seed: int = 0, *, run: str = "", metrics: Mapping[str, float | None], **changed: Any) -> dict[str, Any]:
    parameters = {"seed": seed, "teacher": "wrn40_2", "student": "wrn16_1", "dataset": "cifar10"}
    when = changed.pop("finished", "2026-01-01T00:00:00+00:00")
    return {
        "chapter": "comparison", "profile": "gpu", "seed": seed, "parameters": parameters | changed,
        "run": run or f"gpu-seed{seed}", "folder": Path(run or f"gpu-seed{seed}"), "seconds": 1.0, "finished": when,
        "metrics": {f"comparison/{key}/accuracy": value for key, value in metrics.items()}, "best": {},
        "data": [{"name": "cifar10", "split": "test", "fingerprint": "0"}],
    }  # fmt: skip


def test_mean_sd_and_n_of_final_figures() -> None:
    runs = [record(0, metrics={"CMI": 0.8}), record(1, metrics={"CMI": 0.9}), record(2, metrics={"CMI": None})]
    (row,) = tables.values(runs).to_dict("records")
    assert (row["metric"], row["pair"], row["n"], row["diverged"]) == (
        "comparison/CMI/accuracy", "wrn40_2 to wrn16_1", 2, 1
    )  # fmt: skip
    assert row["mean"] == pytest.approx(0.85) and row["sd"] == pytest.approx(0.0707107)
    (alone,) = tables.values(runs[:1]).to_dict("records")
    assert alone["n"] == 1 and pd.isna(alone["sd"]), "one run has no spread"


def test_pairs_of_networks_stand_side_by_side() -> None:
    runs = [record(seed, metrics={"CMI": 0.8 + seed / 100, "DAFL": 0.5}) for seed in (0, 1)]
    runs += [record(0, metrics={"CMI": 0.7}, teacher="vgg11", student="resnet18")]
    (table,) = [t for t in tables.results(runs) if t.caption.startswith("Chapter comparison")]
    assert table.caption == "Chapter comparison, comparison: accuracy in percent (CIFAR-10)"
    frame = table.frame.set_index("method")
    assert list(frame.columns) == ["wrn40_2 to wrn16_1", "vgg11 to resnet18"]
    assert list(frame.loc["CMI"]) == ["80.5 ± 0.7 (2 seeds)", "70.0 (1 seed)"]
    assert list(frame.loc["DAFL"]) == ["50.0 ± 0.0 (2 seeds)", ""]


def test_a_later_run_of_the_same_parameters_replaces_the_earlier(tmp_path: Path) -> None:
    runs = [
        record(0, run="new", metrics={"CMI": 0.9}, finished="2026-02-01T00:00:00+00:00"),
        record(0, run="old", metrics={"CMI": 0.1}),
        record(1, metrics={"CMI": 0.2}),
    ]
    assert sorted(r["run"] for r in tables.latest(runs)) == ["gpu-seed1", "new"]
    for each in runs:
        records.write(tmp_path / each["run"], {k: v for k, v in each.items() if k not in ("run", "folder")})
    assert sorted(r["run"] for r in tables.under([tmp_path])) == ["gpu-seed1", "new"]


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["results", "--committed", *words]) == 0
    return capsys.readouterr().out


def cells_of(page: str) -> list[list[str]]:
    rows = re.findall(r"<tr>(.*?)</tr>", page, flags=re.S)
    found = [re.findall(r"<td[^>]*>(.*?)</td>", row, flags=re.S) for row in rows]
    plain = [[html.unescape(re.sub(r"<[^>]*>", "", cell)).replace("\xa0", " ") for cell in row] for row in found]
    return [row for row in plain if row]


@pytest.mark.parametrize("words", [[], ["--claims"]])
def test_the_page_and_the_command_agree_figure_by_figure(capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    page = (pages.claims() if words else pages.results()).data
    text = printed(capsys, "--format", "csv", *words) if words else ""
    shown = tables.claims(records.committed()) if words else tables.results(records.committed())
    rows = [[str(cell) for cell in row] for table in shown for row in table.frame.itertuples(index=False)]
    on_page = [[re.sub(rf"^[{''.join(pages.MARKS.values())}] ", "", cell) for cell in row] for row in cells_of(page)]
    assert on_page == rows and len(rows) > 10
    if words:
        parts = [part.split("\n", 1)[1] for part in re.split(r"(?m)^# ", text) if part]
        frames = [pd.read_csv(io.StringIO(part), keep_default_na=False) for part in parts]
        assert [[str(c) for c in row] for frame in frames for row in frame.itertuples(index=False)] == rows


def test_every_figure_of_the_page_is_the_mean_and_sd_of_the_csv(capsys: pytest.CaptureFixture[str]) -> None:
    frame = pd.read_csv(io.StringIO(printed(capsys, "--format", "csv")))
    figures = {
        (row.metric.split("/")[1], percent(row.mean, None if pd.isna(row.sd) else row.sd))
        for row in frame.itertuples()
        if not pd.isna(row.mean)
    }
    checked = 0
    for table in tables.results(records.committed()):
        if " in percent" not in table.caption or "final" not in table.frame:
            continue
        for row in table.frame.to_dict("records"):
            if row["final"] and "diverged" not in row["final"]:
                assert (row["method"].split(" (")[0], row["final"]) in figures, table.caption
                checked += 1
    assert checked > 20


def test_text_and_json_hold_the_same_tables(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys)
    for table in tables.results(records.committed()):
        assert table.caption in text
    assert '"metric"' in printed(capsys, "--json") and "not tested here" in printed(
        capsys, "--claims", "--format", "json"
    )


@pytest.mark.parametrize("words", [[], ["--claims"]])
def test_latex_compiles(capsys: pytest.CaptureFixture[str], tmp_path: Path, words: list[str]) -> None:
    text = printed(capsys, "--format", "latex", *words)
    assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") > 0 and "?" not in latex._tex("± → é")
    (tmp_path / "tables.tex").write_text(text, encoding="utf-8")
    if not shutil.which("pdflatex"):
        pytest.skip("no pdflatex here: the document was written, not compiled")
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "tables.tex"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, errors="replace")
    assert run.returncode == 0, run.stdout[-2000:]
    assert (tmp_path / "tables.pdf").stat().st_size > 10_000


def test_claims_of_a_chapter_are_those_of_its_papers(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["results", "fast", "--claims", "--committed"]) == 0
    printed = capsys.readouterr().out
    assert "2112.06253" in printed and "1912.11006" not in printed
    assert all(len(line) <= 110 for line in printed.splitlines() if line.startswith(("- ", "  ")))
