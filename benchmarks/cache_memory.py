"""Resident memory of caches of 16k tokens, beside their account: `python -m benchmarks.cache_memory`.

Each layout runs in a process of its own, twice: as a prompt of the whole context is read and settled
(peak), and behind it (steady). The cache's buffers are filled with random numbers in place of a prompt
of minutes; every page of them is written, since zeroed memory takes none. Layouts are compared by
their differences from the full float32 cache, which weights and libraries drop out of.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from .client import ROOT, environment, status_bytes
from .entries import EINFOLD, Form
from .prepare import Kitchen, default_cache, own_python
from .report import machine, slug, table
from .shapes import SHAPES

#: Layouts by name; the first is what the others are compared with.
LAYOUTS = {
    "full, f32": ("int4",),
    "full, int8": ("benchmarks/recipes/int4-kv8.toml",),
    "window of 324, streaming prefill": ("benchmarks/recipes/int4-window.toml",),
    "SnapKV, 256 tokens": ("benchmarks/recipes/int4-snapkv.toml",),
    "H2O, 256 tokens": ("benchmarks/recipes/int4-h2o.toml",),
    "a quarter of the heads full, f32": ("int4", "quarter"),
    "a quarter of the heads full, int8": ("benchmarks/recipes/int4-kv8.toml", "quarter"),
}

#: Differences should agree within the larger of these.
SHARE, BYTES = 0.05, 10_000_000

_PIECE = 1 << 18


@dataclass(frozen=True)
class Held:
    """Bytes of one layout: by the account, and by the kernel beyond what was there before the cache."""

    layout: str
    accounted_peak: int
    peak: int
    accounted_steady: int
    steady: int


def child(artifact: Path, context: int) -> dict[str, int]:
    """Reads a prompt of random numbers, settles it, decodes a little; gives the figures of `Held`."""
    import einfold

    model = einfold.load(artifact, threads=1, verify=False)
    engine, layout = model.engine, model.engine.layout
    model.generate([5] * 8, max_new_tokens=4, ignore_eos=True)  # binds, and takes what a step takes
    engine.cache = None
    before = _resident()
    cache = engine.allocate(1, context + 8, context)
    for name, buffer in cache.buffers.items():
        _fill(name, buffer)
    cache.lengths[:] = context
    for name, used in cache.clocks.items():
        group = cache.groups[name]
        whole = context + group.policy.compensated
        used[:] = min(whole, cache.buffers[_slots(cache, name)].shape[2])
    cache.settle()
    peak = status_bytes(os.getpid(), "VmHWM")
    for _ in range(4):
        cache.make_room(1)
        ids = np.full((1, 1), 5)
        engine.runner.step(cache, ids, cache.lengths[:, None], np.zeros(1, np.int64))
        cache.advance(1, engine.runner.observed)
    steady = status_bytes(os.getpid(), "VmRSS")
    return {
        "accounted_peak": int(layout.peak_bytes(1, context + 8, context)),
        "peak": peak - before,
        "accounted_steady": int(layout.bytes(1, context + 8)),
        "steady": steady - before,
    }


def _resident() -> int:
    """Resident bytes now, without what the C library keeps free; the kernel's peak begins anew here."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return status_bytes(os.getpid(), "VmRSS")


def _slots(cache: Any, clock: str) -> str:
    layer, index = cache.layout.members(clock)[0]
    return f"cache.{layer.layer}.{index}.key"


def _fill(name: str, buffer: Any) -> None:
    """Writes every number, a piece at a time so that no copy of a buffer is made."""
    random, numbers = np.random.default_rng(0), buffer.reshape(-1)
    if name.endswith(".count"):
        numbers = numbers[:0]  # nothing has left yet
    for start in range(0, len(numbers), _PIECE):
        part = numbers[start : start + _PIECE]
        part[:] = random.integers(-9, 9, part.shape, np.int8)


def measure(kitchen: Kitchen, shape: str, layout: str, context: int) -> Held:
    """Runs one layout in a process of its own."""
    artifact = kitchen.form(shape, Form(EINFOLD, LAYOUTS[layout]))
    words = [kitchen.own, "-m", "benchmarks.cache_memory", "--child", str(artifact)]
    run = subprocess.run(
        [*words, "--context", str(context)],
        stdout=subprocess.PIPE,
        cwd=ROOT,
        env=environment(kitchen.cache, 1),
        check=True,
    )
    return Held(layout, **json.loads(run.stdout.splitlines()[-1]))


def agrees(first: int, other: int, accounted_first: int, accounted_other: int) -> bool:
    """Whether a difference of resident bytes is that of the account."""
    wanted = accounted_first - accounted_other
    return abs(first - other - wanted) <= max(SHARE * abs(wanted), BYTES)


def page(held: list[Held], shape: str, context: int, title: str) -> str:
    """The table, with the differences from the first layout."""
    full, rows = held[0], []
    for other in held:
        cells = [other.layout]
        for phase in ("peak", "steady"):
            base, found = getattr(full, phase), getattr(other, phase)
            accounted = getattr(full, f"accounted_{phase}"), getattr(other, f"accounted_{phase}")
            cells += [_mb(accounted[1]), _mb(found)]
            fits = "" if other is full else ("yes" if agrees(base, found, *accounted) else "no")
            cells += [_mb(accounted[0] - accounted[1]), _mb(base - found), fits]
        rows.append(cells)
    one = ["account", "held", "less by account", "less held", "agree"]
    head = ["cache, MB", *(f"peak: {one[0]}", *one[1:]), *(f"steady: {one[0]}", *one[1:])]
    text = (
        f"{SHAPES[shape].title} shape, {context:,} tokens, one row. Peak: as a prompt of the whole context "
        "is read and settled; steady: behind it. Held: resident memory beyond that before the cache. "
        f"Agree: the differences from the first line, within the larger of {SHARE:.0%} and 10 MB."
    )
    return "\n\n".join([f"# {title}", text, table(head, rows)]) + "\n"


def _mb(count: int) -> str:
    return f"{count / 1e6:.1f}"


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.cache_memory", description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="qwen2.5-0.5b")
    parser.add_argument("--context", type=int, default=16384)
    parser.add_argument("--cache", type=Path, default=default_cache(), help="folder for the models")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args(words)
    if arguments.child:
        print(json.dumps(child(arguments.child, arguments.context)), flush=True)
        return 0
    began = time.monotonic()

    def tell(text: str) -> None:
        print(f"{time.monotonic() - began:6.0f} s  {text}", file=sys.stderr, flush=True)

    found = machine()
    kitchen = Kitchen(arguments.cache.resolve(), own_python(), own_python(), 1, tell)
    held = []
    for layout in LAYOUTS:
        held.append(measure(kitchen, arguments.shape, layout, arguments.context))
        tell(f"{layout}: {held[-1]}")
    name = f"cache-memory-{date.today()}-{slug(found)}"
    text = page(held, arguments.shape, arguments.context, f"Memory of caches, {name}")
    arguments.results.mkdir(parents=True, exist_ok=True)
    (arguments.results / f"{name}.md").write_text(text, encoding="utf-8")
    plain = {"machine": found, "shape": arguments.shape, "context": arguments.context}
    plain["held"] = [asdict(one) for one in held]
    (arguments.results / f"{name}.json").write_text(json.dumps(plain, indent=1) + "\n")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
