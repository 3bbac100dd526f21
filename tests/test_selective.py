"""Selective zero-shot classification: risk and coverage by hand, the reconstruction's invariants, the reject option."""

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

from dfkd_lib import SelectiveClassifier
from dfkd_lib.data.attributes import normalised
from dfkd_lib.errors import InputError
from dfkd_lib.measures.zero_shot import (
    aurc,
    coverage_at_risk,
    excess_aurc,
    oracle_aurc,
    paired,
    risk_at_coverage,
    risk_coverage,
)
from dfkd_lib.methods import selective
from dfkd_lib.methods.qfsl import pseudo_unseen, train
from dfkd_lib.methods.selective import (
    AttributeLearner,
    Confidence,
    Held,
    Settings,
    agreement,
    choose_confidence,
    coding,
    decorrelation,
    held_scores,
    joint_loss,
    margin,
    margin_with_residuals,
    max_probability,
    negative_entropy,
    residual_signatures,
)
from dfkd_lib.runtime import Runtime

CPU = Runtime(torch.device("cpu"))


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=stream(seed)).double()


def errors(n: int = 200, seed: int = 3, rate: float = 0.4) -> Tensor:
    return torch.rand(n, generator=stream(seed)) < rate


def test_risk_coverage_by_hand() -> None:
    g, wrong = torch.tensor([0.1, 0.9, 0.5, 0.7]), torch.tensor([True, False, True, False])
    assert risk_coverage(g, wrong).tolist() == pytest.approx([0, 0, 1 / 3, 1 / 2])
    assert aurc(g, wrong) == pytest.approx((1 / 3 + 1 / 2) / 4)
    assert aurc(-g, wrong) == pytest.approx((1 + 1 + 2 / 3 + 1 / 2) / 4)


def test_equal_confidences_share_their_errors() -> None:
    g, wrong = torch.tensor([0.5, 0.5, 0.5, 0.1]), torch.tensor([True, False, False, True])
    assert risk_coverage(g, wrong).tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3, 1 / 2])
    e = errors()
    assert torch.allclose(risk_coverage(torch.zeros(200), e), e.double().mean().expand(200)), "constant risk"


def test_a_curve_does_not_depend_on_the_order_or_the_scale() -> None:
    g, wrong = drawn(200).round(decimals=1), errors()
    order = torch.randperm(200, generator=stream(7))
    curve = risk_coverage(g, wrong)
    assert torch.allclose(curve, risk_coverage(g[order], wrong[order]))
    assert torch.equal(curve, risk_coverage(g.exp() * 3 + 1, wrong))
    assert float(curve[-1]) == pytest.approx(float(wrong.double().mean()))


def test_aurc_lies_between_the_oracle_and_its_opposite() -> None:
    wrong = errors()
    k = int(wrong.sum())
    best, worst = aurc(-wrong.double() + 1e-3 * drawn(200), wrong), aurc(wrong.double(), wrong)
    assert best == pytest.approx(oracle_aurc(200, k))
    for seed in range(5):
        assert best <= aurc(drawn(200, seed=seed), wrong) <= worst
        assert excess_aurc(drawn(200, seed=seed), wrong) >= 0
    assert oracle_aurc(100_000, 77_000) == pytest.approx(0.77 + 0.23 * math.log(0.23), abs=1e-4)
    assert aurc(drawn(9), torch.zeros(9, dtype=torch.bool)) == 0 and aurc(drawn(9), torch.ones(9).bool()) == 1
    chance = [aurc(drawn(200, seed=seed), wrong) for seed in range(200)]
    assert sum(chance) / 200 == pytest.approx(k / 200, abs=0.02), "a confidence that knows nothing"


def test_risk_and_coverage_answer_each_other() -> None:
    risks = torch.tensor([0.0, 0.0, 1 / 3, 0.25, 0.4], dtype=torch.float64)
    assert risk_at_coverage(risks, 0.6) == pytest.approx(1 / 3) and risk_at_coverage(risks, 0.01) == 0
    assert coverage_at_risk(risks, 0.25) == 0.8, "the largest one, also beyond a bump"
    assert coverage_at_risk(risks + 0.5, 0.3) == 0
    for value in (0.0, 1.5):
        with pytest.raises(InputError, match="share above 0"):
            risk_at_coverage(risks, value)
    with pytest.raises(InputError, match="NaN"):
        risk_coverage(torch.tensor([math.nan]), torch.tensor([True]))
    with pytest.raises(InputError, match="one error per confidence"):
        risk_coverage(torch.zeros(2), torch.tensor([True]))


def test_paired_differences_leave_out_what_pairs_share() -> None:
    mean, spread, won = paired([0.5, 0.9, 0.1], [0.4, 0.7, 0.1])
    assert mean == pytest.approx(0.1) and spread == pytest.approx(0.1) and won == 2
    assert math.isnan(paired([1.0], [0.0])[1])
    with pytest.raises(InputError, match="no pairs"):
        paired([1.0], [])


def test_confidences_by_hand() -> None:
    s = torch.tensor([[2.0, 1.0, 0.0]])
    p = [math.exp(v) / sum(map(math.exp, (2, 1, 0))) for v in (2, 1, 0)]
    assert float(max_probability(s)) == pytest.approx(math.log(p[0]), abs=1e-6)
    assert float(max_probability(2 * s, 2.0)) == pytest.approx(math.log(p[0]), abs=1e-6)
    assert float(margin(s)) == 1
    assert float(negative_entropy(s)) == pytest.approx(sum(q * math.log(q) for q in p), abs=1e-6)
    s_r = torch.tensor([[0.0, 2.0, 1.0]])
    r = math.log(math.exp(0) / sum(map(math.exp, (0, 2, 1))))
    assert float(Confidence(1.0, 0.5)(s, s_r)) == pytest.approx(math.log(p[0]) + 0.5 * r, abs=1e-6)
    assert float(Confidence(1.0, -0.5)(s, s_r)) != pytest.approx(math.log(p[0]) + 0.5 * r, abs=1e-3)
    d, two = torch.tensor([[2.0, 1.0], [5.0, 1.0]]), torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    wanted = torch.tensor([1.0, 4.0]) + 0.5 * torch.tensor([1.0, 4.0]).std() / torch.tensor([3.0, -1.0]).std() * (
        torch.tensor([3.0, -1.0])
    )
    assert torch.allclose(margin_with_residuals(d, two, 0.5), wanted)
    assert float(agreement(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0], [2.0, 0.0]]), torch.tensor([1]))) == 1


def test_without_eta_the_curve_is_the_baselines() -> None:
    s_d, s_r = drawn(50, 4), drawn(50, 4, seed=1)
    assert torch.equal(Confidence(4.0, 0.0)(s_d, s_r), max_probability(s_d, 4.0))
    assert torch.equal(margin_with_residuals(s_d, s_r, 0.0), margin(s_d))


def test_decorrelation() -> None:
    line = torch.linspace(-1, 1, 11).double()[:, None]
    assert float(decorrelation(line, line.square())) == pytest.approx(0, abs=1e-12)
    assert float(decorrelation(line, -3 * line + 2)) == pytest.approx(1)
    a, b = drawn(30, 3), drawn(30, 2, seed=1)
    corr = np.corrcoef(a.T, b.T)[:3, 3:]
    assert float(decorrelation(a, b)) == pytest.approx(float((corr**2).mean()))
    assert float(decorrelation(5 * a - 1, 0.1 * b)) == pytest.approx(float((corr**2).mean()))


def test_the_loss_is_its_parts() -> None:
    s_d, s_r, a_d, a_r = (drawn(6, n, seed=n) for n in (4, 5, 3, 2))
    s_r, y = s_r[:, :4], torch.tensor([0, 1, 2, 3, 0, 1])
    found = joint_loss(s_d, s_r, a_d, a_r, y, 0.7, 0.3)

    def ce(s: Tensor) -> float:
        return -float(s.log_softmax(1)[range(6), y].mean())

    assert float(found["defined"]) == pytest.approx(ce(s_d))
    assert float(found["residual"]) == pytest.approx(0.7 * ce(s_d + s_r)) != pytest.approx(0.7 * ce(s_d - s_r))
    assert float(found["redundancy"]) == pytest.approx(0.3 * float(decorrelation(a_d, a_r)))


def test_the_residual_branch_sends_nothing_into_the_defined_one() -> None:
    y = torch.tensor([0, 1, 2, 0, 1, 2])
    for stop, sent in ((True, False), (False, True)):
        s_d, a_d = drawn(6, 3).requires_grad_(), drawn(6, 4).requires_grad_()
        terms = joint_loss(s_d, drawn(6, 3, seed=1).requires_grad_(), a_d, drawn(6, 2, seed=2), y, 1.0, 1.0, stop)
        rest = terms["residual"] + terms["redundancy"]
        grads = torch.autograd.grad(rest, (s_d, a_d), allow_unused=True)
        assert all((g is not None) == sent for g in grads)


def test_an_unseen_class_with_a_seen_ones_attributes_has_its_residuals() -> None:
    seen = torch.nn.functional.normalize(drawn(4, 6))
    omega = coding(seen, seen[[2]], 1e-9)
    assert torch.allclose(omega, torch.eye(4).double()[[2]], atol=1e-6)
    residual = torch.nn.functional.normalize(drawn(4, 3, seed=1))
    assert torch.allclose(residual_signatures(omega, residual), residual[[2]], atol=1e-6)
    omega = coding(seen, torch.nn.functional.normalize(drawn(2, 6, seed=2)), 0.1)
    gram = seen @ seen.T
    wanted = seen @ torch.nn.functional.normalize(drawn(2, 6, seed=2)).T
    assert torch.allclose((gram + 0.1 * torch.eye(4)) @ omega.T, wanted), "the ridge's normal equations"


class Toy:
    """Samples of 16 seen and 4 unseen classes about points that a linear map of 10 attributes gives."""

    def __init__(self) -> None:
        self.attributes = torch.randn(20, 10, generator=stream(0))
        self.phi = normalised(self.attributes)
        points = self.phi @ torch.randn(10, 16, generator=stream(1))
        self.y = torch.arange(20).repeat_interleave(30)
        self.x = points[self.y] + 0.9 * torch.randn(600, 16, generator=stream(2))
        self.seen = self.y < 16

    def learner(self, keep: int = 5, seed: int = 0, **settings: Any) -> AttributeLearner:
        chosen = Settings(**{"m": 8, "n_steps": 150, "batch_size": 64} | settings)
        phi = normalised(self.attributes[:, :keep])
        made = AttributeLearner(
            self.x[self.seen], self.y[self.seen], phi[:16], chosen, Runtime(torch.device("cpu"), seed=seed)
        )
        return train(made, chosen.n_steps)


@pytest.fixture(scope="module")
def toy() -> Toy:
    return Toy()


def test_predictions_know_nothing_of_residuals(toy: Toy) -> None:
    phi = normalised(toy.attributes[:, :5])[16:]
    reference = toy.learner().scores(toy.x[~toy.seen], phi)[0]
    for changed in ({"m": 3}, {"mu_r": 0.0}, {"mu_c": 5.0}, {"beta": 1.0}, {"signature_decay": 0.1}):
        assert torch.equal(toy.learner(**changed).scores(toy.x[~toy.seen], phi)[0], reference)
    assert not torch.equal(toy.learner(stop_gradient=False).scores(toy.x[~toy.seen], phi)[0], reference)


def test_training_teaches_both_branches(toy: Toy) -> None:
    made = toy.learner(n_steps=1)
    first = made.step()
    for _ in range(150):
        last = made.step()
    made = toy.learner()
    last = made.step()
    assert last["residual"] < first["residual"] and last["defined"] < first["defined"]
    assert last["residual"] < last["defined"], "residual attributes explain what the few defined ones leave"
    s_d, _ = made.scores(toy.x[~toy.seen], normalised(toy.attributes[:, :5])[16:])
    wrong = s_d.argmax(1) + 16 != toy.y[~toy.seen]
    assert aurc(max_probability(s_d), wrong) < float(wrong.double().mean())


def test_seen_candidates_have_the_signatures_that_were_learnt(toy: Toy) -> None:
    made = toy.learner(keep=10)
    _, s_r = made.scores(toy.x[:5], toy.phi)
    assert torch.allclose(s_r[:, :16], made.network(toy.x[:5])[1], atol=1e-5)


def test_a_restored_learner_goes_on_as_it_would_have(toy: Toy) -> None:
    whole, broken, again = (
        AttributeLearner(toy.x[toy.seen], toy.y[toy.seen], toy.phi[:16], Settings(n_steps=20), CPU) for _ in range(3)
    )
    for _ in range(20):
        whole.step()
        if broken.steps < 10:
            broken.step()
    again.load_state_dict(broken.state_dict())
    for _ in range(10):
        again.step()
    assert torch.equal(again.network.residual.weight, whole.network.residual.weight)
    with pytest.raises(InputError, match=r"0\.\.3, the rows"):
        AttributeLearner(toy.x, toy.y, toy.phi[:4], Settings(), CPU)


def test_the_confidence_is_chosen_on_seen_classes_and_may_do_without_residuals(toy: Toy) -> None:
    x, y = toy.x[toy.seen], toy.y[toy.seen]
    fold = next(pseudo_unseen(y, 4, 1, seed=0))
    held = held_scores(x, y, toy.phi[:16], fold, Settings(n_steps=50, batch_size=64), CPU)
    assert held.s_d.shape == held.s_r.shape == (120, 4) and held.wrong.shape == (120,)
    noise = Held(held.s_d, 10 * torch.randn(120, 4, generator=stream(9)), held.wrong)
    assert choose_confidence([noise], (1.0, 4.0), (1.0, 0.0)).eta == 0
    truth = torch.where(held.wrong[:, None], -5.0, 5.0) * torch.nn.functional.one_hot(held.s_d.argmax(1), 4)
    assert choose_confidence([Held(held.s_d, truth, held.wrong)], (1.0,), (0.0, 1.0)).eta == 1
    equal = Held(held.s_d, held.s_d * 0, held.wrong)
    assert choose_confidence([equal], (1.0,), (1.0, 0.0)) == Confidence(1.0, 0.0)


# --- the estimator ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(toy: Toy) -> SelectiveClassifier:
    made = SelectiveClassifier(toy.attributes, n_steps=120, batch_size=64, m=8)
    return made.fit(toy.x[toy.seen].numpy(), toy.y[toy.seen].numpy())


def test_the_estimator_predicts_unseen_classes_and_rejects(toy: Toy, model: SelectiveClassifier) -> None:
    x, y = toy.x[~toy.seen].numpy(), toy.y[~toy.seen].numpy()
    assert set(model.predict(x)) <= {16, 17, 18, 19} and model.score(x, y) > 0.5
    assert model.predict_proba(x).shape == (120, 4)
    for coverage in (0.1, 0.5, 1.0):
        accepted = model.accept(x, coverage=coverage)
        assert accepted.sum() == round(coverage * 120)
        assert coverage == 1 or model.confidence(x)[accepted].min() >= model.confidence(x)[~accepted].max()
    strict, lax = (model.accept(x, risk=risk) for risk in (0.05, 1.0))
    assert strict.sum() <= lax.sum() and not (strict & ~lax).any()
    table = model.risk_coverage(x, y)
    assert table["risk"][-1] == pytest.approx(np.mean(model.predict(x) != y))
    assert aurc(torch.from_numpy(model.confidence(x)), torch.from_numpy(model.predict(x) != y)) == pytest.approx(
        table["risk"].mean()
    )


def test_fitting_again_gives_the_same(toy: Toy, model: SelectiveClassifier) -> None:
    again = clone(model).fit(toy.x[toy.seen].numpy(), toy.y[toy.seen].numpy())
    x = toy.x[~toy.seen].numpy()
    assert np.array_equal(again.confidence(x), model.confidence(x)) and again.confidence_ == model.confidence_


def test_bad_input_is_one_clear_line(toy: Toy, model: SelectiveClassifier) -> None:
    x, y = toy.x[toy.seen].numpy(), toy.y[toy.seen].numpy()
    for asked, message in (
        ({"folds": 0}, "without folds nothing is chosen"),
        ({"generalised": False, "signatures": toy.attributes[:16]}, "no class is unseen"),
        ({"signatures": toy.attributes[:15]}, "class 15 has samples and no signature"),
    ):
        with pytest.raises(InputError) as caught:
            SelectiveClassifier(**{"signatures": toy.attributes} | asked).fit(x, y)
        assert message in str(caught.value) and "\n" not in str(caught.value)
    few = y < 3
    with pytest.raises(InputError, match="3 seen classes are too few"):
        SelectiveClassifier(toy.attributes).fit(x[few], y[few])
    for shares in ({}, {"coverage": 0.5, "risk": 0.1}, {"risk": 0.0}, {"coverage": 2.0}):
        with pytest.raises(InputError):
            model.accept(x, **shares)
    fixed = SelectiveClassifier(toy.attributes, folds=0, temperature=4.0, eta=0.0, n_steps=5).fit(x, y)
    with pytest.raises(InputError, match="known from folds alone"):
        fixed.accept(x, risk=0.1)
    assert selective.max_probability(torch.zeros(1, 2)).isfinite().all()


class OneHot(SelectiveClassifier):
    """What scikit-learn's checks know nothing of, signatures, is made up from y; nothing is unseen."""

    def _table(self, y: Any) -> tuple[Any, Any]:
        labels = np.unique(y)
        return labels, np.eye(max(2, len(labels)))[: len(labels)]


@parametrize_with_checks(
    [OneHot(generalised=True, folds=0, temperature=1.0, eta=0.5, lr=0.1, n_steps=60, weight_decay=0.0)]
)
def test_scikit_learns_checks(estimator: Any, check: Any) -> None:
    check(estimator)
