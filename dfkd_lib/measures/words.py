"""What embeddings say in words, class by class, and what real texts of the classes say."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.sentences import SentenceSet, Vocabulary
from ..errors import InputError


def nearest_words(
    e: Tensor, free: Tensor, targets: Tensor, table: Tensor, words: Tensor, n_classes: int, top: int = 10
) -> Tensor:
    """For each class the words towards which its embeddings lean, strongest first.

    One row is near to a word by accident; hundreds are not. A word's score in a class is its mean cosine with the rows
    of the class, less the mean of this over the classes.

    Args:
        e: crafted embeddings [B, L, H].
        free: bool [B, L], the rows that were crafted.
        targets: classes int64 [B].
        table: W [V, H].
        words: ids of the words to choose from, see :func:`whole_words`.

    Returns:
        Token ids int64 [n_classes, top].

    Raises:
        InputError: a class has no sentence, or there are fewer words than `top`.
    """
    if len(targets.unique()) < n_classes or len(words) < top:
        raise InputError(f"{n_classes} classes need a crafted sentence each, and {top} words to choose from")
    rows = F.normalize(e, dim=-1)
    mean = torch.stack([rows[targets == c][free[targets == c]].mean(0) for c in range(n_classes)])
    score = (mean - mean.mean(0)) @ F.normalize(table[words], dim=-1).T
    return words[score.topk(top, dim=1).indices]


def top_words(sentences: SentenceSet, words: Tensor, top: int = 10) -> Tensor:
    """For each class the words that tell its texts from the others, strongest first.

    A word's score is the z-value of its log-odds against the other classes, with half an occurrence added on each side.

    Args:
        sentences: real ones, with labels.
        words: ids of the words to choose from.

    Returns:
        Token ids int64 [n_classes, top].
    """
    counts = torch.zeros(sentences.n_classes, len(sentences.vocabulary.words), dtype=torch.float64)
    for ids, _, y in sentences.batches(1000):
        at = (y[:, None] * counts.shape[1] + ids).flatten().cpu()
        counts.view(-1).add_(torch.bincount(at, minlength=counts.numel()))
    counts = counts[:, words.cpu()]
    inside, outside = counts + 0.5, counts.sum(0) - counts + 0.5
    odds = (inside / inside.sum(1, keepdim=True)).log() - (outside / outside.sum(1, keepdim=True)).log()
    score = odds / (1 / inside + 1 / outside).sqrt()
    return words[score.topk(min(top, len(words)), dim=1).indices.to(words.device)]


def whole_words(vocabulary: Vocabulary, ordinary: Tensor) -> Tensor:
    """Of some ids those of words that one can read: letters alone, three or more, and no continuation ("##ing")."""
    read = [vocabulary.words[i].removeprefix("Ġ") for i in ordinary.tolist()]
    kept = [i for i, word in enumerate(read) if len(word) > 2 and word.isalpha()]
    return ordinary[torch.tensor(kept, dtype=torch.int64, device=ordinary.device)]


def shared(found: Tensor, real: Tensor) -> list[float]:
    """Share of each class's found words that are among its real ones.

    Args:
        found: ids [n_classes, n].
        real: ids [n_classes, m].
    """
    return [float(torch.isin(ours, theirs).float().mean()) for ours, theirs in zip(found, real, strict=True)]


def in_words(ids: Tensor, vocabulary: Vocabulary) -> list[str]:
    """Ids [n_classes, n] as one line of words per class."""
    lines: Sequence[Sequence[int]] = ids.tolist()
    return [" ".join(vocabulary.words[i] for i in line) for line in lines]
