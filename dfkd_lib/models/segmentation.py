"""DeepLabV3 (arXiv 1706.05587) at output stride 8, the segmentation pair of DFAD (arXiv 1912.11006)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import DataUnavailable, InputError
from .small import conv_bn_relu


class DeepLabV3(nn.Module):
    """Normalised images [B, C, H, W] -> logits [B, n_classes, H, W].

    The image-pooling branch has one value per image and channel, so training needs a batch of 2 or more.

    Args:
        backbone: maps images to features [B, feature_channels, H / 8, W / 8].
    """

    def __init__(self, backbone: nn.Module, feature_channels: int, n_classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.pyramid = AtrousPyramid(feature_channels)
        self.head = nn.Sequential(conv_bn_relu(256, 256), nn.Conv2d(256, n_classes, 1))

    def forward(self, x: Tensor) -> Tensor:
        logits = self.head(self.pyramid(self.backbone(x)))
        return F.interpolate(logits, size=x.shape[-2:], mode="bilinear", align_corners=False)


class AtrousPyramid(nn.Module):
    """Five views of the features, 256 channels each, merged: 1x1, 3x3 at dilations 12, 24, 32, image mean."""

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.local = nn.ModuleList([conv_bn_relu(in_channels, 256, kernel=1)])
        self.local.extend(conv_bn_relu(in_channels, 256, dilation=rate) for rate in (12, 24, 32))
        self.image = nn.Sequential(nn.AdaptiveAvgPool2d(1), conv_bn_relu(in_channels, 256, kernel=1))
        self.merge = nn.Sequential(conv_bn_relu(5 * 256, 256, kernel=1), nn.Dropout(0.5))

    def forward(self, x: Tensor) -> Tensor:
        views = [view(x) for view in self.local]
        views.append(self.image(x).expand_as(views[0]))
        return self.merge(torch.cat(views, dim=1))


def deeplabv3_resnet50(n_classes: int, in_channels: int, *, pretrained: bool = False) -> DeepLabV3:
    """DeepLabV3 on torchvision's ResNet-50; the last two stages are dilated instead of strided.

    Args:
        pretrained: start the backbone from torchvision's ImageNet weights (98 MB, downloaded once).

    Raises:
        InputError: pretrained with other than 3 channels.
        DataUnavailable: the weights are neither cached nor reachable.
    """
    from torchvision.models import ResNet50_Weights, resnet50

    if pretrained and in_channels != 3:
        raise InputError(f"ImageNet weights read 3 channels, not {in_channels}; use pretrained=False")
    weights = ResNet50_Weights.IMAGENET1K_V1 if pretrained else None
    try:
        network = resnet50(weights=weights, replace_stride_with_dilation=[False, True, True])
    except OSError as error:
        raise DataUnavailable(
            f"ImageNet weights of ResNet-50 cannot be downloaded ({error}); use pretrained=False"
        ) from error
    if in_channels != 3:
        network.conv1 = nn.Conv2d(in_channels, 64, 7, stride=2, padding=3, bias=False)
        nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
    del network.avgpool, network.fc
    backbone = nn.Sequential()
    for name, layer in network.named_children():
        backbone.add_module(name, layer)
    return DeepLabV3(backbone, 2048, n_classes)


def deeplabv3_mobilenetv2(n_classes: int, in_channels: int) -> DeepLabV3:
    """DeepLabV3 on the MobileNetV2 variant of DFAD's code (see `InvertedResidual`), never pretrained."""
    backbone = nn.Sequential(
        nn.Conv2d(in_channels, 32, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU6()
    )
    width = 32
    # From stride 8 on, what would be a group's stride dilates the groups after it instead.
    for expansion, channels, n_blocks, first_stride, dilation in (
        (1, 16, 1, 1, 1),
        (6, 24, 2, 2, 1),
        (6, 32, 3, 2, 1),
        (6, 64, 4, 1, 1),
        (6, 96, 3, 1, 2),
        (6, 160, 3, 1, 2),
        (6, 320, 1, 1, 4),
    ):
        for block in range(n_blocks):
            stride = first_stride if block == 0 else 1
            backbone.append(InvertedResidual(width, channels, stride, dilation, expansion))
            width = channels
    for layer in backbone.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)
    return DeepLabV3(backbone, width, n_classes)


class InvertedResidual(nn.Module):
    """Expand by a 1x1 convolution, filter each channel by 3x3, project; add the input where shapes agree.

    Unlike torchvision's, the input is padded *before* the expansion and the 3x3 convolution is not, so the
    border is what expansion and BN make of zeros.
    """

    def __init__(self, in_channels: int, channels: int, stride: int, dilation: int, expansion: int) -> None:
        super().__init__()
        hidden = in_channels * expansion
        self.pad = nn.ZeroPad2d(dilation)
        self.residual = stride == 1 and in_channels == channels
        self.expand = nn.Sequential()
        if expansion != 1:
            self.expand.append(nn.Conv2d(in_channels, hidden, 1, bias=False))
            self.expand.append(nn.BatchNorm2d(hidden))
            self.expand.append(nn.ReLU6())
        self.filter = nn.Sequential(
            nn.Conv2d(hidden, hidden, 3, stride, dilation=dilation, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU6(),
        )
        self.project = nn.Sequential(nn.Conv2d(hidden, channels, 1, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.filter(self.expand(self.pad(x))))
        return x + y if self.residual else y
