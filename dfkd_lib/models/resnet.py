"""ResNets for small images ("8x"): a 3x3 stem of stride 1 and no pooling before the stages."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut, which is a 1x1 convolution where the shape changes."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != channels:
            self.shortcut.append(nn.Conv2d(in_channels, channels, 1, stride, bias=False))
            self.shortcut.append(nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


class ResNet(nn.Module):
    """Normalised images [B, C, H, W] -> logits [B, n_classes]; any size from 8 px, 32 in the papers.

    Args:
        depths: residual blocks per stage; the strides are 1, 2, 2, 2.
        widths: channels of the stages; the stem has those of the first.
    """

    def __init__(
        self,
        depths: Sequence[int],
        n_classes: int,
        in_channels: int,
        *,
        widths: Sequence[int] = (64, 128, 256, 512),
    ) -> None:
        super().__init__()
        width = widths[0]
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        self.stages = nn.Sequential()
        for next_width, stride, depth in zip(widths, (1, 2, 2, 2), depths, strict=True):
            stage = nn.Sequential()
            for block in range(depth):
                stage.append(ResidualBlock(width, next_width, stride if block == 0 else 1))
                width = next_width
            self.stages.append(stage)
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.classifier = nn.Linear(width, n_classes)
        kaiming_fan_out(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.pool(self.stages(self.stem(x))))


def kaiming_fan_out(module: nn.Module) -> None:
    """Draw every convolution's weights from N(0, 2 / (k^2 c_out)), in place."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
