"""Tables and pictures: what they show of the figures they are given."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from dfkd_lib.losses import mae
from dfkd_lib.reproduction import display, plots
from dfkd_lib.reproduction.display import percent, show_source, table


@pytest.mark.parametrize(
    ("value", "spread", "text"),
    [(0.98349, None, "98.3"), (0.5, 0.0123, "50.0 ± 1.2"), (None, None, "-"), (float("nan"), None, "-")],
)
def test_percent(value, spread, text):
    assert percent(value, spread) == text


def test_tables_keep_the_order_and_mark_what_is_missing():
    shown = table({"b": {"x": "1"}, "a": {"y": "2"}})
    assert list(shown.index) == ["b", "a"]
    assert shown.loc["a", "x"] == "-"


def test_the_source_shown_is_the_library_without_its_docstring(capsys, monkeypatch):
    show_source(mae)
    assert capsys.readouterr().out == "", "there is nowhere to show it"
    monkeypatch.setattr(display, "in_notebook", lambda: True)
    show_source(mae)
    shown = capsys.readouterr().out
    assert "l1_loss" in shown
    assert "Mean absolute" not in shown


def test_a_grid_holds_every_image_once_and_clamps():
    images = torch.arange(5.0).view(5, 1, 1, 1).expand(5, 1, 2, 3) - 1
    sheet = plots.grid(images, columns=2)
    assert sheet.shape == (9, 8, 3)
    assert sheet[0, 0, 0] == 0 and sheet[0, 4, 0] == 0 and sheet[3, 4, 0] == 1


def test_a_method_keeps_its_colour_and_the_longest_name_wins():
    assert plots.colour_of("DFAD log") == plots.colour_of("DFAD")
    assert plots.colour_of("KD related") != plots.colour_of("KD original")


def test_masks_are_painted_by_class_and_void_is_white():
    painted = plots.paint(torch.tensor([[[0, 1], [1, 11]]]), void=11)
    assert painted.shape == (1, 3, 2, 2)
    assert torch.equal(painted[0, :, 0, 1], painted[0, :, 1, 0])
    assert painted[0, :, 1, 1].tolist() == [1, 1, 1]


def test_figures_can_be_drawn():
    figure, (left, right) = plots.axes(2)
    plots.curves(left, {"DFAD": [(1, 0.5), (2, 0.6)], "RANDOM": [(1, 0.1)]}, x_label="x", y_label="y", log="x")
    plots.bars(right, {"DFAD": 0.9, "MSE": None}, x_label="accuracy")
    figure.canvas.draw()
    assert [text.get_text() for text in right.texts] == ["90.0", "diverged"]


def test_marked_words_stand_out_line_by_line():
    figure, (axis,) = plots.axes(1)
    lines = {"Sports": [("goal", True), ("autobiographical", False), ("win", True)], "World": [("war", True)]}
    plots.show_words(axis, lines)
    figure.canvas.draw()
    seen = {text.get_text(): (text.get_position(), text.get_color()) for text in axis.texts}
    assert {word: row for word, ((_, row), _) in seen.items()} == {
        "Sports": 0, "goal": 0, "autobiographical": 0, "win": 0, "World": 1, "war": 1,
    }  # fmt: skip
    boxes = [text.get_window_extent() for text in axis.texts[:4]]
    assert all(left.x1 < right.x0 for left, right in pairwise(boxes))
    assert seen["goal"][0][0] == seen["war"][0][0]
    assert seen["goal"][1] == seen["war"][1] != seen["autobiographical"][1]
