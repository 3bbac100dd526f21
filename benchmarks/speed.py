"""How much faster are the library's loops than plain ones, as written and compiled?

    python -m benchmarks.speed [--rounds 3] [--batch 128] [--only dfad,pool,fast,cmi,dfq,mosaickd,teacher]
                               [--precision auto] [--device auto] [--eager] [--cpu-time]

WRN-40-2 to WRN-16-1, images 3x32x32. A line tells of one kind of work: DFAD's iteration (k = 5), an update of the
student on a pool of images, a synthesis call of FastDFKD and of CMI (3 inner steps, CMI with a full memory), DFQ's and
MosaicKD's iteration (5 student updates), an update of the teacher's training, of which an epoch is so many. The plain
loop is float32 (:mod:`benchmarks.plain_inversion`, :mod:`benchmarks.plain_games`). All run in this one process, by
turns; medians are compared. Compiling, done before, is told apart. The share of the matrix rate is the arithmetic of
convolutions and linear layers per second over what one large matrix product reaches here in the run's precision.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.plain_games import PlainDFAD, PlainMosaicKD, PlainTraining
from benchmarks.plain_inversion import PlainCMI, PlainDFQ, PlainFast
from dfkd_lib import models
from dfkd_lib.compiling import as_written
from dfkd_lib.data import ImageSet
from dfkd_lib.methods import cmi, dfad, dfq, fast, mosaickd
from dfkd_lib.methods.distiller import Distiller
from dfkd_lib.runtime import PRECISIONS, Runtime
from dfkd_lib.training.players import no_weight_gradients
from dfkd_lib.training.supervised import Recipe, Supervised

BATCH, INNER, LATENT, SHAPE = 128, 3, 256, (3, 32, 32)
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
DFAD = dfad.Settings(latent_dim=LATENT, batch_size=BATCH, k=5, lr_student=0.1, weight_decay=5e-4)
DFQ = dfq.Settings(batch_size=BATCH, kd_steps=5)
FAST = fast.Settings(batch_size=BATCH, synthesis_batch=BATCH, g_steps=INNER, kd_steps=1, warmup=0, reset_l0=0)
CMI = cmi.Settings(batch_size=BATCH, synthesis_batch=BATCH, inner_steps=INNER, kd_steps=1, preinvert=0)
MOSAIC = mosaickd.Settings(batch_size=BATCH)
RECIPE = Recipe(epochs=1, batch_size=BATCH, schedule="constant", augment=True)
CLOCK = {"now": time.perf_counter}
Work = Callable[[], object]


def players(teacher: str = "wrn40_2", student: str = "wrn16_1") -> tuple[nn.Module, nn.Module]:
    """Teacher and student, the same weights at each call."""
    torch.manual_seed(0)
    networks = [models.build(name, n_classes=10, in_channels=3, mean=MEAN, std=STD) for name in (teacher, student)]
    return networks[0], networks[1]


def generator(name: str = "generator_a", latent_dim: int = LATENT) -> nn.Module:
    """The same weights at each call."""
    torch.manual_seed(0)
    return models.build_generator(name, latent_dim=latent_dim, image_shape=SHAPE, mean=MEAN, std=STD)


def noise(n: int = 4 * BATCH) -> ImageSet:
    """Images that stand for data."""
    pixels = torch.randint(256, (n, *SHAPE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return ImageSet(pixels, torch.arange(n) % 10, classes=list("abcdefghij"), name="noise", split="train")


def synthesis_call(method: Distiller) -> None:
    """What the library's `step` does before the student learns."""
    method.student.eval()
    with no_weight_gradients(method.student):
        method.synthesize()
    method.student.train()


def library_cmi(runtime: Runtime, settings: cmi.Settings = CMI) -> cmi.CMI:
    """CMI as timed, its memory of pairs full."""
    method = cmi.CMI(*players(), SHAPE, settings, runtime)
    assert method.discriminator is not None
    memory = method.discriminator.memory
    memory.append(torch.rand(settings.memory_size, *memory.rows.shape[1:], device=runtime.device))
    return method


@dataclass(frozen=True)
class Row:
    """One kind of work: how the library's is made, and how the plain one beside it.

    Attributes:
        ours: makes a method on a runtime.
        work: what of the method is timed.
        plain: from a runtime in float32 and the method, the plain loop's work.
    """

    ours: Callable[[Runtime], Any]
    work: Callable[[Any], Work]
    plain: Callable[[Runtime, Any], Work]


def rows(batch: int = BATCH) -> dict[str, Row]:
    """What is compared, by the names of the option `--only`."""
    game, match = replace(DFAD, batch_size=batch), replace(DFQ, batch_size=batch)
    inner = replace(FAST, batch_size=batch, synthesis_batch=batch)
    contrast = replace(
        CMI, batch_size=batch, synthesis_batch=batch, negatives=32 * batch, memory_size=320 * batch
    )  # the published 4,096 and 40,960 at a batch of 128
    mosaic, recipe = replace(MOSAIC, batch_size=batch), replace(RECIPE, batch_size=batch)

    def made(kind: type[Distiller], settings: Any) -> Callable[[Runtime], Any]:
        return lambda runtime: kind(*players(), SHAPE, settings, runtime)

    def pool(runtime: Runtime) -> fast.Fast:
        method: fast.Fast = made(fast.Fast, inner)(runtime)
        with as_written():
            synthesis_call(method)
        return method

    def plain_pool(runtime: Runtime, ours: fast.Fast) -> Work:
        plain = PlainFast(*players(), ours.generator, inner, runtime)
        plain.synthesize()
        return plain.distil

    def plain_cmi(runtime: Runtime, ours: cmi.CMI) -> Work:
        assert ours.discriminator is not None
        plain = PlainCMI(*players(), ours.generator, ours.discriminator.head, contrast, runtime)
        plain.memory[:] = ours.discriminator.memory.rows.flatten(1)
        plain.stored = len(plain.memory)
        return plain.synthesize

    def four() -> tuple[nn.Module, nn.Module, nn.Module, nn.Module, ImageSet]:
        judge = models.build_discriminator("patch5", image_shape=SHAPE, mean=MEAN, std=STD)
        return *players(), generator("toolbox_large", mosaic.latent_dim), judge, noise()

    step, call = (lambda method: method.step), (lambda method: partial(synthesis_call, method))
    return {
        "dfad": Row(
            lambda runtime: dfad.DFAD(*players(), generator(), game, runtime),
            step,
            lambda runtime, _: PlainDFAD(*players(), generator(), game, runtime).step,
        ),
        "pool": Row(pool, lambda method: method.imitate, plain_pool),
        "fast": Row(
            made(fast.Fast, inner),
            call,
            lambda runtime, ours: PlainFast(*players(), ours.generator, inner, runtime).synthesize,
        ),
        "cmi": Row(lambda runtime: library_cmi(runtime, contrast), call, plain_cmi),
        "dfq": Row(
            made(dfq.DFQ, match),
            step,
            lambda runtime, ours: PlainDFQ(*players(), ours.generator, match, runtime).step,
        ),
        "mosaickd": Row(
            lambda runtime: mosaickd.MosaicKD(*four(), mosaic, runtime),
            step,
            lambda runtime, _: PlainMosaicKD(*four(), mosaic, runtime).step,
        ),
        "teacher": Row(
            lambda runtime: Supervised(players()[0], noise(), recipe, runtime),
            step,
            lambda runtime, _: PlainTraining(players()[0], noise(), recipe, runtime).step,
        ),
    }


def seconds(run: Work, device: torch.device) -> float:
    """Time of one call, the device's queue drained; on the wall, or of this process alone."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = CLOCK["now"]()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return CLOCK["now"]() - start


def matrix_rate(runtime: Runtime, n: int = 2048) -> float:
    """FLOP/s of a square matrix product in the runtime's precision, the best of several."""
    a, b = (torch.randn(n, n, device=runtime.device, dtype=PRECISIONS[runtime.precision]) for _ in range(2))
    return 2 * n**3 / min(seconds(lambda: a @ b, runtime.device) for _ in range(10))


def measure(name: str, row: Row, runtimes: dict[str, Runtime], plain_runtime: Runtime, rounds: int) -> str:
    """One line: ratios of the plain loop's time to the library's, and shares of the matrix rate."""
    device = plain_runtime.device
    methods = {how: row.ours(runtime) for how, runtime in runtimes.items()}
    works = {"plain": row.plain(plain_runtime, methods["as written"])}
    works |= {how: row.work(method) for how, method in methods.items()}
    with FlopCounterMode(display=False) as counter:
        works["as written"]()
    works["plain"]()
    compiling = [seconds(works["compiled"], device) for _ in range(2)] if "compiled" in works else [0.0, 0.0]
    times: dict[str, list[float]] = {how: [] for how in works}
    peak = []
    for _ in range(rounds):
        peak.append(matrix_rate(runtimes["as written"]))
        for how, work in works.items():
            times[how].append(seconds(work, device))
    taken = {how: statistics.median(column) for how, column in times.items()}
    parts = [f"plain {taken['plain']:.2f} s"]
    for how in methods:
        share = counter.get_total_flops() / taken[how] / statistics.median(peak)
        parts.append(f"{how} {taken[how]:.2f} s, ratio {taken['plain'] / taken[how]:.2f}, rate {100 * share:.0f} %")
    if "compiled" in works:
        parts.append(f"compiling {max(0.0, compiling[0] - taken['compiled']):.0f} s")
    return f"{name}: " + "; ".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--only", default=",".join(rows()), help="rows, separated by commas")
    parser.add_argument("--eager", action="store_true", help="nothing compiled, which takes minutes a row")
    parser.add_argument("--cpu-time", action="store_true", help="time of this process, for a busy machine; no GPU")
    args = parser.parse_args()
    if args.cpu_time:
        CLOCK["now"] = time.process_time
    runtimes = {"as written": Runtime.choose(args.device, args.precision)}
    if not args.eager:
        compiled = Runtime.choose(args.device, args.precision, compile=True)
        runtimes |= {"compiled": compiled} if compiled.compile else {}
    print(list(runtimes.values())[-1].describe(), flush=True)
    known, plain = rows(args.batch), Runtime.choose(args.device, "float32", graphs=False)
    for name in args.only.split(","):
        print(measure(name, known[name], runtimes, plain, args.rounds), flush=True)


if __name__ == "__main__":
    main()
