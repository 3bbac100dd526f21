"""Training a text classifier on labelled sentences: the teacher, or a student as a reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..data import minibatches
from ..data.sentences import SentenceSet
from ..losses import cross_entropy
from ..runtime import Runtime
from .players import Resumable, check_positive, update
from .schedules import one_cycle

CLIP = 1.0  # Euclidean norm to which longer gradients are shortened, as is usual for these networks


def decayed(modules: Sequence[nn.Module], weight_decay: float) -> list[dict[str, Any]]:
    """AdamW's parameter groups of what can be trained: weight decay on matrices, none on biases and norms."""
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


@dataclass(frozen=True)
class Recipe:
    """How a text classifier is trained on labels.

    Attributes:
        layers, width, heads: of a network built here; a pretrained encoder has its own.
        epochs: passes over the data.
        batch_size: sentences per step.
        lr, weight_decay: AdamW, 10 % linear warm-up, then linearly to 0, gradient norm at most 1.
        lr_head: of the classifier alone; 0 is `lr`.
        hidden: share of the tokens that are replaced by [MASK].
        dropout: of a network built here.
    """

    layers: int
    width: int
    heads: int
    epochs: int
    batch_size: int = 32
    lr: float = 5e-4
    weight_decay: float = 0.01
    lr_head: float = 0.0
    hidden: float = 0.15
    dropout: float = 0.1

    def __post_init__(self) -> None:
        check_positive(self, "layers", "width", "heads", "epochs", "batch_size", "lr")


class FineTuning(Resumable):
    """Training on labelled sentences, one update per :meth:`step`: the teacher, or a student as a reference.

    Attributes:
        n_steps: updates in the whole recipe.
    """

    data_free: ClassVar[bool] = False
    PARTS: tuple[str, ...] = ("student", "optimizer", "scaler", "randomness", "steps")

    def __init__(
        self, student: Any, sentences: SentenceSet, recipe: Recipe, runtime: Runtime, n_steps: int = 0
    ) -> None:
        self.recipe, self.runtime, self.sentences = recipe, runtime, sentences.to(runtime.device)
        self.student = runtime.prepare(student).train()
        head = [p for name, p in student.named_parameters() if name.startswith("classifier")]
        groups = decayed([student], recipe.weight_decay)
        if recipe.lr_head:
            groups = [{**g, "params": [p for p in g["params"] if all(p is not h for h in head)]} for g in groups]
            groups.append({"params": head, "weight_decay": 0.0, "scale": recipe.lr_head / recipe.lr})
        self.optimizer = torch.optim.AdamW(groups, recipe.lr)
        self.scaler = runtime.scaler()
        self.batches = minibatches(len(sentences), recipe.batch_size, seed=runtime.seed, device=runtime.device)
        self.n_steps = n_steps or recipe.epochs * max(1, len(sentences) // recipe.batch_size)
        self.randomness = runtime.stream("fine-tuning")
        self.steps = 0

    def step(self) -> dict[str, Tensor]:
        """One update on the next batch; returns {"loss": ...}, detached."""
        lr = self.recipe.lr * one_cycle(self.steps, self.n_steps, warmup=0.1)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("scale", 1.0)
        seed_dropout(self.runtime.seed, self.steps)
        ids, mask, y = self.sentences.batch(self.batches(self.steps))
        ids = self.hide(ids, mask)
        with self.runtime.autocast():
            attended = key_mask(mask if self.sentences.padded else None, self.runtime.dtype)
            logits = self.student(input_ids=ids, attention_mask=attended).logits.to(self.runtime.dtype)
        loss = cross_entropy(logits, y)
        update(self.optimizer, loss, self.scaler, clip=CLIP)
        self.steps += 1
        return {"loss": loss.detach()}

    def hide(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Replace a share of the tokens, the first one excepted, by [MASK]."""
        draw = torch.rand(ids.shape, generator=self.randomness, device=ids.device)
        hidden = (draw < self.recipe.hidden) & mask.bool()
        hidden[:, 0] = False
        return torch.where(hidden, self.sentences.vocabulary.mask, ids)


def seed_dropout(seed: int, step: int) -> None:
    """Dropout can only draw from torch's global stream: fix it per step, so that no earlier run matters."""
    torch.manual_seed(1_000_003 * seed + step)


def key_mask(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """An attention mask [B, L], 1 at real positions, as what attention adds: [B, 1, 1, L], 0 there, -inf at padding.

    In four dimensions transformers takes it as it is; in two it reads the mask back from the device in every pass,
    to see whether anything is padded. None, where nothing is, stays None.
    """
    if mask is None:
        return None
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(mask == 0, -torch.inf)[:, None, None]
