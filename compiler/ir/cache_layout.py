"""The CacheLayout: the one table that says what the KV cache holds, where, and in how many bytes.

For each attention layer the KV heads are partitioned into groups. A group has a *policy* (which
tokens it keeps), a *storage* (how a kept token is stored), an *owner* (its own buffers, or another
layer's) and a *tier* (where the buffers live). Passes refine the table; `buffers()` is the only
place that turns it into tensors, so what the runtime allocates is what `bytes()` accounts for.

Sizes are given batch rows and a capacity in tokens. Both may be numbers, as when the runtime
allocates, or SymPy symbols, as in the account: one formula serves both. This module needs neither
torch nor SymPy until an expression is asked for, so that running an artifact stays light.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

from ...errors import IRError

if TYPE_CHECKING:
    import sympy

    Size: TypeAlias = int | sympy.Expr

#: Bytes of a number of each dtype that a cache may be stored in.
ITEM_BYTES = {"f32": 4, "f16": 2, "bf16": 2, "i8": 1, "u8": 1}

#: What is cached of each token.
PARTS = ("key", "value")


@dataclass(frozen=True)
class Full:
    """Every token of the context is kept."""

    name = "full"

    def tokens(self, capacity: Size) -> Size:
        """Tokens a row that the group has room for."""
        return capacity


@dataclass(frozen=True)
class Storage:
    """How a kept token is stored: numbers of one dtype, plain or with a fixed scale a channel.

    Printed as `f32`, or `i8/channel`. The scales [heads, size] are weights of the program.
    """

    dtype: str = "f32"
    scales: str = "none"

    def __post_init__(self) -> None:
        if self.dtype not in ITEM_BYTES:
            raise IRError(f"a cache can be stored as {', '.join(ITEM_BYTES)}, not {self.dtype!r}")
        if self.scales not in ("none", "channel"):
            raise IRError(f"a cache has scales of kind none or channel, not {self.scales!r}")

    def __str__(self) -> str:
        return self.dtype if self.scales == "none" else f"{self.dtype}/{self.scales}"

    @staticmethod
    def parse(text: str) -> Storage:
        """Reads what `str` gives."""
        dtype, _, scales = text.partition("/")
        return Storage(dtype, scales or "none")


@dataclass(frozen=True)
class Buffer:
    """One buffer to allocate."""

    name: str
    shape: tuple[Size, ...]
    dtype: str

    def bytes(self) -> Size:
        total: Size = math.prod(self.shape) * ITEM_BYTES[self.dtype]
        return total


@dataclass(frozen=True)
class HeadGroup:
    """KV heads of one layer that are cached alike."""

    heads: tuple[int, ...]
    policy: Full = field(default_factory=Full)
    storage: Storage = field(default_factory=Storage)


@dataclass(frozen=True)
class LayerCache:
    """The cache of one attention layer."""

    layer: int
    kv_heads: int
    key_size: int
    value_size: int
    groups: tuple[HeadGroup, ...]

    def __post_init__(self) -> None:
        listed = sorted(head for group in self.groups for head in group.heads)
        if listed != list(range(self.kv_heads)):
            raise IRError(
                f"cache of layer {self.layer}: the groups hold heads {listed}, "
                f"but each of the {self.kv_heads} KV heads must stand in exactly one group"
            )

    def size(self, part: str) -> int:
        """Numbers a head and token of the "key" or the "value"."""
        return self.key_size if part == "key" else self.value_size

    def buffers(self, batch: Size, capacity: Size) -> Iterator[Buffer]:
        for index, group in enumerate(self.groups):
            prefix = cache_name(self.layer, index)
            tokens = group.policy.tokens(capacity)
            for part in PARTS:
                shape = (batch, len(group.heads), tokens, self.size(part))
                yield Buffer(f"{prefix}.{part}", shape, group.storage.dtype)


@dataclass(frozen=True)
class CacheLayout:
    """The caches of all attention layers."""

    layers: tuple[LayerCache, ...]

    def __getitem__(self, layer: int) -> LayerCache:
        for entry in self.layers:
            if entry.layer == layer:
                return entry
        raise IRError(f"the cache layout has no layer {layer}")

    def buffers(self, batch: Size, capacity: Size) -> Iterator[Buffer]:
        """Every buffer of the cache, in the order of layers and groups."""
        for layer in self.layers:
            yield from layer.buffers(batch, capacity)

    def bytes(self, batch: Size, capacity: Size) -> Size:
        """Bytes of all buffers; a number for numbers, an expression for symbols."""
        total: Any = 0
        for buffer in self.buffers(batch, capacity):
            total = total + buffer.bytes()
        return total

    def account(self) -> sympy.Expr:
        """Bytes as a SymPy expression in B (batch rows) and C (capacity in tokens)."""
        import sympy

        batch, capacity = sympy.symbols("B C", integer=True, positive=True)
        return sympy.expand(self.bytes(batch, capacity))

    def lines(self) -> Iterator[str]:
        """The textual form, a line a group; `parse_line` reads it back."""
        for layer in self.layers:
            for index, group in enumerate(layer.groups):
                heads = ",".join(map(str, group.heads))
                yield (
                    f"cache {layer.layer}.{index} heads={heads} of={layer.kv_heads} "
                    f"key={layer.key_size} value={layer.value_size} "
                    f"policy={group.policy.name} storage={group.storage}"
                )

    @staticmethod
    def parse(lines: list[str]) -> CacheLayout | None:
        """Reads what `lines` prints; None where there are none."""
        layers: dict[int, list[tuple[dict[str, str], HeadGroup]]] = {}
        for line in lines:
            layer, fields, group = _parse_line(line)
            layers.setdefault(layer, []).append((fields, group))
        if not layers:
            return None
        return CacheLayout(
            tuple(
                LayerCache(
                    layer=layer,
                    kv_heads=int(groups[0][0]["of"]),
                    key_size=int(groups[0][0]["key"]),
                    value_size=int(groups[0][0]["value"]),
                    groups=tuple(group for _, group in groups),
                )
                for layer, groups in layers.items()
            )
        )


def cache_name(layer: int, group: int) -> str:
    """Prefix of the names of a group's buffers, in graphs and in the runtime."""
    return f"cache.{layer}.{group}"


def _parse_line(line: str) -> tuple[int, dict[str, str], HeadGroup]:
    try:
        _, place, *rest = line.split()
        fields = dict(item.split("=", 1) for item in rest)
        layer = int(place.split(".")[0])
        if fields["policy"] != Full.name:
            raise IRError(
                f"unknown cache policy {fields['policy']!r} in {line!r}; known: {Full.name}"
            )
        group = HeadGroup(
            heads=tuple(int(head) for head in fields["heads"].split(",")),
            storage=Storage.parse(fields["storage"]),
        )
    except (KeyError, ValueError) as error:
        raise IRError(f"cannot read the cache line {line!r}: {error}") from None
    return layer, fields, group
