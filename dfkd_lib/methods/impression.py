"""Impression Space from Deep Template Network, arXiv 2007.05441: a reconstruction.

A frozen classifier, the template network, maps an image to its *impression*: what its stages respond, kept whole or
summarised. Descent on the pixels decodes an impression back into an image. In between, impressions are averaged,
shifted and compared, which gives synthesis, unpaired translation and relations between images, and nothing is
trained. The paper's abstract has the goals and these words; every formula of this module is our completion:

    x* = argmin over x in [0, 1]:  sum_l w_l || I_l(x) - t_l ||^2 / max(|| t_l ||^2, 1e-6) + tv TV(x).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import data
from ..data import ImageSet
from ..errors import DataUnavailable, InputError, unknown
from ..models import Normalize
from ..runtime import Runtime
from ..taps import batch_norm_layers, last_linear, tapped
from ..training.players import adam, check_positive, freeze, restore_state, state_of, update
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
        schedule: "joint" matches all stages at once; "progressive" begins with the deepest alone and takes in the
            next shallower one after each n/M steps.
    """

    kind: str = "stat"
    steps: int = 300
    lr: float = 0.05
    lr_end: float = 0.005
    tv: float = 0.02
    schedule: str = "joint"

    def __post_init__(self) -> None:
        check_positive(self, "steps", "lr", "lr_end")
        _grid(self.kind)
        if self.tv < 0:
            raise InputError(f"tv must be 0 or more, not {self.tv}")
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


class Decoding:
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
    PARTS = ("pixels", "optimizer", "scaler", "images", "loss", "steps")

    def __init__(
        self, template: Template, target: Impression, start: Tensor, settings: Settings, runtime: Runtime
    ) -> None:
        self.template, self.settings, self.runtime = template, settings, runtime
        self.target = {name: t.detach().to(runtime.device, runtime.dtype) for name, t in target.items()}
        start = runtime.images(start.detach()).clone()
        with torch.no_grad():
            found = template.encode(start, settings.kind, tuple(target))
        for name, t in self.target.items():
            if t.shape != found[name].shape:
                raise InputError(
                    f"stage {name!r} of the start has impressions {list(found[name].shape)}, the target "
                    f"{list(t.shape)}; encode the target with kind {settings.kind!r} and one row per image"
                )
        self.pixels = nn.ParameterList([start])
        self.optimizer = adam(self.pixels, settings.lr)
        self.scaler = runtime.scaler()
        self.images = start.clone()
        self.loss = torch.full((len(start),), torch.inf, device=runtime.device, dtype=runtime.dtype)
        self.steps = 0

    def step(self) -> dict[str, Tensor]:
        """One descent step.

        Returns:
            "residual": the relative error, mean over images and stages; "loss": mean over images. Detached.
        """
        settings = self.settings
        share = cosine(self.steps, settings.steps)
        set_lr(self.optimizer, settings.lr_end + (settings.lr - settings.lr_end) * share)
        x = self.pixels[0]
        errors = relative_errors(self.template.encode(x, settings.kind, tuple(self.target)), self.target)
        weights = errors.new_tensor(active_stages(self.steps, settings, len(self.target)))
        smoothness = settings.tv * roughness(x)
        self.remember(errors.detach().sum(1) + smoothness.detach(), x.detach())
        update(self.optimizer, ((errors * weights).sum(1) + smoothness).sum(), self.scaler)
        with torch.no_grad():
            x.clamp_(0, 1)
        self.steps += 1
        return {"residual": errors.detach().mean(), "loss": (errors.detach().sum(1) + smoothness.detach()).mean()}

    def remember(self, loss: Tensor, x: Tensor) -> None:
        """Keep those images of x [B, C, H, W] whose loss [B] is lower than any before."""
        better = loss < self.loss
        self.loss = torch.where(better, loss, self.loss)
        self.images = torch.where(better[:, None, None, None], x, self.images)

    def state_dict(self) -> dict[str, Any]:
        """See :class:`dfkd_lib.training.fit.Method`."""
        return state_of(self, self.PARTS)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See :class:`dfkd_lib.training.fit.Method`."""
        restore_state(self, self.PARTS, state)
        self.images, self.loss = self.images.to(self.runtime.device), self.loss.to(self.runtime.device)


def decode(template: Template, target: Impression, start: Tensor, settings: Settings, runtime: Runtime) -> Decoding:
    """All steps of a :class:`Decoding`, without progress and checkpoints."""
    decoding = Decoding(template, target, start, settings, runtime)
    for _ in range(settings.steps):
        decoding.step()
    return decoding


def paint(t: Tensor, filters: Tensor, image_size: int, *, stride: int = 1, padding: int = 1) -> Tensor:
    """W^T t: each filter painted where, and as strongly as, the impression t says.

    Args:
        t: [B, K, H', W'], responses of a linear stage.
        filters: W [K, C, k, k].

    Returns:
        [B, C, image_size, image_size].
    """
    reached = (t.shape[-1] - 1) * stride - 2 * padding + filters.shape[-1]
    return F.conv_transpose2d(t, filters, None, stride, padding, output_padding=image_size - reached)


def landweber(
    t: Tensor, filters: Tensor, image_size: int, steps: int, *, stride: int = 1, padding: int = 1
) -> list[Tensor]:
    """x <- x + W^T (t - W x) / ||W||^2 from x = 0: decoding one linear stage, in closed form W^+ t.

    The first step is W^T t up to its size; the error never rises, and what no filter sees stays 0.

    Args:
        t: [B, K, H', W'] responses to decode.
        filters: W [K, C, k, k].

    Returns:
        The iterates 0 to `steps`, each [B, C, image_size, image_size].
    """

    def respond(x: Tensor) -> Tensor:
        return F.conv2d(x, filters, None, stride, padding)

    shape = filters.shape[1], image_size, image_size
    units = torch.eye(shape[0] * image_size**2, dtype=t.dtype, device=t.device).view(-1, *shape)
    size = 1 / torch.linalg.matrix_norm(respond(units).flatten(1), 2) ** 2
    iterates = [t.new_zeros(len(t), *shape)]
    for _ in range(steps):
        x = iterates[-1]
        iterates.append(x + size * paint(t - respond(x), filters, image_size, stride=stride, padding=padding))
    return iterates


def cut(template: Template, x: Tensor) -> list[nn.Module]:
    """The stages f_1, ..., f_M as modules, for a network that passes its layers in the order of registration.

    Args:
        x: images [B, C, H, W] to check the cut on. "embedding" does not count as a stage here.

    Raises:
        InputError: applied one after the other, the pieces give other feature maps than the network.
    """
    names = [name for name in template.stages if name != EMBEDDING]
    pieces: list[nn.Module] = []
    layers: list[nn.Module] = []
    for name, module in template.network.named_modules():
        if next(module.children(), None) is None:
            layers.append(module)
            if name in names:
                pieces.append(nn.Sequential(*layers))
                layers = []
    z, found = template.runtime.images(x), template.feature_maps(x, names)
    with torch.no_grad():
        for name, piece in zip(names, pieces, strict=False):
            try:
                z = piece(z)
            except RuntimeError:
                break
            if z.shape != found[name].shape or not torch.allclose(z, found[name], rtol=1e-3, atol=1e-4):
                break
        else:
            if len(pieces) == len(names):
                return pieces
    raise InputError("the network is no chain of its layers, so it cannot be inverted stage by stage; use decode")


def invert_locally(stages: Sequence[nn.Module], z: Tensor, image_shape: Sequence[int], settings: Settings) -> Tensor:
    """The schedule "local": one stage at a time from the top, each from 0, for "full" impressions.

    z_{l-1} = argmin over z >= 0 (in [0, 1] for images) of || f_l(z) - z_l ||^2 / || z_l ||^2. Errors of the deep
    stages are frozen in, which makes it weaker than matching all at once.

    Args:
        stages: f_1, ..., f_M from :func:`cut`, frozen.
        z: [B, C_M, H_M, W_M], what the last stage gave.

    Returns:
        Images [B, C, H, W] in [0, 1].
    """
    shapes = [tuple(image_shape)]
    with torch.no_grad():
        for stage in stages[:-1]:
            shapes.append(tuple(stage(z.new_zeros(1, *shapes[-1])).shape[1:]))
    for depth in reversed(range(len(stages))):
        # Not exactly 0, where a ReLU behind a zero bias has no gradient.
        below = nn.ParameterList([z.new_full((len(z), *shapes[depth]), 1e-2)])
        optimizer = adam(below, settings.lr)
        for step in range(settings.steps):
            set_lr(optimizer, settings.lr_end + (settings.lr - settings.lr_end) * cosine(step, settings.steps))
            error = relative_errors({"": stages[depth](below[0]).flatten(1)}, {"": z.flatten(1)}).sum()
            optimizer.zero_grad()
            error.backward()
            optimizer.step()
            with torch.no_grad():
                below[0].clamp_(0, None if depth else 1)
        z = below[0].detach()
    return z


# Impression matching


def mean_impression(impressions: Impression) -> Impression:
    """Ibar: the mean of the impressions of a set, {stage: [1, D_l]}; not the impression of the pooled pixels."""
    return {name: i.mean(0, keepdim=True) for name, i in impressions.items()}


def translated(source: Impression, mean_a: Impression, mean_b: Impression, alpha: float = 1.0) -> Impression:
    """t_l = max(0, I_l(x) + alpha (Ibar_l(B) - Ibar_l(A))): unpaired translation from the set A to the set B.

    The maximum stands only where the source itself is never negative, as behind a ReLU: no image has an impression
    below 0 there.

    Args:
        source: {stage: [B, D_l]}.
        mean_a, mean_b: {stage: [1, D_l]}, see :func:`mean_impression`.
    """
    target = {}
    for name, i in source.items():
        moved = i + alpha * (mean_b[name] - mean_a[name])
        target[name] = torch.where((i >= 0).all(), moved.clamp_min(0), moved)
    return target


def interpolated(one: Impression, other: Impression, alpha: float) -> Impression:
    """t = (1 - alpha) I(x_1) + alpha I(x_2)."""
    return {name: torch.lerp(i, other[name], alpha) for name, i in one.items()}


def replaced(content: Impression, style: Impression, n_shallow: int) -> Impression:
    """The first `n_shallow` stages from one image, the others from another: style transfer as impression matching."""
    names = list(content)
    return {name: (style if names.index(name) < n_shallow else content)[name] for name in names}


# Relations


def relation_vectors(impressions: Impression, centre: Impression) -> Tensor:
    """v(x): centred impressions, each stage at unit length, side by side, over sqrt(M).

    Args:
        impressions: {stage: [N, D_l]}.
        centre: {stage: [1, D_l]}, the mean impression of a reference set.

    Returns:
        [N, sum D_l], rows of unit length, so that R = v v^T lies in [-1, 1].
    """
    stages = [F.normalize(i - centre[name], dim=1) for name, i in impressions.items()]
    return torch.cat(stages, 1) / len(stages) ** 0.5


def nearest(relations: Tensor, k: int) -> Tensor:
    """The k most related other images of each: indices [N, k] from R [N, N]."""
    others = relations - 4 * torch.eye(len(relations), device=relations.device, dtype=relations.dtype)
    return others.topk(k, dim=1).indices


def retrieval_precision(relations: Tensor, labels: Tensor, k: int) -> float:
    """Share of images of the same class among the k most related ones, mean over images."""
    return float((labels[nearest(relations, k)] == labels[:, None]).double().mean())


def retrieval_chance(labels: Tensor) -> float:
    """What :func:`retrieval_precision` is for relations without meaning."""
    counts = torch.bincount(labels).double()
    return float((counts * (counts - 1)).sum() / (len(labels) * (len(labels) - 1)))


def class_relations(relations: Tensor, labels: Tensor, n_classes: int) -> Tensor:
    """Mean relation of the images of each pair of classes, no image with itself: [n_classes, n_classes]."""
    member = F.one_hot(labels, n_classes).to(relations.dtype)
    total = member.T @ (relations - torch.diag(relations.diagonal())) @ member
    sizes = member.sum(0)
    return total / (torch.outer(sizes, sizes) - torch.diag(sizes)).clamp_min(1)


def similarity_map(
    template: Template, x: Tensor, other: Tensor, centre: Impression, kind: str, stages: Sequence[str] = ()
) -> Tensor:
    """Which pixels of x make it similar to `other`: |d R / d x|, summed over the colours.

    Args:
        x, other: [B, C, H, W]; row i of one is related to row i of the other.

    Returns:
        [B, H, W] >= 0.
    """
    x = template.runtime.images(x).detach().requires_grad_()
    with torch.no_grad():
        theirs = relation_vectors(template.encode(other, kind, stages), centre)
    ours = relation_vectors(template.encode(x, kind, stages), centre)
    (gradient,) = torch.autograd.grad((ours * theirs).sum(), x)
    return gradient.abs().sum(1)


# The impression that a network stores of its training set


@torch.no_grad()
def remembered(network: nn.Module, x: Tensor) -> list[tuple[float, float]]:
    """How far a batch is from what each batch-norm layer remembers, and from nothing.

    With (mean, variance) over batch and space as the operator, the running statistics are the impression of the
    whole training set, and matching them is DeepInversion's regulariser.

    Args:
        x: [B, C, H, W] in [0, 1].

    Returns:
        For each layer: ||s - r|| and ||r||, with s the statistics of the batch and r the running ones.
    """
    with tapped(batch_norm_layers(network)) as seen:
        network(x)
    rows = []
    for visit in seen:
        running = torch.cat([visit.layer.running_mean, visit.layer.running_var])  # type: ignore[list-item]
        rows.append((float((torch.cat(visit.statistics()) - running).norm()), float(running.norm())))
    return rows


# Images and networks of one's own


def read_image(path: str, size: int, channels: int) -> Tensor:
    """An image file, cropped to a square around its centre and resized: [1, channels, size, size] in [0, 1].

    "china.jpg" and "flower.jpg" are the two photographs that come with scikit-learn.

    Raises:
        InputError: no such file, or not an image.
    """
    if path in ("china.jpg", "flower.jpg"):
        import sklearn.datasets

        path = str(Path(sklearn.datasets.__file__).parent / "images" / path)
    pixels = torch.from_numpy(data.read_image(path, size, channels).copy()).float().div(255)
    return pixels.permute(2, 0, 1)[None].contiguous()


IMAGENET = ("vgg16", "vgg19", "vgg16_bn", "vgg19_bn")


def imagenet_template(name: str, *, pretrained: bool = True) -> nn.Module:
    """torchvision's VGG with ImageNet weights (0.5 GB, downloaded once), its normalisation in front.

    Args:
        name: one of `IMAGENET`.
        pretrained: False gives random weights.

    Raises:
        InputError: another network.
        DataUnavailable: the weights are neither cached nor reachable.
    """
    import torchvision

    if name not in IMAGENET:
        raise unknown("ImageNet template", name, IMAGENET)
    try:
        network = torchvision.models.get_model(name, weights="IMAGENET1K_V1" if pretrained else None)
    except OSError as e:
        raise DataUnavailable(
            f"ImageNet weights of {name} cannot be downloaded ({e}); use a template of this project instead"
        ) from e
    return nn.Sequential(Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), network)


def pick(labels: Tensor, per_class: int, generator: torch.Generator | None = None) -> Tensor:
    """Indices of `per_class` images of each class, the classes one after the other, drawn at random.

    Raises:
        InputError: a class has fewer.
    """
    chosen = []
    for label in labels.unique().tolist():
        at = (labels == label).nonzero().flatten()
        if len(at) < per_class:
            raise InputError(f"class {label} has {len(at)} images, fewer than the {per_class} asked for")
        order = torch.randperm(len(at), generator=generator, device=None if generator is None else generator.device)
        chosen.append(at[order[:per_class].to(at.device)])
    return torch.cat(chosen)
