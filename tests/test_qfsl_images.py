"""QFSL on images: one pass for both kinds, a frozen or slowly learning embedding, no label of an unseen class."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import stream
from torch import Tensor, nn

from dfkd_lib.data import ImageSet
from dfkd_lib.data.attributes import normalised
from dfkd_lib.errors import InputError
from dfkd_lib.methods.qfsl import PSEUDO_LABELS, Settings, train
from dfkd_lib.methods.qfsl_images import QFSLOnImages, embedding
from dfkd_lib.runtime import Runtime

CPU = Runtime(torch.device("cpu"))
TARGET = torch.tensor([False, False, False, True, True])
PHI = normalised(torch.tensor([[1, 0, 0, 1], [0, 1, 0, 1], [0, 0, 1, 0], [1, 1, 0, 0], [0, 1, 1, 1]]).float())
QUICK = Settings(lam=1.0, warm_up=5, n_steps=12, batch_size=16, lr=0.05, dropout=0.1, scale=5.0)


def images(classes: list[int], n: int = 24, seed: int = 0) -> tuple[ImageSet, Tensor]:
    """Each class is a colour with noise; the labels are columns."""
    colours = torch.rand(5, 3, generator=stream(7)) * 200
    labels = torch.tensor(classes).repeat(n)
    noise = torch.randint(0, 56, (len(labels), 3, 8, 8), generator=stream(seed))
    pixels = (colours[labels][:, :, None, None] + noise).to(torch.uint8)
    return ImageSet(pixels, None, name="toy", split="train"), labels


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, 2), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)
    )


def method(rate: float = 0.1, settings: Settings = QUICK, unlabelled: ImageSet | None = None) -> QFSLOnImages:
    source, labels = images([0, 1, 2])
    pool = unlabelled or images([3, 4], seed=1)[0]
    theta = embedding(network(), source, CPU)
    return QFSLOnImages(source, labels, pool, theta, PHI, TARGET, settings, CPU, rate=rate)


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def test_features_are_centred_on_the_source() -> None:
    source, _ = images([0, 1, 2])
    own = network()
    before = weights(own)
    x = embedding(own, source, CPU).eval()(source.batch(range(len(source)))[0])
    assert x.shape == (72, 6) and float(x.detach().mean(0).abs().max()) < 1e-4
    assert float(x.detach().square().mean()) == pytest.approx(1, rel=1e-4)
    assert all(torch.equal(value, before[name]) for name, value in own.state_dict().items())


def test_a_frozen_embedding_keeps_every_bit_and_a_learning_one_does_not() -> None:
    for rate in (0.0, 0.1):
        made = method(rate)
        theta, bridge = weights(made.theta), weights(made.network)
        train(made, 4)
        changed = {name for name, value in made.theta.state_dict().items() if not torch.equal(value, theta[name])}
        if rate:
            assert {"network.0.weight", "network.1.running_mean"} <= changed
            assert not changed & {"centre", "spread", "network.5.weight"}, "the classifier has no part in it"
        else:
            assert not changed
        assert not torch.equal(made.network.bridge.weight, bridge["bridge.weight"])
        assert torch.equal(made.network.phi, bridge["phi"])


def test_the_embedding_learns_at_a_share_of_the_rate() -> None:
    made = method(0.1)
    made.step()
    bridge, theta = (group["lr"] for group in made.optimizer.param_groups)
    assert bridge == pytest.approx(0.05) and theta == pytest.approx(0.005)


def test_both_kinds_of_images_share_one_pass_and_its_statistics() -> None:
    made = method()
    seen: list[int] = []
    made.theta.network[1].register_forward_hook(lambda layer, inputs, out: seen.append(len(inputs[0])))
    made.step()
    assert seen == [2 * QUICK.batch_size]


def test_labels_of_unseen_classes_cannot_enter() -> None:
    source, labels = images([0, 1, 2])
    pool, secret = images([3, 4], seed=1)
    labelled = [
        ImageSet(pool.images, of, name="toy", split="train", classes=tuple("01234")) for of in (secret, 7 - secret)
    ]
    outcomes = [weights(train(method(unlabelled=pool_of), 4).theta) for pool_of in (pool, *labelled)]
    for other in outcomes[1:]:
        assert all(torch.equal(value, other[name]) for name, value in outcomes[0].items())
    theta = embedding(network(), source, CPU)
    with pytest.raises(InputError, match="of a target class"):
        QFSLOnImages(source, labels + 1, pool, theta, PHI, TARGET, QUICK, CPU)


def test_bad_input_is_one_clear_line() -> None:
    source, labels = images([0, 1, 2])
    theta = embedding(network(), source, CPU)
    with pytest.raises(InputError, match="pass some, or set lam to 0"):
        QFSLOnImages(source, labels, None, theta, PHI, TARGET, QUICK, CPU)
    with pytest.raises(InputError, match="rate must be 0 or more"):
        method(-0.1)
    with pytest.raises(InputError, match="use QuasiFullySupervised"):
        method(settings=Settings(target_loss=PSEUDO_LABELS))


def test_unlabelled_images_cure_the_bias_of_an_embedding_that_learns() -> None:
    test, _ = images([3, 4], seed=2)
    mass = {}
    for lam in (0.0, 1.0):
        made = train(method(settings=Settings(lam=lam, n_steps=40, batch_size=16, lr=0.05, dropout=0.0, scale=5.0)), 40)
        mass[lam] = float(made.scores(test).softmax(1)[:, TARGET].sum(1).mean())
    assert mass[1.0] > mass[0.0] + 0.1


def test_a_restored_method_goes_on_as_it_would_have() -> None:
    made, other = method(), method()
    for _ in range(3):
        made.step()
    state = copy.deepcopy(made.state_dict())
    expected = [made.step()["classification"] for _ in range(2)]
    other.load_state_dict(state)
    assert torch.equal(torch.stack(expected), torch.stack([other.step()["classification"] for _ in range(2)]))
