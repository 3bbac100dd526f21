"""LeNet-5 and its half, the MNIST pair of DFAD (arXiv 1912.11006): no batch normalisation in either."""

from __future__ import annotations

from torch import Tensor, nn

from ..errors import InputError


class LeNet5(nn.Module):
    """Normalised images [B, C, 32, 32] -> logits [B, n_classes].

    Args:
        widths: output channels of the three 5x5 convolutions, then of the hidden linear layer.

    Raises:
        InputError: in forward, for images of another size.
    """

    def __init__(self, widths: tuple[int, int, int, int], n_classes: int, in_channels: int) -> None:
        super().__init__()
        c1, c2, c3, hidden = widths
        self.features = nn.Sequential(
            nn.Conv2d(in_channels, c1, 5), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(c1, c2, 5), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(c2, c3, 5), nn.ReLU(), nn.Flatten(),
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
