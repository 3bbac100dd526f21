"""`transferability` and `select_layer` on networks that the library does not know: what is kept, what is refused."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from conftest import settled
from PIL import Image
from torch import Tensor, nn

import dfkd_lib
from dfkd_lib import select_layer, transferability
from dfkd_lib.data import ImageSet, load, taskonomy
from dfkd_lib.errors import InputError
from dfkd_lib.models import Normalize
from dfkd_lib.runtime import Runtime

CPU = Runtime.choose("cpu", "float32")


def images(n: int = 10, channels: int = 1, side: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (n, channels, side, side), generator=generator, dtype=torch.uint8)


def compared(models: Any = None, probes: Any = None, **options: Any) -> Any:
    models = {"a": settled(0), "b": settled(1), "c": settled(2)} if models is None else models
    return transferability(models, images() if probes is None else probes, **{"runtime": CPU} | options)


def kept(network: nn.Module) -> list[Any]:
    """All that a person could see of a network."""
    return [
        [(name, value.clone()) for name, value in network.state_dict().items()],
        [(p.requires_grad, p.grad, p.data_ptr()) for p in network.parameters()],
        [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in network.modules()],
    ]


def same(a: list[Any], b: list[Any]) -> bool:
    return a[1:] == b[1:] and all(n == m and torch.equal(v, w) for (n, v), (m, w) in zip(a[0], b[0], strict=True))


def test_a_matrix_and_a_ranking() -> None:
    found = compared({"a": settled(0), "b": settled(1), "again": settled(0)})
    assert found.names == ["a", "b", "again"]
    assert torch.equal(found.affinity, found.affinity.T) and (found.affinity.abs() <= 1).all()
    assert found.ranking("a")[0] == ("again", 1.0)
    assert [name for name, _ in found.ranking("b")] in (["a", "again"], ["again", "a"])


def test_a_ranking_against_lists_of_useful_sources() -> None:
    found = compared({"a": settled(0), "b": settled(1), "again": settled(0)})
    assert found.precision({"a": ["again"]}) == [1.0, 0.5] and found.precision({"a": ["b"]}) == [0.0, 0.5]
    assert found.precision({"a": ["again"], "again": ["b"]}) == [0.5, 0.5]
    with pytest.raises(InputError, match="unknown network in useful 'c'"):
        found.precision({"a": ["c"]})
    with pytest.raises(InputError, match="useful is empty"):
        found.precision({})


def test_networks_named_as_taskonomys_are_compared_with_its_lists(tmp_path: Path) -> None:
    for i, image in enumerate(images(6, 3, 16)):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / f"{i}.png")
    probes = load(f"folder:{tmp_path}", "test", image_size=8)
    networks = {}
    for i, name in enumerate(taskonomy.TASKS):
        torch.manual_seed(i)
        encoder = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
        networks[name] = nn.Sequential(OrderedDict(encoder=encoder, z=nn.Identity()))
    half = [0.5] * 3
    found = compared(networks, probes, at="z", mean=half, std=half).precision(taskonomy.BEST_SOURCES)
    assert len(found) == 19 and found[-1] == pytest.approx(5 / 19)
    assert len(taskonomy.TASKS) == 20 and all(len(set(best)) == 5 for best in taskonomy.BEST_SOURCES.values())
    assert all(target not in best for target, best in taskonomy.BEST_SOURCES.items())


def test_edges_are_added_by_their_weight() -> None:
    plain, all_of_it, edges = (compared(edge_weight=w).affinity for w in (0.0, 0.25, float("inf")))
    assert torch.allclose(all_of_it, plain + 0.25 * edges)
    assert torch.allclose(all_of_it.diagonal(), torch.full((3,), 1.25).double())


def test_one_more_network_leaves_the_others_as_they_are() -> None:
    three = compared()
    four = three.with_model("d", settled(3))
    assert torch.equal(four.affinity[:3, :3], three.affinity) and three.names == ["a", "b", "c"]
    at_once = compared({"a": settled(0), "b": settled(1), "c": settled(2), "d": settled(3)})
    assert torch.equal(at_once.affinity, four.affinity)
    assert all(four.graphs[name].nodes is three.graphs[name].nodes for name in three.names), "nothing is explained anew"


def test_networks_stay_as_they_are_and_so_does_the_random_state() -> None:
    models = {"trains": settled(0), "frozen": settled(1).eval().requires_grad_(False), "halves": settled(2).half()}
    models["trains"].train()
    before, state = {name: kept(m) for name, m in models.items()}, torch.get_rng_state()
    transferability(models, images())
    select_layer(models["trains"], models["frozen"], images())
    for name, network in models.items():
        assert same(kept(network), before[name])
    assert torch.equal(torch.get_rng_state(), state)


def test_dropout_is_off_and_batches_do_not_matter() -> None:
    torch.manual_seed(0)
    dropping = nn.Sequential(nn.Flatten(), nn.Linear(64, 9), nn.ReLU(), nn.Dropout(0.5), nn.Linear(9, 3)).train()
    models = {"dropping": dropping, "other": settled(1)}
    assert torch.allclose(compared(models).affinity, compared(models, batch_size=3).affinity, atol=1e-6)


def test_a_normalisation_may_be_given_or_be_inside() -> None:
    network = settled(0)
    inside = nn.Sequential(Normalize([0.3], [0.2]), network)
    found = compared({"given": network, "inside": inside, "none": network}, mean={"given": [0.3]}, std={"given": [0.2]})
    assert found.affinity[0, 1] == 1.0 and found.affinity[0, 2] < 1.0
    named = compared({"given": network, "inside": inside}, mean={"given": [0.3]}, std={"given": [0.2]},
                     at={"given": "0", "inside": "1.0"})  # fmt: skip
    assert named.affinity[0, 1] == 1.0


def test_torchvision_classifiers_of_different_kinds() -> None:
    torch.manual_seed(0)
    models = {
        "resnet18": torchvision.models.resnet18(num_classes=5),
        "squeezenet": torchvision.models.squeezenet1_1(num_classes=3),
        "mobilenet": torchvision.models.mobilenet_v3_small(num_classes=4),
    }
    statistics = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    found = transferability(
        models, images(4, 3, 64), runtime=CPU, at={"squeezenet": "features"}, edge_weight=0.25,
        mean={name: statistics["mean"] for name in ("resnet18", "mobilenet")},
        std={name: statistics["std"] for name in ("resnet18", "mobilenet")},
    )  # fmt: skip
    assert found.affinity.shape == (3, 3) and torch.isfinite(found.affinity).all()
    chosen = select_layer(
        models["resnet18"], models["mobilenet"], images(4, 3, 64), layers=["conv1", "layer2.0.conv1"], runtime=CPU,
        mean=statistics["mean"], std=statistics["std"],
    )  # fmt: skip
    assert list(chosen.similarities) == ["conv1", "layer2.0.conv1"] and chosen.best in chosen.similarities


def test_probe_images_may_be_a_set_bytes_or_floats() -> None:
    probes = images()
    as_set = ImageSet(probes, name="mine", split="train")
    wanted = compared().affinity
    assert torch.equal(compared(probes=as_set).affinity, wanted)
    assert torch.equal(compared(probes=probes.float() / 255).affinity, wanted)


def test_a_layer_is_chosen_and_the_choice_can_be_read() -> None:
    network = settled(0)
    found = select_layer(network, settled(1), images(), runtime=CPU)
    assert list(found.similarities) == ["0"] and found.best == "0"
    both = select_layer(network, settled(1), images(), layers=["0", "3"], edge_weight=10, runtime=CPU,
                        mean={"source": [0.3]}, std={"source": [0.2]})  # fmt: skip
    s_v, s_e, s = both.similarities[both.best]
    assert s == pytest.approx(s_v + 10 * s_e) and s == max(x[2] for x in both.similarities.values())
    assert f"* {both.best}: nodes" in str(both)


def test_a_figure() -> None:
    import matplotlib

    matplotlib.use("Agg")
    figure = compared().figure()
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["a", "b", "c"]


class Broken(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("size mismatch\nand more")


class Constant(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(0 * x.flatten(1))


def nan() -> nn.Module:
    network = settled()
    network[0].weight.data.fill_(torch.nan)
    return network


@pytest.mark.parametrize(
    ("act", "said"),
    [
        (lambda: compared({}), "models must be a dict from name to network"),
        (lambda: compared([settled()]), "models must be a dict"),
        (lambda: compared({"a": "resnet"}), "a is a str, not a torch.nn.Module"),
        (lambda: compared({"a": Broken()}, at="output"), "a fails on probe images of shape 1x8x8: size mismatch"),
        (lambda: compared({"a": Constant()}), "a: the network does not depend on the image at all for 10 of 10"),
        (lambda: compared({"a": nan()}), "a: the network has attributions that are NaN"),
        (lambda: compared({"a": nn.Sequential(nn.Flatten())}), "a: the network has no linear layer"),
        (lambda: compared(at="layer9"), "a: unknown module 'layer9'"),
        (lambda: compared(at={"z": "0"}), "unknown network in at 'z'"),
        (lambda: compared(mean=[0.5]), "a: mean and std belong together"),
        (lambda: compared(mean=[0.5] * 3, std=[0.5] * 3), "a: mean and std must be sequences of 1 numbers"),
        (lambda: compared(kind="gradcam"), "unknown kind 'gradcam'"),
        (lambda: compared(edge_weight=-1.0), "edge_weight must be 0 or more"),
        (lambda: compared(edge_weight="much"), "edge_weight must be a number"),
        (lambda: compared(batch_size=0), "batch_size must be at least 1"),
        (lambda: compared(runtime="cpu"), "runtime must be a dfkd_lib.runtime.Runtime"),
        (lambda: compared(probes=images(2)), "there are 2 probe images; give 3 to 2000"),
        (lambda: compared(probes=images()[0]), r"probe_images must be \[n, C, H, W\]"),
        (lambda: compared(probes=images().float()), "floats in \\[0, 1\\]; leave normalising"),
        (lambda: compared(probes=[1, 2]), "must be an ImageSet or a tensor"),
        (lambda: compared(probes=images(10, 3)), "a fails on probe images of shape 3x8x8"),
        (lambda: compared().ranking("d"), "unknown network 'd'"),
        (lambda: compared().with_model("a", settled()), "there is a network 'a' already"),
        (lambda: select_layer(settled(), Broken(), images()), "target fails on probe images"),
        (lambda: select_layer(Broken(), settled(), images()), "source fails on probe images"),
        (lambda: select_layer(settled(), settled(), images(), layers=["conv9"]), "source: unknown module 'conv9'"),
        (lambda: select_layer(settled(), settled(), images(), layers=[]), "layers is empty"),
        (lambda: select_layer(settled(), settled(), images(), layers="0", runtime=CPU), "layers must be a sequence"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_in_one_line(act: Callable[[], object], said: str) -> None:
    with pytest.raises(InputError, match=said) as e:
        act()
    assert "\n" not in str(e.value)


def test_the_front_door_is_open() -> None:
    assert {"transferability", "select_layer"} <= set(dfkd_lib.__all__)
