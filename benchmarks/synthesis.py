"""What do the banks and the memory of the data-free methods cost?

    python -m benchmarks.synthesis [--rounds 3] [--device cpu] [--precision auto] [--only bank,memory]

bank: what share of CMI's call goes to its full banks, 50,000 images and 40,960 pairs of features; WRN-40-2 to WRN-16-1,
images 3x32x32, batch 128, 3 inner steps.
memory: for each method, the peak during one outer iteration at batch 128, each in a process of its own (on a
processor the resident set, in which a bank counts as it fills); and the growth over 500 outer iterations on tiny
networks, which should be next to nothing.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.speed import BATCH, CMI, INNER, SHAPE, library_cmi, players, seconds, synthesis_call
from dfkd_lib import distillers, models
from dfkd_lib.banks import ImageBank
from dfkd_lib.runtime import Runtime

METHODS = ("dafl", "zskt", "dfq", "adi", "cmi", "fast", "nayer", "dfad")


def median(run: Callable[[], object], device: torch.device, n: int = 5) -> float:
    """Median seconds of n calls after one that does not count."""
    run()
    return statistics.median(seconds(run, device) for _ in range(n))


def measure_bank(runtime: Runtime, rounds: int) -> None:
    """The share of full banks in a call of CMI."""
    method, device = library_cmi(runtime), runtime.device
    assert method.discriminator is not None
    memory, stream = method.discriminator.memory, runtime.stream("bench")
    images = ImageBank(50_000, SHAPE, device)
    images.append(torch.randint(256, (50_000, *SHAPE), dtype=torch.uint8, device=device))
    x, pairs = torch.rand(BATCH, *SHAPE, device=device), torch.rand(BATCH, *memory.rows.shape[1:], device=device)
    append = median(lambda: images.append(x), device) + median(lambda: memory.append(pairs), device)
    sample = median(lambda: memory.sample(CMI.negatives, stream).to(runtime.dtype), device)
    draw = median(lambda: images.images(BATCH, stream), device)
    call = median(partial(synthesis_call, method), device, rounds)
    share = (append + INNER * sample) / call
    print(
        f"banks of 50,000 images and {len(memory):,} pairs [2, {memory.rows.shape[2]}], {memory.rows.dtype}: "
        f"{sum(bank.rows.nbytes for bank in (images, memory)) / 2**20:.0f} MiB"
    )
    print(f"append {1e3 * append:.1f} ms, negatives {1e3 * sample:.1f} ms, student's batch {1e3 * draw:.1f} ms")
    print(f"of CMI's call ({call:.2f} s, {INNER} inner steps) the banks take {100 * share:.1f} %")


def short(name: str, **changes: Any) -> dict[str, Any]:
    """Settings of any method with as few inner steps and updates as show its peak of memory."""
    few = {
        "batch_size": BATCH, "kd_steps": 1, "k": 1, "synthesis_batch": BATCH, "g_steps": 2, "inner_steps": 2,
        "warmup": 0, "preinvert": 0, "batches": 1, "reset_l0": 0, "g_life": 10**6,
    } | changes  # fmt: skip
    known = distillers.settings_for(name, preset="paper").__dataclass_fields__
    return {key: value for key, value in few.items() if key in known}


def resident(field: str = "VmRSS") -> float:
    """MiB of this process in memory: now ("VmRSS"), or at its peak ("VmHWM")."""
    with open("/proc/self/status", encoding="ascii") as f:
        return next(int(line.split()[1]) for line in f if line.startswith(field + ":")) / 1024


def reset_peak(device: torch.device) -> float:
    """Begin a new peak; returns MiB in use now."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 2**20
    Path("/proc/self/clear_refs").write_text("5")
    return resident()


def peak(device: torch.device) -> float:
    """MiB at the peak since then."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() / 2**20
    return resident("VmHWM")


def in_use(device: torch.device) -> float:
    """MiB in use now."""
    return torch.cuda.memory_allocated() / 2**20 if device.type == "cuda" else resident()


def measure_memory_of(name: str, runtime: Runtime) -> None:
    """Peak of one outer iteration at full size; growth at tiny size."""
    device = runtime.device
    before = in_use(device)
    method = distillers.build(name, *players(), SHAPE, runtime, preset="paper", **short(name))
    held = reset_peak(device)
    for _ in range(2):  # what optimisers keep from the first counts in the second
        method.step()
    top = peak(device)
    del method
    torch.manual_seed(0)
    networks = [models.build(n, n_classes=10, in_channels=1, mean=(0.5,), std=(0.5,)) for n in ("digits_cnn",) * 2]
    small = {"latent_dim": 16, "ngf": 4, "embedding_dim": 16, "memory_size": 64, "bank_size": 64, "negatives": 16}
    settings = short(name, batch_size=8, synthesis_batch=20, pad=1, **small)
    tiny = distillers.build(name, networks[0], networks[1], (1, 8, 8), runtime, preset="paper", **settings)
    for _ in range(100):
        tiny.step()
    level = in_use(device)
    for _ in range(500):
        tiny.step()
    print(
        f"{name:>14}: built {held - before:5.0f} MiB, peak of an iteration {top - held:5.0f} MiB above that; "
        f"growth over 500 tiny iterations {in_use(device) - level:+.2f} MiB",
        flush=True,
    )


def measure_memory(args: argparse.Namespace) -> None:
    """One process per method, because freed memory does not always go back to the system."""
    for name in METHODS:
        command = [sys.executable, "-m", "benchmarks.synthesis", "--memory-of", name, "--device", args.device]
        subprocess.run([*command, "--precision", args.precision], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--only", default="bank,memory", help="parts, separated by commas")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    runtime = Runtime.choose(args.device, args.precision)
    if args.memory_of:
        measure_memory_of(args.memory_of, runtime)
        return
    print(runtime.describe(), flush=True)
    parts = args.only.split(",")
    if "bank" in parts:
        measure_bank(runtime, args.rounds)
    if "memory" in parts:
        measure_memory(args)


if __name__ == "__main__":
    main()
