"""One call each to reuse classifiers of your own: a few images make a smaller one, unlabelled ones make one of several.

As in :func:`dfkd_lib.distill`, what is passed in stays as it is: copies learn.
"""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any, TypeVar

import torch
from torch import nn

from .arguments import statistics_of_images
from .checking import check_module, check_roles, examine_student, examine_teacher
from .data import ImageSet
from .errors import InputError, unknown
from .lending import bare, borrowed, copied, like
from .methods import amalgamation, grafting, grafting_blocks
from .methods.amalgamation import Amalgam, FeatureTerm, Tasks
from .methods.grafting import NetGraft
from .models import Normalize
from .models.chains import STEM, Blocks, cut
from .runtime import Runtime, random_state_kept
from .settings import made, typed
from .training.fit import fit
from .training.players import freeze

S = TypeVar("S")


def graft(
    teacher: nn.Module | Blocks,
    student: nn.Module | Blocks,
    images: ImageSet,
    *,
    at: Sequence[str] = (),
    at_student: Sequence[str] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    n_views: int = 2048,
    pad: int = 4,
    flip: bool = True,
    runtime: Runtime | None = None,
    progress: bool = True,
    **settings: Any,
) -> nn.Sequential:
    """Graft a student of your own into a teacher of your own, on a few unlabelled images; no adapter is left.

    Args:
        teacher: trained; images [B, C, H, W] -> logits [B, K]. Used in eval mode.
        student: with the same resolutions at the cuts. Everything before the first cut is replaced by the teacher's.
        at: names of the modules at which a block starts, see :func:`dfkd_lib.models.chains.cut`; `at_student` if the
            student's differ. Not needed for networks that are given as blocks.
        mean, std: one number per channel, if the networks expect (x - mean) / std; None if they expect x in [0, 1].
            The grafted student expects what the teacher does.
        n_views: shifted (by `pad` pixels) and mirrored (if `flip`) views of the images that are made once.
        runtime: where and how to compute; by default what suits this machine.
        progress: show a live line, on a terminal or in a notebook.
        settings: any of :class:`dfkd_lib.methods.grafting.Settings`, such as network_steps=100; block_steps has one
            number, or one per cut, and is 200 by default.

    Returns:
        The merged student, a new network in eval mode: what :func:`dfkd_lib.methods.grafting_blocks.merge` gives, in
        the type and on the device of the student.

    Raises:
        InputError: something does not fit; the message names the network, the block or the setting.
        NonFiniteLoss: the training diverged.
    """
    chosen = _settings(grafting.Settings, {"block_steps": (200,)} | settings)
    n_views, pad, flip = typed("n_views", n_views, int), typed("pad", pad, int), typed("flip", flip, bool)
    if n_views < 1 or pad < 0:
        raise InputError(f"n_views must be at least 1 and pad 0 or more, not {n_views} and {pad}")
    _check_images(images)
    if teacher is student:
        raise InputError("teacher and student are the same network; give the student its own")
    cuts = {"teacher": at, "student": at if at_student is None else at_student}
    cuts = {who: typed(f"the cuts of the {who}", places, tuple[str, ...]) for who, places in cuts.items()}
    with random_state_kept(getattr(runtime, "device", "auto")):
        runtime = _chosen(runtime)
        pair = {"teacher": freeze(_whole(teacher, "teacher", shared=True)), "student": _whole(student, "student")}
        normalize = _normalize(mean, std, images, runtime, *pair.values())
        check_roles(pair["teacher"], pair["student"])
        pair = {who: runtime.prepare(network) for who, network in pair.items()}
        _examine(nn.Sequential(normalize, pair["teacher"]).eval(), "teacher", images, runtime)
        _examine(nn.Sequential(normalize, pair["student"]), "student", images, runtime)
        x = normalize(runtime.images(images.batch(range(min(2, len(images))))[0]))
        parts = {
            who: dict(zip(given, pair[who].children(), strict=True))
            if isinstance(given, dict)
            else cut(pair[who], cuts[who], x)
            for who, given in (("teacher", teacher), ("student", student))
        }
        blocks, stem = parts["teacher"], parts["teacher"][STEM]
        scions = grafting_blocks.scions(blocks, parts["student"], x)
        grafting_blocks.check_gradients(blocks, x)
        views = grafting.look(
            blocks | {STEM: nn.Sequential(normalize, stem)}, images, runtime, n_views=n_views, pad=pad, flip=flip
        )
        method = NetGraft(blocks, scions, views, chosen, runtime)
        fit(method, method.n_steps, name="grafting", progress=progress)
        model = next(nn.ModuleList([*student.values()] if isinstance(student, dict) else [student]).parameters())
        return grafting_blocks.merge(stem, scions, views.inputs).to(model.device, model.dtype)


def amalgamate(
    teachers: Sequence[nn.Module],
    student: nn.Module,
    images: ImageSet,
    *,
    classes: Sequence[Sequence[str]],
    term: FeatureTerm | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    runtime: Runtime | None = None,
    progress: bool = True,
    **settings: Any,
) -> tuple[nn.Module, list[str]]:
    """Make one classifier of several of your own, on unlabelled images.

    Args:
        teachers: trained; images [B, C, H, W] -> logits over their classes. Used in eval mode.
        student: images -> logits over the union, in the order that is returned.
        images: of all tasks, mixed; labels, if there are any, are not read.
        classes: the names of each teacher's classes, in the order of its outputs; names may occur in several.
        term: a loss between features, from :meth:`dfkd_lib.methods.common_features.CommonSpace.between` (any
            architectures) or :meth:`dfkd_lib.methods.comprehensive.Joint.between` (equal ones); without,
            distillation on the concatenated logits.
        mean, std: one number per channel, if all networks expect (x - mean) / std; None if they expect x in [0, 1].
        runtime: where and how to compute; by default what suits this machine.
        progress: show a live line, on a terminal or in a notebook.
        settings: any of :class:`dfkd_lib.methods.amalgamation.Settings`, such as batch_size=32; n_steps is 1000 by
            default.

    Returns:
        A trained copy of the student in eval mode, in the type and on the device of the student; and the names of
        the union's classes in the order of its outputs.

    Raises:
        InputError: something does not fit; the message names the network, the place in it or the setting.
        NonFiniteLoss: the training diverged.
    """
    chosen = _settings(amalgamation.Settings, {"n_steps": 1000} | settings)
    tasks = Tasks.named(classes)
    _check_images(images)
    if isinstance(teachers, nn.Module) or not isinstance(teachers, Sequence):
        raise InputError(f"teachers must be a list of networks, not a {type(teachers).__name__}")
    if len(teachers) != len(classes):
        raise InputError(f"there are {len(teachers)} teachers and {len(classes)} lists of classes; give one each")
    if any(teacher is student for teacher in teachers):
        raise InputError("the student is one of the teachers; give the student its own network")
    if term is not None and not isinstance(term, FeatureTerm):
        raise InputError(f"term must be a FeatureTerm, such as CommonSpace.between makes, not a {type(term).__name__}")
    with random_state_kept(getattr(runtime, "device", "auto")):
        runtime = _chosen(runtime)
        lent = []
        for t, teacher in enumerate(teachers, 1):
            with _named(f"teacher {t}"):
                lent.append(freeze(_whole(teacher, "teacher", shared=True)))
        learner = _whole(student, "student")
        check_roles(lent[0], learner)
        normalize = _normalize(mean, std, images, runtime, *lent, learner)
        # Hooks, not modules around the networks, as places are names in them; a clone, as a network may write to it.
        hooks = [network.register_forward_pre_hook(lambda _, inputs: (normalize(inputs[0].clone()), *inputs[1:]))
                 for network in (*lent, learner)]  # fmt: skip
        for t, network in enumerate(lent, 1):
            with _named(f"teacher {t}"):
                _examine(runtime.prepare(network), "teacher", images, runtime)
        _examine(runtime.prepare(learner), "student", images, runtime)
        term = copy.deepcopy(term)
        method = Amalgam(lent, learner, images, tasks, chosen, runtime, term)
        fit(method, method.n_steps, name="amalgamation", progress=progress)
    hooks[-1].remove()
    learner.eval()
    like(learner, bare(student))
    return learner, list(dict.fromkeys(itertools.chain(*classes)))


def _settings(kind: type[S], given: Mapping[str, Any]) -> S:
    known = [f.name for f in fields(kind)]  # type: ignore[arg-type]
    for name in given:
        if name not in known:
            raise unknown("setting", name, known)
    return made(kind, given)


def _chosen(runtime: Runtime | None) -> Runtime:
    if not isinstance(runtime, Runtime | None):
        raise InputError(f"runtime must be a dfkd_lib.runtime.Runtime, from Runtime.choose, not {runtime!r}")
    # Contiguous unless asked for: people's networks flatten with view, which channels-last does not allow.
    runtime = runtime or Runtime.choose(channels_last=False)
    torch.manual_seed(runtime.seed)  # first weights of adapters, dropout
    return runtime


def _check_images(images: ImageSet) -> None:
    if not isinstance(images, ImageSet):
        raise InputError(
            f"images must be an ImageSet, not a {type(images).__name__}; "
            "ImageSet(pixels, name='mine', split='train') makes one of uint8 [N, C, H, W]"
        )
    if not len(images):
        raise InputError(f"{images.name} has no images")


def _whole(given: nn.Module | Blocks, who: str, *, shared: bool = False) -> nn.Module:
    """A copy of a network, or of its blocks one after another.

    Args:
        shared: whether the copy shares the weights, as it will not learn.
    """
    take = borrowed if shared else copied
    if not isinstance(given, dict):
        check_module(given, who)
        return take(bare(given), who)
    if next(iter(given), None) != STEM:
        raise InputError(f"the {who}'s blocks must be a dict from name to module whose first key is {STEM!r}")
    for name, block in given.items():
        check_module(block, f"{who}'s block {name!r}")
    return nn.Sequential(*(take(block, who) for block in given.values()))


@contextmanager
def _named(who: str) -> Iterator[None]:
    """Say in a refusal which of several networks it is about."""
    try:
        yield
    except InputError as e:
        raise InputError(f"{who}: {e}") from e


def _normalize(
    mean: Sequence[float] | None, std: Sequence[float] | None, images: ImageSet, runtime: Runtime, *networks: nn.Module
) -> nn.Module:
    """What stands in front of all networks."""
    given = statistics_of_images(mean, std, images.image_shape[0], *networks)
    return nn.Identity() if given is None else runtime.prepare(Normalize(*given))


def _examine(network: nn.Module, who: str, images: ImageSet, runtime: Runtime) -> None:
    if who == "teacher":
        for line in examine_teacher(network, images.image_shape, runtime, gradient=False).warnings:
            warnings.warn(line, stacklevel=3)
    else:
        examine_student(network, images.image_shape, runtime)
