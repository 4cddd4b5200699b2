"""Checks generated kernels against float64 on a CUDA device, and times them beside their peers.

    python -m benchmarks.gpu.attention [--model Llama-3-8B] [--dtype bf16] [--tune] [--out FILE]

Nothing here has run on a GPU yet: it was written, and its parts without a device were tested, on CPUs.
Prints for each model and shape the error, the time, the share of the measured copy bandwidth (decode) or
of the measured matrix rate (prefill), and the time of each peer as a ratio.
"""

from __future__ import annotations

import argparse
import datetime
import math
import platform
import sys
from pathlib import Path

import torch
from torch import Tensor

from einfold.compiler.codegen.torch_plan import run_plan
from einfold.compiler.codegen.triton import Kernel, Options, generate
from einfold.compiler.codegen.triton.launch import DTYPES, TYPES
from einfold.compiler.codegen.triton.options import DEVICES
from einfold.compiler.codegen.triton.tune import autotune
from einfold.compiler.explain import CascadeReport, explain_function

from .clock import Clock, copy_bandwidth, matrix_rate
from .forms import MODELS, SHAPES, Model, Shape, function_of, inputs_of, work
from .peers import peers

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
    capability = torch.cuda.get_device_capability()[0] * 10 if device == "cuda" else 90
    target = DEVICES.get(capability, DEVICES[80])
    kernel = generate(plan, types, report.imported.sizes, Options(device=target))
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


def error_of(model: Model, shape: Shape, dtype: torch.dtype) -> float:
    """The largest error against float64, relative to the largest value; at most 1024 queries."""
    if not shape.decode:
        shape = Shape(1, min(shape.queries, 1024), min(shape.keys, 1024))
    report, kernel, given, _ = prepared(model, shape, "cuda", dtype)
    exact = {name: x.double() for name, x in given.items()}
    expected = run_plan(kernel.plan, exact, report.imported.sizes)
    worst = 0.0
    for parts in (None, 1, 3):
        found = kernel(given, parts=parts)
        for name, value in expected.items():
            error = (found[name].double() - value).abs().max() / value.abs().max()
            worst = max(worst, float(error) if math.isfinite(float(error)) else math.inf)
    return worst


def measure(
    model: Model,
    shape: Shape,
    dtype: torch.dtype,
    clock: Clock,
    bandwidth: float,
    rate: float,
    tune: bool,
) -> str:
    """One row of the table."""
    wrong = error_of(model, shape, dtype)
    name = TYPES[dtype]
    verdict = f"{wrong:.1e}" if wrong <= TOLERANCE[name] else f"**{wrong:.1e}**"
    _, kernel, given, inputs = prepared(model, shape, "cuda", dtype)
    tiles = autotune(kernel, given, clock)[0] if tune else kernel.tiles
    taken = clock(lambda: kernel(given, tiles=tiles))
    moved, done = work(model, shape)
    share = moved / taken * 1e6 / bandwidth if shape.decode else done / taken * 1e6 / rate
    beside = []
    for peer, run in peers(model, shape, inputs).items():
        try:
            beside.append(f"{peer} {clock(run) / taken:.2f}x")
        except Exception as error:
            beside.append(f"{peer}: {str(error).strip().splitlines()[0][:60]}")
        torch.cuda.empty_cache()
    what = "decode" if shape.decode else "prefill"
    size = f"{tiles.rows} x {tiles.stream}, {tiles.warps} warps"
    return (
        f"| {model.name} | {what} {shape.batch} x {shape.queries} x {shape.keys} | {verdict} | {taken:.0f} "
        f"| {share:.0%} | {size} | {'; '.join(beside)} |"
    )


def main() -> int:
    """Runs the benchmark; without a CUDA device it says so and measures nothing."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", help="only models whose name begins with this")
    parser.add_argument("--dtype", default="bf16", choices=sorted(TOLERANCE))
    parser.add_argument("--tune", action="store_true", help="time the tiles of a shortlist first")
    parser.add_argument("--out", type=Path, help="write the table here as well")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print(
            "No CUDA device was found, so nothing was measured. This benchmark needs one.",
            file=sys.stderr,
        )
        return 1
    import triton

    clock, dtype = Clock(), DTYPES[options.dtype]
    bandwidth, rate = copy_bandwidth(clock), matrix_rate(clock, dtype)
    lines = [
        f"# Attention on {torch.cuda.get_device_name()}",
        "",
        f"{datetime.date.today()}, torch {torch.__version__}, Triton {triton.__version__}, Python "
        f"{platform.python_version()}, {options.dtype}. Copy {bandwidth / 1e12:.2f} TB/s, matrix product "
        f"{rate / 1e12:.0f} TFLOP/s, both measured here. Shares are of these: of the copy for decode, of the "
        "product for prefill. A peer at 1.20x takes 1.20 times as long.",
        "",
        "| model | batch x queries x keys | error | µs | share | tiles | peers |",
        "|---|---|---|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    for model in MODELS:
        for shape in SHAPES:
            if model.name.startswith(options.model or ""):
                lines.append(measure(model, shape, dtype, clock, bandwidth, rate, options.tune))
                print(lines[-1], flush=True)
    if options.out is not None:
        options.out.write_text("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
