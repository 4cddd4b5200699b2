"""Every attention of a program as a kernel: derived from the IR, whoever asks, compiler or runtime."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ...errors import UnsupportedError
from ..analysis.cascade.plans import fold
from ..codegen.triton import Kernel, Options, generate
from ..codegen.triton.options import DEVICES, Device, Tiles
from ..codegen.triton.tiles import choose_tiles
from ..ir.cascade.cascade import Cascade
from ..ir.cascade.plan import Plan
from ..ir.program import Program
from .cascade import STREAM, cascade_of
from .kinds import AttentionKind, kinds_of

#: New tokens of the prefill step that tiles are chosen for.
_PREFILL = 512

#: Parts that a step may be cut into. Few, since each number of them is a kernel of its own.
SPLITS = (1, 8, 32)

#: float32 products on tensor cores in three parts, close to float32; whole ones would not use these.
_PRECISION = "tf32x3"


@dataclass(frozen=True)
class AttentionKernel:
    """The kernel of the layers of one kind. `kernel.tiles` are for many new tokens, `decode` for one."""

    kind: AttentionKind
    name: str
    layers: tuple[int, ...]
    cascade: Cascade
    plan: Plan
    kernel: Kernel
    decode: Tiles

    def tiles(self, new: int) -> Tiles:
        """The tiles for so many new tokens."""
        return self.kernel.tiles if new > 1 else self.decode


def attention_kernels(
    program: Program, device: Device = DEVICES[90], cache: Path | None = None
) -> list[AttentionKernel]:
    """The kernels of a program's attentions, with tiles for a device.

    `cache` is where plans are kept. Raises UnsupportedError, naming layers, for attention without a kernel.
    """
    made: list[AttentionKernel] = []
    for kind, layers in kinds_of(program).items():
        name = kind.name
        same = sum(other.kind.name == name for other in made)
        made.append(
            attention_kernel(
                kind,
                f"{name}_{same}" if same else name,
                tuple(layers),
                program.model.context,
                device,
                cache,
            )
        )
    if not made:
        raise UnsupportedError("the program has no attention over a cache, so there are no kernels")
    return made


def attention_kernel(
    kind: AttentionKind,
    name: str,
    layers: tuple[int, ...],
    context: int,
    device: Device = DEVICES[90],
    cache: Path | None = None,
) -> AttentionKernel:
    """The kernel of one kind, for so many tokens of context; otherwise as `attention_kernels`."""
    cascade = cascade_of(kind)
    folding = fold(cascade, STREAM, cache)
    if folding.plan is None:
        raise UnsupportedError(f"layers {layers}: attention does not fold: {folding.reason}")
    sizes = {"b": 1, "s": _PREFILL, "k": kind.kv_heads, "g": kind.group}
    sizes |= {"c": context, "d": kind.key_size, "f": kind.value_size}
    kernel = generate(
        folding.plan,
        types_of(kind),
        sizes,
        Options(device=device, precision=_PRECISION),
        cascade,
        name,
    )
    decode = choose_tiles(kernel.division, kernel.types, {**sizes, "s": 1}, kernel.demand, device)
    return AttentionKernel(kind, name, layers, cascade, folding.plan, kernel, decode)


def types_of(kind: AttentionKind) -> dict[str, str]:
    """The storage types of a kernel's inputs."""
    types = {"query": kind.query, "key": kind.cache, "value": kind.cache, "used": "i32"}
    if kind.sinks:
        types["sink"] = kind.query
    if kind.counted:
        types["count"] = "fp32"
    if kind.scaled:
        types |= {"key_scale": "fp32", "value_scale": "fp32"}
    return types
