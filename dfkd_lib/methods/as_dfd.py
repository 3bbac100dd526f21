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

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.sentences import Vocabulary
from ..errors import unknown
from ..losses import kl
from ..models.text import table_statistics
from ..runtime import Runtime
from ..training.modes import in_eval_mode
from ..training.players import check_positive, no_weight_gradients
from .text_distiller import Distillation, Sentences, TextDistiller, look

STARTS = ("gaussian", "tokens")
SS_TARGETS = ("both", "context only")
TARGETS = ("class", "soft")


@dataclass(frozen=True)
class Settings(Distillation):
    """The hyper-parameters of one run. The paper's are unknown; the defaults are this project's.

    Attributes:
        craft_steps: n_c, steps on the embeddings; 0 leaves the Gaussian start.
        eta: their size, in units of the word table's mean standard deviation.
        beta: weight of the adversarial term, on in the last half of the steps.
        lambda_ln: weight of the penalty on the LayerNorm statistics.
        norm_project: whether each crafted row keeps the norm of an ordinary row of the table.
        ss_target: whether the adversary moves targets and context ("both") or the "context only".
        start: "gaussian", or "tokens": rows of the table for random ordinary tokens.
        targets: one "class" per sentence, or "soft": beliefs drawn evenly from the simplex (ours).
        disagreement: weight of -KL(T || S) in construction, as image methods reward it (ours).
    """

    craft_steps: int = 10
    eta: float = 0.5
    beta: float = 1.0
    lambda_ln: float = 0.0
    norm_project: bool = True
    ss_target: str = "both"
    start: str = "gaussian"
    targets: str = "class"
    disagreement: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "eta")
        for name, value, known in (
            ("start", self.start, STARTS),
            ("ss_target", self.ss_target, SS_TARGETS),
            ("targets", self.targets, TARGETS),
        ):
            if value not in known:
                raise unknown(name, value, known)


def guess_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """L_guess: cross-entropy, summed over the batch, so that no sentence sees another.

    Args:
        logits: [B, K] of the teacher.
        targets: classes int64 [B], or beliefs [B, K].
    """
    return F.cross_entropy(logits, targets, reduction="sum")


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


def rescaled(e: Tensor, free: Tensor, norms: Tensor) -> Tensor:
    """Each free row at its target norm: e r / ||e||.

    Args:
        e: [B, L, H].
        free: bool [B, L].
        norms: r [B, L], > 0.
    """
    scaled = e * (norms / e.norm(dim=-1).clamp_min(1e-12))[..., None]
    return torch.where(free[..., None], scaled, e)


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


class ASDFD(TextDistiller):
    """AS-DFD: embeddings that the teacher takes for a class, hard for the student.

    `craft_steps = 0` leaves the random start, which is the Gaussian baseline; `beta = lambda_ss = 0` is the method
    without its adversary.
    """

    def __init__(
        self, teacher: Any, student: Any, vocabulary: Vocabulary, settings: Settings, runtime: Runtime
    ) -> None:
        super().__init__(teacher, student, vocabulary, settings, runtime)
        self.settings: Settings = settings
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
                e.grad = gradient
                optimizer.step()
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
            u = self.teacher.base_model.embeddings(input_ids=None, inputs_embeds=sentences.e)
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
