"""Which layer of a source network to transfer from, measured: freeze its first layers, train the rest anew.

The experiment of :mod:`.depara` on layers. Every depth begins with the same fresh weights for the rest, so that no run
continues another, as the authors' runs do; frozen layers are in eval mode, so that their batch norm does not drift
towards the target.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..data import ImageSet, minibatches
from ..errors import InputError
from ..losses import cross_entropy
from ..runtime import Runtime
from ..training.modes import still
from ..training.players import Resumable, check_positive, freeze, update
from .zoo_tasks import sobel

POOL = 0  # in a list of widths: halve the resolution


def layered(
    widths: Sequence[int], hidden: int, image_shape: tuple[int, int, int], n_classes: int, batch_norm: bool = False
) -> nn.Sequential:
    """A network as a chain of layers: 3x3 convolutions, a hidden linear layer, the logits.

    Args:
        widths: channels of each convolution, `POOL` behind one for 2x2 max-pooling after it.

    Returns:
        Images [B, C, H, W] in [0, 1] -> logits [B, n_classes]. Its children are the layers; that of a convolution is
        convolution, batch norm if asked for, ReLU, pooling if asked for.
    """
    channels, height, width = image_shape
    network, layer = nn.Sequential(), nn.Sequential()
    for entry in widths:
        if entry == POOL:
            layer.append(nn.MaxPool2d(2))
            height, width = height // 2, width // 2
            continue
        layer = nn.Sequential(nn.Conv2d(channels, entry, 3, padding=1, bias=not batch_norm))
        if batch_norm:
            layer.append(nn.BatchNorm2d(entry))
        network.append(layer.append(nn.ReLU()))
        channels = entry
    network.append(nn.Sequential(nn.Flatten(), nn.Linear(channels * height * width, hidden), nn.ReLU()))
    return network.append(nn.Linear(hidden, n_classes))


@dataclass(frozen=True)
class Settings:
    """How the layers that are not frozen learn: cross-entropy, Adam at a constant rate.

    Attributes:
        n_steps, batch_size: updates, and images in each.
    """

    n_steps: int = 300
    batch_size: int = 64
    lr: float = 1e-3
    weight_decay: float = 1e-4

    def __post_init__(self) -> None:
        check_positive(self, "n_steps", "batch_size", "lr")


class PrefixTransfer(Resumable):
    """A source's first layers, frozen, and fresh layers behind them that learn the target; one update per :meth:`step`.

    What the frozen layers make of each image is computed once. Depth 0 is training from scratch.

    Args:
        source: a :func:`layered` network; it is copied.
        fresh: another with the target's classes, whose weights the layers behind the frozen ones start from; copied.
        depth: frozen layers, 0 to all but the logits.

    Attributes:
        network: all of it.
    """

    data_free: ClassVar[bool] = False
    PARTS: tuple[str, ...] = ("network", "optimizer", "scaler", "steps")

    def __init__(
        self,
        source: nn.Sequential,
        fresh: nn.Sequential,
        depth: int,
        images: ImageSet,
        settings: Settings,
        runtime: Runtime,
    ) -> None:
        if not 0 <= depth < len(fresh) or len(source) != len(fresh):
            raise InputError(f"depth must lie in 0..{len(fresh) - 1} for networks of equal length, not {depth}")
        prefix, rest = copy.deepcopy(source[:depth]), copy.deepcopy(fresh[depth:])
        self.network = runtime.prepare(nn.Sequential(*prefix, *rest))
        self.frozen, self.rest = freeze(self.network[:depth]), self.network[depth:].train()
        self.rest.requires_grad_(True)
        self.settings, self.runtime = settings, runtime
        with still(self.frozen), runtime.autocast():
            parts = [(self.frozen(runtime.images(x)), y) for x, y in images.to(runtime.device).batches(256)]
        self.features, self.labels = (torch.cat(part) for part in zip(*parts, strict=True))
        self.optimizer = torch.optim.Adam(self.rest.parameters(), settings.lr, weight_decay=settings.weight_decay)
        self.scaler = runtime.scaler()
        self.batches = minibatches(len(images), settings.batch_size, seed=runtime.seed, device=runtime.device)
        self.steps = 0

    def step(self) -> dict[str, Tensor]:
        """One update on the next batch; returns {"loss": ...}, detached."""
        at = self.batches(self.steps)
        with self.runtime.autocast():
            logits = self.rest(self.features[at]).to(self.runtime.dtype)
        loss = cross_entropy(logits, self.labels[at])
        update(self.optimizer, loss, self.scaler)
        self.steps += 1
        return {"loss": loss.detach()}


def font_digits(n: int, size: int, margin: int = 0, seed: int = 0) -> ImageSet:
    """Digits drawn from the DejaVu fonts that come with matplotlib: a synthetic domain with the classes of a real one.

    Font, rotation by up to 20 degrees and aspect, 0.8 to 1.2, are drawn at random; the digit is cropped and fills the
    height within the margin.

    Args:
        size: side of the images in pixels, white on black.
        margin: pixels left free on each side; 4 of 28 as in MNIST.
    """
    import matplotlib
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    fonts = [
        ImageFont.truetype(str(path), 64) for path in sorted(folder.glob("DejaVu*.ttf")) if "Display" not in path.name
    ]
    random, inner = np.random.RandomState(seed), size - 2 * margin
    images = torch.zeros(n, 1, size, size, dtype=torch.uint8)
    labels = torch.from_numpy(random.randint(0, 10, n)).long()
    for i, label in enumerate(labels.tolist()):
        sheet = Image.new("L", (128, 128))
        ImageDraw.Draw(sheet).text((36, 26), str(label), fill=255, font=fonts[random.randint(len(fonts))])
        turned = sheet.rotate(random.uniform(-20, 20), Image.Resampling.BILINEAR)
        digit = turned.crop(turned.getbbox())
        width = round(inner * digit.width / digit.height * random.uniform(0.8, 1.2))
        small = np.asarray(digit.resize((min(inner, max(1, width)), inner), Image.Resampling.BOX))
        left = (size - small.shape[1]) // 2
        images[i, 0, margin : margin + inner, left : left + small.shape[1]] = torch.from_numpy(small.copy())
    return ImageSet(images, labels, classes=[str(c) for c in range(10)], name="font digits", split="train")


def sketches(images: ImageSet) -> ImageSet:
    """The same images as inverted Sobel magnitudes, dark lines on white, with as many channels: a synthetic domain."""
    drawn = []
    for x, _ in images.batches(1024):
        lines = 1 - sobel(x) / sobel(x).amax((1, 2, 3), keepdim=True).clamp_min(1e-6)
        drawn.append((lines * 255).round().to(torch.uint8).expand(-1, x.shape[1], -1, -1))
    return ImageSet(
        torch.cat(drawn), images.labels, classes=images.classes, name=f"sketches of {images.name}", split=images.split
    )
