"""Checks generated kernels against float64 on a CUDA device, and times them beside their peers.

    python -m benchmarks.gpu.attention [--model Llama-3-8B] [--dtype bf16] [--tune] [--out FILE]

Nothing here has run on a GPU yet: it was written, and its parts without a device were tested, on CPUs.
Prints for each model and shape the error of what is timed, the time on the device, the time that the host
needs to launch it, the share of the measured copy bandwidth (decode) or of the measured matrix rate
(prefill), and the time of each peer as a ratio. The table also goes to benchmarks/results, row by row.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from einfold.compiler.codegen.reference.plan import run_plan
from einfold.compiler.codegen.triton.device import described
from einfold.compiler.codegen.triton.dtypes import DTYPES, TYPES
from einfold.compiler.codegen.triton.generate import generate
from einfold.compiler.codegen.triton.kernel import Kernel
from einfold.compiler.codegen.triton.launch import launch
from einfold.compiler.codegen.triton.options import Options, Tiles
from einfold.compiler.codegen.triton.tune import autotune
from einfold.compiler.fuse.explain import CascadeReport, explain_function
from einfold.compiler.ir.cascade.expr import Pos, Size, Virtual, walk
from einfold.compiler.ir.cascade.plan import Plan

from .clock import Clock, copy_bandwidth, matrix_rate
from .forms import MODELS, SHAPES, Model, Shape, function_of, inputs_of, work
from .peers import peers
from .table import Table, beside, first_line, has_device, versions

#: Relative to the largest value, against float64: the types' own rounding and a little more.
TOLERANCE = {"fp16": 4e-3, "bf16": 3e-2}


def prepared(
    model: Model, shape: Shape, device: str, dtype: torch.dtype
) -> tuple[CascadeReport, Kernel, dict[str, Tensor], tuple[Tensor, ...]]:
    """The folding and the kernel of a model's attention at a shape, its inputs by rank and as they were."""
    inputs = inputs_of(model, shape, device, dtype)
    traced = [torch.empty(x.shape, dtype=x.dtype) for x in inputs]
    report = explain_function(function_of(model, shape), traced)
    (plan,) = report.folding.plans
    given = by_rank(report, inputs)
    types = {name: TYPES[given[name].dtype] for name in plan.inputs}
    options = Options(device=described(torch.device(device)))
    kernel = generate(plan, types, report.imported.sizes, options)
    return report, kernel, given, inputs


def by_rank(report: CascadeReport, inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """The plan's inputs: the function's, dimensions cut into ranks."""
    names = list(dict.fromkeys(binding.node for binding in report.imported.inputs))
    places = {name: at for at, name in enumerate(_sorted(names))}
    sizes = report.imported.sizes
    return {
        binding.name: inputs[places[binding.node]].reshape(
            [sizes[rank] for dim in binding.dims for rank in dim]
        )
        for binding in report.imported.inputs
    }


def _sorted(names: list[str]) -> list[str]:
    """q, k, v and then what else there is, in the order of the function's parameters."""
    first = [name for name in ("q", "k", "v") if name in names]
    return first + sorted((n for n in names if n not in first), key=lambda n: (len(n), n))


def free_ranks(kernel: Kernel) -> list[str]:
    """The ranks of the grid and of rows whose coordinates are apart from each other: heads, batch."""
    plan, roles = kernel.plan, kernel.division.roles
    items = (*plan.before, *plan.stream, *plan.finish, *plan.emit)
    exprs = [*(item.expr for item in items), *(state.body for state in plan.states)]
    placed = {
        part.rank for e in exprs for part in walk(e) if isinstance(part, (Pos, Size, Virtual))
    }
    return [rank for rank in (*roles.grid, *roles.rows) if rank not in placed]


def _cut(plan: Plan, values: dict[str, Tensor], ranks: list[str], last: bool) -> dict[str, Tensor]:
    found = {}
    for name, value in values.items():
        for at, rank in enumerate(plan.ranks_of(name)):
            if rank in ranks:
                value = value.narrow(at, value.shape[at] - 1 if last else 0, 1)
        found[name] = value
    return found


def error_of(
    report: CascadeReport, kernel: Kernel, given: dict[str, Tensor], tiles: Tiles
) -> float:
    """The largest error against float64 of what is timed, relative to the largest value.

    Looked at are the first and the last head of the first and last row of the batch, at all queries:
    float64 scores of all heads would not fit. Whole, in three parts, and as it is launched.
    """
    plan, ranks = kernel.plan, free_ranks(kernel)
    sizes = {**report.imported.sizes, **dict.fromkeys(ranks, 1)}
    worst = 0.0
    for last in (False, True):
        exact = {n: x.double() for n, x in _cut(plan, given, ranks, last).items()}
        expected = run_plan(plan, exact, sizes)
        for parts in (None, 1, 3):
            found = _cut(plan, launch(kernel, given, parts=parts, tiles=tiles), ranks, last)
            for name, value in expected.items():
                error = float((found[name].double() - value).abs().max() / value.abs().max())
                worst = max(worst, error if math.isfinite(error) else math.inf)
    return worst


@dataclass(frozen=True)
class Bench:
    """What all rows share: the clock, the type, bytes and operations a second of the device, the search."""

    clock: Clock
    dtype: torch.dtype
    bandwidth: float
    rate: float
    tune: bool

    def row(self, model: Model, shape: Shape) -> str:
        """One row of the table; what fails stands in its place with the reason."""
        # Compiled peers are kept by their code, which all models share: too many, and eager mode is run.
        torch.compiler.reset()
        torch.cuda.empty_cache()
        what = "decode" if shape.decode else "prefill"
        name = f"{model.name} | {what} {shape.batch} x {shape.queries} x {shape.keys}"
        try:
            return f"| {name} | {self._measured(model, shape)} |"
        except Exception as error:
            return f"| {name} | {first_line(error)} | | | | | |"

    def _measured(self, model: Model, shape: Shape) -> str:
        report, kernel, given, inputs = prepared(model, shape, "cuda", self.dtype)
        tiles = autotune(kernel, given, self.clock)[0] if self.tune else kernel.tiles

        def run() -> object:
            return launch(kernel, given, tiles=tiles)

        wrong = error_of(report, kernel, given, tiles)
        verdict = f"{wrong:.1e}" if wrong <= TOLERANCE[TYPES[self.dtype]] else f"**{wrong:.1e}**"
        torch.cuda.empty_cache()
        taken, host = self.clock(run), self.clock.host(run)
        moved, done = work(model, shape)
        most = moved / self.bandwidth if shape.decode else done / self.rate
        others = beside(peers(model, shape, inputs, self.tune), self.clock, taken)
        size = f"{tiles.rows} x {tiles.stream}, {tiles.warps} warps"
        share = most * 1e6 / taken
        return f"{verdict} | {taken:.0f} | {host:.0f} | {share:.0%} | {size} | {others}"


def heading(bench: Bench, name: str) -> list[str]:
    """What stands above the rows: the device, the versions, the date, what is a share of what."""
    return [
        f"# Attention on {name}",
        "",
        f"{versions()}, {TYPES[bench.dtype]}, tiles "
        f"{'searched, as those of peers' if bench.tune else 'by the cost model'}. Copy "
        f"{bench.bandwidth / 1e12:.2f} TB/s, matrix product {bench.rate / 1e12:.0f} TFLOP/s, both measured.",
        "",
        "Times are medians on the device with L2 flushed, without the host's launch, which stands beside "
        "them. Shares are of the copy for decode, of the product for prefill. A peer at 1.20x takes 1.20 "
        "times as long.",
        "",
        "| model | batch x queries x keys | error | µs | host µs | share | tiles | peers |",
        "|---|---|---|---|---|---|---|---|",
    ]


def main() -> int:
    """Runs the benchmark; without a CUDA device it says so and measures nothing."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", help="only models whose name begins with this")
    parser.add_argument("--dtype", default="bf16", choices=sorted(TOLERANCE))
    parser.add_argument("--tune", action="store_true", help="time the tiles of a shortlist first")
    parser.add_argument("--out", type=Path, help="where the table goes")
    options = parser.parse_args()
    if not has_device():
        return 1
    clock, dtype = Clock(), DTYPES[options.dtype]
    bench = Bench(clock, dtype, copy_bandwidth(clock), matrix_rate(clock, dtype), options.tune)
    table = Table("attention", options.dtype, options.out)
    table.add(*heading(bench, torch.cuda.get_device_name()))
    for model in MODELS:
        for shape in SHAPES:
            if model.name.startswith(options.model or ""):
                table.add(bench.row(model, shape))
    return 0


if __name__ == "__main__":
    sys.exit(main())
