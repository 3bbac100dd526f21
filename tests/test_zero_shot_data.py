"""Attributes of classes: the tables of this book, AwA2's files, feature packages; features of patches."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import stream
from scipy.io import savemat

from dfkd_lib.data import ImageSet
from dfkd_lib.data.attributes import (
    animal_split,
    awa2_attributes,
    cifar100_animals,
    cifar100_attributes,
    digit_attributes,
    normalised,
    sibling_split,
    superclasses,
)
from dfkd_lib.data.feature_packages import feature_package
from dfkd_lib.data.patch_features import fit_patch_features, patch_features
from dfkd_lib.errors import DamagedFile, DataUnavailable, InputError
from dfkd_lib.methods.qfsl import QuasiFullySupervised, Settings, pseudo_unseen, train
from dfkd_lib.methods.zero_shot_tasks import choose_scaling, digit_tasks, package_tasks
from dfkd_lib.runtime import Runtime


def test_normalised_by_hand() -> None:
    values = torch.tensor([[0.0, 5.0, 1.0], [2.0, 5.0, 3.0], [4.0, 5.0, 8.0]])
    z = (values - values.mean(0)) / values.std(0, correction=0)
    z[:, 1] = 0
    assert torch.allclose(normalised(values), z / z.norm(dim=1, keepdim=True))
    assert torch.allclose(normalised(100 * values + 3), normalised(values), atol=1e-6)


def test_the_superclasses_are_twenty_fives() -> None:
    groups = superclasses()
    assert len(groups) == 20 and list(groups) == sorted(groups)
    assert all(len(members) == 5 and list(members) == sorted(members) for members in groups.values())
    assert len({name for members in groups.values() for name in members}) == 100


def test_the_table_by_hand_is_whole() -> None:
    table = cifar100_attributes("hand60")
    assert table.values.shape == (100, 60) and table.classes == tuple(sorted(table.classes))
    assert len(table.values.unique(dim=0)) == 100
    distances = torch.cdist(table.values, table.values, p=1) + 100 * torch.eye(100)
    assert int(distances.min()) == 1
    having = dict(zip(table.names, table.values.T, strict=True))
    known = {word for line in superclasses().values() for word in line}
    assert set(table.classes) == known
    assert [c for c, v in zip(table.classes, having["wings"], strict=True) if v] == ["bee", "beetle", "butterfly"]
    assert int(having["man_made"].sum()) == 30 and int(having["human"].sum()) == 5
    assert (table.values.sum(0) > 0).all()


def test_every_name_in_the_tables_is_a_class() -> None:
    from dfkd_lib.data import attributes

    known = set(cifar100_attributes().classes) | {line[:2] for line in attributes._SUPERCLASSES.strip().splitlines()}
    words = {w for line in attributes._ATTRIBUTES.strip().splitlines() for w in line.split(": ")[1].split()}
    assert words <= known


def test_kinds_of_attributes() -> None:
    assert cifar100_attributes("super20").values.sum(1).unique().tolist() == [1]
    both = cifar100_attributes()
    assert both.values.shape == (100, 80)
    assert torch.allclose(both.signatures().norm(dim=1), torch.ones(100))
    with pytest.raises(InputError, match="did you mean 'hand60'"):
        cifar100_attributes("hand6")


def test_sibling_splits_take_each_class_once() -> None:
    assert sibling_split(0)[:4] == ("beaver", "flatfish", "rose", "cup") and sibling_split(0)[-1] == "tractor"
    taken = [name for k in range(5) for name in sibling_split(k)]
    assert len(taken) == len(set(taken)) == 100
    with pytest.raises(InputError, match="five splits"):
        sibling_split(5)


def test_animal_splits_take_each_animal_once() -> None:
    assert animal_split(0) == ("beaver", "tiger", "cattle", "mouse")
    taken = [name for k in range(5) for name in animal_split(k)]
    assert len(taken) == 20 and tuple(sorted(taken)) == cifar100_animals("animals60").classes
    with pytest.raises(InputError, match="five splits"):
        animal_split(5)


def test_digits_have_designed_attributes() -> None:
    table = digit_attributes()
    assert table.values.shape == (10, 77) and len(table.names) == 77
    assert torch.allclose(table.signatures().norm(dim=1), torch.ones(10))
    assert torch.allclose(table.signatures()[:, :13].norm(dim=1), torch.full((10,), 0.5**0.5)), "two groups, one weight"
    assert digit_attributes("7-segment").values.sum(1).tolist() == [6, 2, 5, 5, 4, 5, 6, 3, 7, 6]
    assert table.of(("3", "1")).values.equal(table.values[[3, 1]])
    with pytest.raises(InputError, match="unknown class '11'"):
        table.of(("11",))


def awa2(folder: Path, **changed: str) -> Path:
    names = (
        "beaver dolphin otter seal leopard lion tiger wolf chimpanzee elephant fox raccoon skunk hamster mouse rabbit"
    )
    names += " squirrel blue+whale humpback+whale killer+whale grizzly+bear polar+bear ox cow"
    rows = [f"{i}.5 {100 - i} -1" for i, _ in enumerate(names.split())]
    written = {
        "classes.txt": "\n".join(f"  {i + 1}\t{name}" for i, name in enumerate(names.split())),
        "predicates.txt": "1\tblack\n2\twhite\n3\tnew+world\n",
        "predicate-matrix-continuous.txt": "\n".join(rows),
    }
    folder.mkdir(exist_ok=True)
    for name, text in (written | changed).items():
        (folder / name).write_text(text)
    return folder


def test_awa2_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    awa2(tmp_path / "awa2")
    monkeypatch.setenv("DFKD_DATA", str(tmp_path))
    table = awa2_attributes()
    assert table.names == ("black", "white", "new world") and "blue whale" in table.classes
    assert table.values[3].tolist() == [3.5, 97.0, 0.0], "a missing rating is 0"
    animals = cifar100_animals()
    assert len(animals.classes) == 20 and set(animals.classes) <= set(cifar100_attributes().classes)
    by_hand = cifar100_animals("animals60")
    assert by_hand.classes == animals.classes and by_hand.values.shape == (20, 60)
    with pytest.raises(InputError, match="hand60"):
        cifar100_animals("hand60")
    assert animals.values[animals.classes.index("whale"), 0] == pytest.approx(18.5), "the mean of three"
    assert animals.values[animals.classes.index("tiger"), 0] == 6.5


def test_awa2_files_that_are_absent_or_damaged(tmp_path: Path) -> None:
    with pytest.raises(DataUnavailable) as caught:
        awa2_attributes(tmp_path / "no")
    assert "classes.txt cannot be read" in str(caught.value) and "\n" not in str(caught.value)
    for name, text, message in (
        ("predicate-matrix-continuous.txt", "1 2 x", "cannot be read"),
        ("predicates.txt", "1 black", r"\[24, 3\] for 24 classes and 1 attributes"),
    ):
        with pytest.raises(DamagedFile, match=message):
            awa2_attributes(awa2(tmp_path / "awa2", **{name: text}))


def package(folder: Path, **changed: Any) -> Path:
    names = np.empty((3, 1), dtype=object)
    names[:, 0] = ["ant", "bee", "cow"]
    features = np.arange(24, dtype=np.float64).reshape(4, 6)
    images = {"features": features, "labels": np.array([[1], [1], [2], [2], [3], [3]], np.uint8)}
    splits = {
        "original_att": np.array([[10.0, -1.0, 30.0], [1.0, 2.0, 3.0]]), "allclasses_names": names,
        "trainval_loc": np.array([[1], [3]], np.uint16), "test_seen_loc": np.array([[2], [4]], np.uint16),
        "test_unseen_loc": np.array([[5], [6]], np.uint16),
    }  # fmt: skip
    for file, content in (("res101.mat", images), ("att_splits.mat", splits)):
        savemat(
            folder / file, {k: v for k, v in (content | {k: v for k, v in changed.items() if k in content}).items()}
        )
    return folder


def test_a_feature_package(tmp_path: Path) -> None:
    read = feature_package(package(tmp_path))
    assert read.features.shape == (6, 4) and read.features[1].tolist() == [1, 7, 13, 19]
    assert read.labels.tolist() == [0, 0, 1, 1, 2, 2] and read.attributes.classes == ("ant", "bee", "cow")
    assert read.attributes.values.tolist() == [[10, 1], [0, 2], [30, 3]]
    assert (read.trainval.tolist(), read.test_seen.tolist(), read.test_unseen.tolist()) == ([0, 2], [1, 3], [4, 5])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"labels": np.array([[1], [1], [2], [2], [3], [4]])}, "a label is outside 1..3"),
        ({"labels": np.array([[1], [1], [2], [2], [3]])}, "do not fit"),
        ({"trainval_loc": np.array([[1], [5]])}, "a class of test_unseen_loc is among the seen ones"),
        ({"test_unseen_loc": np.array([[0]])}, "a sample is outside 1..6"),
    ],
)
def test_a_feature_package_that_does_not_fit(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(DamagedFile, match=message):
        feature_package(package(tmp_path, **changed))


def test_a_feature_package_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataUnavailable, match=r"res101\.mat is not in"):
        feature_package(tmp_path)
    package(tmp_path)
    savemat(tmp_path / "res101.mat", {"labels": np.zeros((6, 1))})
    with pytest.raises(DamagedFile, match="has no 'features'"):
        feature_package(tmp_path)
    (tmp_path / "res101.mat").write_text("nothing")
    with pytest.raises(DamagedFile, match="cannot be read"):
        feature_package(tmp_path)


def coloured(n: int = 40, seed: int = 0, name: str = "toy") -> ImageSet:
    images = torch.randint(0, 256, (n, 3, 32, 32), generator=stream(seed), dtype=torch.uint8)
    return ImageSet(images, torch.zeros(n, dtype=torch.int64), classes=["one"], name=name, split="train")


def test_patch_features_are_fitted_to_the_source_alone() -> None:
    source = coloured()
    fitted = fit_patch_features(source, n_centroids=12, n_components=16)
    made = fitted(source)
    assert made.shape == (40, 16) and made.isfinite().all()
    assert torch.allclose(made.mean(0), torch.zeros(16), atol=1e-4), "standardised with the source's statistics"
    cov = made.T @ made
    assert torch.allclose(cov, torch.diag(cov.diag()), atol=1e-2 * float(cov.max())), "principal axes"
    assert (cov.diag().diff() <= 1e-3).all()
    assert torch.allclose(fitted.centroids.norm(dim=1), torch.ones(12), atol=1e-5)
    assert torch.allclose(fitted(source.take([3, 1])), made[[3, 1]], atol=1e-4), "an image by itself"
    with pytest.raises(InputError, match="cannot give 16 components"):
        fit_patch_features(source.take(10), n_components=16)


def test_patch_features_are_kept_and_do_not_depend_on_other_images() -> None:
    source = coloured(260)
    first = patch_features(source, {"test": coloured(5, 1)})
    again = patch_features(source, {"test": coloured(5, 1)})
    other = patch_features(source, {"test": coloured(6, 2)})
    assert first["source"].shape == (260, 256) and first["test"].shape == (5, 256)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert torch.equal(first["source"], other["source"]), "what is tested has no influence on the fit"


def rows_of(features: torch.Tensor) -> set[tuple[float, ...]]:
    return {tuple(row) for row in features.tolist()}


def test_digit_tasks_keep_pool_and_test_apart() -> None:
    one, other = digit_tasks(0, "all")
    assert int(one.target.sum()) == 2 and torch.equal(one.target, other.target)
    for task in (one, other):
        assert task.target[task.pool_labels].all() and task.target[task.test_unseen_labels].all()
        assert not task.target[task.source_labels].any() and not task.target[task.test_seen_labels].any()
        assert task.images is not None and len(task.images) == len(task.test_unseen)
        assert not rows_of(task.pool) & rows_of(task.test_unseen)
        assert not rows_of(task.source) & rows_of(task.test_seen)
        assert torch.allclose(task.source.mean(0), torch.zeros(64), atol=1e-4), "centred by the source alone"
        assert float(task.source.square().mean()) == pytest.approx(1, abs=1e-4)
        assert task.seen_labels.unique().tolist() == list(range(8))
    assert rows_of(one.pool) == rows_of(other.test_unseen), "the halves exchange their roles"
    assert not torch.equal(digit_tasks(1, "all")[0].target, one.target)


def test_a_pool_of_a_given_make_up() -> None:
    task = digit_tasks(0, "all")[0]
    small = task.with_pool(5)
    assert small.pool_labels.bincount(minlength=10)[small.target].tolist() == [5, 5]
    mixed = task.with_pool(30, 0.4)
    strangers = ~mixed.target[mixed.pool_labels]
    assert (int((~strangers).sum()), int(strangers.sum())) == (60, 40)
    assert rows_of(mixed.pool[strangers]) <= rows_of(task.source)


def test_equalised_features_have_like_deviations_and_the_scale_of_before() -> None:
    task = digit_tasks(1, "all")[0]
    assert task.equalised(0.0) is task
    varied = task.source.std(0) > 0.01
    spreads = [task.equalised(power).source[:, varied].std(0) for power in (0.0, 0.5, 1.0)]
    assert float(spreads[2].max() / spreads[2].min()) == pytest.approx(1, abs=1e-3)
    assert [float(s.log().std()) for s in spreads] == sorted((float(s.log().std()) for s in spreads), reverse=True)
    halfway = task.equalised(0.5)
    assert float(halfway.source.square().mean()) == pytest.approx(1, rel=1e-4)
    ratio = task.test_unseen[:, varied] / task.source[:, varied].std(0).sqrt() / halfway.test_unseen[:, varied]
    assert float(ratio.nanmean()) == pytest.approx(float(ratio.nanmedian()), rel=1e-3), "one factor for all"


def test_the_scaling_is_chosen_without_pool_and_test_images() -> None:
    task = digit_tasks(1, "all")[0]
    phi = task.attributes.signatures()[~task.target]
    folds = list(pseudo_unseen(task.seen_labels, 2, 1, 0))
    settings = Settings(lam=1.0, n_steps=40, batch_size=64, lr=0.01, dropout=0.0)
    runtime = Runtime(torch.device("cpu"))
    nothing = torch.full_like(task.pool, torch.nan)
    blind = replace(task, pool=nothing, test_unseen=nothing, test_seen=nothing, test_unseen_labels=task.pool_labels)
    found = [choose_scaling(t, phi, folds, (0.0, 1.0), (2.0, 8.0), settings, runtime) for t in (task, blind)]
    assert found[0] == found[1]
    (pair, means) = found[0]
    assert len(means) == 4 and means[pair] == max(means.values())
    assert choose_scaling(task, phi, [], (0.5,), (3.0,), settings, runtime) == ((0.5, 3.0), {})


def test_a_package_becomes_two_tasks(tmp_path: Path) -> None:
    one, other = package_tasks(package(tmp_path))
    assert one.target.tolist() == [False, False, True]
    assert (len(one.source), len(one.test_seen), len(one.pool), len(one.test_unseen)) == (2, 2, 1, 1)
    assert torch.equal(one.pool, other.test_unseen)


def test_the_bias_and_its_cure_on_digits() -> None:
    task = digit_tasks(1, "all")[0]
    found = {}
    for lam in (0.0, 1.0):
        settings = Settings(lam=lam, warm_up=100, n_steps=300, batch_size=64, lr=0.01, dropout=0.0, scale=5.0)
        method = QuasiFullySupervised(
            task.source, task.source_labels, task.pool, task.attributes.signatures(), task.target, settings,
            Runtime(torch.device("cpu")),
        )  # fmt: skip
        found[lam] = task.measures(train(method, 300).scores)
    assert found[1.0]["MCA_t"] > found[0.0]["MCA_t"] + 0.3 and found[1.0]["H"] > found[0.0]["H"]
