"""Where and how the arithmetic runs, chosen once per run: device, precision, memory format, seeds."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import nn

from .compiling import compiled, hindrance
from .errors import InputError, unknown

PRECISIONS = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Runtime:
    """The choices that every part of a run shares. Make one with :meth:`choose`.

    Attributes:
        device: where all players, datasets and banks live.
        precision: name in `PRECISIONS`; 16-bit precisions run under autocast, with float32 weights.
        channels_last: memory format of image networks and batches.
        seed: the run's seed; every random stream derives from it and a name.
        compile: whether networks go through `torch.compile`, see :mod:`dfkd_lib.compiling`.
        not_compiled: why they do not, though that was asked for, or "".
        graphs: whether updates are recorded and replayed, see :class:`dfkd_lib.training.replay.Replay`.
    """

    device: torch.device
    precision: str = "float32"
    channels_last: bool = False
    seed: int = 0
    compile: bool = False
    graphs: bool = False
    not_compiled: str = ""
    dtype: torch.dtype = field(init=False)

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise unknown("precision", self.precision, [*PRECISIONS, "auto"])
        object.__setattr__(self, "dtype", torch.float64 if self.precision == "float64" else torch.float32)

    @classmethod
    def choose(
        cls,
        device: str = "auto",
        precision: str = "auto",
        *,
        seed: int = 0,
        channels_last: bool | None = None,
        compile: bool = False,
        graphs: bool | None = None,
        threads: int = 0,
    ) -> Runtime:
        """Pick what suits this machine; any argument overrides the choice.

        Args:
            device: "auto" (CUDA, else MPS, else CPU), or a torch device such as "cuda:1".
            precision: "auto" is bfloat16 where the hardware multiplies it natively, float16 on older CUDA
                cards, float32 elsewhere.
            seed: any integer of 64 bits; also seeds torch's global generators.
            channels_last: None follows the precision: on for 16 bits, off otherwise.
            compile: whether networks go through `torch.compile`; why they do not, though that was asked for, is said by
                :meth:`describe`.
            graphs: None is on for CUDA, but for float16, whose gradient scaling decides on the processor.
            threads: CPU threads for torch; 0 leaves torch's own choice.

        Raises:
            InputError: unknown device or precision, or a device that this machine does not have.
        """
        chosen = _device(device)
        if precision == "auto":
            precision = _fastest_precision(chosen)
        elif precision not in PRECISIONS:
            raise unknown("precision", precision, [*PRECISIONS, "auto"])
        if precision == "float64" and chosen.type == "mps":
            raise InputError("precision float64 does not exist on mps; choose float32 or device cpu")
        if precision == "float16" and chosen.type == "cpu":
            raise InputError("precision float16 is for GPUs; on cpu choose bfloat16 or float32")
        if not 0 <= threads <= 1024:
            raise InputError(f"threads must be between 0 and 1024, not {threads}")
        if not -(2**63) <= seed < 2**63:
            raise InputError(f"seed {seed} has more than 63 bits; choose a smaller one")
        if threads:
            torch.set_num_threads(threads)
        if channels_last is None:
            channels_last = precision in ("bfloat16", "float16")
        if graphs is None:
            graphs = chosen.type == "cuda" and precision != "float16"
        if chosen.type == "cuda":
            torch.backends.cudnn.benchmark = True  # shapes stay the same from update to update
        torch.manual_seed(seed)
        why_not = hindrance(chosen) if compile else ""
        return cls(chosen, precision, channels_last, seed, compile and not why_not, graphs, why_not)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The context in which forward passes run: autocast for 16-bit precisions, nothing otherwise."""
        if self.precision in ("bfloat16", "float16"):
            return torch.autocast(self.device.type, dtype=PRECISIONS[self.precision])
        return contextlib.nullcontext()

    def scaler(self) -> torch.amp.GradScaler:
        """A gradient scaler, which does nothing unless the precision is float16."""
        return torch.amp.GradScaler(self.device.type, enabled=self.precision == "float16")

    def prepare(self, module: M) -> M:
        """Move a module to the device, data type and memory format of this run; compile it if the run asks so."""
        module = module._apply(self._converted)
        return compiled(module) if self.compile else module

    def _converted(self, weight: torch.Tensor) -> torch.Tensor:
        """What `nn.Module.to` does to each, but for weights of 3-d convolutions, complex buffers and whole numbers."""
        dtype = self.dtype if weight.is_floating_point() else weight.dtype
        format = torch.channels_last if self.channels_last and weight.ndim == 4 else torch.preserve_format
        return weight.to(self.device, dtype, memory_format=format)

    def images(self, x: torch.Tensor) -> torch.Tensor:
        """Bring a batch of images [B, C, H, W] to the device, data type and memory format of this run."""
        x = x.to(self.device, self.dtype)
        return x.contiguous(memory_format=torch.channels_last) if self.channels_last else x

    def stream(self, name: str) -> torch.Generator:
        """A random generator on the device, the same for the same (seed, name)."""
        digest = hashlib.sha256(f"{self.seed}/{name}".encode()).digest()
        return torch.Generator(self.device).manual_seed(int.from_bytes(digest[:7], "big"))

    def describe(self) -> str:
        """One line: what was chosen, on which hardware."""
        layout = "channels-last" if self.channels_last else "contiguous"
        how = (", compiled" if self.compile else "") + (", graphs" if self.graphs else "")
        how += f", not compiled ({self.not_compiled})" if self.not_compiled else ""
        hardware = hardware_name(self.device)
        if self.device.type == "cpu":
            hardware += f", {torch.get_num_threads()} threads"
        return f"{self.device} ({hardware}), {self.precision}, {layout}{how}, seed {self.seed}"


def random_state_kept(device: str | torch.device = "auto") -> contextlib.AbstractContextManager[None]:
    """What torch's global random states were at the beginning they are again at the end.

    Args:
        device: on which the work in between is done. CUDA's states are kept if that may be CUDA, or CUDA is in use.
    """
    cuda = torch.cuda.is_initialized() or (str(device).startswith(("auto", "cuda")) and torch.cuda.is_available())
    return torch.random.fork_rng(range(torch.cuda.device_count()) if cuda else [])


def _device(name: str) -> torch.device:
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise unknown("device", name, ["auto", "cpu", "cuda", "mps"]) from None
    present = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if (device.index or 0) >= present.get(device.type, 0):
        here = [kind for kind, count in present.items() if count]
        raise InputError(f"device {name!r} is not present on this machine; here: {', '.join(here)} (or auto)")
    return device


def _fastest_precision(device: torch.device) -> str:
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.get_device_capability(device) >= (8, 0) else "float16"
    if device.type == "cpu" and cpu_multiplies_bfloat16():
        return "bfloat16"
    return "float32"


def cpu_multiplies_bfloat16() -> bool:
    """Whether this processor has matrix instructions for bfloat16 (AMX or AVX512-BF16), not only emulation."""
    try:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()) and any(
            flag in _cpu_flags() for flag in ("amx_bf16", "avx512_bf16", "bf16")
        )
    except (AttributeError, RuntimeError):
        return False


def _cpu_flags() -> set[str]:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as f:
            for line in f:
                if line.startswith(("flags", "Features")):
                    return set(line.split())
    except OSError:
        pass
    return set()


def hardware_name(device: torch.device) -> str:
    """Marketing name of the processor or card, as far as the system tells."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as f:
            for line in f:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def hardware(device: torch.device) -> dict[str, Any]:
    """What a record says about the machine."""
    return {
        "device": str(device),
        "name": hardware_name(device),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(terse=True),
    }
