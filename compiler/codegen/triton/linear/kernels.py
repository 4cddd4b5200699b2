"""The kernels of a kind of product and how they are launched: tiles, parts, and what is too wide."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ....ir.quant.scheme import Scheme
from ..kernel import load_source
from ..starting import multiprocessors, start
from .integer_source import integer_arguments, integer_source
from .kinds import LinearKind
from .layout import Layout
from .source import arguments_beside, float_source
from .text import headed

#: The constants of a merge, and of rounding rows: numbers a program takes at a time, and how the compiler
#: shares them out.
MERGED = {"SIZE": 1024, "num_warps": 4, "num_stages": 1}


@dataclass(frozen=True)
class Tile:
    """Rows of the weight and rows of activations a program, and how the compiler shares them out.

    Chosen by what spills on sm_80, 90 and 100, compiled ahead of time; not timed on a GPU yet. Few
    rows of activations have many of the weight, since each program reads its activations again.
    """

    outs: int
    rows: int
    warps: int = 4
    stages: int = 3

    @property
    def constants(self) -> dict[str, int]:
        """What a launch asks for."""
        rows = {} if self.rows == 1 else {"ROWS": self.rows}
        return {"OUTS": self.outs, **rows, "num_warps": self.warps, "num_stages": self.stages}


#: By the most rows of activations that they are for: one takes no matrix instruction.
TILES = {1: Tile(128, 1), 16: Tile(128, 16), 64: Tile(64, 64)}
#: The same of products in float32: a step is loaded ahead, where two spill 24 bytes on sm_80 (codes in blocks
#: of 128 with zero points).
FLOAT_TILES = TILES | {16: Tile(128, 16, stages=2)}
#: The same of products of integers, which have matrix instructions for any number.
INTEGER_TILES = {16: Tile(128, 16), 64: Tile(128, 64), 128: Tile(128, 128, warps=8)}
#: Rows of activations above which a weight is widened, some rows of it at a time, and given to torch's
#: product: so many share what it costs then. An estimate.
WIDE = 512
#: Programs that a multiprocessor should have, and the most parts that a row is cut into.
_PROGRAMS, _PARTS = 4, 32


def tiles_of(kind: LinearKind) -> dict[int, Tile]:
    """The tiles of a kind, by the most rows of activations that they are for; the last is for any more.

    Products in three parts of tf32 keep the small tile: at 64 rows they spill 612 bytes on sm_90, and Triton
    3.9 makes a kernel for sm_100 that does nothing but trap.
    """
    if kind.integers:
        return INTEGER_TILES
    if kind.multiplied != "fp32":
        return TILES
    return {m: tile for m, tile in FLOAT_TILES.items() if m < 64 or kind.decoder.exact}


def tile_for(kind: LinearKind, rows: int) -> Tile:
    """The tile for so many rows of activations."""
    tiles = tiles_of(kind)
    return next((tile for most, tile in tiles.items() if rows <= most), tiles[max(tiles)])


@dataclass(frozen=True)
class LinearWeight:
    """A weight's pieces as kernels read them, [S, N, words], [G', N], [Z', N] and [N]; see `layout.py`."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None = None
    units: Tensor | None = None

    @classmethod
    def of_pieces(cls, pieces: Mapping[str, Tensor]) -> LinearWeight:
        """From the pieces by their names."""
        return cls(pieces["packed"], pieces["scales"], pieces.get("zeros"), pieces.get("units"))

    @property
    def rows(self) -> int:
        return self.codes.shape[-2]

    def at(self, index: Any) -> LinearWeight:
        """The pieces of some rows [..]: what stands for N has the shape of the index."""
        zeros = None if self.zeros is None else self.zeros[:, index]
        return LinearWeight(self.codes[:, index], self.scales[:, index], zeros)

    def of(self, place: int) -> LinearWeight:
        """One weight of a stack."""
        zeros = None if self.zeros is None else self.zeros[place]
        return LinearWeight(self.codes[place], self.scales[place], zeros)


@dataclass(frozen=True)
class LinearKernel:
    """The kernels of a kind: "matvec", "matmul" and "merge", or "quantize", "matmul" and "merge"."""

    kind: LinearKind
    source: str
    _loaded: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def name(self) -> str:
        return self.kind.name

    @property
    def functions(self) -> tuple[str, ...]:
        """The names of its functions."""
        return ("quantize" if self.kind.integers else "matvec", "matmul", "merge")

    def function(self, name: str) -> Any:
        """The Triton function, or what stands for it. Its source is this module's own text."""
        return self._loaded[name] if self._loaded else getattr(load_source(self.source), name)

    def arguments(self, name: str) -> list[str]:
        """The names of a function's arguments, without its constants."""
        integers, bias = self.kind.integers, ["bias"] if self.kind.bias else []
        if name == "quantize":
            return ["x", "inputs", "sizes", "width", "columns"]
        if name == "merge":
            scales = ["sizes", "units"] if integers else []
            return ["sums", *scales, *bias, "y", "rows", "outs", "parts"]
        given = ["x", "codes", "scales", *arguments_beside(self.kind)]
        if integers:
            given = ["inputs", "sizes", "codes", *integer_arguments(self.kind)]
        return [*given, "y", "rows", "outs", "segments", "run"]


@functools.cache
def linear_kernel(kind: LinearKind) -> LinearKernel:
    """The kernels of a kind. Raises UnsupportedError for a scheme or a type that none reads."""
    text = integer_source(kind) if kind.integers else float_source(kind)
    return LinearKernel(kind, headed(kind, text))


def product(
    kernel: LinearKernel,
    weight: LinearWeight,
    x: Tensor,
    bias: Tensor | None = None,
    parts: int | None = None,
) -> Tensor:
    """x @ w.T + bias for x [.., M], in its type; `parts` cuts columns so, None as the device wants it."""
    rows, width, outs = x.numel() // x.shape[-1], x.shape[-1], weight.rows
    layout = kernel.kind.layout(width)
    if rows * outs == 0:
        return x.new_empty((*x.shape[:-1], outs))
    integers = kernel.kind.integers
    if rows > WIDE and not integers:
        return _widened(kernel.kind, layout, weight, x, bias)
    tile = tile_for(kernel.kind, rows)
    across = (-(-outs // tile.outs), -(-rows // tile.rows))
    parts = parts or split_count(across[0] * across[1], layout.segments, x)
    run = -(-layout.segments // parts)
    parts = -(-layout.segments // run)
    y = x.new_empty((rows, outs))
    of_sums = torch.int32 if integers else torch.float32
    sums = y if parts == 1 else x.new_empty((parts, rows, outs), dtype=of_sums)
    named = _rounded(kernel, layout, x) if integers else {"x": _filled(layout, x)}
    named |= {name: piece for name, piece in vars(weight).items() if piece is not None}
    named |= {"bias": bias, "y": sums, "rows": rows, "outs": outs}
    if integers and weight.units is None:
        named["units"] = weight.scales
    numbers = {"segments": layout.segments, "run": run}
    _launch(
        kernel, "matvec" if tile.rows == 1 else "matmul", (*across, parts), named | numbers,
        WHOLE=parts == 1, **tile.constants,
    )  # fmt: skip
    if parts > 1:
        grid = (-(-(rows * outs) // MERGED["SIZE"]),)
        _launch(kernel, "merge", grid, named | {"sums": sums, "y": y, "parts": parts}, **MERGED)
    return y.reshape(*x.shape[:-1], outs)


def _launch(
    kernel: LinearKernel,
    name: str,
    grid: tuple[int, ...],
    named: Mapping[str, Any],
    **constants: Any,
) -> None:
    """Launches a function with its arguments, found by their names."""
    start(kernel.function(name), grid, [named[each] for each in kernel.arguments(name)], constants)


def _filled(layout: Layout, x: Tensor) -> Tensor:
    """The rows of x up to the end of the last segment."""
    ends = layout.segments * layout.columns - layout.width
    filled = functional.pad(x, (0, ends)) if ends else x  # nothing to fill would be a copy
    return filled.reshape(-1, filled.shape[-1]).contiguous()


def _rounded(kernel: LinearKernel, layout: Layout, x: Tensor) -> dict[str, Any]:
    """The rows of x in 8 bits, up to the end of the last segment, and their sizes."""
    rows, columns = x.numel() // layout.width, layout.segments * layout.columns
    named = {"x": x.contiguous(), "width": layout.width, "columns": columns}
    named["inputs"] = x.new_empty((rows, columns), dtype=torch.int8)
    named["sizes"] = x.new_empty(rows, dtype=torch.float32)
    _launch(kernel, "quantize", (rows,), named, **MERGED)
    return named


def split_count(programs: int, segments: int, x: Tensor) -> int:
    """How many parts fill the device, with at least two segments in each; the same for the same sizes."""
    return max(1, min(_PROGRAMS * multiprocessors(x) // programs, segments // 2, _PARTS))


def rows_of(scheme: Scheme, layout: Layout, weight: LinearWeight) -> Tensor:
    """The weights [.., width] that pieces in the order of kernels stand for, in float32."""
    named = {"packed": weight.codes, "scales": weight.scales, "zeros": weight.zeros}
    pieces = {
        name: layout.restored(name, piece.flatten(1, -2) if name == "packed" else piece.flatten(1))
        for name, piece in named.items()
        if piece is not None
    }
    rows: Tensor = scheme.dequantize(pieces, layout.width).unflatten(0, weight.scales.shape[1:])
    return rows


def _widened(
    kind: LinearKind, layout: Layout, weight: LinearWeight, x: Tensor, bias: Tensor | None
) -> Tensor:
    step = max(1, (1 << 22) // layout.width)
    parts = [
        functional.linear(
            x, rows_of(kind.scheme, layout, weight.at(slice(at, at + step))).to(x.dtype)
        )
        for at in range(0, weight.rows, step)
    ]
    out = torch.cat(parts, dim=-1)
    return out if bias is None else out + bias.to(x.dtype)
