"""Attention over packed tokens as cascades: codes, scales and what else a storage has, read where they lie.

The ranks are those of `cascade.py`, with t the packed tokens in the place of slots. Bytes of several codes
and scales of groups are inputs whose neighbours share an element; so keys and values are never widened in
memory. A storage that keeps tokens in two precisions is two streams. MiniCache is one: of a token the key
may be retained and the value merged, so no two sets of tokens part them. Each stream gives its log-sum-exp
beside its output, by which `bound_packed.py` merges the streams and the slots.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor, fx

from .....errors import UnsupportedError
from ....ir.cascade.cascade import Cascade
from ....ir.cascade.parser import parse
from ....ir.cascade.printer import FORMAT
from ....ir.cascade.verifier import verify
from ....ir.kv.store.gear.storage import Gear
from ....ir.kv.store.kivi.storage import Kivi
from ....ir.kv.store.minicache.storage import MiniCache
from ....ir.kv.store.mixed import MiKV, Mixed, ZipCache
from ....ir.kv.store.packed import PLANES, Packed, planes
from ....ir.kv.store.storage import GroupShape
from ....ir.ops.packed import packed_storage
from ....ir.program import call_arguments
from .cascade import logit_of, softmax_of
from .kinds import type_name

#: The streamed rank: packed tokens.
STREAM = "t"

#: Ranks of an element of the keys and of the values.
_AT = {"key": ("b", "k", "t", "d"), "value": ("b", "k", "t", "f")}

#: Retained rows of MiniCache that a kernel reads, each as an input; 16 spill, and take a minute to compile.
RETAINED = 8

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
    def tokens(self) -> int:
        """Tokens of a granule that this stream has."""
        form = self.form
        if isinstance(form, Mixed):
            return next(tokens for part, tokens, _ in form.parts if part == self.part)
        return form.granule


@dataclass(frozen=True)
class Source:
    """An input of the cascade: how it is read from a piece [B, K, G, R, W].

    `view` is "matrix" (all rows of all granules), "token" (column `at` of these), "row" (row `at` of each
    granule), "column" (column `at` of each granule, its rows along channels) or "entry" (row `at` of each
    granule where rows are one number). `shared` is as in `generate`.
    """

    name: str
    piece: str
    ranks: tuple[str, ...]
    shared: tuple[tuple[str, int], ...] = ()
    view: str = "matrix"
    at: int = 0

    def of(self, piece_BKGRW: Tensor) -> Tensor:
        """The view of a piece; no number is copied."""
        if self.view == "row":
            return piece_BKGRW[:, :, :, self.at]
        if self.view == "column":
            return piece_BKGRW[..., self.at]
        if self.view == "entry":
            return piece_BKGRW[:, :, :, self.at, 0]
        matrix = piece_BKGRW.flatten(2, 3)
        return matrix if self.view == "matrix" else matrix[..., self.at]

    @property
    def read(self) -> str:
        """The input at its ranks, as a cascade writes it."""
        return f"{self.name}[{', '.join(self.ranks)}]"


@dataclass
class Stream:
    """What a stream reads, and what its keys and values are made of."""

    sources: list[Source] = field(default_factory=list)
    key: str = ""
    value: str = ""

    def add(self, source: Source) -> str:
        """One more input; gives how it is read."""
        self.sources.append(source)
        return source.read


def packed_kinds(node: fx.Node) -> list[PackedKind]:
    """The streams of a `packed_attention` call. Raises UnsupportedError for more rows than a kernel takes."""
    found = call_arguments(node)
    query, keys = found["q_BSHD"].meta["val"], found["key_cache_BKCD"].meta["val"]
    form = packed_storage(str(found["storage"]))
    if isinstance(form, MiniCache) and form.retained > RETAINED:
        raise UnsupportedError(
            f"layer {found['layer']} retains up to {form.retained} of {form.group} tokens, and a kernel "
            f"reads up to {RETAINED}; lower retained or group of cache.share, or compile for the target "
            "reference"
        )
    kv_heads = int(keys.shape[1])
    parts = [part for part, _, _ in form.parts] if isinstance(form, Mixed) else [""]
    return [
        PackedKind(
            kv_heads=kv_heads,
            group=int(query.shape[2]) // kv_heads,
            key_size=int(keys.shape[3]),
            value_size=int(found["value_cache_BKCD"].meta["val"].shape[3]),
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
    stream = stream_of(kind)
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


def stream_of(kind: PackedKind) -> Stream:
    """The inputs of a kind's stream, and its keys and values as expressions of them."""
    form, stream = kind.form, Stream()
    if isinstance(form, Kivi):
        by_channel = form.keys == "channel"
        stream.key = _codes(stream, "key", "key", form.key_bits, form.group, by_channel)
        stream.value = _codes(stream, "value", "value", form.value_bits, form.group, False)
        if isinstance(form, Gear):
            _corrected(stream, form, kind)
        return stream
    if isinstance(form, MiniCache):
        stream.key, stream.value = (_merged(stream, form, part) for part in ("key", "value"))
        return stream
    assert isinstance(form, Mixed)
    bits = next(bits for part, _, bits in form.parts if part == kind.part)
    each = (("t", kind.tokens),)
    if isinstance(form, ZipCache):
        stream.key = _codes(stream, "key", f"{kind.part}_key", bits, kind.tokens, True)
        value = _codes(stream, "value", f"{kind.part}_value", bits, kind.value_size, False)
        norm = stream.add(Source("value_norm", "value_norm", _AT["value"], each))
        stream.value = f"({value}) * {norm}"
        return stream
    assert isinstance(form, MiKV)
    key = _codes(stream, "key", f"{kind.part}_key", bits, form.group, False)
    stream.value = _codes(stream, "value", f"{kind.part}_value", bits, form.group, False)
    balance = stream.add(Source("key_balance", "key_balance", _AT["key"], each))
    # Where a tile is wider than the head it loads zeros; no balance is that small.
    stream.key = f"({key}) / max({balance}, 0.0001)"
    return stream


def _codes(stream: Stream, part: str, prefix: str, bits: int, group: int, by_channel: bool) -> str:
    """Codes times their scale plus their zero."""
    at, lane = _AT[part], _AT[part][3]
    along = "t" if by_channel else lane
    terms = []
    for (name, width), (_, above) in zip(planes(prefix, bits), PLANES[bits], strict=True):
        each = 8 // width
        shared = ((along, each),) if each > 1 else ()
        code = stream.add(Source(name, name, at, shared))
        if each > 1:
            code = f"bits(shift_right({code}, (pos({along}) % {each}) * {width}), {2**width - 1})"
        terms.append(f"{code} * {2**above}" if above else code)
    shared = ((along, group),)
    scale, zero = (
        stream.add(Source(f"{prefix}_{name}", f"{prefix}_{name}", at, shared))
        for name in ("scale", "zero")
    )
    codes = terms[0] if len(terms) == 1 else f"({' + '.join(terms)})"
    return f"{codes} * {scale} + {zero}"


def _merged(stream: Stream, form: MiniCache, part: str) -> str:
    """A direction times its length, or the retained row whose place this is; -1 is the place of no token."""
    at, each = _AT[part], (("t", form.group),)
    direction = stream.add(Source(f"{part}_direction", f"{part}_direction", at))
    length = stream.add(Source(f"{part}_length", f"{part}_length", at[:3], (), "token"))
    made = f"{direction} * {length}"
    for i in range(form.retained):
        place = stream.add(Source(f"{part}_place{i}", f"{part}_place", at[:3], each, "entry", i))
        kept = stream.add(Source(f"{part}_kept{i}", f"{part}_kept", at, each, "row", i))
        made = f"where({place} == pos(t) % {form.group}, {kept}, {made})"
    return made


def _corrected(stream: Stream, form: Gear, kind: PackedKind) -> None:
    """GEAR's low-rank part and outliers, added to the codes column by column."""
    each = (("t", form.tokens),)
    for part, size in (("key", kind.key_size), ("value", kind.value_size)):
        terms, at = [], _AT[part]
        for i in range(form.rank):
            left = Source(f"{part}_left{i}", f"{part}_left", at[:3], (), "token", i)
            right = Source(f"{part}_right{i}", f"{part}_right", at, each, "column", i)
            terms.append(f"{stream.add(left)} * {stream.add(right)}")
        vector = form.tokens if part == "key" else size
        for i in range(2 * form.outliers(vector)):
            place, outlier = (
                Source(f"{part}_{name}{i}", f"{part}_{name}", at, each, "row", i)
                if part == "key"
                else Source(f"{part}_{name}{i}", f"{part}_{name}", at[:3], (), "token", i)
                for name in ("place", "outlier")
            )
            here = f"pos(t) % {form.tokens}" if part == "key" else "pos(f)"
            terms.append(f"where({stream.add(place)} == {here}, {stream.add(outlier)}, 0)")
        made = " + ".join([stream.key if part == "key" else stream.value, *terms])
        if part == "key":
            stream.key = made
        else:
            stream.value = made


def packed_types(kind: PackedKind) -> dict[str, str]:
    """The storage types of a stream's inputs."""
    shape = GroupShape(kind.kv_heads, kind.key_size, kind.value_size)
    types = {piece.name: _TYPES[piece.dtype] for piece in kind.form.pieces(shape)}
    sources = {source.name: types[source.piece] for source in stream_of(kind).sources}
    return {"query": kind.query, "live": "i32", **sources}


def packed_shared(kind: PackedKind) -> dict[tuple[str, str], int]:
    """Which inputs' neighbours share an element, for `generate`."""
    return {
        (source.name, rank): count
        for source in stream_of(kind).sources
        for rank, count in source.shared
        if count > 1
    }
