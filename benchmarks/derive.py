"""How long a plan takes, cold and from the cache, for every form: `python -m benchmarks.derive`.

Each form of docs/attention_forms.py has a process of its own, forked behind the imports and ahead of the
first derivation, so that nothing is remembered from another form. There its cascade is folded with an empty
cache (derived and checked), and folded again from the file that this wrote. Tracing is not counted.
Seconds are the processor's as well as the clock's, which other work on the machine lengthens.
"""

from __future__ import annotations

import argparse
import importlib.util
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch

from einfold.compiler.analysis.cascade.choose import choose_rank
from einfold.compiler.analysis.cascade.plans import fold
from einfold.compiler.frontend.cascade.trace import import_function
from einfold.compiler.ir.cascade.cascade import Cascade

from .client import ROOT
from .report import machine, slug, table

#: Seconds that a form may take.
COLD, CACHED = 5.0, 0.05
ROUNDS = 5


@dataclass(frozen=True)
class Row:
    """One form: (clock, processor) seconds cold and, the median of some rounds, from the cache."""

    form: str
    cold: tuple[float, float]
    cached: tuple[float, float]


def forms() -> list[Any]:
    """The catalogue of the documentation."""
    spec = importlib.util.spec_from_file_location(
        "attention_forms", ROOT / "docs" / "attention_forms.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return list(module.FORMS)


def timed(work: Callable[[], Any]) -> tuple[float, float]:
    """Seconds of the clock and of the processor."""
    clock, processor = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - clock, time.process_time() - processor


#: Name, cascade and rank of every form, traced ahead of the processes that fold them.
_traced: list[tuple[str, Cascade, str]] = []


def trace_all() -> None:
    """Traces the catalogue; nothing is derived."""
    for form in forms():
        torch.manual_seed(0)
        imported = import_function(form.function, form.inputs())
        rank = choose_rank(imported.cascade, imported.sizes)
        _traced.append((form.name, imported.cascade, rank))


def measure(number: int) -> Row:
    """Folds a form with an empty cache, then from it."""
    name, cascade, rank = _traced[number]
    with tempfile.TemporaryDirectory() as folder:
        cold = timed(lambda: fold(cascade, rank, Path(folder)))
        again = [timed(lambda: fold(cascade, rank, Path(folder))) for _ in range(ROUNDS)]
    clock, processor = zip(*again, strict=True)
    return Row(name, cold, (statistics.median(clock), statistics.median(processor)))


def markdown(rows: list[Row]) -> str:
    """The figures as a page."""
    found = machine()
    cold, cached = [row.cold for row in rows], [row.cached for row in rows]
    lines = [
        ["median", *(f"{statistics.median(x[at] for x in cold):.2f}" for at in (0, 1))],
        ["worst", *(f"{max(x[at] for x in cold):.2f}" for at in (0, 1))],
    ]
    lines[0] += [f"{statistics.median(x[at] for x in cached) * 1e3:.1f}" for at in (0, 1)]
    lines[1] += [f"{max(x[at] for x in cached) * 1e3:.1f}" for at in (0, 1)]
    over = [r.form for r in rows if r.cold[1] >= COLD or r.cached[1] >= CACHED]
    each = [
        [row.form, *(f"{x:.2f}" for x in row.cold), *(f"{x * 1e3:.1f}" for x in row.cached)]
        for row in rows
    ]
    head = ["form", "cold s", "cold, processor s", "cached ms", "cached, processor ms"]
    return "\n\n".join(
        [
            f"# Deriving plans, {date.today()}",
            f"{found['cpu']} (family-model {found['family']}), {found['cores']} cores shared with other "
            f"work, of which one is used. Limits: {COLD:.0f} s cold, {CACHED * 1e3:.0f} ms from the cache.",
            table(["of all forms", *head[1:]], lines),
            f"Over a limit, in processor time: {', '.join(over) or 'none'}.",
            table(head, each) + "\n",
        ]
    )


def main() -> None:
    """Prints the page; --out DIR also writes it there."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="a folder for the page")
    options = parser.parse_args()
    torch.set_num_threads(1)
    trace_all()
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        page = markdown(pool.map(measure, range(len(_traced)), chunksize=1))
    print(page)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / f"derive-{date.today()}-{slug(machine())}.md").write_text(page)


if __name__ == "__main__":
    main()
