"""Small networks of our own for the profiles that run on a processor in seconds, and the block they share."""

from __future__ import annotations

from collections import OrderedDict

import torch.nn.functional as F
from torch import Tensor, nn


def conv_bn_relu(
    inputs: int, channels: int, kernel: int = 3, *, stride: int = 1, dilation: int = 1, bias: bool = False
) -> nn.Sequential:
    """Convolution, padded to keep the size at stride 1, then batch normalisation and ReLU."""
    padding = dilation * (kernel - 1) // 2
    return nn.Sequential(
        nn.Conv2d(inputs, channels, kernel, stride, padding, dilation, bias=bias),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
    )


def digits_cnn(widths: tuple[int, int, int], n_classes: int, in_channels: int) -> nn.Sequential:
    """Three 3x3 stages: normalised images [B, C, H, W], made for 8 to 32 px -> logits [B, n_classes]."""
    c1, c2, c3 = widths
    features = nn.Sequential(
        conv_bn_relu(in_channels, c1), nn.MaxPool2d(2),
        conv_bn_relu(c1, c2), nn.MaxPool2d(2),
        conv_bn_relu(c2, c3), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )  # fmt: skip
    return nn.Sequential(OrderedDict(features=features, classifier=nn.Linear(c3, n_classes)))


class SceneNet(nn.Module):
    """Normalised images [B, C, H, W], any size from 8 px -> logits [B, n_classes, H, W].

    Three stages of stride 2, two dilated ones, a 1x1 head, bilinear upsampling by 8.

    Args:
        widths: channels of the three stages; the dilated ones keep the last.
    """

    def __init__(self, widths: tuple[int, int, int], n_classes: int, in_channels: int) -> None:
        super().__init__()
        c1, c2, c3 = widths
        self.features = nn.Sequential(
            conv_bn_relu(in_channels, c1, stride=2),
            conv_bn_relu(c1, c2, stride=2),
            conv_bn_relu(c2, c3, stride=2),
            conv_bn_relu(c3, c3, dilation=2),
            conv_bn_relu(c3, c3, dilation=4),
        )
        self.head = nn.Conv2d(c3, n_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        logits = self.head(self.features(x))
        return F.interpolate(logits, size=x.shape[-2:], mode="bilinear", align_corners=False)
