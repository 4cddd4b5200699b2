"""Where a program works: its coordinates, and the stretch of the stream that any of its rows can need.

Bounds on the streamed coordinate come from the plan's masks (`gates.py`); here they are taken over the rows
of the tile, so that tiles in which nothing counts are never loaded.
"""

from __future__ import annotations

from collections.abc import Sequence

from .block import Block, Function
from .gates import Bound
from .roles import ROW


def places(kernel: Function, reverse: bool) -> list[str]:
    """Lines for the coordinates of a program; `reverse` starts with the last rows."""
    roles = kernel.roles
    lines = ["program = tl.program_id(1)"] if roles.grid else []
    for at in range(len(roles.grid) - 1, -1, -1):
        rank = roles.grid[at]
        index = kernel.index(rank).text
        if at:
            size = kernel.extent(rank).text
            lines += [f"{index} = program % {size}", f"program = program // {size}"]
        else:
            lines.append(f"{index} = program")
    if roles.rows:
        lines += _rows(kernel, reverse)
    for lane in roles.lanes:
        if lane in roles.walked:
            continue
        lines.append(f"{kernel.index(lane).text} = tl.arange(0, {kernel.padded(lane)})")
    return lines


def _rows(kernel: Function, reverse: bool) -> list[str]:
    rows = kernel.roles.rows
    total = " * ".join(kernel.extent(rank).text for rank in rows)
    # Under a causal mask the last rows see the most keys: they start first.
    tile = "(tl.num_programs(0) - 1 - tl.program_id(0))" if reverse else "tl.program_id(0)"
    lines = [f"row = {tile} * ROWS + tl.arange(0, ROWS)", f"live_row = row < {total}"]
    rest = "row"
    for at in range(len(rows) - 1, -1, -1):
        size = kernel.extent(rows[at]).text
        lines.append(f"{kernel.index(rows[at]).text} = {rest}" + (f" % {size}" if at else ""))
        rest = f"{rest} // {size}" if rest == "row" else f"({rest}) // {size}"
    return lines


def stretch(head: Block, found: Sequence[Bound], split: bool, end: str = "") -> bool:
    """Puts the first and last coordinate of a program; whether it asks if finite masks may be skipped.

    `end` is the source of what stands behind the last one, the size of the stream where it is empty.
    """
    kernel = head.kernel
    asks = False
    head.put("start = 0")
    head.put(f"end = {end or kernel.extent(kernel.roles.stream).text}")
    for bound in found:
        value = head.value(bound.value)
        text = value.text.removesuffix(".0") if value.type == "const" else value.text
        if value.axes:
            edge = -(2**31) if bound.upper else 2**31 - 1
            reach = f"tl.where(live_row, {value.over((ROW,), 0)}, {edge})"
            text = f"tl.{'max' if bound.upper else 'min'}({reach}, 0)"
        name = "end" if bound.upper else "start"
        new = f"tl.minimum(end, {text} + 1)" if bound.upper else f"tl.maximum(start, {text})"
        if bound.finite:
            asks = True
            new = f"tl.where(skip != 0, {new}, {name})"
        head.put(f"{name} = {new}")
    if found:
        head.put("start = start // STREAM * STREAM")
        head.put("end = tl.maximum(start, end)")
    if split:
        head.put("part = tl.program_id(2)")
        head.put("share = tl.cdiv(tl.cdiv(end - start, STREAM), PARTS) * STREAM")
        head.put("stop = end")
        head.put("start = start + part * share")
        head.put("end = tl.maximum(start, tl.minimum(stop, start + share))")
    return asks
