"""Networks by name: classifiers, segmenters and generators, each as its paper describes it.

A network from `build` owns its normalisation, so its callers handle images in [0, 1] only. No network has
flags for intermediate results: take those with hooks on its named modules. A classifier ends in the linear
layer `network.classifier`, whose input is its penultimate features [B, D].
"""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ..errors import InputError, unknown
from .discriminators import build_discriminator, discriminator_names, map_shape, receptive_field
from .generators import Middle, deep, draw_weights, generator_a, generator_b, generator_zskt, toolbox
from .lenet import LeNet5
from .normalize import Denormalize, Normalize
from .quick import QuickNet, whiten
from .resnet import ResNet
from .segmentation import deeplabv3_mobilenetv2, deeplabv3_resnet50
from .small import SceneNet, digits_cnn
from .vgg import VGG, staged_vgg
from .wide_resnet import WideResNet

__all__ = [
    "Denormalize",
    "Normalize",
    "build",
    "build_discriminator",
    "build_generator",
    "count_macs",
    "count_parameters",
    "discriminator_names",
    "draw_weights",
    "generator_names",
    "map_shape",
    "names",
    "receptive_field",
    "whiten",
]

_VGG16 = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))
_NETWORKS: dict[str, dict[str, Callable[..., nn.Module]]] = {
    "classification": {
        "lenet5": partial(LeNet5, (6, 16, 120, 84)),
        "lenet5_half": partial(LeNet5, (3, 8, 60, 42)),
        "lenet5_bn": partial(LeNet5, (6, 16, 120, 84), batch_norm=True),
        "lenet5_bn_half": partial(LeNet5, (3, 8, 60, 42), batch_norm=True),
        "resnet18": partial(ResNet, (2, 2, 2, 2)),
        "resnet34": partial(ResNet, (3, 4, 6, 3)),
        "resnet18_half": partial(ResNet, (2, 2, 2, 2), widths=(64, 64, 128, 256)),
        "wrn16_1": partial(WideResNet, 16, 1),
        "wrn16_2": partial(WideResNet, 16, 2),
        "wrn40_1": partial(WideResNet, 40, 1),
        "wrn40_2": partial(WideResNet, 40, 2),
        "vgg11": partial(VGG, (1, 1, 2, 2, 2)),
        "vgg13": partial(VGG, (2, 2, 2, 2, 2)),
        "vgg16": partial(VGG, (2, 2, 3, 3, 3)),
        "netgraft_vgg16": partial(staged_vgg, _VGG16, 512, hidden_norm=True),
        "netgraft_vgg16_bn": partial(staged_vgg, _VGG16, 512, hidden_norm=True, batch_norm=True),
        "netgraft_vgg16_half": partial(staged_vgg, (*_VGG16[:3], (256, 3), (256, 3)), 512),
        "vgg8_bn": partial(staged_vgg, ((64, 2), (128, 2), (256, 2)), 256, hidden_norm=True, batch_norm=True),
        "netgraft_digits": partial(staged_vgg, ((32, 2), (64, 2), (128, 2)), 64, hidden_norm=True),
        "netgraft_digits_half": partial(staged_vgg, ((32, 2), (32, 2), (64, 2)), 64),
        "digits_cnn": partial(digits_cnn, (16, 32, 32)),
        "digits_cnn_half": partial(digits_cnn, (8, 16, 16)),
        "quick_net": partial(QuickNet, (48, 128, 256)),
        "quick_net_half": partial(QuickNet, (24, 64, 128), whitened=False),
    },
    "segmentation": {
        "scene_net": partial(SceneNet, (16, 32, 64)),
        "scene_net_half": partial(SceneNet, (8, 16, 32)),
        "deeplabv3_resnet50": deeplabv3_resnet50,
        "deeplabv3_mobilenetv2": deeplabv3_mobilenetv2,
    },
}

# Those that end in the teacher's pixel statistics.
_CENTRED = ("generator_a", "generator_dafl", "generator_zskt")
_GENERATORS: dict[str, Callable[..., nn.Module]] = {
    "generator_a": generator_a,
    "generator_b": generator_b,
    "generator_dafl": partial(generator_a, eps=0.8),
    "generator_zskt": generator_zskt,
    "toolbox_small": partial(toolbox, start=2),
    "toolbox_large": partial(toolbox, start=4),
    "deep": deep,
}


def names(task: str | None = None) -> list[str]:
    """The networks that `build` knows, of one task ("classification" or "segmentation") or of both.

    Raises:
        InputError: unknown task.
    """
    if task is not None and task not in _NETWORKS:
        raise unknown("task", task, _NETWORKS)
    return [name for kind, networks in _NETWORKS.items() if task in (None, kind) for name in networks]


def generator_names() -> list[str]:
    """The generators that `build_generator` knows."""
    return list(_GENERATORS)


def build(
    name: str,
    *,
    n_classes: int,
    in_channels: int,
    mean: Sequence[float],
    std: Sequence[float],
    pretrained: bool = False,
) -> nn.Module:
    """A classifier or segmenter of images [B, in_channels, H, W] in [0, 1].

    Args:
        n_classes: classes, the background among them where there is one.
        mean, std: per channel, in the unit of the images; its first layer, `normalize`, applies them.
        pretrained: ImageNet weights for the backbone; only deeplabv3_resnet50 has them.

    Returns:
        A module with children `normalize` and `network`, in train mode, that returns logits: [B, n_classes],
        or [B, n_classes, H, W] for segmentation.

    Raises:
        InputError: unknown name, or numbers that no network can have.
        DataUnavailable: pretrained weights that cannot be reached.
    """
    networks = {known: factory for group in _NETWORKS.values() for known, factory in group.items()}
    if name not in networks:
        raise unknown("network", name, networks)
    _must_be_positive(n_classes=n_classes, in_channels=in_channels)
    _must_fit(mean, in_channels)
    factory = networks[name]
    if pretrained:
        if name != "deeplabv3_resnet50":
            raise InputError(f"network {name!r} has no pretrained weights; only deeplabv3_resnet50 has them")
        factory = partial(factory, pretrained=True)
    network = factory(n_classes=n_classes, in_channels=in_channels)
    return nn.Sequential(OrderedDict(normalize=Normalize(mean, std), network=network))


def build_generator(
    name: str,
    *,
    latent_dim: int,
    image_shape: tuple[int, int, int],
    mean: Sequence[float],
    std: Sequence[float],
    ngf: int = 64,
) -> nn.Module:
    """A generator of images [B, C, H, W] from noise z [B, latent_dim].

    Args:
        image_shape: (C, H, W). Where the sides are not multiples of 4, or of 16 for generator_b, the next larger
            image is made and its middle kept.
        mean, std: per channel, the teacher's. generator_a, generator_dafl and generator_zskt end in `Denormalize`
            with them, which the teacher undoes; the other generators' images lie in [0, 1] whatever these are.
        ngf: unit of all channel widths; 64 in the papers.

    Raises:
        InputError: unknown name, or a size below 1.
    """
    if name not in _GENERATORS:
        raise unknown("generator", name, _GENERATORS)
    channels, height, width = image_shape
    _must_be_positive(latent_dim=latent_dim, ngf=ngf, channels=channels, height=height, width=width)
    factory = _GENERATORS[name]
    if name in _CENTRED:
        _must_fit(mean, channels)
        factory = partial(factory, mean=mean, std=std)
    step = 16 if name == "generator_b" else 4
    larger = channels, math.ceil(height / step) * step, math.ceil(width / step) * step
    network = factory(latent_dim, larger, ngf=ngf)
    return network if larger == image_shape else nn.Sequential(*network.children(), Middle(height, width))


def count_parameters(module: nn.Module) -> int:
    """Number of weights, frozen ones included, buffers not."""
    return sum(parameter.numel() for parameter in module.parameters())


def count_macs(module: nn.Module, input_shape: Sequence[int]) -> int:
    """Multiply-accumulates of convolutions and linear layers for one input, in eval mode.

    Nothing is computed (the count runs on a copy without storage), and `module` is left as it is.

    Args:
        input_shape: shape of one input without the batch: (C, H, W), or (latent_dim,) for a generator.
    """
    outline = copy.deepcopy(module).to("meta").eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        outline(torch.empty(1, *input_shape, device="meta"))
    return counter.get_total_flops() // 2


def _must_fit(mean: Sequence[float], channels: int) -> None:
    if len(mean) != channels:
        raise InputError(f"mean has {len(mean)} values for {channels} channels; give one per channel")


def _must_be_positive(**numbers: int) -> None:
    for what, number in numbers.items():
        if number < 1:
            raise InputError(f"{what} must be at least 1, not {number}")
