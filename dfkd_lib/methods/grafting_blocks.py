"""The blocks that NetGraft grafts, before and after they learn: scions between adapters, and what they merge to.

What fits where, and what can be merged, is found out on a few images; what does not is refused by the block's name.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..errors import InputError, first_line
from ..models.adapters import absorb, adapter, affine, compose
from ..models.chains import STEM, Blocks, through
from ..training.modes import in_eval_mode, still


class Scion(nn.Module):
    """H_l = a^{s->t} o h_l o a^{t->s}: a student block between adapters, with the teacher's channels on both sides."""

    def __init__(self, name: str, body: nn.Module, a_in: nn.Module | None, a_out: nn.Module | None) -> None:
        super().__init__()
        self.name, self.body, self.a_in, self.a_out = name, body, a_in, a_out

    def forward(self, x: Tensor) -> Tensor:
        for part in (self.a_in, self.body, self.a_out):
            x = x if part is None else part(x)
        return x

    def adapters(self) -> list[nn.Parameter]:
        """The parameters of both adapters."""
        return [p for part in (self.a_in, self.a_out) if part is not None for p in part.parameters()]


def scions(teacher: Blocks, student: Blocks, x: Tensor) -> list[Scion]:
    """The student's blocks after the stem, with adapters where its channels differ from the teacher's.

    Args:
        x: images [B, C, H, W]; they show the shapes at every cut.

    Raises:
        InputError: numbers of blocks, sizes or classes differ, or an adapter could not be merged; the message names
            the block.
    """
    if len(teacher) != len(student) or len(teacher) < 2:
        raise InputError(
            f"the teacher has {len(teacher)} blocks and the student {len(student)}; cut both into the same number, "
            "2 or more"
        )
    made: list[Scion] = []
    f_t, f_s = _output(teacher[STEM], x, STEM), _output(next(iter(student.values())), x, STEM)
    pairs = list(zip(teacher.items(), student.items(), strict=True))[1:]
    for i, ((name, theirs), (_, ours)) in enumerate(pairs):
        _must_fit(name, "input", f_t, f_s)
        in_t, in_s = f_t.shape[1], f_s.shape[1]
        a_in = None if in_t == in_s else adapter(in_t, in_s, f_t.ndim).to(f_t)
        if a_in is not None:
            _mergeable(name, ours, f_t, a_in)
        f_t, f_s = _output(theirs, f_t, name), _output(ours, f_s, name)
        last = i == len(pairs) - 1
        if last and f_t.shape != f_s.shape:
            raise InputError(f"block {name!r} gives {_size(f_t)} in the teacher and {_size(f_s)} in the student; "
                             "the last block must give the same classes")  # fmt: skip
        if last and f_t.ndim != 2:
            raise InputError(f"block {name!r}, the last, gives {_size(f_t)}; it must give logits [B, K]")
        _must_fit(name, "output", f_t, f_s)
        out_t, out_s = f_t.shape[1], f_s.shape[1]
        a_out = None if out_t == out_s else adapter(out_s, out_t, f_t.ndim).to(f_t)
        made.append(Scion(name, ours, a_in, a_out))
    return made


def check_gradients(teacher: Blocks, x: Tensor) -> None:
    """Whether what is grafted can learn from the teacher's output: a gradient must come through what stands behind.

    Args:
        x: images [B, C, H, W].

    Raises:
        InputError: a block that gives no gradient with respect to its input.
    """
    (_, stem), (_, first), *behind = teacher.items()
    with in_eval_mode(nn.ModuleList(teacher.values())):
        f = through([stem, first], x.clone()).detach()
        for name, block in behind:
            given = f.requires_grad_()
            f = block(given.clone())
            if not f.requires_grad or torch.autograd.grad(f.sum(), given, allow_unused=True)[0] is None:
                raise InputError(
                    f"the teacher's block {name!r} gives no gradient with respect to its input (torch.no_grad in it?), "
                    "by which blocks grafted in front of it learn; take that out"
                )
            f = f.detach()


def merge(stem: nn.Module, scions: Sequence[Scion], inputs: Tensor, *, naively: bool = False) -> nn.Sequential:
    """The student without adapters: each pair of them becomes one affine map, which the next block absorbs.

    Computed and checked in float64, then given back in the type of the scions and on the device of the inputs.

    Args:
        stem: of the teacher; the student gets a copy.
        inputs: a few of the stem's outputs, [B, c, H, W].
        naively: with scalar biases, wrong at the border; for comparison.

    Raises:
        InputError: a block that cannot absorb its adapter; the message names it.
    """
    merged = nn.Sequential()
    merged.add_module(STEM, copy.deepcopy(stem))
    dtype = next(p.dtype for scion in scions for p in scion.parameters())
    x = inputs[:4].cpu().double().contiguous()
    junction: tuple[Tensor, Tensor] | None = None
    for scion in scions:
        block = copy.deepcopy(scion.body).cpu().double().eval()
        if scion.a_in is not None:
            junction = compose(junction, affine(scion.a_in)) if junction else affine(scion.a_in)
            block = absorb(block, *junction, x, name=scion.name, naively=naively)
        with torch.no_grad():
            x = block(x)
        junction = None if scion.a_out is None else affine(scion.a_out)
        merged.add_module(scion.name.replace(".", "_"), block.to(inputs.device, dtype))
    return merged.requires_grad_(True).eval()


def _output(block: nn.Module, x: Tensor, name: str) -> Tensor:
    try:
        with still(block):
            output = block(x.clone())
    except Exception as e:
        raise InputError(f"block {name!r} cannot read {_size(x)}: {first_line(e)}") from e
    if not isinstance(output, Tensor):
        raise InputError(f"block {name!r} gives a {type(output).__name__}, not one tensor; cut elsewhere")
    return output


def _must_fit(name: str, side: str, f_t: Tensor, f_s: Tensor) -> None:
    if f_t.ndim not in (2, 4) or f_t.shape[2:] != f_s.shape[2:]:
        raise InputError(
            f"block {name!r}: its {side} is {_size(f_t)} in the teacher and {_size(f_s)} in the student; an adapter "
            "changes the number of channels, not the size, so cut both networks at equal resolutions"
        )


def _mergeable(name: str, block: nn.Module, f_t: Tensor, a_in: nn.Module) -> None:
    matrix, _ = affine(a_in)
    bias = torch.linspace(-1, 1, len(matrix)).to(matrix)
    absorb(copy.deepcopy(block).cpu().double(), matrix, bias, f_t.cpu().double().contiguous(), name=name)


def _size(x: Tensor) -> str:
    return "x".join(map(str, x.shape[1:]))
