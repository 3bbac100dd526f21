"""Networks that were trained on ImageNet, from torchvision."""

from __future__ import annotations

from torch import nn

from ..errors import DataUnavailable, unknown
from .normalize import Normalize

IMAGENET = ("vgg16", "vgg19", "vgg16_bn", "vgg19_bn")


def imagenet_vgg(name: str) -> nn.Module:
    """torchvision's VGG with ImageNet weights (0.5 GB, downloaded once), its normalisation in front.

    Args:
        name: one of `IMAGENET`.

    Raises:
        InputError: another network.
        DataUnavailable: the weights are neither cached nor reachable.
    """
    import torchvision

    if name not in IMAGENET:
        raise unknown("ImageNet network", name, IMAGENET)
    try:
        network = torchvision.models.get_model(name, weights="IMAGENET1K_V1")
    except OSError as e:
        raise DataUnavailable(
            f"ImageNet weights of {name} cannot be downloaded ({e}); use a network of this project instead"
        ) from e
    return nn.Sequential(Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), network)
