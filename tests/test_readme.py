"""The README's headline table is what the committed records say."""

from __future__ import annotations

from pathlib import Path

import pytest

from dfkd_lib import records
from dfkd_lib.errors import InputError
from dfkd_lib.locations import repository_root
from dfkd_lib.reproduction import readme

ROOT = repository_root()


def test_the_stored_table_is_that_of_the_records() -> None:
    assert ROOT
    stored = (ROOT / "README.md").read_text(encoding="utf-8")
    assert stored.split(readme.BEGIN)[1].split(readme.END)[0].strip() == readme.headline_table()
    assert stored.index("make book") < stored.index(readme.BEGIN), "the two commands come first"


def test_every_line_has_its_figures_from_its_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = readme.headline_table().splitlines()[2:]
    assert len(lines) == len(readme.HEADLINES)
    real = records.committed

    def halved(*chapters: str) -> list[dict[str, object]]:
        found = real(*chapters)
        for record in found:
            record["metrics"] = {key: None if v is None else v / 2 for key, v in record["metrics"].items()}
        return found

    monkeypatch.setattr(readme.records, "committed", halved)
    for before, after in zip(lines, readme.headline_table().splitlines()[2:], strict=True):
        old, new = ([float(cell.split("±")[0]) for cell in line.split("|")[3:5]] for line in (before, after))
        assert new == pytest.approx([value / 2 for value in old], abs=0.06)


def test_only_what_stands_between_the_marks_is_written(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text(f"before\n{readme.BEGIN}\nold\n{readme.END}\nafter\n")
    readme.refresh(path)
    text = path.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    path.write_text("no marks")
    with pytest.raises(InputError, match="lacks the lines"):
        readme.refresh(path)
