"""The one loop: run a method, evaluate, show progress, checkpoint, resume, stop when a loss is not finite."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from ..data import guard, no_training_data
from ..errors import DamagedFile, NonFiniteLoss
from ..locations import code_fingerprint
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
        resumed_at: the steps that a checkpoint was continued from, in order; empty for a run without a break. To read
            a finished run again is no break.
        moved_to: the steps at which the run ends since `move_end` of :func:`fit` moved its end; 0 if that is where
            it was.
        sources: fingerprints of the library's source that took the steps, in order: see :func:`fit`.
    """

    name: str
    history: list[dict[str, float]] = field(default_factory=list)
    measures: list[str] = field(default_factory=list)
    snapshots: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    resumed_at: list[int] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)
    moved_to: int = 0

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
    identity: Mapping[str, Any] | None = None,
    progress: bool = True,
    move_end: Callable[[int, int, float], int] | None = None,
) -> Fit:
    """Take `n_steps` outer iterations of a method.

    Evaluation happens every `eval_every` steps (0: only at the end) and after the last; `watch` is called at
    the same steps and once before the first. With a `checkpoint` path, the whole state is saved there
    every `checkpoint_every` seconds and at the end; if the file exists, the run continues from it, to the
    same result as an uninterrupted one. While a data-free method runs, opening or reading training data
    anywhere in the process is an error.

    A checkpoint of another identity is refused. One that another version of this library wrote is continued: most
    edits move no number, and hours of work would be lost to them. But :attr:`Fit.sources`, and with it the record,
    then names more than one version.

    Args:
        identity: what determines the run besides its name, such as its parameters and seed: numbers, strings, None
            and lists of them, by name.
        evaluate: returns figures of the student, larger is better; it may read test and held-out data.
        watch: returns tensors worth keeping, such as generated images.
        progress: show the live line, where there is somebody to look at it.
        move_end: is told the steps done, those that there shall be and the seconds so far, at every reading and when a
            run is continued, and returns how many steps there shall be from now on.

    Raises:
        NonFiniteLoss: a metric or a weight is NaN or infinite; the last good checkpoint is kept.
        DataFreeViolation: a data-free method touched training data.
        DamagedFile: the checkpoint cannot be read, or belongs to another run.
    """
    result, whose = Fit(name), {**(identity or {}), "name": name, "n_steps": n_steps}
    done = _restore(method, result, checkpoint, whose) if checkpoint and checkpoint.exists() else 0
    planned, n_steps = n_steps, result.moved_to or n_steps
    if done == n_steps:
        return result
    if done:
        result.resumed_at.append(done)
    if code_fingerprint() not in result.sources[-1:]:
        result.sources.append(code_fingerprint())
    read_every = max(1, n_steps // 100)
    pending: list[dict[str, Tensor]] = []
    seconds_before = result.seconds
    start = saved = time.perf_counter()
    if move_end and done:
        n_steps = max(done + 1, move_end(done, n_steps, seconds_before))
    guarded = no_training_data(name) if method.data_free else contextlib.nullcontext()
    with guarded, Progress(name, n_steps, done, show=progress) as line:
        if watch and not done:
            result.snapshots[0] = _to_cpu(watch())
        step = done
        while step < n_steps:
            step += 1
            pending.append(method.step())
            due = bool(eval_every and step % eval_every == 0)
            if step < n_steps and not due and step % read_every:
                continue
            row = {"step": float(step), **_means(pending, step, name, checkpoint)}
            pending.clear()
            if move_end:
                n_steps = max(step, move_end(step, n_steps, seconds_before + time.perf_counter() - start))
                line.n_steps, result.moved_to = n_steps, n_steps if n_steps != planned else 0
            evaluating = due or step == n_steps
            if evaluating and evaluate:
                with guard.evaluating():
                    figures = evaluate()
                result.measures = list(figures)
                row |= figures
            if evaluating and watch:
                result.snapshots[step] = _to_cpu(watch())
            row["seconds"] = seconds_before + time.perf_counter() - start
            result.history.append(row)
            line.update(step, row)
            if checkpoint and (step == n_steps or time.perf_counter() - saved >= checkpoint_every):
                _save(method, result, checkpoint, step, whose)
                saved = time.perf_counter()
    return result


def resumed(*fits: Fit) -> dict[str, dict[str, list[Any]]]:
    """What a record says of runs that this version of the library did not make in one piece.

    Returns:
        {name: {"at": :attr:`Fit.resumed_at`, "sources": :attr:`Fit.sources`}}; empty where there is nothing to say.
    """
    return {
        f.name: {"at": f.resumed_at, "sources": f.sources}
        for f in fits
        if f.resumed_at or f.sources != [code_fingerprint()]
    }


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


def _save(method: Method, result: Fit, path: Path, step: int, whose: Mapping[str, Any]) -> None:
    state = method.state_dict()
    if not checkpoints.all_finite(state):
        raise NonFiniteLoss(_not_finite("a weight is not finite", result.name, step, path))
    random_state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        random_state["cuda"] = torch.cuda.get_rng_state()
    fit = {key: value for key, value in vars(result).items() if key != "name"}
    checkpoints.save(
        path, {"identity": dict(whose), "step": step, "method": state, "random_state": random_state, "fit": fit}
    )


def _restore(method: Method, result: Fit, path: Path, whose: Mapping[str, Any]) -> int:
    """Continue from a checkpoint; returns its step. Nothing is touched before the file is known to be this run's."""
    state: dict[str, Any] = checkpoints.load(path)
    remedy = "delete it or choose another folder"
    try:
        found, step, random_state, fit = (state[key] for key in ("identity", "step", "random_state", "fit"))
    except (KeyError, TypeError) as e:
        raise DamagedFile(f"{path} is no checkpoint of a run of this version (there is no {e}); {remedy}") from e
    for key in {**whose, **found}:
        if key not in found or key not in whose or found[key] != whose[key]:
            theirs, ours = (f"{key} = {one[key]!r}" if key in one else f"no {key}" for one in (found, whose))
            raise DamagedFile(f"{path} belongs to another run, with {theirs} where this one has {ours}; {remedy}")
    try:
        last = fit.get("moved_to") or whose["n_steps"]
        if type(step) is not int or not 0 < step <= last:
            raise DamagedFile(f"{path} is damaged: it says step {step!r} of {last}; {remedy}")
        method.load_state_dict(state["method"])
        torch.set_rng_state(random_state["cpu"])
        if "cuda" in random_state and torch.cuda.is_available():
            torch.cuda.set_rng_state(random_state["cuda"])
    except (LookupError, TypeError, ValueError, RuntimeError) as e:
        reason = next(iter(str(e).splitlines()), "") or type(e).__name__
        raise DamagedFile(f"{path} does not fit this run ({reason.strip()}); {remedy}") from e
    for key, value in fit.items():
        setattr(result, key, value)
    return step
