"""The rivals of AS-DFD, other sources of sentences for the same student: random words, real text, ZSKD and ZSKT.

The two zero-shot methods were made for images; what they become for embeddings is a reconstruction, as the method is.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data import minibatches
from ..data.sentences import SentenceSet, Vocabulary
from ..losses import kl
from ..runtime import Runtime
from ..training.finetuning import CLIP
from ..training.modes import in_eval_mode
from ..training.players import adam, no_weight_gradients, update
from .as_dfd import ASDFD, Settings, dirichlet, guess_loss
from .text_distiller import Distillation, Sentences, TextDistiller, look

ZSKT_NOISE, ZSKT_STUDENT_STEPS, ZSKT_LR = 100, 10, 1e-3
ZSKD_TEMPERATURE, ZSKD_SCALES = 20.0, (1.0, 0.1)


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


class ModifiedZSKD(ASDFD):
    """Zero-Shot KD (Nayak et al., 2019) carried over to embeddings: soft targets, no adversary."""

    def __init__(
        self, teacher: Any, student: Any, vocabulary: Vocabulary, settings: Settings, runtime: Runtime
    ) -> None:
        super().__init__(teacher, student, vocabulary, settings, runtime)
        weights = [module for module in self.teacher.modules() if isinstance(module, nn.Linear)]
        classifier = next(module for module in reversed(weights) if module.out_features == self.n_classes)
        self.similar = class_similarities(classifier.weight)
        scales = torch.tensor(ZSKD_SCALES, device=runtime.device, dtype=torch.float64)
        self.scales = scales.repeat(-(-settings.batch_size // 2))[: settings.batch_size]

    def sample_targets(self) -> Tensor:
        """Beliefs ~ Dirichlet(b c_k) for even classes k; b is 1 for one half of the batch, 0.1 for the other."""
        b, device = self.settings.batch_size, self.runtime.device
        classes = torch.randint(self.n_classes, (b,), generator=self.randomness, device=device)
        return dirichlet(self.scales[:, None] * self.similar[classes], self.randomness).to(self.table.dtype)

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
        self, teacher: Any, student: Any, sentences: SentenceSet, settings: Distillation, runtime: Runtime
    ) -> None:
        super().__init__(teacher, student, sentences.vocabulary, settings, runtime)
        self.sentences = sentences.to(runtime.device)
        self.batches = minibatches(len(sentences), settings.batch_size, seed=runtime.seed)

    def construct(self) -> tuple[Sentences, dict[str, Tensor]]:
        """The next batch of the real sentences."""
        ids, mask, _ = self.sentences.batch(self.batches(self.steps))
        special = (ids == self.vocabulary.cls) | (ids == self.vocabulary.sep)
        return Sentences(self.table[ids], mask if self.sentences.padded else None, mask.bool() & ~special), {}


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

    PARTS: tuple[str, ...] = (*TextDistiller.PARTS, "generator", "generator_optimizer", "generator_scaler")

    def __init__(
        self, teacher: Any, student: Any, vocabulary: Vocabulary, settings: Distillation, runtime: Runtime
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
            update(self.generator_optimizer, -disagreement, self.generator_scaler, clip=CLIP)
            metrics["disagreement"] = disagreement.detach()
        with torch.no_grad(), self.runtime.autocast():
            return self.sample(), metrics

    def sample(self) -> Sentences:
        """Framed sentences from the generator."""
        framed = self.sample_frame()
        z = torch.randn(
            (len(framed.e), ZSKT_NOISE), generator=self.randomness, device=framed.e.device, dtype=framed.e.dtype
        )
        return framed.with_rows(self.generator(z)[:, : framed.e.shape[1]].to(framed.e.dtype))
