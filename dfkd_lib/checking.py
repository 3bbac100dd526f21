"""What is asked of a network that the library does not know, found out by a few small passes before a run.

The passes write nothing to the weights and leave the random state as it was. A forward pass may write to buffers,
so what is examined is a copy, see :mod:`dfkd_lib.lending`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from .compiling import as_written
from .errors import InputError, first_line
from .lending import copied
from .runtime import Runtime, random_state_kept
from .taps import tapped
from .training.modes import evaluating, in_eval_mode, still

PER_PIXEL = "logits for every pixel teach by dfad, dfad-one-stage or random, and by mosaickd or kd with images"
_HARDLY = 1e-2  # logits vary so little between dark, bright and noisy images, as a share of their spread over classes


@dataclass(frozen=True)
class Found:
    """What the passes showed.

    Attributes:
        overwrites: the network changes the images that it is given; see :func:`dfkd_lib.lending.spare_input`.
        warnings: what may be meant, but makes poor students; one line each, of teachers only.
    """

    overwrites: bool
    warnings: tuple[str, ...] = ()


def check_module(network: object, who: str) -> None:
    """What can be told without a pass.

    Raises:
        InputError: no `nn.Module`; TorchScript that was frozen; weights that do not exist yet (lazy layers, the meta
            device) or are complex.
    """
    if not isinstance(network, nn.Module):
        raise InputError(f"the {who} is a {type(network).__name__}, not a torch.nn.Module")
    if not hasattr(network, "training"):
        raise InputError(f"the {who} is frozen TorchScript, which is bound to its place; pass it as it was before")
    for name, value in (*network.named_parameters(), *network.named_buffers()):
        if nn.parameter.is_lazy(value):
            raise InputError(f"the {who}'s {name!r} has no shape yet (lazy layer); send one batch through it first")
        if value.is_meta:
            raise InputError(f"the {who}'s {name!r} has no values (device meta); load its weights first")
        if value.is_complex() and isinstance(value, nn.Parameter):
            raise InputError(f"the {who}'s weight {name!r} is complex; keep it as a real one, torch.view_as_real")


def check_roles(teacher: nn.Module, student: nn.Module) -> None:
    """Whether one can teach and the other learn, by what they are set to.

    Raises:
        InputError: they are one network; the teacher is in training mode; the student has no weights that learn.
    """
    if teacher is student:
        # A fork of the authors' toolbox does this, and its adversarial terms are then zero.
        raise InputError("teacher and student are the same network; give the student its own")
    if any(module.training for module in teacher.modules()):
        raise InputError("the teacher is in training mode, where batch norm and dropout change it; call teacher.eval()")
    if not any(p.requires_grad for p in student.parameters()):
        raise InputError("no weight of the student can learn; call student.requires_grad_(True), or give it weights")


def common_classes(
    teacher: nn.Module, student: nn.Module, image_shape: Sequence[int], runtime: Runtime, *, dense: bool = False
) -> int:
    """K, as many logits as both networks have for images of this shape, or for each of their pixels.

    Raises:
        InputError: see :func:`common_shape`.
    """
    return common_shape(teacher, student, image_shape, runtime, dense=dense)[0]


def common_shape(
    teacher: nn.Module, student: nn.Module, image_shape: Sequence[int], runtime: Runtime, *, dense: bool = False
) -> tuple[int, ...]:
    """(K,), or (K, H, W) of networks that name a class for every pixel, as both have it for images of this shape.

    Args:
        dense: whether these are allowed.

    Raises:
        InputError: they differ in it, are the same object, or one of them does not pass :func:`n_logits`.
    """
    if teacher is student:
        raise InputError("teacher and student are the same network; give the student its own")
    found = _shape_of_logits(teacher, image_shape, runtime, "teacher", dense)
    of_student = _shape_of_logits(student, image_shape, runtime, "student", dense)
    if len(of_student) != len(found):
        per = {1: "image", 3: "pixel"}
        raise InputError(
            f"the teacher names a class for every {per[len(found)]} and the student for every {per[len(of_student)]}; "
            "give two of a kind"
        )
    if of_student != found:
        raise InputError(
            f"the student has {of_student[0]} classes and the teacher {found[0]}; build the student with {found[0]}"
        )
    return found


def n_logits(network: nn.Module, image_shape: Sequence[int], runtime: Runtime, who: str) -> int:
    """K, found by sending two images of noise through the network; its running statistics stay as they are.

    Args:
        who: "teacher" or "student", for the messages.

    Raises:
        InputError: the network fails on images of this shape, or does not return finite logits [B, K], K >= 2.
    """
    return _shape_of_logits(network, image_shape, runtime, who)[0]


def returns_out(network: nn.Module, image_shape: Sequence[int], runtime: Runtime) -> bool:
    """Whether the network returns its logits under "out" in a dictionary, as torchvision's segmenters do."""
    with contextlib.suppress(Exception), evaluating(network), random_state_kept(runtime.device), runtime.autocast():
        found = network(_images(image_shape, runtime)[:2])
        return isinstance(found, Mapping) and isinstance(found.get("out"), Tensor)
    return False


def count_macs(network: nn.Module, image_shape: Sequence[int], runtime: Runtime) -> float:
    """Multiply-accumulates of one image, counted while two of noise pass; running statistics stay as they are.

    :func:`dfkd_lib.models.count_macs` computes nothing for it, but the network has to run on the meta device, which one
    of somebody else's need not do.
    """
    with still(network), random_state_kept(runtime.device), runtime.autocast():
        x = _images(image_shape, runtime)[:2]
        with FlopCounterMode(display=False) as counter:
            network(x)
    return counter.get_total_flops() / 2 / len(x)


def examine_teacher(
    teacher: nn.Module, image_shape: Sequence[int], runtime: Runtime, *, gradient: bool = True, dense: bool = False
) -> Found:
    """How a prepared and frozen teacher treats images.

    Args:
        gradient: whether its gradient with respect to the image is needed, as by all methods that make images.
        dense: whether it may have logits for every pixel.

    Raises:
        InputError: see :func:`n_logits`; its logits are the same for all images; its forward pass switches layers to
            training mode, or gives no gradient where one is needed.
    """
    x = _images(image_shape, runtime)
    with still(teacher), random_state_kept(runtime.device):
        given = x.clone()
        logits = _logits(teacher, given, runtime, "teacher", dense=dense).float()
        overwrites = _changed(given, x)
        trains = [name for name, module in teacher.named_modules() if module.training]
        again = _logits(teacher, x.clone(), runtime, "teacher", dense=dense).float()
    if trains:
        raise InputError(f"the teacher's forward pass puts {trains[-1] or 'it'!r} into training mode; take that out")
    over_images, over_classes = logits.std(0).mean(), logits.std(1).mean()
    if not over_images > 0:
        raise InputError("the teacher's logits are the same for all images, noisy, dark and bright; check its weights")
    if gradient:
        with in_eval_mode(teacher), as_written(), random_state_kept(runtime.device):
            _check_image_gradient(teacher, x, runtime, dense)
    warnings = []
    if not torch.allclose(logits, again, rtol=1e-2, atol=1e-3):
        warnings.append("the teacher's logits differ between two passes over the same images; is dropout on in it?")
    if (logits >= 0).all() and torch.allclose(logits.sum(1), torch.ones_like(logits[:, 0]), atol=1e-2):
        warnings.append("the teacher seems to return probabilities; take the softmax out, so that it returns logits")
    elif over_images < _HARDLY * over_classes:
        warnings.append(
            "the teacher's logits hardly depend on the image; does it expect pixels in 0..255? Here they are in [0, 1]"
        )
    return Found(overwrites, tuple(warnings))


def examine_student(student: nn.Module, image_shape: Sequence[int], runtime: Runtime, *, dense: bool = False) -> Found:
    """How a prepared student treats images and learns; in training mode too, on a copy.

    Args:
        dense: whether it may have logits for every pixel.

    Raises:
        InputError: see :func:`n_logits`, in either mode; no gradient reaches its weights.
    """
    probe = copied(student, "student")
    probe.train()  # whose own may return nothing
    x = _images(image_shape, runtime)
    with random_state_kept(runtime.device):
        with still(student):
            given = x.clone()
            _logits(student, given, runtime, "student", dense=dense)
            overwrites = _changed(given, x)
        given = x.clone()
        logits = _logits(probe, given, runtime, "student", " in training mode", dense=dense)
        weights = [p for p in probe.parameters() if p.requires_grad]
        gradients = _gradients(logits, weights, "student")
    if all(g is None for g in gradients):
        raise InputError(
            "no gradient reaches the student's weights (torch.no_grad in its forward pass?); take that out"
        )
    return Found(overwrites or _changed(given, x))


def check_visits(teacher: nn.Module, layers: Sequence[nn.Module], image_shape: Sequence[int], runtime: Runtime) -> None:
    """Whether the layers that a method reads can be seen at work in the teacher.

    Raises:
        InputError: hooks see none of them, or a batch norm whose input is not [B, C, ...] as its statistics are.
    """
    if not layers:
        return
    with still(teacher), runtime.autocast(), random_state_kept(runtime.device), tapped(layers) as seen:
        teacher(_images(image_shape, runtime))
    if not seen:
        raise InputError(
            f"the teacher does not call its {type(layers[0]).__name__} layers as modules (compiled, or used by "
            "function?), so this method cannot see what they see; use dfad or zskt, which need not"
        )
    for visit in seen:
        statistics = getattr(visit.layer, "running_mean", None)
        if statistics is not None and (visit.x.ndim < 2 or visit.x.shape[1] != len(statistics)):
            raise InputError(
                f"the teacher's {type(visit.layer).__name__} has statistics of {len(statistics)} channels and is given "
                f"{list(visit.x.shape)}, not [B, {len(statistics)}, ...]; use dfad, dafl or zskt, which read none"
            )


def _check_image_gradient(teacher: nn.Module, x: Tensor, runtime: Runtime, dense: bool) -> None:
    leaf = x.clone().requires_grad_()
    # A clone, as the network may write to it, which a leaf would not let it.
    (gradient,) = _gradients(_logits(teacher, leaf.clone(), runtime, "teacher", dense=dense), [leaf], "teacher")
    if gradient is None or not gradient.any():
        raise InputError(
            "the teacher gives no gradient with respect to the image (torch.no_grad, inference_mode, rounding or "
            "quantised layers in its forward pass?), by which images are made; take that out, or use method 'random'"
        )
    if not torch.isfinite(gradient).all():
        raise InputError("the teacher's gradient with respect to the image is NaN or infinite; check its weights")


def _gradients(logits: Tensor, wanted: Sequence[Tensor], who: str) -> tuple[Tensor | None, ...]:
    """Of a random sum of the logits: their plain sum does not depend on the image if they are probabilities."""
    if not logits.requires_grad:
        return (None,) * len(wanted)
    mixture = torch.linspace(-1, 1, logits.shape[1], device=logits.device).sin()
    try:
        return torch.autograd.grad((logits.float().movedim(1, -1) * mixture).sum(), wanted, allow_unused=True)
    except Exception as e:
        raise InputError(f"the {who} fails in the backward pass: {first_line(e)}") from e


def _images(image_shape: Sequence[int], runtime: Runtime) -> Tensor:
    """Two images of noise, a dark and a bright one, [4, C, H, W]; the same each time."""
    noise = torch.rand(4, *image_shape, generator=torch.Generator().manual_seed(0))
    noise[2:] *= 0.2
    noise[3] += 0.8
    return runtime.images(noise)


def _changed(x: Tensor, before: Tensor) -> bool:
    """Whether a pass wrote to its fresh input, be it with the same values."""
    return x._version > 0 or not torch.equal(x, before)


def _shape_of_logits(
    network: nn.Module, image_shape: Sequence[int], runtime: Runtime, who: str, dense: bool = False
) -> tuple[int, ...]:
    with evaluating(network), random_state_kept(runtime.device):
        return tuple(_logits(network, _images(image_shape, runtime)[:2], runtime, who, dense=dense).shape[1:])


def _logits(
    network: nn.Module, x: Tensor, runtime: Runtime, who: str, when: str = "", *, dense: bool = False
) -> Tensor:
    n, *image_shape = x.shape
    shape = "x".join(map(str, image_shape))
    try:
        with runtime.autocast():
            logits = network(x)
    except Exception as e:
        raise InputError(f"the {who} fails{when} on images of shape {shape}: {first_line(e)}") from e
    if not isinstance(logits, Tensor):
        raise InputError(
            f"the {who} returns a {type(logits).__name__}{when}, not one tensor of logits; wrap it in a module that "
            "returns the logits alone"
        )
    per_pixel = logits.ndim == 4 and logits.shape[2:] == x.shape[2:]
    if per_pixel and not dense:
        raise InputError(f"the {who} names a class for every pixel, and this takes one for every image; {PER_PIXEL}")
    fits = logits.ndim == 2 or per_pixel
    if not fits or len(logits) != n or logits.shape[1] < 2 or not logits.is_floating_point():
        kind = "" if logits.is_floating_point() else f" of {logits.dtype}"
        raise InputError(
            f"the {who} returns {list(logits.shape)}{kind}{when} for {n} images of shape {shape}, not logits [{n}, K]"
            + (f" or [{n}, K, {', '.join(map(str, x.shape[2:]))}]" if dense and logits.ndim == 4 else "")
        )
    if not torch.isfinite(logits).all():
        raise InputError(f"the {who} returns NaN or infinite logits{when}; check its weights")
    return logits
