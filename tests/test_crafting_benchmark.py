"""The benchmark of crafting compares loops that craft the same embeddings."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from benchmarks import crafting
from dfkd_lib.data.text import digit_vocabulary
from dfkd_lib.methods.as_dfd import ASDFD, Settings
from dfkd_lib.models import text
from dfkd_lib.runtime import Runtime
from dfkd_lib.training.modes import in_eval_mode

SMALL = Settings(length=12, min_length=5, batch_size=6, craft_steps=4)


def test_the_plain_loop_crafts_what_the_library_crafts(float64: Runtime) -> None:
    torch.manual_seed(0)
    vocabulary = digit_vocabulary()
    teacher = text.bert(vocabulary, 5, layers=3, width=16, heads=2, positions=16).eval()
    ours = ASDFD(teacher, text.cut(teacher, 2), vocabulary, SMALL, float64)
    start, targets = ours.sample_start(), ours.sample_targets()
    norms = ours.norms[torch.randint(len(ours.norms), start.free.shape, generator=ours.randomness)]
    masks = torch.Generator().set_state(ours.masks.get_state())
    with in_eval_mode(ours.student):
        made, _ = ours.craft(start, targets, norms)

    twin = text.bert(vocabulary, 5, layers=3, width=16, heads=2, positions=16).double()
    twin.load_state_dict(ours.teacher.state_dict())
    student = text.cut(twin, 2).double()
    head = nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16)).double()
    head.load_state_dict(ours.head.state_dict())
    plain = crafting.PlainCrafting(twin, student, head, ours.table[vocabulary.mask], ours.scale, SMALL, masks)
    crafted = plain.craft(start, targets, norms)
    assert torch.allclose(crafted, made.e, rtol=1e-6, atol=1e-9) and not torch.allclose(crafted, start.e, atol=0.01)


def test_both_are_timed_on_as_many_batches(monkeypatch: pytest.MonkeyPatch, float32: Runtime) -> None:
    counted = {"plain": 0, "library": 0}
    for kind, name, key in ((crafting.PlainCrafting, "craft", "plain"), (ASDFD, "construct", "library")):
        usual = getattr(kind, name)

        def call(*args: object, usual=usual, key=key):  # type: ignore[no-untyped-def]
            counted[key] += 1
            return usual(*args)

        monkeypatch.setattr(kind, name, call)
    tiny = replace(SMALL, pool=3, craft_steps=1, batch_size=2)
    slow, fast = crafting.measure(tiny, float32, 3)
    assert slow > 0 and fast > 0 and counted == {"plain": 4, "library": 4}
