"""One call each to reuse classifiers of your own: a few images make a smaller one, many make one of several."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import nn

from .data import ImageSet
from .methods import amalgamation, grafting
from .methods.amalgamation import Amalgam, FeatureTerm, Tasks
from .methods.grafting import NetGraft
from .models.chains import STEM, Blocks, cut
from .runtime import Runtime
from .training.fit import fit
from .training.players import freeze


def graft(
    teacher: nn.Module | Blocks,
    student: nn.Module | Blocks,
    images: ImageSet,
    *,
    at: Sequence[str] = (),
    at_student: Sequence[str] | None = None,
    settings: grafting.Settings | None = None,
    runtime: Runtime | None = None,
    n_views: int = 2048,
    pad: int = 4,
    flip: bool = True,
) -> nn.Sequential:
    """Graft a student of your own into a teacher of your own, on a few unlabelled images; no adapter is left.

    Args:
        teacher: trained; images [B, C, H, W] in [0, 1] -> logits. It is frozen and stays as it is.
        student: with the same resolutions at the cuts. Everything before the first cut is replaced by the teacher's.
        at: names of the modules at which a block starts, see :func:`dfkd_lib.models.chains.cut`; `at_student` if the
            student's differ. Not needed for networks that are given as blocks.
        settings: `block_steps` has one number, or one per cut.
        n_views: shifted (by `pad`) and mirrored (if `flip`) views of the images that are made once.

    Returns:
        The merged student in eval mode: what :func:`dfkd_lib.methods.grafting.merge` gives.

    Raises:
        InputError: the networks cannot be cut there or do not fit; the message names the block.
    """
    runtime = runtime or Runtime.choose()
    x = runtime.images(images.batch(range(min(2, len(images))))[0])
    cuts = {"teacher": at, "student": at_student or at}
    parts = {
        role: {name: runtime.prepare(block) for name, block in given.items()}
        if isinstance(given, dict)
        else cut(runtime.prepare(given), cuts[role], x)
        for role, given in (("teacher", teacher), ("student", student))
    }
    blocks = {name: freeze(block) for name, block in parts["teacher"].items()}
    scions = grafting.scions(blocks, parts["student"], x)
    views = grafting.look(blocks, images, runtime, n_views=n_views, pad=pad, flip=flip)
    method = NetGraft(blocks, scions, views, settings or grafting.Settings(block_steps=(200,)), runtime)
    fit(method, method.n_steps, name="grafting")
    return grafting.merge(blocks[STEM], scions, views.inputs)


def amalgamate(
    teachers: Sequence[nn.Module],
    student: nn.Module,
    images: ImageSet,
    *,
    classes: Sequence[Sequence[str]],
    term: FeatureTerm | None = None,
    settings: amalgamation.Settings | None = None,
    runtime: Runtime | None = None,
) -> tuple[nn.Module, list[str]]:
    """Make one classifier of several of your own, on unlabelled images.

    Args:
        teachers: trained; images [B, C, H, W] in [0, 1] -> logits over their classes. They are frozen, and their
            weights and running statistics stay as they are.
        student: images -> logits over the union, in the order that is returned.
        images: of all tasks, mixed; labels, if there are any, are not read.
        classes: the names of each teacher's classes, in the order of its outputs; names may occur in several.
        term: a loss between features, from :meth:`dfkd_lib.methods.common_features.CommonSpace.between` (any
            architectures) or :meth:`dfkd_lib.methods.comprehensive.Joint.between` (equal ones); without,
            distillation on the concatenated logits.
        settings: 1000 updates with the defaults, unless you say otherwise.

    Returns:
        The student in eval mode, and the names of the union's classes in the order of its outputs.

    Raises:
        InputError: outputs or features that do not fit; the message names the network, or the place in it.
    """
    runtime = runtime or Runtime.choose()
    tasks = Tasks.named(classes)
    method = Amalgam(teachers, student, images, tasks, settings or amalgamation.Settings(n_steps=1000), runtime, term)
    fit(method, method.n_steps, name="amalgamation")
    return method.student.eval(), list(dict.fromkeys(itertools.chain(*classes)))
