"""Adversarial Self-Supervised Data-Free Distillation for text classification (AS-DFD), arXiv 2010.04883.

A transformer classifier is distilled into one of fewer layers without a sentence. Words are discrete, so what is made
is not text but *embeddings*: e [B, L, H] is drawn at random and moved by gradient steps until the frozen teacher
takes it for a class y (Plug & Play Embedding Guessing), while staying within what an embedding module can put out
(alignment constraints). A self-supervised head on the student, which predicts hidden embeddings from their
surroundings, measures what the student understands; embeddings are made to be hard for it, and the student learns
both to answer as the teacher does and to predict them. The paper's formulas could not be read: everything beyond this
paragraph is a reconstruction, as the chapter says.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data import minibatches
from ..data.text import SentenceSet, Vocabulary
from ..errors import InputError, unknown
from ..losses import kl
from ..models.text import clipped_update, decayed, layers_of, seed_dropout, word_table
from ..runtime import Runtime
from ..training.budget import Budget
from ..training.modes import in_eval_mode
from ..training.players import adam, check_positive, freeze, no_weight_gradients, restore_state, state_of
from ..training.schedules import cosine, set_lr

STARTS = ("gaussian", "tokens")
STEPS = ("adam", "normalised")
SS_LOSSES = ("cosine", "mse")
SS_TARGETS = ("both", "context only")
TARGETS = ("class", "soft")
ZSKT_NOISE, ZSKT_STUDENT_STEPS, ZSKT_LR = 100, 10, 1e-3
ZSKD_TEMPERATURE, ZSKD_SCALES = 20.0, (1.0, 0.1)


@dataclass(frozen=True)
class Settings:
    """The hyper-parameters of one run. The paper's are unknown; the defaults are this project's.

    Attributes:
        length, min_length: a sentence has U{min_length, ..., length} positions, [CLS] and [SEP] included.
        batch_size: B, sentences per batch.
        craft_steps: n_c, steps on the embeddings; 0 leaves the Gaussian start.
        eta: their size, in units of the word table's mean standard deviation.
        beta: weight of the adversarial term, on in the last half of the steps.
        lambda_ss: weight of the self-supervised loss for the student.
        lambda_ln: weight of the penalty on the LayerNorm statistics.
        lambda_pt: weight of Patient-KD's loss on the [CLS] states.
        norm_project: whether each crafted row keeps the norm of an ordinary row of the table.
        frame: whether sentences begin with [CLS] and end with [SEP].
        mask_rate: p, share of the positions that the self-supervised head has to predict.
        ss_loss: "cosine" distance, or "mse" between outputs of the embedding module.
        ss_target: whether the adversary moves targets and context ("both") or the "context only".
        start: "gaussian", or "tokens": rows of the table for random ordinary tokens.
        step: "adam", or "normalised": every sample moves by eta per coordinate.
        noise: standard deviation of Gaussian noise after each step, in the unit of eta.
        targets: one "class" per sentence, or "soft": beliefs drawn evenly from the simplex (ours).
        disagreement: weight of -KL(T || S) in construction, as image methods reward it (ours).
        temperature: tau of the distillation loss.
        updates_per_batch: n_d, student updates on each crafted batch.
        replay: R, further updates per step, each on one of the last `memory` batches.
        memory: batches that are kept for replay.
        lr, weight_decay: AdamW of the student and the head, on a cosine to 0.
        n_updates: student updates of the whole run.
    """

    length: int = 128
    min_length: int = 16
    batch_size: int = 64
    craft_steps: int = 10
    eta: float = 0.5
    beta: float = 1.0
    lambda_ss: float = 1.0
    lambda_ln: float = 0.0
    lambda_pt: float = 0.0
    norm_project: bool = True
    frame: bool = True
    mask_rate: float = 0.15
    ss_loss: str = "cosine"
    ss_target: str = "both"
    start: str = "gaussian"
    step: str = "adam"
    noise: float = 0.0
    targets: str = "class"
    disagreement: float = 0.0
    temperature: float = 1.0
    updates_per_batch: int = 1
    replay: int = 0
    memory: int = 20
    lr: float = 3e-4
    weight_decay: float = 0.01
    n_updates: int = 1000

    def __post_init__(self) -> None:
        check_positive(self, "batch_size", "eta", "temperature", "updates_per_batch", "lr", "n_updates", "memory")
        if not 3 <= self.min_length <= self.length:
            raise InputError(f"min_length must be in 3..length ({self.length}), not {self.min_length}")
        if not 0 < self.mask_rate < 1:
            raise InputError(f"mask_rate must be between 0 and 1, not {self.mask_rate}")
        for name, value, known in (
            ("start", self.start, STARTS), ("step", self.step, STEPS), ("ss_loss", self.ss_loss, SS_LOSSES),
            ("ss_target", self.ss_target, SS_TARGETS), ("targets", self.targets, TARGETS),
        ):  # fmt: skip
            if value not in known:
                raise unknown(name, value, known)

    @property
    def updates_per_step(self) -> int:
        """Student updates in one :meth:`TextDistiller.step`."""
        return self.updates_per_batch + self.replay


@dataclass(frozen=True)
class Sentences:
    """Pseudo or real sentences as word-level embeddings.

    Attributes:
        e: [B, L, H], before positions, token types and LayerNorm.
        mask: int64 [B, L], 1 at real positions.
        free: bool [B, L], real positions that are neither [CLS] nor [SEP].
    """

    e: Tensor
    mask: Tensor
    free: Tensor

    def with_rows(self, e: Tensor) -> Sentences:
        """The same sentences with other embeddings at the free positions; the constants stay bit for bit."""
        return Sentences(torch.where(self.free[..., None], e, self.e), self.mask, self.free)


def look(network: Any, sentences: Sentences) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Logits [B, K] and the states [B, L, H]: the embedding module's output, then each layer's.

    `inputs_embeds` stands in for the look-up in the word table alone, so positions and LayerNorm come after it. The
    mask must be given: padding cannot be told from embeddings.
    """
    out = network(inputs_embeds=sentences.e, attention_mask=sentences.mask, output_hidden_states=True)
    return out.logits.float() if out.logits.dtype != torch.float64 else out.logits, out.hidden_states


def guess_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """L_guess: cross-entropy, summed over the batch, so that no sentence sees another.

    Args:
        logits: [B, K] of the teacher.
        targets: classes int64 [B], or beliefs [B, K].
    """
    return F.cross_entropy(logits, targets, reduction="sum")


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


def layer_norm_loss(u: Tensor, free: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """L_LN: squared distance of the batch's mean and standard deviation per dimension to the table's, over H.

    Args:
        u: outputs of the embedding module [B, L, H].
        free: bool [B, L], the positions that count.
        mean, std: [H], see :func:`table_statistics`.
    """
    weight = free[..., None].to(u.dtype) / free.sum()
    m = (u * weight).sum((0, 1))
    s = ((u - m).square() * weight).sum((0, 1)).clamp_min(1e-12).sqrt()
    return ((m - mean).square() + (s - std).square()).mean()


def patient_loss(student: tuple[Tensor, ...], teacher: tuple[Tensor, ...], kept: list[int]) -> Tensor:
    """L_PT: squared distance of the [CLS] states at unit length, summed over layers, mean over the batch.

    Args:
        student, teacher: states as :func:`look` gives them.
        kept: the teacher layer that each student layer stands for.
    """
    pairs = zip(student[1:], (teacher[1 + i] for i in kept), strict=True)
    distances = [F.normalize(s[:, 0], dim=-1) - F.normalize(t[:, 0], dim=-1) for s, t in pairs]
    return torch.stack([d.square().sum(-1).mean() for d in distances]).sum()


def rescaled(e: Tensor, free: Tensor, norms: Tensor) -> Tensor:
    """Each free row at its target norm: e r / ||e||.

    Args:
        e: [B, L, H].
        free: bool [B, L].
        norms: r [B, L], > 0.
    """
    scaled = e * (norms / e.norm(dim=-1).clamp_min(1e-12))[..., None]
    return torch.where(free[..., None], scaled, e)


def hidden_positions(free: Tensor, rate: float, generator: torch.Generator) -> Tensor:
    """M: each free position with probability `rate`, and at least one per sentence. bool [B, L]."""
    draw = torch.rand(free.shape, generator=generator, device=free.device).masked_fill(~free, 2.0)
    return (draw < rate) | (free & (draw == draw.min(1, keepdim=True).values))


def class_similarities(weight: Tensor) -> Tensor:
    """ZSKD's concentrations: cosine similarities of the classifier's rows, each row scaled to [0, 1], at least 1e-3.

    Args:
        weight: [K, D].

    Returns:
        [K, K], ones on the diagonal.
    """
    rows = F.normalize(weight.detach().double(), dim=1)
    similar = rows @ rows.T
    low, high = similar.min(1, keepdim=True).values, similar.max(1, keepdim=True).values
    return ((similar - low) / (high - low).clamp_min(1e-12)).clamp(1e-3, 1.0)


def dirichlet(concentration: Tensor, generator: torch.Generator) -> Tensor:
    """Beliefs [B, K], rows that sum to 1, from concentrations [B, K] > 0.

    By Marsaglia's boost, Gamma(a) = Gamma(a + 1) U^(1/a), in logarithms: small concentrations would underflow.
    """
    shape = (*concentration.shape, 1)
    a = concentration.double() + 1
    d = a - 1 / 3
    log_gamma, missing = torch.zeros_like(a), torch.ones_like(a, dtype=torch.bool)
    for _ in range(30):  # Marsaglia and Tsang accept 95 % or more of the draws
        x = torch.randn(shape, generator=generator, device=a.device, dtype=torch.float64)[..., 0]
        u = torch.rand(shape, generator=generator, device=a.device, dtype=torch.float64)[..., 0]
        v = (1 + x / (9 * d).sqrt()).clamp_min(1e-12) ** 3
        accepted = missing & (u.clamp_min(1e-300).log() < 0.5 * x * x + d - d * v + d * v.log())
        log_gamma = torch.where(accepted, (d * v).log(), log_gamma)
        missing = missing & ~accepted
    u = torch.rand(shape, generator=generator, device=a.device, dtype=torch.float64)[..., 0]
    return (log_gamma + u.clamp_min(1e-300).log() / concentration.double()).softmax(1)


def nearest_tokens(e: Tensor, table: Tensor, ordinary: Tensor) -> tuple[Tensor, Tensor]:
    """The ordinary token whose row of the table has the largest cosine with each embedding.

    Args:
        e: [..., H].
        table: W [V, H].
        ordinary: ids, int64.

    Returns:
        Token ids and cosines, both [...].
    """
    similar = F.normalize(e, dim=-1) @ F.normalize(table[ordinary], dim=-1).T
    cosines, at = similar.max(-1)
    return ordinary[at], cosines


def table_statistics(
    network: Any, table: Tensor, ordinary: Tensor, length: int, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [H] of what the embedding module makes of 4096 random (token, position) pairs."""
    n = -(-4096 // length)
    draw = torch.Generator().manual_seed(seed)
    ids = ordinary[torch.randint(len(ordinary), (n, length), generator=draw).to(ordinary.device)]
    with torch.no_grad():
        u = network.base_model.embeddings(inputs_embeds=table[ids]).flatten(0, 1)[:4096]
    return u.mean(0), u.std(0)


class TextDistiller(ABC):
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
    PARTS: ClassVar[tuple[str, ...]] = (
        "student", "head", "optimizer", "scaler", "randomness", "masks", "choices", "kept", "steps", "budget",
    )  # fmt: skip

    def __init__(
        self, teacher: Any, student: Any, vocabulary: Vocabulary, settings: Settings, runtime: Runtime
    ) -> None:
        self.settings, self.runtime, self.vocabulary = settings, runtime, vocabulary
        self.teacher = freeze(runtime.prepare(teacher))
        self.student = runtime.prepare(student).train()
        self.table = word_table(self.teacher)
        if word_table(self.student).shape != self.table.shape:
            raise InputError("the student must have the teacher's word table: cut it from the teacher")
        if len(vocabulary.words) > len(self.table):
            raise InputError(f"the vocabulary has {len(vocabulary.words)} words, the teacher only {len(self.table)}")
        if settings.length > (most := self.teacher.config.max_position_embeddings):
            raise InputError(f"length must be at most {most}, the teacher's positions, not {settings.length}")
        self.n_classes = int(self.teacher.config.num_labels)
        self.ordinary = vocabulary.ordinary.to(runtime.device)
        rows = self.table[self.ordinary]
        self.mean, self.sigma, self.norms = rows.mean(0), rows.std(0), rows.norm(dim=1)
        self.scale = float(self.sigma.mean())
        width = self.table.shape[1]
        self.head = self._head(width)
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

    def _head(self, width: int) -> nn.Module:
        torch.manual_seed(self.runtime.seed)
        return self.runtime.prepare(nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))).train()

    @abstractmethod
    def construct(self) -> tuple[Sentences, dict[str, Tensor]]:
        """One batch of sentences, without gradient, and what there is to say about making it."""

    def step(self) -> dict[str, Tensor]:
        """Make a batch, look at it with the teacher, and let the student learn from it and from earlier ones.

        Returns:
            "distillation": mean KL of the updates on the new batch; "self-supervised" where it is trained; what
            :meth:`construct` reports. Detached scalars on the device.
        """
        settings = self.settings
        with self.budget.synthesis(self.runtime.device):
            made, metrics = self.construct()
        self.budget.images += len(made.e)
        with self.budget.distillation(self.runtime.device):
            batch = self.ask(made)
            learned = [self.learn(made, batch) for _ in range(settings.updates_per_batch)]
            if settings.replay:
                self.kept = [*self.kept[-(settings.memory - 1) :], {**vars(made), **batch}]
                for at in torch.randint(len(self.kept), (settings.replay,), generator=self.choices).tolist():
                    old = {k: v.to(self.runtime.device) for k, v in self.kept[at].items()}
                    self.learn(Sentences(old["e"], old["mask"], old["free"]), old)
        self.steps += 1
        return metrics | {term: torch.stack([m[term] for m in learned]).mean() for term in learned[0]}

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
        clipped_update(self.optimizer, loss, self.scaler)
        self.budget.student_updates += 1
        return metrics

    def understanding(self, sentences: Sentences, *, moving_target: bool = False) -> Tensor:
        """L_ss of student and head on sentences, at freshly hidden positions.

        Args:
            moving_target: let the gradient reach the embeddings that are to be predicted, too.
        """
        settings = self.settings
        hidden = hidden_positions(sentences.free, settings.mask_rate, self.masks)
        # A row of the table taken as a constant: through it weight decay would reach the frozen table.
        covered = torch.where(hidden[..., None], self.table[self.vocabulary.mask], sentences.e)
        _, states = look(self.student, Sentences(covered, sentences.mask, sentences.free))
        target = sentences.e if moving_target else sentences.e.detach()
        predicted = self.head(states[-1]).to(target.dtype)
        if settings.ss_loss == "mse":
            target = self.teacher.base_model.embeddings(inputs_embeds=target)
            return ((predicted - target).square().mean(-1) * hidden).sum() / hidden.sum()
        return self_supervised_loss(predicted, target, hidden)

    def frame(self, lengths: Tensor) -> Sentences:
        """Sentences of the given lengths whose free rows are zero: [CLS] first, [SEP] last, [PAD] behind."""
        table, vocabulary, n = self.table, self.vocabulary, len(lengths)
        position = torch.arange(self.settings.length, device=lengths.device).expand(n, -1)
        real = position < lengths[:, None]
        e = torch.where(real[..., None], torch.zeros_like(table[0]), table[vocabulary.pad])
        free = real
        if self.settings.frame:
            first, last = position == 0, position == lengths[:, None] - 1
            e = torch.where(first[..., None], table[vocabulary.cls], e)
            e = torch.where(last[..., None], table[vocabulary.sep], e)
            free = real & ~first & ~last
        return Sentences(e, real.long(), free)

    def sample_frame(self) -> Sentences:
        """A batch of :meth:`frame` with lengths drawn from U{min_length, ..., length}."""
        settings = self.settings
        lengths = torch.randint(
            settings.min_length, settings.length + 1, (settings.batch_size,), generator=self.randomness,
            device=self.runtime.device,
        )  # fmt: skip
        return self.frame(lengths)

    def sample_tokens(self, shape: torch.Size) -> Tensor:
        """Ordinary token ids of this shape, drawn evenly."""
        at = torch.randint(len(self.ordinary), shape, generator=self.randomness, device=self.runtime.device)
        return self.ordinary[at]

    def state_dict(self) -> dict[str, Any]:
        """See :class:`dfkd_lib.training.fit.Method`."""
        return state_of(self, self.PARTS)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See :class:`dfkd_lib.training.fit.Method`."""
        restore_state(self, self.PARTS, state)


class ASDFD(TextDistiller):
    """AS-DFD: embeddings that the teacher takes for a class, hard for the student.

    `craft_steps = 0` leaves the random start, which is the Gaussian baseline; `beta = lambda_ss = 0` is the method
    without its adversary.
    """

    def __init__(
        self, teacher: Any, student: Any, vocabulary: Vocabulary, settings: Settings, runtime: Runtime
    ) -> None:
        super().__init__(teacher, student, vocabulary, settings, runtime)
        if settings.lambda_ln:
            self.statistics = table_statistics(self.teacher, self.table, self.ordinary, settings.length, runtime.seed)

    def construct(self) -> tuple[Sentences, dict[str, Tensor]]:
        """Draw a start, targets and norms, and craft."""
        start = self.sample_start()
        targets = self.sample_targets()
        at = torch.randint(len(self.norms), start.free.shape, generator=self.randomness, device=self.runtime.device)
        with in_eval_mode(self.student), no_weight_gradients(self.student), no_weight_gradients(self.head):
            made, trace = self.craft(start, targets, self.norms[at])
        return made, {term: value[-1] for term, value in trace.items()}

    def sample_start(self) -> Sentences:
        """Framed sentences whose free rows are N(mu_W, sigma_W^2), or rows of random tokens."""
        framed = self.sample_frame()
        if self.settings.start == "tokens":
            return framed.with_rows(self.table[self.sample_tokens(framed.free.shape)])
        noise = torch.randn(framed.e.shape, generator=self.randomness, device=framed.e.device, dtype=framed.e.dtype)
        return framed.with_rows(self.mean + self.sigma * noise)

    def sample_targets(self) -> Tensor:
        """Classes drawn evenly, int64 [B], or soft targets, [B, K]."""
        b, device = self.settings.batch_size, self.runtime.device
        if self.settings.targets == "soft":
            return dirichlet(torch.ones(b, self.n_classes, device=device), self.randomness).to(self.table.dtype)
        return torch.randint(self.n_classes, (b,), generator=self.randomness, device=device)

    def craft(self, start: Sentences, targets: Tensor, norms: Tensor) -> tuple[Sentences, dict[str, list[Tensor]]]:
        """Plug & Play Embedding Guessing: n_c descent steps on the free rows of `start`, and on nothing else.

        Args:
            targets: classes [B], or beliefs [B, K].
            norms: of the rows where they are projected, [B, L].

        Returns:
            The sentences without gradient; per step "guess", mean cross-entropy, and "hit", share of the sentences
            that the teacher takes for the target, both before the step and once more after the last.
        """
        settings = self.settings
        e = start.e.clone().requires_grad_()
        optimizer = torch.optim.Adam([e], settings.eta * self.scale)
        trace: dict[str, list[Tensor]] = {"guess": [], "hit": []}
        for i in range(settings.craft_steps):
            loss = self.construction_loss(start.with_rows(e), targets, trace, i >= settings.craft_steps // 2)
            # autograd.grad, because .backward() would fill the networks' gradients as well
            (gradient,) = torch.autograd.grad(loss, e)
            with torch.no_grad():
                self.move(optimizer, e, gradient, start.free)
                if settings.noise:
                    noise = torch.randn(e.shape, generator=self.randomness, device=e.device, dtype=e.dtype)
                    e.add_(noise, alpha=settings.noise * self.scale)
                if settings.norm_project:
                    e.copy_(rescaled(e, start.free, norms))
        made = start.with_rows(e.detach())
        with torch.no_grad():
            self.guess(made, targets, trace)
        return made, trace

    def construction_loss(
        self, sentences: Sentences, targets: Tensor, trace: dict[str, list[Tensor]], settled: bool
    ) -> Tensor:
        """L_con = L_guess + B (lambda_LN L_LN - beta L_ss), the last term in the second half of the steps only.

        With `disagreement`, also - B gamma KL(T || S): ours.
        """
        settings, b = self.settings, len(sentences.e)
        loss, teacher = self.guess(sentences, targets, trace)
        if settings.lambda_ln:
            u = self.teacher.base_model.embeddings(inputs_embeds=sentences.e)
            loss = loss + settings.lambda_ln * b * layer_norm_loss(u, sentences.free, *self.statistics)
        with self.runtime.autocast():
            if settings.beta and settled:
                understood = self.understanding(sentences, moving_target=settings.ss_target == "both")
                loss = loss - settings.beta * b * understood
            if settings.disagreement and settled:
                loss = loss - settings.disagreement * b * kl(look(self.student, sentences)[0], teacher)
        return loss

    def guess(self, sentences: Sentences, targets: Tensor, trace: dict[str, list[Tensor]]) -> tuple[Tensor, Tensor]:
        """L_guess and the teacher's logits; adds to the trace."""
        self.budget.teacher_passes += len(sentences.e)
        with self.runtime.autocast():
            logits, _ = look(self.teacher, sentences)
        loss = guess_loss(logits, targets)
        wanted = targets if targets.ndim == 1 else targets.argmax(1)
        trace["guess"].append(loss.detach() / len(logits))
        trace["hit"].append((logits.detach().argmax(1) == wanted).float().mean())
        return loss, logits

    def move(self, optimizer: torch.optim.Optimizer, e: Tensor, gradient: Tensor, free: Tensor) -> None:
        """One step of Adam, or one of fixed length: each sentence moves by eta per coordinate of a free row."""
        if self.settings.step == "adam":
            e.grad = gradient
            optimizer.step()
            e.grad = None
            return
        n = (free.sum(1) * e.shape[-1]).to(e.dtype)
        length = self.settings.eta * self.scale * n.sqrt() / gradient.flatten(1).norm(dim=1).clamp_min(1e-12)
        e.sub_(gradient * length[:, None, None])


class ModifiedZSKD(ASDFD):
    """Zero-Shot KD (Nayak et al., 2019) carried over to embeddings: soft targets, no adversary."""

    def __init__(
        self, teacher: Any, student: Any, vocabulary: Vocabulary, settings: Settings, runtime: Runtime
    ) -> None:
        super().__init__(teacher, student, vocabulary, settings, runtime)
        weights = [module for module in self.teacher.modules() if isinstance(module, nn.Linear)]
        classifier = next(module for module in reversed(weights) if module.out_features == self.n_classes)
        self.similar = class_similarities(classifier.weight)

    def sample_targets(self) -> Tensor:
        """Beliefs ~ Dirichlet(b c_k) for even classes k; b is 1 for one half of the batch, 0.1 for the other."""
        b, device = self.settings.batch_size, self.runtime.device
        classes = torch.randint(self.n_classes, (b,), generator=self.randomness, device=device)
        scales = torch.tensor(ZSKD_SCALES, device=device, dtype=torch.float64).repeat(-(-b // 2))[:b]
        return dirichlet(scales[:, None] * self.similar[classes], self.randomness).to(self.table.dtype)

    def construction_loss(
        self, sentences: Sentences, targets: Tensor, trace: dict[str, list[Tensor]], settled: bool
    ) -> Tensor:
        """Cross-entropy of the targets with softmax(z_T / 20)."""
        _, logits = self.guess(sentences, targets, trace)
        return guess_loss(logits / ZSKD_TEMPERATURE, targets)


class RandomText(TextDistiller):
    """Random ordinary tokens, framed, of random length."""

    def construct(self) -> tuple[Sentences, dict[str, Tensor]]:
        """Draw tokens and look them up."""
        framed = self.sample_frame()
        return framed.with_rows(self.table[self.sample_tokens(framed.free.shape)]), {}


class RealText(TextDistiller):
    """Vanilla KD on real sentences, without their labels: an upper bound that is not data-free."""

    data_free: ClassVar[bool] = False

    def __init__(
        self, teacher: Any, student: Any, sentences: SentenceSet, settings: Settings, runtime: Runtime
    ) -> None:
        super().__init__(teacher, student, sentences.vocabulary, settings, runtime)
        self.sentences = sentences.to(runtime.device)
        self.batches = minibatches(len(sentences), settings.batch_size, seed=runtime.seed)

    def construct(self) -> tuple[Sentences, dict[str, Tensor]]:
        """The next batch of the real sentences."""
        ids, mask, _ = self.sentences.batch(self.batches(self.steps))
        special = (ids == self.vocabulary.cls) | (ids == self.vocabulary.sep)
        return Sentences(self.table[ids], mask, mask.bool() & ~special), {}


class EmbeddingGenerator(nn.Module):
    """ZSKT's generator as one of sentences: z [B, 100] -> embeddings [B, length, width] with the table's statistics."""

    def __init__(self, length: int, width: int, mean: Tensor, sigma: Tensor) -> None:
        super().__init__()
        self.length, self.width = length, width
        self.enter = nn.Linear(ZSKT_NOISE, 8 * width)
        block = lambda: nn.Sequential(  # noqa: E731
            nn.Upsample(scale_factor=2), nn.Conv1d(width, width, 3, padding=1), nn.BatchNorm1d(width), nn.LeakyReLU(0.2)
        )
        self.blocks = nn.Sequential(block(), block(), block())
        self.leave = nn.Sequential(nn.Conv1d(width, width, 1), nn.BatchNorm1d(width, affine=False))
        self.register_buffer("mean", mean.clone())
        self.register_buffer("sigma", sigma.clone())

    def forward(self, z: Tensor) -> Tensor:
        """Embeddings [B, length, width]."""
        x = self.blocks(self.enter(z).view(len(z), self.width, 8))
        x = x[..., : self.length] if x.shape[-1] >= self.length else F.interpolate(x, self.length)
        return self.leave(x).transpose(1, 2) * self.sigma + self.mean


class ModifiedZSKT(TextDistiller):
    """Zero-Shot Knowledge Transfer (Micaelli & Storkey, 2019) carried over to embeddings.

    A generator makes the free rows; once in ten batches it takes a step that raises KL(T || S).
    """

    PARTS: ClassVar[tuple[str, ...]] = (*TextDistiller.PARTS, "generator", "generator_optimizer", "generator_scaler")

    def __init__(
        self, teacher: Any, student: Any, vocabulary: Vocabulary, settings: Settings, runtime: Runtime
    ) -> None:
        super().__init__(teacher, student, vocabulary, settings, runtime)
        torch.manual_seed(runtime.seed)
        generator = EmbeddingGenerator(settings.length, self.table.shape[1], self.mean, self.sigma)
        self.generator = runtime.prepare(generator).train()
        self.generator_optimizer = adam(self.generator, ZSKT_LR)
        self.generator_scaler = runtime.scaler()

    def construct(self) -> tuple[Sentences, dict[str, Tensor]]:
        """A batch of the generator's, which learns first when it is its turn."""
        metrics = {}
        if self.steps % ZSKT_STUDENT_STEPS == 0:
            with in_eval_mode(self.student), no_weight_gradients(self.student), self.runtime.autocast():
                fooled = self.sample()
                self.budget.teacher_passes += len(fooled.e)
                disagreement = kl(look(self.student, fooled)[0], look(self.teacher, fooled)[0])
            clipped_update(self.generator_optimizer, -disagreement, self.generator_scaler)
            metrics["disagreement"] = disagreement.detach()
        with torch.no_grad(), self.runtime.autocast():
            return self.sample(), metrics

    def sample(self) -> Sentences:
        """Framed sentences from the generator."""
        framed = self.sample_frame()
        z = torch.randn(
            (len(framed.e), ZSKT_NOISE), generator=self.randomness, device=framed.e.device, dtype=framed.e.dtype
        )
        return framed.with_rows(self.generator(z).to(framed.e.dtype))


def agreement(ours: Tensor, theirs: Tensor) -> float:
    """Share of the sentences for which two networks predict the same class.

    Args:
        ours, theirs: predicted classes, int64 [N].
    """
    return float((ours == theirs).float().mean())
