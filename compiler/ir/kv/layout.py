"""The CacheLayout: the one table that says what the KV cache holds, where, and in how many bytes.

For each attention layer the KV heads are partitioned into groups. A group has a *policy* (which
tokens it keeps), a *storage* (how a kept token is stored), a *reader* (which of them a query attends
over), and an *owner* (itself, or another layer whose tokens it reads). Passes refine the table; `buffers()`
is the only place that turns it into tensors, so what the runtime allocates is what `bytes()` accounts for.

Sizes are given batch rows and a capacity in tokens. Both may be numbers, as when the runtime
allocates, or SymPy symbols, as in the account: one formula serves both.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ....errors import IRError
from ..item_bytes import ITEM_BYTES
from ..record_text import count_of, read, show
from .attention_sums import Score
from .keep.full import Full
from .keep.policy import POLICIES, Policy
from .read.everything import Everything
from .read.reader import Reader, parse_reader
from .sizes import Size, divided_up, least, most
from .store.plain.storage import Plain
from .store.storage import GroupShape, Storage, read_storage

if TYPE_CHECKING:
    import sympy

#: What is cached of each token.
PARTS = ("key", "value")

#: What is cached of each page of slots, where a reader goes by it.
BOUNDS = "bounds"

#: The most groups of a cache that are read.
LINES = 4096

#: The graph's input that counts the tokens of each row; groups that keep every token in slots go by it.
TOKENS = "lengths"


@dataclass(frozen=True)
class Buffer:
    """One buffer to allocate.

    `role` says how a step of the graph meets it: it reads and writes `slots`, only reads what is `read`,
    and never sees what is for the `host`, which the runtime works with between steps.
    """

    name: str
    shape: tuple[Size, ...]
    dtype: str
    role: str = "slots"

    def bytes(self) -> Size:
        total: Size = math.prod(self.shape) * ITEM_BYTES[self.dtype]
        return total


@dataclass(frozen=True)
class HeadGroup:
    """KV heads of one layer that are cached alike."""

    heads: tuple[int, ...]
    policy: Policy = field(default_factory=Full)
    storage: Storage = field(default_factory=Plain)
    owner: int | None = None
    """The earlier layer whose cache is read in place of one of its own. The group then stands for all heads
    of its layer; policy and storage are the owner's, group by group."""
    partner: int | None = None
    """The earlier layer whose group of this number holds what the storage shares between two layers."""
    reader: Reader = field(default_factory=Everything)
    """What a step reads; of a layer that reads another's cache its own."""

    def __post_init__(self) -> None:
        if not self.reader.whole and not self.storage.plain:
            raise IRError(
                f"heads {self.heads}: {self.reader.name} chooses among tokens in plain slots, and "
                f"{self.storage.name} is read whole"
            )
        if self.reader.bounded and self.storage.slot_width(2) != 2:
            raise IRError(
                f"heads {self.heads}: {self.reader.name} keeps statistics of pages as numbers are stored, "
                f"one an element, and {self.storage.text} has two in a byte; take i8/channel"
            )
        if self.reader.bounded and (self.policy.compensated or self.owner is not None):
            raise IRError(
                f"heads {self.heads}: {self.reader.name} keeps statistics of pages of slots, so these must "
                "be of the layer itself, each for one token"
            )
        if self.reader.reorders and self.moves:
            raise IRError(
                f"heads {self.heads}: {self.reader.name} puts tokens into an order of its own once, so they "
                "must stay in their slots"
            )
        if self.packed and not self.policy.whole:
            raise IRError(
                f"heads {self.heads}: {self.policy.name} keeps few tokens, so there is nothing for "
                f"{self.storage.name} to pack; pack only groups that keep every token"
            )
        if self.storage.windowed and not self.policy.sliding:
            raise IRError(
                f"heads {self.heads}: {self.storage.name} stands for the tokens that leave a window "
                f"without compensation, and {show(self.policy)} is none"
            )

    @property
    def exact(self) -> bool:
        """Whether everything is kept in slots until the prompt has been read."""
        return self.policy.exact or self.storage.exact

    @property
    def packed(self) -> bool:
        """Whether older tokens leave the slots for bulk buffers."""
        return self.storage.waiting > 0

    @property
    def scores(self) -> Mapping[str, Score]:
        """The buffers in which what tokens got of queries is added up, which go along with them; of a policy
        that chooses once, until then."""
        return self.policy.scores or ({"score": Score()} if self.storage.scored else {})

    @property
    def by_slot(self) -> tuple[str, ...]:
        """The buffers whose third axis is the slots: those that there are move together."""
        return (*PARTS, *self.scores)

    @property
    def observed(self) -> bool:
        """Whether the runtime must be shown the queries."""
        return bool(self.scores) or self.policy.once

    @property
    def moves(self) -> bool:
        """Whether tokens leave the slots, so that a slot's index is not the token's place in the text."""
        return self.packed or not self.policy.whole

    @property
    def lead(self) -> int:
        """Slots that stay beside the newest when others leave: as policies have them, or first tokens."""
        return self.storage.lead if self.packed else self.policy.lead

    @property
    def newest(self) -> int:
        """The newest tokens, which stay in the slots when others leave."""
        return self.storage.newest if self.packed else self.policy.newest

    def slots(self, capacity: Size, prompt: Size | None = None) -> Size:
        """Slots a row and head: once the prompt has been read, or while `prompt` tokens are."""
        if prompt is not None and self.exact:
            kept = prompt + int(self.policy.compensated)
        else:
            kept = self.policy.slots(capacity)
            if self.packed:
                kept = least(kept, self.lead + self.newest + self.storage.waiting)
        if self.reader.bounded:
            return divided_up(kept, self.reader.bounded) * self.reader.bounded  # whole pages
        return kept

    def describe(self) -> str:
        """`window(sinks=4,..) f32`, in one word each."""
        return f"{show(self.policy)} {self.storage.text}"


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
        if len(listed) != self.kv_heads or listed != list(range(self.kv_heads)):
            raise IRError(
                f"cache of layer {self.layer}: the groups hold heads {listed}, "
                f"but each of the {self.kv_heads} KV heads must stand in exactly one group"
            )

    def size(self, part: str) -> int:
        """Numbers a head and token of the "key" or the "value"."""
        return self.key_size if part == "key" else self.value_size

    def shape(self, group: HeadGroup) -> GroupShape:
        """The sizes of one of this layer's groups."""
        return GroupShape(len(group.heads), self.key_size, self.value_size)

    def buffers(self, batch: Size, capacity: Size, prompt: Size | None = None) -> Iterator[Buffer]:
        for index in range(len(self.groups)):
            yield from self.group_buffers(index, batch, capacity, prompt)

    def group_buffers(
        self, index: int, batch: Size, capacity: Size, prompt: Size | None = None
    ) -> Iterator[Buffer]:
        """The buffers of one group."""
        group = self.groups[index]
        prefix, shape = cache_name(self.layer, index), self.shape(group)
        if group.owner is not None:
            return
        slots = group.slots(capacity, prompt)
        for part in PARTS:
            width = group.storage.slot_width(shape.size(part))
            slot = (batch, shape.heads, slots, width)
            yield Buffer(f"{prefix}.{part}", slot, group.storage.slot_dtype)
        if group.reader.bounded:
            pages = pages_of(group.reader.bounded, slots)
            numbers = group.reader.bound_numbers(shape.key_size)
            bounds = (batch, shape.heads, pages, numbers)
            yield Buffer(f"{prefix}.{BOUNDS}", bounds, group.storage.slot_dtype)
        for name, size, dtype in group.storage.whole(shape, batch, capacity):
            yield Buffer(f"{prefix}.{name}", size, dtype)
        if group.policy.compensated:
            yield Buffer(f"{prefix}.count", (batch, shape.heads), "f32", "read")
            for part in PARTS:
                mean = (batch, shape.heads, shape.size(part))
                yield Buffer(f"{prefix}.mean_{part}", mean, "f32", "host")
        reading = prompt is not None
        for name in group.scores if reading or not group.policy.once else ():
            yield Buffer(f"{prefix}.{name}", (batch, shape.heads, slots), "f32", "host")
        if group.storage.balanced:
            queries = (batch, shape.heads, shape.key_size)
            yield Buffer(f"{prefix}.query_max", queries, "f32", "host")
        for name, size in group.policy.buffers(batch, shape.heads, shape.key_size, reading):
            yield Buffer(f"{prefix}.{name}", size, "f32", "host")
        if group.packed:
            tokens = 0 if reading and group.exact else group.policy.slots(capacity)
            lent = group.storage.shared if group.partner is not None else frozenset()
            for name, size, dtype in group.storage.bulk(shape, batch, tokens):
                if name not in lent:
                    yield Buffer(f"{prefix}.{name}", size, dtype, "read")


@dataclass(frozen=True)
class CacheLayout:
    """The caches of all attention layers."""

    layers: tuple[LayerCache, ...]

    def __post_init__(self) -> None:
        for layer, _, group in self.groups():
            if group.owner is not None:
                self._check_owner(layer, group.owner)
        for layer, index, group in self.groups():
            if group.storage.shared and group.owner is None:
                self._check_pair(layer, index, group)

    def _check_owner(self, layer: LayerCache, owner: int) -> None:
        """A reader is a layer of one group, behind an owner of the same sizes that has a cache itself."""
        found = next((entry for entry in self.layers if entry.layer == owner), None)
        if found is None or owner >= layer.layer or len(layer.groups) > 1:
            raise IRError(
                f"cache of layer {layer.layer}: it can read as a whole what an earlier layer caches, "
                f"not layer {owner}"
            )
        sizes = [(c.kv_heads, c.key_size, c.value_size) for c in (layer, found)]
        if sizes[0] != sizes[1] or any(group.owner is not None for group in found.groups):
            raise IRError(
                f"cache of layer {layer.layer}: layer {owner} has other heads, or no cache of its own"
            )

    def _check_pair(self, layer: LayerCache, index: int, group: HeadGroup) -> None:
        """Of two groups that share, the later names the earlier, and they differ in nothing else."""
        if group.partner is None:
            if self.follower(layer, index) is None:
                raise IRError(
                    f"cache of layer {layer.layer}: {group.storage.name} wants two layers to share"
                )
            return
        found = next((entry for entry in self.layers if entry.layer == group.partner), None)
        if found is None or found.layer >= layer.layer or index >= len(found.groups):
            raise IRError(
                f"cache of layer {layer.layer}: it can share with an earlier layer, not {group.partner}"
            )
        if (
            found.groups[index] != replace(group, partner=None)
            or found.shape(group) != layer.shape(group)
            or self.follower(found, index) is not layer
        ):
            raise IRError(
                f"cache of layer {layer.layer}: layer {found.layer} stores other heads, in another way, "
                "or shares with another layer"
            )

    def follower(self, layer: LayerCache, index: int) -> LayerCache | None:
        """The later layer whose group reads what this one shares."""
        for later in self.layers:
            if index < len(later.groups) and later.groups[index].partner == layer.layer:
                return later
        return None

    def readers(self, layer: int) -> tuple[int, ...]:
        """The layers that read this one's cache and have none of their own."""
        return tuple(later.layer for later, _, group in self.groups() if group.owner == layer)

    def __getitem__(self, layer: int) -> LayerCache:
        for entry in self.layers:
            if entry.layer == layer:
                return entry
        raise IRError(f"the cache layout has no layer {layer}")

    def groups(self) -> Iterator[tuple[LayerCache, int, HeadGroup]]:
        """Every group with its layer and index, in order."""
        for layer in self.layers:
            for index, group in enumerate(layer.groups):
                yield layer, index, group

    @cached_property
    def chooses(self) -> bool:
        """Whether a query of some group reads a part of what is kept."""
        return any(not group.reader.whole for _, _, group in self.groups())

    @cached_property
    def reordered(self) -> tuple[tuple[LayerCache, int, HeadGroup], ...]:
        """The groups whose tokens change their slots among themselves; the runtime asks at every step."""
        return tuple(found for found in self.groups() if found[2].reader.reorders)

    def clocks(self) -> dict[str, HeadGroup]:
        """The counters of used slots, by name, each with a group that goes by it.

        Groups with the same policy and storage move their tokens at the same time, so they share a
        counter a row, where their slots come in pages of one size. Groups that keep every token in slots go
        by the count of tokens, `lengths`.
        """
        return {clock: layer.groups[index] for clock, ((layer, index), *_) in self._moving.items()}

    def clock(self, group: HeadGroup) -> str:
        """The counter that a group goes by."""
        return self._names[_kind(group)] if group.moves else TOKENS

    def members(self, clock: str) -> list[tuple[LayerCache, int]]:
        """The groups with slots of their own that go by one of `clocks`, by layer and index."""
        return [(layer, i) for layer, i in self._moving[clock] if layer.groups[i].owner is None]

    @cached_property
    def _names(self) -> dict[tuple[str, int], str]:
        """The counter of each kind of group that moves its tokens."""
        kinds = dict.fromkeys(_kind(g) for _, _, g in self.groups() if g.moves)
        return {kind: f"slots.{number}" for number, kind in enumerate(kinds)}

    @cached_property
    def _moving(self) -> dict[str, list[tuple[LayerCache, int]]]:
        """The groups that go by each counter; the runtime asks at every step."""
        found: dict[str, list[tuple[LayerCache, int]]] = {n: [] for n in self._names.values()}
        for layer, index, group in self.groups():
            if group.moves:
                found[self.clock(group)].append((layer, index))
        return found

    def packs(self) -> dict[str, HeadGroup]:
        """The counters of packed tokens, by name: `packed.N` beside the `slots.N` of groups that pack."""
        return {packed_of(name): group for name, group in self.clocks().items() if group.packed}

    def slot_dims(self, capacity: int, prompt: int | None = None) -> dict[str, int]:
        """The graph's named sizes of slots: C where every token stays there, C0, C1 .. by counter; of
        granules of packed tokens, G0, G1 ..; of bounded pages, P16 for those of 16 slots, and of the slots
        of as many, CP16; and of those of slots that go by a counter, C0P16.

        With `prompt`, while a prompt of so many tokens is read; else once it has been.
        """
        named = {
            slots_dim(name): group.slots(capacity, prompt) for name, group in self.clocks().items()
        }
        granules = {
            granules_dim(name): group.storage.granules(capacity)
            for name, group in self.packs().items()
        }
        pages: dict[str, int] = {}
        for _, _, group in self.groups():
            page, clock = group.reader.bounded, self.clock(group)
            if page:
                slots = group.slots(capacity, prompt)
                pages[pages_dim(page, clock)] = int(pages_of(page, slots))
                pages[paged_dim(page, clock)] = int(slots)
        return {"C": capacity} | named | granules | pages

    def buffers(self, batch: Size, capacity: Size, prompt: Size | None = None) -> Iterator[Buffer]:
        """Every buffer of the cache, in the order of layers and groups.

        With `prompt`, what is live while a prompt of so many tokens is read; else what stays after it.
        """
        for layer in self.layers:
            yield from layer.buffers(batch, capacity, prompt)

    def bytes(self, batch: Size, capacity: Size, prompt: Size | None = None) -> Size:
        """Bytes of all buffers; a number for numbers, an expression for symbols."""
        return _total(self.buffers(batch, capacity, prompt))

    def read_bytes(self, batch: int, tokens: int) -> int:
        """Bytes that a step of one new token reads of the cache, with it `tokens` a row, none of them packed
        or let go of later than need be."""
        total = 0
        for layer, index, group in self.groups():
            owner = layer if group.owner is None else self[group.owner]
            for buffer in owner.group_buffers(index, batch, tokens):
                part = buffer.name.rpartition(".")[2]
                if buffer.role == "host":
                    continue
                size = buffer.bytes()
                if part in PARTS:
                    slots = int(buffer.shape[2])
                    size = size * group.reader.reads(min(slots, tokens)) // max(1, slots)
                elif part == BOUNDS:
                    size = size * int(not group.reader.whole)
                total += size
        return total

    def peak_bytes(self, batch: Size, capacity: Size, prompt: Size) -> Size:
        """The most bytes that are ever live when a prompt of so many tokens is read and continued.

        Once the prompt has been read, groups that kept all of it are compressed one after the other, buffer
        by buffer: each final one is taken before the larger one is let go of. One that keeps its shape
        stays. Two groups that share are packed with the first of them, so the bulk of both is taken then.
        """
        live: Any = self.bytes(batch, capacity, prompt)
        peaks: list[Size] = [live]
        for layer, index, group in self.groups():
            if not group.exact or group.owner is not None:
                continue
            final = list(layer.group_buffers(index, batch, capacity))
            if group.packed and group.partner is None:
                follower = self.follower(layer, index)
                packed = [] if follower is None else follower.group_buffers(index, batch, capacity)
                live = live + _bulk(final) + _bulk(packed)
                peaks.append(live)
            replaced = {b.name: b for b in layer.group_buffers(index, batch, capacity, prompt)}
            kept = {buffer.name for buffer in final}
            live = live - _total(b for name, b in replaced.items() if name not in kept)
            for buffer in final:
                old = replaced[buffer.name]
                if old.shape == buffer.shape or (group.packed and buffer.role == "read"):
                    continue
                peaks.append(live + buffer.bytes())
                live = live + buffer.bytes() - old.bytes()
        return most(*peaks, live)

    def account(self) -> sympy.Expr:
        """Bytes as a SymPy expression in B (batch rows) and C (capacity in tokens)."""
        import sympy

        batch, capacity = sympy.symbols("B C", integer=True, positive=True)
        return sympy.expand(self.bytes(batch, capacity))

    def lines(self) -> Iterator[str]:
        """The textual form, a line a group; `parse` reads it back."""
        for layer, index, group in self.groups():
            heads = ",".join(map(str, group.heads))
            owner = "" if group.owner is None else f" owner={group.owner}"
            partner = "" if group.partner is None else f" partner={group.partner}"
            reader = "" if group.reader.whole else f" read={group.reader.text}"
            yield (
                f"cache {layer.layer}.{index} heads={heads} of={layer.kv_heads} "
                f"key={layer.key_size} value={layer.value_size} "
                f"policy={show(group.policy)} storage={group.storage.text}{owner}{partner}{reader}"
            )

    @staticmethod
    def parse(lines: list[str]) -> CacheLayout | None:
        """Reads what `lines` prints; None where there are none."""
        if len(lines) > LINES:
            raise IRError(f"a cache of {len(lines):,} groups is none; {LINES:,} are read")
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
                    kv_heads=count_of(groups[0][0]["of"]),
                    key_size=count_of(groups[0][0]["key"]),
                    value_size=count_of(groups[0][0]["value"]),
                    groups=tuple(group for _, group in groups),
                )
                for layer, groups in layers.items()
            )
        )


def _kind(group: HeadGroup) -> tuple[str, int]:
    """What groups have in common that go by one counter of slots."""
    return group.describe(), group.reader.bounded


def _total(buffers: Iterable[Buffer]) -> Size:
    total: Any = 0
    for buffer in buffers:
        total = total + buffer.bytes()
    return total


def _bulk(buffers: Iterable[Buffer]) -> Size:
    """Bytes of the buffers that hold packed tokens."""
    return _total(buffer for buffer in buffers if buffer.role == "read")


def cache_name(layer: int, group: int) -> str:
    """Prefix of the names of a group's buffers, in graphs and in the runtime."""
    return f"cache.{layer}.{group}"


def query_name(layer: int, group: int) -> str:
    """Name of the graph's result that shows a group's queries to the runtime."""
    return f"query.{layer}.{group}"


def slots_dim(clock: str) -> str:
    """The name that a counter's number of slots has in the graph's shapes."""
    return "C" if clock == TOKENS else f"C{clock.rpartition('.')[2]}"


def packed_of(clock: str) -> str:
    """The counter of packed tokens beside a counter of slots."""
    return f"packed.{clock.rpartition('.')[2]}"


def pages_of(page: int, tokens: Size) -> Size:
    """Pages whose bounds are kept: one more than so many tokens fill, which the last step of a prompt that
    ends inside a page may write."""
    return divided_up(tokens, page) + 1


def pages_dim(page: int, clock: str) -> str:
    """The name that the number of pages of so many slots has in the graph's shapes, by their counter."""
    return f"P{page}" if clock == TOKENS else f"{slots_dim(clock)}P{page}"


def paged_dim(page: int, clock: str) -> str:
    """The name that the number of slots in whole pages has in the graph's shapes, by their counter."""
    return f"CP{page}" if clock == TOKENS else slots_dim(clock)


def granules_dim(clock: str) -> str:
    """The name that a counter's number of packed granules has in the graph's shapes."""
    return f"G{clock.rpartition('.')[2]}"


def _parse_line(line: str) -> tuple[int, dict[str, str], HeadGroup]:
    try:
        _, place, *rest = line.split()
        fields = dict(item.split("=", 1) for item in rest)
        for name in ("of", "key", "value"):
            count_of(fields[name])
        layer = count_of(place.split(".")[0])
        owner, partner = fields.get("owner"), fields.get("partner")
        group = HeadGroup(
            heads=tuple(count_of(head) for head in fields["heads"].split(",")),
            policy=read(fields["policy"], POLICIES, "cache policy"),
            storage=read_storage(fields["storage"]),
            owner=None if owner is None else count_of(owner),
            partner=None if partner is None else count_of(partner),
            reader=parse_reader(fields.get("read", "")),
        )
    except (LookupError, ValueError, TypeError, ArithmeticError, IRError) as error:
        raise IRError(f"cannot read the cache line {line[:200]!r}: {str(error)[:400]}") from None
    return layer, fields, group
