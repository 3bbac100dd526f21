"""QFSL: the bias loss and its gradient by hand, limiting cases, protocols that no test image passes, the estimator."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from conftest import stream
from sklearn.base import clone
from sklearn.utils.estimator_checks import parametrize_with_checks
from torch import Tensor

from dfkd_lib import QFSL
from dfkd_lib.data.attributes import normalised
from dfkd_lib.errors import InputError
from dfkd_lib.measures.zero_shot import (
    class_accuracies,
    harmonic_mean,
    mean_class_accuracy,
    zero_shot_measures,
)
from dfkd_lib.methods import qfsl
from dfkd_lib.methods.qfsl import (
    Fold,
    QuasiFullySupervised,
    Settings,
    best_by_folds,
    bias_loss,
    calibrated,
    eszsl,
    exchanged_halves,
    fold_measures,
    pseudo_unseen,
    quasi_fully_supervised_loss,
    signed_one_hot,
    target_mass,
    train,
)
from dfkd_lib.runtime import Runtime

CPU = Runtime(torch.device("cpu"))
TARGET = torch.tensor([False, True, False, True, False])
QUICK = {"n_steps": 150, "batch_size": 32, "lr": 0.01, "warm_up": 50, "dropout": 0.1, "scale": 5.0}


def scores(n: int = 6, seed: int = 0) -> Tensor:
    return torch.randn(n, 5, generator=stream(seed)).double()


def sum_by_hand(s: Tensor, target: Tensor) -> float:
    total = 0.0
    for row in s.tolist():
        mass = sum(math.exp(v) for v, t in zip(row, target.tolist(), strict=True) if t)
        total -= math.log(mass / sum(math.exp(v) for v in row))
    return total / len(s)


def test_bias_loss_by_hand() -> None:
    s = scores()
    assert float(bias_loss(s, TARGET)) == pytest.approx(sum_by_hand(s, TARGET))
    assert float(bias_loss(s, ~TARGET)) != pytest.approx(sum_by_hand(s, TARGET))
    assert float(-target_mass(s, TARGET).log().mean()) == pytest.approx(sum_by_hand(s, TARGET))


def test_limits_of_the_bias_loss() -> None:
    s = scores()
    assert float(bias_loss(s, TARGET)) >= 0
    assert float(bias_loss(torch.zeros(3, 5), TARGET)) == pytest.approx(-math.log(2 / 5))
    assert float(bias_loss(s, torch.ones(5, dtype=torch.bool))) == pytest.approx(0, abs=1e-12)
    one = torch.tensor([False, False, True, False, False])
    assert float(bias_loss(s, one)) == pytest.approx(float(torch.nn.functional.cross_entropy(s, torch.full((6,), 2))))
    sure = s.masked_fill(~TARGET, -1e4)
    assert float(bias_loss(sure, TARGET)) == 0, "all mass is on target classes"
    assert float(bias_loss(s + 7, TARGET)) == pytest.approx(float(bias_loss(s, TARGET)))
    large = (1e4 * s.float()).requires_grad_()
    loss = bias_loss(large, TARGET)
    loss.backward()
    assert large.grad is not None and loss.isfinite() and large.grad.isfinite().all()


def test_gradient_of_the_bias_loss_is_the_formula() -> None:
    s = scores().requires_grad_()
    (found,) = torch.autograd.grad(bias_loss(s, TARGET), s)
    p, mass = s.detach().softmax(1), target_mass(s.detach(), TARGET)[:, None]
    wanted = torch.where(TARGET, p * (1 - 1 / mass), p) / len(s)
    assert torch.allclose(found, wanted)
    assert torch.allclose(found.sum(1), torch.zeros(6).double(), atol=1e-12)
    assert (found[:, ~TARGET] >= 0).all() and (found[:, TARGET] <= 0).all()
    shares = found[:, TARGET] / p[:, TARGET]
    assert torch.allclose(shares[:, 0], shares[:, 1]), "target scores rise in proportion to the share they have"


def test_early_mistakes_lock_in() -> None:
    """Descending L_b alone, the target class that is ahead by a little takes nearly all."""
    s = torch.tensor([[0.0, 0.1, 0.0, 0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    before = s.detach().softmax(1)
    for _ in range(400):
        (gradient,) = torch.autograd.grad(bias_loss(s, TARGET), s)
        s = (s - gradient).detach().requires_grad_()
    after = s.detach().softmax(1)
    assert float(after[0, 1] / after[0, 3]) > 1.1 * float(before[0, 1] / before[0, 3])
    assert float(target_mass(s.detach(), TARGET)) > 0.98


def test_the_loss_is_its_parts() -> None:
    source, unlabelled, y = scores(4, 1), scores(3, 2), torch.tensor([0, 2, 4, 2])
    classification = -float(source.log_softmax(1)[range(4), y].mean())
    bias = sum_by_hand(unlabelled, TARGET)

    def found(lam: float) -> float:
        return float(quasi_fully_supervised_loss(source, y, unlabelled, TARGET, lam))

    assert found(0.7) == pytest.approx(classification + 0.7 * bias)
    assert found(0.0) == pytest.approx(classification)
    for wrong in (classification - 0.7 * bias, classification + 0.6 * bias, 0.7 * classification + bias):
        assert found(0.7) != pytest.approx(wrong)


class Toy:
    """Classes about points that a linear map of their attributes gives: 20 seen classes, 4 unseen."""

    def __init__(self, n: int = 30, seed: int = 0) -> None:
        generator = stream(seed)
        self.attributes = torch.randn(24, 8, generator=generator)
        self.phi = normalised(self.attributes)
        self.target = torch.zeros(24, dtype=torch.bool)
        self.target[20:] = True
        mixing = torch.randn(8, 12, generator=generator)
        self.labels = torch.arange(24).repeat_interleave(n)
        noise = 1.2 * torch.randn(24 * n, 12, generator=generator)
        self.features = (self.phi @ mixing)[self.labels] + noise
        unseen = self.target[self.labels].nonzero()[:, 0]
        seen = (~self.target[self.labels]).nonzero()[:, 0]
        self.fit, self.test_seen = seen[seen % 4 > 0], seen[seen % 4 == 0]
        self.pool, self.test = unseen[::2], unseen[1::2]

    def method(self, pool: bool = True, seed: int = 0, **settings: Any) -> QuasiFullySupervised:
        return QuasiFullySupervised(
            self.features[self.fit],
            self.labels[self.fit],
            self.features[self.pool] if pool else None,
            self.phi,
            self.target,
            Settings(**QUICK | settings),
            Runtime(torch.device("cpu"), seed=seed),
        )

    def measures(self, method: QuasiFullySupervised, gamma: float = 0.0) -> dict[str, float]:
        s = calibrated(method.scores(self.features), self.target, gamma)
        return zero_shot_measures(
            s[self.test], self.labels[self.test], s[self.test_seen], self.labels[self.test_seen], self.target
        )


@pytest.fixture(scope="module")
def toy() -> Toy:
    return Toy()


@pytest.fixture(scope="module")
def inductive(toy: Toy) -> QuasiFullySupervised:
    return train(toy.method(pool=False, lam=0.0), 150)


@pytest.fixture(scope="module")
def transductive(toy: Toy) -> QuasiFullySupervised:
    return train(toy.method(lam=1.0), 150)


def test_a_step_on_the_bias_loss_alone_raises_the_target_mass(toy: Toy) -> None:
    network = toy.method().network
    x = toy.features[toy.pool]
    before = target_mass(network(x), toy.target).mean()
    bias_loss(network(x), toy.target).backward()
    with torch.no_grad():
        for p in network.parameters():
            p -= 0.01 * p.grad
    assert target_mass(network(x), toy.target).mean() > before


def test_lambda_0_is_plain_supervised_training_bit_by_bit(toy: Toy, inductive: QuasiFullySupervised) -> None:
    beside = train(toy.method(pool=True, lam=0.0), 150)
    assert torch.equal(beside.network.bridge.weight, inductive.network.bridge.weight)
    assert torch.equal(beside.network.bridge.bias, inductive.network.bridge.bias)


def test_semantic_vectors_are_fixed_and_classes_have_no_order(toy: Toy, transductive: QuasiFullySupervised) -> None:
    network = transductive.network
    assert "phi" in dict(network.named_buffers()) and "phi" not in dict(network.named_parameters())
    assert torch.equal(network.phi, toy.phi)
    s = transductive.scores(toy.features)
    order = torch.randperm(24, generator=stream(3))
    network.phi = toy.phi[order]
    assert torch.allclose(transductive.scores(toy.features), s[:, order], atol=1e-5)
    network.phi = toy.phi


def test_unlabelled_images_cure_the_bias(
    toy: Toy, inductive: QuasiFullySupervised, transductive: QuasiFullySupervised
) -> None:
    without, with_them = toy.measures(inductive), toy.measures(transductive)
    assert with_them["MCA_t"] > without["MCA_t"] + 0.3
    assert with_them["H"] > without["H"]
    for figures in (without, with_them):
        assert figures["conventional"] >= figures["MCA_t"]


def test_calibrated_stacking_ends_in_conventional_classification(toy: Toy, inductive: QuasiFullySupervised) -> None:
    far = toy.measures(inductive, 1e6)
    assert far["MCA_s"] == 0 and far["MCA_t"] == far["conventional"] == toy.measures(inductive)["conventional"]
    assert toy.measures(inductive, 0.5)["MCA_t"] >= toy.measures(inductive)["MCA_t"]
    s = torch.zeros(2, 5)
    assert calibrated(s, TARGET, 2.0)[0].tolist() == [-2.0, 0.0, -2.0, 0.0, -2.0]


def test_lambda_rises_in_a_line(toy: Toy) -> None:
    method = toy.method(lam=2.0, warm_up=4)
    found = []
    for _ in range(6):
        found.append(method.settings.lam_at(method.steps))
        method.step()
    assert found == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]


def test_pseudo_labels_are_of_target_classes_and_taken_anew_each_pass(toy: Toy) -> None:
    method = toy.method(target_loss=qfsl.PSEUDO_LABELS)
    assert len(toy.pool) == 60, "two batches of 32 are a pass"
    method.step()
    first = method.pseudo_labels
    assert toy.target[first].all()
    method.step()
    assert method.pseudo_labels is first
    method.step()
    assert method.pseudo_labels is not first


def test_a_restored_method_goes_on_as_it_would_have(toy: Toy) -> None:
    whole, broken = toy.method(), toy.method()
    for _ in range(10):
        whole.step()
        if broken.steps < 5:
            broken.step()
    again = toy.method()
    again.load_state_dict(broken.state_dict())
    for _ in range(5):
        again.step()
    assert torch.equal(again.network.bridge.weight, whole.network.bridge.weight)


def test_labelled_images_of_target_classes_are_refused(toy: Toy) -> None:
    with pytest.raises(InputError, match="is of a target class"):
        QuasiFullySupervised(toy.features, toy.labels, None, toy.phi, toy.target, Settings(lam=0.0), CPU)
    with pytest.raises(InputError, match="lambda weighs unlabelled images"):
        toy.method(pool=False, lam=1.0)
    with pytest.raises(InputError, match="did you mean 'bias'"):
        Settings(target_loss="bais")
    with pytest.raises(InputError, match="dropout must be 0 or more and below 1"):
        Settings(dropout=1.0)


def test_eszsl_solves_its_normal_equations() -> None:
    generator = stream(0)
    x, s = (torch.randn(*shape, generator=generator).double() for shape in ((30, 7), (5, 4)))
    y = signed_one_hot(torch.arange(30) % 5, 5, torch.float64)
    v = eszsl(x, y, s, 0.3, 0.2)
    left, right = x.T @ x + 0.3 * torch.eye(7).double(), s.T @ s + 0.2 * torch.eye(4).double()
    assert torch.allclose(left @ v @ right, x.T @ y @ s)
    assert not torch.allclose(left @ v @ right, x.T @ (y + 1) @ s), "1 and -1, not 1 and 0"
    square, semantics = (torch.randn(n, n, generator=generator).double() for n in (5, 5))
    exact = signed_one_hot(torch.arange(5), 5, torch.float64)
    assert torch.allclose(square @ eszsl(square, exact, semantics, 0.0, 0.0) @ semantics.T, exact)


def test_harmonic_mean() -> None:
    assert harmonic_mean(0.3, 0.3) == pytest.approx(0.3)
    assert harmonic_mean(0.0, 0.9) == harmonic_mean(0.0, 0.0) == 0
    for a, b in ((0.2, 0.9), (0.5, 0.6), (0.01, 1.0)):
        assert min(a, b) <= harmonic_mean(a, b) <= min(2 * min(a, b), max(a, b))
    assert harmonic_mean(0.662, 0.931) == pytest.approx(0.774, abs=5e-4), "a published row"


def test_mean_class_accuracy_weighs_classes_equally() -> None:
    predicted, labels = torch.tensor([0, 1, 1, 2, 0]), torch.tensor([0, 0, 1, 2, 2])
    assert class_accuracies(predicted, labels) == {0: 0.5, 1: 1.0, 2: 0.5}
    assert mean_class_accuracy(predicted, labels) == pytest.approx(2 / 3)
    twice = torch.cat([torch.arange(5), (labels == 2).nonzero()[:, 0]])
    assert mean_class_accuracy(predicted[twice], labels[twice]) == pytest.approx(2 / 3)
    with pytest.raises(InputError, match="no sample"):
        mean_class_accuracy(labels[:0], labels[:0])


def test_halves_are_exchanged_and_share_nothing() -> None:
    (a, b), (c, d) = exchanged_halves(11, stream(0))
    assert torch.equal(a, d) and torch.equal(b, c)
    assert sorted([*a.tolist(), *b.tolist()]) == list(range(11))


def test_pseudo_unseen_folds_keep_apart_what_must_be_apart(toy: Toy) -> None:
    labels = toy.labels[toy.fit]
    folds = list(pseudo_unseen(labels, 3, 2, seed=0))
    assert len(folds) == 2 and not (folds[0].target & folds[1].target).any()
    for fold in folds:
        parts = [set(part.tolist()) for part in fold[:4]]
        assert sum(map(len, parts)) == len(set.union(*parts)) == len(labels)
        assert int(fold.target.sum()) == 3 and len(fold.target) == 20, "no truly unseen class takes part"
        assert fold.target[labels[torch.cat([fold.unlabelled, fold.test_unseen])]].all()
        assert not fold.target[labels[torch.cat([fold.fit, fold.test_seen])]].any()
    with pytest.raises(InputError, match="hold out 1 to 18"):
        list(pseudo_unseen(labels, 19, 1, seed=0))


def test_lambda_is_chosen_on_seen_classes_alone(toy: Toy) -> None:
    features, labels = toy.features[toy.fit], toy.labels[toy.fit]

    def measured(fold: Fold) -> Any:
        def h(lam: float) -> float:
            method = QuasiFullySupervised(
                features[fold.fit], labels[fold.fit], features[fold.unlabelled], toy.phi[:20], fold.target,
                Settings(**QUICK | {"lam": lam, "n_steps": 60}), CPU,
            )  # fmt: skip
            return fold_measures(train(method, 60).scores, features, labels, fold)["H"]

        return h

    best, means = best_by_folds([0.0, 1.0], list(pseudo_unseen(labels, 4, 2, seed=0)), measured)
    assert best == 1.0 and means[1.0] > means[0.0]


# --- the estimator ------------------------------------------------------------------------------------


def estimator(toy: Toy, **changed: Any) -> QFSL:
    return QFSL(toy.attributes.numpy(), n_steps=150, lr=0.01, batch_size=32, **changed)


def fitted(toy: Toy, **changed: Any) -> QFSL:
    return estimator(toy, **changed).fit(
        toy.features[toy.fit].numpy(), toy.labels[toy.fit].numpy(), toy.features[toy.pool].numpy()
    )


def test_the_estimator_recognises_unseen_classes(toy: Toy) -> None:
    model = fitted(toy)
    x, y = toy.features[toy.test].numpy(), toy.labels[toy.test].numpy()
    assert model.unseen_classes_.tolist() == [20, 21, 22, 23] and model.seen_classes_.tolist() == list(range(20))
    p = model.predict_proba(x)
    assert p.shape == (len(x), 24) and np.allclose(p.sum(1), 1, atol=1e-5)
    assert np.array_equal(model.classes_[p.argmax(1)], model.predict(x))
    shares = class_accuracies(torch.from_numpy(model.predict(x)), torch.from_numpy(y))
    assert model.score(x, y) == pytest.approx(sum(shares.values()) / 4)
    assert model.score(x, y) > 0.5
    alone = fitted(toy, generalised=False)
    assert set(alone.predict(x)) <= {20, 21, 22, 23} and alone.score(x, y) >= model.score(x, y)
    table = model.risk_coverage(x, y)
    assert table["coverage"][-1] == 1 and table["risk"][-1] == pytest.approx(np.mean(model.predict(x) != y))
    assert (np.diff(table["threshold"]) <= 0).all(), "coverage does not rise with the threshold"


def test_the_estimator_repeats_clones_and_leaves_global_randomness_alone(toy: Toy) -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    model = fitted(toy)
    assert torch.equal(torch.get_rng_state(), state)
    x = toy.features[toy.test].numpy()
    assert np.array_equal(model.predict_proba(x), fitted(toy).predict_proba(x))
    assert not np.array_equal(model.predict_proba(x), fitted(toy, random_state=1).predict_proba(x))
    again = clone(model.set_params(lam=0.5))
    assert again.get_params()["lam"] == 0.5 and not hasattr(again, "classes_")


def test_images_with_an_embedding_are_its_features(toy: Toy) -> None:
    flat = ((toy.features - toy.features.min()) / (toy.features.max() - toy.features.min())).float()
    theta = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.BatchNorm1d(flat.shape[1]))
    theta[1].running_mean.fill_(0.1)
    before = {name: value.clone() for name, value in theta.state_dict().items()}
    features = theta.eval()(flat).detach().numpy()
    theta.train()
    x, y = flat[:, :, None, None].numpy(), toy.labels.numpy()
    by_images, by_features = estimator(toy, embedding=theta), estimator(toy)
    by_images.fit(x[toy.fit], y[toy.fit], x[toy.pool])
    by_features.fit(features[toy.fit], y[toy.fit], features[toy.pool])
    assert np.allclose(by_images.predict_proba(x[toy.test]), by_features.predict_proba(features[toy.test]), atol=1e-4)
    assert theta.training and all(torch.equal(before[name], value) for name, value in theta.state_dict().items())
    assert clone(by_images).embedding is not theta


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((2, 3)), r"X are images [N, C, H, W] in [0, 1], floating-point, not [2, 3]"),
        (np.full((2, 1, 2, 2), 7.0), "in [0, 1]"),
        (np.zeros((2, 1, 2, 2)), "the embedding returns [2, 1, 2, 2], not features [N, D]"),
        (np.zeros((2, 3, 2, 2)), "the embedding fails on images [3, 2, 2]"),
    ],
)
def test_images_that_an_embedding_cannot_take_are_one_clear_line(images: Any, message: str) -> None:
    with pytest.raises(InputError) as caught:
        QFSL(torch.eye(3), embedding=torch.nn.Conv2d(1, 1, 1)).fit(images, [0, 1])
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_labels_of_unseen_samples_cannot_enter(toy: Toy) -> None:
    """fit has no place for them, and a label of a class that is declared unseen is refused."""
    x, y = toy.features.numpy(), toy.labels.numpy()
    with pytest.raises(InputError, match="class 21 is declared unseen and has labelled samples"):
        QFSL(toy.attributes, unseen=[21]).fit(x, y)
    with pytest.raises(TypeError):
        QFSL(toy.attributes).fit(x, y, x, y)  # type: ignore[call-arg]


WITH_NAN = torch.eye(3).index_put((torch.tensor(1), torch.tensor(2)), torch.tensor(math.nan))


@pytest.mark.parametrize(
    ("asked", "y", "message"),
    [
        ({}, [0, 1], "signatures is missing"),
        ({"signatures": torch.eye(3)}, [0, 5], "class 5 has samples and no signature"),
        (
            {"signatures": torch.eye(3), "classes": ["a", "b", "c"]},
            ["a", "d"],
            "class 'd' has samples and no signature",
        ),
        ({"signatures": WITH_NAN, "classes": ["a", "b", "c"]}, ["a", "b"], "attribute 2 of class 'b' is nan; fill in"),
        ({"signatures": torch.eye(3)}, [1, 1], "y has one class, 1"),
        ({"signatures": torch.eye(3), "unseen": [1]}, [0, 1], "class 1 is declared unseen and has labelled samples"),
        ({"signatures": torch.eye(3), "unseen": [7]}, [0, 1], "class 7 is declared unseen and has no signature"),
        ({"signatures": torch.eye(3)[[0, 1, 1]]}, [0, 1], "classes 1 and 2 have the same signature"),
        ({"signatures": torch.eye(3), "classes": ["a", "b"]}, ["a", "b"], "3] for 2 classes"),
        ({"signatures": torch.eye(3), "classes": ["a", "b", "b"]}, ["a", "b"], "named twice"),
        ({"signatures": np.array([["x"], ["y"]])}, [0, 1], "signatures are not numbers"),
        ({"signatures": torch.eye(2), "generalised": False}, [0, 1], "no class is unseen"),
    ],
)
def test_bad_input_is_one_clear_line(asked: dict[str, Any], y: list[Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        QFSL(**asked).fit([[0.0, 1.0], [1.0, 0.0]], y)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_bad_features_are_one_clear_line(toy: Toy) -> None:
    with pytest.raises(InputError) as caught:
        estimator(toy).fit([[math.nan], [1.0]], [0, 1])
    assert str(caught.value).startswith("Input X contains NaN.") and "\n" not in str(caught.value)
    with pytest.raises(InputError, match="need an unseen class"):
        QFSL(torch.eye(2)).fit([[0.0], [1.0]], [0, 1], [[0.5]])


class OneHot(QFSL):
    """What scikit-learn's checks know nothing of, signatures, is made up from y; nothing is unseen."""

    def _table(self, y: Any) -> tuple[Any, Any]:
        labels = np.unique(y)
        return labels, np.eye(max(2, len(labels)))[: len(labels)]


@parametrize_with_checks([OneHot(lr=0.1, n_steps=60, weight_decay=0.0)])
def test_scikit_learns_checks(estimator: Any, check: Any) -> None:
    check(estimator)
