"""Closed forms, invariances and limits of the measures of diversity."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import classifier

from dfkd_lib.data import ImageSet
from dfkd_lib.errors import InputError
from dfkd_lib.measures.diversity import (
    coverage,
    describe,
    frechet_distance,
    label_entropy,
    mean_pairwise_distance,
    measure,
    retrieval_accuracy,
    vendi_score,
)
from dfkd_lib.measures.image_quality import kernel_distance


@pytest.fixture
def points() -> torch.Tensor:
    return torch.randn(40, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_pairwise_distance_equals_the_double_loop(points):
    labels = torch.arange(40) % 3
    similarity = F.cosine_similarity(points[:, None], points[None], dim=2)
    pairs = ~torch.eye(40, dtype=torch.bool)
    assert mean_pairwise_distance(points) == pytest.approx(float(1 - similarity[pairs].mean()))
    within = pairs & (labels[:, None] == labels[None])
    assert mean_pairwise_distance(points, labels) == pytest.approx(float(1 - similarity[within].mean()))


def test_pairwise_distance_at_its_limits():
    one = torch.ones(5, 3)
    assert mean_pairwise_distance(one) == pytest.approx(0)
    assert mean_pairwise_distance(torch.eye(4)) == pytest.approx(1)
    assert mean_pairwise_distance(torch.stack([one[0], -one[0]])) == pytest.approx(2)
    assert math.isnan(mean_pairwise_distance(torch.eye(3), torch.arange(3)))


def test_retrieval_at_its_limits(points):
    assert retrieval_accuracy(points, points) == 1
    assert retrieval_accuracy(points, 3 * points) == 1
    assert retrieval_accuracy(points, points.roll(1, 0)) == 0
    assert retrieval_accuracy(torch.ones(8, 2), torch.ones(8, 2)) == pytest.approx(1 / 8)


def test_vendi_score_counts_distinct_directions():
    assert vendi_score(torch.eye(7)) == pytest.approx(7)
    assert vendi_score(torch.ones(9, 4)) == pytest.approx(1)
    assert vendi_score(torch.eye(3).repeat(5, 1)) == pytest.approx(3)


def test_vendi_score_is_the_same_from_either_gram_matrix(points):
    cosines = F.normalize(points, dim=1) @ F.normalize(points, dim=1).T / 40
    values = torch.linalg.eigvalsh(cosines).clamp_min(0)
    expected = math.exp(-float(torch.special.xlogy(values, values).sum()))
    assert vendi_score(points) == pytest.approx(expected)
    assert vendi_score(F.pad(points, (0, 60))) == pytest.approx(expected)
    assert 1 <= expected <= 6


@pytest.mark.parametrize("measured", [mean_pairwise_distance, vendi_score])
def test_order_rotation_and_scale_change_nothing(points, measured):
    rotation = torch.linalg.qr(points[:6]).Q
    assert measured(points.flip(0)) == pytest.approx(measured(points))
    assert measured(points @ rotation) == pytest.approx(measured(points))
    assert measured(points * torch.rand(40, 1)) == pytest.approx(measured(points))


def test_frechet_distance_has_its_closed_forms(points):
    assert frechet_distance(points, points) == pytest.approx(0, abs=1e-9)
    shift = torch.tensor([1.0, 2.0, 0, 0, 0, 0], dtype=torch.float64)
    assert frechet_distance(points, points + shift) == pytest.approx(5)
    # Twice as wide about the mean: tr(S + 4 S - 4 S) = tr S.
    mean = points.mean(0)
    assert frechet_distance(points, mean + 2 * (points - mean)) == pytest.approx(float(torch.cov(points.T).trace()))
    line, wider = torch.tensor([[-1.0], [1.0]]), torch.tensor([[-3.0], [3.0]])
    assert frechet_distance(line, wider) == pytest.approx((3 - 1) ** 2 * 2)


def test_frechet_distance_is_symmetric_and_ignores_rotations(points):
    other = torch.randn(30, 6, dtype=torch.float64).exp()
    distance = frechet_distance(points, other)
    assert distance > 0
    assert frechet_distance(other, points) == pytest.approx(distance)
    rotation = torch.linalg.qr(points[:6]).Q
    assert frechet_distance(points @ rotation, other @ rotation) == pytest.approx(distance)


def test_frechet_distance_of_singular_sets_is_finite():
    flat = torch.zeros(10, 4)
    assert frechet_distance(flat, flat) == 0
    assert math.isfinite(frechet_distance(flat, torch.randn(10, 4)))


def test_kernel_distance_by_hand():
    # k = (xy + 1)^3: 1 within the first pair, 27 within the second, (1 + 1 + 8 + 27) / 4 between them.
    x, y = torch.tensor([[0.0], [1.0]]), torch.tensor([[1.0], [2.0]])
    assert kernel_distance(x, y) == pytest.approx(1 + 27 - 2 * 37 / 4)
    # Two features: products are halved, and an unbiased estimate may be negative.
    x, y = torch.tensor([[1.0, 1.0], [1.0, -1.0]]), torch.tensor([[0.0, 0.0], [2.0, 0.0]])
    assert kernel_distance(x, y) == pytest.approx(1 + 1 - 2 * (1 + 8) / 2)


def test_kernel_distance_is_symmetric_and_leaves_out_the_diagonal(points):
    other = torch.randn(1500, 6, dtype=torch.float64) + 0.5
    k = (points @ points.T / 6 + 1) ** 3
    own = float(k.sum() - k.trace()) / (40 * 39)
    k = (other @ other.T / 6 + 1) ** 3
    theirs = float(k.sum() - k.trace()) / (1500 * 1499)
    between = float(((points @ other.T / 6 + 1) ** 3).mean())
    assert kernel_distance(points, other) == pytest.approx(own + theirs - 2 * between)
    assert kernel_distance(other, points) == pytest.approx(kernel_distance(points, other))
    with pytest.raises(InputError, match="at least 2 rows"):
        kernel_distance(points[:1], other)


def test_label_entropy_at_its_limits():
    assert label_entropy(torch.arange(10), 10) == pytest.approx(1)
    assert label_entropy(torch.zeros(10, dtype=torch.int64), 10) == 0
    assert label_entropy(torch.tensor([0, 1]), 4) == pytest.approx(0.5)


def test_coverage_at_its_limits(points):
    assert coverage(points, points) == 1
    assert coverage(points + 100, points) == 0
    real = torch.arange(10.0)[:, None]
    # The ball of the second neighbour has radius 2 at the ends of the line and 1 inside.
    assert coverage(torch.zeros(1, 1), real, k=2) == pytest.approx(0.3 - 0.1)
    assert coverage(torch.tensor([[2.0]]), real, k=2) == pytest.approx(0.4)
    with pytest.raises(InputError, match="more than 5"):
        coverage(points, points[:5])


def test_all_measures_of_a_set(float32):
    torch.manual_seed(0)
    teacher = classifier(8).eval()
    images = torch.rand(60, 1, 8, 8)
    raw = images.mul(255).round().to(torch.uint8)
    real = ImageSet(raw, torch.arange(60) % 5, classes="abcde", name="noise", split="test")
    found = measure(teacher, images, real, float32)
    assert set(found) == {
        "mean pairwise distance", "mean pairwise distance within class", "instance discrimination", "Vendi score",
        "classifier-FID", "label entropy", "coverage",
    }  # fmt: skip
    assert found == measure(teacher, images, real, float32)
    same = measure(teacher, raw, real, float32)
    assert same["classifier-FID"] == pytest.approx(0, abs=1e-7) and same["coverage"] == 1
    one = measure(teacher, images[:1].expand(60, -1, -1, -1), real, float32)
    assert one["mean pairwise distance"] == pytest.approx(0, abs=1e-6)
    assert one["Vendi score"] == pytest.approx(1, abs=1e-4) and one["label entropy"] == 0
    assert one["classifier-FID"] > same["classifier-FID"] and one["coverage"] < 1
    assert describe(teacher, raw, float32)[0].shape == (60, 32)


def test_training_images_and_single_images_are_refused(float32):
    images = torch.zeros(20, 1, 8, 8, dtype=torch.uint8)
    train = ImageSet(images, name="noise", split="train")
    with pytest.raises(InputError, match="test split"):
        measure(classifier(), images, train, float32)
    with pytest.raises(InputError, match="at least 2"):
        measure(classifier(), images[:1], train, float32)
