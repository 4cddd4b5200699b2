"""Checks products with stored weights against float64 on a CUDA device, and times them beside their peers.

    python -m benchmarks.gpu.linear [--dtype fp16] [--scheme grouped(bits=4] [--out FILE]

Nothing here has run on a GPU yet: it was written, and its parts without a device were tested, on CPUs.
Prints for each scheme, shape and number of rows the error of what is timed, the time on the device, the time
that the host needs to launch it, the share of the roofline (the bytes that must be moved, at the bandwidth of
a copy, or the operations at the rate of a large product of the same type, whichever takes longer), the parts
that columns were cut into, and the time of each peer as a ratio. Behind " x int8" activations are rounded to
8 bits, within what is timed.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from einfold.compiler.codegen.triton.dtypes import DTYPES, TYPES
from einfold.compiler.codegen.triton.linear.decoder import decoder_of
from einfold.compiler.codegen.triton.linear.kernels import (
    LinearWeight,
    linear_kernel,
    product,
    split_count,
    tile_for,
)
from einfold.compiler.codegen.triton.linear.kinds import INT8, LinearKind
from einfold.compiler.ir.ops import einfold_ops
from einfold.compiler.ir.quant.scheme import SCHEMES, Scheme, read_scheme
from einfold.compiler.ir.types import DTYPES as STORED

from .clock import Clock, copy_bandwidth, matrix_rate
from .linear_peers import peers
from .table import Table, beside, first_line, has_device, versions

#: Those that this einfold has and that a kernel reads are measured.
WANTED = (
    "grouped(bits=8,block=128,symmetric=1)",
    "grouped(bits=4,block=128,symmetric=1)",
    "grouped(bits=4,block=32,symmetric=1)",
    "grouped(bits=4,block=128,symmetric=0)",
    "grouped(bits=2,block=64,symmetric=1)",
    "nf4(block=64)",
    "mxfp4",
    "grouped(bits=8,block=0) x int8",
    "grouped(bits=4,block=0) x int8",
    "qserve(block=128) x int8",
)
#: Rows and columns of Llama-3-8B's weights: query and output, up and gate, down, head.
SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336), (128256, 4096))
#: Rows of activations: one token, as many as are decoded side by side, and a prompt, of which products of
#: floats would be torch's.
ROWS = (1, 4, 16, 64, 256)
PROMPT = 2048
#: Relative to the largest value, against float64.
TOLERANCE = {"fp16": 4e-3, "bf16": 3e-2, "fp32": 1e-5}


@dataclass(frozen=True)
class Form:
    """A scheme, and whether its products are of integers."""

    scheme: Scheme
    integers: bool

    def __str__(self) -> str:
        return f"{self.scheme}{' x int8' if self.integers else ''}"

    @property
    def rows(self) -> tuple[int, ...]:
        """How many rows of activations are measured."""
        return (*ROWS, PROMPT) if self.integers else ROWS

    def kind(self, dtype: str) -> LinearKind:
        """The kind of its products."""
        return LinearKind(self.scheme, dtype, product=INT8 if self.integers else "")

    def read(self, x: Tensor) -> Tensor:
        """What is multiplied of activations, in float64."""
        return (einfold_ops.round_to_int8(x.float()) if self.integers else x).double()


def forms(begin: str = "") -> list[Form]:
    """What is measured, of those whose text begins so."""
    known = [text for text in WANTED if text.partition("(")[0].partition(" ")[0] in SCHEMES]
    cut = [text.partition(" x ") for text in known]
    made = [Form(read_scheme(scheme), bool(rounded)) for scheme, _, rounded in cut]
    return [
        each
        for each in made
        if decoder_of(each.scheme, each.integers) and str(each).startswith(begin)
    ]


def random_pieces(scheme: Scheme, shape: tuple[int, int], device: str) -> dict[str, Tensor]:
    """Pieces of a weight that no solver was asked for: any codes, scales near 2^-8, or integers with which
    none leaves int8."""
    found = {}
    integers = (1, 9) if scheme.integer_rows else (117, 121)
    for name, (size, kind) in scheme.pieces(shape).items():
        if STORED[kind].is_floating_point:
            found[name] = (torch.rand(size, device=device) / 256).to(STORED[kind])
        else:
            low, high = integers if name == "scales" else (0, 256)
            found[name] = torch.randint(low, high, size, dtype=STORED[kind], device=device)
    return found


def ready(kind: LinearKind, pieces: dict[str, Tensor], width: int) -> LinearWeight:
    """Pieces in the order that kernels load."""
    layout = kind.layout(width)
    made = {name: layout.repacked(name, piece) for name, piece in pieces.items()}
    return LinearWeight.of_pieces(made)


def moved(scheme: Scheme, shape: tuple[int, int], rows: int, itemsize: int) -> int:
    """Bytes that must be read and written: the stored weight once, activations, results."""
    outs, width = shape
    return scheme.nbytes(shape) + rows * (outs + width) * itemsize


def error_of(form: Form, pieces: dict[str, Tensor], x: Tensor, found: Tensor) -> float:
    """The largest error of the first and last 128 results, relative to the largest value."""
    scheme, worst, outs = form.scheme, 0.0, found.shape[-1]
    for place in (slice(0, 128), slice(max(0, outs - 128), outs)):
        exact = scheme.dequantize(scheme.chosen(pieces, place), x.shape[-1]).double()
        expected = form.read(x) @ exact.T
        error = float((found[:, place].double() - expected).abs().max() / expected.abs().max())
        worst = max(worst, error if math.isfinite(error) else math.inf)
    return worst


@dataclass(frozen=True)
class Bench:
    """What all rows share: the clock, the type, the bytes a second that a copy moves, and the operations a
    second of large products of that type and of integers."""

    clock: Clock
    dtype: torch.dtype
    bandwidth: float
    rate: float
    integer_rate: float

    def rows(self, form: Form, shape: tuple[int, int]) -> list[str]:
        """The rows of the table for a weight; what fails stands in its place with the reason."""
        found = []
        for rows in form.rows:
            torch.compiler.reset()
            torch.cuda.empty_cache()
            name = f"{form} | {shape[0]} x {shape[1]} | {rows}"
            try:
                found.append(f"| {name} | {self._measured(form, shape, rows)} |")
            except Exception as error:
                found.append(f"| {name} | {first_line(error)} | | | | | |")
        return found

    def least(self, form: Form, shape: tuple[int, int], rows: int) -> float:
        """Microseconds by the roofline."""
        rate = self.integer_rate if form.integers else self.rate
        bytes_moved = moved(form.scheme, shape, rows, self.dtype.itemsize)
        return max(bytes_moved / self.bandwidth, 2 * rows * math.prod(shape) / rate) * 1e6

    def _measured(self, form: Form, shape: tuple[int, int], rows: int) -> str:
        (outs, width), kind = shape, form.kind(TYPES[self.dtype])
        kernel, pieces = linear_kernel(kind), random_pieces(form.scheme, shape, "cuda")
        weight = ready(kind, pieces, width)
        x = torch.randn(rows, width, device="cuda", dtype=self.dtype)

        def run() -> Tensor:
            return product(kernel, weight, x)

        wrong = error_of(form, pieces, x, run())
        verdict = f"{wrong:.1e}" if wrong <= TOLERANCE[kind.type] else f"**{wrong:.1e}**"
        taken, host = self.clock(run), self.clock.host(run)
        least = self.least(form, shape, rows)
        tile = tile_for(kind, rows)
        programs = -(-outs // tile.outs) * -(-rows // tile.rows)
        parts = split_count(programs, kind.layout(width).segments, x)
        others = beside(peers(shape, x, form.integers), lambda make: self.clock(make()), taken)
        return f"{verdict} | {taken:.1f} | {host:.0f} | {least / taken:.0%} | {parts} | {others}"


def heading(bench: Bench, name: str) -> list[str]:
    """What stands above the rows: the device, the versions, the date, what is a share of what."""
    return [
        f"# Products with stored weights on {name}",
        "",
        f"{versions()}, {TYPES[bench.dtype]}. Copy {bench.bandwidth / 1e12:.2f} TB/s, products "
        f"{bench.rate / 1e12:.0f} and of int8 {bench.integer_rate / 1e12:.0f} tera-operations a second, "
        "measured.",
        "",
        "Times are medians on the device with L2 flushed, without the host's launch, which stands beside "
        "them. The roofline is the bytes of the stored weight, activations and results at the copy's "
        "bandwidth, or the operations at the rate of a large product, whichever takes longer. A peer at "
        "1.20x takes 1.20 times as long.",
        "",
        "| scheme | weight | rows | error | µs | host µs | roofline | parts | peers |",
        "|---|---|---|---|---|---|---|---|---|",
    ]


def main() -> int:
    """Runs the benchmark; without a CUDA device it says so and measures nothing."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--scheme", default="", help="only schemes whose text begins with this")
    parser.add_argument("--dtype", default="fp16", choices=sorted(TOLERANCE))
    parser.add_argument("--out", type=Path, help="where the table goes")
    options = parser.parse_args()
    if not has_device():
        return 1
    clock = Clock()
    dtype = DTYPES[options.dtype]
    rates = [matrix_rate(clock, each) for each in (dtype, torch.int8)]
    bench = Bench(clock, dtype, copy_bandwidth(clock), *rates)
    table = Table("linear", options.dtype, options.out)
    table.add(*heading(bench, torch.cuda.get_device_name()))
    for form in forms(options.scheme):
        for shape in SHAPES:
            table.add(*bench.rows(form, shape))
    return 0


if __name__ == "__main__":
    sys.exit(main())
