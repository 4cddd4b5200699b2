"""Loads and stores: pointers by the strides of each rank, masks by the axes of the tile.

Coordinates of the grid, of packed rows and of the first column of a tile are added in 64 bits; only
places within one tile are 32-bit numbers, so a tensor may have any number of elements.
"""

from __future__ import annotations

from dataclasses import replace

from ....errors import UnsupportedError
from ...ir.cascade.expr import Ref
from .block import Block, Function
from .roles import ROW, STREAM
from .values import Value, union


def load(block: Block, expr: Ref) -> Value:
    """The tile of an input, loaded once ahead of the loop or once a tile."""
    kernel = block.kernel
    if expr.tensor not in kernel.plan.inputs or any(not index.rank for index in expr.indices):
        raise UnsupportedError(f"{expr.tensor} is read in a way that has no form in Triton")
    tensor = kernel.plan.inputs[expr.tensor]
    kernel.tensors[expr.tensor] = tensor
    axes = kernel.roles.axes(tensor.ranks)
    inner = kernel.depth(axes)
    home = block.home(inner)
    place = address(home, expr.tensor, tensor.ranks)
    mask = masks(kernel, axes)
    other = (
        "" if not mask else ", other=0" if kernel.types[expr.tensor] != "i1" else ", other=False"
    )
    text = f"tl.load({place}{f', mask={mask}' if mask else ''}{other})"
    kind = kernel.types[expr.tensor]
    if kind not in ("fp32", "fp16", "bf16", "i1", "i8", "u8", "i16", "i32", "i64"):
        raise UnsupportedError(f"{expr.tensor} is stored as {kind}, which kernels do not read")
    value = Value(text, axes, kind, inner)
    name = kernel.variable(expr.tensor)
    home.put(f"{name} = {value.text}")
    return replace(value, text=name)


def address(block: Block, tensor: str, ranks: tuple[str, ...]) -> str:
    """The source of a tile's addresses; what stays the same in the loop is computed ahead of it."""
    kernel = block.kernel
    ahead = block.home(0)
    axes = kernel.roles.axes(ranks)
    parts = [base(ahead, tensor, ranks).over(axes)]
    stream = kernel.roles.stream
    if stream in ranks:
        stride = kernel.stride(tensor, stream)
        offset = Value("off_t", (STREAM,), "i32", True)
        each = kernel.shared.get((tensor, stream), 1)
        if kernel.listed:
            place = kernel.index(stream).over(axes)
            place = f"({place} // {each})" if each > 1 else place
            parts.append(f"{place}.to(tl.int64) * {stride}")
        elif each > 1:
            place = f"(first + {offset.over(axes)}) // {each}"
            parts.append(f"({place}).to(tl.int64) * {stride}")
        else:
            parts.append(f"tl.cast(first, tl.int64) * {stride}")
            parts.append(f"{offset.over(axes)} * {stride}")
    for rank in ranks:
        if rank in kernel.roles.lanes:
            each = kernel.shared.get((tensor, rank), 1)
            place = kernel.index(rank).over(axes)
            place = f"({place} // {each})" if each > 1 else place
            parts.append(f"{place} * {kernel.stride(tensor, rank)}")
    return " + ".join(parts)


def base(ahead: Block, tensor: str, ranks: tuple[str, ...]) -> Value:
    """The pointer at the coordinates of the grid and, a vector then, of the rows."""
    kernel = ahead.kernel
    fixed = [rank for rank in ranks if kernel.roles.axis(rank) in (None, ROW)]
    pointer = kernel.pointer(tensor)
    if not fixed:
        return Value(pointer)
    terms = [pointer]
    for rank in fixed:
        index = kernel.index(rank).text
        terms.append(f"{index}.to(tl.int64) * {kernel.stride(tensor, rank)}")
    axes = union((ROW,), [kernel.index(rank) for rank in fixed])
    return ahead.keep(f"{kernel.variable(tensor)}_at", Value(" + ".join(terms), axes))


def masks(kernel: Function, axes: tuple[str, ...]) -> str:
    """The mask of a tile along these axes; empty where all of it is live."""
    found = []
    for axis in axes:
        live = kernel.live(axis)
        if live is not None:
            found.append(Value(live, (axis,)).over(axes))
    return " & ".join(found)


def store(block: Block, tensor: str, ranks: tuple[str, ...], value: Value) -> None:
    """Writes a tile of an output in the type that its memory has."""
    kernel = block.kernel
    axes = kernel.roles.axes(ranks)
    place = address(block, tensor, ranks)
    pointer = kernel.pointer(tensor)
    mask = masks(kernel, axes)
    text = value.over(axes) if value.axes else value.text
    if not value.axes and axes:
        text = f"tl.full({shape(kernel, axes)}, {value.text}, tl.float32)"
    block.put(
        f"tl.store({place}, ({text}).to({pointer}.dtype.element_ty){f', mask={mask}' if mask else ''})"
        if value.axes or axes
        else f"tl.store({place}, {text})"
    )


def shape(kernel: Function, axes: tuple[str, ...]) -> str:
    """The shape of a tile, as source."""
    sizes = {ROW: "ROWS", STREAM: "STREAM"}
    parts = [sizes.get(axis, "") or str(kernel.padded(axis)) for axis in axes]
    return f"[{', '.join(parts)}]"
