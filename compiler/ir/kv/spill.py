"""Which slots of a cache may lie in a file while other layers run, and what of them stays in memory.

    slots of a row and head   0 .. stored - 1            stored .. held - 1       held .. C - 1
                              in the file, for good      the tail, in memory      nothing yet

Tokens are only added behind others, so a slot is written once: when `TAIL` of them have come, all but the
newest few go to the file together. What moves between steps is never spilled: groups that let tokens go,
pack them or put them in another order stay in memory, and so does what is no slot (statistics of pages,
scores).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from .layout import PARTS, Buffer, CacheLayout, LayerCache
from .sizes import Size

#: Tokens of a row whose slots go to the file together; so many stay in memory at most.
TAIL = 64

#: Layers whose slots are in memory at once: one that runs, and one that is read meanwhile.
STAGES = 2

#: Bytes that places in the file, and in a stage, are a multiple of, as direct reads want them.
_PAGE = 4096


def spillable(layout: CacheLayout) -> list[LayerCache]:
    """The layers with slots that may lie in a file, in order."""
    return [layer for layer in layout.layers if any(spilled_buffers(layer, 1, 1))]


def spilled_buffers(layer: LayerCache, batch: Size, capacity: Size) -> Iterator[Buffer]:
    """The buffers of a layer that may lie in a file, [B, K, C, D] each."""
    for index, group in enumerate(layer.groups):
        moves = group.moves or group.exact or group.reader.reorders
        if group.owner is None and group.partner is None and not moves:
            for buffer in layer.group_buffers(index, batch, capacity):
                if buffer.name.rpartition(".")[2] in PARTS:
                    yield buffer


def stage_bytes(buffers: Iterable[Buffer]) -> int:
    """Bytes of memory that a layer's slots take while it runs: each buffer in whole pages, and one to spare
    where its first slot lies within one."""
    return sum(_whole_pages(int(buffer.bytes())) + _PAGE for buffer in buffers)


def file_bytes(buffers: Iterable[Buffer]) -> int:
    """Bytes of the file that a layer's slots take."""
    return sum(_whole_pages(int(buffer.bytes())) for buffer in buffers)


def tail_bytes(buffers: Iterable[Buffer]) -> int:
    """Bytes of the newest tokens, which stay in memory."""
    found = 0
    for buffer in buffers:
        slots = int(buffer.shape[2])
        found += int(buffer.bytes()) // slots * min(slots, TAIL)
    return found


def resident_bytes(
    layout: CacheLayout, spilled: Iterable[int], batch: int, capacity: int, prompt: int | None
) -> int:
    """The most bytes of memory that a cache takes while a prompt is read and continued, where the slots of
    some layers are `spilled`: all others, the tails, and the stages."""
    whole = layout.bytes(batch, capacity)
    if prompt is not None:
        whole = layout.peak_bytes(batch, capacity, prompt)
    layers = [list(spilled_buffers(layout[layer], batch, capacity)) for layer in spilled]
    slots = sum(int(buffer.bytes()) for layer in layers for buffer in layer)
    stage = max(map(stage_bytes, layers), default=0)
    return int(whole) - slots + sum(map(tail_bytes, layers)) + min(STAGES, len(layers)) * stage


def _whole_pages(size: int) -> int:
    return -(-size // _PAGE) * _PAGE
