"""Plans as kernels in a graph of torch: what comes ahead and behind is torch's, the kernel one operator.

    q_ = q * scale                          what torch computes ahead, for Inductor to fuse
    (O,) = einfold_triton.kernel("softmax_3f..", [q_, k, v], [sizes])
    o = O.reshape(..)                       what it computes behind

The operator is opaque to Inductor, allocates what it gives and launches on the current stream, so that a
CUDA graph can hold it. A kernel is known by a hash of all that it was made from: a graph that Inductor kept
on disk names the kernel that the backend makes anew ahead of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ....errors import UnsupportedError
from ...ir.cascade.plan import Plan
from ...ir.cascade.plan_text import print_plan
from ...ir.types import hint_of
from ..cpu.frame import Frame, NotLoweredError, Signature, Value
from .device import described
from .dtypes import TYPES
from .generate import generate
from .kernel import Kernel
from .launch import after, ahead, results, within
from .options import Options

#: Products of float32 on tensor cores in three parts, close to float32; whole ones would not use these.
PRECISION = "tf32x3"


@dataclass(frozen=True)
class Emitted:
    """A kernel in graphs of this process: the types of what it gives, its inputs and ranks in their order."""

    kernel: Kernel
    dtypes: Mapping[str, torch.dtype]

    @property
    def inputs(self) -> tuple[str, ...]:
        """What the operator is given, by name."""
        return tuple(self.kernel.division.plan.inputs)

    @property
    def ranks(self) -> tuple[str, ...]:
        """The ranks whose sizes the operator is given."""
        return tuple(self.kernel.plan.ranks)


_EMITTED: dict[str, Emitted] = {}


def emitted() -> Iterator[Kernel]:
    """Every kernel that graphs of this process call."""
    return (item.kernel for item in _EMITTED.values())


@torch.library.custom_op("einfold_triton::kernel", mutates_args=(), tags=torch.Tag.flexible_layout)
def kernel_call(kernel: str, inputs: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
    """What the kernel of this name gives, in its division's order; the inputs may have any strides."""
    made = _named(kernel)
    tensors = dict(zip(made.inputs, inputs, strict=True))
    known = dict(zip(made.ranks, sizes, strict=True))
    return list(within(made.kernel, tensors, known, dtypes=made.dtypes).values())


@kernel_call.register_fake
def _(kernel: str, inputs: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
    made = _named(kernel)
    known = dict(zip(made.ranks, sizes, strict=True))
    return list(results(made.kernel, known, inputs[0].device, made.dtypes).values())


def _named(name: str) -> Emitted:
    if name not in _EMITTED:
        raise UnsupportedError(
            f"the graph calls the kernel {name}, which this process has not made; compile the function "
            "here, as a graph of einfold's cannot be carried to another process"
        )
    return _EMITTED[name]


@dataclass(frozen=True)
class ThroughKernels:
    """A function of the signature's inputs that gives its outputs: a kernel a plan, one after the other."""

    plans: tuple[Plan, ...]
    signature: Signature

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Raises NotLoweredError, with the reason, for what has no form as kernels."""
        ranks = {name: rank for plan in self.plans for name, rank in plan.ranks.items()}
        frame = Frame.of(replace(self.plans[0], ranks=ranks), self.signature, tensors)
        types = dict(
            zip((n for n, _ in self.signature.outputs), self.signature.dtypes, strict=True)
        )
        for name, number in frame.numbers.items():
            # A sum, since Inductor would compile a number in that is made a tensor of as it is.
            zero = torch.zeros((), dtype=torch.float32, device=frame.device)
            frame.values[name] = Value(zero + number, ())
        for plan in self.plans:
            dtypes = {name: types.get(name, torch.float32) for name in plan.outputs}
            found = _run(plan, frame, dtypes)
            for name, tensor in found.items():
                frame.values[name] = Value(tensor, plan.ranks_of(name))
        return frame.results(self.signature)


def _run(plan: Plan, frame: Frame, dtypes: Mapping[str, torch.dtype]) -> dict[str, Tensor]:
    given = {name: frame.values[name].over(tensor.ranks) for name, tensor in plan.inputs.items()}
    sizes = {rank: frame.size(rank) for rank in plan.ranks}
    name, made = _made(plan, given, sizes, dtypes, frame.device)
    tensors = ahead(made.kernel, given, sizes)
    arguments = [tensors[each] for each in made.inputs]
    known = [sizes[rank] for rank in made.ranks]
    outputs = kernel_call(name, arguments, known)
    found = dict(zip(made.kernel.division.outputs, outputs, strict=True))
    return after(made.kernel, given, tensors, found, sizes, dtypes)


def _made(
    plan: Plan,
    given: Mapping[str, Tensor],
    sizes: Mapping[str, Any],
    dtypes: Mapping[str, torch.dtype],
    device: torch.device,
) -> tuple[str, Emitted]:
    for tensor in given.values():
        if tensor.dtype not in TYPES:
            raise NotLoweredError(f"kernels do not read {tensor.dtype}")
        if tensor.dtype == torch.bfloat16 and device.type == "cpu":
            raise NotLoweredError("Triton's interpreter multiplies bfloat16 by its bits")
    types = {name: TYPES[tensor.dtype] for name, tensor in given.items()}
    hints = {rank: hint_of(size) for rank, size in sizes.items()}
    options = Options(device=described(device), precision=PRECISION)
    text = repr((print_plan(plan), types, hints, options, sorted(map(str, dtypes.items()))))
    name = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
    if name not in _EMITTED:
        try:
            kernel = generate(plan, types, hints, options)
        except UnsupportedError as error:
            raise NotLoweredError(str(error)) from error
        _EMITTED[name] = Emitted(kernel, dict(dtypes))
    for lane in _EMITTED[name].kernel.division.roles.lanes:
        int(sizes[lane])  # a tile has it whole: a size that varies is guarded to be this one
    return name, _EMITTED[name]


__all__ = ["Emitted", "ThroughKernels", "emitted"]
