"""The page on a network of ImageNet shows the file that it speaks of, and the figures of its record."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import nn

from benchmarks import imagenet


def test_the_page_shows_the_file_and_the_record() -> None:
    page = imagenet.PAGE.read_text(encoding="utf-8")
    assert imagenet.NETWORKS.read_text(encoding="utf-8") in page
    found = json.loads(imagenet.RECORD.read_text()) if imagenet.RECORD.exists() else {}
    assert imagenet.written(page, found) == page
    assert not found or imagenet.PICTURE.stat().st_size < 400_000


def test_chosen_classes_are_inverted_and_written(tmp_path: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        teacher = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                                nn.Linear(8, 1000)).eval()  # fmt: skip
        student = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 1000))
    images, said = imagenet.inverted(teacher, student, 16, 3)
    assert images.shape == (4, 3, 16, 16) and set(said["belief"]) == set(imagenet.CLASSES.values())
    imagenet.save_row(images, tmp_path / "row.png")
    assert (tmp_path / "row.png").stat().st_size > 0
    text = imagenet.section({"inverted": said, "hardware": "a processor"})
    assert "3 steps at 16 pixels" in text and "daisy" in text
