"""Crops and flips keep image and mask together; every image is visited once per epoch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dfkd_lib.data import crop_flip, minibatches, paired_crop_flip, resized_crop_flip
from dfkd_lib.errors import InputError


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def numbered(b, c, h, w):
    """Images whose pixels all differ, none of them zero."""
    return torch.arange(1, b * c * h * w + 1, dtype=torch.float32).view(b, c, h, w)


def test_a_crop_is_a_shift_with_zeros_or_its_mirror_image():
    b, pad = 64, 2
    x = numbered(b, 2, 6, 5)
    out = crop_flip(x, pad=pad, generator=seeded())
    padded = torch.nn.functional.pad(x, (pad,) * 4)
    seen = set()
    for i in range(b):
        candidates = {
            (top, left, flipped): window.flip(2) if flipped else window
            for top in range(2 * pad + 1)
            for left in range(2 * pad + 1)
            for window in [padded[i, :, top : top + 6, left : left + 5]]
            for flipped in (False, True)
        }
        matches = [key for key, window in candidates.items() if torch.equal(window, out[i])]
        assert len(matches) == 1
        seen.update(matches)
    assert {top for top, _, _ in seen} == {left for _, left, _ in seen} == set(range(2 * pad + 1))
    assert {flipped for _, _, flipped in seen} == {False, True}


def test_without_room_and_mirror_nothing_changes():
    x = numbered(3, 1, 4, 4)
    assert torch.equal(crop_flip(x, pad=0, flip=False, generator=seeded()), x)


def test_bytes_and_floats_are_treated_alike():
    x = torch.randint(0, 256, (8, 3, 9, 9), dtype=torch.uint8, generator=seeded())
    cropped = crop_flip(x, generator=seeded(1))
    assert cropped.dtype == torch.uint8
    assert torch.equal(cropped.float(), crop_flip(x.float(), generator=seeded(1)))
    assert not torch.equal(cropped, crop_flip(x, generator=seeded(2)))


@pytest.mark.parametrize("flip", [False, True])
def test_an_image_and_its_mask_stay_together(flip):
    x = numbered(32, 1, 7, 10)
    y = x[:, 0].to(torch.int64)
    cropped, masks = paired_crop_flip(x.repeat(1, 3, 1, 1), y, size=5, flip=flip, generator=seeded())
    assert cropped.shape == (32, 3, 5, 5) and masks.dtype == torch.int64
    assert torch.equal(cropped[:, 0].long(), masks) and torch.equal(cropped[:, 2].long(), masks)
    right = masks[:, :, 1:] - masks[:, :, :-1]
    down = masks[:, 1:] - masks[:, :-1]
    assert (down == 10).all() and set(right.unique().tolist()) == ({-1, 1} if flip else {1})
    assert torch.equal((masks[:, 0, 0] - 1) // 70, torch.arange(32))
    assert len({int(m) for m in masks[:, 2, 2] % 70}) > 8


def test_a_crop_of_full_size_is_the_image_and_a_larger_one_is_refused():
    x, y = numbered(2, 1, 4, 4), torch.zeros(2, 4, 4)
    assert torch.equal(paired_crop_flip(x, y, size=4, flip=False, generator=seeded())[0], x)
    with pytest.raises(InputError, match="at most 4"):
        paired_crop_flip(x, y, size=5, generator=seeded())


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 40), batch_size=st.integers(1, 60), seed=st.integers(-9, 9), epochs=st.integers(1, 4))
def test_every_index_comes_once_per_epoch(n, batch_size, seed, epochs):
    batch = minibatches(n, batch_size, seed=seed)
    steps = -(-n * epochs // batch_size)
    drawn = [batch(step) for step in range(steps)]
    assert all(indices.shape == (batch_size,) and indices.dtype == torch.int64 for indices in drawn)
    visits = torch.cat(drawn)[: n * epochs].view(epochs, n)
    assert torch.equal(visits.sort(1).values, torch.arange(n).expand(epochs, n))
    resumed = minibatches(n, batch_size, seed=seed)
    assert torch.equal(resumed(steps - 1), drawn[-1]) and torch.equal(batch(0), drawn[0])


def test_epochs_and_seeds_have_their_own_order():
    batch = minibatches(50, 50, seed=0)
    orders = [batch(0), batch(1), minibatches(50, 50, seed=1)(0)]
    assert len({tuple(order.tolist()) for order in orders}) == 3


def test_the_order_is_the_same_on_every_machine():
    assert minibatches(10, 10, seed=0)(0).tolist() == [6, 9, 8, 7, 3, 5, 0, 1, 4, 2]


@pytest.mark.parametrize(("n", "batch_size"), [(0, 4), (4, 0)])
def test_batches_without_images_are_refused(n, batch_size):
    with pytest.raises(InputError, match="at least 1"):
        minibatches(n, batch_size, seed=0)


def sliced(x, pad, flip, generator):
    """`crop_flip` image by image, with plain slices; the same draws in the same order."""
    b, _, h, w = x.shape
    at = torch.randint(0, 2 * pad + 1, (2, b, 1), generator=generator)
    coins = torch.rand(b, 1, 1, 1, generator=generator) < 0.5 if flip else torch.zeros(b, dtype=torch.bool)
    padded = torch.nn.functional.pad(x, (pad,) * 4)
    out = []
    for i in range(b):
        top, left = int(at[0, i]), int(at[1, i])
        window = padded[i, :, top : top + h, left : left + w]
        out.append(window.flip(2) if coins[i] else window)
    return torch.stack(out)


@pytest.mark.parametrize(("pad", "flip"), [(0, True), (2, False), (3, True)])
def test_a_crop_and_its_gradient_equal_those_of_plain_slices(pad, flip):
    weights = torch.randn(16, 2, 7, 5, generator=seeded(5), dtype=torch.float64)
    images = torch.rand(16, 2, 7, 5, generator=seeded(6), dtype=torch.float64)
    results = []
    for cut in (
        lambda x: crop_flip(x, pad=pad, flip=flip, generator=seeded()),
        lambda x: sliced(x, pad, flip, seeded()),
    ):
        x = images.clone().requires_grad_()
        out = cut(x)
        (out * weights).sum().backward()
        results.append((out.detach(), x.grad))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    assert results[0][1].abs().sum() > 0


def test_the_gradient_of_a_crop_checks():
    x = torch.rand(2, 1, 4, 3, generator=seeded(), dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: crop_flip(x, pad=1, generator=seeded(1)), x)


@pytest.mark.parametrize("flip", [False, True])
def test_the_gradient_of_a_zoom_checks(flip):
    x = torch.rand(2, 2, 5, 4, generator=seeded(), dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: resized_crop_flip(x, flip=flip, generator=seeded(2)), x)


@pytest.mark.parametrize("shape", [(3, 2, 8, 8), (2, 1, 6, 9)])
def test_a_zoom_into_the_whole_is_the_image_or_its_mirror(shape):
    x = torch.rand(shape, generator=seeded(), dtype=torch.float64)
    whole = resized_crop_flip(x, scale=(1, 1), flip=False, generator=seeded())
    assert torch.allclose(whole, x, atol=1e-12)
    many = x[:1].expand(40, *shape[1:])
    seen = resized_crop_flip(many, scale=(1, 1), generator=seeded())
    kinds = [torch.allclose(seen[i], x[0], atol=1e-12) for i in range(40)]
    mirrored = [torch.allclose(seen[i], x[0].flip(2), atol=1e-12) for i in range(40)]
    assert all(a != b for a, b in zip(kinds, mirrored, strict=True)) and 8 < sum(kinds) < 32


def test_a_zoom_shows_a_square_of_the_asked_size_inside_the_image():
    """On a ramp, the range that is seen is the side of the square."""
    ramp = torch.linspace(0, 1, 64, dtype=torch.float64).expand(200, 1, 64, 64)
    seen = resized_crop_flip(ramp, scale=(0.25, 1.0), flip=False, generator=seeded())
    side = (seen[:, 0, :, -1] - seen[:, 0, :, 0])[:, 0]
    assert side.min() > 0.48 and side.max() <= 1 and (side.square() < 0.5).any() and (side.square() > 0.8).any()
    assert seen.min() >= 0 and seen.max() <= 1
    assert (seen.diff(dim=3) >= 0).all(), "and nothing is mirrored"
    assert torch.equal(seen, resized_crop_flip(ramp, flip=False, generator=seeded()))
