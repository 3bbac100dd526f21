"""Knowledge Amalgamation from Heterogeneous Networks by Common Feature Learning, arXiv 1906.10546.

The features of the teachers' and the student's last stage are mapped by small networks into one space. The student
imitates every teacher there, by the maximum mean discrepancy of the mapped batches; that each teacher's own features
can be rebuilt from the space keeps it from collapsing. Architectures may differ.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InputError
from .amalgamation import FeatureTerm, features_at

WIDTHS = (0.001, 0.01, 0.05, 0.1, 0.2, 1.0, 2.0)


def mmd2(x: Tensor, y: Tensor) -> Tensor:
    """MMD^2(X, Y) = max(0, 1/B^2 sum_ij [k(x_i, x_j) + k(y_i, y_j) - 2 k(x_i, y_j)]), the biased estimator.

    k(x, y) = sum_sigma exp(-||x - y||^2 / 2 sigma^2). Two batches of one law do not give 0: each sample is at distance
    0 from itself, and on vectors of unit length the narrow kernels see nothing else. They add a constant of about
    2/B each and no gradient; the two wide ones do the work.

    Args:
        x, y: [B, D], rows of unit length.

    Returns:
        Scalar in [0, 14]; its gradient is finite at x = y.
    """
    with torch.autocast(x.device.type, enabled=False):
        if x.dtype != torch.float64:
            x, y = x.float(), y.float()
        both = torch.cat([x, y])
        squares = both.square().sum(1)
        distances = (squares[:, None] + squares[None] - 2 * both @ both.T).clamp_min(1e-12)
        kernel = torch.stack([torch.exp(-distances / (2 * sigma**2)) for sigma in WIDTHS]).sum(0)
        b = len(x)
        return (kernel[:b, :b] + kernel[b:, b:] - 2 * kernel[:b, b:]).mean().clamp_min(0)


def flat(h: Tensor) -> Tensor:
    """Feature maps [B, h, H, W] as rows of unit length [B, h H W]."""
    return F.normalize(h.flatten(1), dim=1)


def pooled(features: Sequence[Tensor]) -> list[Tensor]:
    """Feature maps of several networks, averaged down to the smallest height and width among them."""
    size = (min(f.shape[2] for f in features), min(f.shape[3] for f in features))
    return [f if f.shape[2:] == size else F.adaptive_avg_pool2d(f, size) for f in features]


class Residual(nn.Module):
    """Two 3x3 convolutions beside a shortcut, without bias and without batch normalisation."""

    def __init__(self, inputs: int, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, channels, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.shortcut = nn.Identity() if inputs == channels else nn.Conv2d(inputs, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv2(F.relu(self.conv1(x))) + self.shortcut(x))


class CommonSpace(FeatureTerm):
    """h_i = E(A_i(F_i)) for the student and all teachers, and F^_t = D_t(h_t) for the teachers.

    The terms: "MMD", sum_t MMD^2(h_s, h_t), whose gradient goes into h_t as well; "reconstruction",
    sum_t mean ||F^_t - F_t||^2.

    Args:
        places: one module name for the student and for each teacher: where its last feature map is.
        channels: of the feature maps there, the student first.
        width: h, channels of the common space; 128 in the authors' code, whose maps have 512 channels or more.
        mmd, reconstruction: lambda and lambda beta, 10 in the authors' code; 20 in their engine for four teachers.
    """

    def __init__(
        self,
        places: Sequence[str],
        channels: Sequence[int],
        *,
        width: int = 64,
        mmd: float = 10.0,
        reconstruction: float = 10.0,
    ) -> None:
        super().__init__()
        self.places = [[place] for place in places]
        self.weights = {"MMD": mmd, "reconstruction": reconstruction}
        self.align = nn.ModuleList(nn.Sequential(nn.Conv2d(c, 2 * width, 1, bias=False), nn.ReLU()) for c in channels)
        self.extract = nn.Sequential(Residual(2 * width, width), Residual(width, width), Residual(width, width))
        self.decode = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, c, 3, padding=1, bias=False), nn.ReLU(), nn.Conv2d(c, c, 1, bias=False))
            for c in channels[1:]
        )

    @classmethod
    def between(
        cls,
        teachers: Sequence[nn.Module],
        student: nn.Module,
        *,
        places: Sequence[str],
        x: Tensor,
        width: int = 64,
        mmd: float = 10.0,
        reconstruction: float = 10.0,
    ) -> CommonSpace:
        """The common space of networks of any architecture.

        Args:
            places: module names, the student's first: where each network has its last feature map [B, C, H, W].
            x: images on which the shapes are seen.

        Raises:
            InputError: no such module, or one that gives no feature map; the message names it.
        """
        networks = [student, *teachers]
        if len(places) != len(networks):
            raise InputError(
                f"{len(networks)} networks need {len(networks)} places, the student's first; got {len(places)}"
            )
        channels = []
        for i, (network, place) in enumerate(zip(networks, places, strict=True)):
            (f,) = features_at(network, x, [place])
            if f.ndim != 4:
                raise InputError(
                    f"place {place!r} of {'the student' if i == 0 else f'teacher {i}'} gives "
                    f"{'x'.join(map(str, f.shape[1:]))}, which is no feature map; choose a module before the flattening"
                )
            channels.append(f.shape[1])
        return cls(places, channels, width=width, mmd=mmd, reconstruction=reconstruction)

    def embed(self, features: Sequence[Tensor]) -> list[Tensor]:
        """h_i of all networks, the student first: [B, h, H, W] each."""
        return [self.extract(align(f)) for align, f in zip(self.align, pooled(features), strict=True)]

    def forward(self, f_s: list[Tensor], f_t: list[list[Tensor]]) -> dict[str, Tensor]:
        features = pooled([*f_s, *(f[0] for f in f_t)])
        h_s, *h_t = self.embed(features)
        rebuilt = [decode(h) for decode, h in zip(self.decode, h_t, strict=True)]
        return {
            "MMD": torch.stack([mmd2(flat(h_s), flat(h)) for h in h_t]).sum(),
            "reconstruction": torch.stack(
                [F.mse_loss(guess, f) for guess, f in zip(rebuilt, features[1:], strict=True)]
            ).sum(),
        }
