"""How much faster is one outer iteration of DFAD than a plain loop written from the paper's pseudo-code?

    python benchmarks/dfad_step.py [--rounds 3] [--device cpu] [--precision auto]

WRN-40-2 to WRN-16-1, images 3x32x32, batch 128, k = 5. Both loops run in this one process, by turns; the medians
are compared. The share of the matrix rate is the arithmetic of the library's iteration per second over what this
machine reaches, in the same precision, in one large matrix product.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from dfkd_lib import models
from dfkd_lib.methods.dfad import DFAD, Settings
from dfkd_lib.runtime import PRECISIONS, Runtime

BATCH, LATENT, K, SHAPE = 128, 256, 5, (3, 32, 32)
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
SETTINGS = Settings(latent_dim=LATENT, batch_size=BATCH, k=K, lr_student=0.1, weight_decay=5e-4)


def players(teacher: str = "wrn40_2", student: str = "wrn16_1") -> tuple[nn.Module, nn.Module, nn.Module]:
    """Teacher, student and generator A, the same weights at each call."""
    torch.manual_seed(0)
    networks = [models.build(name, n_classes=10, in_channels=3, mean=MEAN, std=STD) for name in (teacher, student)]
    generator = models.build_generator("generator_a", latent_dim=LATENT, image_shape=SHAPE, mean=MEAN, std=STD)
    return networks[0], networks[1], generator


class PlainLoop:
    """The reference: the pseudo-code word for word, contiguous, nothing frozen, nothing fused."""

    def __init__(
        self, teacher: nn.Module, student: nn.Module, generator: nn.Module, settings: Settings, runtime: Runtime
    ) -> None:
        self.settings, self.dtype = settings, runtime.dtype
        self.teacher = teacher.to(runtime.device, runtime.dtype).eval()
        self.student = student.to(runtime.device, runtime.dtype).train()
        self.generator = generator.to(runtime.device, runtime.dtype).train()
        self.opt_s = torch.optim.SGD(
            self.student.parameters(), settings.lr_student, settings.momentum, weight_decay=settings.weight_decay
        )
        self.opt_g = torch.optim.Adam(self.generator.parameters(), settings.lr_generator)
        self.noise = runtime.stream("dfad noise")

    def step(self) -> None:
        """One outer iteration: k student updates, one generator update."""
        shape = (self.settings.batch_size, self.settings.latent_dim)
        for _ in range(self.settings.k):
            z = torch.randn(shape, generator=self.noise, device=self.noise.device, dtype=self.dtype)
            fake = self.generator(z).detach()
            loss = F.l1_loss(self.student(fake), self.teacher(fake).detach())
            self.opt_s.zero_grad()
            loss.backward()
            self.opt_s.step()
        z = torch.randn(shape, generator=self.noise, device=self.noise.device, dtype=self.dtype)
        fake = self.generator(z)
        loss = -F.l1_loss(self.student(fake), self.teacher(fake))
        self.opt_g.zero_grad()
        loss.backward()
        self.opt_g.step()


def flop_per_iteration() -> float:
    """Floating-point operations that one iteration needs: a backward pass to inputs or to weights is a forward."""
    teacher, student, generator = players()
    t, s = models.count_macs(teacher, SHAPE), models.count_macs(student, SHAPE)
    g = models.count_macs(generator, (LATENT,))
    imitation = g + t + 3 * s
    generation = 3 * g + 2 * t + 2 * s
    return 2 * BATCH * (K * imitation + generation)


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Wall time of one call, the device's queue drained."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def matrix_rate(runtime: Runtime, n: int = 2048) -> float:
    """FLOP/s of a square matrix product in the runtime's precision, the best of several."""
    dtype = PRECISIONS[runtime.precision]
    a, b = (torch.randn(n, n, device=runtime.device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / min(seconds(lambda: a @ b, runtime.device) for _ in range(10))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto")
    args = parser.parse_args()
    runtime = Runtime.choose(args.device, args.precision)
    plain = PlainLoop(*players(), SETTINGS, Runtime.choose(args.device, "float32"))
    ours = DFAD(*players(), SETTINGS, runtime)
    plain.step()
    ours.step()
    times = [(seconds(plain.step, runtime.device), seconds(ours.step, runtime.device)) for _ in range(args.rounds)]
    reference, library = (statistics.median(column) for column in zip(*times, strict=True))
    rate = flop_per_iteration() / library
    print(runtime.describe())
    print(f"plain float32 loop {reference:.2f} s, library {library:.2f} s per iteration (medians of {args.rounds})")
    print(f"ratio {reference / library:.2f}")
    print(f"{rate / 1e9:.0f} GFLOP/s, {100 * rate / matrix_rate(runtime):.0f} % of the matrix rate")


if __name__ == "__main__":
    main()
