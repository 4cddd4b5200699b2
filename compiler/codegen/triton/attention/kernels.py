"""Every attention of a program as a kernel: derived from the IR, whoever asks, compiler or runtime."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, fx

from .....errors import UnsupportedError
from ....analysis.cascade.plans import fold
from ....ir.cascade.cascade import Cascade
from ....ir.cascade.plan import Plan
from ....ir.ops.attention import CachedAttention
from ....ir.ops.bounded import BoundedAttention
from ....ir.ops.low_rank import LowRankAttention
from ....ir.ops.packed import PackedAttention
from ....ir.ops.record import operator_of
from ....ir.ops.shared import SharedAttention
from ....ir.program import Program, call_arguments
from ..generate import generate
from ..kernel import Kernel
from ..launch import split_count
from ..listed import Listed
from ..options import DEVICES, Device, Options, Tiles
from ..through import PRECISION
from ..tiles import choose_tiles
from .cascade import STREAM, cascade_of
from .choosing_kinds import choosing_kind
from .kinds import AttentionKind, kind_of
from .low_rank import STREAM as TOKENS
from .low_rank import LowRankKind, low_rank_cascade, low_rank_kind, low_rank_types
from .packed import STREAM as PACKED_STREAM
from .packed import PackedKind, packed_cascade, packed_kinds, packed_shared, packed_types

#: What there are kernels for, with all that a kernel depends on.
Kind = AttentionKind | PackedKind | LowRankKind

#: The operators that kernels stand for, and the streams that a call reads beside its slots.
_STREAMS: dict[Any, Callable[[fx.Node], Sequence[Kind]]] = {
    CachedAttention: lambda node: (),
    SharedAttention: lambda node: (),
    BoundedAttention: lambda node: (),
    PackedAttention: lambda node: packed_kinds(node),
    LowRankAttention: lambda node: (low_rank_kind(node),),
}

#: Arguments that no kernel has, and what they say: they are refused, not passed over.
_WITHOUT_KERNELS = {
    "read": "a reader where no statistics of pages are kept",
    "by_distance_HR": "numbers that are added to logits by distance",
}

#: New tokens of the prefill step that tiles are chosen for.
_PREFILL = 512

#: Parts that a step may be cut into. Few, since each number of them is a kernel of its own.
SPLITS = (1, 8, 32)


@dataclass(frozen=True)
class AttentionKernel:
    """The kernel of the layers of one kind. `kernel.tiles` are for many new tokens, `decode` for one."""

    kind: Kind
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
        raise UnsupportedError(
            "no attention of the program reads a cache that holds tokens in slots, which is what there are "
            "kernels for; compile for onnx"
        )
    return made


def attentions(program: Program) -> Iterator[fx.Node]:
    """The calls that kernels stand for, in the order of the graph."""
    return program.nodes(*(kind.overload() for kind in _STREAMS))


def kinds_at(node: fx.Node) -> list[Kind]:
    """What a call over a cache needs kernels for: its slots, then each stream of packed tokens or features.

    Where pages are chosen it is all slots, then those of pages. Raises UnsupportedError for what no kernel
    reads.
    """
    operator = operator_of(node.target)
    if operator is BoundedAttention:
        return [kind_of(node), kind_of(node, page=choosing_kind(node).paged.page)]
    found = call_arguments(node)
    for name, what in _WITHOUT_KERNELS.items():
        if found.get(name):
            raise UnsupportedError(
                f"layer {found['layer']}: no kernel has {what}; run it by the reference"
            )
    streams = _STREAMS[operator](node)
    return [kind_of(node, merged=bool(streams)), *streams]


def kinds_of(program: Program) -> dict[Kind, list[int]]:
    """Every kind of a program with its layers, in the order of the graph."""
    kinds: dict[Kind, list[int]] = {}
    for node in attentions(program):
        layer = int(call_arguments(node)["layer"])
        for kind in kinds_at(node):
            layers = kinds.setdefault(kind, [])
            if layer not in layers:  # groups of a layer's heads may be of one kind
                layers.append(layer)
    return kinds


def attention_kernel(
    kind: Kind,
    name: str,
    layers: tuple[int, ...],
    context: int,
    device: Device = DEVICES[90],
    cache: Path | None = None,
) -> AttentionKernel:
    """The kernel of one kind, for so many tokens of context; otherwise as `attention_kernels`."""
    given = given_of(kind)
    cascade, stream = given.cascade, given.stream
    folding = fold(cascade, stream, cache)
    if folding.plan is None:
        raise UnsupportedError(f"layers {layers}: attention does not fold: {folding.reason}")
    sizes = {"b": 1, "s": _PREFILL, stream: context, **given.sizes}
    kernel = generate(
        folding.plan,
        given.types,
        sizes,
        Options(device=device, precision=PRECISION),
        cascade,
        name,
        given.shared,
        given.walked,
        given.listed,
    )
    decode = choose_tiles(kernel.division, kernel.types, {**sizes, "s": 1}, kernel.demand, device)
    return AttentionKernel(kind, name, layers, cascade, folding.plan, kernel, decode)


@dataclass(frozen=True)
class Given:
    """What a kernel is generated from: a cascade and the rank that it streams, and what `generate` takes."""

    cascade: Cascade
    stream: str
    types: Mapping[str, str]
    sizes: Mapping[str, int]
    shared: Mapping[tuple[str, str], int] = field(default_factory=dict)
    walked: tuple[str, ...] = ()
    listed: Listed | None = None


def given_of(kind: Kind) -> Given:
    """What the kernel of a kind is generated from."""
    if isinstance(kind, LowRankKind):
        cascade, types = low_rank_cascade(kind), low_rank_types(kind)
        return Given(cascade, TOKENS, types, kind.sizes, walked=kind.walked)
    sizes = {"k": kind.kv_heads, "g": kind.group, "d": kind.key_size, "f": kind.value_size}
    if isinstance(kind, PackedKind):
        types, shared = packed_types(kind), packed_shared(kind)
        return Given(packed_cascade(kind), PACKED_STREAM, types, sizes, shared)
    listed = Listed(kind.page, ("b", "k"), ("b",)) if kind.page else None
    shared = {("key", "d"): 2, ("value", "f"): 2} if kind.halved else {}
    return Given(cascade_of(kind), STREAM, types_of(kind), sizes, shared, listed=listed)


def split_parts(made: AttentionKernel, query: Tensor, length: int) -> int:
    """How many parts of so many keys run side by side: as many as fill the device, of those that there are.

    `query` is [B, S, ..].
    """
    batch, new = query.shape[:2]
    tiles, roles = made.tiles(new), made.kernel.division.roles
    sizes = {"b": batch, "s": new, "k": made.kind.kv_heads, "g": made.kind.group}
    rows = math.prod(sizes[rank] for rank in roles.rows)
    programs = math.prod(sizes[rank] for rank in roles.grid) * -(-rows // tiles.rows)
    wanted = split_count(made.kernel, programs, length, tiles, query)
    return max(parts for parts in SPLITS if parts <= wanted)


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
