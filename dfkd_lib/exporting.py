"""The student for other programs: an ONNX file that is checked against the network it came from."""

from __future__ import annotations

import importlib
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from .checking import returns_out
from .errors import DFKDError, InputError, first_line
from .files import replace_file
from .lending import LogitsAlone, borrowed
from .runtime import Runtime, random_state_kept
from .training.modes import still

_CLOSE = 1e-3  # of the largest logit, between the file and the network
_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def check_onnx_packages() -> None:
    """Whether the packages of the extra `onnx` are there.

    Raises:
        InputError: one is not; the message says how to get them.
    """
    for name in _PACKAGES:
        try:
            importlib.import_module(name)
        except ImportError as e:
            raise InputError(f"an ONNX file needs {name} ({e}): pip install 'dfkd-lib[onnx]'") from e


def write_onnx(network: nn.Module, path: Path, image_shape: Sequence[int]) -> float:
    """Write a network as ONNX, and compare what the file computes with the network.

    The file takes "images", float32 [B, C, H, W] as the network does, for any B, and gives "logits": [B, K], or those
    of every pixel, [B, K, H, W]. Of a network that returns a dictionary the file gives what is under "out".

    Args:
        network: in eval mode.
        image_shape: (C, H, W).

    Returns:
        The largest difference of a logit on three images of noise, as a share of the largest logit.

    Raises:
        InputError: a package is missing.
        DFKDError: the network cannot be exported, or the file does not compute what it computes; no file is left then.
    """
    check_onnx_packages()
    import onnxruntime

    model = borrowed(network, "student").float().cpu().eval()
    x = torch.rand(3, *image_shape, generator=torch.Generator().manual_seed(0))
    if returns_out(model, image_shape, Runtime.choose("cpu", "float32")):
        model = LogitsAlone(model).eval()
    with replace_file(path) as temporary, random_state_kept("cpu"):
        try:
            with warnings.catch_warnings(), _quiet("torch.onnx"):
                warnings.simplefilter("ignore")  # of the exporter, about itself
                program = torch.onnx.export(
                    model, (x,), dynamo=True, input_names=["images"], output_names=["logits"], verbose=False,
                    dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
                )  # fmt: skip
                assert program is not None
                program.save(temporary, external_data=False)
            session = onnxruntime.InferenceSession(temporary.read_bytes(), providers=["CPUExecutionProvider"])
            (theirs,) = session.run(["logits"], {"images": x.numpy()})
        except OSError:
            raise
        except Exception as e:
            raise DFKDError(f"the student cannot be written as ONNX: {first_line(e)}") from e
        with still(model):
            ours = model(x.clone())
        apart = float((ours - torch.from_numpy(theirs)).abs().max() / ours.abs().max().clamp(min=1e-12))
        if not apart <= _CLOSE:
            raise DFKDError(
                f"the ONNX file differs from the student by {apart:.1e} of its largest logit; it is not kept"
            )
    return apart


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """A logger says nothing inside."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)
