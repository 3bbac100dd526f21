"""Figures that chapters share: one palette, the same colour for the same method everywhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate, zip_longest
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's eight colours, told apart by colour-blind readers.
BLACK, ORANGE, SKY, GREEN, YELLOW, BLUE, VERMILION, PURPLE = (
    "#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7",
)  # fmt: skip
# Tol's muted colours for the methods that Okabe and Ito's eight do not reach.
INDIGO, CYAN, SAND, ROSE, WINE, MAUVE, OLIVE = (
    "#332288", "#88CCEE", "#DDCC77", "#CC6677", "#882255", "#AA4499", "#999933",
)  # fmt: skip
COLOURS = {
    "teacher": BLACK,
    "scratch student": "#777777",
    "KD original": GREEN,
    "KD related": SKY,
    "KD unrelated": YELLOW,
    "RANDOM": ORANGE,
    "DFAD": BLUE,
    "DAFL": SAND,
    "ZSKT": CYAN,
    "DeepInversion": MAUVE,
    "ADI": ROSE,
    "DFQ": OLIVE,
    "CMI": INDIGO,
    "Fast": VERMILION,
    "NAYER": WINE,
    "CPNet": PURPLE,
    "KD OOD": SKY,
    "data-free": INDIGO,
    "no D": SAND,
    "full-image D": MAUVE,
    "MosaicKD": VERMILION,
    "NetGraft": VERMILION,
    "AS-DFD": VERMILION,
    "Gaussian": ORANGE,
    "random text": SAND,
    "MAE": BLUE,
    "MSE": VERMILION,
    "KL": PURPLE,
}
LINES = ("-", "--", ":", "-.")


def axes(n: int = 1, width: float = 6.4, height: float = 3.6) -> tuple[Figure, list[Axes]]:
    """A figure with n panels side by side, with the book's type sizes and light grid."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, n, figsize=(width, height), layout="constrained", dpi=100, squeeze=False)
    for panel in panels[0]:
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    return figure, list(panels[0])


def curves(
    axis: Axes, lines: Mapping[str, Sequence[tuple[float, float]]], *, x_label: str, y_label: str, log: str = ""
) -> None:
    """One line per name, coloured by the method that the name begins with.

    Args:
        lines: {name: [(x, y), ...]}.
        log: which axes are logarithmic: "", "x", "y" or "xy".
    """
    used: dict[str, int] = {}
    for name, points in lines.items():
        colour = colour_of(name)
        style = LINES[used.get(colour, 0) % len(LINES)]
        used[colour] = used.get(colour, 0) + 1
        marker = "o" if len(points) < 12 else None
        axis.plot(*zip(*points, strict=True), style, color=colour, label=name, marker=marker, markersize=3.5)
    axis.set(xlabel=x_label, ylabel=y_label)
    if "x" in log:
        axis.set_xscale("log")
        axis.xaxis.set_minor_formatter("")  # powers of ten alone: the labels between them overlap in a narrow panel
    if "y" in log:
        axis.set_yscale("log")
    if len(lines) > 1:
        axis.legend(frameon=False, fontsize=9)


def colour_of(name: str) -> str:
    """The colour of the longest method name that `name` begins with."""
    known = [method for method in COLOURS if name.startswith(method)]
    return COLOURS[max(known, key=len)] if known else BLUE


def bars(axis: Axes, values: Mapping[str, float | None], *, x_label: str) -> None:
    """Horizontal bars with their figures in percent beside them; a missing value says so."""
    names = list(values)
    shown = [100 * (value or 0.0) for value in values.values()]
    axis.barh(names, shown, color=[colour_of(name) for name in names])
    for row, value in enumerate(values.values()):
        text = "diverged" if value is None else f"{100 * value:.1f}"
        axis.text(100 * (value or 0.0) + 0.8, row, text, va="center", fontsize=9)
    axis.set(xlabel=x_label, xlim=(0, 108))
    axis.invert_yaxis()
    axis.grid(visible=False, axis="y")


def show_images(axis: Axes, images: Tensor, titles: Sequence[str] | None = None, columns: int = 8) -> None:
    """Images [N, C, H, W] as one grid; values are clamped to [0, 1].

    Args:
        titles: one short caption per image, written under it.
    """
    axis.imshow(grid(images, columns), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axis.set_axis_off()
    height, width = images.shape[-2] + 1, images.shape[-1] + 1
    for i, title in enumerate(titles or ()):
        box = {"facecolor": "black", "alpha": 0.6, "pad": 0.8, "lw": 0}
        at = (i % columns + 0.5) * width, (i // columns + 1) * height - 1
        axis.text(*at, title, ha="center", va="bottom", fontsize=6.5, color="white", bbox=box)


def grid(images: Tensor, columns: int = 8) -> Tensor:
    """Images [N, C, H, W] in rows of `columns` with one pixel between: [H', W', 3], float in [0, 1], on the CPU."""
    images = images.detach().float().cpu().clamp(0, 1).expand(-1, 3, -1, -1)
    n, _, height, width = images.shape
    rows = -(-n // columns)
    sheet = torch.ones(rows * (height + 1), columns * (width + 1), 3)
    for i, image in enumerate(images):
        top, left = i // columns * (height + 1), i % columns * (width + 1)
        sheet[top : top + height, left : left + width] = image.permute(1, 2, 0)
    return sheet


def paint(masks: Tensor, void: int | None = None) -> Tensor:
    """Class masks [N, H, W] as images [N, 3, H, W] in [0, 1]; class 0 dark, void white."""
    import matplotlib

    wheel = torch.tensor([matplotlib.colormaps["tab20"](i)[:3] for i in range(20)], dtype=torch.float32)
    palette = torch.cat([torch.full((1, 3), 0.12), wheel])
    painted = palette[masks.long().cpu() % len(palette)].permute(0, 3, 1, 2)
    if void is not None:
        painted = torch.where((masks == void).cpu().unsqueeze(1), torch.ones(()), painted)
    return painted


def show_words(axis: Axes, lines: Mapping[str, Sequence[tuple[str, bool]]]) -> None:
    """One line of words per name, in columns as wide as their longest word; those that are marked stand out.

    Args:
        lines: {name: [(word, whether it is marked), ...]}.
    """
    columns = list(zip_longest(*([word for word, _ in words] for words in lines.values()), fillvalue=""))
    starts = list(accumulate((max(map(len, column)) + 2 for column in columns), initial=max(map(len, lines)) * 1.2 + 2))
    for row, (name, words) in enumerate(lines.items()):
        axis.text(0, row, name, fontsize=8, fontweight="bold", va="center")
        for start, (word, marked) in zip(starts, words, strict=False):
            axis.text(start, row, word, fontsize=8, va="center", color=VERMILION if marked else "#777777")
    axis.set(xlim=(0, starts[-1]), ylim=(len(lines) - 0.5, -0.5))
    axis.axis("off")
