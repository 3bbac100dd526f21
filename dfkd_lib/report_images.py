"""What a report shows of the images of a distillation: HTML that needs no file beside it."""

from __future__ import annotations

import base64
import colorsys
import html
import io
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import judging, lending
from .distilled import Distilled
from .training.modes import still

_PER_CLASS, _CLASSES, _LARGEST = 4, 12, 96  # images shown of a class, classes shown, pixels on the longer side
_MAPS = 8


def classified(result: Distilled, teacher: nn.Module, class_names: Sequence[str]) -> str:
    """Images with the teacher's two likeliest classes beneath, class by class."""
    asked = result.record["parameters"]
    opinions = _opinions(teacher, result.images, asked["mean"], asked["std"])
    by_class: dict[int, list[str]] = {}
    for image, p in zip(result.images, opinions, strict=True):
        sure, order = p.sort(descending=True)
        shown = by_class.setdefault(int(order[0]), [])
        if len(shown) < _PER_CLASS:
            says = [f"{named(int(c), class_names)} {float(q):.0%}" for c, q in zip(order[:2], sure[:2], strict=True)]
            alt = f"an image that the teacher takes for {says[0]}"
            shown.append(f'<figure><img alt="{alt}" src="{_png(image)}">{"<br>".join(says)}</figure>')
    kind = "Pictures" if asked["method"] == "kd" else "Synthetic images"
    text = f"<h2>{kind}, and what the teacher takes them for</h2>"
    for c in sorted(by_class)[:_CLASSES]:
        text += f'<p>{named(c, class_names)}</p><div class="row">{"".join(by_class[c])}</div>'
    rest = len(by_class) - _CLASSES
    return text + (f"<p>{rest} more classes are not shown.</p>" if rest > 0 else "")


def mapped(result: Distilled, teacher: nn.Module, class_names: Sequence[str]) -> str:
    """Images of a segmentation run with both networks' maps beneath, each class in its colour."""
    asked, images = result.record["parameters"], judging.evenly(result.images, _MAPS)
    found = {who: _opinions(network, images, asked["mean"], asked["std"]).argmax(1)
             for who, network in (("teacher", teacher), ("student", result.student))}  # fmt: skip
    colours = _colours(asked["num_classes"])
    kind = "Pictures" if asked["method"] == "kd" else "Synthetic images"
    text = f"<h2>{kind}, and what the networks see there</h2>"
    for i, image in enumerate(images):
        figures = [f'<figure><img alt="an image" src="{_png(image)}">image</figure>']
        for who, maps in found.items():
            painted = colours[maps[i]].permute(2, 0, 1)
            figures.append(f'<figure><img alt="the map of the {who}" src="{_png(painted)}">{who}</figure>')
        text += f'<div class="row">{"".join(figures)}</div>'
    present = found["teacher"].unique().tolist()
    key = "".join(
        f'<span style="background:#{"".join(f"{round(255 * float(v)):02x}" for v in colours[c])}">&emsp;</span> '
        f"{named(c, class_names)} &ensp;"
        for c in present
    )
    return f"{text}<p>{key}</p>"


def _colours(n_classes: int) -> Tensor:
    """Red, green and blue in [0, 1] for each class, [K, 3]: hues far apart, light and dark in turn."""
    return torch.tensor([colorsys.hls_to_rgb(c * 0.618 % 1, 0.38 + 0.25 * (c % 2), 0.65) for c in range(n_classes)])


def _opinions(teacher: nn.Module, images: Tensor, mean: Any, std: Any) -> Tensor:
    """A network's probabilities [n, K] or [n, K, H, W], on the CPU."""
    statistics = None if mean is None else (mean, std)
    network = lending.normalizing(lending.borrowed(lending.bare(teacher)), statistics)
    like: Tensor = next(teacher.parameters(), images)
    with still(network.to(like.device)):
        found = network(images.to(like.device, like.dtype))
        logits: Tensor = found if isinstance(found, Tensor) else found["out"]
        return logits.float().softmax(1).cpu()


def _png(image: Tensor) -> str:
    """A data address of [C, H, W] in [0, 1]; channels beyond the third are left out, two become one."""
    from PIL import Image

    channels = 3 if len(image) >= 3 else 1
    pixels = image[:channels].mul(255).round().to(torch.uint8).permute(1, 2, 0).squeeze(-1).numpy()
    picture = Image.fromarray(pixels)
    picture.thumbnail((_LARGEST, _LARGEST))
    file = io.BytesIO()
    picture.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def named(c: int, class_names: Sequence[str]) -> str:
    """A class as the page calls it."""
    return html.escape(class_names[c]) if c < len(class_names) else f"class {c}"
