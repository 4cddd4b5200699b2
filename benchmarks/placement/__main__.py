"""einfold's placements beside baselines, a lower bound and the exact optimum.

    python -m benchmarks.placement [--cases TEXT ..] [--random N] [--artifacts FOLDER ..] [--seconds N]
                                   [--rows] [--json]

For each case, budget and device it prints the seconds of a step by einfold's plan, in the simulator that runs
all of them (simulator.py), as a ratio to

- bound: the longer of computing and of reading what memory has no room for, (W - C) / bandwidth, where C is
  all that the budget leaves for weights and cache. No window is taken off it, so that nothing can be faster,
  whatever it holds when;
- optimum: what the plan takes that moves the fewest bytes, by CP-SAT, where parts of super-ops may stay and
  any layers' slots may be spilled;
- whole: the same of the fastest plan whose super-ops stay whole or not at all; of small cases, by running
  all.

Baselines are told as a ratio to einfold: above 1 where einfold is faster. Each is told by its least, median
and largest over budgets and devices, the bound where the disk takes all of the step; `--rows` prints each
plan. Nothing is loaded or run, and the figures depend on no machine. `--cases` takes beginnings of names;
artifacts are compiled ones, for real cuts.
A question mark stands where CP-SAT did not prove in its seconds that no plan moves fewer bytes. It ends with
1 where einfold takes a thousandth longer than a baseline that has its constraints, or half a percent more
than the optimum.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from statistics import median

from einfold.compiler.memory.placing import every_spill, least_plan, place, spilling
from einfold.compiler.memory.tiers import Load, step_of

from ..report import table
from .baselines import BASELINES, measured, unplaced
from .cases import BUDGETS, DEVICES, SHAPES, Case, cut_of, random_case, shaped
from .exact import Found, bound, cp_sat, fastest
from .simulator import of_plan, seconds

#: Baselines that are free of what binds einfold's plans.
FREE = ("rotating",)

#: Parts of a step that are none: of rounding, and beside an optimum that may spill slots where weights alone
#: could be streamed.
_NONE, _BESIDE = 1e-3, 5e-3

#: Super-ops of which all plans are run.
SMALL = 10


@dataclass(frozen=True)
class Row:
    """A case within a budget, on a device; seconds of a step."""

    case: str
    part: float
    """Of the way from the least budget to one that holds all."""
    device: str
    seconds: float
    bound: float
    disk: float
    """Of the step's seconds those that the disk reads."""
    optimum: float | None
    whole: float | None
    proved: bool
    """Whether CP-SAT says that no plan moves fewer bytes."""
    moved: int
    optimum_moved: int | None
    spilled: int
    """Layers of the cache that lie in a file."""
    baselines: dict[str, float | None]

    @property
    def good(self) -> bool:
        others = [s for name, s in self.baselines.items() if name not in FREE and s is not None]
        faster = all(self.seconds <= other * (1 + _NONE) for other in others)
        return faster and (self.optimum is None or self.seconds <= self.optimum * (1 + _BESIDE))


def of_mode(case: Case) -> Load:
    """What is placed, in the case's way alone."""
    return (
        replace(case.load, pieces=case.load.paged) if case.paged else replace(case.load, paged=())
    )


def budgets(case: Case) -> Iterator[tuple[float, int]]:
    """Parts of the way from the least to all, and bytes."""
    load = of_mode(case)
    low = min(least_plan(spilling(load, spill)).peak for spill in (None, *every_spill(load)))
    every = unplaced(load, 0, case.paged)
    high = replace(every, pinned=frozenset(piece.name for piece in every.pieces)).peak
    for part in BUDGETS:
        yield part, int(low + part * (high - low))


def rows_of(case: Case, part: float, budget: int, limit: float) -> Iterator[Row]:
    """One case within a budget, on each device."""
    load, optima = of_mode(case), dict[int | None, Found | None]()
    for name, device in DEVICES.items():
        plan = place(load, budget, device)
        if plan.beside not in optima and limit and not case.routed:
            optima[plan.beside] = cp_sat(load, budget, case.paged, case.paged, limit, plan.beside)
        found = optima.get(plan.beside)
        small = len(plan.pieces) <= SMALL and plan.spill is None
        yield Row(
            case.name,
            part,
            name,
            seconds(of_plan(plan, device), told=20),
            bound(load, budget, device),
            step_of(plan, device).disk,
            None if found is None else seconds(of_plan(found.plan, device), told=20),
            fastest(load, budget, case.paged, device, plan.beside) if small else None,
            found is not None and found.proved,
            plan.moved,
            None if found is None else found.plan.moved,
            len(plan.spill.layers) if plan.spill is not None else 0,
            {
                other: measured(other, load, budget, case.paged, device, plan.beside)
                for other in BASELINES
            },
        )


def cases(names: list[str], randoms: int, artifacts: list[Path]) -> Iterator[Case]:
    for name in tuple(SHAPES):
        for weights in ("int4", "fp32"):
            yield shaped(name, weights)
        yield shaped(name, "int4", paged=False)
        yield shaped(name, "int4", 16384)
    for folder in artifacts:
        yield cut_of(folder)
    for seed in range(randoms):
        yield random_case(seed)


def cells(row: Row) -> list[str]:
    """A row of the table of all."""

    def ratio(other: float | None) -> str:
        return "" if other is None else f"{other / row.seconds:.2f}"

    return [
        row.case,
        f"{row.part:.2f}",
        f"{row.seconds:.3f}",
        f"{row.seconds / row.bound:.3f}",
        ""
        if row.optimum is None
        else f"{row.seconds / row.optimum:.3f}{'' if row.proved else '?'}",
        "" if row.whole is None else f"{row.seconds / row.whole:.3f}",
        *(ratio(row.baselines[name]) for name in BASELINES),
        str(row.spilled or ""),
    ]


def summary(rows: Sequence[Row]) -> str:
    """A row for each case, and one for all random cases of a kind: ranges over budgets and devices, and
    medians between."""
    groups = dict[str, list[Row]]()
    for row in rows:
        name = re.sub(r"random \d+", "random", row.case)
        groups.setdefault(name, []).append(row)
    lines = []
    for name, group in groups.items():
        bounds = [row.seconds / row.bound for row in group if row.disk > 0.98 * row.seconds]
        optima = [row.seconds / row.optimum for row in group if row.optimum is not None]
        whole = [row.seconds / row.whole for row in group if row.whole is not None]
        others = [
            [s / row.seconds for row in group if (s := row.baselines[other]) is not None]
            for other in BASELINES
        ]
        lines.append([name, str(len(group)), *map(_range, (bounds, optima, whole, *others))])
    head = ["case", "plans", "x bound", "x optimum", "x whole", *BASELINES]
    return table(head, lines)


def _range(ratios: Sequence[float]) -> str:
    if not ratios:
        return ""
    return f"{min(ratios):.2f} {median(ratios):.2f} {max(ratios):.2f}"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="benchmarks.placement",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--cases", nargs="*", default=[""], help="beginnings of their names")
    parser.add_argument("--random", type=int, default=24, help="how many random cases")
    parser.add_argument("--artifacts", nargs="*", type=Path, default=[], help="compiled ones")
    parser.add_argument("--rows", action="store_true", help="print each plan too")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--seconds", type=float, default=5.0, help="of CP-SAT, a case; 0 for none")
    given = parser.parse_args()
    if given.seconds and find_spec("ortools") is None:
        print("ortools is not installed: without the optimum (make placement)", file=sys.stderr)
        given.seconds = 0.0
    rows = list[Row]()
    for case in cases(given.cases, given.random, given.artifacts):
        if not case.name.startswith(tuple(given.cases)):
            continue
        print(case.name, file=sys.stderr)
        for part, budget in budgets(case):
            rows += rows_of(case, part, budget, given.seconds)
    if given.json:
        print(json.dumps([asdict(found) for found in rows], indent=1))
    else:
        print(summary(rows))
        head = ["case", "budget", "s", "x bound", "x optimum", "x whole", *BASELINES, "spilled"]
        for name in DEVICES if given.rows else ():
            print(f"\n{name}\n")
            print(table(head, [cells(found) for found in rows if found.device == name]))
    return 0 if all(found.good for found in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
