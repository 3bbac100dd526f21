"""Selective Zero-Shot Classification with Augmented Attributes, arXiv 1807.07437: a reconstruction.

A zero-shot classifier that may abstain. The paper holds the defined attributes to be too few to tell how sure a
prediction is, and adds residual ones: (i) both are learnt jointly on seen classes, (ii) predictions are made in the
subspace of the defined attributes alone, (iii) the confidence is measured by both. That much is known to us of the
method. Every equation below is our design within these three rules, none is quoted.

With a_d = W_d x the defined attributes of an image and a_r = W_r x the residual ones, both are compared with
signatures of length 1, s_c = tau <a, a_c>; the residual signatures of seen classes are learnt, those of unseen ones
are coded from them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD

from ..data import minibatches
from ..errors import InputError
from ..losses import cross_entropy
from ..measures.zero_shot import aurc
from ..runtime import Runtime
from ..training.players import Resumable, check_positive
from ..training.schedules import cosine, set_lr
from .qfsl import Fold, train


def decorrelation(a_d: Tensor, a_r: Tensor) -> Tensor:
    """1/(Am) |Corr(a_d, a_r)|_F^2 over the batch: 0 if each residual attribute is uncorrelated with each defined one.

    Args:
        a_d, a_r: [B, A] and [B, m].

    Returns:
        A scalar in [0, 1]; a rescaled attribute does not change it.
    """
    d, r = (F.normalize(a - a.mean(0), dim=0, eps=1e-8) for a in (a_d, a_r))
    return (d.T @ r).square().mean()


def joint_loss(
    s_d: Tensor, s_r: Tensor, a_d: Tensor, a_r: Tensor, y: Tensor, mu_r: float, mu_c: float, stop_gradient: bool = True
) -> dict[str, Tensor]:
    """The three terms whose sum is descended, each with its weight.

    "defined": CE(s_d, y), the defined attributes alone must classify. "residual": mu_r CE(sg[s_d] + s_r, y), the
    residual ones explain what is left. "redundancy": mu_c :func:`decorrelation` of sg[a_d] and a_r. sg stops the
    gradient, so that the residual branch leaves the defined one, and with it all predictions, as it would be alone.

    Args:
        s_d, s_r: scores [B, S] over the seen classes. a_d, a_r: attributes [B, A], [B, m]. y: int64 [B].
        stop_gradient: False trains both branches by all terms, an ablation.
    """
    if stop_gradient:
        residual, redundancy = cross_entropy(s_d.detach() + s_r, y), decorrelation(a_d.detach(), a_r)
    else:
        residual, redundancy = cross_entropy(s_d + s_r, y), decorrelation(a_d, a_r)
    return {"defined": cross_entropy(s_d, y), "residual": mu_r * residual, "redundancy": mu_c * redundancy}


def coding(seen: Tensor, unseen: Tensor, beta: float) -> Tensor:
    """omega_u = (G + beta I)^-1 A_d a_u with G = A_d A_d^T: unseen defined signatures, ridge-coded by the seen ones.

    A small beta blows omega up where seen signatures are nearly collinear.

    Args:
        seen, unseen: defined signatures of length 1, [S, A] and [U, A].

    Returns:
        [U, S].
    """
    gram = seen @ seen.T + beta * torch.eye(len(seen), dtype=seen.dtype, device=seen.device)
    return torch.linalg.solve(gram, seen @ unseen.T).T


def residual_signatures(omega: Tensor, residual_seen: Tensor) -> Tensor:
    """a_r of unseen classes, sum_s omega_us a_r_s brought to length 1: [U, S] and [S, m] -> [U, m]."""
    return F.normalize(omega @ F.normalize(residual_seen))


class Confidence(NamedTuple):
    """g(x) = ln p_T^d(f) + eta ln p_T^r(f), with p_T the softmax of scores / T over the candidates.

    eta = 0 is the maximal probability of the defined attributes alone.
    """

    temperature: float = 16.0
    eta: float = 0.5

    def __call__(self, s_d: Tensor, s_r: Tensor) -> Tensor:
        """g(x), [N], from scores [N, U] over the candidates; the prediction f is that of s_d."""
        f = s_d.argmax(1, keepdim=True)
        log_p = ((s / self.temperature).log_softmax(1).gather(1, f)[:, 0] for s in (s_d, s_r))
        return next(log_p) + self.eta * next(log_p) if self.eta else next(log_p)


def max_probability(s: Tensor, temperature: float = 1.0) -> Tensor:
    """ln max_c p_T(c), [N], of scores [N, U]. The logarithm orders as the probability does and saturates later."""
    return (s / temperature).log_softmax(1).amax(1)


def margin(s: Tensor) -> Tensor:
    """The best score less the second best, [N], of scores [N, U]."""
    best = s.topk(2, 1).values
    return best[:, 0] - best[:, 1]


def margin_with_residuals(s_d: Tensor, s_r: Tensor, eta: float) -> Tensor:
    """margin_d + eta sigma_d / sigma_r margin_r(f), [N], of scores [N, U].

    margin_r(f) is the residual score of the defined prediction less the best other one; the sigmas are deviations of
    the two margins over the samples.
    """
    f, d = s_d.argmax(1, keepdim=True), margin(s_d)
    r = s_r.gather(1, f)[:, 0] - s_r.scatter(1, f, -torch.inf).amax(1)
    return d + eta * d.std() / r.std().clamp_min(1e-12) * r


def negative_entropy(s: Tensor, temperature: float = 1.0) -> Tensor:
    """sum_c p_T(c) ln p_T(c), [N], of scores [N, U]."""
    log_p = (s / temperature).log_softmax(1)
    return (log_p.exp() * log_p).sum(1)


def agreement(s_r_seen: Tensor, omega: Tensor, f: Tensor) -> Tensor:
    """The other way to use residuals: cosine of a_r's scores over the *seen* classes with omega_f, [N].

    Args:
        s_r_seen: [N, S]. omega: [U, S]. f: predictions, int64 [N], rows of omega.
    """
    return F.cosine_similarity(s_r_seen, omega[f])


@dataclass(frozen=True)
class Settings:
    """All are ours, from trials on CIFAR-100: none of the paper's is known to us.

    Attributes:
        m: residual attributes. tau: of the scores. mu_r, mu_c: weights of :func:`joint_loss`. beta: of :func:`coding`.
        weight_decay: of both linear maps; signature_decay: of the residual signatures.
        stop_gradient: see :func:`joint_loss`.
    """

    m: int = 32
    tau: float = 10.0
    mu_r: float = 1.0
    mu_c: float = 1.0
    beta: float = 0.1
    n_steps: int = 500
    batch_size: int = 128
    lr: float = 0.02
    weight_decay: float = 1e-3
    signature_decay: float = 1e-4
    stop_gradient: bool = True

    def __post_init__(self) -> None:
        check_positive(self, "m", "tau", "beta", "n_steps", "batch_size", "lr")


class Attributes(nn.Module):
    """Defined attributes a_d = W_d x + b, residual ones a_r = W_r x, and signatures of the seen classes for both.

    Each branch draws its first weights from a stream of its own, so that with the stopped gradient the defined branch,
    and each prediction, has the same bits whatever the residual branch is.

    Args:
        seen: defined signatures, rows of length 1, [S, A].
    """

    seen: Tensor

    def __init__(self, n_features: int, seen: Tensor, settings: Settings, runtime: Runtime) -> None:
        super().__init__()
        self.defined = nn.Linear(n_features, seen.shape[1])
        self.residual = nn.Linear(n_features, settings.m, bias=False)
        self.signatures = nn.Parameter(torch.empty(len(seen), settings.m))
        self.register_buffer("seen", seen.clone())
        self.tau, self.beta = settings.tau, settings.beta
        self.to(runtime.device, runtime.dtype)
        with torch.no_grad():
            self.defined.weight.normal_(0, 0.01, generator=runtime.stream("defined"))
            self.defined.bias.zero_()
            self.residual.weight.normal_(0, 0.01, generator=runtime.stream("residual"))
            self.signatures.normal_(generator=runtime.stream("signatures"))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """s_d, s_r [B, S] over the seen classes and a_d [B, A], a_r [B, m], of features [B, D]."""
        a_d, a_r = self.defined(x), self.residual(x)
        return self.tau * a_d @ self.seen.T, self.tau * a_r @ F.normalize(self.signatures).T, a_d, a_r

    @torch.no_grad()
    def scores(self, x: Tensor, signatures: Tensor) -> tuple[Tensor, Tensor]:
        """s_d and s_r, [N, C] each, over any candidates.

        Args:
            x: features [N, D].
            signatures: defined ones of the candidates, [C, A], rows of length 1. One that is a seen class's has that
                class's residual signature, any other has one coded from the seen classes'.
        """
        learnt = F.normalize(self.signatures)
        coded = residual_signatures(coding(self.seen, signatures, self.beta), learnt)
        same = (signatures[:, None] == self.seen).all(2)
        residual = torch.where(same.any(1)[:, None], learnt[same.int().argmax(1)], coded)
        return self.tau * self.defined(x) @ signatures.T, self.tau * self.residual(x) @ residual.T


class AttributeLearner(Resumable):
    """Defined and residual attributes, learnt jointly on seen classes; one update per :meth:`step`.

    Args:
        features: float [N, D] of labelled images of seen classes.
        labels: int64 [N], 0 to S - 1.
        seen: defined signatures of the seen classes, rows of length 1, [S, A].

    Raises:
        InputError: a label without a signature.
    """

    data_free: ClassVar[bool] = False
    PARTS: tuple[str, ...] = ("network", "optimizer", "steps")

    def __init__(self, features: Tensor, labels: Tensor, seen: Tensor, settings: Settings, runtime: Runtime) -> None:
        if int(labels.max()) >= len(seen) or int(labels.min()) < 0:
            raise InputError(f"labels must lie in 0..{len(seen) - 1}, the rows of the signatures; number them so")
        self.settings, self.runtime = settings, runtime
        self.features, self.labels = features.to(runtime.device, runtime.dtype), labels.to(runtime.device)
        self.network = Attributes(features.shape[1], seen, settings, runtime)
        bridges = [*self.network.defined.parameters(), *self.network.residual.parameters()]
        groups = [
            {"params": bridges, "weight_decay": settings.weight_decay},
            {"params": [self.network.signatures], "weight_decay": settings.signature_decay},
        ]
        self.optimizer = SGD(groups, settings.lr, 0.9)
        self.batches = minibatches(len(features), settings.batch_size, seed=runtime.seed, device=runtime.device)
        self.steps = 0

    def step(self) -> dict[str, Tensor]:
        """One update of both branches; returns the terms of :func:`joint_loss`, detached."""
        chosen = self.settings
        set_lr(self.optimizer, chosen.lr * cosine(self.steps, chosen.n_steps))
        at = self.batches(self.steps)
        s_d, s_r, a_d, a_r = self.network(self.features[at])
        terms = joint_loss(s_d, s_r, a_d, a_r, self.labels[at], chosen.mu_r, chosen.mu_c, chosen.stop_gradient)
        self.optimizer.zero_grad(set_to_none=True)
        torch.stack(list(terms.values())).sum().backward()
        self.optimizer.step()
        self.steps += 1
        return {name: term.detach() for name, term in terms.items()}

    def scores(self, features: Tensor, signatures: Tensor) -> tuple[Tensor, Tensor]:
        """:meth:`Attributes.scores` of tensors that lie anywhere."""
        device, dtype = self.runtime.device, self.runtime.dtype
        return self.network.scores(features.to(device, dtype), signatures.to(device, dtype))


class Held(NamedTuple):
    """What a learner makes of classes that play unseen: scores s_d, s_r [N, U] and which predictions are wrong, [N]."""

    s_d: Tensor
    s_r: Tensor
    wrong: Tensor


def held_scores(
    features: Tensor, labels: Tensor, seen: Tensor, fold: Fold, settings: Settings, runtime: Runtime
) -> Held:
    """Learn on a fold's classes and score the images of those that play unseen.

    Args:
        features, labels, seen: as of :class:`AttributeLearner`, of all seen classes.
    """
    number = torch.where(fold.target, fold.target.cumsum(0), (~fold.target).cumsum(0)) - 1
    labels = number[labels.cpu()]
    learner = AttributeLearner(features[fold.fit], labels[fold.fit], seen[~fold.target], settings, runtime)
    at = torch.cat([fold.unlabelled, fold.test_unseen])
    s_d, s_r = train(learner, settings.n_steps).scores(features[at], seen[fold.target])
    return Held(s_d.cpu(), s_r.cpu(), s_d.argmax(1).cpu() != labels[at])


def choose_confidence(held: Sequence[Held], temperatures: Sequence[float], etas: Sequence[float]) -> Confidence:
    """The temperature and eta of the least mean AURC over folds of :func:`~.qfsl.pseudo_unseen`.

    Among equals, and without folds, the smallest eta and then the first temperature: a rich vocabulary needs eta = 0.
    """
    candidates = [Confidence(t, eta) for eta in sorted(etas) for t in temperatures]

    def total(confidence: Confidence) -> float:
        return sum(aurc(confidence(fold.s_d, fold.s_r), fold.wrong) for fold in held)

    return min(candidates, key=total)
