"""Impression Space from Deep Template Network, arXiv 2007.05441: a reconstruction.

A frozen classifier, the template network, maps an image to its *impression*: what its stages respond, kept whole or
summarised. Descent on the pixels decodes an impression back into an image. In between, impressions are averaged,
shifted and compared (`impression_space`), which gives synthesis, unpaired translation and relations between images,
and nothing is trained. The paper's abstract has the goals and these words; every formula of this module is our
completion:

    x* = argmin over x in [0, 1]:  sum_l w_l || I_l(x) - t_l ||^2 / max(|| t_l ||^2, 1e-6) + tv TV(x),

where a translation may add a content term, the same distance between feature maps of x and of the image it started at.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data import ImageSet
from ..errors import InputError, unknown
from ..runtime import Runtime
from ..taps import last_linear
from ..training.players import Resumable, adam, check_positive, freeze, update
from ..training.schedules import cosine, set_lr

KINDS = ("full", "grid-N", "stat", "gram")
SCHEDULES = ("joint", "progressive")
EMBEDDING = "embedding"
Impression = dict[str, Tensor]


@dataclass(frozen=True)
class Settings:
    """How an impression is decoded. The paper's values are unknown to us; all defaults are ours.

    Attributes:
        kind: phi_l, what a stage keeps, see :func:`summarise`.
        steps: n, descent steps.
        lr, lr_end: Adam on the pixels, from the first to the last step on half a cosine.
        tv: lambda_TV, weight of the total variation.
        content: lambda_c, weight of the distance to the feature map that the start has at the middle stage, whatever
            the schedule; 0 leaves it out.
        schedule: "joint" matches all stages at once; "progressive" begins with the deepest alone and takes in the
            next shallower one after each n/M steps.
    """

    kind: str = "stat"
    steps: int = 300
    lr: float = 0.05
    lr_end: float = 0.005
    tv: float = 0.02
    content: float = 0.0
    schedule: str = "joint"

    def __post_init__(self) -> None:
        check_positive(self, "steps", "lr", "lr_end")
        _grid(self.kind)
        for name in ("tv", "content"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} must be 0 or more, not {getattr(self, name)}")
        if self.schedule not in SCHEDULES:
            raise unknown("schedule", self.schedule, SCHEDULES)


# Layer-wise encoding


def summarise(z: Tensor, kind: str) -> Tensor:
    """phi_l, the impression that one stage keeps of its feature map.

    "full" keeps all of it; "grid-N" averages over a grid of N x N cells; "stat" is mean and standard deviation
    sqrt(var + 1e-6) of each channel over space, which forgets where things are; "gram" is how channels occur
    together, z z^T / (H W). A map of one pixel has no deviation, and its "stat" is its mean.

    Args:
        z: [B, C, H, W].

    Returns:
        [B, D] with D = C H W, C N^2, 2 C (C for one pixel) or C^2.

    Raises:
        InputError: unknown kind.
    """
    side = _grid(kind)
    h, w = z.shape[2:]
    flat = z.flatten(2)
    if kind == "full":
        return z.flatten(1)
    if kind == "stat":
        mean = flat.mean(2)
        # The epsilon stands inside the root: without it the gradient of a constant channel is infinite.
        return mean if h * w == 1 else torch.cat([mean, (flat.var(2, correction=0) + 1e-6).sqrt()], 1)
    if kind == "gram":
        return (flat @ flat.mT / (h * w)).flatten(1)
    return F.adaptive_avg_pool2d(z, (min(side, h), min(side, w))).flatten(1)


def _grid(kind: str) -> int:
    """N of "grid-N", 0 for the other kinds."""
    name, _, side = kind.partition("-")
    if name == "grid" and side.isdecimal() and int(side) > 0:
        return int(side)
    if kind not in ("full", "stat", "gram"):
        raise unknown("kind of impression", kind, KINDS)
    return 0


class Template:
    """A frozen network and the stages at which impressions are taken.

    Args:
        network: images [B, C, H, W] in [0, 1] -> logits, any convolutional network.
        stages: names of modules, shallow to deep, whose outputs [B, C_l, H_l, W_l] end the stages;
            "embedding" is the input of the last linear layer. See :func:`find_stages`.

    Raises:
        InputError: no stages, or a name that the network does not have.
    """

    def __init__(self, network: nn.Module, stages: Sequence[str], runtime: Runtime) -> None:
        if not stages:
            raise InputError("a template needs at least one stage; find_stages(network, image_shape) names some")
        self.runtime = runtime
        self.network = freeze(runtime.prepare(network))
        self.stages = tuple(stages)
        modules = dict(self.network.named_modules())
        for name in self.stages:
            if name != EMBEDDING and name not in modules:
                raise unknown("stage", name, modules)
        for module in modules.values():
            if isinstance(module, nn.ReLU):
                module.inplace = False  # it would overwrite what a stage in front of it has handed out

    def feature_maps(self, x: Tensor, stages: Sequence[str] = ()) -> Impression:
        """z_l for the given stages, or for all; the pass ends at the deepest of them.

        Args:
            x: [B, C, H, W] in [0, 1].

        Returns:
            {stage: [B, C_l, H_l, W_l]}, with the graph to x.

        Raises:
            InputError: a stage that the network does not pass.
        """
        if self.network.training:
            raise InputError("the template is in train mode, where images of a batch mix; call network.eval()")
        wanted = tuple(stages) or self.stages
        found: Impression = {}
        with _stopping_hooks(self.network, wanted, found), self.runtime.autocast():
            self.network(self.runtime.images(x))
        for name in wanted:
            if name not in found or found[name].ndim != 4:
                raise InputError(f"stage {name!r} gives no feature map; choose stages with find_stages")
        return {name: found[name].to(self.runtime.dtype) for name in wanted}

    def encode(self, x: Tensor, kind: str = "stat", stages: Sequence[str] = ()) -> Impression:
        """I(x) = (I_1(x), ..., I_M(x)): {stage: [B, D_l]}, with the graph to x."""
        return {name: summarise(z, kind) for name, z in self.feature_maps(x, stages).items()}

    @torch.no_grad()
    def encode_set(
        self, images: ImageSet, kind: str = "stat", stages: Sequence[str] = (), batch_size: int = 250
    ) -> Impression:
        """The impressions of a whole set: {stage: [N, D_l]}."""
        parts = [self.encode(x, kind, stages) for x, _ in images.batches(batch_size)]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


class _AllSeen(Exception):
    """Nothing deeper in the network is needed."""


@contextmanager
def _stopping_hooks(network: nn.Module, wanted: Sequence[str], found: Impression) -> Iterator[None]:
    """While open, a pass of the network fills `found` and ends as soon as nothing is missing."""

    def keep(name: str, z: Tensor) -> None:
        found[name] = z[:, :, None, None] if name == EMBEDDING else z
        if len(found) == len(wanted):
            raise _AllSeen

    hooks = [
        last_linear(network).register_forward_pre_hook(lambda module, inputs: keep(EMBEDDING, inputs[0]))
        if name == EMBEDDING
        else network.get_submodule(name).register_forward_hook(lambda module, inputs, z, name=name: keep(name, z))
        for name in wanted
    ]
    try:
        yield
    except _AllSeen:
        pass
    finally:
        for hook in hooks:
            hook.remove()


def find_stages(network: nn.Module, image_shape: Sequence[int]) -> tuple[str, ...]:
    """The last ReLU at each size of feature map, shallow to deep, then "embedding" where there is a linear layer.

    For a VGG these are the ReLUs that end its blocks. Nothing is computed: the pass runs without storage.

    Args:
        image_shape: (C, H, W).

    Raises:
        InputError: the network has no ReLU module that is passed exactly once at any size.
    """
    outline = copy.deepcopy(network).to("meta").eval()
    seen: list[tuple[str, tuple[int, ...]]] = []
    for name, module in outline.named_modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
            module.register_forward_hook(lambda m, i, z, name=name: seen.append((name, tuple(z.shape))))
    with torch.no_grad():
        outline(torch.empty(1, *image_shape, device="meta"))
    names = [name for name, _ in seen]
    by_size = {shape[2:]: name for name, shape in seen if len(shape) == 4 and names.count(name) == 1}
    if not by_size:
        raise InputError("the network has no ReLU module of its own for any feature map; name its stages yourself")
    linear = any(isinstance(module, nn.Linear) for module in network.modules())
    return (*by_size.values(), *([EMBEDDING] if linear else []))


# Iterative decoding


def relative_errors(found: Impression, target: Impression) -> Tensor:
    """|| I_l(x) - t_l ||^2 / max(|| t_l ||^2, 1e-6): [B, M], one column per stage of the target.

    Without the division the widest stage would decide alone.

    Args:
        found, target: {stage: [B, D_l]}; the target may have B = 1.
    """
    columns = [(found[name] - t).square().sum(1) / t.square().sum(1).clamp_min(1e-6) for name, t in target.items()]
    return torch.stack(columns, 1)


def roughness(x: Tensor) -> Tensor:
    """TV: mean |horizontal differences| + mean |vertical differences| of each image.

    Args:
        x: [B, C, H, W].

    Returns:
        [B], 0 for constant images.
    """
    across, down = x[..., 1:] - x[..., :-1], x[..., 1:, :] - x[..., :-1, :]
    return across.abs().flatten(1).mean(1) + down.abs().flatten(1).mean(1)


def active_stages(step: int, settings: Settings, n_stages: int) -> list[float]:
    """w_l at a step (from 0), shallow to deep: all 1 for "joint"; for "progressive" the deepest ones first."""
    if settings.schedule == "joint":
        return [1.0] * n_stages
    active = min(n_stages, 1 + step * n_stages // settings.steps)
    return [0.0] * (n_stages - active) + [1.0] * active


class Decoding(Resumable):
    """Descent from `start` towards images with the impressions `target`, one Adam step on all pixels per :meth:`step`.

    The images of a batch are independent problems. Of each, the iterate with the lowest loss over all stages is kept.

    Args:
        target: {stage: [B, D_l]}, of the kind that the settings name; the stages are those that are matched.
        start: [B, C, H, W] in [0, 1].

    Attributes:
        images: the best iterates so far, [B, C, H, W].
        loss: their losses [B].

    Raises:
        InputError: another number of images or of impression entries than the start gives.
    """

    data_free: ClassVar[bool] = False
    PARTS: tuple[str, ...] = ("pixels", "optimizer", "scaler", "images", "loss", "steps")

    def __init__(
        self, template: Template, target: Impression, start: Tensor, settings: Settings, runtime: Runtime
    ) -> None:
        self.template, self.settings, self.runtime = template, settings, runtime
        self.target = {name: t.detach().to(runtime.device, runtime.dtype) for name, t in target.items()}
        start = runtime.images(start.detach()).clone()
        self.middle = [*target][(len(target) - 1) // 2]
        with torch.no_grad():
            found, self.content = self.encode(start)
        for name, t in self.target.items():
            if t.shape != found[name].shape:
                raise InputError(
                    f"stage {name!r} of the start has impressions {list(found[name].shape)}, the target "
                    f"{list(t.shape)}; encode the target with kind {settings.kind!r} and one row per image"
                )
        # w_l of every step, so that no step copies them to the device.
        weights = [active_stages(step, settings, len(target)) for step in range(settings.steps)]
        self.weights = torch.tensor(weights, device=runtime.device, dtype=runtime.dtype)
        self.pixels = nn.ParameterList([start])
        self.optimizer = adam(self.pixels, settings.lr)
        self.scaler = runtime.scaler()
        self.images = start.clone()
        self.loss = torch.full((len(start),), torch.inf, device=runtime.device, dtype=runtime.dtype)
        self.steps = 0

    def encode(self, x: Tensor) -> tuple[Impression, Impression]:
        """The impressions of x [B, C, H, W] in [0, 1] at the matched stages, and the whole map of the middle one."""
        maps = self.template.feature_maps(x, tuple(self.target))
        found = {name: summarise(z, self.settings.kind) for name, z in maps.items()}
        return found, {self.middle: maps[self.middle].flatten(1)}

    def step(self) -> dict[str, Tensor]:
        """One descent step.

        Returns:
            "residual": the relative error, mean over images and stages; "loss": mean over images. Detached.
        """
        settings = self.settings
        share = cosine(self.steps, settings.steps)
        set_lr(self.optimizer, settings.lr_end + (settings.lr - settings.lr_end) * share)
        x = self.pixels[0]
        found, content = self.encode(x)
        errors = relative_errors(found, self.target)
        rest = settings.tv * roughness(x)
        if settings.content:
            rest = rest + settings.content * relative_errors(content, self.content)[:, 0]
        loss = (errors.sum(1) + rest).detach()
        self.remember(loss, x.detach())
        update(self.optimizer, ((errors * self.weights[self.steps]).sum(1) + rest).sum(), self.scaler)
        with torch.no_grad():
            x.clamp_(0, 1)
        self.steps += 1
        return {"residual": errors.detach().mean(), "loss": loss.mean()}

    def remember(self, loss: Tensor, x: Tensor) -> None:
        """Keep those images of x [B, C, H, W] whose loss [B] is lower than any before."""
        better = loss < self.loss
        self.loss = torch.where(better, loss, self.loss)
        self.images = torch.where(better[:, None, None, None], x, self.images)


def decode(template: Template, target: Impression, start: Tensor, settings: Settings, runtime: Runtime) -> Decoding:
    """All steps of a :class:`Decoding`, without progress and checkpoints."""
    decoding = Decoding(template, target, start, settings, runtime)
    for _ in range(settings.steps):
        decoding.step()
    return decoding
