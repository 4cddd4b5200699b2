"""Measures what forms of weights and caches cost on trained models, and writes docs/quality.md.

python -m benchmarks.quality [quick|weights|cache] [--models toy real off-grid] [--only NAME ..]
                             [--again|--no-again] [--page]

`quick` is small and fixed: half an hour on two cores for the toy and the real model. `weights` and `cache`
are long tables (hours). Each row is written to benchmarks/results/quality-SET-MODEL.json when it is measured.
The long tables leave rows alone that are there, so that a run that was stopped is gone on with; `quick`
measures all of them anew. `--again` and `--no-again` have it otherwise.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import einfold

from ..fetch import FetchError
from .measure import Original, compiled, figures
from .pages import PAGE, read, results, write, written
from .sets import SETS, Row
from .subjects import SUBJECTS, Subject

_DEFAULT = {
    "quick": ["toy", "real"],
    "weights": ["toy", "real", "off-grid"],
    "cache": ["toy", "real"],
}


def measure_row(row: Row, subject: Subject, original: Original, threads: int) -> dict[str, Any]:
    """Compiles and measures one row; with what could not be, the reason in its place."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "artifact"
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as other:
            took = other.submit(compiled, subject.folder, out, row.table).result()
        if "refused" in took:
            return took
        found = figures(einfold.load(out, threads=threads), subject, original)
    return found | took | {"threads": threads, "date": date.today().isoformat()}


def run(name: str, model: str, only: list[str] | None, again: bool, threads: int) -> None:
    """Measures what lacks of a set on one model: `only` these rows, in their order. Raises KeyError for a
    row that the set has not."""
    path = results(name, model)
    data = read(path)
    known = {row.name: row for row in SETS[name]}
    wanted = [known[name] for name in (known if only is None else only)]
    wanted = [row for row in wanted if again or row.name not in data["rows"]]
    if not wanted:
        return
    subject = SUBJECTS[model]()
    print(f"{model}: what the original says", file=sys.stderr, flush=True)
    original = Original.of(subject)
    for number, row in enumerate(wanted, 1):
        print(f"{model}: {number}/{len(wanted)} {row.name}", file=sys.stderr, flush=True)
        data["rows"][row.name] = measure_row(row, subject, original, threads)
        data["model"] = subject.name
        data["versions"] = {
            k: metadata.version(k) for k in ("torch", "onnxruntime", "transformers")
        }
        order = [row.name for row in SETS[name]]
        data["rows"] = {key: data["rows"][key] for key in order if key in data["rows"]}
        write(path, data)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0] if __doc__ else "",
        prog="python -m benchmarks.quality",
    )
    parser.add_argument("set", choices=sorted(SETS), nargs="?", default="quick", help="[quick]")
    parser.add_argument("--models", nargs="+", choices=sorted(SUBJECTS), help="[by the set]")
    parser.add_argument("--only", nargs="+", help="rows by name, measured in this order")
    parser.add_argument(
        "--again",
        action=argparse.BooleanOptionalAction,
        help="measure rows anew that are there [only of quick]",
    )
    parser.add_argument("--page", action="store_true", help="write the page, measure nothing")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    given = parser.parse_args()
    unknown = set(given.only or ()) - {row.name for row in SETS[given.set]}
    if unknown:
        parser.error(f"the set {given.set} has no row {' or '.join(sorted(unknown))}")
    again = given.set == "quick" if given.again is None else given.again
    start = time.perf_counter()
    try:
        for model in [] if given.page else given.models or _DEFAULT[given.set]:
            run(given.set, model, given.only, again, given.threads)
    except FetchError as error:
        sys.exit(f"error: {error}")
    PAGE.write_text(written(), encoding="utf-8")
    print(f"{PAGE}: {time.perf_counter() - start:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
