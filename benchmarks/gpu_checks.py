"""What a trial of a GPU looks at first: whether every method does the same there, and what an update costs."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dfkd_lib import distillers, models
from dfkd_lib.distillers import DataFreeMethod
from dfkd_lib.methods.dfad import DFAD
from dfkd_lib.methods.one_stage import OneStageDFAD
from dfkd_lib.runtime import Runtime
from dfkd_lib.training import checkpoints

TINY: dict[str, dict[str, Any]] = {
    "fast": {"batch_size": 16, "synthesis_batch": 16, "warmup": 1, "g_steps": 3, "kd_steps": 3},
    "nayer": {"batch_size": 16, "synthesis_batch": 20, "warmup": 1, "g_steps": 4, "kd_steps": 3},
    "cpnet": {"batch_size": 16, "synthesis_batch": 20, "warmup": 1, "g_steps": 4, "kd_steps": 3},
    "cmi": {"batch_size": 16, "synthesis_batch": 16, "preinvert": 1, "inner_steps": 5, "kd_steps": 3, "negatives": 16},
    "deepinversion": {"batch_size": 16, "synthesis_batch": 16, "g_steps": 5, "kd_steps": 3},
    "adi": {"batch_size": 16, "synthesis_batch": 16, "g_steps": 5, "kd_steps": 3},
}


def tiny_method(name: str, runtime: Runtime) -> DataFreeMethod:
    """A method on networks of a moment's work, the same each time."""
    torch.manual_seed(0)
    networks = [
        models.build(kind, n_classes=10, in_channels=1, mean=[0.3], std=[0.3])
        for kind in ("digits_cnn", "digits_cnn_half")
    ]
    with torch.no_grad():
        for _ in range(10):
            networks[0](torch.rand(64, 1, 8, 8))
    settings = TINY.get(name, {"batch_size": 16})
    return distillers.build(name, networks[0].eval(), networks[1], (1, 8, 8), runtime, preset="digits", n_updates=60,
                            **settings)  # fmt: skip


def apart(one: nn.Module, other: nn.Module) -> float:
    """Largest difference of two networks' weights, relative to the largest weight."""
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    floats = [(a.double().cpu(), b.double().cpu()) for a, b in pairs if a.is_floating_point()]
    return max(float((a - b).abs().max()) for a, b in floats) / max(float(a.abs().max()) for a, _ in floats)


def agreement(name: str, device: torch.device, folder: Path) -> dict[str, float]:
    """What one method does on the device: recorded against as written, resumed against uninterrupted, and against
    the processor; relative differences of float32 weights and logits, 0 where there is none."""
    eager = dataclasses.replace(Runtime.choose(str(device), "float32"), graphs=False)
    recorded = dataclasses.replace(eager, graphs=device.type == "cuda")
    methods = {how: tiny_method(name, runtime) for how, runtime in (("eager", eager), ("recorded", recorded))}
    for method in methods.values():
        for _ in range(6):
            method.step()
    first = tiny_method(name, recorded)
    for _ in range(3):
        first.step()
    path = folder / f"{name}.safetensors"
    checkpoints.save(path, first.state_dict())
    resumed = tiny_method(name, recorded)
    resumed.load_state_dict(checkpoints.load(path))
    path.unlink()
    for _ in range(3):
        resumed.step()
    on_cpu = tiny_method(name, Runtime.choose("cpu", "float32"))
    on_cpu.student.load_state_dict(methods["recorded"].student.state_dict())  # copies across devices
    x = torch.rand(32, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        here = [
            network.eval()(x.to(device)).cpu() for network in (methods["recorded"].teacher, methods["recorded"].student)
        ]
        there = [network.eval()(x) for network in (on_cpu.teacher, on_cpu.student)]
    logits = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(here, there, strict=True))
    return {
        "recorded against eager": apart(methods["eager"].student, methods["recorded"].student),
        "resumed against uninterrupted": apart(methods["recorded"].student, resumed.student),
        "device against processor": logits,
    }


def milliseconds(work: Callable[[], Any], device: torch.device, warm_up: int, least: float = 0.2) -> float:
    """Mean time of one call after the calls that make ready, over at least `least` seconds."""
    for _ in range(warm_up):
        work()
    wait(device)
    start, n = time.perf_counter(), 0
    while time.perf_counter() - start < least or n < 2:
        work()
        n += 1
        if n % 10 == 0:
            wait(device)
    wait(device)
    return (time.perf_counter() - start) / n * 1000


def wait(device: torch.device) -> None:
    """Until the device is idle."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def kernels(work: Callable[[], Any], device: torch.device) -> int:
    """Kernels that one call launches as it is written."""
    if device.type != "cuda":
        return 0
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        work()
        wait(device)
    return sum(event.count for event in seen.key_averages() if event.self_device_time_total > 0)


def measure_speed(
    name: str, preset: str, teacher: nn.Module, new_student: Callable[[], nn.Module], shape: tuple[int, ...],
    runtime: Runtime,
) -> dict[str, float]:  # fmt: skip
    """Milliseconds of one student update and of one synthesis call, as written and recorded."""
    found: dict[str, float] = {}
    for how, graphs in (("eager", False), ("recorded", runtime.graphs)):
        if how == "recorded" and not graphs:
            continue
        so = dataclasses.replace(runtime, graphs=graphs)
        method: Any = distillers.build(name, teacher, new_student(), shape, so, preset=preset, n_updates=1000)
        method.step()  # fills the bank
        if isinstance(method, OneStageDFAD):
            found[f"update, {how}"] = milliseconds(method.both, so.device, 5)
            continue
        method.calls = 10_000  # past any warm-up
        per_update = isinstance(method, DFAD)
        imitate = method.imitation if per_update else method.imitate
        synthesize = method.generation if per_update else method.synthesize
        found[f"update, {how}"] = milliseconds(imitate, so.device, 5)
        found[f"call, {how}"] = milliseconds(synthesize, so.device, 1 if hasattr(method, "bank") else 5)
        if how == "eager":
            found["kernels per update"] = kernels(imitate, so.device)
    return found
