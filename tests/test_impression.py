"""The verifiable properties of the reconstructed impression space."""

from __future__ import annotations

import copy
import itertools
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import classifier
from torch import Tensor, nn

from dfkd_lib import data, models
from dfkd_lib.errors import InputError
from dfkd_lib.measures.image_quality import psnr, ssim
from dfkd_lib.methods import impression, impression_space, impression_stages
from dfkd_lib.methods.impression import Decoding, Settings, Template, decode
from dfkd_lib.methods.inversion import batch_norm_loss
from dfkd_lib.models.imagenet import imagenet_vgg
from dfkd_lib.runtime import Runtime
from dfkd_lib.taps import batch_norm_layers, tapped
from dfkd_lib.teachers import RECIPES, train_or_load

ALL_KINDS = ("full", "grid-2", "stat", "gram")


def template(runtime: Runtime, seed: int = 0) -> Template:
    torch.manual_seed(seed)
    network = nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(),
        nn.Conv2d(6, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
    )  # fmt: skip
    network(torch.rand(64, 1, 8, 8))  # running statistics that are not the initial ones
    return Template(network, ("2", "5", impression.EMBEDDING), runtime)


def images(n: int = 4, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_an_images_own_impression_has_no_loss_and_no_gradient(float64, kind):
    t, x = template(float64), images(dtype=torch.float64)
    own = {name: i.detach() for name, i in t.encode(x, kind).items()}
    pixels = x.clone().requires_grad_()
    errors = impression.relative_errors(t.encode(pixels, kind), own)
    (gradient,) = torch.autograd.grad(errors.sum(), pixels)
    assert torch.count_nonzero(errors) == 0 and torch.count_nonzero(gradient) == 0
    stayed = decode(t, own, x, Settings(kind=kind, steps=3, tv=0), float64)
    assert torch.equal(stayed.images, x) and torch.equal(stayed.pixels[0], x)


def test_only_the_pixels_change(float32):
    t = template(float32)
    before = copy.deepcopy(t.network.state_dict())
    decoding = decode(t, t.encode(images()), images(seed=1), Settings(steps=5), float32)
    assert all(torch.equal(value, before[name]) for name, value in t.network.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in t.network.parameters())
    assert not any(module.training for module in t.network.modules())
    assert decoding.pixels[0].grad is not None
    assert not torch.equal(decoding.images, images(seed=1))


def test_a_template_in_train_mode_is_refused(float32):
    t = template(float32)
    t.network.train()
    with pytest.raises(InputError, match="eval"):
        t.encode(images())


def test_grids_lie_between_the_channel_mean_and_everything():
    z = torch.rand(3, 5, 4, 4, dtype=torch.float64)
    assert torch.equal(impression.summarise(z, "grid-4"), impression.summarise(z, "full"))
    assert torch.equal(impression.summarise(z, "grid-9"), impression.summarise(z, "full"))
    assert torch.allclose(impression.summarise(z, "grid-1"), impression.summarise(z, "stat")[:, :5])
    one = torch.rand(3, 5, 1, 1)
    assert torch.equal(impression.summarise(one, "stat"), impression.summarise(one, "full"))


def test_stat_and_gram_forget_where_things_are():
    z = torch.rand(2, 5, 3, 3, dtype=torch.float64)
    shuffled = z.flatten(2)[..., torch.randperm(9)].view_as(z)
    for kind in ("stat", "gram"):
        assert torch.allclose(impression.summarise(z, kind), impression.summarise(shuffled, kind))
    assert not torch.allclose(impression.summarise(z, "full"), impression.summarise(shuffled, "full"))
    diagonal = impression.summarise(z, "gram").view(2, 5, 5).diagonal(dim1=1, dim2=2)
    flat = z.flatten(2)
    assert torch.allclose(diagonal, flat.mean(2) ** 2 + flat.var(2, correction=0))


def test_a_constant_channel_has_a_finite_gradient():
    z = torch.ones(1, 2, 3, 3, requires_grad=True)
    (gradient,) = torch.autograd.grad(impression.summarise(z, "stat").sum(), z)
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize(("stride", "padding"), [(1, 1), (2, 1), (1, 0)])
def test_the_gradient_of_a_linear_stage_paints_its_filters(stride, padding):
    filters, x = torch.randn(2, 1, 3, 3, dtype=torch.float64), images(2, dtype=torch.float64)
    t = F.conv2d(x, filters, stride=stride, padding=padding)
    pixels = torch.zeros_like(x, requires_grad=True)
    loss = 0.5 * (F.conv2d(pixels, filters, stride=stride, padding=padding) - t).square().sum()
    (gradient,) = torch.autograd.grad(loss, pixels)
    assert torch.allclose(gradient, -impression_stages.paint(t, filters, 8, stride=stride, padding=padding), atol=1e-12)


def test_landweber_ends_at_the_pseudo_inverse():
    torch.manual_seed(0)
    filters, x = torch.randn(1, 1, 3, 3, dtype=torch.float64), torch.rand(1, 1, 6, 6, dtype=torch.float64)
    t = F.conv2d(x, filters, stride=2, padding=1)
    iterates = impression_stages.landweber(t, filters, 6, 4000, stride=2)
    units = torch.eye(36, dtype=torch.float64).view(-1, 1, 6, 6)
    matrix = F.conv2d(units, filters, stride=2, padding=1).flatten(1).T
    exact = (torch.linalg.pinv(matrix) @ t.flatten()).view_as(x)
    assert torch.allclose(iterates[-1], exact, atol=1e-10)
    errors = [float((F.conv2d(i, filters, stride=2, padding=1) - t).norm()) for i in iterates]
    assert all(later <= earlier + 1e-12 for earlier, later in itertools.pairwise(errors))


def test_images_of_a_batch_are_decoded_as_if_alone(float64):
    t, x, start = template(float64), images(3, dtype=torch.float64), images(3, seed=1, dtype=torch.float64)
    settings = Settings(steps=8)
    together = decode(t, t.encode(x), start, settings, float64).images
    for i in range(3):
        alone = decode(t, t.encode(x[i : i + 1]), start[i : i + 1], settings, float64).images
        assert torch.allclose(alone[0], together[i], atol=1e-9)


def test_decoded_images_are_the_best_iterates_within_range(float32):
    t, start = template(float32), images(seed=1)
    settings = Settings(steps=12, lr=0.3)
    decoding = Decoding(t, t.encode(images()), start, settings, float32)
    losses = [float(decoding.step()["loss"]) for _ in range(settings.steps)]
    assert float(decoding.loss.mean()) <= min(losses) + 1e-6
    assert decoding.images.shape == start.shape and decoding.images.dtype == start.dtype
    assert float(decoding.images.min()) >= 0 and float(decoding.images.max()) <= 1
    errors = impression.relative_errors(t.encode(decoding.images), decoding.target).sum(1)
    expected = errors + settings.tv * impression.roughness(decoding.images)
    assert torch.allclose(decoding.loss, expected, atol=1e-5)


def test_translation_by_nothing_returns_the_source(float64):
    t, x = template(float64), images(dtype=torch.float64)
    own = {name: i.detach() for name, i in t.encode(x).items()}
    a = impression_space.mean_impression(t.encode(images(seed=3, dtype=torch.float64)))
    b = impression_space.mean_impression(t.encode(images(seed=4, dtype=torch.float64)))
    for target in (impression_space.translated(own, a, a), impression_space.translated(own, a, b, alpha=0)):
        assert torch.equal(decode(t, target, x, Settings(steps=3, tv=0), float64).images, x)


def test_translated_targets_stay_where_images_can_be():
    behind_relu, signed = {"": torch.tensor([[0.1, 2.0]])}, {"": torch.tensor([[-0.1, 2.0]])}
    a, b = {"": torch.tensor([[1.0, 0.0]])}, {"": torch.tensor([[0.0, 1.0]])}
    assert torch.equal(impression_space.translated(behind_relu, a, b)[""], torch.tensor([[0.0, 3.0]]))
    assert torch.equal(impression_space.translated(signed, a, b)[""], torch.tensor([[-1.1, 3.0]]))


def test_interpolation_and_replacement_take_from_both(float32):
    t = template(float32)
    one, other = t.encode(images()), t.encode(images(seed=1))
    for name in t.stages:
        assert torch.equal(impression_space.interpolated(one, other, 0.0)[name], one[name])
        assert torch.allclose(impression_space.interpolated(one, other, 1.0)[name], other[name])
    mixed = impression_space.replaced(one, other, n_shallow=2)
    assert mixed["2"] is other["2"] and mixed["5"] is other["5"] and mixed[impression.EMBEDDING] is one["embedding"]


def test_relations_are_cosines(float64):
    t, x = template(float64), images(6, dtype=torch.float64)
    found = {name: i.detach() for name, i in t.encode(x).items()}
    centre = impression_space.mean_impression(found)
    v = impression_space.relation_vectors(found, centre)
    relations = v @ v.T
    assert torch.allclose(relations, relations.T) and torch.allclose(relations.diagonal(), torch.ones(6).double())
    assert float(relations.abs().max()) <= 1 + 1e-6
    scaled = {**found, "2": centre["2"] + 3 * (found["2"] - centre["2"])}
    assert torch.allclose(impression_space.relation_vectors(scaled, centre), v)
    order = torch.randperm(6)
    w = impression_space.relation_vectors({name: i[order] for name, i in found.items()}, centre)
    assert torch.allclose(w @ w.T, relations[order][:, order])


def test_a_relation_to_oneself_has_no_gradient_and_to_others_has(float64):
    t, x = template(float64), images(2, dtype=torch.float64)
    centre = impression_space.mean_impression(t.encode(images(9, seed=2, dtype=torch.float64)))
    pixels = x.clone().requires_grad_()
    v = impression_space.relation_vectors(t.encode(pixels), centre)
    (gradient,) = torch.autograd.grad((v * v).sum(), pixels)
    assert float(gradient.abs().max()) < 1e-10
    seen = impression_space.similarity_map(t, x, x.flip(0), centre, "stat")
    assert seen.shape == (2, 8, 8) and float(seen.min()) >= 0 and float(seen.max()) > 1e-6


def test_retrieval_counts_neighbours_of_the_same_class():
    labels = torch.tensor([0, 0, 1, 1])
    apart = torch.tensor([[1.0, 0.9, 0, 0], [0.9, 1, 0, 0], [0, 0, 1, 0.9], [0, 0, 0.9, 1]])
    assert impression_space.retrieval_precision(apart, labels, 1) == 1
    assert impression_space.retrieval_precision(apart, labels, 3) == pytest.approx(1 / 3)
    assert impression_space.retrieval_chance(labels) == pytest.approx(1 / 3)
    assert torch.allclose(impression_space.class_relations(apart, labels, 2), torch.tensor([[0.9, 0.0], [0.0, 0.9]]))


def test_batch_norm_statistics_are_the_impression_of_the_data_set(float64):
    t, x = template(float64), images(16, dtype=torch.float64)
    with tapped(batch_norm_layers(t.network)) as seen:
        t.network(x)
    by_hand = sum(
        (mean - visit.layer.running_mean).norm() + (variance - visit.layer.running_var).norm()
        for visit in seen
        for mean, variance in [visit.statistics()]
    )
    assert torch.allclose(batch_norm_loss(seen), by_hand)
    rows = impression_space.remembered(t.network, x)
    assert len(rows) == 2 and all(distance > 0 and size > 0 for distance, size in rows)
    squares = [
        float((mean - v.layer.running_mean).square().sum() + (var - v.layer.running_var).square().sum())
        for v in seen
        for mean, var in [v.statistics()]
    ]
    assert [distance**2 for distance, _ in rows] == pytest.approx(squares)


def test_roughness_of_images():
    x = images(3)
    assert torch.count_nonzero(impression.roughness(torch.full_like(x, 0.3))) == 0
    assert torch.allclose(impression.roughness(x * 0.5), 0.5 * impression.roughness(x))
    for axis in (2, 3):
        assert torch.allclose(impression.roughness(x.flip(axis)), impression.roughness(x))


@pytest.mark.parametrize("schedule", impression.SCHEDULES)
def test_a_decoding_descends_on_the_weighted_sum_of_its_terms(float64, schedule, monkeypatch):
    t, x, start = template(float64), images(2, dtype=torch.float64), images(2, seed=1, dtype=torch.float64)
    target = {name: i.detach() for name, i in t.encode(x).items()}
    decoding = Decoding(t, target, start, Settings(steps=6, tv=0.3, schedule=schedule), float64)
    found: list[float] = []
    monkeypatch.setattr(impression, "update", lambda optimizer, loss, scaler: found.append(float(loss)))
    for _ in range(6):
        metrics = decoding.step()  # without an update the pixels stay at the start
    own = t.encode(start)
    errors = {n: [sum((own[n][b] - i[b]) ** 2) / sum(i[b] ** 2) for b in (0, 1)] for n, i in target.items()}
    rough = 0.0
    for (image,) in start:
        across = [abs(image[r, c + 1] - image[r, c]) for r in range(8) for c in range(7)]
        down = [abs(image[r + 1, c] - image[r, c]) for r in range(7) for c in range(8)]
        rough += sum(across) / 56 + sum(down) / 56
    names = ("2", "5", impression.EMBEDDING)
    active = [3] * 6 if schedule == "joint" else [1, 1, 2, 2, 3, 3]
    by_hand = [float(sum(sum(errors[n]) for n in names[3 - k :]) + 0.3 * rough) for k in active]
    assert found == pytest.approx(by_hand, rel=1e-9)
    assert float(metrics["loss"]) == pytest.approx(float(sum(map(sum, errors.values())) + 0.3 * rough) / 2, rel=1e-9)
    assert float(metrics["residual"]) == pytest.approx(float(sum(map(sum, errors.values()))) / 6, rel=1e-9)


def test_the_content_term_holds_the_middle_feature_map_of_the_start(float64, monkeypatch):
    t, start = template(float64), images(2, dtype=torch.float64)
    target = {name: i.detach() for name, i in t.encode(images(2, seed=1, dtype=torch.float64)).items()}
    moved = images(2, seed=2, dtype=torch.float64)
    found: list[Tensor] = []
    monkeypatch.setattr(impression, "update", lambda optimizer, loss, scaler: found.append(loss.detach()))

    def step(content: float) -> dict[str, Tensor]:
        decoding = Decoding(t, target, start, Settings(steps=3, tv=0.1, content=content), float64)
        decoding.pixels[0].data.copy_(moved)
        return decoding.step()

    without, held = step(0.0), step(0.7)
    here, there = (t.feature_maps(x, ["5"])["5"].detach() for x in (moved, start))
    by_hand = [float(((here[b] - there[b]) ** 2).sum() / (there[b] ** 2).sum()) for b in (0, 1)]
    assert float(found[1] - found[0]) == pytest.approx(0.7 * sum(by_hand), rel=1e-9) and sum(by_hand) > 0.01
    assert float(held["loss"] - without["loss"]) == pytest.approx(0.7 * sum(by_hand) / 2, rel=1e-9)
    assert torch.equal(held["residual"], without["residual"])

    monkeypatch.undo()
    strict = decode(t, target, start, Settings(steps=40, tv=0, content=100.0), float64).images
    free = decode(t, target, start, Settings(steps=40, tv=0), float64).images
    off = [float((t.feature_maps(x, ["5"])["5"] - there).square().sum()) for x in (strict, free)]
    assert off[0] < off[1] / 2


def test_sampled_targets_lie_around_the_mean_and_not_below_zero_behind_a_relu():
    draw = torch.Generator().manual_seed(0)
    behind = {"": torch.tensor([[1.0, 0.0, 4.0], [3.0, 2.0, 4.0]])}
    drawn = impression_space.sampled(behind, 4000, 0.5, draw)[""]
    assert drawn.shape == (4000, 3) and float(drawn.min()) == 0
    assert torch.allclose(drawn[:, 0].mean(), torch.tensor(2.0), atol=0.03)
    assert torch.allclose(drawn[:, 0].std(), torch.tensor(0.5), atol=0.03)
    assert torch.equal(drawn[:, 2], torch.full((4000,), 4.0))  # an entry that never differs
    signed = {"": behind[""] - 2}
    assert float(impression_space.sampled(signed, 100, 0.5, draw)[""].min()) < 0
    assert torch.equal(impression_space.sampled(behind, 2, 0.0, draw)[""], behind[""].mean(0).expand(2, 3))
    again = [impression_space.sampled(behind, 3, 1.0, torch.Generator().manual_seed(5))[""] for _ in range(2)]
    assert torch.equal(*again) and not torch.equal(again[0][0], again[0][1])


def test_pixels_stay_in_range_and_the_rate_falls_along_half_a_cosine(float64):
    t, x, start = template(float64), images(2, dtype=torch.float64), images(2, seed=1, dtype=torch.float64)
    decoding = Decoding(t, t.encode(x), start, Settings(steps=4, lr=0.9, lr_end=0.1), float64)
    rates = []
    for _ in range(4):
        decoding.step()
        rates.append(decoding.optimizer.param_groups[0]["lr"])
        assert float(decoding.pixels[0].min()) >= 0 and float(decoding.pixels[0].max()) <= 1
    assert rates == pytest.approx([0.1 + 0.8 * (1 + math.cos(math.pi * i / 4)) / 2 for i in range(4)])


def test_the_progressive_schedule_starts_at_the_deepest_stage():
    settings = Settings(steps=9, schedule="progressive")
    assert impression.active_stages(0, settings, 3) == [0, 0, 1]
    assert impression.active_stages(3, settings, 3) == [0, 1, 1]
    assert impression.active_stages(8, settings, 3) == [1, 1, 1]
    assert impression.active_stages(0, replace(settings, schedule="joint"), 3) == [1, 1, 1]


def test_stages_of_vgg_are_the_ends_of_its_blocks():
    torchvision = pytest.importorskip("torchvision")
    published = {
        "vgg16": (3, 8, 15, 22, 29),
        "vgg19": (3, 8, 17, 26, 35),
        "vgg16_bn": (5, 12, 22, 32, 42),
        "vgg19_bn": (5, 12, 25, 38, 51),
    }
    for name, relus in published.items():
        with torch.device("meta"):
            network = torchvision.models.get_model(name, weights=None)
        found = impression.find_stages(network, (3, 224, 224))
        assert found == (*(f"features.{i}" for i in relus), impression.EMBEDDING)


@pytest.mark.parametrize(("name", "shape"), [("digits_cnn", (1, 8, 8)), ("quick_net", (3, 16, 16))])
def test_networks_of_the_book_can_be_cut_into_their_stages(float32, name, shape):
    torch.manual_seed(0)
    channels = shape[0]
    network = models.build(name, n_classes=10, in_channels=channels, mean=[0.5] * channels, std=[0.25] * channels)
    t = Template(network, impression.find_stages(network, shape), float32)
    x = torch.rand(2, *shape)
    pieces = impression_stages.cut(t, x)
    assert len(pieces) == len(t.stages) - 1
    first = t.feature_maps(x, t.stages[:1])[t.stages[0]]
    settings = Settings(kind="full", steps=150, lr=0.05)
    found = impression_stages.invert_locally(pieces[:1], first, shape, settings)
    assert float(psnr(found, x).mean()) > float(psnr(torch.full_like(x, 0.5), x).mean()) + 3


def test_a_network_that_is_no_chain_cannot_be_cut(float32):
    class Skipping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.relu = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            z = self.a(x)
            return self.relu(z + self.b(z))

    with pytest.raises(InputError, match="chain"):
        impression_stages.cut(Template(Skipping(), ("relu",), float32), images())


def test_measures_of_image_quality():
    x = images(3)
    assert torch.isinf(psnr(x, x)).all() and torch.allclose(ssim(x, x), torch.ones(3))
    assert torch.allclose(psnr(torch.zeros(2, 1, 4, 4), torch.full((2, 1, 4, 4), 0.1)), torch.full((2,), 20.0))
    near, far = (x + 0.05 * torch.randn_like(x)).clamp(0, 1), images(3, seed=8)
    assert (ssim(near, x) > ssim(far, x)).all() and (psnr(near, x) > psnr(far, x)).all()
    big = torch.rand(2, 3, 24, 30)
    assert torch.allclose(ssim(big, big.flip(3).flip(3)), torch.ones(2))
    with pytest.raises(InputError, match="one shape"):
        psnr(x, x[:1])


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        ({"kind": "stats"}, "stat"),
        ({"kind": "grid-0"}, "grid"),
        ({"schedule": "local"}, "joint"),
        ({"tv": -1}, "tv"),
        ({"content": -1}, "content"),
    ],
)
def test_bad_settings_are_named(bad, named):
    with pytest.raises(InputError, match=named):
        Settings(**bad)


def test_bad_requests_are_named(float32, tmp_path):
    t = template(float32)
    with pytest.raises(InputError, match="at least one stage"):
        Template(classifier(), (), float32)
    with pytest.raises(InputError, match="unknown stage 'relu9'"):
        Template(classifier(), ("relu9",), float32)
    with pytest.raises(InputError, match="encode the target with kind"):
        Decoding(t, t.encode(images(), "full"), images(), Settings(kind="stat"), float32)
    with pytest.raises(InputError, match="no ReLU"):
        impression.find_stages(nn.Sequential(nn.Conv2d(1, 2, 3)), (1, 8, 8))
    with pytest.raises(InputError, match="there is no image"):
        data.read_image(str(tmp_path / "none.png"), 8, 3)
    with pytest.raises(InputError, match="class 1 has 1"):
        data.pick(torch.tensor([0, 0, 1]), 2)
    with pytest.raises(InputError, match="unknown ImageNet network"):
        imagenet_vgg("alexnet")


def test_pictures_of_ones_own(tmp_path):
    from PIL import Image

    Image.new("RGB", (20, 10), (255, 0, 0)).save(tmp_path / "red.png")
    red = data.read_image(str(tmp_path / "red.png"), 6, 3)
    assert red.shape == (1, 3, 6, 6) and torch.equal(red[0, :, 0, 0], torch.tensor([1.0, 0.0, 0.0]))
    assert data.read_image(str(tmp_path / "red.png"), 6, 1).shape == (1, 1, 6, 6)


def test_the_digits_template_remembers_more_than_a_random_one(float32):
    """Depth costs pixels, training keeps classes: margins far below what was seen."""
    train, test = data.load("digits", "train"), data.load("digits", "test")
    recipe = replace(RECIPES["digits"], epochs=4)
    trained, verifier = (
        train_or_load("digits_cnn", train, test, recipe, Runtime.choose("cpu", "float32", seed=s)).module
        for s in (0, 1)
    )
    about = data.info("digits")
    torch.manual_seed(0)
    untrained = models.build("digits_cnn", n_classes=10, in_channels=1, mean=about.mean, std=about.std)
    stages = impression.find_stages(trained, (1, 8, 8))
    x, y = test.batch(data.pick(test.labels, 2, torch.Generator().manual_seed(0)))
    start = images(len(x))
    settings = Settings(kind="full", steps=150)

    def reached(network: nn.Module, stage: str) -> Tensor:
        t = Template(network, stages, float32)
        return decode(t, t.encode(x, "full", [stage]), start, settings, float32).images

    first, last, by_random = reached(trained, stages[0]), reached(trained, stages[-1]), reached(untrained, stages[-1])
    assert float(psnr(first, x).mean()) > 35
    assert float(psnr(first, x).mean()) > float(psnr(last, x).mean()) + 10
    recognised, at_random = (float((verifier(i).argmax(1) == y).float().mean()) for i in (last, by_random))
    assert recognised >= at_random + 0.1
    t = Template(trained, stages, float32)
    found = t.encode_set(test)
    v = impression_space.relation_vectors(found, impression_space.mean_impression(t.encode_set(train)))
    assert test.labels is not None
    assert impression_space.retrieval_precision(v @ v.T, test.labels, 1) > 0.9
