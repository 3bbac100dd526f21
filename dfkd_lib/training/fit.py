"""The one loop: run a method, evaluate, show progress, checkpoint, resume, stop when a loss is not finite."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from ..data import no_training_data
from ..errors import DamagedFile, NonFiniteLoss
from . import checkpoints
from .progress import Progress


class Method(Protocol):
    """What `fit` asks of a method: one outer iteration at a time, and a state to save.

    Attributes:
        data_free: whether the method may be handed no training data; `fit` then guards the data.
    """

    data_free: ClassVar[bool]

    def step(self) -> dict[str, Tensor]:
        """One outer iteration, all players; returns detached scalars and never waits for the device."""

    def state_dict(self) -> dict[str, Any]:
        """Players, optimisers, counters and random state, nested as `checkpoints.save` accepts."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly where `state_dict` was taken."""


@dataclass
class Fit:
    """What came out of :func:`fit`.

    Attributes:
        name: of the run, such as "classification/DFAD".
        history: one row per reading: "step", "seconds", mean training metrics since the row before, and the
            evaluation where there was one.
        measures: names of what was evaluated, such as "accuracy".
        snapshots: {step: {name: tensor}} as returned by `watch`.
        resumed_at: the step that a checkpoint continued from; 0 for a run from the start.
    """

    name: str
    history: list[dict[str, float]] = field(default_factory=list)
    measures: list[str] = field(default_factory=list)
    snapshots: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    resumed_at: int = 0

    @property
    def seconds(self) -> float:
        """Time spent, resumed parts included."""
        return self.history[-1]["seconds"] if self.history else 0.0

    def evaluations(self, measure: str) -> list[tuple[int, float]]:
        """(step, value) of each evaluation of a measure such as "accuracy"."""
        return [(int(row["step"]), row[measure]) for row in self.history if measure in row]

    def final(self, measure: str) -> float:
        """The measure after the last step."""
        return self.evaluations(measure)[-1][1]

    def best(self, measure: str) -> float:
        """The largest value among all evaluations: selected on the evaluation data, so never the headline."""
        return max(value for _, value in self.evaluations(measure))


def fit(
    method: Method,
    n_steps: int,
    *,
    name: str,
    evaluate: Callable[[], dict[str, float]] | None = None,
    eval_every: int = 0,
    watch: Callable[[], dict[str, Tensor]] | None = None,
    checkpoint: Path | None = None,
    checkpoint_every: float = 60.0,
    progress: bool = True,
) -> Fit:
    """Take `n_steps` outer iterations of a method.

    Evaluation happens every `eval_every` steps (0: only at the end) and after the last; `watch` is called at
    the same steps and once before the first. With a `checkpoint` path, the whole state is saved there
    every `checkpoint_every` seconds and at the end; if the file exists, the run continues from it, to the
    same result as an uninterrupted one. While a data-free method runs, opening or reading training data
    anywhere in the process is an error.

    Args:
        evaluate: returns figures of the student, larger is better.
        watch: returns tensors worth keeping, such as generated images.
        progress: show the live line, where there is somebody to look at it.

    Raises:
        NonFiniteLoss: a metric or a weight is NaN or infinite; the last good checkpoint is kept.
        DataFreeViolation: a data-free method touched training data.
        DamagedFile: the checkpoint cannot be read, or belongs to another run.
    """
    result = Fit(name)
    done = _restore(method, result, checkpoint, n_steps) if checkpoint and checkpoint.exists() else 0
    result.resumed_at = done
    if done == n_steps:
        return result
    read_every = max(1, n_steps // 100)
    pending: list[dict[str, Tensor]] = []
    seconds_before = result.seconds
    start = saved = time.perf_counter()
    guard = no_training_data(name) if method.data_free else contextlib.nullcontext()
    with guard, Progress(name, n_steps, done, show=progress) as line:
        if watch and not done:
            result.snapshots[0] = _to_cpu(watch())
        for step in range(done + 1, n_steps + 1):
            pending.append(method.step())
            evaluating = step == n_steps or bool(eval_every and step % eval_every == 0)
            if not evaluating and step % read_every:
                continue
            row = {"step": float(step), **_means(pending, step, name, checkpoint)}
            pending.clear()
            if evaluating and evaluate:
                figures = evaluate()
                result.measures = list(figures)
                row |= figures
            if evaluating and watch:
                result.snapshots[step] = _to_cpu(watch())
            row["seconds"] = seconds_before + time.perf_counter() - start
            result.history.append(row)
            line.update(step, row)
            if checkpoint and (step == n_steps or time.perf_counter() - saved >= checkpoint_every):
                _save(method, result, checkpoint, step, n_steps)
                saved = time.perf_counter()
    return result


def _means(pending: list[dict[str, Tensor]], step: int, name: str, checkpoint: Path | None) -> dict[str, float]:
    """Read the metrics of the last steps from the device, all at once; the first non-finite one is an error.

    A term that only some of the steps report is averaged over those.
    """
    reported = [(i, term) for i, metrics in enumerate(pending) for term in metrics]
    values = torch.stack([pending[i][term].float() for i, term in reported]).cpu()
    finite = torch.isfinite(values)
    if not finite.all():
        first = int((~finite).nonzero()[0])
        i, term = reported[first]
        at = step - len(pending) + 1 + i
        raise NonFiniteLoss(_not_finite(f"{term!r} is {float(values[first])}", name, at, checkpoint))
    by_term: dict[str, list[float]] = {}
    for (_, term), value in zip(reported, values.tolist(), strict=True):
        by_term.setdefault(term, []).append(value)
    return {term: sum(found) / len(found) for term, found in by_term.items()}


def _not_finite(what: str, name: str, step: int, checkpoint: Path | None) -> str:
    kept = f"; the last good checkpoint is kept at {checkpoint}" if checkpoint and checkpoint.exists() else ""
    return f"{name}: {what} at step {step}; lower the learning rate or use a higher precision{kept}"


def _to_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.detach().cpu() for key, value in tensors.items()}


def _save(method: Method, result: Fit, path: Path, step: int, n_steps: int) -> None:
    state = method.state_dict()
    if not checkpoints.all_finite(state):
        raise NonFiniteLoss(_not_finite("a weight is not finite", result.name, step, path))
    random_state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        random_state["cuda"] = torch.cuda.get_rng_state()
    checkpoints.save(
        path,
        {
            "name": result.name,
            "step": step,
            "n_steps": n_steps,
            "method": state,
            "random_state": random_state,
            "history": result.history,
            "measures": result.measures,
            "snapshots": result.snapshots,
        },
    )


def _restore(method: Method, result: Fit, path: Path, n_steps: int) -> int:
    state: dict[str, Any] = checkpoints.load(path)
    if (state.get("name"), state.get("n_steps")) != (result.name, n_steps):
        raise DamagedFile(
            f"{path} belongs to {state.get('name')!r} with {state.get('n_steps')} steps, not to {result.name!r} "
            f"with {n_steps}; delete it or choose another folder"
        )
    method.load_state_dict(state["method"])
    torch.set_rng_state(state["random_state"]["cpu"])
    if "cuda" in state["random_state"] and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["random_state"]["cuda"])
    result.history, result.measures, result.snapshots = state["history"], state["measures"], state["snapshots"]
    return int(state["step"])
