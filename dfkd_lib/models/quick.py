"""A small network that learns 32 px photographs within minutes on a processor, and the whitening it starts from.

Its ingredients are those of the CIFAR-10 speed runs (arXiv 2404.00498 and the work it builds on): a frozen
layer that whitens patches, three stages that pool between convolution and batch normalisation, convolutions
that start as the identity on their inputs. The widths are ours, chosen for few multiply-accumulates.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InputError
from .small import conv_bn_relu

SMALLEST_SIDE = 16
_PATCH = 2


class Whitening(nn.Module):
    """Frozen convolution whose responses to patches of natural images are uncorrelated and of variance one.

    [B, C, H, W] -> [B, 2 C k^2, H - k + 1, W - k + 1]: every filter comes with its negative, so that what the next
    ReLU cuts from one remains in the other. The filters are a buffer, which no optimiser sees and every state
    dict holds; until :meth:`fit` they are random.

    Args:
        kernel: side k of the patches.
    """

    weight: Tensor

    def __init__(self, in_channels: int, kernel: int = _PATCH) -> None:
        super().__init__()
        filters = torch.randn(in_channels * kernel**2, in_channels, kernel, kernel) / (in_channels**0.5 * kernel)
        self.register_buffer("weight", torch.cat([filters, -filters]))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight)

    def fit(self, x: Tensor, eps: float = 1e-3) -> None:
        """Set the filters to v_i / sqrt(l_i + eps), for the eigenpairs (l_i, v_i) of the covariance of all patches.

        Args:
            x: images as the layer will see them [B, C, H, W].
            eps: keeps directions without variance from being amplified.
        """
        patches = F.unfold(x.double(), self.weight.shape[-1]).transpose(1, 2).flatten(0, 1)
        values, vectors = torch.linalg.eigh(torch.cov(patches.T))
        # The solver leaves the signs open; they only decide which of the two copies comes first.
        filters = (vectors / (values + eps).sqrt()).T.reshape(-1, *self.weight.shape[1:])
        self.weight.copy_(torch.cat([filters, -filters]))

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]}, {self.weight.shape[0]}, kernel_size={self.weight.shape[-1]}"


class QuickNet(nn.Module):
    """Normalised images [B, C, H, W], from 16 px -> logits [B, n_classes].

    Args:
        widths: channels of the three stages, each of two 3x3 convolutions with batch normalisation.
        whitened: start with :class:`Whitening`; otherwise a learned convolution of its shape takes that place, as
            in a student that must not know anything about the data.

    Raises:
        InputError: in forward, for smaller images.
    """

    def __init__(
        self, widths: tuple[int, int, int], n_classes: int, in_channels: int, *, whitened: bool = True
    ) -> None:
        super().__init__()
        width = 2 * in_channels * _PATCH**2
        if whitened:
            self.stem = nn.Sequential(Whitening(in_channels), nn.ReLU())
        else:
            self.stem = nn.Sequential(
                nn.Conv2d(in_channels, width, _PATCH, bias=False), nn.BatchNorm2d(width), nn.ReLU()
            )
        self.stages = nn.Sequential()
        for channels in widths:
            self.stages.append(_stage(width, channels))
            width = channels
        self.classifier = nn.Linear(width, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        if min(x.shape[-2:]) < SMALLEST_SIDE:
            raise InputError(
                f"QuickNet reads images from {SMALLEST_SIDE}x{SMALLEST_SIDE}, not {x.shape[-2]}x{x.shape[-1]}; "
                f"load the data with image_size={SMALLEST_SIDE} or more, or choose digits_cnn"
            )
        return self.classifier(self.stages(self.stem(x)).amax((2, 3)))


def _stage(inputs: int, channels: int) -> nn.Sequential:
    """Two 3x3 convolutions; pooling ahead of the normalisation leaves it a quarter of the work."""
    stage = nn.Sequential(
        nn.Conv2d(inputs, channels, 3, padding=1, bias=False),
        nn.MaxPool2d(2),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        *conv_bn_relu(channels, channels),
    )
    for layer in stage:
        if isinstance(layer, nn.Conv2d):
            with torch.no_grad():
                nn.init.dirac_(layer.weight[: layer.in_channels])
    return stage


def whiten(module: nn.Module, x: Tensor) -> None:
    """Fit the whitening of a network from `models.build` to images, if it has one; anything else stays as it is.

    Args:
        x: images [B, C, H, W] in [0, 1].
    """
    for layer in module.modules():
        if isinstance(layer, Whitening):
            layer.fit(module.get_submodule("normalize")(x))
