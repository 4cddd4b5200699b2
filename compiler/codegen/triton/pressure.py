"""An estimate of the registers that a tile takes, so that tiles are chosen which do not spill.

    values     states, scores, and what is made of keys and values element by element
    operands   the sides of matrix products that stay in registers, by the instruction that takes them

    mma.sync   takes both sides from registers: each warp holds the whole of its rows and of its columns
    wgmma      reads both sides from shared memory, unless they are made in registers
    tcgen05    the same, and leaves results in a memory of its own
    no matrix instruction (exact float32): sides come from shared memory piece by piece, but what is made
               in registers stays there along the whole of the summed axis

A float32 product as three of tf32 ("tf32x3") splits each side into two in registers, whatever takes them.
The factors were fitted to what `ptxas` of Triton 3.9 reports for kernels of head size 128 at many tiles; they
are wrong by some tens of registers, which is why the limits on spills (`limits.py`) are not 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from .options import Device, Tiles
from .roles import ROW, STREAM, Division
from .values import WHOLE

#: Values a thread that leave room for addresses and loop counters, as a share of the device's registers.
_VALUES = 0.73
#: Values and operands a thread: operands are taken in pieces where the assembler finds that it must.
_ROOM = 260
#: Registers for an operand in tf32x3 beside one in tf32: two halves, and the rest while it is split.
_SPLIT = 2.3
#: Of that, what is left when it is split ahead of the loop, or has been counted whole already.
_HALVES = 2.0 / 2.3
#: Share of a loaded operand of mma.sync that is in registers at a time.
_PIECE = 0.25
#: Streamed matrices that the assembler takes one by one, and registers for each number of one beyond them.
_MATRICES, _BEYOND = 7, 1.2
#: The same for a float32 matrix whose rows begin anywhere: it is loaded number by number, by an address each.
_SCATTERED = 5.0
#: How often a result of tcgen05 is in registers while three products are summed.
_RESULTS = 3.5


@dataclass(frozen=True)
class Product:
    """A matrix product: the axes of its sides, the bytes of a number, the way in which float32 is taken.

    `split` says that it is three products of tf32, `exact` that it has no matrix instruction; `still` that
    the left side stays as it is from tile to tile, `made` that the right one is computed and not loaded.
    """

    left: tuple[str, str]
    right: tuple[str, str]
    width: int
    still: bool
    made: bool = False
    split: bool = False
    exact: bool = False


@dataclass(frozen=True)
class Demand:
    """What a kernel holds beside states and scores: axes of tiles with how often, and products.

    `scattered` names inputs whose rows are no multiple of 16 numbers, so that they are not loaded in vectors.
    """

    held: tuple[tuple[tuple[str, ...], int], ...] = ()
    products: frozenset[Product] = frozenset()
    scattered: frozenset[str] = frozenset()


def lane(size: int) -> int:
    """A size of lanes as a tile has it: a power of two that matrix instructions take."""
    return max(16, 1 << (size - 1).bit_length())


def elements(sizes: Mapping[str, int], axes: Iterable[str], tile: Tiles) -> int:
    """Numbers in a tile along axes."""
    count = 1
    for axis in axes:
        count *= {ROW: tile.rows, STREAM: tile.stream}.get(axis) or lane(sizes[axis])
    return count


def holds(
    division: Division,
    types: Mapping[str, str],
    sizes: Mapping[str, int],
    demand: Demand,
    device: Device,
    tile: Tiles,
) -> bool:
    """Whether a tile is expected to fit the registers."""
    found = values(division, types, sizes, demand, tile)
    if found > device.registers_a_thread * _VALUES:
        return False
    return found + operands(sizes, demand, device, tile, found) <= _ROOM


def values(
    division: Division,
    types: Mapping[str, str],
    sizes: Mapping[str, int],
    demand: Demand,
    tile: Tiles,
) -> float:
    """Registers a thread for states, scores and what is computed element by element."""
    plan, roles = division.plan, division.roles
    live: float = sum(elements(sizes, roles.axes(s.ranks), tile) for s in plan.states)
    # Scores are alive beside the weights made of them.
    live += 2 * tile.rows * tile.stream if any(s.over for s in plan.stream) else 0
    # What is made of keys element by element stands beside the keys themselves.
    for item in plan.stream:
        axes = roles.axes(item.ranks)
        if STREAM in axes and set(axes) & set(roles.lanes):
            live += 2 * elements(sizes, axes, tile)
    wide = any(product.split or product.exact for product in demand.products)
    matrices = 0
    for name, tensor in plan.inputs.items():
        axes = roles.axes(tensor.ranks)
        if STREAM not in axes or not set(axes) & set(roles.lanes):
            continue
        matrices += 1
        # Integers become floats in registers ahead of a product; operands of float32 are counted as such.
        if not wide and types[name] in WHOLE:
            live += elements(sizes, axes, tile)
        # With 16 rows none was seen to spill, however many there are (GEAR has 14).
        if wide and matrices > _MATRICES and tile.rows > 16:
            live += _BEYOND * elements(sizes, axes, tile)
        if wide and name in demand.scattered:
            live += _SCATTERED * elements(sizes, axes, tile)
    # Masks and biases come in another layout than scores have, and wait in registers to be turned.
    pairs = [t for t in plan.inputs.values() if {ROW, STREAM} <= set(roles.axes(t.ranks))]
    live += 2 * len(pairs) * tile.rows * tile.stream
    live += sum(count * elements(sizes, axes, tile) for axes, count in demand.held)
    return live / (tile.warps * 32)


def operands(
    sizes: Mapping[str, int], demand: Demand, device: Device, tile: Tiles, values: float
) -> float:
    """Registers a thread for the sides of products: those that stay, and the most that one product adds."""
    stay, most = 0.0, 0.0
    for product in demand.products:
        if product.exact:
            most = max(most, _exact(sizes, product, tile, values))
            continue
        rows = elements(sizes, product.left[:1], tile)
        still, moving = _sides(sizes, product, device, tile, rows)
        stay += still
        most = max(most, moving)
    return stay + most


def _exact(sizes: Mapping[str, int], product: Product, tile: Tiles, values: float) -> float:
    """Registers for both sides of a product without matrix instructions."""
    if not product.made:
        return 2 * values
    results = elements(sizes, (product.left[0], product.right[1]), tile) / (tile.warps * 32)
    return max(1.0, results) * elements(sizes, product.left[1:], tile)


def _sides(
    sizes: Mapping[str, int], product: Product, device: Device, tile: Tiles, rows: int
) -> tuple[float, float]:
    """Registers for a left side that stays, and for what comes with each tile."""
    words = product.width / 4 * (_SPLIT if product.split else 1.0)
    left = elements(sizes, product.left, tile) * words
    right = elements(sizes, product.right, tile) * words
    scores = set(product.left) == {ROW, STREAM}
    if not device.asynchronous or rows < 64:
        down = min(tile.warps, max(1, rows // 16))
        left, right = left / (32 * down), right / (32 * (tile.warps // down))
        part = 1.0 if product.split else _PIECE
    elif product.split:
        threads = 32 * tile.warps
        results = _RESULTS * elements(sizes, (product.left[0], product.right[1]), tile) / threads
        if device.capability >= 100:
            left, right = left / threads, right / threads + results
        else:
            return _grouped(product, tile, rows, left, right)
        part = 1.0
    else:
        return 0.0, 0.0
    if product.still:
        return left, part * right
    return 0.0, part * (right + (0.0 if scores else left))


def _grouped(
    product: Product, tile: Tiles, rows: int, left: float, right: float
) -> tuple[float, float]:
    """Registers for the split sides of wgmma, which takes 64 rows a group of four warps."""
    groups = tile.warps // 4
    if groups > rows // 64:
        # Groups that share rows hold about twice as much, and do twice the products.
        left, right = 2 * left, 2 * right
    left, right = left / (128 * min(groups, rows // 64)) * _HALVES, right / (32 * tile.warps)
    return (left, right) if product.still else (0.0, left + right)
