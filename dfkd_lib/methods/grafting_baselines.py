"""What grafting is compared with: the same student behind the same stem, on the same views, learning as a whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Adam

from ..data import minibatches
from ..errors import unknown
from ..losses import cross_entropy, kl
from ..models.chains import Blocks, through
from ..runtime import Runtime
from ..training.players import Resumable, check_positive, freeze, update
from .grafting import Views, batch_for_shots, distance
from .grafting_blocks import Scion

OBJECTIVES = ("grafting loss", "KD", "labels", "hints")


@dataclass(frozen=True)
class WholeSettings:
    """How the baselines learn.

    Attributes:
        objective: "grafting loss" (the same distance, without grafting), "KD" (KL at `temperature`), "labels"
            (cross-entropy) or "hints" (FitNets: in the first half the block outputs by regression, then KD).
        n_steps, batch_size, lr: updates, views per update, Adam.
    """

    objective: str
    n_steps: int = 960
    batch_size: int = 64
    lr: float = 1e-3
    temperature: float = 4.0

    def __post_init__(self) -> None:
        check_positive(self, "n_steps", "batch_size", "lr", "temperature")
        if self.objective not in OBJECTIVES:
            raise unknown("objective", self.objective, OBJECTIVES)

    def for_shots(self, k: int) -> WholeSettings:
        """The rule that :meth:`.grafting.Settings.for_shots` holds grafting to: rate times K / 10, batch int(B K / 10).

        Without it the baseline would learn at K = 1 with ten times grafting's batch and rate.
        """
        return replace(self, batch_size=batch_for_shots(self.batch_size, k), lr=self.lr * k / 10)


class Whole(Resumable):
    """The baselines: the same student behind the same stem, on the same views, all of its blocks at once."""

    data_free: ClassVar[bool] = False
    PARTS: tuple[str, ...] = ("steps", "scions", "optimizer", "scaler")

    def __init__(
        self, teacher: Blocks, scions: Sequence[Scion], views: Views, settings: WholeSettings, runtime: Runtime
    ) -> None:
        self.settings, self.runtime, self.views = settings, runtime, views
        self.teacher = [freeze(runtime.prepare(block)) for block in teacher.values()][1:]
        self.scions = runtime.prepare(nn.ModuleList(scions)).train()
        first = scions[0].a_in
        self.student = [*([] if first is None else [first]), *(scion.body for scion in scions)]
        self.optimizer = Adam(self.scions.parameters(), settings.lr, fused=True)
        self.batches = minibatches(len(views.logits), settings.batch_size, seed=runtime.seed, device=runtime.device)
        self.scaler = runtime.scaler()
        self.n_steps, self.steps = settings.n_steps, 0

    def step(self) -> dict[str, Tensor]:
        """One update of the whole student; returns {"loss": ...}, detached."""
        rows = self.batches(self.steps)
        x, dtype = self.views.inputs[rows], self.runtime.dtype
        if self.settings.objective == "hints" and self.steps < self.n_steps / 2:
            with self.runtime.autocast():
                loss = self.hint_loss(x)
        else:
            with self.runtime.autocast():
                z_s = through(self.student, x).to(dtype)
            z_t = self.views.logits[rows]
            if self.settings.objective == "labels":
                loss = cross_entropy(z_s, self.views.labels[rows])
            elif self.settings.objective == "grafting loss":
                loss = distance(z_s, z_t) / len(rows)
            else:
                loss = kl(z_s, z_t, self.settings.temperature)
        update(self.optimizer, loss, self.scaler)
        self.steps += 1
        return {"loss": loss.detach()}

    def hint_loss(self, x: Tensor) -> Tensor:
        """sum_l mean || a_l(h_l) - t_l ||^2 over the blocks but the last: a_l, the out-adapter, is the regressor."""
        dtype = self.runtime.dtype
        ours = x if self.scions[0].a_in is None else self.scions[0].a_in(x)  # type: ignore[operator]
        losses = []
        for scion, block in zip(self.scions[:-1], self.teacher[:-1], strict=True):
            with torch.no_grad():
                x = block(x)
            ours = scion.body(ours)  # type: ignore[operator]
            guess = ours if scion.a_out is None else scion.a_out(ours)  # type: ignore[operator]
            losses.append(F.mse_loss(guess.to(dtype), x.to(dtype)))
        return torch.stack(losses).sum()
