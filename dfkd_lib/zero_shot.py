"""Recognising classes without labelled samples, in scikit-learn's manner.

:class:`QFSL` and :class:`SelectiveClassifier` take features [N, D] of your own, such as the penultimate features of a
network that never saw the unseen classes, or images and that network, and one signature per class, [C, A]. See
:mod:`.methods.qfsl` and :mod:`.methods.selective`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn

from .measures.zero_shot import risk_coverage
from .methods import qfsl, selective
from .runtime import Runtime, random_state_kept
from .zero_shot_input import Array, Refused, checked, named, normalised_signatures

TEMPERATURES, ETAS = (1.0, 4.0, 16.0), (0.0, 0.25, 0.5, 1.0)


class _ZeroShotClassifier(ClassifierMixin, BaseEstimator, ABC):
    """What both classifiers share: signatures, candidates, measures.

    Attributes:
        classes_: the candidates of a prediction, sorted; columns of `predict_proba`.
        seen_classes_, unseen_classes_: sorted.
        n_features_in_: D.
    """

    def predict_proba(self, X: Any) -> Array:
        """Probabilities of `classes_`, float [N, len(classes_)], rows sum to 1."""
        return self._candidate_scores(X).softmax(1).cpu().numpy()

    def predict(self, X: Any) -> Array:
        """The most probable of `classes_` for each row of X [N, D]: [N]."""
        best = self._candidate_scores(X).argmax(1).cpu().numpy()
        predicted: Array = self.classes_[best]
        return predicted

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """Mean class accuracy: the mean over the classes in y of the (weighted) share predicted rightly, in [0, 1]."""
        y, predicted = np.asarray(y), self.predict(X)
        right = predicted == y
        weights = np.ones(len(y)) if sample_weight is None else np.asarray(sample_weight)
        return float(np.mean([np.average(right[y == c], weights=weights[y == c]) for c in np.unique(y)]))

    def risk_coverage(self, X: Any, y: Any) -> dict[str, Array]:
        """The table of a reject option on labelled test samples, a column per key, a row per number of accepted ones.

        Returns:
            "coverage", the share that is predicted, from 1/N to 1; "risk", the error rate among them; "threshold", the
            least confidence among them. Equal confidences share their errors. `pandas.DataFrame` takes it as it is.
        """
        g, wrong = self.confidence(X), self.predict(X) != np.asarray(y)
        risks = risk_coverage(torch.from_numpy(g), torch.from_numpy(wrong))
        coverage = np.arange(1, len(g) + 1) / len(g)
        return {"coverage": coverage, "risk": risks.numpy(), "threshold": np.sort(g)[::-1].copy()}

    def confidence(self, X: Any) -> Array:
        """How sure each prediction is, float [N]; only the order means something."""
        return selective.max_probability(self._candidate_scores(X)).cpu().double().numpy()

    @abstractmethod
    def _candidate_scores(self, X: Any) -> Tensor:
        """Scores of `classes_`, [N, len(classes_)], whose softmax are their probabilities."""

    def _table(self, y: Array) -> tuple[Array, Any]:
        """Labels and signatures of all classes, as given."""
        if self.signatures is None:
            raise Refused("signatures is missing; pass one row of attributes per class, [C, A]")
        signatures = np.asarray(self.signatures)
        return np.arange(len(signatures)) if self.classes is None else np.asarray(self.classes), signatures

    def _begin(self, X: Any, y: Any) -> tuple[Tensor, Tensor]:
        """Check everything and note the classes; returns centred features [N, D] and the rows of `self._phi`, [N]."""
        X, y = checked(self, X, y, dtype=np.float64)
        try:
            check_classification_targets(y)
        except ValueError as e:
            raise Refused(" ".join(str(e).split())) from e
        labels, signatures = self._table(y)
        self._phi = normalised_signatures(labels, signatures)
        self.seen_classes_ = np.unique(y)
        if len(self.seen_classes_) < 2:
            raise Refused(f"y has one class, {named(self.seen_classes_[0])}; label samples of two seen classes or more")
        known = set(labels.tolist())
        for label in self.seen_classes_.tolist():
            if label not in known:
                raise Refused(
                    f"class {named(label)} has samples and no signature; add its row, and its name to classes"
                )
        for label in () if self.unseen is None else self.unseen:
            if label in self.seen_classes_:
                raise Refused(
                    f"class {named(label)} is declared unseen and has labelled samples; take it out of unseen"
                )
            if label not in known:
                raise Refused(
                    f"class {named(label)} is declared unseen and has no signature; add its row to signatures"
                )
        rest = np.setdiff1d(labels, self.seen_classes_)
        self.unseen_classes_ = rest if self.unseen is None else np.unique(np.asarray(self.unseen))
        if not self.generalised and not len(self.unseen_classes_):
            raise Refused("no class is unseen; add signatures of unseen classes, or set generalised=True")
        every = np.union1d(self.seen_classes_, self.unseen_classes_)
        self.classes_ = every if self.generalised else self.unseen_classes_
        self._phi = self._phi[[labels.tolist().index(label) for label in every.tolist()]]
        self._unseen = torch.from_numpy(np.isin(every, self.unseen_classes_))
        self._centre = X.mean(0)
        self._spread = float(np.sqrt(np.square(X - self._centre).mean())) or 1.0
        return self._centred(X), torch.from_numpy(np.searchsorted(every, y))

    def _centred(self, X: Array) -> Tensor:
        return torch.from_numpy(((X - self._centre) / self._spread).astype(np.float32))

    def _features(self, X: Any) -> Tensor:
        check_is_fitted(self)
        return self._centred(checked(self, X, dtype=np.float64, reset=False))

    def _runtime(self) -> Runtime:
        seed = int(check_random_state(self.random_state).randint(2**31))
        return Runtime(torch.device(self.device), seed=seed)


class QFSL(_ZeroShotClassifier):
    """Zero-shot classification with unlabelled samples of the unseen classes: QFSL, arXiv 1803.11320.

    Args:
        signatures: attributes of all classes, [C, A], any scale; they are normalised here.
        classes: labels of their rows; by default 0 to C - 1.
        unseen: labels of the unseen classes; by default all that have no labelled sample.
        generalised: True predicts among all classes, False among the unseen ones.
        lam: lambda, how strongly unlabelled samples are pulled to the unseen classes; too much locks them into one.
        warm_up: updates over which lambda rises.
        scale, dropout, lr, weight_decay, batch_size, n_steps: see :class:`~.methods.qfsl.Settings`.
        embedding: a network, images [B, C, H, W] in [0, 1] -> features [B, D]; X are then such images. It is frozen,
            and must not have learnt from an unseen class. One that learns along: :mod:`.methods.qfsl_images`.
        device: as torch names it. random_state: a number gives the same result again.

    Raises:
        InputError: by `fit`, one line that names what does not fit; it is a `ValueError`, too.
    """

    def __init__(
        self,
        signatures: Any = None,
        classes: Sequence[Any] | None = None,
        *,
        unseen: Sequence[Any] | None = None,
        generalised: bool = True,
        lam: float = 1.0,
        warm_up: int = 100,
        scale: float = 10.0,
        dropout: float = 0.1,
        lr: float = 0.02,
        weight_decay: float = 1e-3,
        batch_size: int = 128,
        n_steps: int = 500,
        embedding: nn.Module | None = None,
        device: str = "cpu",
        random_state: Any = 0,
    ) -> None:
        self.signatures, self.classes, self.unseen, self.generalised = signatures, classes, unseen, generalised
        self.lam, self.warm_up, self.scale, self.dropout = lam, warm_up, scale, dropout
        self.lr, self.weight_decay, self.batch_size, self.n_steps = lr, weight_decay, batch_size, n_steps
        self.embedding, self.device, self.random_state = embedding, device, random_state

    def fit(self, X: Any, y: Any, unlabelled: Any = None) -> QFSL:
        """Learn from labelled samples of seen classes and, if given, unlabelled ones of unseen classes.

        Args:
            X: features [N, D]. y: labels [N].
            unlabelled: features [M, D] of samples known to be of *some* unseen class, and not those that you test on.
                Without them training is inductive and lambda is of no use.
        """
        features, labels = self._begin(X, y)
        pool = None if unlabelled is None else self._centred(checked(self, unlabelled, dtype=np.float64, reset=False))
        if pool is not None and not self._unseen.any():
            raise Refused("unlabelled samples need an unseen class to be of; add its signature, or leave them out")
        settings = qfsl.Settings(
            lam=self.lam if pool is not None else 0.0, warm_up=self.warm_up, n_steps=self.n_steps,
            batch_size=self.batch_size, lr=self.lr, weight_decay=self.weight_decay, dropout=self.dropout,
            scale=self.scale,
        )  # fmt: skip
        with random_state_kept(self.device):
            method = qfsl.QuasiFullySupervised(
                features, labels, pool, self._phi, self._unseen, settings, self._runtime()
            )
            self._network = qfsl.train(method, self.n_steps).network
        return self

    def _candidate_scores(self, X: Any) -> Tensor:
        features = self._features(X)  # first: it says what is wrong with an estimator that is not fitted
        with torch.no_grad():
            s: Tensor = self._network(features.to(self.device))
        return s if self.generalised else s[:, self._unseen.to(s.device)]


class SelectiveClassifier(_ZeroShotClassifier):
    """A zero-shot classifier that may abstain, after arXiv 1807.07437; its equations are this library's reconstruction.

    Predictions come from the attributes that you define, the confidence also from residual ones that are learnt. The
    temperature and the residuals' weight eta are chosen on seen classes that play unseen; so is what :meth:`accept`
    knows of risk.

    Args:
        signatures, classes, unseen, generalised, embedding, device, random_state: as of :class:`QFSL`.
        m: residual attributes.
        temperature, eta: of the confidence; None chooses.
        folds: how often a part of the seen classes plays unseen. 0 needs temperature and eta.
        tau, mu_r, mu_c, beta, lr, weight_decay, batch_size, n_steps: see :class:`~.methods.selective.Settings`.

    Raises:
        InputError: by `fit`, as of :class:`QFSL`.
    """

    def __init__(
        self,
        signatures: Any = None,
        classes: Sequence[Any] | None = None,
        *,
        unseen: Sequence[Any] | None = None,
        generalised: bool = False,
        m: int = 32,
        temperature: float | None = None,
        eta: float | None = None,
        folds: int = 3,
        tau: float = 10.0,
        mu_r: float = 1.0,
        mu_c: float = 1.0,
        beta: float = 0.1,
        lr: float = 0.02,
        weight_decay: float = 1e-3,
        batch_size: int = 128,
        n_steps: int = 500,
        embedding: nn.Module | None = None,
        device: str = "cpu",
        random_state: Any = 0,
    ) -> None:
        self.signatures, self.classes, self.unseen, self.generalised = signatures, classes, unseen, generalised
        self.m, self.temperature, self.eta, self.folds = m, temperature, eta, folds
        self.tau, self.mu_r, self.mu_c, self.beta = tau, mu_r, mu_c, beta
        self.lr, self.weight_decay, self.batch_size, self.n_steps = lr, weight_decay, batch_size, n_steps
        self.embedding, self.device, self.random_state = embedding, device, random_state

    def fit(self, X: Any, y: Any) -> SelectiveClassifier:
        """Learn defined and residual attributes from labelled samples of seen classes: X [N, D], y [N]."""
        features, rows = self._begin(X, y)
        if self.folds == 0 and (self.temperature is None or self.eta is None):
            raise Refused("without folds nothing is chosen; give temperature and eta, or set folds to 1 or more")
        settings = selective.Settings(
            m=self.m, tau=self.tau, mu_r=self.mu_r, mu_c=self.mu_c, beta=self.beta, n_steps=self.n_steps,
            batch_size=self.batch_size, lr=self.lr, weight_decay=self.weight_decay,
        )  # fmt: skip
        seen = self._phi[~self._unseen]
        labels = ((~self._unseen).cumsum(0) - 1)[rows]
        runtime = self._runtime()
        with random_state_kept(self.device):
            held = self._held(features, labels, seen, settings, runtime)
            learner = selective.AttributeLearner(features, labels, seen, settings, runtime)
            self._network = qfsl.train(learner, self.n_steps).network
        temperatures = TEMPERATURES if self.temperature is None else (self.temperature,)
        self.confidence_ = selective.choose_confidence(held, temperatures, ETAS if self.eta is None else (self.eta,))
        self._played = [(self.confidence_(fold.s_d, fold.s_r), fold.wrong) for fold in held]
        return self

    def _held(
        self, features: Tensor, labels: Tensor, seen: Tensor, settings: selective.Settings, runtime: Runtime
    ) -> list[selective.Held]:
        if not self.folds:
            return []
        if len(seen) < 4:
            raise Refused(
                f"{len(seen)} seen classes are too few to play unseen; set folds to 0, and give temperature and eta"
            )
        n_held = max(2, min(int(self._unseen.sum()), len(seen) // 4))
        folds = qfsl.pseudo_unseen(labels, n_held, self.folds, runtime.seed)
        return [selective.held_scores(features, labels, seen, fold, settings, runtime) for fold in folds]

    def confidence(self, X: Any) -> Array:
        """g(x) of the prediction for each row of X: float [N]."""
        return self.confidence_(*self._scores(X)).cpu().double().numpy()

    def accept(self, X: Any, *, coverage: float | None = None, risk: float | None = None) -> Array:
        """Which rows of X to predict and which to reject: bool [N].

        Args:
            coverage: accept this share of X, the most confident rows; in (0, 1].
            risk: accept what is as confident as samples whose error rate was no more than this, where seen classes
                played unseen; in (0, 1]. On classes that are truly unseen the risk may differ.

        Raises:
            InputError: both or neither is given, a share is out of range, or risk without folds.
        """
        if (coverage is None) == (risk is None):
            raise Refused("give either coverage or risk")
        name, share = ("coverage", coverage) if risk is None else ("risk", risk)
        if share is None or not 0 < share <= 1:
            raise Refused(f"{name} is a share above 0 and at most 1, not {share!r}")
        g = self.confidence(X)
        if name == "coverage":
            accepted = np.zeros(len(g), dtype=bool)
            accepted[np.argsort(-g, kind="stable")[: max(1, round(share * len(g)))]] = True
            return accepted
        if not self._played:
            raise Refused("a risk is known from folds alone; set folds to 1 or more, or give a coverage")
        played, wrong = (torch.cat(part) for part in zip(*self._played, strict=True))
        allowed = (risk_coverage(played, wrong) <= share).nonzero()
        at = played.sort(descending=True).values
        return g >= (float(at[int(allowed[-1])]) if len(allowed) else np.inf)

    def _scores(self, X: Any) -> tuple[Tensor, Tensor]:
        features = self._features(X)
        candidates = self._phi if self.generalised else self._phi[self._unseen]
        return self._network.scores(features.to(self.device), candidates.to(self.device))

    def _candidate_scores(self, X: Any) -> Tensor:
        return self._scores(X)[0]
