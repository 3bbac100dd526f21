"""Seconds in which AS-DFD crafts a thousand sentences, beside a plain loop: python -m benchmarks.crafting

Teacher of MiniLM's shape (6 layers of 384) with random weights, a student of its first three. The plain loop is
float32, pads every sentence to the longest length and fills the gradients of all weights, as `.backward()` does; the
library pools lengths, computes the gradient of the embeddings alone, and runs in the precision that is asked. Both in
this one process, batch by batch in turn, over one whole pool.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfkd_lib.data.sentences import Vocabulary
from dfkd_lib.methods.as_dfd import ASDFD, Settings
from dfkd_lib.methods.text_distiller import Sentences
from dfkd_lib.models import text
from dfkd_lib.runtime import PRECISIONS, Runtime

SETTINGS = Settings(length=48, min_length=16, batch_size=16, pool=20, craft_steps=10)
VOCABULARY = Vocabulary(("[PAD]", "[CLS]", "[SEP]", "[MASK]", *(f"word{i}" for i in range(5000))), 0, 1, 2, 3)


class PlainCrafting:
    """Plug & Play Embedding Guessing with the adversary, word for word.

    Args:
        head: A, of the student.
        covering: [H], the row of [MASK].
        scale: the word table's mean standard deviation.
        masks: what draws the positions that are hidden from the student.
    """

    def __init__(
        self, teacher: Any, student: Any, head: nn.Module, covering: Tensor, scale: float, settings: Settings,
        masks: torch.Generator,
    ) -> None:  # fmt: skip
        self.teacher, self.student, self.head = teacher.eval(), student.eval(), head
        for network in (teacher, student, head):
            network.requires_grad_(True)
        self.covering, self.scale, self.settings, self.masks = covering, scale, settings, masks

    def craft(self, start: Sentences, targets: Tensor, norms: Tensor) -> Tensor:
        """The embeddings [B, L, H] after all steps."""
        settings, free = self.settings, start.free[..., None]
        e = start.e.clone().requires_grad_()
        optimizer = torch.optim.Adam([e], lr=settings.eta * self.scale)
        for i in range(settings.craft_steps):
            x = torch.where(free, e, start.e)
            logits = self.teacher(inputs_embeds=x, attention_mask=start.mask).logits
            loss = F.cross_entropy(logits, targets, reduction="sum")
            if i >= settings.craft_steps // 2:
                loss = loss - settings.beta * len(x) * self.not_understood(x, start)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                e.copy_(torch.where(free, e * (norms / e.norm(dim=-1))[..., None], e))
        return torch.where(free, e, start.e).detach()

    def not_understood(self, x: Tensor, start: Sentences) -> Tensor:
        """Mean cosine distance of what the head predicts at the hidden positions."""
        draw = torch.rand(start.free.shape, generator=self.masks).masked_fill(~start.free, 2.0)
        hidden = (draw < self.settings.mask_rate) | (start.free & (draw == draw.min(1, keepdim=True).values))
        covered = torch.where(hidden[..., None], self.covering, x)
        states = self.student(inputs_embeds=covered, attention_mask=start.mask, output_hidden_states=True).hidden_states
        return (1 - F.cosine_similarity(self.head(states[-1]), x, dim=-1))[hidden].mean()


def library(settings: Settings, runtime: Runtime) -> ASDFD:
    """AS-DFD between networks of random weights, the same at each call."""
    torch.manual_seed(0)
    teacher = text.bert(VOCABULARY, 4, layers=6, width=384, heads=12, positions=64).eval()
    return ASDFD(teacher, text.cut(teacher, 3), VOCABULARY, settings, runtime)


def plain(made: ASDFD, settings: Settings) -> PlainCrafting:
    """The plain loop with networks of its own, which have the weights of a library's."""
    teacher = text.bert(VOCABULARY, 4, layers=6, width=384, heads=12, positions=64)
    teacher.load_state_dict(made.teacher.state_dict())
    covering = made.table[VOCABULARY.mask].float()
    head = nn.Sequential(nn.Linear(384, 384), nn.GELU(), nn.Linear(384, 384))
    masks = torch.Generator().manual_seed(0)
    return PlainCrafting(teacher, text.cut(teacher, 3), head, covering, made.scale, settings, masks)


def measure(settings: Settings, runtime: Runtime, batches: int) -> tuple[float, float]:
    """Seconds for a thousand sentences: the plain loop's and the library's, over so many batches each."""
    ours = library(settings, runtime)
    theirs = plain(ours, settings)
    unpooled = library(replace(settings, pool=1), replace(runtime, precision="float32"))
    spent = [0.0, 0.0]
    for i in range(-1, batches):  # the first of each is not counted
        ours.steps = max(i, 0)
        start, targets = unpooled.sample_start(), unpooled.sample_targets()
        at = torch.randint(len(unpooled.norms), start.free.shape, generator=unpooled.randomness)
        marks = [time.perf_counter()]
        theirs.craft(start, targets, unpooled.norms[at])
        marks.append(time.perf_counter())
        ours.construct()
        marks.append(time.perf_counter())
        if i >= 0:
            spent = [so_far + after - before for so_far, (before, after) in zip(spent, pairwise(marks), strict=True)]
    scale = 1000 / (batches * settings.batch_size)
    return scale * spent[0], scale * spent[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", default="float32", choices=PRECISIONS, help="of the library")
    parser.add_argument("--batches", type=int, default=SETTINGS.pool)
    parser.add_argument("--craft-steps", type=int, default=SETTINGS.craft_steps)
    args = parser.parse_args()
    runtime = Runtime.choose("cpu", args.precision, seed=0)
    settings = replace(SETTINGS, craft_steps=args.craft_steps)
    slow, fast = measure(settings, runtime, args.batches)
    print(
        f"{runtime.describe()}; {settings.craft_steps} steps, batches of {settings.batch_size}, {args.batches} of each"
    )
    print(f"a thousand sentences: plain {slow:.0f} s, library {fast:.0f} s, ratio {slow / fast:.2f}")


if __name__ == "__main__":
    main()
