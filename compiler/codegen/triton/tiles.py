"""Tile sizes from a model of cost: shared/cascades' rule, searched under the device's capacities.

For b_p rows and b_m streamed coordinates a tile, each streamed byte is read once for every b_p rows, so
rows should be many; what they need on the chip bounds them. b_m stays as small as the matrix instruction
allows, but each tile rescales the accumulators once, which is traded against it. Source: The I/O
Complexity of Attention (2024), as `Z`-word blocks; FuseMax for the rescaling.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from .options import Device, Tiles
from .roles import ROW, STREAM, Division
from .values import BYTES, WHOLE

#: Relative costs of one byte from L2, one multiply-add of a matrix product, one rescaled number and one
#: turn of the loop for one row tile. Only their order of magnitude matters to the choice.
_BYTE, _PRODUCT, _RESCALE, _TURN = 1.0, 1 / 64, 1 / 16, 256.0


def choose_tiles(
    division: Division,
    types: Mapping[str, str],
    sizes: Mapping[str, int],
    cubes: Iterable[tuple[str, ...]],
    device: Device,
) -> Tiles:
    """The cheapest tile that fits; the smallest where none is known to fit."""
    found = [
        (cost(division, types, sizes, tile), tile.rows, tile.stream, tile)
        for tile in candidates()
        if fits(division, types, sizes, cubes, device, tile)
    ]
    return min(found, key=lambda item: item[:3])[3] if found else Tiles(16, 16, 4, 1)


def candidates() -> list[Tiles]:
    """What autotuning and the model choose from."""
    found = []
    for rows in (16, 32, 64, 128):
        for stream in (16, 32, 64, 128):
            for warps in (4, 8)[rows == 128 :]:
                found += [Tiles(rows, stream, warps, stages) for stages in (2, 3)]
    return found


def _lane(size: int) -> int:
    return max(16, 1 << (size - 1).bit_length())


def _elements(
    division: Division, sizes: Mapping[str, int], axes: Iterable[str], tile: Tiles
) -> int:
    count = 1
    for axis in axes:
        count *= {ROW: tile.rows, STREAM: tile.stream}.get(axis) or _lane(sizes[axis])
    return count


def fits(
    division: Division,
    types: Mapping[str, str],
    sizes: Mapping[str, int],
    cubes: Iterable[tuple[str, ...]],
    device: Device,
    tile: Tiles,
) -> bool:
    """Whether a tile's accumulators fit the registers and its streamed operands the shared memory."""
    plan, roles = division.plan, division.roles
    threads = tile.warps * 32
    live = sum(_elements(division, sizes, roles.axes(s.ranks), tile) for s in plan.states)
    # Scores are alive beside the weights made of them.
    live += 2 * tile.rows * tile.stream if any(s.over for s in plan.stream) else 0
    # What is made of keys element by element stands beside the keys themselves.
    for item in plan.stream:
        axes = roles.axes(item.ranks)
        if STREAM in axes and set(axes) & set(roles.lanes):
            live += 2 * _elements(division, sizes, axes, tile)
    for name, tensor in plan.inputs.items():
        axes = roles.axes(tensor.ranks)
        # Integers become floats in registers ahead of a product.
        if types[name] in WHOLE and STREAM in axes and set(axes) & set(roles.lanes):
            live += _elements(division, sizes, axes, tile)
    # Masks and biases come in another layout than scores have, and wait in registers to be turned.
    pairs = [t for t in plan.inputs.values() if {ROW, STREAM} <= set(roles.axes(t.ranks))]
    live += 2 * len(pairs) * tile.rows * tile.stream
    cube = max((_elements(division, sizes, axes, tile) for axes in cubes), default=0)
    if (live + 2 * cube) / threads > device.registers_a_thread * 0.7:
        return False
    shared = 0
    for name, tensor in plan.inputs.items():
        axes = roles.axes(tensor.ranks)
        if len(axes) < 2:
            continue
        size = _elements(division, sizes, axes, tile) * BYTES[types[name]]
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
        math.prod(_lane(sizes[a]) for a in roles.axes(s.ranks) if a != ROW) for s in plan.states
    )
    turns = math.ceil(length / tile.stream)
    work = turns * tile.stream * (streamed * _BYTE + 2 * tile.rows * lanes * _PRODUCT)
    rescales = turns * (tile.rows * lanes * _RESCALE + _TURN)
    # Deeper pipelines hide latency, which short streams do not have.
    depth = 1.0 if tile.stages == (3 if turns > 4 else 2) else 1.02
    # More warps than the tile has work for wait for each other.
    depth *= 1.05 if tile.warps == 8 and tile.rows < 128 else 1.0
    return math.ceil(rows / tile.rows) * (work + rescales) * depth
