"""What do the data-free methods cost: time against plain loops, the share of the banks, memory?

    python benchmarks/synthesis.py [--rounds 3] [--device cpu] [--precision auto] [--only speed,bank,memory]

speed: one synthesis call of FastDFKD and of CMI, and one student update, against loops written from the papers'
pseudo-code: float32, contiguous. WRN-40-2 to WRN-16-1, images 3x32x32, batch 128, 3 inner steps, CMI with a full
memory. All run in this one process, by turns; medians are compared.
bank: what share of CMI's call goes to its full banks, 50,000 images and 40,960 pairs of features.
memory: for each method, the peak during one outer iteration at batch 128, each in a process of its own (on a
processor the resident set, in which a bank counts as it fills); and the growth over 500 outer iterations on tiny
networks, which should be next to nothing.

The plain loops share with the library what is not the loop: networks, augmentation, weight drawing. Like the
authors' code they freeze no weights in synthesis; unlike it they keep images and features on the device.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfkd_lib import distillers, models
from dfkd_lib.banks import ImageBank
from dfkd_lib.data import crop_flip, resized_crop_flip
from dfkd_lib.methods import cmi, fast
from dfkd_lib.methods.distiller import BankDistiller, Distiller
from dfkd_lib.runtime import Runtime
from dfkd_lib.training.players import no_weight_gradients

BATCH, INNER, SHAPE = 128, 3, (3, 32, 32)
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
FAST = fast.Settings(batch_size=BATCH, synthesis_batch=BATCH, g_steps=INNER, kd_steps=1, warmup=0, reset_l0=0)
CMI = cmi.Settings(batch_size=BATCH, synthesis_batch=BATCH, inner_steps=INNER, kd_steps=1, preinvert=0)
CLOCK = {"now": time.perf_counter}
METHODS = ("dafl", "zskt", "dfq", "adi", "cmi", "fast", "nayer", "dfad")


def players(teacher: str = "wrn40_2", student: str = "wrn16_1") -> tuple[nn.Module, nn.Module]:
    """Teacher and student, the same weights at each call."""
    torch.manual_seed(0)
    networks = [models.build(name, n_classes=10, in_channels=3, mean=MEAN, std=STD) for name in (teacher, student)]
    return networks[0], networks[1]


class PlainInversion:
    """The half that FastDFKD and CMI share: hooks on the teacher, the terms of the inversion loss, distillation.

    Args:
        generator: its weights at the start; copied.
    """

    def __init__(
        self, teacher: nn.Module, student: nn.Module, generator: nn.Module, settings: Any, runtime: Runtime
    ) -> None:
        self.settings, self.device, self.dtype = settings, runtime.device, runtime.dtype
        self.teacher = teacher.to(self.device, self.dtype).eval()
        self.student = student.to(self.device, self.dtype).train()
        own = copy.deepcopy(generator).to(self.device, self.dtype)
        self.generator = own.to(memory_format=torch.contiguous_format)
        self.n_classes = [m for m in self.teacher.modules() if isinstance(m, nn.Linear)][-1].out_features
        self.layers = [m for m in self.teacher.modules() if isinstance(m, nn.BatchNorm2d)]
        self.inputs: dict[nn.Module, Tensor] = {}
        for layer in self.layers:
            layer.register_forward_hook(lambda module, inputs, output: self.inputs.__setitem__(module, inputs[0]))
        self.opt_s = torch.optim.SGD(
            self.student.parameters(), settings.lr_student, settings.momentum, weight_decay=settings.weight_decay
        )
        self.pool: Tensor | None = None
        self.noise, self.augmentation = runtime.stream("noise"), runtime.stream("augmentation")

    def start(self) -> tuple[Tensor, Tensor]:
        """Noise and targets of one call."""
        n, settings = self.settings.synthesis_batch, self.settings
        z = torch.randn(n, settings.latent_dim, generator=self.noise, device=self.device, dtype=self.dtype)
        targets = torch.randint(self.n_classes, (n,), generator=self.noise, device=self.device).sort().values
        return z.requires_grad_(), targets

    def view(self, x: Tensor) -> Tensor:
        """Shifted and mirrored, as the networks see it."""
        return crop_flip(x, pad=self.settings.pad, flip=self.settings.flip, generator=self.augmentation)

    def batch_statistics(self) -> list[tuple[Tensor, Tensor]]:
        """Mean and biased variance of what the teacher's batch-norm layers have just seen."""
        seen = [self.inputs[layer] for layer in self.layers]
        return [(x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)) for x in seen]

    def bn_loss(self, batch: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Distance of such statistics from the running ones."""
        total = torch.zeros((), device=self.device, dtype=self.dtype)
        for layer, (mean, var) in zip(self.layers, batch, strict=True):
            assert layer.running_mean is not None and layer.running_var is not None
            total = total + torch.norm(layer.running_var - var, 2) + torch.norm(layer.running_mean - mean, 2)
        return total

    def adversarial_loss(self, s: Tensor, t: Tensor) -> Tensor:
        """-KL where both name the same class."""
        mask = (s.argmax(1) == t.argmax(1)).to(s.dtype)
        return -(F.kl_div(F.log_softmax(s, 1), F.softmax(t, 1), reduction="none").sum(1) * mask).mean()

    def store(self, x: Tensor) -> None:
        """Into the pool, at eight bits a colour as in a file."""
        x = (x.float() * 255).round() / 255
        self.pool = x if self.pool is None else torch.cat([self.pool, x])

    def distil(self) -> None:
        """One update of the student on random images of the pool."""
        assert self.pool is not None
        settings = self.settings
        at = torch.rand(settings.batch_size, generator=self.augmentation, device=self.device) * len(self.pool)
        x = self.view(self.pool[at.long()]).to(self.dtype)
        with torch.no_grad():
            t = self.teacher(x)
        s = self.student(x)
        temperature = settings.temperature
        loss = F.kl_div(F.log_softmax(s / temperature, 1), F.softmax(t / temperature, 1), reduction="batchmean")
        self.opt_s.zero_grad()
        (loss * temperature**2).backward()
        self.opt_s.step()


class PlainFast(PlainInversion):
    """FastDFKD with first-order MAML, word for word."""

    def __init__(
        self, teacher: nn.Module, student: nn.Module, generator: nn.Module, settings: Any, runtime: Runtime
    ) -> None:
        super().__init__(teacher, student, generator, settings, runtime)
        self.meta_opt = torch.optim.Adam(
            self.generator.parameters(), settings.g_steps * settings.lr_generator, betas=(0.5, 0.999)
        )
        self.averages: list[tuple[Tensor, Tensor]] = []

    def synthesize(self) -> None:
        """One call: k steps of a copy of the meta-generator, then one of the meta-generator."""
        settings, rho = self.settings, self.settings.rho
        self.student.eval()
        fast_generator = copy.deepcopy(self.generator).train()
        z, targets = self.start()
        opt = torch.optim.Adam(
            [{"params": fast_generator.parameters()}, {"params": [z], "lr": settings.lr_z}],
            lr=settings.lr_generator,
            betas=(0.5, 0.999),
        )
        self.meta_opt.zero_grad()
        best_loss, best_x = float("inf"), z
        for _ in range(settings.g_steps):
            x = fast_generator(z)
            view = self.view(x)
            t, s = self.teacher(view), self.student(view)
            batch = self.batch_statistics()
            mixed = batch
            if self.averages:
                mixed = [
                    ((1 - rho) * mean + rho * m, (1 - rho) * var + rho * v)
                    for (mean, var), (m, v) in zip(batch, self.averages, strict=True)
                ]
            loss = settings.bn * self.bn_loss(mixed) + settings.oh * F.cross_entropy(t, targets)
            loss = loss + settings.adv * self.adversarial_loss(s, t)
            if loss.item() < best_loss:
                best_loss, best_x = loss.item(), x.detach()
            opt.zero_grad()
            loss.backward()
            for p, q in zip(self.generator.parameters(), fast_generator.parameters(), strict=True):
                assert q.grad is not None
                p.grad = q.grad.clone() if p.grad is None else p.grad + q.grad
            opt.step()
        last = [(mean.detach(), var.detach()) for mean, var in batch]
        if self.averages:
            last = [
                (rho * m + (1 - rho) * mean, rho * v + (1 - rho) * var)
                for (mean, var), (m, v) in zip(last, self.averages, strict=True)
            ]
        self.averages = last
        self.meta_opt.step()
        self.student.train()
        self.store(best_x)


class PlainCMI(PlainInversion):
    """CMI, word for word.

    Args:
        head: the projection head's weights at the start; copied.
    """

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        generator: nn.Module,
        head: nn.Module,
        settings: Any,
        runtime: Runtime,
    ) -> None:
        super().__init__(teacher, student, generator, settings, runtime)
        self.head = copy.deepcopy(head).to(self.device, self.dtype)
        self.opt_head = torch.optim.Adam(self.head.parameters(), settings.lr_generator)
        n_features = next(self.head.parameters()).shape[1]
        self.memory = torch.zeros(settings.memory_size, 2 * n_features, device=self.device, dtype=self.dtype)
        self.stored = self.pointer = 0

    def remember(self, rows: Tensor) -> None:
        """Write pairs of features into the memory, whose size is a multiple of the batch."""
        self.memory[self.pointer : self.pointer + len(rows)] = rows
        self.pointer = (self.pointer + len(rows)) % len(self.memory)
        self.stored = min(self.stored + len(rows), len(self.memory))

    def features(self) -> Tensor:
        """The mean over pixels of what each layer has just seen."""
        return torch.cat([self.inputs[layer].mean((2, 3)) for layer in self.layers], 1)

    def contrastive_loss(self, local: Tensor, whole: Tensor) -> Tensor:
        """L_cr against negatives from the memory."""
        settings, n = self.settings, len(local)
        keys = torch.rand(len(self.memory), generator=self.noise, device=self.device)
        at = keys[: self.stored].argsort()[: settings.negatives]
        stored_local, stored_whole = self.memory[at].chunk(2, 1)
        u = F.normalize(self.head(torch.cat([local, stored_local])), dim=1)
        v = F.normalize(self.head(torch.cat([whole, stored_whole])), dim=1).detach()
        logits = u @ v.T / settings.cr_temperature
        each = F.cross_entropy(logits, torch.arange(len(logits), device=self.device), reduction="none")
        return each[:n].mean() + (each[n:].mean() if len(each) > n else 0)

    def synthesize(self) -> None:
        """One call: a new generator, `inner_steps` updates of generator, noise and head."""
        settings = self.settings
        self.student.eval()
        self.generator.train()
        z, targets = self.start()
        models.draw_weights(self.generator, self.noise)
        opt = torch.optim.Adam([*self.generator.parameters(), z], settings.lr_generator, betas=(0.5, 0.999))
        best_loss, best_x, best_features = float("inf"), z, z
        for _ in range(settings.inner_steps):
            x = self.generator(z)
            view = self.view(x)
            t, s = self.teacher(view), self.student(view)
            loss = settings.bn * self.bn_loss(self.batch_statistics()) + settings.oh * F.cross_entropy(t, targets)
            loss = loss + settings.adv * self.adversarial_loss(s, t)
            whole = self.features()
            self.teacher(
                resized_crop_flip(x, scale=settings.local_scale, flip=settings.flip, generator=self.augmentation)
            )
            local = self.features()
            loss = loss + settings.cr * self.contrastive_loss(local, whole)
            if loss.item() < best_loss:
                best_loss, best_x = loss.item(), x.detach()
                best_features = torch.cat([local, whole], 1).detach()
            opt.zero_grad()
            self.opt_head.zero_grad()
            loss.backward()
            opt.step()
            self.opt_head.step()
        self.student.train()
        self.store(best_x)
        self.remember(best_features)


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Time of one call, the device's queue drained; on the wall, or of this process alone."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = CLOCK["now"]()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return CLOCK["now"]() - start


def synthesis_call(method: Distiller) -> None:
    """What the library's `step` does before the student learns."""
    method.student.eval()
    with no_weight_gradients(method.student):
        method.synthesize()
    method.student.train()


def median(run: Callable[[], object], device: torch.device, n: int = 5) -> float:
    """Median seconds of n calls after one that does not count."""
    run()
    return statistics.median(seconds(run, device) for _ in range(n))


def library_cmi(runtime: Runtime) -> cmi.CMI:
    """CMI as timed, its memory of pairs full."""
    method = cmi.CMI(*players(), SHAPE, CMI, runtime)
    assert method.discriminator is not None
    memory = method.discriminator.memory
    memory.append(torch.rand(memory.rows.shape, device=runtime.device))
    return method


def measure_speed(runtime: Runtime, rounds: int) -> None:
    """Library against plain loops."""
    plain_runtime = Runtime.choose(str(runtime.device), "float32")
    our_fast, our_cmi = fast.Fast(*players(), SHAPE, FAST, runtime), library_cmi(runtime)
    assert our_cmi.discriminator is not None
    plain_fast = PlainFast(*players(), our_fast.generator, FAST, plain_runtime)
    plain_cmi = PlainCMI(*players(), our_cmi.generator, our_cmi.discriminator.head, CMI, plain_runtime)
    plain_cmi.memory[:] = our_cmi.discriminator.memory.rows.flatten(1)
    plain_cmi.stored = len(plain_cmi.memory)
    pairs: dict[str, tuple[BankDistiller, PlainFast | PlainCMI]]
    pairs = {"FastDFKD": (our_fast, plain_fast), "CMI": (our_cmi, plain_cmi)}
    times: dict[str, list[tuple[float, float]]] = {}
    for i in range(rounds + 1):
        for name, (ours, plain) in pairs.items():
            calls = seconds(plain.synthesize, runtime.device), seconds(partial(synthesis_call, ours), runtime.device)
            updates = seconds(plain.distil, runtime.device), seconds(ours.imitate, runtime.device)
            if i:  # the first round warms up
                times.setdefault(f"{name}, synthesis call", []).append(calls)
                times.setdefault("student update", []).append(updates)
    for what, columns in times.items():
        reference, library = (statistics.median(column) for column in zip(*columns, strict=True))
        print(f"{what}: plain {reference:.2f} s, library {library:.2f} s, ratio {reference / library:.2f}", flush=True)


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
        command = [sys.executable, __file__, "--memory-of", name, "--device", args.device]
        subprocess.run([*command, "--precision", args.precision], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--only", default="speed,bank,memory", help="parts, separated by commas")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    parser.add_argument("--cpu-time", action="store_true", help="time of this process, for a busy machine; no GPU")
    args = parser.parse_args()
    if args.cpu_time:
        CLOCK["now"] = time.process_time
    runtime = Runtime.choose(args.device, args.precision)
    if args.memory_of:
        measure_memory_of(args.memory_of, runtime)
        return
    print(runtime.describe(), flush=True)
    parts = args.only.split(",")
    if "speed" in parts:
        measure_speed(runtime, args.rounds)
    if "bank" in parts:
        measure_bank(runtime, args.rounds)
    if "memory" in parts:
        measure_memory(args)


if __name__ == "__main__":
    main()
