"""Which choices of pages differ, so that equal layers share their kernels."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import fx

from .....errors import UnsupportedError
from ....ir.kv.read.pages.paged import Paged
from ....ir.kv.read.reader import parse_reader
from ....ir.program import call_arguments
from .kinds import type_name


@dataclass(frozen=True)
class ChoosingKind:
    """What the kernels depend on that choose: as in `AttentionKind`. `bounds` is the type of slots and of
    their pages' statistics, `reader` the text of a reader of pages."""

    kv_heads: int
    group: int
    key_size: int
    scale: float
    query: str
    bounds: str
    scaled: bool
    reader: str

    @cached_property
    def paged(self) -> Paged:
        """The reader."""
        found = parse_reader(self.reader)
        assert isinstance(found, Paged)
        return found

    @property
    def numbers(self) -> int:
        """Numbers of a page's statistic."""
        return self.paged.bound_numbers(self.key_size)

    @property
    def lanes(self) -> int:
        """The size of a key as a power of two."""
        return max(16, 1 << (self.key_size - 1).bit_length())

    @property
    def name(self) -> str:
        """A name for files; kinds of other options may have the same."""
        heads = f"h{self.kv_heads * self.group}_kv{self.kv_heads}_d{self.key_size}"
        return f"choosing_{heads}_pages{self.paged.page}_{self.bounds}"


def choosing_kind(node: fx.Node) -> ChoosingKind:
    """The kind of a `bounded_attention` call. Raises UnsupportedError for what no kernel does."""
    found = call_arguments(node)
    layer, reader = int(found["layer"]), parse_reader(str(found["read"]))
    query, keys, bounds = (
        found[name].meta["val"] for name in ("q_BSHD", "key_cache_BKCD", "bounds_BKPE")
    )
    if not isinstance(reader, Paged):
        raise UnsupportedError(
            f"layer {layer}: no kernel reads what {reader.name} chooses; run it by the reference"
        )
    if int(found["window"]) or found["count_BK"] is not None:
        raise UnsupportedError(
            f"layer {layer}: kernels choose pages among all tokens, each of which has a slot of its own; "
            "here is a window, or a slot that stands for many; run it by the reference"
        )
    if bounds.dtype != keys.dtype:
        raise UnsupportedError(
            f"layer {layer} caches keys as {keys.dtype} and statistics of pages as {bounds.dtype}; kernels "
            "read one type"
        )
    kv_heads = int(keys.shape[1])
    return ChoosingKind(
        kv_heads=kv_heads,
        group=int(query.shape[2]) // kv_heads,
        key_size=int(keys.shape[3]),
        scale=float(found["scale"]),
        query=type_name(query.dtype, layer),
        bounds=type_name(keys.dtype, layer),
        scaled=found["key_scale_KD"] is not None,
        reader=reader.text,
    )
