"""Amalgamating Knowledge towards Comprehensive Classification, arXiv 1811.02796.

Layer by layer, the stacked features of several teachers of one architecture are compressed into a compact set
(:mod:`.feature_amalgamation`); each layer of the student then learns to make the compact features of its place from
those of the place before (layer-wise learning), and in the end all layers learn together (joint learning). Two forms:
:class:`Layerwise`, as the paper has it, for networks that are a chain of layers; :class:`Joint`, the single stage of
the authors' engine, for any.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data import ImageSet
from ..errors import InputError
from ..models.adapters import adapter, affine, set_affine
from ..models.chains import Chain
from ..runtime import Runtime
from ..training.modes import still
from ..training.players import Resumable, adam, freeze, update
from ..training.schedules import cosine, set_lr
from .amalgamation import FeatureTerm, Settings, Tasks, Views, features_at, must_fit, union
from .feature_amalgamation import Code, stack


def merge(linear: Any, fam: nn.Module) -> nn.Module:
    """The layer that gives Phi(conv(x)): W <- A W, b <- A b + a. Exact everywhere, since the 1x1 map comes second."""
    matrix, offset = affine(fam)
    merged: Any = copy.deepcopy(linear)
    weight = torch.einsum("om,m...->o...", matrix, linear.weight.detach().cpu().double())
    bias = matrix @ linear.bias.detach().cpu().double() + offset
    set_affine(merged, weight, bias)
    return merged


def least_squares(layer: nn.Conv2d | nn.Linear, x: Tensor, y: Tensor) -> float:
    """Set a layer's weights to the minimum of mean ||layer(x) - y||^2, in closed form; returns that minimum.

    Args:
        layer: without groups, with bias and zero padding.
        x, y: inputs and wanted outputs, [B, C, H, W] or [B, C].
    """
    kind: Any = layer
    if isinstance(layer, nn.Conv2d):
        rows = F.unfold(x, kind.kernel_size, kind.dilation, kind.padding, kind.stride)
        a, b = rows.transpose(1, 2).flatten(0, 1).double(), y.flatten(2).transpose(1, 2).flatten(0, 1).double()
    else:
        a, b = x.double(), y.double()
    a = torch.cat([a, torch.ones_like(a[:, :1])], 1).cpu()
    b = b.cpu()
    solution = torch.linalg.lstsq(a, b, driver="gelsd").solution
    set_affine(layer, solution[:-1].T, solution[-1])
    return float((a @ solution - b).square().mean())


class Layerwise(Resumable):
    """Layer-wise parameter learning: every layer of the student for itself, all of them at once.

    conv_l learns mean ||conv_l(rho_{l-1}(Phi_{l-1}(F_a^{l-1}))) - F_a^l||^2 from the *amalgamated* feature of the
    layer below; F_a^0 is the image and F_a^L the concatenated logits. Phi, the feature adaptation module, stands in
    front of rho, because an amalgamated feature lives in a basis of its own, in which a ReLU means nothing.

    Args:
        teachers: chains of equal shape.
        student: a chain of that shape without batch normalisation, see :func:`without_norms`.
        codes: F_a^l of the layers but the last: closed forms, one for each.
        adapt: whether there is a Phi.
    """

    data_free: ClassVar[bool] = False
    PARTS: tuple[str, ...] = ("student", "fams", "optimizer", "scaler", "randomness", "steps")

    def __init__(
        self,
        teachers: Sequence[Chain],
        student: Chain,
        codes: Sequence[Code],
        images: ImageSet,
        tasks: Tasks,
        settings: Settings,
        runtime: Runtime,
        *,
        adapt: bool = True,
    ) -> None:
        self.settings, self.runtime, self.tasks, self.n_steps = settings, runtime, tasks, settings.n_steps
        self.teachers = [freeze(runtime.prepare(teacher)) for teacher in teachers]
        self.student = runtime.prepare(student).train()
        self.names = [str(layer.name) for layer in student.layers]
        self.views = Views(images, settings, runtime, "amalgamation views")
        self.randomness = self.views.randomness
        x = runtime.images(images.batch(range(1))[0])
        must_fit(teachers, student, tasks, x)
        with still(student):
            shapes = student.features(x)
        self.encoders = freeze(runtime.prepare(
            nn.ModuleList(code.modules(f.ndim)[0] for code, f in zip(codes, shapes[:-1], strict=True))
        ))  # fmt: skip
        with torch.no_grad():
            for name, f, code in zip(self.names, shapes, self.targets(x), strict=True):
                if f.shape != code.shape:
                    ours, theirs = ("x".join(map(str, t.shape[1:])) for t in (f, code))
                    raise InputError(f"layer {name!r}: {ours} in the student, {theirs} amalgamated; they must agree")
        fams: list[Any] = [adapter(f.shape[1], f.shape[1], f.ndim) if adapt else nn.Identity() for f in shapes[:-1]]
        for fam in fams if adapt else list[Any]():
            set_affine(fam, torch.eye(fam.weight.shape[0]), torch.zeros(fam.weight.shape[0]))
        self.fams = runtime.prepare(nn.ModuleList(fams)).train()
        self.optimizer = adam(nn.ModuleList([self.student, self.fams]), settings.lr, weight_decay=settings.weight_decay)
        self.scaler, self.steps = runtime.scaler(), 0

    def targets(self, x: Tensor) -> list[Tensor]:
        """F_a^1..F_a^{L-1} of images x, and the union of the teachers' logits."""
        found = [teacher.features(x) for teacher in self.teachers]
        stacked = stack([f[:-1] for f in found], self.names[:-1])
        codes = [encode(f) for encode, f in zip(self.encoders, stacked, strict=True)]
        return [*codes, union([f[-1] for f in found], self.tasks, centre=self.settings.centre)]

    def errors(self, x: Tensor) -> list[Tensor]:
        """L_B of each layer on images x."""
        with torch.no_grad():
            codes = self.targets(x)
        below, errors = self.student.before(x), []
        for i, layer in enumerate(self.student.layers):
            errors.append(F.mse_loss(layer.linear(below).to(self.runtime.dtype), codes[i].to(self.runtime.dtype)))
            if i < len(self.fams):
                below = layer.rho(self.fams[i](codes[i].clone()))
        return errors

    def step(self) -> dict[str, Tensor]:
        """One update of every layer and every Phi; returns {"L_B NAME": ...} per layer, detached."""
        set_lr(self.optimizer, self.settings.lr * cosine(self.steps, self.n_steps))
        with self.runtime.autocast():
            errors = self.errors(self.views.batch(self.steps))
        update(self.optimizer, torch.stack(errors).sum(), self.scaler)
        self.steps += 1
        return {f"L_B {name}": error.detach() for name, error in zip(self.names, errors, strict=True)}

    def adapted(self, x: Tensor) -> Tensor:
        """The student's logits with the modules Phi in place: what :meth:`merged` must reproduce."""
        x = self.student.before(x)
        for i, layer in enumerate(self.student.layers):
            x = layer.linear(x)
            x = layer.rho(self.fams[i](x)) if i < len(self.fams) else x
        return x

    def merged(self) -> Chain:
        """A copy of the student whose layers have absorbed the modules Phi: ready for joint learning."""
        student = copy.deepcopy(self.student)
        for layer, fam in zip(student.layers, self.fams, strict=False):
            if not isinstance(fam, nn.Identity):
                layer.linear[0] = merge(layer.linear[0], fam)
        return student


class Joint(FeatureTerm):
    """The authors' engine in one stage: at every place, the student's features imitate the compact ones.

    The terms: "amalgamation", sum_l mean ||fam_l(f_s^l) - sg[enc_l(F^l)]||^2, where sg keeps the encoder from
    collapsing to please the student, and "reconstruction", sum_l sum_t mean ||F~_t^l - F_t^l||^2, which alone shapes
    the encoder. fam maps the student to the code here: the opposite of Phi in :class:`Layerwise`.

    Args:
        channels: for each place, those of the student and of each teacher; the code is as wide as the student.
        ndims: 4 for feature maps, 2 for vectors, for each place.
    """

    def __init__(
        self,
        places: Sequence[Sequence[str]],
        channels: Sequence[Sequence[int]],
        ndims: Sequence[int],
    ) -> None:
        super().__init__()
        self.places = places
        self.weights = {"amalgamation": 1.0, "reconstruction": 1.0}
        at = [(width, sum(theirs), ndim) for (width, *theirs), ndim in zip(channels, ndims, strict=True)]
        self.enc = nn.ModuleList(adapter(total, width, ndim) for width, total, ndim in at)
        self.dec = nn.ModuleList(adapter(width, total, ndim) for width, total, ndim in at)
        self.fam = nn.ModuleList(adapter(width, width, ndim) for width, _, ndim in at)

    @classmethod
    def between(
        cls,
        teachers: Sequence[nn.Module],
        student: nn.Module,
        *,
        places: Sequence[str],
        x: Tensor,
    ) -> Joint:
        """The term for networks that have modules of the same names and features of the same height and width.

        Args:
            places: module names, such as those of all convolutions.
            x: images on which the shapes are seen.

        Raises:
            InputError: no such module, or sizes that differ; the message names the place.
        """
        found = [features_at(network, x, places) for network in (student, *teachers)]
        for name, at in zip(places, zip(*found, strict=True), strict=True):
            if len({f.shape[2:] for f in at}) > 1:
                sizes = [f"{'x'.join(map(str, f.shape[1:]))} in {'the student' if i == 0 else f'teacher {i}'}"
                         for i, f in enumerate(at)]  # fmt: skip
                raise InputError(
                    f"layer {name!r}: {', '.join(sizes)}; features can be stacked at equal height and width only"
                )
        channels = [[f.shape[1] for f in at] for at in zip(*found, strict=True)]
        return cls([list(places)] * len(found), channels, [f.ndim for f in found[0]])

    def forward(self, f_s: list[Tensor], f_t: list[list[Tensor]]) -> dict[str, Tensor]:
        imitation, rebuilding = [], []
        for i, (ours, *theirs) in enumerate(zip(f_s, *f_t, strict=True)):
            code = self.enc[i](torch.cat(theirs, 1))
            guesses = self.dec[i](code).split([f.shape[1] for f in theirs], 1)
            imitation.append(F.mse_loss(self.fam[i](ours), code.detach()))
            rebuilding += [F.mse_loss(guess, f) for guess, f in zip(guesses, theirs, strict=True)]
        return {"amalgamation": torch.stack(imitation).sum(), "reconstruction": torch.stack(rebuilding).sum()}
