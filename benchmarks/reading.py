"""Decode steps that read few pages of a long cache, beside steps that read everything.

`python -m benchmarks.reading [--context 16384] [--threads 2] [--storages f32 int8]`: the Qwen2.5-0.5B shape
with random weights (int4, block 32, head int8), float32 and int8 slots, each without `[cache.read]` and with
`quest` at an eighth of the tokens and at a sixteenth, or 1,024 where that is more, and with `shadowkv`.
Everything runs in one process; the kinds take turns, a few steps each, and figures are medians of all steps,
so that a machine which others use too tells ratios. Caches hold random numbers: pages are chosen all over
them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

import einfold

from .client import ROOT
from .quality.sets import LIKE_KEYS
from .report import machine, slug, table
from .shapes import SHAPES, write_model

SHAPE = "qwen2.5-0.5b"

#: By name: the table `[cache]`. The first of a storage is what the others of it are compared with.
KINDS: dict[str, dict[str, Any]] = {
    f"{storage}{name}": {"storage": storage} | table
    for storage in ("f32", "int8")
    for name, table in (
        ("", {}),
        (", quest", {"read": {"method": "quest"}}),
        (", quest, pages of 8", {"read": {"method": "quest", "page": 8}}),
        (", quest, pages of 8, like keys", {"read": {"method": "quest", **LIKE_KEYS}}),
        (", shadowkv", {"read": {"method": "shadowkv"}}),
        (", quest, pages of 16", {"read": {"method": "quest", "page": 16}}),
        (", quest, a sixteenth", {"read": {"method": "quest", "share": 0.0625, "tokens": 1024}}),
    )
}

#: What a buffer of each type holds, of numbers that are spread normally.
_FILLED: dict[str, Callable[[Any], Any]] = {
    "float32": lambda noise: noise,
    "float16": np.abs,  # scales and means of packed tokens
    "int8": lambda noise: np.clip(noise * 40, -127, 127),
    "uint8": lambda noise: np.clip(noise * 60 + 128, 0, 255),
}

#: Steps of a turn; the first is not counted, for the caches of the processor hold another's.
_STEPS = 5


@dataclass(frozen=True)
class Figures:
    """One kind: the median of a step in milliseconds, the ratio to its storage's first, and bytes."""

    kind: str
    milliseconds: float
    of_whole: float
    held_bytes: int
    read_bytes: int


class Decoding:
    """A model behind so many tokens of a cache."""

    def __init__(self, folder: Path, context: int, threads: int) -> None:
        self.engine = einfold.load(folder, threads=threads, verify=False).engine
        self.context = context
        self.cache = self.engine.allocate(1, context + 1)
        random = np.random.default_rng(0)
        for buffer in self.cache.buffers.values():
            noise = random.standard_normal(buffer.shape, np.float32)
            buffer[:] = _FILLED[buffer.dtype.name](noise)
        self.seconds: list[float] = []

    def turn(self) -> None:
        """Some steps, each behind as many tokens as the first."""
        ids, rows = np.zeros((1, 1), np.int64), np.zeros(1, np.int64)
        for step in range(_STEPS):
            self.cache.assume(self.context)
            start = time.perf_counter()
            self.engine.step(self.cache, ids, self.cache.lengths[:, None], rows)
            if step:
                self.seconds.append(time.perf_counter() - start)


def compiled(
    folder: Path, context: int, kinds: Mapping[str, dict[str, Any]] = KINDS
) -> dict[str, Path]:
    """Artifacts by kind; those that are there are taken as they are."""
    model = folder / SHAPE
    if not model.is_dir():
        write_model(SHAPE, model)
    found = {}
    for kind, cache in kinds.items():
        out = found[kind] = folder / kind.replace(", ", "-").replace(" ", "-")
        if not out.is_dir():
            weights = {"format": "int4", "block": 32, "head": "int8"}
            recipe = {"target": "onnx", "weights": weights, "cache": cache}
            einfold.compile(model, out, recipe=recipe, context=context + 512, check=False)
    return found


def measure(
    folder: Path, context: int, threads: int, rounds: int, storages: Sequence[str]
) -> list[Figures]:
    """All kinds of some storages, taking turns."""
    kinds = {kind: cache for kind, cache in KINDS.items() if cache["storage"] in storages}
    running = {
        kind: Decoding(path, context, threads)
        for kind, path in compiled(folder, context, kinds).items()
    }
    for _ in range(rounds):
        for decoding in running.values():
            decoding.turn()
    found = []
    for kind, decoding in running.items():
        storage = kind.partition(",")[0]
        median = statistics.median(decoding.seconds)
        layout = decoding.engine.layout
        found.append(
            Figures(
                kind,
                median * 1e3,
                median / statistics.median(running[storage].seconds),
                int(layout.bytes(1, context)),
                layout.read_bytes(1, context),
            )
        )
    return found


def page(found: list[Figures], context: int, threads: int) -> str:
    """The table."""
    rows = [
        [
            each.kind,
            f"{each.milliseconds:.1f}",
            f"{each.of_whole:.2f}",
            f"{each.held_bytes / 1e6:.1f}",
            f"{each.read_bytes / 1e6:.1f}",
        ]
        for each in found
    ]
    head = ["cache", "ms a step", "of reading everything", "held, MB", "read a step, MB"]
    return (
        f"{SHAPES[SHAPE].title} shape, random weights in int4, one row, {context:,} tokens, {threads} "
        f"threads, medians of steps that take turns.\n\n{table(head, rows)}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.reading", description=__doc__)
    parser.add_argument("--context", type=int, default=16_384)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--storages", nargs="+", choices=["f32", "int8"], default=["f32", "int8"])
    parser.add_argument("--folder", type=Path, help="keeps models here [a temporary one]")
    parser.add_argument("--note", default="", help="what to say of the machine")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        folder = given.folder or Path(made)
        found = measure(folder, given.context, given.threads, given.rounds, given.storages)
    text = page(found, given.context, given.threads)
    about = machine() | {"onnxruntime": metadata.version("onnxruntime"), "note": given.note}
    name = f"reading-{given.context}-{date.today().isoformat()}-{slug(about)}"
    out = ROOT / "benchmarks" / "results" / name
    data = {"machine": about, "context": given.context, "threads": given.threads}
    data["figures"] = [asdict(each) for each in found]
    out.with_suffix(".json").write_text(json.dumps(data, indent=1) + "\n")
    said = f"\n{given.note}\n" if given.note else ""
    out.with_suffix(".md").write_text(f"# Reading by query, {name}\n\n{text}\n{said}")
    print(text)


if __name__ == "__main__":
    main()
