"""The CacheLayout: the one table that says what the KV cache holds, where, and in how many bytes.

For each attention layer the KV heads are partitioned into groups. A group has a *policy* (which
tokens it keeps), a *storage* (how a kept token is stored), an *owner* (its own buffers, or another
layer's) and a *tier* (where the buffers live). Passes refine the table; `buffers()` is the only
place that turns it into tensors, so what the runtime allocates is what `bytes()` accounts for.

Symbols: B batch rows, C capacity in tokens of a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import sympy
import torch

from ...errors import IRError
from .types import DTYPE_NAMES, DTYPES

B, C = sympy.symbols("B C", integer=True, positive=True)


@dataclass(frozen=True)
class Full:
    """Every token of the context is kept."""

    name = "full"

    def capacity(self) -> sympy.Expr:
        """Tokens a row that the group has room for."""
        return C


@dataclass(frozen=True)
class Storage:
    """How a kept token is stored: plain numbers of one dtype."""

    dtype: torch.dtype = torch.float32

    @property
    def name(self) -> str:
        return DTYPE_NAMES[self.dtype]


@dataclass(frozen=True)
class BufferSpec:
    """One buffer to allocate: its name, its shape in B and C, its dtype."""

    name: str
    shape: tuple[sympy.Expr, ...]
    dtype: torch.dtype

    def bytes(self) -> sympy.Expr:
        return sympy.Mul(*self.shape) * self.dtype.itemsize

    def concrete(self, batch: int, capacity: int) -> tuple[int, ...]:
        return tuple(int(dim.subs({B: batch, C: capacity})) for dim in self.shape)


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

    def buffers(self) -> Iterator[BufferSpec]:
        for index, group in enumerate(self.groups):
            prefix = cache_name(self.layer, index)
            tokens = group.policy.capacity()
            for part, size in (("key", self.key_size), ("value", self.value_size)):
                shape = (B, sympy.Integer(len(group.heads)), tokens, sympy.Integer(size))
                yield BufferSpec(f"{prefix}.{part}", shape, group.storage.dtype)


@dataclass(frozen=True)
class CacheLayout:
    """The caches of all attention layers."""

    layers: tuple[LayerCache, ...]

    def __getitem__(self, layer: int) -> LayerCache:
        for entry in self.layers:
            if entry.layer == layer:
                return entry
        raise IRError(f"the cache layout has no layer {layer}")

    def buffers(self) -> Iterator[BufferSpec]:
        for layer in self.layers:
            yield from layer.buffers()

    def bytes(self) -> sympy.Expr:
        """Bytes of all buffers, an expression in B and C."""
        return sympy.expand(sympy.Add(*(buffer.bytes() for buffer in self.buffers())))

    def bytes_at(self, batch: int, capacity: int) -> int:
        return int(self.bytes().subs({B: batch, C: capacity}))

    def lines(self) -> Iterator[str]:
        """The textual form, a line a group; `parse_line` reads it back."""
        for layer in self.layers:
            for index, group in enumerate(layer.groups):
                heads = ",".join(map(str, group.heads))
                yield (
                    f"cache {layer.layer}.{index} heads={heads} of={layer.kv_heads} "
                    f"key={layer.key_size} value={layer.value_size} "
                    f"policy={group.policy.name} storage={group.storage.name}"
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
            raise IRError(f"unknown cache policy {fields['policy']!r} in {line!r}; known: {Full.name}")
        group = HeadGroup(
            heads=tuple(int(head) for head in fields["heads"].split(",")),
            storage=Storage(DTYPES[fields["storage"]]),
        )
    except (KeyError, ValueError) as error:
        raise IRError(f"cannot read the cache line {line!r}: {error}") from None
    return layer, fields, group
