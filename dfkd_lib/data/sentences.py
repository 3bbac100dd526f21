"""Sentences in one piece: token ids with their labels, on one device, and the vocabulary that the ids belong to."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InputError
from . import guard


@dataclass(frozen=True)
class Vocabulary:
    """The words that a network knows, by token id, and the ids that have a meaning of their own.

    Attributes:
        words: one per id.
        pad, cls, sep, mask: ids of the padding, the first, the last and the hidden position.
        special: further ids that are no ordinary words.
    """

    words: tuple[str, ...]
    pad: int
    cls: int
    sep: int
    mask: int
    special: tuple[int, ...] = ()

    @property
    def ordinary(self) -> Tensor:
        """The ids of ordinary words, int64: neither special nor unused, which BERT writes as `[unused7]`."""
        special = {self.pad, self.cls, self.sep, self.mask, *self.special}
        kept = [i for i, word in enumerate(self.words) if i not in special and not re.fullmatch(r"\[\w+\]", word)]
        return torch.tensor(kept)


class SentenceSet:
    """Sentences as token ids with their labels, on one device, handed out in batches.

    Attributes:
        vocabulary: what the ids mean.
        classes: class names.
        name, split: where the sentences come from; any split but "test" is closed to data-free methods.
        padded: whether any sentence is shorter than the longest can be.
    """

    def __init__(
        self, ids: Tensor, labels: Tensor, vocabulary: Vocabulary, *, classes: Sequence[str], name: str, split: str
    ) -> None:
        """
        Args:
            ids: int64 [N, L], padded at the end with the vocabulary's `pad`.
            labels: int64 [N].

        Raises:
            InputError: types, shapes or ids do not fit.
        """
        if ids.dtype != torch.int64 or ids.ndim != 2 or labels.dtype != torch.int64 or labels.shape != ids.shape[:1]:
            raise InputError(f"{name}: ids must be int64 [N, L] and labels int64 [N]")
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < len(vocabulary.words):
            raise InputError(f"{name}: a token id is outside the vocabulary of {len(vocabulary.words)} words")
        self._ids, self._labels, self.vocabulary = ids, labels, vocabulary
        self.classes, self.name, self.split = tuple(classes), name, split
        self.padded = bool((ids == vocabulary.pad).any())

    def __repr__(self) -> str:
        return f"SentenceSet({self.name} {self.split}: {len(self)} of {self.length} tokens, {self.n_classes} classes)"

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def n_classes(self) -> int:
        return len(self.classes)

    @property
    def length(self) -> int:
        """L, tokens per sentence, padding included."""
        return self._ids.shape[1]

    @property
    def device(self) -> torch.device:
        return self._ids.device

    @property
    def fingerprint(self) -> str:
        """12 hexadecimal digits that stand for the ids, labels and classes, in this order."""
        digest = hashlib.sha256(repr(self.classes).encode())
        for part in (self._ids, self._labels):
            digest.update(repr(tuple(part.shape)).encode() + part.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:12]

    def to(self, device: str | torch.device) -> SentenceSet:
        """The same set on another device."""
        return self._like(self._ids.to(device), self._labels.to(device))

    def take(self, n: int) -> SentenceSet:
        """The first n sentences, or all if there are fewer."""
        return self._like(self._ids[:n], self._labels[:n])

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Sentences at `indices` (int64 [B], on any device).

        Returns:
            ids int64 [B, L]; attention mask int64 [B, L], 1 at real positions; labels int64 [B].

        Raises:
            DataFreeViolation: inside `no_training_data`, unless the split is "test".
        """
        guard.check(self.name, self.split)
        at = indices.to(self.device)
        ids = self._ids.index_select(0, at)
        return ids, (ids != self.vocabulary.pad).long(), self._labels.index_select(0, at)

    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """All sentences in order, as `batch` gives them; the last batch may be smaller."""
        for at in torch.arange(len(self)).split(batch_size):
            yield self.batch(at)

    def _like(self, ids: Tensor, labels: Tensor) -> SentenceSet:
        return SentenceSet(ids, labels, self.vocabulary, classes=self.classes, name=self.name, split=self.split)
