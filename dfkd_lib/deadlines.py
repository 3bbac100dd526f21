"""A run that is to end in some minutes, watched while it runs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

MOST = 2  # times the steps that were planned: what memory is checked for
_TOLERATED = 0.05  # of the steps that are left: less is not worth moving the end


@dataclass(frozen=True)
class Plan:
    """What fits into some minutes.

    Attributes:
        n_updates: of the student.
        seconds: of training, in which they should end.
    """

    n_updates: int
    seconds: float


class Deadline:
    """Keeps a run to its time: where the steps become slower the rest is made shorter, where they are faster longer.

    The schedules of learning rates are moved with the end, so that they reach it.

    Args:
        run: a method of `dfkd_lib.planning`, at its first step.
        settings: those for a number of student updates.
        n_steps: that were planned for it.
    """

    def __init__(self, run: Any, settings: Callable[[int], Any], plan: Plan, n_steps: int) -> None:
        self.run, self.settings, self.plan, self.n_steps = run, settings, plan, n_steps
        self.last: tuple[int, float] | None = None
        self.pace = 0.0
        self.per_step = int(getattr(run.settings, "kd_steps", 0) or getattr(run.settings, "k", 1))

    def __call__(self, step: int, n_steps: int, seconds: float) -> int:
        """How many steps the run shall have.

        Args:
            step: how many it has done.
            n_steps: that it was to have until now.
            seconds: of training so far, parts before an interruption included.
        """
        if self.last is not None and step > self.last[0]:
            recent = (seconds - self.last[1]) / (step - self.last[0])
            self.pace = (self.pace + recent) / 2 if self.pace else recent
        self.last = step, seconds
        if self.pace:
            fits = step + max(0, math.floor((self.plan.seconds - seconds) / self.pace))
            if abs(fits - n_steps) > _TOLERATED * (n_steps - step) or fits <= step:
                n_steps = min(MOST * self.n_steps, fits)
        self._schedule(n_steps)
        return n_steps

    def _schedule(self, n_steps: int) -> None:
        run = self.run
        n_updates = max(1, self.plan.n_updates - (self.n_steps - n_steps) * self.per_step)
        if n_updates == run.settings.n_updates:
            return
        moved = {"n_updates": n_updates}
        for name in ("n_steps", "milestones"):  # of mosaickd; of kd
            if hasattr(run.settings, name):
                moved[name] = getattr(self.settings(n_updates), name)
        run.settings = replace(run.settings, **moved)
        if hasattr(run, "distillation"):
            run.distillation = replace(run.distillation, n_updates=n_updates)
