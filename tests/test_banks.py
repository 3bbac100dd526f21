"""A bank is a ring: it keeps the newest rows, copies nothing else, and rounds an image once."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dfkd_lib.banks import Bank, ImageBank
from dfkd_lib.errors import InputError
from dfkd_lib.training import checkpoints

CPU = torch.device("cpu")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def numbers(start: int, n: int) -> torch.Tensor:
    return torch.arange(start, start + n, dtype=torch.float32)[:, None]


def bank(size: int = 5) -> Bank:
    return Bank(size, (1,), torch.float32, CPU)


def filled(size: int, appended: int) -> Bank:
    made = bank(size)
    made.append(numbers(0, appended))
    return made


def test_an_empty_bank_has_no_rows_and_gives_none():
    empty = bank()
    assert len(empty) == 0
    assert empty.newest(3).shape == (0, 1) and empty.sample(3, seeded()).shape == (0, 1)
    with pytest.raises(InputError, match="the bank is empty; synthesise images"):
        empty.draw(1, seeded())
    with pytest.raises(InputError, match="room for at least 1 row, not 0"):
        bank(0)


@settings(max_examples=200, deadline=None)
@given(size=st.integers(1, 7), batches=st.lists(st.integers(0, 16), max_size=6))
def test_after_any_appends_the_newest_rows_are_those_of_a_list(size, batches):
    """Partly filled, exactly full, wrapped, and batches larger than the bank."""
    ring, everything = bank(size), []
    for n in batches:
        start = len(everything)
        ring.append(numbers(start, n))
        everything += range(start, start + n)
        kept = everything[-size:]
        assert ring.appended == len(everything) and len(ring) == len(kept)
        assert ring.newest(size).flatten().tolist() == kept
        assert ring.newest(size + 9).flatten().tolist() == kept
        assert ring.newest(2).flatten().tolist() == kept[-2:]
        assert sorted(ring.rows[: len(ring)].flatten().tolist()) == kept


def test_appending_writes_in_place_and_touches_only_the_new_rows():
    ring = filled(8, 8)
    place, rest = ring.rows.data_ptr(), ring.rows[3:].clone()
    ring.append(numbers(100, 3))
    assert ring.rows.data_ptr() == place
    assert torch.equal(ring.rows[3:], rest) and ring.rows[:3].flatten().tolist() == [100, 101, 102]
    ring.append(numbers(200, 50))
    assert ring.rows.data_ptr() == place and ring.rows.shape == (8, 1)


def test_what_comes_out_does_not_change_with_what_comes_in_later():
    ring = filled(4, 4)
    taken, drawn = ring.newest(4), ring.draw(4, seeded())
    before = taken.clone(), drawn.clone()
    ring.append(numbers(50, 4))
    assert torch.equal(taken, before[0]) and torch.equal(drawn, before[1])


def test_rows_are_stored_without_their_graph_and_in_the_banks_type():
    ring = Bank(4, (2,), torch.bfloat16, CPU)
    x = torch.rand(3, 2, requires_grad=True)
    ring.append(x)
    assert ring.rows.dtype == torch.bfloat16 and not ring.rows.requires_grad


@pytest.mark.parametrize("appended", [3, 5, 8])
def test_a_sample_holds_different_stored_rows(appended):
    """Not full, exactly full and wrapped."""
    ring = filled(5, appended)
    stored = set(ring.newest(5).flatten().tolist())
    whole = ring.sample(5, seeded()).flatten().tolist()
    assert sorted(whole) == sorted(stored), "all of them, once each"
    assert set(ring.sample(99, seeded()).flatten().tolist()) == stored
    firsts = {tuple(ring.sample(2, seeded(seed)).flatten().tolist()) for seed in range(200)}
    assert {a for a, _ in firsts} == stored and all(a != b for a, b in firsts)


@pytest.mark.parametrize("appended", [3, 5, 8])
def test_draws_are_even_over_the_stored_rows(appended):
    ring = filled(5, appended)
    drawn = ring.draw(6000, seeded()).flatten()
    values, counts = drawn.unique(return_counts=True)
    assert values.tolist() == sorted(ring.newest(5).flatten().tolist())
    assert (counts / 6000 - 1 / len(ring)).abs().max() < 0.03


def test_the_same_random_state_gives_the_same_rows():
    ring = filled(50, 50)
    assert torch.equal(ring.draw(9, seeded(1)), ring.draw(9, seeded(1)))
    assert not torch.equal(ring.draw(9, seeded(1)), ring.draw(9, seeded(2)))


@pytest.mark.parametrize("appended", [0, 3, 5, 13])
def test_a_restored_bank_goes_on_like_the_old_one(tmp_path, appended):
    old = filled(5, appended)
    checkpoints.save(tmp_path / "bank", old.state_dict())
    new = filled(5, 2)
    new.load_state_dict(checkpoints.load(tmp_path / "bank"))
    for ring in (old, new):
        ring.append(numbers(70, 4))
    assert new.appended == old.appended == appended + 4
    assert torch.equal(new.newest(5), old.newest(5))
    assert torch.equal(new.sample(3, seeded()), old.sample(3, seeded()))
    assert torch.equal(new.draw(3, seeded()), old.draw(3, seeded()))


def test_a_restored_bank_samples_alike_whatever_it_held_before():
    old, new = filled(50, 3), filled(50, 40)
    new.load_state_dict(old.state_dict())
    one, other = seeded(), seeded()
    for _ in range(2):
        assert torch.equal(new.sample(2, one), old.sample(2, other))
    assert torch.equal(new.newest(50), old.newest(50))


def test_an_unfilled_bank_stores_only_its_rows():
    assert filled(5, 2).state_dict()["rows"].shape == (2, 1)


def test_images_are_rounded_once_to_a_255th():
    ring = ImageBank(400, (3, 4, 4), CPU)
    x = torch.rand(400, 3, 4, 4, generator=seeded(), dtype=torch.float64)
    ring.append(x)
    stored = ring.newest(400)
    assert stored.dtype == torch.uint8
    assert (stored.double() / 255 - x).abs().max() <= 0.5 / 255 + 1e-6
    out = ring.images(30, seeded())
    assert out.dtype == torch.float32 and out.min() >= 0 and out.max() <= 1
    again = ImageBank(400, (3, 4, 4), CPU)
    again.append(stored.float() / 255)
    assert torch.equal(again.newest(400), stored), "a second trip changes nothing"
    again.append(stored)
    assert torch.equal(again.newest(400), stored), "bytes are taken as they are"


def test_images_outside_the_range_are_clamped():
    ring = ImageBank(3, (1, 1, 1), CPU)
    ring.append(torch.tensor([-0.3, 1.0, 1.7]).view(3, 1, 1, 1))
    assert ring.newest(3).flatten().tolist() == [0, 255, 255]
