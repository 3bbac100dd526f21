"""Training Generative Adversarial Networks in One Stage (OSGAN), arXiv 2103.00430.

Discriminator and generator look at a fake x^_i through the same scalar, the logit s_i = D(x^_i). So the gradients of
their losses at the image, and at every layer of D, are the same vector times a scalar:

    delta_i^G = gamma_i delta_i^D,  gamma_i = b'(s_i) / a'(s_i),

with a(s) the loss of D and b(s) that of G. One backward pass of D's loss serves both: it fills D, is multiplied by
gamma_i at the image, and goes on into G. Both gradients belong to the same weights: the descent is simultaneous, not
alternating. The trainer is :mod:`.gan`; the paper claims the same for data-free distillation: :class:`OneStageDFAD`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from ..compiling import as_written
from ..errors import InputError, unknown
from ..losses import mae
from ..runtime import Runtime, random_state_kept
from ..training.replay import Replay
from .dfad import DFAD, Settings, generation_loss, imitation_loss
from .dfad import PRESETS as TWO_STAGES

DIRECT, MIXED, TWO_BACKWARDS = "direct", "mixed", "two backwards"
FORMS = (MIXED, DIRECT, TWO_BACKWARDS)


@dataclass
class GradientRatio:
    """gamma of one pass through :func:`scaled_gradient`: a number, or a tensor, scalar or [B].

    It may be set after the pass, before the backward pass reads it.
    """

    gamma: Tensor | float | None = None

    def times(self, gradient: Tensor) -> Tensor:
        """gamma_i times the gradient [B, ...] of sample i, in 32 bits at least and then in the gradient's type."""
        gamma = self.gamma
        if gamma is None:
            raise InputError("a gradient ratio has no gamma yet; set it between the forward and the backward pass")
        if isinstance(gamma, Tensor):
            if gamma.ndim > 1 or gamma.numel() not in (1, len(gradient)):
                raise InputError(f"gamma is one number or one per sample, [{len(gradient)}], not {list(gamma.shape)}")
            gamma = gamma.detach().to(torch.promote_types(gamma.dtype, torch.float32))
            gamma = gamma.view(-1, *[1] * (gradient.ndim - 1))
        return (gradient * gamma).to(gradient.dtype)


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ratio: GradientRatio) -> Tensor:
        ctx.ratio = ratio
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return ctx.ratio.times(gradients[0]), None


def scaled_gradient(x: Tensor, ratio: GradientRatio | Tensor | float) -> Tensor:
    """R_gamma: x itself forward; backward, the gradient of sample i times gamma_i.

    It is no module hook: a full backward hook on G leaves the gradients of G's weights as they are.

    Args:
        x: [B, ...], any shape and float type.
        ratio: gamma, scalar or [B]; or its holder, to be filled before the backward pass.

    Returns:
        A view of x, the same bits. What shall not be scaled is computed from x.

    Raises:
        InputError: in the backward pass, where gamma is missing or has another shape.
    """
    scaled: Tensor = _Scaled.apply(x, ratio if isinstance(ratio, GradientRatio) else GradientRatio(ratio))
    return scaled


@dataclass(frozen=True)
class GANLoss:
    """What a GAN descends: L_D = mean rho(r) + mean a(s), L_G = mean b(s), r and s logits on real and fake.

    Attributes:
        rho, a, b: logits of any shape -> loss of each.
        ratio: s -> b'(s) / a'(s), of the shape of s or, where it is one number for all, a scalar.
        symmetric: b = -a, so that gamma = -1 whatever D is.
        floor: logit below which the ratio is held; so far down e^-s would overflow where a' underflows.
        obstacle: what keeps a' from being divided by, or "".
    """

    name: str
    rho: Callable[[Tensor], Tensor]
    a: Callable[[Tensor], Tensor]
    b: Callable[[Tensor], Tensor]
    ratio: Callable[[Tensor], Tensor]
    symmetric: bool
    floor: float = -math.inf
    obstacle: str = ""

    def discriminator(self, real: Tensor, fake: Tensor) -> Tensor:
        """L_D, a scalar. Args: logits r and s, float32 or float64, any shape."""
        return self.rho(real).mean() + self.a(fake).mean()

    def generator(self, fake: Tensor) -> Tensor:
        """L_G, a scalar. Args: logits s, float32 or float64, any shape."""
        return self.b(fake).mean()

    def gamma(self, fake: Tensor) -> Tensor:
        """gamma = b'(s) / a'(s) with s held at the floor; detached, of the shape of s or a scalar."""
        return self.ratio(fake.detach().clamp_min(self.floor))

    def clamped(self, fake: Tensor) -> Tensor:
        """How many logits lie below the floor, a scalar. If many do, D has won."""
        return (fake.detach() < self.floor).sum()


def _reversal(s: Tensor) -> Tensor:
    return torch.full((), -1.0, dtype=s.dtype, device=s.device)


# Where a' = 0 a ratio is -inf, and makes G's gradient NaN rather than a wrong number.
LOSSES = {
    loss.name: loss
    for loss in (
        GANLoss("saturating", lambda r: F.softplus(-r), F.softplus, lambda s: -F.softplus(s), _reversal, True),
        GANLoss(
            "non-saturating", lambda r: F.softplus(-r), F.softplus, lambda s: F.softplus(-s),
            lambda s: -torch.exp(-s), False, floor=-30.0,
        ),
        GANLoss("WGAN", lambda r: -r, lambda s: s, lambda s: -s, _reversal, True),
        GANLoss(
            "LSGAN", lambda r: (r - 1) ** 2, lambda s: s**2, lambda s: (s - 1) ** 2, lambda s: 1 - 1 / s, False,
            obstacle="its ratio 1 - 1/s has a pole at s = 0, just where a good discriminator puts the fakes",
        ),
        GANLoss(
            "hinge", lambda r: F.relu(1 - r), lambda s: F.relu(1 + s), lambda s: -s,
            lambda s: -1 / (s > -1).to(s.dtype), False,
            obstacle="a fake with s <= -1 gives D no gradient, so there is none to scale into the generator's",
        ),
    )
}  # fmt: skip


def why_not_one_stage(loss: GANLoss, discriminator: nn.Module, x: Tensor) -> str:
    """Why one backward pass would not give the generator its exact gradient: a sentence, or "" if it does.

    The ratio must exist (a' != 0). Unless it is the same for all samples, D must also give one logit per image, and
    that of an image must not depend on the others. Whether it does is tried out on a copy of D, in the mode that D
    is in: batch normalisation in train mode is the usual culprit.

    Args:
        x: at least two different images [B, C, H, W], on D's device.
    """
    if loss.obstacle:
        return f"{loss.name} cannot be trained in one stage: {loss.obstacle}"
    if loss.symmetric:
        return ""
    probe, x = copy.deepcopy(discriminator), x[:4].clone().requires_grad_()
    with as_written(), random_state_kept(x.device):
        logits = probe(x)
    if logits[0].numel() > 1:
        return (
            f"{loss.name} has a ratio per logit and the discriminator {logits[0].numel()} logits per image, whose "
            "gradients no single ratio scales; average them, or choose a symmetric loss"
        )
    (gradient,) = torch.autograd.grad(logits[0].sum(), x)
    if gradient[1:].count_nonzero():
        return (
            f"{loss.name} has a ratio per image and the discriminator mixes images, as batch normalisation does in "
            "train mode; use group normalisation, or choose a symmetric loss"
        )
    return ""


def choose_form(loss: GANLoss, discriminator: nn.Module, x: Tensor, fallback: bool) -> str:
    """The form of :func:`one_stage_gradients` that is exact: "mixed" if one backward pass is enough.

    Args:
        x: see :func:`why_not_one_stage`.
        fallback: whether it may be "two backwards" otherwise.

    Raises:
        InputError: it would have to be and may not.
    """
    why_not = why_not_one_stage(loss, discriminator, x)
    if why_not and not fallback:
        raise InputError(f"{why_not}; or allow the fallback, two backward passes")
    return TWO_BACKWARDS if why_not else MIXED


def one_stage_gradients(
    generator: nn.Module,
    discriminator: nn.Module,
    z: Tensor,
    x: Tensor,
    loss: GANLoss,
    runtime: Runtime,
    *,
    form: str = MIXED,
    scaler: torch.amp.GradScaler | None = None,
) -> dict[str, Tensor]:
    """Leave grad L_D in D's weights and grad L_G in G's, from one pass forward through G and two through D.

    Real and fake images pass D apart: in one batch, batch normalisation would mix them.

    "direct" descends L_D with R_gamma at the fakes. "mixed", the paper's form, descends

        1/B sum_i [ w_i (a(s_i) - b(s_i)) + rho(r_i) ],  w_i = 1 / (1 - gamma_i) held constant,

    with R_gamma there too. The gradients are the same, for w_i (a' - b') = a'; but where the ratio is held at its
    floor, the mixed form gives G its full gradient, and D one of e^-30 / B, while the direct form's fades. Both are
    exact only where :func:`why_not_one_stage` finds nothing. "two backwards" needs no assumption: L_D goes back to
    D's weights, then L_G, over the same graph, to the images and from there into G.

    In float16, a' is lost in D below s of about -17, and with it G's gradient; bfloat16 has the range.

    Args:
        z: noise, what the generator takes.
        x: as many real images [B, C, H, W].
        scaler: gradients are multiplied by its scale.

    Returns:
        "discriminator loss" and "generator loss", L_D and L_G in every form; "held ratios", the number of fakes
        below the floor. Detached scalars.

    Raises:
        InputError: unknown form; one backward pass where gamma differs between several logits of an image.
    """
    if form not in FORMS:
        raise unknown("form", form, FORMS)
    generator.zero_grad(set_to_none=True)
    discriminator.zero_grad(set_to_none=True)
    ratio = GradientRatio()
    with runtime.autocast():
        fake = generator(z).to(runtime.dtype)
        seen = fake.detach().requires_grad_() if form == TWO_BACKWARDS else scaled_gradient(fake, ratio)
        s = discriminator(seen).to(runtime.dtype)
        r = discriminator(x).to(runtime.dtype)
    s = s.flatten() if s.numel() == len(s) else s
    loss_d, loss_g = loss.discriminator(r, s), loss.generator(s)

    def scaled(value: Tensor) -> Tensor:
        return value if scaler is None else scaler.scale(value)

    if form == TWO_BACKWARDS:
        weights = [p for p in discriminator.parameters() if p.requires_grad]
        scaled(loss_d).backward(inputs=weights, retain_graph=True)
        (at_images,) = torch.autograd.grad(scaled(loss_g), seen)
        fake.backward(at_images)
    else:
        ratio.gamma = gamma = loss.gamma(s)
        mixture = (loss.a(s) - loss.b(s)) / (1 - gamma)
        scaled(loss_d if form == DIRECT else mixture.mean() + loss.rho(r).mean()).backward()
    return {
        "discriminator loss": loss_d.detach(), "generator loss": loss_g.detach(), "held ratios": loss.clamped(s)
    }  # fmt: skip


def step_together(scaler: torch.amp.GradScaler, *optimizers: Optimizer) -> None:
    """Each optimiser's step from gradients that one backward pass left, all of them with the scaler's scale."""
    for optimizer in optimizers:
        scaler.step(optimizer)
    scaler.update()


PRESETS: dict[str, dict[str, Any]] = {
    scale: preset
    | {"k": 1, "lr_generator": preset.get("lr_generator", Settings.lr_generator) / preset.get("k", Settings.k)}
    for scale, preset in TWO_STAGES.items()
}
PRESETS["mnist"]["lr_generator"] /= 3
"""Those of DFAD, with the generator's rate cut by the k steps of the student that it no longer waits for; on MNIST by
three times that, since cut by k alone the generator outruns a student of 1,500 updates."""


def distillation_ratio(discrepancy: Tensor, settings: Settings) -> Tensor:
    """gamma = f'(L) of a generator that descends f(L): -1 for -L, -1 / (1 + L) for -log(1 + L); one for the batch.

    Args:
        discrepancy: L, scalar >= 0.
    """
    return -1 / (1 + discrepancy.detach()) if settings.log_generator_loss else _reversal(discrepancy)


class OneStageDFAD(DFAD):
    """DFAD with one update of student and generator per :meth:`step`, from one backward pass of one batch.

    The student descends L = D(S(x), T(x)), the generator f(L), a function of the same scalar. So the ratio is one
    number for the batch: any discrepancy will do, and batch normalisation in the student. The teacher looks at
    R_gamma x as well, for the generator's gradient passes through both networks.

    Args:
        settings: as of :class:`~.dfad.DFAD`, with k = 1. With as many steps as the student the generator outruns it,
            unless its rate is cut by about the k that it had in two stages.

    Raises:
        InputError: settings that take two stages: k or generator_steps other than 1, a student in eval mode in the
            generation stage.
    """

    def __init__(
        self, teacher: nn.Module, student: nn.Module, generator: nn.Module, settings: Settings, runtime: Runtime
    ) -> None:
        for name, only in (("k", 1), ("generator_steps", 1), ("student_trains_in_generation", True)):
            if getattr(settings, name) != only:
                raise InputError(f"one stage updates both players from one batch; set {name} to {only}")
        super().__init__(teacher, student, generator, settings, runtime)
        self.both = Replay(self.play, runtime, [self.noise])

    def step(self) -> dict[str, Tensor]:
        """One update of either player; the time counts as distillation.

        Returns:
            "discrepancy", "relative discrepancy", "generator loss": see :meth:`DFAD.step <.dfad.DFAD.step>`.
        """
        self.set_learning_rates()
        with self.budget.distillation(self.runtime.device):
            metrics: dict[str, Tensor] = self.both()
        self.steps += 1
        self.budget.student_updates += 1
        self.budget.images += self.settings.batch_size
        self.budget.teacher_passes += self.settings.batch_size
        return metrics

    def play(self) -> dict[str, Tensor]:
        """The backward pass of L(S(R_gamma x), T(R_gamma x)), then both players' steps; returns the metrics."""
        ratio = GradientRatio()
        with self.runtime.autocast():
            x = scaled_gradient(self.generator(self.sample_noise()), ratio)
            s = self.student(x).to(self.runtime.dtype)
            t = self.look(x)
            loss = imitation_loss(s, t, self.settings)
        ratio.gamma = distillation_ratio(loss, self.settings)
        self.student_optimizer.zero_grad(set_to_none=True)
        self.generator_optimizer.zero_grad(set_to_none=True)
        self.student_scaler.scale(loss).backward()
        step_together(self.student_scaler, self.student_optimizer, self.generator_optimizer)
        s, t = s.detach(), t.detach()
        return {
            "discrepancy": loss.detach(),
            "relative discrepancy": mae(s, t) / t.abs().mean(),
            "generator loss": generation_loss(s, t, self.settings),
        }
