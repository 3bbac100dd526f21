"""What all rows of the text chapter share: sentences as embeddings, and a student that learns the teacher's answers.

A subclass says where sentences come from. The student and its self-supervised head, their losses, the schedule and the
accounting are here, so that no source of sentences gets a better student than another.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.sentences import Vocabulary
from ..errors import InputError
from ..losses import kl
from ..models.text import layers_of, most_positions, word_table
from ..runtime import Runtime
from ..training.budget import Budget
from ..training.finetuning import CLIP, decayed, key_mask, seed_dropout
from ..training.players import Resumable, check_positive, freeze, update
from ..training.schedules import cosine, set_lr


@dataclass(frozen=True)
class Distillation:
    """How the student learns, the same for all sources of sentences.

    Attributes:
        length, min_length: a sentence has U{min_length, ..., length} positions, [CLS] and [SEP] included.
        frame: whether sentences begin with [CLS] and end with [SEP].
        batch_size: B, sentences per batch.
        pool: batches whose lengths are drawn together and sorted, so that a batch has sentences of like lengths and
            ends with its longest: the same lengths in all, and less padding to compute. 1 pads all batches to `length`.
        lambda_ss: weight of the self-supervised loss.
        lambda_pt: weight of Patient-KD's loss on the [CLS] states.
        mask_rate: p, share of the positions that the self-supervised head has to predict.
        temperature: tau of the distillation loss.
        replay: R, further updates per step, each on one of the last `memory` batches.
        memory: batches that are kept for replay.
        lr, weight_decay: AdamW of the student and the head, on a cosine to 0.
        n_updates: student updates of the whole run.
    """

    length: int = 128
    min_length: int = 16
    frame: bool = True
    batch_size: int = 64
    pool: int = 1
    lambda_ss: float = 1.0
    lambda_pt: float = 0.0
    mask_rate: float = 0.15
    temperature: float = 1.0
    replay: int = 0
    memory: int = 20
    lr: float = 3e-4
    weight_decay: float = 0.01
    n_updates: int = 1000

    def __post_init__(self) -> None:
        check_positive(self, "batch_size", "pool", "temperature", "lr", "n_updates", "memory")
        if not 3 <= self.min_length <= self.length:
            raise InputError(f"min_length must be in 3..length ({self.length}), not {self.min_length}")
        if not 0 < self.mask_rate < 1:
            raise InputError(f"mask_rate must be between 0 and 1, not {self.mask_rate}")


@dataclass(frozen=True)
class Sentences:
    """Pseudo or real sentences as word-level embeddings.

    Attributes:
        e: [B, L, H], before positions, token types and LayerNorm.
        mask: int64 [B, L], 1 at real positions; None where all are.
        free: bool [B, L], real positions that are neither [CLS] nor [SEP].
    """

    e: Tensor
    mask: Tensor | None
    free: Tensor

    def with_rows(self, e: Tensor) -> Sentences:
        """The same sentences with other embeddings at the free positions; the constants stay bit for bit."""
        return Sentences(torch.where(self.free[..., None], e, self.e), self.mask, self.free)


def look(network: Any, sentences: Sentences) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Logits [B, K] and the states [B, L, H]: the embedding module's output, then each layer's.

    `inputs_embeds` stands in for the look-up in the word table alone, so positions and LayerNorm come after it. The
    mask must be given: padding cannot be told from embeddings.
    """
    mask = key_mask(sentences.mask, sentences.e.dtype)
    out = network(inputs_embeds=sentences.e, attention_mask=mask, output_hidden_states=True)
    return out.logits.float() if out.logits.dtype != torch.float64 else out.logits, out.hidden_states


def hidden_positions(free: Tensor, rate: float, generator: torch.Generator) -> Tensor:
    """M: each free position with probability `rate`, and at least one per sentence. bool [B, L]."""
    draw = torch.rand(free.shape, generator=generator, device=free.device).masked_fill(~free, 2.0)
    return (draw < rate) | (free & (draw == draw.min(1, keepdim=True).values))


def self_supervised_loss(predicted: Tensor, e: Tensor, hidden: Tensor) -> Tensor:
    """L_ss = 1/|M| sum over M of 1 - cos(A(h), e): how far the head is from the hidden embeddings.

    Args:
        predicted: A(h) [B, L, H].
        e: [B, L, H].
        hidden: M, bool [B, L].

    Returns:
        Scalar in [0, 2].
    """
    distance = 1 - F.cosine_similarity(predicted, e, dim=-1)
    return (distance * hidden).sum() / hidden.sum()


def patient_loss(student: tuple[Tensor, ...], teacher: tuple[Tensor, ...], kept: list[int]) -> Tensor:
    """L_PT: squared distance of the [CLS] states at unit length, summed over layers, mean over the batch.

    Args:
        student, teacher: states as :func:`look` gives them.
        kept: the teacher layer that each student layer stands for.
    """
    pairs = zip(student[1:], (teacher[1 + i] for i in kept), strict=True)
    distances = [F.normalize(s[:, 0], dim=-1) - F.normalize(t[:, 0], dim=-1) for s, t in pairs]
    return torch.stack([d.square().sum(-1).mean() for d in distances]).sum()


class TextDistiller(Resumable, ABC):
    """A source of sentences and a student that learns the teacher's answers to them.

    Args:
        teacher: a classifier of the BERT family; frozen here, and nothing of it ever changes.
        student: as :func:`dfkd_lib.models.text.cut` makes it, with the teacher's word table.
        vocabulary: the teacher's.

    Attributes:
        head: A, the self-supervised head.
        steps: batches made.
        budget: what has been spent.

    Raises:
        InputError: teacher and student do not share width and vocabulary, or the positions do not suffice.
    """

    data_free: ClassVar[bool] = True
    PARTS: tuple[str, ...] = (
        "student", "head", "optimizer", "scaler", "randomness", "masks", "choices", "kept", "steps", "budget",
    )  # fmt: skip

    def __init__(
        self, teacher: Any, student: Any, vocabulary: Vocabulary, settings: Distillation, runtime: Runtime
    ) -> None:
        self.settings, self.runtime, self.vocabulary = settings, runtime, vocabulary
        self.teacher = freeze(runtime.prepare(teacher))
        self.student = runtime.prepare(student).train()
        self.table = word_table(self.teacher)
        if word_table(self.student).shape != self.table.shape:
            raise InputError("the student must have the teacher's word table: cut it from the teacher")
        if len(vocabulary.words) > len(self.table):
            raise InputError(f"the vocabulary has {len(vocabulary.words)} words, the teacher only {len(self.table)}")
        for who, network in (("teacher", self.teacher), ("student", self.student)):
            if settings.length > (most := most_positions(network)):
                raise InputError(f"length must be at most {most}, the {who}'s positions, not {settings.length}")
        self.n_classes = int(self.teacher.config.num_labels)
        self.ordinary = vocabulary.ordinary.to(runtime.device)
        rows = self.table[self.ordinary]
        self.mean, self.sigma, self.norms = rows.mean(0), rows.std(0), rows.norm(dim=1)
        self.scale = float(self.sigma.mean())
        self.head = self._head(int(self.student.config.hidden_size), self.table.shape[1])
        self.learners = (self.student, self.head)
        self.optimizer = torch.optim.AdamW(decayed(self.learners, settings.weight_decay), settings.lr)
        self.scaler = runtime.scaler()
        # Three streams: a run without the adversary draws the same starts, targets and masks as one with it.
        self.randomness = runtime.stream("as-dfd sentences")
        self.masks = runtime.stream("as-dfd masks")
        self.choices = torch.Generator().manual_seed(runtime.seed)  # on the CPU: its draws are read in step()
        self.kept: list[dict[str, Tensor]] = []
        self.steps = 0
        self.budget = Budget()

    def _head(self, width: int, embedding: int) -> nn.Module:
        """A, from states to embeddings, which are narrower in ELECTRA."""
        torch.manual_seed(self.runtime.seed)
        return self.runtime.prepare(
            nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, embedding))
        ).train()

    @abstractmethod
    def construct(self) -> tuple[Sentences, dict[str, Tensor]]:
        """One batch of sentences, without gradient, and what there is to say about making it."""

    def step(self) -> dict[str, Tensor]:
        """Make a batch, look at it with the teacher, and let the student learn from it and from earlier ones.

        Returns:
            "distillation": KL of the update on the new batch; "self-supervised" where it is trained; what
            :meth:`construct` reports. Detached scalars on the device.
        """
        settings = self.settings
        with self.budget.synthesis(self.runtime.device):
            made, metrics = self.construct()
        self.budget.images += len(made.e)
        with self.budget.distillation(self.runtime.device):
            batch = self.ask(made)
            metrics |= self.learn(made, batch)
            if settings.replay:
                tensors = {name: part for name, part in vars(made).items() if part is not None}
                self.kept = [*self.kept, tensors | batch][-settings.memory :]
                chosen = torch.randint(len(self.kept), (settings.replay,), generator=self.choices, device="cpu")
                for at in chosen.tolist():
                    old = self.kept[at]
                    self.learn(Sentences(old["e"], old.get("mask"), old["free"]), old)
        self.steps += 1
        return metrics

    def ask(self, sentences: Sentences) -> dict[str, Tensor]:
        """The teacher's answer, without gradient: "logits" [B, K], and its "states" where the student imitates them."""
        self.budget.teacher_passes += len(sentences.e)
        with torch.no_grad(), self.runtime.autocast():
            logits, states = look(self.teacher, sentences)
        return {"logits": logits} | ({"states": torch.stack(states)} if self.settings.lambda_pt else {})

    def learn(self, sentences: Sentences, answer: dict[str, Tensor]) -> dict[str, Tensor]:
        """One update of student and head: L_S = L_KD + lambda_ss L_ss + lambda_pt L_PT."""
        settings = self.settings
        done = min(self.budget.student_updates, settings.n_updates)
        set_lr(self.optimizer, settings.lr * cosine(done, settings.n_updates))
        seed_dropout(self.runtime.seed, self.budget.student_updates)
        with self.runtime.autocast():
            logits, states = look(self.student, sentences)
            loss = distillation = kl(logits, answer["logits"], settings.temperature)
            metrics = {"distillation": distillation.detach()}
            if settings.lambda_ss:
                understood = self.understanding(sentences)
                metrics["self-supervised"] = understood.detach()
                loss = loss + settings.lambda_ss * understood
            if settings.lambda_pt:
                kept = getattr(self.student.config, "kept_layers", list(range(len(layers_of(self.student)))))
                loss = loss + settings.lambda_pt * patient_loss(states, tuple(answer["states"]), kept)
        update(self.optimizer, loss, self.scaler, clip=CLIP)
        self.budget.student_updates += 1
        return metrics

    def understanding(self, sentences: Sentences, *, moving_target: bool = False) -> Tensor:
        """L_ss of student and head on sentences, at freshly hidden positions.

        Args:
            moving_target: let the gradient reach the embeddings that are to be predicted, too.
        """
        hidden = hidden_positions(sentences.free, self.settings.mask_rate, self.masks)
        # A row of the table taken as a constant: through it weight decay would reach the frozen table.
        covered = torch.where(hidden[..., None], self.table[self.vocabulary.mask], sentences.e)
        _, states = look(self.student, Sentences(covered, sentences.mask, sentences.free))
        target = sentences.e if moving_target else sentences.e.detach()
        return self_supervised_loss(self.head(states[-1]).to(target.dtype), target, hidden)

    def frame(self, lengths: Tensor, longest: int = 0) -> Sentences:
        """Sentences of the given lengths whose free rows are zero: [CLS] first, [SEP] last, [PAD] behind.

        Args:
            longest: positions of the batch; 0 is the settings' `length`.
        """
        table, vocabulary, n = self.table, self.vocabulary, len(lengths)
        position = torch.arange(longest or self.settings.length, device=lengths.device).expand(n, -1)
        real = position < lengths[:, None]
        e = torch.where(real[..., None], torch.zeros_like(table[0]), table[vocabulary.pad])
        free = real
        if self.settings.frame:
            first, last = position == 0, position == lengths[:, None] - 1
            e = torch.where(first[..., None], table[vocabulary.cls], e)
            e = torch.where(last[..., None], table[vocabulary.sep], e)
            free = real & ~first & ~last
        padded = self.settings.min_length < self.settings.length
        return Sentences(e, real.long() if padded else None, free)

    def sample_frame(self) -> Sentences:
        """A batch of :meth:`frame` with lengths drawn from U{min_length, ..., length}, alike where a `pool` is."""
        settings, span = self.settings, (self.settings.min_length, self.settings.length + 1)
        if settings.pool > 1:
            # Drawn anew for each batch, on the CPU: nothing to save, and the longest is known without waiting.
            on_cpu = replace(self.runtime, device=torch.device("cpu"))
            draw = on_cpu.stream(f"as-dfd lengths {self.steps // settings.pool}")
            drawn = torch.randint(*span, (settings.pool * settings.batch_size,), generator=draw).sort().values
            chosen = int(torch.randperm(settings.pool, generator=draw)[self.steps % settings.pool])
            lengths = drawn.view(settings.pool, -1)[chosen]
            return self.frame(lengths.to(self.runtime.device), int(lengths[-1]))
        lengths = torch.randint(*span, (settings.batch_size,), generator=self.randomness, device=self.runtime.device)
        return self.frame(lengths)

    def sample_tokens(self, shape: torch.Size) -> Tensor:
        """Ordinary token ids of this shape, drawn evenly."""
        at = torch.randint(len(self.ordinary), shape, generator=self.randomness, device=self.runtime.device)
        return self.ordinary[at]

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See :class:`dfkd_lib.training.fit.Method`."""
        super().load_state_dict(state)
        self.kept = [{name: part.to(self.runtime.device) for name, part in batch.items()} for batch in self.kept]
