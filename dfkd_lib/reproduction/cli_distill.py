"""`dfkd distill`: from a model file to a smaller model file, with a report."""

from __future__ import annotations

import argparse
import ast
import contextlib
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DFKDError, InputError

if TYPE_CHECKING:
    from ..data import ImageSet
    from ..distilled import Distilled
    from ..loading_networks import Loaded


def add_arguments(one: argparse.ArgumentParser, path: Callable[[str], Path]) -> None:
    """The words of the command; `path` reads one that is a path."""
    one.add_argument("teacher", metavar="TEACHER", help="torchvision:NAME, timm:NAME, hf:FOLDER or FILE.py:FUNCTION")
    one.add_argument("student", metavar="STUDENT", help="likewise")
    one.add_argument("--weights", type=path, metavar="FILE", help="of the teacher: .safetensors or .pth, weights alone")
    one.add_argument("--student-weights", type=path, metavar="FILE", help="where the student's training starts")
    one.add_argument("--image-shape", required=True, metavar="CxHxW", help="of the images, such as 3x32x32")
    one.add_argument("--classes", type=int, required=True, metavar="N", help="how many logits the networks have")
    one.add_argument("--mean", metavar="A,B,C", help="of images in [0, 1]; default: as the teacher's source says")
    one.add_argument("--std", metavar="A,B,C", help="likewise; none for both: the networks take images in [0, 1]")
    one.add_argument("--method", metavar="M", help="default: fast")
    one.add_argument("--preset", metavar="P", help="digits, mnist, cifar10 or paper (default: by the image size)")
    long = one.add_mutually_exclusive_group()
    long.add_argument("--updates", type=int, metavar="N", help="student updates (default: the preset's)")
    long.add_argument("--minutes", type=float, metavar="N", help="as many updates as end in this time")
    one.add_argument("--set", dest="pairs", action="append", default=[], metavar="NAME=VALUE", help="of the method")
    one.add_argument("--images", type=path, metavar="DIR", help="distil on these pictures, by method kd or mosaickd")
    one.add_argument("--test", type=path, metavar="DIR", help="labelled: a sub-folder a class, or images and masks")
    one.add_argument("--onnx", action="store_true", help="write student.onnx too")
    one.add_argument("--device", default="auto", metavar="D", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    one.add_argument("--seed", type=int, default=0, metavar="N", help="default: 0")
    one.add_argument("--threads", type=int, default=0, metavar="N", help="CPU threads (default: torch's choice)")
    one.add_argument("--out", type=path, required=True, metavar="DIR", help="the same command continues a stopped run")


def distill(args: argparse.Namespace) -> None:
    """`dfkd distill`: check everything that can be checked, distil, write what came out."""
    shape = _shape(args.image_shape)
    settings = dict(map(_pair, args.pairs))
    if args.threads < 0:
        raise InputError(f"threads must be 0 or more, not {args.threads}")
    import torch

    from .. import distilling
    from ..exporting import check_onnx_packages

    if args.onnx:
        check_onnx_packages()
    if args.threads:
        torch.set_num_threads(args.threads)
    teacher, student = _networks(args, shape)
    mean, std = _statistics(args, teacher)
    test = None if args.test is None else _test_images(args.test, shape, args.classes, teacher.class_names)
    if mean is None and not args.quiet:
        print("dfkd: note: no mean and std are known, so the networks get images in [0, 1]", file=sys.stderr)
    try:
        with _as_notes(args.quiet):
            result = distilling.distill(
                teacher.network.eval(), student.network, args.method, image_shape=shape, num_classes=args.classes,
                mean=mean, std=std, preset=args.preset, n_updates=args.updates, minutes=args.minutes,
                images=args.images, test=test, device=args.device, seed=args.seed, out=args.out,
                progress=not args.quiet, **settings,
            )  # fmt: skip
    except KeyboardInterrupt:
        raise KeyboardInterrupt("; the same command continues it") from None
    except RuntimeError as e:
        if not isinstance(e, torch.OutOfMemoryError) and "allocate" not in str(e):
            raise
        raise DFKDError("the memory did not suffice; lower batch_size, synthesis_batch or bank_size with --set") from e
    classes = teacher.class_names or (test.classes if test is not None else ())
    _write(args, result, teacher, classes)


def labelled_folder(
    folder: Path, image_shape: tuple[int, int, int], n_classes: int, class_names: Sequence[str] = ()
) -> ImageSet:
    """Test images, a sub-folder for each class, with labels as the logits are numbered.

    Sub-folders are classes by their number, if all names are numbers; by `class_names`, if all are among these; else in
    alphabetical order, and then there must be as many as classes.

    Raises:
        InputError: no such folder, no sub-folders or images, or the classes are not to be told.
    """
    from ..data import ImageSet, load

    channels, *size = image_shape
    if channels not in (1, 3):
        raise InputError(f"pictures have 1 or 3 channels, and the images of these networks have {channels}")
    found = load(f"folder:{folder}", "test", image_size=(size[0], size[1]), channels=channels)
    names = found.classes
    if not names or found.labels is None:
        raise InputError(f"folder {folder} has no sub-folders; put the images of each class into one of its own")
    by_name = {name.casefold(): i for i, name in enumerate(class_names)}
    if all(re.fullmatch(r"\d+", name) for name in names):
        numbers = [int(name) for name in names]
    elif all(name.casefold() in by_name for name in names):
        numbers = [by_name[name.casefold()] for name in names]
    elif len(names) == n_classes:
        numbers = list(range(n_classes))
    else:
        raise InputError(
            f"folder {folder} has {len(names)} sub-folders and the networks {n_classes} classes; name the folders by "
            f"the number of the logit, 0 to {n_classes - 1}"
        )
    if max(numbers) >= n_classes:
        raise InputError(f"folder {folder} has a class {max(numbers)}, and the networks have 0 to {n_classes - 1}")
    import torch

    labels = torch.tensor(numbers)[found.labels]
    known = list(class_names) or [str(c) for c in range(n_classes)]
    for name, number in zip(names, numbers, strict=True):
        known[number] = name
    return ImageSet(found.images, labels, classes=known, name=found.name, split=found.split)


def _test_images(
    folder: Path, image_shape: tuple[int, int, int], n_classes: int, class_names: Sequence[str]
) -> ImageSet:
    from ..own_maps import labelled_maps

    if (folder / "images").is_dir() and (folder / "masks").is_dir():
        return labelled_maps(folder, image_shape, n_classes)
    return labelled_folder(folder, image_shape, n_classes, class_names)


def _networks(args: argparse.Namespace, shape: tuple[int, int, int]) -> tuple[Loaded, Loaded]:
    """Teacher and student; the student's first weights follow from the seed, so that a stopped run can continue."""
    import torch

    from ..loading_networks import load_network
    from ..runtime import random_state_kept

    def load(name: str, weights: Path | None, **options: Any) -> Loaded:
        return load_network(name, args.classes, channels=shape[0], weights=weights, **options)

    if args.classes < 2:
        raise InputError(f"classes must be 2 or more, not {args.classes}")
    with random_state_kept("cpu"):
        torch.manual_seed(args.seed)
        teacher = load(args.teacher, args.weights, trained=True)
        torch.manual_seed(args.seed)
        return teacher, load(args.student, args.student_weights)


def _statistics(args: argparse.Namespace, teacher: Loaded) -> tuple[Sequence[float] | None, Sequence[float] | None]:
    """Mean and std of the command line, else of the teacher's source."""
    if args.mean is None and args.std is None:
        return teacher.mean, teacher.std
    if args.mean == args.std == "none":
        return None, None
    given = {"mean": args.mean, "std": args.std}
    for name, text in given.items():
        if text is None:
            raise InputError("--mean and --std belong together; give both, or both as none")
        try:
            given[name] = [float(part) for part in text.split(",")]
        except ValueError:
            raise InputError(f"--{name} must be numbers with commas between them, not {text!r}") from None
    return given["mean"], given["std"]


def _write(args: argparse.Namespace, result: Distilled, teacher: Loaded, classes: Sequence[str]) -> None:
    """Report, card and ONNX file beside the weights and the record; then say what is where."""
    from ..exporting import write_onnx
    from ..files import write_text
    from ..reports import model_card, write_report

    out, names = args.out.resolve(), (args.teacher, args.student)
    shape = result.record["parameters"]["image_shape"]
    files = ["`student.safetensors`: the weights", "`record.json`: every setting and figure", "`report.html`: a page"]
    failed: DFKDError | None = None
    if args.onnx:
        try:
            write_onnx(result.student, out / "student.onnx", shape)
            files.append("`student.onnx`: the same network for ONNX, images as above")
        except DFKDError as e:  # the rest is written all the same
            failed = e
    write_report(out / "report.html", result, teacher.network, names=names, class_names=classes)
    write_text(out / "MODEL_CARD.md", model_card(result, names=names, files=files))
    print(f"{result}\nkept in {out}: open {out / 'report.html'}")
    if failed:
        raise DFKDError(f"{failed}; the student is kept in {out / 'student.safetensors'}")


def _shape(text: str) -> tuple[int, int, int]:
    if not (found := re.fullmatch(r"(\d+)x(\d+)x(\d+)", text.strip())):
        raise InputError(f"--image-shape must be channels x height x width, such as 3x32x32, not {text!r}")
    channels, height, width = map(int, found.groups())
    return channels, height, width


def _pair(text: str) -> tuple[str, Any]:
    """NAME=VALUE: a number, true or false, a list of them, or text."""
    name, equals, value = text.partition("=")
    if not (name.isidentifier() and equals and value):
        raise InputError(f"--set takes NAME=VALUE, such as batch_size=64, not {text!r}")
    if value.lower() in ("true", "false"):
        return name, value.lower() == "true"
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return name, value


@contextlib.contextmanager
def _as_notes(quiet: bool) -> Iterator[None]:
    """What the library warns of becomes a line each; the record has them in any case."""

    def show(message: Warning | str, category: type[Warning], *_: Any) -> None:
        if not quiet:
            print(f"dfkd: note: {' '.join(str(message).split())}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = show  # type: ignore[assignment]
        yield
