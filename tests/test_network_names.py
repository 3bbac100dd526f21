"""Networks from names and files: each is there, or one line says what is missing; no file of weights runs code."""

from __future__ import annotations

import copy
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dfkd_lib.errors import DamagedFile, InputError
from dfkd_lib.loading_networks import Loaded, load_network, load_weights

SOURCE = """
from dataclasses import dataclass
from torch import nn
from beside import WIDTH

@dataclass
class Size:
    width: int = WIDTH

def small():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, Size().width))

def five():
    return 5

def needs(width):
    return small()

def falls():
    raise ValueError("no such\\nfile")
"""


@pytest.fixture
def file(tmp_path: Path) -> str:
    """A file of somebody's own, which imports another one beside it."""
    (tmp_path / "beside.py").write_text("WIDTH = 5\n")
    (tmp_path / "mine.py").write_text(SOURCE)
    return str(tmp_path / "mine.py")


def small() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 5))


def test_a_function_in_a_file(file: str) -> None:
    before = [*sys.path]
    loaded = load_network(f"{file}:small", 5)
    assert loaded.network(torch.rand(2, 1, 8, 8)).shape == (2, 5) and sys.path == before
    assert loaded.mean is loaded.std is None and loaded.class_names == ()
    copy.deepcopy(loaded.network)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("FILE:smal", "did you mean 'small'"),
        ("FILE:five", "returns no torch.nn.Module, but int"),
        ("FILE:needs", "needs() missing 1 required positional argument"),
        ("FILE:falls", "falls fails: ValueError: no such"),
        ("nowhere.py:small", "there is no file nowhere.py"),
        ("torchvision:resnet19", "near it are resnet18"),
        ("torchvision:resnet18", "takes images of 3 channels, not 1"),
        ("torchvision:", "names no network; give torchvision:NAME"),
        ("keras:vgg16", "names no network; give torchvision:NAME"),
        ("hf:nowhere", "has no config.json"),
    ],
)
def test_what_no_network_is_found_for(file: str, name: str, words: str) -> None:
    with pytest.raises(InputError) as refused:
        load_network(name.replace("FILE", file), 5, channels=1)
    assert words in str(refused.value) and "\n" not in str(refused.value)


def test_a_network_of_torchvision_with_classes_of_ones_own() -> None:
    network = load_network("torchvision:squeezenet1_1", 7).network.eval()
    with torch.no_grad():
        assert network(torch.rand(2, 3, 32, 32)).shape == (2, 7)


def test_published_weights_that_cannot_be_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.models._api.WeightsEnum.get_state_dict", fails)
    with pytest.raises(
        InputError, match=r"cannot fetch the weights of torchvision's squeezenet1_1 .no route to host.;"
    ):
        load_network("torchvision:squeezenet1_1", 1000, trained=True)
    with pytest.raises(InputError, match="has 1000 classes, not 10; give that number, or a file of weights"):
        load_network("torchvision:squeezenet1_1", 10, trained=True)


def test_published_weights_bring_their_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.models import squeezenet1_1

    state = squeezenet1_1(weights=None).state_dict()
    monkeypatch.setattr("torchvision.models._api.WeightsEnum.get_state_dict", lambda *_, **__: state)
    loaded = load_network("torchvision:squeezenet1_1", 1000, trained=True)
    assert loaded.mean == (0.485, 0.456, 0.406) and len(loaded.class_names) == 1000


@pytest.mark.parametrize("how", ["safetensors", "pth", "wrapped"])
def test_weights_from_a_file(tmp_path: Path, file: str, how: str) -> None:
    torch.manual_seed(1)
    teacher = small()
    path = tmp_path / f"weights.{'safetensors' if how == 'safetensors' else 'pth'}"
    if how == "safetensors":
        save_file(teacher.state_dict(), path)
    else:
        state: dict[str, Any] = teacher.state_dict()
        if how == "wrapped":
            state = {"epoch": 3, "state_dict": {f"module.{key}": value for key, value in state.items()}}
        torch.save(state, path)
    loaded = load_network(f"{file}:small", 5, weights=path)
    x = torch.rand(2, 1, 8, 8)
    assert torch.equal(loaded.network(x), teacher(x))


class Spy:
    """What a pickle with code would do."""

    ran = False

    def __reduce__(self) -> Any:
        return setattr, (Spy, "ran", True)


@pytest.mark.parametrize(
    ("content", "error", "words"),
    [
        ({"1.weight": torch.zeros(5, 64)}, InputError, "lacks '1.bias'"),
        (
            {"1.weight": torch.zeros(5, 64), "1.bias": torch.zeros(5), "2.a": torch.zeros(1)},
            InputError,
            "has besides '2.a'",
        ),
        ({"1.weight": torch.zeros(9, 64), "1.bias": torch.zeros(9)}, InputError, "is [9, 64] there and [5, 64] in"),
        ([torch.zeros(2)], InputError, "holds no weights by name; save network.state_dict()"),
        ({"model": Spy()}, InputError, "holds more than weights"),
        (b"not weights", DamagedFile, "cannot be read as weights"),
        (None, InputError, "there is no file"),
    ],
)
def test_weights_that_do_not_fit(tmp_path: Path, content: Any, error: type[Exception], words: str) -> None:
    path = tmp_path / "weights.pth"
    if isinstance(content, bytes):
        path = path.with_suffix(".safetensors")
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    network = small()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    with pytest.raises(error) as refused:
        load_weights(network, path)
    assert words in str(refused.value) and "\n" not in str(refused.value) and not Spy.ran
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_tied_weights_are_read_once(tmp_path: Path) -> None:
    def tied() -> nn.Module:
        network = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        network[1].weight = network[0].weight
        return network

    first, second = tied(), tied()
    save_file(
        {key: value for key, value in first.state_dict().items() if key != "1.weight"}, tmp_path / "w.safetensors"
    )
    load_weights(second, tmp_path / "w.safetensors")
    x = torch.rand(2, 4)
    assert torch.equal(first(x), second(x))


def test_timm_brings_its_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in: the package is optional."""
    monkeypatch.setitem(sys.modules, "timm", None)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"timm:NAME needs timm .*: pip install timm"):
        load_network("timm:tiny", 5)

    class Tiny(nn.Module):
        def __init__(self, num_classes: int) -> None:
            super().__init__()
            self.num_classes, self.default_cfg = num_classes, {"mean": (0.5,) * 3, "std": (0.2,) * 3}

    def create_model(name: str, pretrained: bool, in_chans: int, num_classes: int = 1000) -> nn.Module:
        assert name == "tiny" and in_chans == 3
        return Tiny(num_classes)

    known = types.SimpleNamespace(create_model=create_model, is_model="tiny".__eq__, list_models=lambda: ["tiny"])
    monkeypatch.setitem(sys.modules, "timm", known)  # type: ignore[arg-type]
    loaded = load_network("timm:tiny", 5)
    assert loaded.network.num_classes == 5 and (loaded.mean, loaded.std) == ((0.5,) * 3, (0.2,) * 3)
    with pytest.raises(InputError, match="the published tiny has 1000 classes, not 5"):
        load_network("timm:tiny", 5, trained=True)
    with pytest.raises(InputError, match="timm has no network 'tinny'; near it are tiny"):
        load_network("timm:tinny", 5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vision transformer of transformers, as `save_pretrained` leaves it."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=8, patch_size=4,
        num_labels=3, id2label={0: "cat", 1: "dog", 2: "owl"},
    )  # fmt: skip
    root = tmp_path_factory.mktemp("vit")
    transformers.ViTForImageClassification(config).save_pretrained(root)
    (root / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.25] * 3}))
    return root


def test_a_folder_of_transformers_gives_logits(folder: Path) -> None:
    from transformers import ViTForImageClassification

    loaded = load_network(f"hf:{folder}", 3, trained=True)
    plain = ViTForImageClassification.from_pretrained(folder).eval()
    x = torch.rand(2, 3, 8, 8)
    with torch.no_grad():
        said: Tensor = copy.deepcopy(loaded.network.eval())(x)
        assert torch.allclose(said, plain(x).logits, atol=1e-6)
    assert loaded.network.state_dict().keys() == plain.state_dict().keys()
    assert loaded == Loaded(loaded.network, (0.5,) * 3, (0.25,) * 3, ("cat", "dog", "owl"))


def test_a_folder_without_weights_is_a_student_alone(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    assert load_network(f"hf:{tmp_path}", 5).network(torch.rand(1, 3, 8, 8)).shape == (1, 5)
    with pytest.raises(InputError, match="holds no weights"):
        load_network(f"hf:{tmp_path}", 5, trained=True)
    with pytest.raises(InputError, match="has 3 classes, not 5"):
        load_network(f"hf:{folder}", 5)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(InputError, match="cannot be loaded as an image classifier"):
        load_network(f"hf:{tmp_path}", 5)
