"""What embeddings and texts say, class by class."""

from __future__ import annotations

import pytest
import torch

from dfkd_lib.data.sentences import SentenceSet, Vocabulary
from dfkd_lib.errors import InputError
from dfkd_lib.measures import words

READ = ("war", "vote", "match", "goal", "the", "##ing", "x1", "of")
VOCABULARY = Vocabulary(("[PAD]", "[CLS]", "[SEP]", "[MASK]", *READ), 0, 1, 2, 3)
CANDIDATES = words.whole_words(VOCABULARY, VOCABULARY.ordinary)


def said(ids: torch.Tensor) -> list[str]:
    return words.in_words(ids, VOCABULARY)


def test_only_words_that_one_can_read_are_chosen_from() -> None:
    assert [VOCABULARY.words[i] for i in CANDIDATES] == ["war", "vote", "match", "goal", "the"]


def test_embeddings_lean_towards_the_words_that_they_were_moved_to() -> None:
    torch.manual_seed(0)
    table = torch.randn(len(VOCABULARY.words), 32)
    targets = torch.arange(40) % 2
    e = torch.randn(40, 9, 32) + 0.5 * torch.where(targets[:, None] == 0, table[4] + table[5], table[6])[:, None]
    free = torch.ones(40, 9, dtype=torch.bool)
    e[:, 0], free[:, 0] = 100 * table[8], False  # what is not free does not count
    found = words.nearest_words(e, free, targets, table, CANDIDATES, 2, top=2)
    assert set(said(found)[0].split()) == {"war", "vote"} and said(found)[1].split()[0] == "match"
    assert torch.equal(found, words.nearest_words(3 * e, free, targets, table, CANDIDATES, 2, top=2))
    with pytest.raises(InputError, match="3 classes"):
        words.nearest_words(e, free, targets, table, CANDIDATES, 3, top=2)


def test_the_words_of_a_class_are_those_that_others_lack() -> None:
    ids = torch.tensor([[1, 4, 5, 8, 2], [1, 4, 8, 8, 2], [1, 6, 7, 8, 2], [1, 6, 8, 8, 2]])
    texts = SentenceSet(ids, torch.tensor([0, 0, 1, 1]), VOCABULARY, classes=["World", "Sports"], name="n", split="fit")
    found = words.top_words(texts, CANDIDATES, top=2)
    assert said(found) == ["war vote", "match goal"]
    assert words.shared(found, found) == [1.0, 1.0] and words.shared(found, found.roll(1, 0)) == [0.0, 0.0]
