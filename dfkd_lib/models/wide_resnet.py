"""Wide ResNets WRN-d-k (arXiv 1605.07146), the pairs of the CMI and FastDFKD tables."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .resnet import kaiming_fan_out


class PreActivationBlock(nn.Module):
    """BN-ReLU-conv twice beside a shortcut: the input, or a 1x1 convolution of the activated input."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.shortcut: nn.Module | None = None
        if in_channels != channels:
            self.shortcut = nn.Conv2d(in_channels, channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        activated = F.relu(self.bn1(x))
        y = self.conv2(F.relu(self.bn2(self.conv1(activated))))
        return y + (x if self.shortcut is None else self.shortcut(activated))


class WideResNet(nn.Module):
    """Normalised images [B, C, H, W] -> logits [B, n_classes]; any size from 4 px, 32 in the papers.

    Args:
        depth: layers with weights, 6 n + 4 for n blocks in each of the three groups.
        k: widening factor; the groups have 16 k, 32 k, 64 k channels and strides 1, 2, 2.
    """

    def __init__(self, depth: int, k: int, n_classes: int, in_channels: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.groups = nn.Sequential()
        width = 16
        for next_width, stride in ((16 * k, 1), (32 * k, 2), (64 * k, 2)):
            group = nn.Sequential()
            for block in range((depth - 4) // 6):
                group.append(PreActivationBlock(width, next_width, stride if block == 0 else 1))
                width = next_width
            self.groups.append(group)
        self.pool = nn.Sequential(nn.BatchNorm2d(width), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.classifier = nn.Linear(width, n_classes)
        kaiming_fan_out(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.pool(self.groups(self.stem(x))))
