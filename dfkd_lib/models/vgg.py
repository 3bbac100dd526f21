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
