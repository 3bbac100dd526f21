"""Accuracy and mean intersection over union against cases computed by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dfkd_lib.data import ImageSet
from dfkd_lib.measures.evaluation import accuracy, confusion, evaluate, mean_iou, mean_iou_of
from dfkd_lib.runtime import Runtime


class Echo(nn.Module):
    """Predicts, at every pixel, the class that the red value (0..255) names."""

    def __init__(self, n_classes: int, pooled: bool = False) -> None:
        super().__init__()
        self.n_classes, self.pooled = n_classes, pooled

    def forward(self, x: Tensor) -> Tensor:
        logits = nn.functional.one_hot((x[:, 0] * 255).round().long(), self.n_classes).movedim(-1, 1).float()
        return logits.mean((2, 3)) if self.pooled else logits


def scenes(predicted: list, masks: list, void: int | None = None) -> ImageSet:
    images = torch.tensor(predicted, dtype=torch.uint8).unsqueeze(1)
    labels = torch.tensor(masks, dtype=torch.uint8)
    return ImageSet(images, labels, classes=("a", "b", "c"), name="scenes", split="test", void=void)


def test_a_perfect_prediction_scores_one(float32):
    masks = [[[0, 1], [2, 1]]]
    assert mean_iou(Echo(3), scenes(masks, masks), float32) == 1.0


def test_two_by_two_by_hand(float32):
    # class 0: 1 of 2; class 1: 1 of 3; class 2: never seen, does not count
    images = scenes([[[0, 1], [1, 0]]], [[[0, 1], [0, 0]]])
    assert mean_iou(Echo(3), images, float32) == pytest.approx((2 / 3 + 1 / 2) / 2)


def test_void_pixels_do_not_matter(float32):
    right, wrong = scenes([[[0, 1]]], [[[0, 11]]], void=11), scenes([[[0, 2]]], [[[0, 11]]], void=11)
    assert mean_iou(Echo(3), right, float32) == mean_iou(Echo(3), wrong, float32) == 1.0


def test_absent_classes_are_left_out_of_the_mean():
    counts = torch.tensor([[4, 0, 0], [0, 0, 0], [0, 0, 2]])
    assert mean_iou_of(counts) == 1.0


def test_confusion_counts_label_by_prediction():
    counts = confusion(torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1]), 2)
    assert counts.tolist() == [[1, 1], [0, 1]]


def test_accuracy_counts_and_gives_the_mode_back(float32):
    images = ImageSet(
        torch.tensor([0, 1, 1], dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 1, 2, 2).contiguous(),
        torch.tensor([0, 1, 0]), classes=("a", "b"), name="x", split="test",
    )  # fmt: skip
    model = Echo(2, pooled=True).train()
    assert accuracy(model, images, float32, batch_size=2) == pytest.approx(2 / 3)
    assert model.training
    assert evaluate(model, images, float32) == {"accuracy": pytest.approx(2 / 3)}


def test_evaluation_builds_no_graph(float32):
    seen = []

    class Spy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(torch.is_grad_enabled())
            return torch.zeros(len(x), 2)

    images = ImageSet(
        torch.zeros(2, 1, 2, 2, dtype=torch.uint8), torch.tensor([0, 1]), classes=("a", "b"), name="x", split="test"
    )
    accuracy(Spy(), images, Runtime.choose("cpu", "float32"))
    assert seen == [False]
