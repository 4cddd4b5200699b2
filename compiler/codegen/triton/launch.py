"""Launching a kernel: sizes from the inputs, what torch does ahead and after, the grid and the parts."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ....errors import UnsupportedError
from ...ir.cascade.cascade import Statement
from ...ir.cascade.expr import Apply, Const, Expr, Pos, Size, reads, walk
from ..reference.plan import TorchStatements
from .dtypes import DTYPES, TYPES, output_type
from .emit import Generated
from .gates import reads_inputs
from .kernel import Kernel
from .options import Tiles, merge_tiles
from .starting import multiprocessors, start


def launch(
    kernel: Kernel,
    inputs: Mapping[str, Tensor],
    *,
    parts: int | None = None,
    dtypes: Mapping[str, torch.dtype] | None = None,
    tiles: Tiles | None = None,
    sizes: Mapping[str, int] | None = None,
) -> dict[str, Tensor]:
    """The plan's outputs by name for inputs over its ranks, strided in any way.

    `parts` splits the stream (None: as many as fill the device); `dtypes` gives the outputs' types
    where they are not the inputs' (float32 for those without lanes); `sizes` those of ranks that no
    input has. Raises UnsupportedError for sizes or types that the kernel was not made for.
    """
    dtypes = dtypes or {}
    sizes = _sizes(kernel, inputs, sizes or {})
    tensors = ahead(kernel, inputs, sizes)
    found = within(kernel, tensors, sizes, parts=parts, dtypes=dtypes, tiles=tiles)
    return after(kernel, inputs, tensors, found, sizes, dtypes)


def ahead(
    kernel: Kernel, inputs: Mapping[str, Tensor], sizes: Mapping[str, int]
) -> dict[str, Tensor]:
    """The inputs, and what torch computes ahead of the kernel."""
    plan, division = kernel.plan, kernel.division
    if not division.ahead:
        return dict(inputs)
    virtual = {name: rank.virtual for name, rank in plan.ranks.items() if rank.virtual}
    device = next(iter(inputs.values())).device
    beside = TorchStatements(sizes, virtual, DTYPES[kernel.dot], device)
    for name in _read(division.ahead) & set(plan.inputs):
        beside.give(name, plan.inputs[name].ranks, inputs[name])
    beside.run(division.ahead)
    return {**inputs, **{item.name: beside.real(item.name) for item in division.ahead}}


def within(
    kernel: Kernel,
    tensors: Mapping[str, Tensor],
    sizes: Mapping[str, int],
    *,
    parts: int | None = None,
    dtypes: Mapping[str, torch.dtype] | None = None,
    tiles: Tiles | None = None,
) -> dict[str, Tensor]:
    """What the kernel itself gives, by name, of the inputs and of what was computed ahead."""
    found = results(kernel, sizes, next(iter(tensors.values())).device, dtypes or {})
    _run(kernel, tensors, found, sizes, tiles or kernel.tiles, parts)
    return found


def results(
    kernel: Kernel,
    sizes: Mapping[str, int],
    device: torch.device,
    dtypes: Mapping[str, torch.dtype],
) -> dict[str, Tensor]:
    """Memory for what the kernel gives."""
    return {
        name: torch.empty(
            [sizes[rank] for rank in kernel.division.plan.ranks_of(name)],
            dtype=dtypes.get(name) or output_type(kernel, name),
            device=device,
        )
        for name in kernel.division.outputs
    }


def _read(items: Iterable[Statement]) -> set[str]:
    """What statements read: nothing else is given to torch, which would widen what is stored in halves."""
    return {read.tensor for item in items for read in reads(item.expr)}


def after(
    kernel: Kernel,
    inputs: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    found: Mapping[str, Tensor],
    sizes: Mapping[str, int],
    dtypes: Mapping[str, torch.dtype],
) -> dict[str, Tensor]:
    """The plan's outputs, of what the kernel gives and of what torch computes behind it."""
    plan, division = kernel.plan, kernel.division
    if not division.after:
        return {name: found[name] for name in plan.outputs}
    virtual = {name: rank.virtual for name, rank in plan.ranks.items() if rank.virtual}
    late = TorchStatements(sizes, virtual, torch.float32, next(iter(inputs.values())).device)
    done = {item.name for item in division.ahead}
    left = [item for item in (*plan.before, *division.after) if item.name not in done]
    for given, declared in ((tensors, division.plan.inputs), (inputs, plan.inputs)):
        for name in _read(left) & set(declared):
            late.give(name, declared[name].ranks, given[name])
    for name, value in found.items():
        late.give(name, division.plan.ranks_of(name), value.float())
    late.run(left)
    made = {item.name for item in division.after}
    rest = {
        name: late.real(name).to(dtypes.get(name) or DTYPES[kernel.dot])
        for name in plan.outputs
        if name in made
    }
    return {name: rest[name] if name in rest else found[name] for name in plan.outputs}


def _sizes(
    kernel: Kernel, inputs: Mapping[str, Tensor], known: Mapping[str, int]
) -> dict[str, int]:
    sizes = {r.name: int(r.extent) for r in kernel.plan.ranks.values() if r.extent.isdigit()}
    shown: dict[str, int] = dict(known)
    for name, declared in kernel.plan.inputs.items():
        tensor = inputs[name]
        if tensor.ndim != len(declared.ranks):
            raise UnsupportedError(f"{name} has {tensor.ndim} dimensions, not {declared.ranks}")
        stored = TYPES.get(tensor.dtype)
        if stored != kernel.types[name]:
            raise UnsupportedError(
                f"{name} is {tensor.dtype}; the kernel was made for {kernel.types[name]}"
            )
        for rank, length in zip(declared.ranks, tensor.shape, strict=True):
            size = length * kernel.shared.get((name, rank), 1)
            if shown.setdefault(rank, size) != size:
                raise UnsupportedError(f"{name}: {rank} is {size}, elsewhere {shown[rank]}")
    for lane in kernel.division.roles.lanes:
        if shown.get(lane, kernel.sizes[lane]) != kernel.sizes[lane]:
            raise UnsupportedError(
                f"{lane} is {shown[lane]}; the kernel was made for {kernel.sizes[lane]}"
            )
    return {**kernel.sizes, **sizes, **shown}


def _run(
    kernel: Kernel,
    tensors: Mapping[str, Tensor],
    found: Mapping[str, Tensor],
    sizes: Mapping[str, int],
    tiles: Tiles,
    parts: int | None,
) -> None:
    roles = kernel.division.roles
    rows = math.prod(sizes[rank] for rank in roles.rows)
    programs = math.prod(sizes[rank] for rank in roles.grid)
    if rows * programs == 0:
        return
    grid = (-(-rows // tiles.rows) if roles.rows else 1, programs)
    length = sizes[roles.stream]
    if parts is None:
        parts = split_count(kernel, grid[0] * grid[1], length, tiles, next(iter(tensors.values())))
    compiler = {"num_warps": tiles.warps, "num_stages": tiles.stages, "enable_fp_fusion": True}
    whole = {"ROWS": tiles.rows, "STREAM": tiles.stream}
    if parts == 1:
        function = kernel.functions["whole"]
        values = _arguments(kernel, function, tensors, found, {}, sizes)
        start(kernel.function("whole"), grid, values, {**whole, **compiler})
        return
    left = _parts(kernel, parts, programs, rows, next(iter(tensors.values())).device)
    values = _arguments(kernel, kernel.functions["part"], tensors, found, left, sizes)
    cut = {"PARTS": parts, **whole, **compiler}
    start(kernel.function("part"), (grid[0], grid[1], parts), values, cut)
    values = _arguments(kernel, kernel.functions["merge"], tensors, found, left, sizes)
    merge = merge_tiles(tiles)
    merging = (-(-rows // merge.rows) if roles.rows else 1, programs)
    options = {"num_warps": merge.warps, "num_stages": merge.stages, "enable_fp_fusion": True}
    start(
        kernel.function("merge"), merging, values, {"PARTS": parts, "ROWS": merge.rows, **options}
    )


def split_count(kernel: Kernel, programs: int, length: int, tiles: Tiles, tensor: Tensor) -> int:
    """How many parts fill the device, with at least two tiles of the stream in each."""
    count = multiprocessors(tensor)
    if not count or programs * 2 > count:
        return 1
    most = max(1, length // (2 * tiles.stream))
    return 1 << (min(-(-2 * count // programs), most, 128).bit_length() - 1)


def _parts(
    kernel: Kernel, parts: int, programs: int, rows: int, device: torch.device
) -> dict[str, Tensor]:
    roles = kernel.division.roles
    found = {}
    for argument in kernel.functions["part"].arguments:
        if argument.kind == "part":
            axes = roles.axes(kernel.division.plan.ranks_of(argument.of))
            lanes = math.prod(kernel.sizes[axis] for axis in axes if axis in roles.lanes)
            count = parts * programs * lanes * (rows if set(roles.rows) and "row" in axes else 1)
            found[argument.of] = torch.empty(count, dtype=torch.float32, device=device)
    return found


def _arguments(
    kernel: Kernel,
    function: Generated,
    tensors: Mapping[str, Tensor],
    found: Mapping[str, Tensor],
    parts: Mapping[str, Tensor],
    sizes: Mapping[str, int],
) -> list[Any]:
    values: list[Any] = []
    for argument in function.arguments:
        if argument.kind in ("input", "output"):
            values.append((tensors if argument.kind == "input" else found)[argument.of])
        elif argument.kind == "part":
            values.append(parts[argument.of])
        elif argument.kind == "extent":
            values.append(sizes[argument.of])
        elif argument.kind == "skip":
            values.append(int(every_row_lives(kernel, sizes)))
        else:
            tensor = found[argument.of] if argument.of in found else tensors[argument.of]
            ranks = kernel.division.plan.ranks_of(argument.of)
            values.append(tensor.stride(ranks.index(argument.rank)))
    return values


def every_row_lives(kernel: Kernel, sizes: Mapping[str, int]) -> bool:
    """Whether each row has a coordinate within all bounds, so that finite masks remove what they hide.

    Bounds are linear in the coordinates of rows, so it is enough to look at the corners.
    """
    found = kernel.functions["whole"].bounds
    length = sizes[kernel.division.roles.stream]
    if length == 0 or any(reads_inputs(bound.value) for bound in found):
        return False
    ranks = sorted({p.rank for b in found for p in walk(b.value) if isinstance(p, Pos)})
    for corner in itertools.product(*((0, sizes[rank] - 1) for rank in ranks)):
        at = dict(zip(ranks, corner, strict=True))
        low = [0.0] + [_number(b.value, at, sizes) for b in found if not b.upper]
        high = [length - 1.0] + [_number(b.value, at, sizes) for b in found if b.upper]
        if max(low) > min(high):
            return False
    return True


def _number(expr: Expr, at: Mapping[str, int], sizes: Mapping[str, int]) -> float:
    if isinstance(expr, Const):
        return float(expr.value)
    if isinstance(expr, Pos):
        return float(at[expr.rank])
    if isinstance(expr, Size):
        return float(sizes[expr.rank])
    assert isinstance(expr, Apply)
    args = [_number(arg, at, sizes) for arg in expr.args]
    if expr.op == "neg":
        return -args[0]
    return {"add": args[0] + args[-1], "sub": args[0] - args[-1], "mul": args[0] * args[-1]}[
        expr.op
    ]
