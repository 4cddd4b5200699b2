"""Tile sizes from a model of cost: shared/cascades' rule, searched under the device's capacities.

For b_p rows and b_m streamed coordinates a tile, each streamed byte is read once for every b_p rows, so
rows should be many; what they need on the chip bounds them. b_m stays as small as the matrix instruction
allows, but each tile rescales the accumulators once, which is traded against it. Source: The I/O
Complexity of Attention (2024), as `Z`-word blocks; FuseMax for the rescaling.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from .options import Device, Tiles
from .pressure import Demand, elements, holds, lane
from .roles import ROW, STEP, STREAM, Division
from .values import BYTES

#: Relative costs of one byte from L2, one multiply-add of a matrix product, one rescaled number and one
#: turn of the loop for one row tile. Only their order of magnitude matters to the choice.
_BYTE, _PRODUCT, _RESCALE, _TURN = 1.0, 1 / 64, 1 / 16, 256.0


def choose_tiles(
    division: Division,
    types: Mapping[str, str],
    sizes: Mapping[str, int],
    demand: Demand,
    device: Device,
) -> Tiles:
    """The cheapest tile that fits; the smallest where none is known to fit."""
    found = [
        (cost(division, types, sizes, tile), tile.rows, tile.stream, tile)
        for tile in candidates()
        if fits(division, types, sizes, demand, device, tile)
    ]
    return min(found, key=lambda item: item[:3])[3] if found else Tiles(16, 16, 8, 1)


def candidates() -> list[Tiles]:
    """What autotuning and the model choose from."""
    found = []
    for rows in (16, 32, 64, 128):
        for stream in (16, 32, 64, 128):
            for warps in (4, 8)[rows == 128 :]:
                found += [Tiles(rows, stream, warps, stages) for stages in (2, 3)]
    return found


def fits(
    division: Division,
    types: Mapping[str, str],
    sizes: Mapping[str, int],
    demand: Demand,
    device: Device,
    tile: Tiles,
) -> bool:
    """Whether a tile fits the registers, and its streamed operands the shared memory."""
    sizes = {**sizes, **{rank: min(sizes[rank], STEP) for rank in division.roles.walked}}
    if not holds(division, types, sizes, demand, device, tile):
        return False
    plan, roles = division.plan, division.roles
    shared = 0
    for name, tensor in plan.inputs.items():
        axes = roles.axes(tensor.ranks)
        if len(axes) < 2:
            continue
        size = elements(sizes, axes, tile) * BYTES[types[name]]
        shared += size * (tile.stages if STREAM in axes else 1)
    return shared <= device.shared_bytes * 0.9


def cost(
    division: Division, types: Mapping[str, str], sizes: Mapping[str, int], tile: Tiles
) -> float:
    """The model's cost of one program's share of the grid, in bytes of traffic."""
    plan, roles = division.plan, division.roles
    rows = math.prod(sizes.get(rank, 1) for rank in roles.rows)
    length = sizes.get(plan.rank, 1)
    streamed = 0.0
    for name, tensor in plan.inputs.items():
        axes = roles.axes(tensor.ranks)
        if STREAM in axes:
            lanes = math.prod(sizes[axis] for axis in axes if axis not in (ROW, STREAM))
            streamed += lanes * BYTES[types[name]] * (tile.rows if ROW in axes else 1)
    lanes = sum(
        math.prod(lane(sizes[a]) for a in roles.axes(s.ranks) if a != ROW) for s in plan.states
    )
    turns = math.ceil(length / tile.stream)
    products, read = _walked(division, types, sizes, tile)
    streamed += products * _PRODUCT
    work = turns * tile.stream * (streamed * _BYTE + 2 * tile.rows * lanes * _PRODUCT)
    work += turns * read * _BYTE
    rescales = turns * (tile.rows * lanes * _RESCALE + _TURN)
    # Deeper pipelines hide latency, which short streams do not have.
    depth = 1.0 if tile.stages == (3 if turns > 4 else 2) else 1.02
    # More warps than the tile has work for wait for each other.
    depth *= 1.05 if tile.warps == 8 and tile.rows < 128 else 1.0
    return math.ceil(rows / tile.rows) * (work + rescales) * depth


def _walked(
    division: Division, types: Mapping[str, str], sizes: Mapping[str, int], tile: Tiles
) -> tuple[float, float]:
    """Multiply-adds of walked sums a streamed coordinate, and the bytes a tile that they read beside it."""
    roles = division.roles

    def count(axes: Sequence[str]) -> int:
        return math.prod(
            tile.rows if axis == ROW else sizes[axis] for axis in axes if axis != STREAM
        )

    sums = [item for item in division.plan.stream if roles.walk(item)]
    products = sum(count(roles.axes([*item.ranks, *item.over])) for item in sums)
    beside = {
        name: axes
        for name, tensor in division.plan.inputs.items()
        if set(axes := roles.axes(tensor.ranks)) & set(roles.walked) and STREAM not in axes
    }
    return products, sum(count(axes) * BYTES[types[name]] for name, axes in beside.items())
