"""What happens to a cache between steps: tokens leave the slots, and prompts settle.

A group's slots hold, in order, the compensation token (with some policies), the sinks, and the tokens
since. When a step would not fit, the tokens between the sinks and the newest `recent` leave: they are
dropped, added to the compensation token, or packed, as policy and storage say. Where tokens are kept by the
attention they got, each head lets go of its own. Rows are moved one by one, so each row's window goes by its
own length. Where a reader goes by statistics of pages, these are found anew of a row whose tokens moved.

Arrays may be NumPy's or torch's: only what both understand is asked of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..compiler.ir.kv.codes.half_bytes import as_slots, numbers
from ..compiler.ir.kv.layout import PARTS, HeadGroup, LayerCache, cache_name, packed_of
from ..errors import EinfoldError
from .buffers import CacheBuffers
from .packing import pack
from .page_statistics import find_pages

#: Tokens that are averaged at a time: a prompt of many leaves without a copy of all of it.
_PIECE = 512


def make_room(cache: CacheBuffers, size: int) -> None:
    """Moves tokens out of the slots of every row that has no room for `size` more."""
    for clock, group in cache.groups.items():
        used, slots = cache.clocks[clock], cache.slots_of(clock)
        if int(used.max()) + size <= slots:
            continue  # as nearly always
        for row in np.flatnonzero(used + size > slots):
            leaving = _leaving(group, int(used[row]))
            if used[row] - leaving + size > slots:
                raise EinfoldError(
                    f"{size} tokens in one step do not fit {slots} slots of a cache that keeps "
                    f"{group.describe()}; give it more slack or smaller steps"
                )
            _leave(cache, clock, int(row), leaving)
            _count(cache, clock, int(row), leaving)


def settle(cache: CacheBuffers) -> None:
    """Compresses the groups that kept the whole prompt, one by one, into their final buffers."""
    for layer, index, group in cache.layout.groups():
        if not group.exact or group.owner is not None:
            continue
        used = cache.clocks[cache.layout.clock(group)]
        final = {
            spec.name: spec for spec in layer.group_buffers(index, cache.batch, cache.capacity)
        }
        slots = final[f"{cache_name(layer.layer, index)}.key"].shape[2]
        if group.packed and group.partner is None:
            _make_bulk(cache, final)
            follower = cache.layout.follower(layer, index)
            if follower is not None:
                specs = follower.group_buffers(index, cache.batch, cache.capacity)
                _make_bulk(cache, {spec.name: spec for spec in specs})
        for row in range(cache.batch):
            leaving = _settling(group, int(used[row]), slots)
            _move(cache, layer, index, row, int(used[row]), leaving)
        _shrink(cache, cache_name(layer.layer, index), final)
    for clock, group in cache.groups.items():
        if group.exact:
            used, slots = cache.clocks[clock], cache.slots_of(clock)
            for row in range(cache.batch):
                _count(cache, clock, row, _settling(group, int(used[row]), slots))


def _leaving(group: HeadGroup, used: int) -> int:
    """How many tokens leave a row that uses so many slots."""
    movable = used - group.lead - group.newest
    return max(0, movable // group.storage.granule * group.storage.granule)


def _settling(group: HeadGroup, used: int, slots: int) -> int:
    """How many tokens leave a row when its prompt has been read: none where all fit, unless this is the one
    time that tokens are chosen."""
    return _leaving(group, used) if used > slots or group.policy.once else 0


def settled(group: HeadGroup, tokens: int, slots: int) -> tuple[int, int]:
    """(used slots, tokens that have left) of a row that has read a prompt of so many tokens and settled."""
    seen = tokens + group.policy.compensated
    leaving = _settling(group, seen, slots)
    return seen - leaving, leaving


def _count(cache: CacheBuffers, clock: str, row: int, leaving: int) -> None:
    """Takes tokens that have left off a counter of slots; packed ones are counted as such."""
    cache.clocks[clock][row] -= leaving
    if cache.groups[clock].packed:
        cache.packed[packed_of(clock)][row] += leaving


def _leave(cache: CacheBuffers, clock: str, row: int, leaving: int) -> None:
    used = int(cache.clocks[clock][row])
    for layer, index in cache.layout.members(clock):
        _move(cache, layer, index, row, used, leaving)


def _move(
    cache: CacheBuffers, layer: LayerCache, index: int, row: int, used: int, leaving: int
) -> None:
    """Takes `leaving` tokens out of one row of one group, and closes the gap.

    They are those behind the lead, or those that each head chooses by their scores.
    """
    if not leaving:
        return
    group, prefix = layer.groups[index], cache_name(layer.layer, index)
    held = cache.row_of(layer.layer, index, row)
    moving = [part for part in group.by_slot if part in held]  # once tokens are chosen, no scores
    staying_KN = group.policy.staying(held, used, leaving)
    if staying_KN is not None:
        heads, stay = np.arange(len(staying_KN))[:, None], staying_KN.shape[1]
        for part in moving:
            held[part][:, :stay] = held[part][heads, staying_KN]
        _clear(group, held, stay)
        find_pages(cache, layer, index, row, 0, stay)
        return
    first, last = group.lead, group.lead + leaving
    if group.policy.compensated:
        _compensate(cache, prefix, row, first, last)
    if group.packed and group.partner is None:  # the partner's move packed both
        pack(cache, layer, index, row, used, leaving)
    for part in moving:
        slots_KN = held[part]
        slots_KN[:, first : used - leaving] = slots_KN[:, last:used] + 0  # a copy: they overlap
    _clear(group, held, used - leaving)
    find_pages(cache, layer, index, row, 0, used - leaving)


def _clear(group: HeadGroup, held: Mapping[str, Any], used: int) -> None:
    """Slots behind the used ones have no score: new tokens add to it."""
    for name in held.keys() & group.scores.keys():
        held[name][:, used:] = 0


def _compensate(cache: CacheBuffers, prefix: str, row: int, first: int, last: int) -> None:
    """Adds slots `first` to `last` to the running mean, and puts the mean into slot 0."""
    count_K = cache.buffers[f"{prefix}.count"][row]
    for start in range(first, last, _PIECE):
        end = min(start + _PIECE, last)
        count_K += end - start
        for part in PARTS:
            left_KTD = cache.buffers[f"{prefix}.{part}"][row][:, start:end]
            mean_KD = cache.buffers[f"{prefix}.mean_{part}"][row]
            mean_KD += (numbers(left_KTD) - mean_KD[:, None]).sum(1) / count_K[:, None]
    for part in PARTS:
        slots_KND = cache.buffers[f"{prefix}.{part}"][row]
        slots_KND[:, 0] = as_slots(cache.buffers[f"{prefix}.mean_{part}"][row], slots_KND)


def _shrink(cache: CacheBuffers, prefix: str, final: dict[str, Any]) -> None:
    """Replaces a group's buffers by its final ones, one at a time."""
    for name in [name for name in cache.buffers if name.startswith(f"{prefix}.")]:
        if name not in final:
            del cache.buffers[name]  # was wanted while the prompt was read
    for name, spec in final.items():
        old = cache.buffers.get(name)
        if old is not None and tuple(old.shape) == spec.shape:
            continue  # the bulk of a packed group, which has been filled
        new = cache.make(spec)
        if old is not None:
            part = tuple(slice(0, min(a, b)) for a, b in zip(old.shape, new.shape, strict=True))
            new[part] = old[part]
        cache.buffers[name] = new


def _make_bulk(cache: CacheBuffers, final: dict[str, Any]) -> None:
    """Allocates the bulk buffers of a packed group, which were empty while its prompt was read."""
    for name, spec in final.items():
        if spec.role == "read":
            cache.buffers[name] = cache.make(spec)
