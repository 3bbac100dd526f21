"""VGG with batch normalisation for small images (CMI's toolbox, arXiv 2105.08584), with one linear layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from .small import conv_bn_relu


class VGG(nn.Module):
    """Normalised images [B, C, H, W] -> logits [B, n_classes]; any size from 8 px, 32 in the papers.

    Args:
        depths: convolutions in the groups of 64, 128, 256, 512 and 512 channels. Each of the first three ends
            in 2x2 max pooling; the fourth does so only for images of 64 px and more.
    """

    def __init__(self, depths: Sequence[int], n_classes: int, in_channels: int) -> None:
        super().__init__()
        self.groups = nn.ModuleList()
        width = in_channels
        for next_width, depth in zip((64, 128, 256, 512, 512), depths, strict=True):
            group = nn.Sequential()
            for _ in range(depth):
                group.append(conv_bn_relu(width, next_width, bias=True))
                width = next_width
            self.groups.append(group)
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.classifier = nn.Linear(width, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        n_poolings = 4 if min(x.shape[-2:]) >= 64 else 3
        for i, group in enumerate(self.groups):
            x = group(x)
            if i < n_poolings:
                x = F.max_pool2d(x, 2)
        return self.classifier(self.pool(x))


def staged_vgg(
    stages: Sequence[tuple[int, int]],
    hidden: int,
    n_classes: int,
    in_channels: int,
    *,
    batch_norm: bool = False,
    hidden_norm: bool = False,
) -> nn.Sequential:
    """NetGraft's VGG (arXiv 2012.04915): biased 3x3 convolutions with ReLU, 2x2 max pooling after every stage.

    Normalised images [B, C, H, W] of any size, 32 in the paper -> logits [B, n_classes].
    No ReLU lies between the two linear layers, so the part from `pool` on is an affine map.

    Args:
        stages: (channels, convolutions) of each stage.
        hidden: units of the first linear layer.
        batch_norm: batch normalisation after every convolution; the authors' networks have none.
        hidden_norm: batch normalisation between the linear layers, as in the authors' teacher.
    """
    network = nn.Sequential()
    groups, width = nn.Sequential(), in_channels
    for channels, depth in stages:
        group = nn.Sequential()
        for _ in range(depth):
            layers = conv_bn_relu(width, channels, bias=True)
            group.append(layers if batch_norm else nn.Sequential(layers[0], layers[2]))
            nn.init.kaiming_normal_(layers[0].weight, mode="fan_out", nonlinearity="relu")  # type: ignore[arg-type]
            nn.init.zeros_(layers[0].bias)  # type: ignore[arg-type]
            width = channels
        groups.append(group.append(nn.MaxPool2d(2, ceil_mode=True)))
    network.add_module("stages", groups)
    network.add_module("pool", nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    network.add_module("hidden", _small_linear(width, hidden))
    if hidden_norm:
        network.add_module("norm", nn.BatchNorm1d(hidden))
    network.add_module("classifier", _small_linear(hidden, n_classes))
    return network


def _small_linear(inputs: int, outputs: int) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    nn.init.normal_(layer.weight, std=0.01)
    nn.init.zeros_(layer.bias)
    return layer
