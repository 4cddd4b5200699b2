"""Checks products with stored weights against float64 on a CUDA device, and times them beside their peers.

    python -m benchmarks.gpu.linear [--dtype fp16] [--scheme grouped(bits=4] [--out FILE]

Nothing here has run on a GPU yet: it was written, and its parts without a device were tested, on CPUs.
Prints for each scheme, shape and number of rows the error of what is timed, the time on the device, the time
that the host needs to launch it, the share of the roofline (the bytes that must be moved, at the bandwidth of
a copy), the parts that columns were cut into, and the time of each peer as a ratio.
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
    LinearKernel,
    LinearWeight,
    linear_kernel,
    product,
    split_count,
    tile_for,
)
from einfold.compiler.codegen.triton.linear.kinds import LinearKind
from einfold.compiler.ir.quant.scheme import SCHEMES, Scheme, read_scheme
from einfold.compiler.ir.types import DTYPES as STORED

from .clock import Clock, copy_bandwidth
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
)
#: Rows and columns of Llama-3-8B's weights: query and output, up and gate, down, head.
SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336), (128256, 4096))
#: Rows of activations: one token, and as many as are decoded side by side.
ROWS = (1, 4, 16, 64, 256)
#: Relative to the largest value, against float64.
TOLERANCE = {"fp16": 4e-3, "bf16": 3e-2, "fp32": 1e-5}


def schemes(begin: str = "") -> list[Scheme]:
    """What is measured, of those whose text begins so."""
    known = [read_scheme(text) for text in WANTED if text.partition("(")[0] in SCHEMES]
    return [each for each in known if decoder_of(each) and str(each).startswith(begin)]


def random_pieces(scheme: Scheme, shape: tuple[int, int], device: str) -> dict[str, Tensor]:
    """Pieces of a weight that no solver was asked for: any codes, scales near 2^-8."""
    found = {}
    for name, (size, kind) in scheme.pieces(shape).items():
        if STORED[kind].is_floating_point:
            found[name] = (torch.rand(size, device=device) / 256).to(STORED[kind])
        else:
            low, high = (117, 121) if name == "scales" else (0, 256)
            found[name] = torch.randint(low, high, size, dtype=STORED[kind], device=device)
    return found


def ready(kind: LinearKind, pieces: dict[str, Tensor], width: int) -> LinearWeight:
    """Pieces in the order that kernels load."""
    layout = kind.layout(width)
    made = {name: layout.repacked(name, piece) for name, piece in pieces.items()}
    return LinearWeight(made["packed"], made["scales"], made.get("zeros"))


def moved(scheme: Scheme, shape: tuple[int, int], rows: int, itemsize: int) -> int:
    """Bytes that must be read and written: the stored weight once, activations, results."""
    outs, width = shape
    return scheme.nbytes(shape) + rows * (outs + width) * itemsize


def error_of(
    kernel: LinearKernel, weight: LinearWeight, pieces: dict[str, Tensor], x: Tensor, found: Tensor
) -> float:
    """The largest error of the first and last 128 results, relative to the largest value."""
    scheme, worst, outs = kernel.kind.scheme, 0.0, weight.rows
    for place in (slice(0, 128), slice(max(0, outs - 128), outs)):
        exact = scheme.dequantize(scheme.chosen(pieces, place), x.shape[-1]).double()
        expected = x.double() @ exact.T
        error = float((found[:, place].double() - expected).abs().max() / expected.abs().max())
        worst = max(worst, error if math.isfinite(error) else math.inf)
    return worst


@dataclass(frozen=True)
class Bench:
    """What all rows share: the clock, the type, and the bytes a second that a copy moves."""

    clock: Clock
    dtype: torch.dtype
    bandwidth: float

    def rows(self, scheme: Scheme, shape: tuple[int, int]) -> list[str]:
        """The rows of the table for a weight; what fails stands in its place with the reason."""
        found = []
        for rows in ROWS:
            torch.compiler.reset()
            torch.cuda.empty_cache()
            name = f"{scheme} | {shape[0]} x {shape[1]} | {rows}"
            try:
                found.append(f"| {name} | {self._measured(scheme, shape, rows)} |")
            except Exception as error:
                found.append(f"| {name} | {first_line(error)} | | | | | |")
        return found

    def _measured(self, scheme: Scheme, shape: tuple[int, int], rows: int) -> str:
        (outs, width), kind = shape, LinearKind(scheme, TYPES[self.dtype])
        kernel, pieces = linear_kernel(kind), random_pieces(scheme, shape, "cuda")
        weight = ready(kind, pieces, width)
        x = torch.randn(rows, width, device="cuda", dtype=self.dtype)

        def run() -> Tensor:
            return product(kernel, weight, x)

        wrong = error_of(kernel, weight, pieces, x, run())
        verdict = f"{wrong:.1e}" if wrong <= TOLERANCE[kind.type] else f"**{wrong:.1e}**"
        taken, host = self.clock(run), self.clock.host(run)
        most = moved(scheme, shape, rows, self.dtype.itemsize) / self.bandwidth * 1e6
        tile = tile_for(kind, rows)
        programs = -(-outs // tile.outs) * -(-rows // tile.rows)
        parts = split_count(programs, kind.layout(width).segments, x)
        others = beside(peers(shape, x), lambda make: self.clock(make()), taken)
        return f"{verdict} | {taken:.1f} | {host:.0f} | {most / taken:.0%} | {parts} | {others}"


def heading(bench: Bench, name: str) -> list[str]:
    """What stands above the rows: the device, the versions, the date, what is a share of what."""
    return [
        f"# Products with stored weights on {name}",
        "",
        f"{versions()}, {TYPES[bench.dtype]}. Copy {bench.bandwidth / 1e12:.2f} TB/s, measured.",
        "",
        "Times are medians on the device with L2 flushed, without the host's launch, which stands beside "
        "them. The roofline is the bytes of the stored weight, activations and results at the copy's "
        "bandwidth. A peer at 1.20x takes 1.20 times as long.",
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
    bench = Bench(clock, DTYPES[options.dtype], copy_bandwidth(clock))
    table = Table("linear", options.dtype, options.out)
    table.add(*heading(bench, torch.cuda.get_device_name()))
    for scheme in schemes(options.scheme):
        for shape in SHAPES:
            table.add(*bench.rows(scheme, shape))
    return 0


if __name__ == "__main__":
    sys.exit(main())
