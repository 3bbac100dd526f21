"""Deep Model Transferability from Attribution Maps, arXiv 1909.11902.

A trained network is a point in a space of models: where it looks, on unlabelled probe images x_1..x_n that all networks
share. With z = m(x) the representation of network m, what is explained is the sum of its units, by

    g_k = d sum_u z_u / dx at x_k,   A_k = |g_k| (saliency),  g_k x_k (gradient x input),  or epsilon-LRP,

and two networks are as near as their maps, averaged over channels and flattened to a_k, are on the average image:

    S_ij = 1/n sum_k cos(a^i_k, a^j_k).

No labels, no training, no common architecture. Attributions are taken with respect to images as all networks are
given them: a normalisation of its own belongs to the network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..compiling import as_written
from ..errors import InputError, unknown
from ..taps import last_linear
from ..training.modes import in_eval_mode
from ..training.players import no_weight_gradients

SALIENCY, GRADIENT_INPUT, LRP = "saliency", "gradient x input", "epsilon-LRP"
KINDS = (SALIENCY, GRADIENT_INPUT, LRP)
SIGNED, ABSOLUTE = "signed", "absolute"
MEANS = (SIGNED, ABSOLUTE)
PENULTIMATE, OUTPUT = "penultimate", "output"
EPSILON = 1e-4
DEAD = 0.05  # share of probe images without a map, above which a similarity says nothing

_OUT_OF_PLACE: tuple[Callable[..., Any], ...] = (
    F.relu, F.relu6, F.leaky_relu, F.elu, F.selu, F.gelu, F.silu, F.hardswish, F.hardtanh, F.softplus, F.sigmoid,
    F.tanh, torch.relu, torch.sigmoid, torch.tanh, torch.selu, Tensor.relu, Tensor.sigmoid, Tensor.tanh,
)  # fmt: skip
_IN_PLACE: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.relu_: torch.relu, torch.sigmoid_: torch.sigmoid, torch.tanh_: torch.tanh, Tensor.relu_: torch.relu,
    Tensor.sigmoid_: torch.sigmoid, Tensor.tanh_: torch.tanh, F.relu_: F.relu, F.elu_: F.elu, F.selu_: F.selu,
    F.leaky_relu_: F.leaky_relu, F.hardtanh_: F.hardtanh,
}  # fmt: skip


class Explanation(NamedTuple):
    """What a network shows of itself on n probe images, on the CPU.

    Attributes:
        maps: a_k, float32 [n, HW]; a map that is 0 everywhere belongs to an image on which the network is dead.
        features: z, the representation of each image, flattened, float32 [n, D].
    """

    maps: Tensor
    features: Tensor


def explain(
    network: nn.Module,
    images: Tensor,
    *,
    at: str = OUTPUT,
    kind: str = GRADIENT_INPUT,
    mean: str = SIGNED,
    epsilon: float = EPSILON,
    batch_size: int = 64,
) -> Explanation:
    """Attribution maps and representations of all images; the network stays as it is in every respect.

    It is looked at in eval mode, in which an image's gradient does not depend on the others of its batch. Gradients
    are fresh at each call: nothing adds up over layers, batches or networks, as it does in an input's `.grad`.

    Args:
        images: [n, C, H, W], of the network's type and device, as it expects them.
        at: what z is: "output", all that the network returns; "penultimate", the input of its last linear layer; or
            the name of a module, whose output is taken before anything is done to it in place.
        kind: one of `KINDS`.
        mean: over channels, "signed" or "absolute". The sum of a classifier's logits has no sign of its own, for a
            constant may be added to all of them, so for logits take "absolute".
        epsilon: of epsilon-LRP, which multiplies by f(u) / (u + epsilon sign u) in the place of f'(u).

    Raises:
        InputError: unknown kind, mean or module; a module that is not reached, or whose output is no tensor of floats
            with one row per image; no gradient reaches the images.
    """
    if kind not in KINDS:
        raise unknown("kind of attribution", kind, KINDS)
    if mean not in MEANS:
        raise unknown("mean over channels", mean, MEANS)
    layer = _layer(network, at)
    maps, features = [], []
    with in_eval_mode(network), no_weight_gradients(network), as_written(), torch.enable_grad():
        for batch in images.split(batch_size):
            x = batch.detach().clone().requires_grad_()
            with _Ratios(epsilon) if kind == LRP else nullcontext():
                z = _represent(network, x, layer, at).flatten(1)
            g = _gradient(z.sum(), x, at)
            a = (g.abs() if kind == SALIENCY else g * x).detach()
            maps.append((a.abs() if mean == ABSOLUTE else a).mean(1).flatten(1).float().cpu())
            features.append(z.detach().float().cpu())
    return Explanation(torch.cat(maps), torch.cat(features))


def _layer(network: nn.Module, at: str) -> nn.Module | None:
    if at == OUTPUT:
        return None
    if at == PENULTIMATE:
        try:
            return last_linear(network)
        except InputError as e:
            raise InputError(f"{e}; explain its {OUTPUT!r}, or name a module") from e
    modules = dict(network.named_modules())
    if at not in modules:
        raise unknown("module", at, [OUTPUT, PENULTIMATE, *filter(None, modules)])
    return modules[at]


def _represent(network: nn.Module, x: Tensor, layer: nn.Module | None, at: str) -> Tensor:
    """z of a batch, with its graph. The network is given a copy of x, and may write to it."""
    if layer is None:
        z: Any = network(x.clone())
    else:
        with _seen(layer, at == PENULTIMATE) as found:
            network(x.clone())
        if not found:
            raise InputError(f"the network's {at!r} is not reached in its forward pass; name another module")
        z = found[-1]
    if not isinstance(z, Tensor) or not z.is_floating_point() or z.ndim < 2 or len(z) != len(x):
        shown = list(z.shape) if isinstance(z, Tensor) else type(z).__name__
        raise InputError(f"the network's {at} is {shown} for {len(x)} images; it must be one tensor of floats [B, ...]")
    return z


@contextmanager
def _seen(layer: nn.Module, given: bool) -> Iterator[list[Any]]:
    """While the context is open, copies of what the layer is given, or gives, are appended to the list."""
    found: list[Any] = []

    def note(value: Any) -> None:
        found.append(value.clone() if isinstance(value, Tensor) else value)  # the next layer may work in place

    if given:
        hook = layer.register_forward_pre_hook(lambda module, inputs: note(inputs[0]))
    else:
        hook = layer.register_forward_hook(lambda module, inputs, output: note(output))
    try:
        yield found
    finally:
        hook.remove()


def _gradient(total: Tensor, x: Tensor, at: str) -> Tensor:
    g = torch.autograd.grad(total, x, allow_unused=True)[0] if total.requires_grad else None
    if g is None:
        raise InputError(
            f"no gradient reaches the images from the network's {at} (torch.no_grad or rounding in its forward pass?); "
            "take that out, or name another module"
        )
    return g


class _Ratio(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor, y: Tensor, epsilon: float) -> Tensor:
        ctx.save_for_backward(u, y)
        ctx.epsilon = epsilon
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        u, y = ctx.saved_tensors
        # sign(0) is 1 here, so that the ratio is 0 / epsilon = 0 for functions through the origin.
        away = torch.where(u < 0, -ctx.epsilon, ctx.epsilon)
        return gradients[0] * y / (u + away), None, None


class _Ratios(TorchFunctionMode):
    """While open, what comes back through an activation f(u) is multiplied by f(u) / (u + epsilon sign u).

    Functions are caught where torch hands them out, so those that a forward pass calls without a module count too.
    """

    def __init__(self, epsilon: float) -> None:
        super().__init__()
        self.epsilon = epsilon

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if function not in _OUT_OF_PLACE and function not in _IN_PLACE:
            return function(*args, **kwargs)
        u, *rest = args if args else (kwargs.pop("input"),)
        in_place = kwargs.pop("inplace", False) or function in _IN_PLACE
        before = u.clone() if in_place else u
        with torch.no_grad():
            y = _IN_PLACE.get(function, function)(before, *rest, **kwargs)
        y = _Ratio.apply(before, y, self.epsilon)
        return u.copy_(y) if in_place else y


def cosines(a: Tensor, b: Tensor) -> Tensor:
    """cos(a_k, b_k) of each pair of rows [n, D] in float64, [n]; 0 where a row is 0 everywhere."""
    found = []
    for u, v in zip(a.split(64), b.split(64), strict=True):
        u, v = u.double(), v.double()
        norms = ((u * u).sum(1) * (v * v).sum(1)).sqrt()
        found.append(torch.where(norms > 0, (u * v).sum(1) / norms.clamp_min(1e-300), 0.0).clamp(-1, 1))
    return torch.cat(found)


def affinity(a: Tensor, b: Tensor) -> float:
    """S_ij = 1/n sum_k cos(a^i_k, a^j_k) of two networks' maps [n, HW] on the same images; in [-1, 1].

    Raises:
        InputError: maps of different shapes.
    """
    if a.shape != b.shape:
        raise InputError(f"maps of shapes {list(a.shape)} and {list(b.shape)} cannot be compared; use the same images")
    return float(cosines(a, b).mean())


def affinity_matrix(maps: Sequence[Tensor]) -> Tensor:
    """S, float64 [N, N], symmetric; the diagonal is 1, less the share of images without a map.

    Each entry is computed from its two networks alone: one more network changes none of the others by a bit.
    """
    return pairwise(affinity, maps)


def pairwise(similarity: Callable[[Any, Any], float], items: Sequence[Any]) -> Tensor:
    """A symmetric similarity of all pairs, float64 [N, N]; each pair is computed once."""
    matrix = torch.zeros(len(items), len(items), dtype=torch.float64)
    for i, a in enumerate(items):
        for j, b in enumerate(items[: i + 1]):
            matrix[i, j] = matrix[j, i] = similarity(a, b)
    return matrix


def check_alive(maps: Tensor, who: str) -> None:
    """Refuse a network that has no map on more than a twentieth of the images.

    Raises:
        InputError: naming it.
    """
    dead = int((maps == 0).all(1).sum())
    if not torch.isfinite(maps).all():
        raise InputError(f"{who} has attributions that are NaN or infinite; check its weights and the images")
    if dead > DEAD * len(maps):
        raise InputError(
            f"{who} does not depend on the image at all for {dead} of {len(maps)} probe images (dead units?); explain "
            "an earlier module, or use other images"
        )
