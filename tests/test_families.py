"""The table of families: rows that are made once, and a page that says what the record says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import dfkd_lib
from benchmarks import families
from dfkd_lib import data, distillers
from dfkd_lib.errors import DFKDError

LOAD = data.load


@pytest.mark.parametrize("family", families.FAMILIES)
def test_the_teachers_are_as_the_page_says(family: str) -> None:
    _, build, method = families.FAMILIES[family]
    network = build(32).eval()
    assert network(torch.rand(2, 3, 32, 32)).shape == (2, 10)
    normed = any(isinstance(module, torch.nn.BatchNorm2d) for module in network.modules())
    assert normed == distillers.needs_batch_norm(method), "what has no batch norm is given a method that asks for none"


def test_a_row_is_made_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(families.data, "load", lambda name, split, **options: LOAD("digits", split, **options))
    usual = dfkd_lib.distill

    def tiny(*networks: Any, minutes: float, **options: Any) -> dfkd_lib.Distilled:
        assert 0 < minutes < 5, "what the teacher has left"
        return usual(*networks, n_updates=4, batch_size=4, ngf=2, latent_dim=4, **options)

    monkeypatch.setattr(dfkd_lib, "distill", tiny)
    monkeypatch.setattr(families, "SHARE", 0.002)
    out = tmp_path / "families.json"
    command = f"--minutes 5 --images 40 --families plain-cnn --sizes 16 --out {out}".split()
    assert families.main(command) == 0
    assert "| plain CNN | 16x16 | `dfad` |" in capsys.readouterr().out
    found = json.loads(out.read_text())
    assert set(found["rows"]) == {"plain-cnn/16"} and found["rows"]["plain-cnn/16"]["student updates"] > 0
    assert families.main(command) == 0 and not capsys.readouterr().out, "nothing is made again"
    page = f"before\n{families.BEGIN}old\n{families.END}after\n"
    new = families.written(page, found)
    assert new.startswith("before\n") and new.endswith("after\n") and families.table(found) in new and "old" not in new
    with pytest.raises(DFKDError, match="has no marks"):
        families.written("nothing", found)


def test_the_page_says_what_the_record_says() -> None:
    page = families.PAGE.read_text(encoding="utf-8")
    assert families.BEGIN in page and families.END in page
    if families.RECORD.exists():
        assert families.written(page, json.loads(families.RECORD.read_text())) == page
    else:
        assert f"{families.BEGIN}{families.END}" in page, "no figures without a record"


def test_the_example_says_what_its_record_says() -> None:
    record = json.loads((families.HERE / "resnet18.json").read_text())
    page, found = families.PAGE.read_text(encoding="utf-8"), record["metrics"]
    for measure in ("agreement", "student accuracy", "teacher accuracy"):
        assert f"{100 * found[f'distill/fast/{measure}']:.1f} %" in page, measure
    assert f"{record['budget']['student_updates']:,} updates" in page
    assert f"note: {record['parameters']['settings']['n_updates']:,} student updates of fast fit into 30" in page
