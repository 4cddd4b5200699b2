"""The smallest arena for given buffers: `python benchmarks/memory_packing.py FOLDER [--json] [--seconds N]`.

A problem is a file NAME.CAPACITY.csv with the columns id, lower, upper and size: buffers of `size` bytes that
live in [lower, upper) and are to lie in an arena of CAPACITY bytes, as MiniMalloc's problems are published.
Any folder of such files will do. For each it prints

- the arena that was found, in bytes, and the peak of live bytes, below which there is none;
- seconds of processors that packing took, summed over threads;
- whether an independent check of the places holds, in the capacity;
- whether it is proved that no arena is smaller. Packing ends as soon as the capacity is kept, so that this
  is mostly known where capacity and peak are the same.

`--pinwheels N` packs N problems too that no straight cut takes apart and whose peak is the smallest arena,
and prints beside each the smallest that an allocator of omnimalloc finds in as many seconds of processors.
It ends with 1 where a problem of the folder did not fit, or an allocator found a smaller arena.
"""

from __future__ import annotations

import argparse
import csv
import inspect
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from importlib import metadata
from pathlib import Path

from einfold.compiler.memory.buffers import Buffer, fault
from einfold.compiler.memory.packing import SECONDS, pack


@dataclass(frozen=True)
class Row:
    """What came of one problem."""

    problem: str
    buffers: int
    capacity: int
    arena: int
    peak: int
    cpu_seconds: float
    holds: bool
    """Whether the independent check finds nothing wrong with the places in the arena."""
    fits: bool
    """Whether the arena is within the capacity."""
    proved: bool
    """Whether no arena can be smaller."""
    peer: str = ""
    """The allocator of omnimalloc that found the smallest arena in the same time, where they were asked."""
    peer_arena: int | None = None


def problems(folder: Path) -> Iterator[tuple[str, list[Buffer], int]]:
    """Each problem of a folder: its name, buffers and capacity."""
    for path in sorted(folder.glob("*.csv")):
        capacity = path.stem.rpartition(".")[2]
        if not capacity.isdecimal():
            print(f"{path.name} names no capacity and is left out", file=sys.stderr)
            continue
        with path.open(encoding="utf-8", newline="") as file:
            rows = [{k.strip(): v for k, v in row.items()} for row in csv.DictReader(file)]
        buffers = [Buffer(int(r["lower"]), int(r["upper"]), int(r["size"])) for r in rows]
        yield path.name, buffers, int(capacity)


def measure(name: str, buffers: Sequence[Buffer], capacity: int | None, seconds: float) -> Row:
    """Packs one problem and checks it; without a capacity, as small as can be, and the peak is it."""
    started = time.process_time()
    plan = pack(buffers, capacity, seconds)
    taken = time.process_time() - started
    holds = not fault(buffers, plan.offsets, plan.arena)
    capacity = plan.bound if capacity is None else capacity
    fits = holds and plan.arena <= capacity
    return Row(
        name, len(buffers), capacity, plan.arena, plan.bound, taken, holds, fits, plan.optimal
    )


def pinwheel(seed: int) -> list[Buffer]:
    """129 buffers that fill a MiB at every step."""
    from omnimalloc.benchmark.sources import PinwheelSource

    made = PinwheelSource(seed=seed).get_allocations()
    return [Buffer(int(a.start), int(a.end), a.size) for a in made]  # type: ignore[arg-type]


#: Asked of allocators that search by threads.
_PEER_THREADS = 12


def peers(buffers: Sequence[Buffer], seconds: float) -> tuple[str, int]:
    """The smallest arena that an allocator of omnimalloc finds, and its name."""
    from omnimalloc import Allocation
    from omnimalloc.allocators.base import BaseAllocator

    asked = tuple(Allocation(i, b.size, b.start, b.end) for i, b in enumerate(buffers))
    found = []
    for name, allocator in BaseAllocator.registry().items():
        options = inspect.signature(allocator).parameters
        given: dict[str, object] = {}
        if "num_threads" in options:
            # A thread is an order that is tried: unasked there are no more than processors.
            given["num_threads"] = _PEER_THREADS
        if "timeout" in options:
            at_once = min(_PEER_THREADS, os.cpu_count() or 1) if "num_threads" in options else 1
            given["timeout"] = seconds / at_once
        try:
            placed = allocator(**given).allocate(asked)
        except ImportError:
            continue  # it stands for a package that is not installed
        found.append((max(a.size + (a.offset or 0) for a in placed), name))
    arena, name = min(found)
    return name, arena


def told(row: Row) -> str:
    """A row of the table."""
    words = "".join(f"{'yes' if x else 'no':7}" for x in (row.holds, row.fits, row.proved))
    line = f"{row.problem:22}{row.arena:10}{row.peak:11}{row.cpu_seconds:8.2f}  {words}"
    return line if row.peer_arena is None else f"{line}{row.peer_arena:10} {row.peer}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of processors, a problem")
    parser.add_argument("--pinwheels", type=int, default=0, help="how many")
    parser.add_argument("--out", type=Path, help="a folder for the results")
    arguments = parser.parse_args()
    rows = [measure(*problem, arguments.seconds) for problem in problems(arguments.folder)]
    good = all(row.fits for row in rows)
    for seed in range(arguments.pinwheels):
        buffers = pinwheel(seed)
        row = measure(f"pinwheel {seed}", buffers, None, arguments.seconds)
        name, arena = peers(buffers, arguments.seconds)
        rows.append(replace(row, peer=name, peer_arena=arena))
        good = good and row.holds and row.arena <= arena
    document = json.dumps([asdict(row) for row in rows], indent=1)
    head = f"{'problem':22}{'arena':>10}{'peak live':>11}{'CPU s':>8}  holds  fits   proved"
    lines = "\n".join([head, *map(told, rows)])
    print(document if arguments.json else lines)
    if arguments.out:
        _write(arguments, document, lines)
    return 0 if good else 1


def _write(arguments: argparse.Namespace, document: str, lines: str) -> None:
    """The results beside those of other benchmarks, with what they were found with."""
    # A script by its path finds what lies beside it, and not the package that it is in.
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from benchmarks.report import machine, slug

    this = machine()
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("einfold", "omnimalloc"))
    file = arguments.out / f"memory-packing-{date.today()}-{slug(this)}"
    text = (
        f"# Buffers into an arena, {date.today()}, {this['cpu']}\n\n"
        f"Problems of {arguments.folder.name} and {arguments.pinwheels} pinwheels, at most "
        f"{arguments.seconds:g} seconds of processors each, the same for the allocators of omnimalloc "
        f"({_PEER_THREADS} threads where they take them), whose best stands behind. {versions}.\n\n"
        f"```\n{lines}\n```\n"
    )
    file.with_name(f"{file.name}.md").write_text(text, encoding="utf-8")
    file.with_name(f"{file.name}.json").write_text(document + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
