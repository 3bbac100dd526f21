"""What `distill` reaches from four families of teachers: python -m benchmarks.families

Each family at two sizes of image: a teacher is trained shortly on MNIST, then distilled into a small convolutional
network by the method that `book/how-to/from-a-model-file.md` advises for it. A row is written to families.json when it
is done, and not made again; `--write` puts the table into that page. The eight rows take three quarters of an hour;
those of the transformer in the stored file were given `--minutes 10`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchvision.models import MobileNetV2, VisionTransformer
from torchvision.models.resnet import BasicBlock, ResNet

import dfkd_lib
from dfkd_lib import data, records
from dfkd_lib.data import ImageSet
from dfkd_lib.errors import DFKDError
from dfkd_lib.files import read_json, write_json, write_text
from dfkd_lib.measures.evaluation import accuracy
from dfkd_lib.models import Normalize
from dfkd_lib.runtime import Runtime, hardware_name
from dfkd_lib.training.players import adam, update

HERE = Path(__file__).parent
RECORD, PAGE = HERE / "families.json", HERE.parent / "book/how-to/from-a-model-file.md"
BEGIN, END = "<!-- families: begin -->\n", "<!-- families: end -->\n"
SIZES = {32: 3.0, 64: 8.0}
"""Side of the images, and minutes for a row, its teacher included: an update takes about four times as long at 64."""
SHARE = 0.25  # of a row's minutes, for its teacher
MEAN, STD = (0.13,) * 3, (0.31,) * 3


def plain_cnn(size: int, widths: tuple[int, ...] = (32, 64, 128)) -> nn.Module:
    """Convolutions and poolings without any normalisation."""
    layers: list[nn.Module] = []
    for before, after in zip((3, *widths), widths, strict=False):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(16 * widths[-1], 10))


def resnet(size: int) -> nn.Module:
    """torchvision's ResNet of 18 layers."""
    return ResNet(BasicBlock, [2, 2, 2, 2], num_classes=10)


def mobilenet(size: int) -> nn.Module:
    """torchvision's MobileNet V2 at half the width."""
    return MobileNetV2(num_classes=10, width_mult=0.5, dropout=0.0)


def vit(size: int) -> nn.Module:
    """torchvision's vision transformer with four small layers and 4 x 4 patches."""
    return VisionTransformer(size, size // 4, num_layers=4, num_heads=4, hidden_dim=64, mlp_dim=128, num_classes=10)


def student() -> nn.Module:
    """Of all rows: three convolutions with batch norm."""
    layers: list[nn.Module] = []
    for before, after in ((3, 16), (16, 32), (32, 64)):
        layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(1024, 10))


FAMILIES: dict[str, tuple[str, Callable[[int], nn.Module], str]] = {
    "plain-cnn": ("plain CNN", plain_cnn, "dfad"),
    "resnet": ("ResNet-18", resnet, "fast"),
    "mobilenet": ("MobileNet V2 0.5", mobilenet, "fast"),
    "vit": ("vision transformer", vit, "dfad"),
}
"""What the page calls it, how it is built, and the method that the page advises."""


class Lessons:
    """A teacher's training by Adam with a short warm-up, until its time is over.

    Args:
        teacher: normalised pixels -> logits.
    """

    def __init__(self, teacher: nn.Module, images: ImageSet, runtime: Runtime, batch_size: int = 64) -> None:
        self.network = nn.Sequential(Normalize(MEAN, STD), teacher)
        self.images, self.runtime, self.batch_size = images, runtime, batch_size
        self.optimizer, self.scaler = adam(self.network, 1e-3), runtime.scaler()
        self.draws = torch.Generator().manual_seed(runtime.seed)

    def take(self, seconds: float) -> int:
        """Train for so long; returns the updates."""
        self.network.train()
        began, steps = time.perf_counter(), 0
        while time.perf_counter() - began < seconds or not steps:
            # The last fifth of the time is at a tenth of the rate.
            late = time.perf_counter() - began > 0.8 * seconds
            for group in self.optimizer.param_groups:
                group["lr"] = 1e-3 * min(1, (steps + 1) / 50) * (0.1 if late else 1)
            x, y = self.images.batch(torch.randint(len(self.images), (self.batch_size,), generator=self.draws))
            with self.runtime.autocast():
                logits = self.network(self.runtime.images(x)).to(self.runtime.dtype)
            update(self.optimizer, nn.functional.cross_entropy(logits, y), self.scaler)
            steps += 1
        self.network.eval()
        return steps


def row(family: str, size: int, minutes: float, *, n_images: int | None = None, **settings: Any) -> dict[str, Any]:
    """Train a teacher, distil it, measure both.

    Args:
        minutes: for all of it; a quarter for the teacher.
        n_images: of either split; None takes all.
        settings: of the method.
    """
    name, build, method = FAMILIES[family]
    train, test = (data.load("mnist", split, image_size=size, channels=3) for split in ("train", "test"))
    test = test.take(min(len(test), n_images or 2000))
    train = train if n_images is None else train.take(n_images)
    runtime = Runtime.choose("cpu", "float32", seed=0)
    torch.manual_seed(0)
    teacher, small = build(size), student()
    began = time.perf_counter()
    lessons = Lessons(teacher, train, runtime)
    updates = lessons.take(60 * minutes * SHARE)
    right = accuracy(lessons.network, test, runtime)
    taught = (time.perf_counter() - began) / 60
    result = dfkd_lib.distill(
        teacher.eval(), small, method, image_shape=(3, size, size), num_classes=10, mean=MEAN, std=STD, preset="mnist",
        minutes=minutes - taught, test=test, device="cpu", precision="float32", progress=False, **settings,
    )  # fmt: skip
    return {
        "family": name, "size": size, "method": method, "teacher updates": updates, "teacher": right,
        "student": result.accuracy["student"], "agreement": result.agreement, "classes named": result.classes_named,
        "student updates": result.budget.student_updates, "minutes": round((time.perf_counter() - began) / 60, 2),
        "distilling minutes": round((time.perf_counter() - began) / 60 - taught, 2),
        "parameters": result.record["networks"], "warnings": result.record["warnings"],
    }  # fmt: skip


def table(found: dict[str, Any]) -> str:
    """The rows as Markdown, percentages as the page has them."""
    lines = [
        "| teacher | images | method | agreement | student | teacher's own | minutes |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for one in found["rows"].values():
        lines.append(
            f"| {one['family']} | {one['size']}x{one['size']} | `{one['method']}` | {one['agreement']:.1%} | "
            f"{one['student']:.1%} | {one['teacher']:.1%} | {one['distilling minutes']:.1f} |"
        )
    return "\n".join(lines) + "\n"


def section(found: dict[str, Any]) -> str:
    """What the page says of them."""
    return (
        f"{table(found)}\n*Four families of teachers at two sizes of MNIST, each trained for two and a half minutes or "
        "less and distilled into three convolutions with batch norm. Agreement is on fresh synthetic images, the "
        f"accuracies are on {found['test images']:,} test images; one seed, one core of {found['hardware']}, other "
        "work on the second one. The table is `benchmarks/families.json`, made by `python -m benchmarks.families`.*\n"
    )


def written(page: str, found: dict[str, Any]) -> str:
    """The page with the section between its marks.

    Raises:
        DFKDError: it has no marks.
    """
    if BEGIN not in page or END not in page:
        raise DFKDError(f"{PAGE} has no marks {BEGIN.strip()} and {END.strip()}; put them where the table belongs")
    before, after = page.split(BEGIN)[0], page.split(END)[1]
    return f"{before}{BEGIN}{section(found)}{END}{after}"


def main(argv: list[str] | None = None) -> int:
    """The rows that are missing, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--minutes", type=float, default=None, help="for each row, its teacher included; default: by the size"
    )
    parser.add_argument(
        "--images", type=int, default=None, help="of MNIST, of either split; default: all, 2,000 of test"
    )
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--sizes", nargs="+", type=int, default=list(SIZES))
    parser.add_argument("--out", type=Path, default=RECORD)
    parser.add_argument("--write", action="store_true", help="put the table into the page, and run nothing")
    args = parser.parse_args(argv)
    found = read_json(args.out) if args.out.exists() else {"rows": {}}
    if args.write:
        write_text(PAGE, written(PAGE.read_text(encoding="utf-8"), found))
        return 0
    for family in args.families:
        for size in args.sizes:
            if (key := f"{family}/{size}") in found["rows"]:
                continue
            found["rows"][key] = row(family, size, args.minutes or SIZES[size], n_images=args.images)
            found |= {
                "test images": args.images or 2000,
                "hardware": hardware_name(torch.device("cpu")),
                **records.provenance(),
                "finished": records.now(),
            }
            write_json(args.out, found)
            print(table({"rows": {key: found["rows"][key]}}).splitlines()[-1], flush=True)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except DFKDError as e:
        sys.exit(f"families: {e}")
