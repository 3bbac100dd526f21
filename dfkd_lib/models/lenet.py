"""LeNet-5 and its half, the MNIST pair of DFAD (arXiv 1912.11006), which has no batch normalisation.

With it, a form of our own, the pair also serves the methods that match a teacher's batch-norm statistics.
"""

from __future__ import annotations

from torch import Tensor, nn

from ..errors import InputError


class LeNet5(nn.Module):
    """Normalised images [B, C, 32, 32] -> logits [B, n_classes].

    Args:
        widths: output channels of the three 5x5 convolutions, then of the hidden linear layer.
        batch_norm: normalise what each convolution gives, ahead of its ReLU; the convolutions then have no bias.

    Raises:
        InputError: in forward, for images of another size.
    """

    def __init__(
        self, widths: tuple[int, int, int, int], n_classes: int, in_channels: int, *, batch_norm: bool = False
    ) -> None:
        super().__init__()
        c1, c2, c3, hidden = widths
        self.features = nn.Sequential(
            *_convolution(in_channels, c1, batch_norm), nn.MaxPool2d(2),
            *_convolution(c1, c2, batch_norm), nn.MaxPool2d(2),
            *_convolution(c2, c3, batch_norm), nn.Flatten(),
            nn.Linear(c3, hidden), nn.ReLU(),
        )  # fmt: skip
        self.classifier = nn.Linear(hidden, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-2:] != (32, 32):
            raise InputError(
                f"LeNet-5 reads 32x32 images, not {x.shape[-2]}x{x.shape[-1]}; "
                "load the data with image_size=32, or choose digits_cnn"
            )
        return self.classifier(self.features(x))


def _convolution(inputs: int, channels: int, batch_norm: bool) -> list[nn.Module]:
    normalised: list[nn.Module] = [nn.BatchNorm2d(channels)] if batch_norm else []
    return [nn.Conv2d(inputs, channels, 5, bias=not batch_norm), *normalised, nn.ReLU()]
