"""How close two images are: PSNR and SSIM, one figure per image. And how close two sets are: the kernel distance."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """Peak signal-to-noise ratio -10 log10 mean (x - y)^2 of images in [0, 1], in decibels; infinite for equal ones.

    Args:
        x, y: [B, C, H, W].

    Returns:
        [B], 0 where the mean squared error is 1.

    Raises:
        InputError: different shapes.
    """
    _same_shape(x, y)
    return -10 * torch.log10((x - y).square().flatten(1).mean(1))


def ssim(x: Tensor, y: Tensor, window: int = 11, sigma: float = 1.5) -> Tensor:
    """Structural similarity of images in [0, 1] (Wang et al., 2004), mean over pixels and channels.

    Means, variances and the covariance are taken under a Gaussian window, without padding; images smaller than the
    window get the largest odd window that fits. Constants (0.01)^2 and (0.03)^2.

    Args:
        x, y: [B, C, H, W].

    Returns:
        [B] in [-1, 1], 1 for equal images.

    Raises:
        InputError: different shapes.
    """
    _same_shape(x, y)
    channels, height, width = x.shape[1:]
    smallest = min(height, width)
    window = min(window, smallest - 1 + smallest % 2)
    offsets = torch.arange(window, device=x.device, dtype=x.dtype) - (window - 1) / 2
    line = torch.softmax(-(offsets**2) / (2 * sigma**2), 0)
    kernel = torch.outer(line, line).expand(channels, 1, window, window)

    def blur(image: Tensor) -> Tensor:
        return F.conv2d(image, kernel, groups=channels)

    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y, covariance = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2, blur(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (var_x + var_y + c2)
    return (luminance * structure).flatten(1).mean(1)


def kernel_distance(features: Tensor, real: Tensor) -> float:
    """The unbiased squared MMD between two sets, kernel (x.y / D + 1)^3: KID, in the features of our own classifier.

        mean over i != j of k(x_i, x_j) + mean over i != j of k(y_i, y_j) - 2 mean of k(x_i, y_j)

    Computed in double precision. Its expectation is 0 for two samples of one distribution, so it may be negative.

    Args:
        features, real: [N, D] and [M, D], at least 2 rows each.

    Raises:
        InputError: fewer rows.
    """
    x, y = features.double().cpu(), real.double().cpu()
    if min(len(x), len(y)) < 2:
        raise InputError(f"a kernel distance needs at least 2 rows of each set, not {len(x)} and {len(y)}")
    within = (_kernel(a, a) - float(_cubic(a.square().sum(1), a).sum()) for a in (x, y))
    alike = sum(total / (len(a) * (len(a) - 1)) for a, total in zip((x, y), within, strict=True))
    return alike - 2 * _kernel(x, y) / (len(x) * len(y))


def _kernel(x: Tensor, y: Tensor) -> float:
    """The sum of k over all pairs of rows, a block of rows at a time."""
    return sum(float(_cubic(rows @ y.T, y).sum()) for rows in x.split(1024))


def _cubic(products: Tensor, rows: Tensor) -> Tensor:
    return (products / rows.shape[1] + 1) ** 3


def _same_shape(x: Tensor, y: Tensor) -> None:
    if x.shape != y.shape:
        raise InputError(f"images of one shape can be compared, not {list(x.shape)} with {list(y.shape)}")
