"""The zoo: targets by hand, readouts that are fair to every source, a cache that is used, layers that stay frozen."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import same, snapshot, stream
from torch import Tensor, nn

from dfkd_lib import data
from dfkd_lib.data import ImageSet
from dfkd_lib.data.attributes import superclasses
from dfkd_lib.errors import DamagedFile, DataUnavailable, InputError
from dfkd_lib.locations import data_root
from dfkd_lib.measures import ranking
from dfkd_lib.methods import attribution, depara, depara_layers, zoo
from dfkd_lib.methods.depara_layers import PrefixTransfer, font_digits, layered, sketches
from dfkd_lib.methods.zoo import Readout, Sources, Training, member, read_out, transfers
from dfkd_lib.methods.zoo_tasks import (
    CLASSES,
    COLOURS,
    IMAGE,
    PIXELS,
    Grey,
    Heads,
    Task,
    colour_clusters,
    harris,
    moments,
    opponents,
    sobel,
    tasks,
    without_centre,
)  # fmt: skip
from dfkd_lib.reproduction import papers
from dfkd_lib.runtime import Runtime
from dfkd_lib.training.fit import fit

QUICK = Training(n_steps=5, batch_size=16)
SHORT = Readout(n_images=30, n_repeats=2, n_steps=10, batch_size=16, width=8)


def digits(n: int = 120) -> ImageSet:
    return data.load("digits", "train").take(n)


def batch(channels: int = 1, side: int = 8, n: int = 5) -> tuple[Tensor, Tensor]:
    return torch.rand(n, channels, side, side, generator=stream(2)), torch.arange(n) % 10


@pytest.mark.parametrize(("dataset", "channels", "side"), [("digits", 1, 8), ("mnist", 1, 28), ("cifar10", 3, 32)])
def test_every_task_makes_what_it_says(dataset: str, channels: int, side: int) -> None:
    x, y = batch(channels, side)
    for task in tasks(dataset, channels).values():
        given, target = task.make(x, y, stream())
        again, _ = task.make(x, y, stream())
        assert given.shape == x.shape and torch.equal(given, again), task.name
        if task.kind == CLASSES:
            assert target.shape == (5,) and target.dtype == torch.int64 and target.max() < task.n_outputs
        elif task.kind == PIXELS:
            assert target.shape == (5, side, side) and target.dtype == torch.int64 and target.max() < task.n_outputs
        else:
            assert target.shape == ((5, task.n_outputs, side, side) if task.kind == IMAGE else (5, task.n_outputs))
    assert torch.equal(x, batch(channels, side)[0]), "images are left as they are"


def test_targets_by_hand() -> None:
    step = torch.zeros(1, 1, 8, 8)
    step[..., 4:] = 1.0
    edge = sobel(step)
    assert torch.equal(edge[0, 0].amax(0), torch.tensor([0.0, 0, 0, 1, 1, 0, 0, 0]))
    corner = torch.zeros(1, 1, 8, 8)
    corner[..., 4:, 4:] = 1.0
    at = int(harris(corner).flatten().argmax())
    assert divmod(at, 8) in [(3, 3), (3, 4), (4, 3), (4, 4)] and float(harris(corner).abs().max()) == 1.0
    upright, slanted = step, torch.ones(1, 1, 8, 8).tril()
    assert float(harris(upright)[0, 0, 4, 4]) == float(harris(slanted)[0, 0, 4, 4]) == -1.0, "an edge is no corner"
    dot = torch.zeros(1, 1, 5, 5)
    dot[0, 0, 0, 4] = 1.0
    assert moments(dot)[0].tolist() == pytest.approx([1.0, -1.0, 1 / 25])
    assert without_centre(torch.ones(1, 1, 8, 8)).sum() == 64 - 16


def test_targets_of_colours_by_hand() -> None:
    colours = torch.tensor(COLOURS).T[None, :, None].expand(2, 3, 5, 4)
    assert torch.equal(colour_clusters(colours + 0.01), torch.arange(4).expand(2, 5, 4))
    yellow, green, grey = (torch.tensor(c)[None, :, None, None] for c in ([1.0, 1, 0], [0.0, 1, 0], [0.4, 0.4, 0.4]))
    assert [opponents(c).flatten().tolist() for c in (yellow, green, grey)] == [[0, 1], [-1, 0.5], [0, 0]]
    assert torch.allclose(Grey()(green), torch.full((1, 3, 1, 1), 0.587))


def test_classes_of_cifar100_are_its_superclasses() -> None:
    task = tasks("cifar10", 3)["class-coarse"]
    names = sorted(name for members in superclasses().values() for name in members)
    _, coarse = task.make(torch.zeros(100, 3, 1, 1), torch.arange(100), stream())
    for name, group in zip(names, coarse.tolist(), strict=True):
        assert name in list(superclasses().values())[group]


def test_what_was_done_to_an_image_can_be_undone() -> None:
    x, y = batch()
    known = tasks("digits", 1)
    turned, k = known["rotation"].make(x, y, stream())
    assert torch.equal(torch.stack([torch.rot90(t, -int(n), (1, 2)) for t, n in zip(turned, k, strict=True)]), x)
    mirrored, m = known["flip"].make(x, y, stream())
    assert torch.equal(torch.where(m.bool()[:, None, None, None], mirrored.flip(3), mirrored), x)
    shuffled, _ = known["jigsaw"].make(x, y, stream())
    assert torch.allclose(shuffled.flatten(1).sort(1).values, x.flatten(1).sort(1).values)


def test_heads_side_by_side_learn_as_each_would_alone(float32: Runtime) -> None:
    images, test = digits(), digits(40)
    networks = {name: member(name, digits(80), QUICK, float32)[0] for name in ("rotation", zoo.RANDOM)}

    def scores(task: Task, of: dict[str, nn.Module]) -> Tensor:
        sources = Sources(of, float32)
        tested = sources.see(test, 0, len(test), task, stream())
        return read_out(sources, task, images, tested, SHORT, float32)[0]

    for name in ("class-all", "autoencoder"):
        task = tasks("digits", 1)[name]
        alone = [scores(task, {n: e}) for n, e in networks.items()]
        assert torch.allclose(scores(task, networks), torch.cat(alone), atol=1e-3)


def test_neither_size_nor_offset_of_a_representation_matters_to_its_readout(float32: Runtime) -> None:
    class Moved(nn.Module):
        def __init__(self, network: nn.Module) -> None:
            super().__init__()
            self.network = network

        def forward(self, x: Tensor) -> Tensor:
            z = self.network(x)
            return 8 * z + 4 * torch.linspace(-1, 1, z[0].numel()).view(z.shape[1:])

    network, _ = member("rotation", digits(80), QUICK, float32)
    sources, task = Sources({"it": network, "moved": Moved(network)}, float32), tasks("digits", 1)["class-all"]
    tested = sources.see(digits(40), 0, 40, task, stream())
    _, (as_it_is, moved) = read_out(sources, task, digits(), tested, SHORT, float32)
    assert torch.allclose(as_it_is, moved, atol=1e-3) and as_it_is.std() > 0.01


def test_images_as_they_are_are_seen_once_and_altered_ones_each_time(float32: Runtime) -> None:
    passes = []
    network, _ = member(zoo.RANDOM, digits(80), QUICK, float32)
    network.register_forward_hook(lambda *_: passes.append(1))
    sources, known = Sources({"it": network}, float32), tasks("digits", 1)
    for name, n in (("class-all", 1), ("moments", 1), ("rotation", 2), ("denoise", 3), ("autoencoder", 3)):
        z, y = sources.see(digits(), 0, 30, known[name], stream())
        assert len(passes) == n and z.shape == (1, 30, 16, 4, 4) and len(y) == 30
    sources.see(digits(), 30, 30, known["class-all"], stream())
    assert len(passes) == 4


def test_a_drawing_head_draws_each_place() -> None:
    heads = Heads(2, tasks("digits", 1)["autoencoder"], (16, 4, 4), 8, 8)
    z = torch.rand(2, 3, 16, 4, 4, generator=stream())
    out = heads(z)
    moved = z.clone()
    moved[0, 0, :, 1, 2] += 1
    assert out.shape == (2, 3, 1, 8, 8)
    changed = (heads(moved) != out).nonzero().tolist()
    assert changed and all(c[:2] == [0, 0] and c[3] in (2, 3) and c[4] in (4, 5) for c in changed)


def test_a_member_is_trained_once_and_found_again(float32: Runtime) -> None:
    first, seconds = member("denoise", digits(), QUICK, float32)
    again, recorded = member("denoise", digits(), QUICK, float32)
    assert seconds == recorded > 0 and same(snapshot(first), snapshot(again))
    assert not list((zoo.cache_root() / "zoo").glob("*.partial"))
    assert not again.training and not any(p.requires_grad for p in again.parameters())
    other, _ = member("denoise", digits(), Training(n_steps=6, batch_size=16), float32)
    assert not same(snapshot(first), snapshot(other)), "another recipe is another member"


def test_a_training_that_was_cut_short_goes_on_to_the_same_end(
    float32: Runtime, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole, _ = member("denoise", digits(), QUICK, float32)
    monkeypatch.setenv("DFKD_CACHE", str(tmp_path))
    monkeypatch.setattr(zoo, "fit", partial(fit, checkpoint_every=0.0))
    step, steps = zoo.TaskTraining.step, []

    def killed(method: zoo.TaskTraining) -> dict[str, Tensor]:
        steps.append(method.steps)
        if len(steps) == 4:
            raise KeyboardInterrupt
        return step(method)

    monkeypatch.setattr(zoo.TaskTraining, "step", killed)
    with pytest.raises(KeyboardInterrupt):
        member("denoise", digits(), QUICK, float32)
    resumed, _ = member("denoise", digits(), QUICK, float32)
    assert steps == [0, 1, 2, 3, 3, 4] and same(snapshot(whole), snapshot(resumed))


def test_members_and_controls_begin_differently(float32: Runtime) -> None:
    untrained, seconds = member(zoo.RANDOM, digits(), QUICK, float32)
    assert seconds == 0
    weights = [member(n, digits(), QUICK, float32)[0][0].weight for n in ("class-all", zoo.SECOND_SEED, zoo.SHUFFLED)]
    weights.append(untrained[0].weight)
    for i, a in enumerate(weights):
        for b in weights[:i]:
            assert float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].abs()) < 0.5


def test_a_damaged_member_is_named(float32: Runtime) -> None:
    member("flip", digits(), QUICK, float32)
    (path,) = (zoo.cache_root() / "zoo").glob("digits-flip-*.safetensors")
    Path(path).write_bytes(path.read_bytes()[:-40])
    with pytest.raises(DamagedFile, match="digits-flip"):
        member("flip", digits(), QUICK, float32)


def test_transfers_are_measured_once_on_other_labels_each(float32: Runtime) -> None:
    networks = {name: member(name, digits(), QUICK, float32)[0] for name in ("class-all", "autoencoder", zoo.RANDOM)}
    pool, test = data.load("digits", "train").take(range(200, 300)), digits(40)
    found = transfers(networks, ["class-all", "autoencoder"], pool, test, SHORT, float32)
    assert found.scores.shape == (2, 2, 3) and not torch.equal(found.scores[0], found.scores[1])
    assert [tuple(losses.shape) for losses in found.losses] == [(3, 80), (3, 80)]
    assert transfers(networks, ["class-all", "autoencoder"], pool, test, SHORT, float32).seconds == found.seconds
    with pytest.raises(InputError, match="need 60 images, and there are 50"):
        transfers(networks, ["class-all"], pool.take(50), test, SHORT, float32)
    with pytest.raises(InputError, match="unknown task 'colour'"):
        transfers(networks, ["colour"], pool, test, SHORT, float32)


def cifar(name: str, n_classes: int, n: int = 80) -> ImageSet:
    """Coloured noise on disk where the reader of CIFAR looks; the images that come first in `train`."""
    folder, random = data_root() / name, np.random.RandomState(n_classes)
    folder.mkdir(parents=True)
    for split in ("train", "test"):
        np.savez(
            folder / f"{split}.npz", images=random.randint(0, 256, (n, 32, 32, 3), np.uint8),
            labels=np.arange(n) % n_classes, classes=np.array([str(c) for c in range(n_classes)]),
        )  # fmt: skip
    return data.load(name, "train")


def test_tasks_of_colours_and_of_another_dataset(
    float32: Runtime, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DFKD_DATA", str(tmp_path / "data"))
    images, recipe = cifar("cifar10", 10), Training("residual", n_steps=2, batch_size=8, head_width=8)
    monkeypatch.setattr("dfkd_lib.data.sources.unreachable", lambda url: "no network")
    with pytest.raises(DataUnavailable, match="cifar100: no train"):
        member("class-coarse", images.take(40), recipe, float32)
    fine = cifar("cifar100", 100)
    names = ["class-fine", "class-coarse", "segment2d", "colourise"]
    networks = {name: member(name, images.take(40), recipe, float32)[0] for name in names}
    task = tasks("cifar10", 3)["class-fine"]
    assert torch.equal(task.images_of(images.take(40)).labels, fine.take(40).labels)
    assert torch.equal(task.images_of(images.take(40), last=True).labels, fine.take(range(40, 80)).labels)
    x = torch.rand(2, 3, 32, 32, generator=stream())
    assert torch.allclose(networks["colourise"](x), networks["colourise"](Grey()(x)), atol=1e-5)
    test = data.load("cifar10", "test").take(20)
    readout = Readout(n_images=20, n_repeats=1, n_steps=2, batch_size=8, width=4)
    found = transfers(networks, names[:3], images.take(range(40, 60)), test, readout, float32)
    assert found.scores.shape == (1, 3, 4) and [tuple(losses.shape) for losses in found.losses] == [(4, 20)] * 3
    assert (found.scores >= 0).all() and (found.scores <= 1).all()


@pytest.mark.parametrize(
    ("act", "said"),
    [
        (lambda rt: member("clas-all", digits(), QUICK, rt), "unknown member of the zoo.*did you mean 'class-all'"),
        (lambda rt: Training(encoder="vgg"), "unknown encoder 'vgg'"),
        (lambda rt: Readout(n_steps=0), "n_steps must be above 0"),
        (lambda rt: tasks("svhn", 3), "unknown dataset of a zoo 'svhn'"),
    ],
)
def test_unknown_names_are_refused(float32: Runtime, act: object, said: str) -> None:
    assert callable(act)
    with pytest.raises(InputError, match=said):
        act(float32)


def test_groups_of_tasks_come_apart_on_digits(float32: Runtime) -> None:
    """The published tree in small: networks that draw are nearer to each other than to networks that name."""
    low, high = ["autoencoder", "denoise", "inpaint"], ["group-binary", "attribute", "class-all"]
    recipe = Training(n_steps=120)
    images = data.load("digits", "train")
    networks = {n: member(n, images.take(800), recipe, float32)[0] for n in [*low, *high, zoo.RANDOM]}
    x = images.batch(range(1200, 1300))[0]
    names, s = list(networks), attribution.affinity_matrix([attribution.explain(e, x).maps for e in networks.values()])
    within = torch.stack([s[i, j] for i in range(3) for j in range(i)]).mean()
    assert within > s[:3, 3:6].mean()
    first = ranking.ranked(s[names.index("class-all")], names.index("class-all"))[0]
    assert names[first] != zoo.RANDOM


def chain(seed: int = 0, batch_norm: bool = True) -> nn.Sequential:
    torch.manual_seed(seed)
    return layered((4, depara_layers.POOL, 6), 8, (1, 8, 8), 10, batch_norm)


def transferred(depth: int, n_steps: int = 6, source: nn.Sequential | None = None) -> PrefixTransfer:
    settings = depara_layers.Settings(n_steps, 16)
    runtime = Runtime.choose("cpu", "float32")
    return PrefixTransfer(source or chain(), chain(1), depth, digits(40), settings, runtime)


def test_layers_of_a_chain() -> None:
    network = chain()
    assert network(torch.zeros(2, 1, 8, 8)).shape == (2, 10) and len(network) == 4
    assert depara.layers_of(network, torch.zeros(1, 1, 8, 8)) == ["0.0", "1.0", "2.1"]


@pytest.mark.parametrize("depth", [0, 1, 2, 3])
def test_frozen_layers_stay_bit_for_bit_and_the_rest_learns(depth: int) -> None:
    source = chain()
    kept, method = snapshot(source[:depth]), transferred(depth, source=source)
    fit(method, 6, name="transfer", progress=False)
    assert same(kept, snapshot(method.network[:depth])) and same(snapshot(source), snapshot(chain()))
    assert not same(snapshot(chain(1)[depth:]), snapshot(method.network[depth:]))


def test_every_depth_begins_with_the_same_fresh_weights() -> None:
    fresh = chain(1)
    for depth in (1, 0, 2):
        method = transferred(depth)
        assert same(snapshot(method.network[depth:]), snapshot(fresh[depth:]))
        fit(method, 6, name="transfer", progress=False)


def test_depth_nought_owes_nothing_to_the_source() -> None:
    ends = []
    for source in (chain(0), chain(7)):
        method = transferred(0, source=source)
        fit(method, 6, name="transfer", progress=False)
        ends.append(snapshot(method.network))
    assert same(*ends)
    with pytest.raises(InputError, match=r"depth must lie in 0\.\.3"):
        transferred(4)


def test_drawn_domains() -> None:
    drawn = font_digits(30, 28, 4, seed=1)
    assert torch.equal(drawn.images, font_digits(30, 28, 4, seed=1).images) and drawn.n_classes == 10
    lit = (drawn.images > 0).any(3).squeeze(1)  # rows
    assert not lit[:, :4].any() and not lit[:, 24:].any() and lit[:, 4:24].float().mean() > 0.95
    assert drawn.images.float().mean() < 128
    lines = sketches(drawn)
    assert lines.images.shape == drawn.images.shape and lines.images.float().mean() > 128
    step = torch.zeros(1, 1, 8, 8, dtype=torch.uint8)
    step[..., 4:] = 200
    (drawn_step,) = sketches(
        ImageSet(step, torch.zeros(1, dtype=torch.int64), classes=["step"], name="step", split="train")
    ).images
    assert torch.equal(drawn_step[0, 0], torch.tensor([255, 255, 255, 0, 0, 255, 255, 255], dtype=torch.uint8))


def test_the_published_layers_are_copied_rightly() -> None:
    """Rank correlations over the 15 layers, derived from the printed figures, each in hundredths."""
    wanted = {
        ("ImageNet", "10 %"): (0.41, 0.77, 0.88, 0.79),
        ("ImageNet", "1 %"): (0.33, 0.83, 0.93, 0.85),
        ("synthetic", "10 %"): (0.75, 0.43, 0.93, 0.50),
        ("synthetic", "1 %"): (0.11, 0.99, 0.51, 0.99),
    }
    rows = papers.paper("depara").table("layers").rows

    def row(name: str) -> Tensor:
        return torch.tensor([cell[0] for cell in rows[name].values() if cell]).double()

    for (source, share), correlations in wanted.items():
        v, e, reached = row(f"{source}, V"), row(f"{source}, E"), row(f"{source}, accuracy with {share}")
        for together, rho in zip((v, e, v + e, v + 10 * e), correlations, strict=True):
            assert ranking.spearman(together.mul(100).round(), reached) == pytest.approx(rho, abs=0.006)


def test_published_precisions_are_whole_counts() -> None:
    """P@K is a multiple of 1 / (18 K); read off a plot, to about one count."""
    for card in ("attribution-maps", "depara"):
        table = papers.paper(card).tables[0]
        for name, cells in table.rows.items():
            for key, cell in cells.items():
                count = cell[0] * 18 * int(key[1:]) if cell else 0.0
                assert name == "chance" or abs(count - round(count)) < 0.1, (name, key)
