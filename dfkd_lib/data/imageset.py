"""A dataset in one piece: all images in one tensor, on one device."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..errors import InputError
from . import guard


class ImageSet:
    """Images with their labels, kept as bytes on one device and handed out in batches of floats.

    Attributes:
        classes: class names; empty when there are no labels.
        name, split: where the images come from; any split but "test" and "synthetic" (images that a network
            made) is closed to data-free methods.
        void: mask value that belongs to no class, or None.
        skipped: files of a folder that were no readable images.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor | None = None,
        *,
        classes: Sequence[str] = (),
        name: str,
        split: str,
        void: int | None = None,
    ) -> None:
        """
        Args:
            images: uint8 [N, C, H, W].
            labels: int64 [N], masks uint8 [N, H, W], or None.

        Raises:
            InputError: types or shapes do not fit.
        """
        if images.dtype != torch.uint8 or images.ndim != 4:
            raise InputError(f"{name}: images must be uint8 [N, C, H, W], not {_kind(images)}")
        n, _, h, w = images.shape
        if labels is not None:
            expected = (torch.int64, (n,)) if labels.ndim == 1 else (torch.uint8, (n, h, w))
            if (labels.dtype, tuple(labels.shape)) != expected:
                raise InputError(
                    f"{name}: labels of {_kind(images)} must be int64 [{n}] or masks uint8 [{n}, {h}, {w}], "
                    f"not {_kind(labels)}"
                )
        self._images = images
        self._labels = labels
        self._fingerprint = ""
        self.classes = tuple(classes)
        self.name = name
        self.split = split
        self.void = void
        self.skipped = 0

    def __repr__(self) -> str:
        size = "x".join(map(str, (len(self), *self.image_shape)))
        return f"ImageSet({self.name} {self.split}: {size}, {self.n_classes} classes, {self.device})"

    def __len__(self) -> int:
        return len(self._images)

    @property
    def images(self) -> Tensor:
        """uint8 [N, C, H, W]."""
        guard.check(self.name, self.split)
        return self._images

    @property
    def labels(self) -> Tensor | None:
        """int64 [N], masks uint8 [N, H, W], or None."""
        guard.check(self.name, self.split)
        return self._labels

    @property
    def task(self) -> str:
        return "segmentation" if self._labels is not None and self._labels.ndim == 3 else "classification"

    @property
    def n_classes(self) -> int:
        return len(self.classes)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        _, c, h, w = self._images.shape
        return c, h, w

    @property
    def device(self) -> torch.device:
        return self._images.device

    @property
    def fingerprint(self) -> str:
        """12 hexadecimal digits that stand for the images, labels and classes, in this order."""
        if not self._fingerprint:
            digest = hashlib.sha256(repr(self.classes).encode())
            for part in (self._images, self._labels):
                if part is not None:
                    digest.update(repr(tuple(part.shape)).encode())
                    digest.update(part.cpu().contiguous().numpy().data)
            self._fingerprint = digest.hexdigest()[:12]
        return self._fingerprint

    def to(self, device: str | torch.device) -> ImageSet:
        """The same set on another device."""
        labels = None if self._labels is None else self._labels.to(device)
        moved = self._like(self._images.to(device), labels)
        moved._fingerprint = self._fingerprint
        return moved

    def take(self, indices: int | Sequence[int] | Tensor) -> ImageSet:
        """A smaller set: the first `indices` images, or those at the given indices.

        Raises:
            InputError: fewer images than asked for.
        """
        if isinstance(indices, int):
            if not 0 <= indices <= len(self):
                raise InputError(f"cannot take {indices} images of {self!r}; take at most {len(self)}")
            indices = range(indices)
        if not isinstance(indices, Tensor) and len(indices) and not 0 <= min(indices) <= max(indices) < len(self):
            raise InputError(f"cannot take image {max(indices)} of {self!r}; it has {len(self)}")
        at = torch.as_tensor(indices, dtype=torch.int64, device=self.device)
        labels = None if self._labels is None else self._labels.index_select(0, at)
        return self._like(self._images.index_select(0, at), labels)

    def of_classes(self, chosen: Sequence[int]) -> ImageSet:
        """The images of some classes, in their order here; the classes are numbered anew in the order chosen.

        Raises:
            InputError: no labels, masks for labels, or no such class.
        """
        labels = self.labels
        if labels is None or labels.ndim != 1:
            raise InputError(f"{self.name} has no class per image; classes cannot be chosen from it")
        if not chosen or len(set(chosen)) < len(chosen) or not all(0 <= c < self.n_classes for c in chosen):
            raise InputError(f"classes of {self.name} are numbers from 0 to {self.n_classes - 1}, not {list(chosen)}")
        number = torch.full((self.n_classes,), -1, dtype=torch.int64, device=self.device)
        number[torch.tensor(chosen, device=self.device)] = torch.arange(len(chosen), device=self.device)
        at = (number[labels] >= 0).nonzero()[:, 0]
        part = self._like(self._images[at], number[labels[at]])
        part.classes = tuple(self.classes[c] for c in chosen)
        return part

    def batch(self, indices: Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
        """Images and labels at `indices` (int64 [B], on any device), on the device of the set.

        Returns:
            x float32 [B, C, H, W] in [0, 1]; y int64 [B] or [B, H, W]. Where there are no labels, y is -1.

        Raises:
            DataFreeViolation: inside `no_training_data`, unless the split is "test" or "synthetic".
        """
        at = torch.as_tensor(indices, dtype=torch.int64).to(self.device, non_blocking=True)
        y = None if self._labels is None else self._labels.index_select(0, at)
        return self._ready(self.images.index_select(0, at), y)

    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """All images in order, as `batch` gives them; the last batch may be smaller."""
        for start in range(0, len(self), batch_size):
            part = slice(start, start + batch_size)
            yield self._ready(self.images[part], None if self._labels is None else self._labels[part])

    def _ready(self, images: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        if labels is None:
            labels = torch.full((len(images),), -1, device=self.device)
        return images.float().div_(255), labels.long()

    def _like(self, images: Tensor, labels: Tensor | None) -> ImageSet:
        other = ImageSet(images, labels, classes=self.classes, name=self.name, split=self.split, void=self.void)
        other.skipped = self.skipped
        return other


def pick(labels: Tensor, per_class: int, generator: torch.Generator | None = None) -> Tensor:
    """Indices of `per_class` images of each class, the classes one after the other, drawn at random.

    Raises:
        InputError: a class has fewer.
    """
    chosen = []
    for label in labels.unique().tolist():
        at = (labels == label).nonzero().flatten()
        if len(at) < per_class:
            raise InputError(f"class {label} has {len(at)} images, fewer than the {per_class} asked for")
        order = torch.randperm(len(at), generator=generator, device=None if generator is None else generator.device)
        chosen.append(at[order[:per_class].to(at.device)])
    return torch.cat(chosen)


def _kind(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}"
