"""Features without a trained network: responses of patches to k-means centroids, for photographs of 32x32 pixels.

They are the visual embedding of the zero-shot chapters on a processor. Everything that is fitted (whitening,
centroids, standardisation, principal axes) is fitted to images of seen classes alone, and no label is used.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from .. import files
from ..errors import InputError
from ..locations import cache_root
from .imageset import ImageSet

SIDE, STRIDE, CONTRAST, WHITENING, THRESHOLD = 6, 2, 10 / 255, 0.1, 0.5


@dataclass(frozen=True)
class PatchFeatures:
    """What :func:`fit_patch_features` fitted: patches are whitened, held against centroids, rectified and pooled.

    Attributes:
        mean, whitening: of normalised patches, [108] and [108, 108].
        centroids: of unit length, [K, 108].
        shift, scale: of the 8 K pooled responses, on the source images.
        axes: principal axes of the standardised responses, [8 K, D].
    """

    mean: Tensor
    whitening: Tensor
    centroids: Tensor
    shift: Tensor
    scale: Tensor
    axes: Tensor

    def __call__(self, images: ImageSet, batch_size: int = 256) -> Tensor:
        """Features float32 [N, D], on the device of the images."""
        parts = [self._responses(x) for x, _ in images.batches(batch_size)]
        return torch.cat([((r - self.shift) / self.scale) @ self.axes for r in parts])

    def _responses(self, x: Tensor) -> Tensor:
        return _pooled(x, self.mean, self.whitening, self.centroids)


def patch_features(source: ImageSet, others: Mapping[str, ImageSet], *, seed: int = 0) -> dict[str, Tensor]:
    """Features of the source images and of others, from a fit to the source images; kept in the cache.

    Args:
        others: sets by name; what they show has no influence on the fit.

    Returns:
        {"source": float32 [N, 256], and each other name likewise}, on the CPU.
    """
    sets = {"source": source, **others}
    key = "-".join(
        [
            hashlib.sha256(Path(__file__).read_bytes()).hexdigest(),
            *(f"{name} {s.fingerprint}" for name, s in sets.items()),
        ]
    )
    path = cache_root() / "features" / f"{hashlib.sha256(f'{key}-{seed}'.encode()).hexdigest()[:16]}.safetensors"
    with files.lock(path.with_suffix(".lock"), what=f"features {path.name}"):
        if not path.is_file():
            fitted = fit_patch_features(source, seed=seed)
            with files.replace_file(path) as part:
                save_file({name: fitted(images).cpu().contiguous() for name, images in sets.items()}, part)
        return load_file(path)


def fit_patch_features(
    source: ImageSet, *, n_centroids: int = 300, n_components: int = 256, n_images: int = 4000, seed: int = 0
) -> PatchFeatures:
    """Fit the features to images of seen classes.

    6x6 patches at stride 2, each brought to mean 0 and contrast 1 (10/255 added to the variance), whitened by ZCA with
    0.1 added to the eigenvalues; spherical k-means, 8 rounds; responses max(0, z - 0.5) and max(0, -z - 0.5), averaged
    over the four quarters of the image; standardised; principal axes.

    Args:
        source: images [N, 3, H, W] of seen classes; labels are not read.
        n_components: D, at most 8 n_centroids.
        n_images: at most so many images, drawn at random, are fitted to, with 15 patches of each for the centroids.

    Raises:
        InputError: fewer images than components.
    """
    if min(len(source), n_images) < n_components or n_components > 8 * n_centroids:
        raise InputError(f"{len(source)} images cannot give {n_components} components; ask for fewer, or pass more")
    generator = torch.Generator().manual_seed(seed)
    chosen = source.take(torch.randperm(len(source), generator=generator)[:n_images])
    sampled = []
    for x, _ in chosen.batches(256):
        patches = _patches(x)
        at = torch.randint(patches.shape[1], (len(patches), 15), generator=generator).to(patches.device)
        sampled.append(torch.take_along_dim(patches, at[..., None], 1).flatten(0, 1))
    flat = torch.cat(sampled)
    mean = flat.mean(0)
    values, vectors = torch.linalg.eigh(torch.cov(flat.T))
    whitening = vectors @ torch.diag((values + WHITENING).rsqrt()) @ vectors.T
    centroids = _spherical_k_means(F.normalize((flat - mean) @ whitening), n_centroids, generator)
    responses = torch.cat([_pooled(x, mean, whitening, centroids) for x, _ in chosen.batches(256)])
    shift, scale = responses.mean(0), responses.std(0).clamp_min(1e-6)
    standard = (responses - shift) / scale
    _, vectors = torch.linalg.eigh(standard.T @ standard / len(standard))
    return PatchFeatures(mean, whitening, centroids, shift, scale, vectors.flip(1)[:, :n_components])


def _patches(x: Tensor) -> Tensor:
    """Images [B, C, H, W] -> patches [B, P, C * 36], each of mean 0 and about unit contrast."""
    flat = F.unfold(x, SIDE, stride=STRIDE).transpose(1, 2)
    centred = flat - flat.mean(2, keepdim=True)
    return centred / (centred.square().mean(2, keepdim=True) + CONTRAST).sqrt()


def _spherical_k_means(x: Tensor, n: int, generator: torch.Generator, rounds: int = 8) -> Tensor:
    """Directions [n, D] that points of unit length [N, D] gather about; one that nobody is near stays where it was."""
    centroids = x[torch.randperm(len(x), generator=generator)[:n].to(x.device)]
    for _ in range(rounds):
        nearest = torch.cat([(part @ centroids.T).argmax(1) for part in x.split(10_000)])
        sums = torch.zeros_like(centroids).index_add_(0, nearest, x)
        centroids = torch.where(sums.norm(dim=1, keepdim=True) > 0, F.normalize(sums), centroids)
    return centroids


def _pooled(x: Tensor, mean: Tensor, whitening: Tensor, centroids: Tensor) -> Tensor:
    """Rectified responses averaged over the quarters of each image: [B, C, H, W] -> [B, 8 K]."""
    z = (_patches(x) - mean) @ (whitening @ centroids.T)
    side = (x.shape[-1] - SIDE) // STRIDE + 1
    grid = torch.cat([(z - THRESHOLD).relu(), (-z - THRESHOLD).relu()], 2).transpose(1, 2)
    return F.adaptive_avg_pool2d(grid.unflatten(2, (-1, side)), 2).flatten(1)
