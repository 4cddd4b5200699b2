"""Arenas of every tiny architecture of the tests: `python -m benchmarks.memory_plans [--json] [NAME ...]`.

For a token, and for chunks of 64 and of 256 tokens, over a cache for 256, logits behind the last:

- apart: the peak of live bytes with attention as one operator, every result that is no view a new buffer and
  the calls as they were captured;
- peak: the same with results in place, the calls in the best order and stretches in tiles, and whether the
  order is proved;
- arena: what packing it takes, which should be the peak;
- ms: milliseconds of the processor for the order, for choosing tiles, and for the plan of what came of it;
- torch: the arena that the reference runs in, with all that its operators compute on their way, its peak, and
  the milliseconds of expanding and planning it.

It ends with 1 where an arena is larger than its peak.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from einfold.compiler.driver import open_model, trace
from einfold.compiler.ir.program import Program
from einfold.compiler.memory.order import best_order
from einfold.compiler.memory.planning import plan_memory
from einfold.compiler.memory.survey import inputs_at, survey
from einfold.compiler.memory.tiling import planned, tiled
from einfold.compiler.passes.memory.order_calls import arrange
from einfold.compiler.recipe import Recipe
from tests import models

from .report import table

#: New tokens of a step, by what it is.
STEPS = {"decode": 1, "prefill": 64, "long": 256}
CONTEXT = 256


@dataclass(frozen=True)
class Row:
    """What came of one step of one model."""

    model: str
    step: str
    apart: int
    peak: int
    proved: bool
    arena: int
    seconds: tuple[float, float, float]
    torch_arena: int
    torch_peak: int
    torch_seconds: float

    @property
    def saved(self) -> float:
        return 1 - self.peak / self.apart


def measure(name: str, step: str, program: Program) -> Row:
    """Plans a step of a program, whose calls end in the order in which they stood."""
    assert program.layout is not None
    sizes = {"B": 1, "S": STEPS[step], "N": 1} | program.layout.slot_dims(CONTEXT, CONTEXT)
    inputs = inputs_at(program, sizes)
    own = [node for node in program.graph.nodes if node.op == "call_function"]
    apart = plan_memory(program, inputs, in_place=False)
    started = time.process_time()
    order = best_order(program, survey(program, inputs))
    arrange(program, order.nodes)
    ordered = time.process_time()
    cut = tiled(program, inputs)
    chosen = time.process_time()
    plan = plan_memory(cut, inputs)
    done = time.process_time()
    _, inner = planned(program, inputs)
    expanded = time.process_time()
    arrange(program, own)
    return Row(
        name,
        step,
        apart.bound,
        plan.bound,
        order.proved,
        plan.arena,
        (ordered - started, chosen - ordered, done - chosen),
        inner.arena,
        inner.bound,
        expanded - done,
    )


def traced(name: str, folder: Path) -> Program:
    """A model's program, its calls as they were captured."""
    models.save(name, folder)
    program, _ = trace(open_model(folder), Recipe.model_validate({"target": "reference"}))
    return program


def main() -> int:
    known = [*models.CONFIGS, *models.SHARING]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(known)}")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.names or known:
            program = traced(name, Path(folder) / name)
            for step in STEPS:
                measure(name, step, program)  # once before, for what torch makes on first use
                rows.append(measure(name, step, program))
    if arguments.json:
        print(json.dumps([asdict(row) for row in rows], indent=1))
    else:
        head = ["model", "step", "apart", "peak", "saved", "arena", "ms", "torch", "peak", "ms"]
        print(table(head, [cells(row) for row in rows]))
    fits = all(row.arena == row.peak and row.torch_arena == row.torch_peak for row in rows)
    return 0 if fits else 1


def cells(row: Row) -> list[str]:
    """A row of the table."""
    peak = f"{row.peak:,}" if row.proved else f"{row.peak:,} (not proved)"
    return [
        row.model,
        row.step,
        f"{row.apart:,}",
        peak,
        f"{row.saved:.0%}",
        f"{row.arena:,}",
        " ".join(f"{1000 * seconds:.0f}" for seconds in row.seconds),
        f"{row.torch_arena:,}",
        f"{row.torch_peak:,}",
        f"{1000 * row.torch_seconds:.0f}",
    ]


if __name__ == "__main__":
    sys.exit(main())
