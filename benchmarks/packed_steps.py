"""Decode steps over packed tokens, beside steps over slots of each type.

`python -m benchmarks.packed_steps [--context 16384] [--threads 2]`: the Qwen2.5-0.5B shape with random
weights (int4, block 32, head int8), a cache in float32, int8 and int4 and one packed by `turboquant`.
Everything runs in one process; the kinds take turns, a few steps each, and figures are medians of all steps,
so that a machine which others use too tells ratios. What a step takes beyond one behind few tokens is
attention over the cache.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

from .reading import SHAPE, Decoding, compiled
from .report import machine, table
from .shapes import SHAPES

#: By name: the table `[cache]`.
KINDS: dict[str, dict[str, Any]] = {
    "float32": {"storage": "f32"},
    "int8": {"storage": "int8"},
    "int4": {"storage": "int4"},
    "turboquant": {"quant": {"method": "turboquant"}},
}


def measure(
    folder: Path, contexts: list[int], threads: int, rounds: int
) -> dict[str, dict[int, tuple[float, int]]]:
    """By kind and context: the median of a step in milliseconds, and the bytes of the cache."""
    found: dict[str, dict[int, tuple[float, int]]] = {kind: {} for kind in KINDS}
    paths = compiled(folder, max(contexts), KINDS)
    for context in contexts:
        running = {kind: Decoding(path, context, threads) for kind, path in paths.items()}
        for _ in range(rounds):
            for decoding in running.values():
                decoding.turn()
        for kind, decoding in running.items():
            held = int(decoding.engine.layout.bytes(1, context))
            found[kind][context] = statistics.median(decoding.seconds) * 1e3, held
    return found


def page(found: dict[str, dict[int, tuple[float, int]]], threads: int) -> str:
    """The table."""
    rows = [
        [kind, *(f"{ms:.1f} ms, {held / 1e6:.1f} MB" for ms, held in figures.values())]
        for kind, figures in found.items()
    ]
    head = ["cache", *(f"{context:,} tokens" for context in next(iter(found.values())))]
    return (
        f"{SHAPES[SHAPE].title} shape, random weights in int4, one row, {threads} threads; medians of steps "
        f"that take turns, and what the cache holds.\n\n{table(head, rows)}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.packed_steps", description=__doc__)
    parser.add_argument("--context", type=int, nargs="+", default=[512, 4096, 16_384])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--folder", type=Path, help="keeps models here [a temporary one]")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        folder = given.folder or Path(made)
        found = measure(folder, sorted(given.context), given.threads, given.rounds)
    print(f"{machine()}\n\n{page(found, given.threads)}")


if __name__ == "__main__":
    main()
