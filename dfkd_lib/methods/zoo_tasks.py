"""Tasks of a zoo: what each asks of an image, with every target made from the image or its class label.

A small stand-in for Taskonomy: semantic tasks read classes, geometric ones undo what was done to the image, low-level
ones draw an image. Random parts come from a stream that the caller passes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data import ImageSet, load
from ..data.attributes import superclasses
from ..errors import unknown

SEMANTIC, GEOMETRIC, LOW_LEVEL = "semantic", "geometric", "low-level"
CLASSES, VECTOR, IMAGE, PIXELS = "classes", "vector", "image", "classes of pixels"
NOT_ASKED = -1  # label of an image that a task does not have

# What ten classes become in each grouping.
_DIGITS = {
    "group-binary": [0, 1, 0, 1, 0, 1, 0, 1, 0, 1],  # odd
    "group-2": [0, 0, 0, 0, 0, 1, 1, 1, 1, 1],  # five or more
    "attribute": [1, 0, 0, 0, 0, 0, 1, 0, 1, 1],  # a closed loop
}
_CIFAR10 = {
    "group-binary": [0, 0, 1, 1, 1, 1, 1, 1, 0, 0],  # an animal
    "group-2": [-1, -1, 0, 1, 2, 3, 4, 5, -1, -1],  # which animal
    "attribute": [0, 1, -1, -1, -1, -1, -1, -1, 2, 3],  # which vehicle
}
GROUPINGS = {"digits": _DIGITS, "mnist": _DIGITS, "cifar10": _CIFAR10}
# Four clusters of colours, RGB: k-means of the pixels of CIFAR-10's training images, from any first centres.
COLOURS = ((0.187, 0.176, 0.153), (0.426, 0.404, 0.343), (0.621, 0.614, 0.575), (0.852, 0.862, 0.862))
Make = Callable[[Tensor, Tensor, torch.Generator], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        group: semantic, geometric or low-level.
        kind: of the target: "classes" int64 [B] with -1 where the task has no answer, "vector" float [B, K],
            "image" float [B, C', H, W], or "classes of pixels" int64 [B, H, W].
        n_outputs: classes, numbers, or channels C'.
        make: images [B, C, H, W] in [0, 1], labels [B], stream -> input [B, C, H, W], target.
        dataset: whose images and labels the task takes; empty for those of the zoo.
        grey: the network sees the luminance of what it is given; its maps then lie in colours, as those of others do.
    """

    name: str
    group: str
    kind: str
    n_outputs: int
    make: Make
    dataset: str = ""
    grey: bool = False

    def images_of(self, images: ImageSet, last: bool = False) -> ImageSet:
        """The task's own images in the place of the zoo's: as many, of the same split, the first or the last.

        Raises:
            DataUnavailable: its dataset is neither on disk nor reachable.
        """
        if not self.dataset:
            return images
        whole, n = load(self.dataset, images.split, device=images.device), len(images)
        return whole.take(range(len(whole) - n, len(whole))) if last else whole.take(n)


def tasks(dataset: str, channels: int) -> dict[str, Task]:
    """All tasks of a dataset of ten classes, by name; for CIFAR-10 also those of colours and of CIFAR-100's classes.

    Raises:
        InputError: no groups of classes are known for this dataset.
    """
    if dataset not in GROUPINGS:
        raise unknown("dataset of a zoo", dataset, GROUPINGS)

    semantic = {"class-all": list(range(10)), **GROUPINGS[dataset]}
    found = [Task(n, SEMANTIC, CLASSES, max(lookup) + 1, _of_labels(lookup)) for n, lookup in semantic.items()]
    found += [
        Task("autoencoder", LOW_LEVEL, IMAGE, channels, lambda x, y, g: (x, x)),
        Task("denoise", LOW_LEVEL, IMAGE, channels, lambda x, y, g: (x + 0.3 * _normal(x, g), x)),
        Task("inpaint", LOW_LEVEL, IMAGE, channels, lambda x, y, g: (without_centre(x), x)),
        Task("edge2d", LOW_LEVEL, IMAGE, 1, lambda x, y, g: (x, sobel(x))),
        Task("keypoint2d", LOW_LEVEL, IMAGE, 1, lambda x, y, g: (x, harris(x))),
        Task("super-res", LOW_LEVEL, IMAGE, channels, lambda x, y, g: (coarse(x), x)),
        Task("rotation", GEOMETRIC, CLASSES, 4, _rotation),
        Task("jigsaw", GEOMETRIC, CLASSES, 24, _jigsaw),
        Task("flip", GEOMETRIC, CLASSES, 2, _flip),
        Task("moments", LOW_LEVEL, VECTOR, 3 if channels == 1 else 4, lambda x, y, g: (x, moments(x))),
    ]
    if dataset == "cifar10":
        found += [
            Task("class-fine", SEMANTIC, CLASSES, 100, _of_labels(list(range(100))), dataset="cifar100"),
            Task("class-coarse", SEMANTIC, CLASSES, 20, _of_labels(_coarse_labels()), dataset="cifar100"),
            Task("colourise", LOW_LEVEL, IMAGE, 2, lambda x, y, g: (x, opponents(x)), grey=True),
            Task("segment2d", LOW_LEVEL, PIXELS, len(COLOURS), lambda x, y, g: (x, colour_clusters(x))),
        ]
    return {task.name: task for task in found}


def _of_labels(lookup: list[int]) -> Make:
    table = torch.tensor(lookup)
    return lambda x, y, g: (x, table.to(y.device)[y])


def _coarse_labels() -> list[int]:
    """The superclass of each class of CIFAR-100, whose labels are in alphabetical order."""
    of_class = {name: i for i, members in enumerate(superclasses().values()) for name in members}
    return [of_class[name] for name in sorted(of_class)]


def _normal(x: Tensor, g: torch.Generator) -> Tensor:
    return torch.randn(x.shape, generator=g, device=g.device).to(x)


def _choice(n: int, x: Tensor, g: torch.Generator) -> Tensor:
    return torch.randint(n, (len(x),), generator=g, device=g.device).to(x.device)


def without_centre(x: Tensor) -> Tensor:
    """Images with the middle half of each side set to 0."""
    h, w = x.shape[-2:]
    hidden = x.clone()
    hidden[..., h // 4 : h - h // 4, w // 4 : w - w // 4] = 0
    return hidden


def luminance(x: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, 1, H, W]: ITU-R 601 for three channels, the image itself for one."""
    if x.shape[1] == 1:
        return x
    weights = torch.tensor([0.299, 0.587, 0.114], dtype=x.dtype, device=x.device)
    return (x * weights[:, None, None]).sum(1, keepdim=True)


def opponents(x: Tensor) -> Tensor:
    """Two opponent channels, red less green and yellow less blue: [B, 3, H, W] -> [B, 2, H, W] in [-1, 1]."""
    red, green, blue = x.unbind(1)
    return torch.stack([red - green, (red + green) / 2 - blue], 1)


def colour_clusters(x: Tensor) -> Tensor:
    """The nearest of `COLOURS` at each pixel: [B, 3, H, W] -> int64 [B, H, W]."""
    centres = torch.tensor(COLOURS, dtype=x.dtype, device=x.device)
    return (x[:, None] - centres[:, :, None, None]).square().sum(2).argmin(1)


class Grey(nn.Module):
    """Images [B, 3, H, W] -> their luminance in three equal channels."""

    def forward(self, x: Tensor) -> Tensor:
        return luminance(x).expand_as(x)


def _slopes(x: Tensor) -> tuple[Tensor, Tensor]:
    """Sobel's derivatives of the luminance along width and height, [B, 1, H, W] each; borders are repeated."""
    along = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]], dtype=x.dtype, device=x.device) / 4
    padded = F.pad(luminance(x), (1, 1, 1, 1), mode="replicate")
    return F.conv2d(padded, along[None, None]), F.conv2d(padded, along.T[None, None])


def sobel(x: Tensor) -> Tensor:
    """Gradient magnitude of the luminance, [B, 1, H, W], 0 or more."""
    horizontal, vertical = _slopes(x)
    return (horizontal.square() + vertical.square()).sqrt()


def harris(x: Tensor, k: float = 0.05) -> Tensor:
    """Harris' corner response over 3x3 windows, det M - k tr(M)^2, divided by each image's largest magnitude."""
    horizontal, vertical = _slopes(x)
    xx, yy, xy = (F.avg_pool2d(p, 3, 1, 1) for p in (horizontal**2, vertical**2, horizontal * vertical))
    response = xx * yy - xy**2 - k * (xx + yy) ** 2
    return response / response.abs().amax((1, 2, 3), keepdim=True).clamp_min(1e-12)


def coarse(x: Tensor) -> Tensor:
    """Images at half their resolution, by means of 2x2 pixels, in their former size."""
    return F.interpolate(F.avg_pool2d(x, 2), size=x.shape[-2:], mode="nearest")


def moments(x: Tensor) -> Tensor:
    """Grey images: centroid (x, y) in [-1, 1] and mean brightness, [B, 3]; colour: mean RGB and contrast, [B, 4]."""
    if x.shape[1] == 3:
        return torch.cat([x.mean((2, 3)), x.std((1, 2, 3))[:, None]], 1)
    h, w = x.shape[-2:]
    down, across = (torch.linspace(-1, 1, n, dtype=x.dtype, device=x.device) for n in (h, w))
    mass = x.sum((1, 2, 3)).clamp_min(1e-6)
    centre_x, centre_y = (x[:, 0] * across).sum((1, 2)) / mass, (x[:, 0] * down[:, None]).sum((1, 2)) / mass
    return torch.stack([centre_x, centre_y, x.mean((1, 2, 3))], 1)


def _rotation(x: Tensor, y: Tensor, g: torch.Generator) -> tuple[Tensor, Tensor]:
    turns = _choice(4, x, g)
    turned = torch.stack([torch.rot90(x, k, (2, 3)) for k in range(4)])
    return turned[turns, torch.arange(len(x), device=x.device)], turns


def _flip(x: Tensor, y: Tensor, g: torch.Generator) -> tuple[Tensor, Tensor]:
    mirrored = _choice(2, x, g)
    return torch.where(mirrored.bool()[:, None, None, None], x.flip(3), x), mirrored


def _jigsaw(x: Tensor, y: Tensor, g: torch.Generator) -> tuple[Tensor, Tensor]:
    orders = torch.tensor(list(itertools.permutations(range(4))), device=x.device)
    which = _choice(24, x, g)
    b, c, h, w = x.shape
    tiles = x.view(b, c, 2, h // 2, 2, w // 2).permute(0, 2, 4, 1, 3, 5).reshape(b, 4, c, h // 2, w // 2)
    moved = tiles[torch.arange(b, device=x.device)[:, None], orders[which]]
    return moved.view(b, 2, 2, c, h // 2, w // 2).permute(0, 3, 1, 4, 2, 5).reshape(x.shape), which


class Heads(nn.Module):
    """N heads side by side, one per representation: linear, ReLU, linear; equal first weights for all.

    Classes and numbers are read from all of z, pixels at each place of z for those that it stands for.

    Args:
        z_shape: (C, h, w).
        side: of the images.
    """

    def __init__(self, n: int, task: Task, z_shape: tuple[int, int, int], side: int, width: int) -> None:
        super().__init__()
        self.task, self.scale, self.draws = task, side // z_shape[1], task.kind in (IMAGE, PIXELS)
        n_in = z_shape[0] if self.draws else math.prod(z_shape)
        n_out = task.n_outputs * (self.scale**2 if self.draws else 1)
        layers = nn.Linear(n_in, width), nn.Linear(width, n_out)
        self.weights = nn.ParameterList(layer.weight.detach().T.repeat(n, 1, 1) for layer in layers)
        self.biases = nn.ParameterList(layer.bias.detach().repeat(n, 1, 1) for layer in layers)

    def forward(self, z: Tensor) -> Tensor:
        """z [N, B, C, h, w] -> outputs [N, B, K] or, for each pixel, [N, B, C', H, W]."""
        n, b, c, h, w = z.shape
        rows = z.movedim(2, 4).reshape(n, b * h * w, c) if self.draws else z.flatten(2)
        hidden = F.relu(torch.baddbmm(self.biases[0], rows, self.weights[0]))
        out = torch.baddbmm(self.biases[1], hidden, self.weights[1])
        if not self.draws:
            return out
        places = out.view(n * b, h, w, -1).permute(0, 3, 1, 2)
        return F.pixel_shuffle(places, self.scale).unflatten(0, (n, b))

    def losses(self, out: Tensor, y: Tensor) -> Tensor:
        """Cross-entropy, 0 where nothing is asked, or mean squared error, of each sample: [N, B]."""
        n = len(out)
        if self.task.kind in (CLASSES, PIXELS):
            labels = y.repeat(n, *[1] * (y.ndim - 1))
            found = F.cross_entropy(out.flatten(0, 1), labels, reduction="none", ignore_index=NOT_ASKED)
            return found.view(n, len(y), -1).mean(2)
        return (out - y).square().flatten(2).mean(2)
