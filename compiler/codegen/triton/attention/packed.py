"""Attention over packed tokens as cascades: codes, scales and what else a storage has, read where they lie.

The ranks are those of `cascade.py`, with t the packed tokens in the place of slots. Bytes of several codes
and scales of groups are inputs whose neighbours share an element; so keys and values are never widened in
memory. The storage says what its streams read and make of it. Each gives its log-sum-exp beside its output,
by which `bound_packed.py` merges the streams and the slots.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache

from torch import fx

from .....errors import UnsupportedError
from ....ir.cascade.cascade import Cascade
from ....ir.cascade.parser import parse
from ....ir.cascade.printer import FORMAT
from ....ir.cascade.verifier import verify
from ....ir.kv.store.packed import Packed
from ....ir.kv.store.storage import GroupShape
from ....ir.kv.streams import Stream
from ....ir.ops.packed import packed_storage
from ....ir.program import call_arguments
from .cascade import logit_of, softmax_of
from .kinds import type_name

#: The streamed rank: packed tokens.
STREAM = "t"

#: Types that pieces are stored in, as kernels name them.
_TYPES = {"f32": "fp32", "f16": "fp16", "u8": "u8", "i32": "i32"}


@dataclass(frozen=True)
class PackedKind:
    """One stream of packed tokens: `part` is "" or which precision. The rest is as in `AttentionKind`."""

    kv_heads: int
    group: int
    key_size: int
    value_size: int
    scale: float
    softcap: float
    query: str
    storage: str
    part: str = ""

    @property
    def form(self) -> Packed:
        """The storage."""
        return packed_storage(self.storage)

    @property
    def name(self) -> str:
        """A name for files and functions; kinds of other options may have the same."""
        parts = [f"packed_{self.form.name}", *([self.part] if self.part else [])]
        parts += [f"h{self.kv_heads * self.group}_kv{self.kv_heads}_d{self.key_size}"]
        return "_".join(parts + (["softcap"] if self.softcap else []))

    @property
    def shape(self) -> GroupShape:
        """The sizes of the group that it is of."""
        return GroupShape(self.kv_heads, self.key_size, self.value_size)

    @property
    def stream(self) -> Stream:
        """What is read, and what keys and values are made of."""
        return _streams(self.storage, self.shape)[self.part]

    @property
    def tokens(self) -> int:
        """Tokens of a granule that this stream has."""
        return self.stream.tokens


@cache
def _streams(storage: str, shape: GroupShape) -> Mapping[str, Stream]:
    return packed_storage(storage).streams(shape)


def packed_kinds(node: fx.Node) -> list[PackedKind]:
    """The streams of a `packed_attention` call. Raises UnsupportedError where no kernel reads the storage."""
    found = call_arguments(node)
    query, keys = found["q_BSHD"].meta["val"], found["key_cache_BKCD"].meta["val"]
    form = packed_storage(str(found["storage"]))
    kv_heads = int(keys.shape[1])
    values = found["value_cache_BKCD"].meta["val"]
    shape = GroupShape(kv_heads, int(keys.shape[3]), int(values.shape[3]))
    try:
        parts = list(form.streams(shape))
    except UnsupportedError as error:
        raise UnsupportedError(f"layer {found['layer']}: {error}") from error
    return [
        PackedKind(
            kv_heads=kv_heads,
            group=int(query.shape[2]) // kv_heads,
            key_size=shape.key_size,
            value_size=shape.value_size,
            scale=float(found["scale"]),
            softcap=float(found["softcap"]),
            query=type_name(query.dtype, int(found["layer"])),
            storage=str(found["storage"]),
            part=part,
        )
        for part in parts
    ]


def packed_cascade(kind: PackedKind) -> Cascade:
    """The cascade of a stream."""
    stream = kind.stream
    lines = [
        FORMAT,
        *_declarations(kind, stream),
        *_statements(kind, stream),
        "output out",
        "output lse",
    ]
    cascade = parse("\n".join(lines))
    verify(cascade)
    return cascade


def _declarations(kind: PackedKind, stream: Stream) -> Iterator[str]:
    yield from ("rank b : B", "rank s : S", f"rank k : {kind.kv_heads}", f"rank g : {kind.group}")
    yield from (f"rank d : {kind.key_size}", f"rank f : {kind.value_size}", "rank t : T")
    yield from ("input query[b, s, k, g, d]", "input live[b] : integer")
    types = packed_types(kind)
    for source in stream.sources:
        integer = types[source.name].startswith(("i", "u"))
        yield f"input {source.read}" + (" : integer" if integer else "")


def _statements(kind: PackedKind, stream: Stream) -> Iterator[str]:
    logit = logit_of("score[b, s, k, g, t]", kind.scale, kind.softcap)
    yield f"score[b, s, k, g, t] = query[b, s, k, g, d] * ({stream.key}) :: sum(d)"
    yield f"logit[b, s, k, g, t] = where(pos(t) < live[b], {logit}, -inf)"
    yield from softmax_of(STREAM)
    yield f"word[b, k, t, f] = {stream.value}"
    yield "out[b, s, k, g, f] = power[b, s, k, g, t] / total[b, s, k, g] * word[b, k, t, f] :: sum(t)"
    yield "lse[b, s, k, g] = log(total[b, s, k, g]) + top[b, s, k, g]"


def packed_types(kind: PackedKind) -> dict[str, str]:
    """The storage types of a stream's inputs."""
    types = {piece.name: _TYPES[piece.dtype] for piece in kind.form.pieces(kind.shape)}
    sources = {source.name: types[source.piece] for source in kind.stream.sources}
    return {"query": kind.query, "live": "i32", **sources}


def packed_shared(kind: PackedKind) -> dict[tuple[str, str], int]:
    """Which inputs' neighbours share an element, for `generate`."""
    return {
        (source.name, rank): count
        for source in kind.stream.sources
        for rank, count in source.shared
        if count > 1
    }
