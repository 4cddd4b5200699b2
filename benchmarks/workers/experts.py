"""Writes tokens with a model of experts within a budget, in a process of its own, of any version of einfold.

    python experts.py ARTIFACT MEMORY TOKENS POLICY < prompt's ids

MEMORY is in bytes, POLICY `own`, or `lru` where einfold has the choice. Prints what it took as JSON.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any


def main() -> None:
    import einfold

    folder, memory, tokens, policy = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    if policy == "lru":
        from einfold.compiler.codegen.onnx.paging import PagedRunner
        from einfold.runtime.memory.experts import Recent

        PagedRunner.policy = Recent
    prompt = [int(word) for word in sys.stdin.read().split()]
    model: Any = einfold.load(
        folder, memory=memory, context=len(prompt) + tokens, chunk=64, threads=1
    )
    options = {"ignore_eos": True, "temperature": 1.0}
    model.generate(prompt, max_new_tokens=2, seed=1, **options)  # what is learned of each kind
    before, fetched = disk_bytes(), model.engine.runner.fetched
    model.generate(prompt, max_new_tokens=1, seed=1, **options)
    middle, between = disk_bytes(), model.engine.runner.fetched
    counts = model.engine.runner.reader.counts
    asked, held = getattr(counts, "asked", 0), getattr(counts, "held", 0)
    found = model.generate(prompt, max_new_tokens=tokens, seed=0, **options)
    steps = model.timings.decode_tokens
    prompt_bytes = middle - before
    result = {
        "tokens": found.tokens,
        "seconds": model.timings.decode_seconds / steps,
        "disk_bytes": (disk_bytes() - middle - prompt_bytes) / steps,
        "brought": (model.engine.runner.fetched - between - (between - fetched)) / steps,
        "prompt_bytes": prompt_bytes,
        "prompt_seconds": model.timings.prefill_seconds,
        "hit_rate": (counts.held - held) / max(counts.asked - asked, 1) if asked else None,
        "peak": resident_peak(),
        "plan": model.plan.data(),
    }
    print(json.dumps(result))
    model.engine.runner.close()


def disk_bytes() -> int:
    """Bytes that this process had the disk read."""
    with open("/proc/self/io", encoding="ascii") as stream:
        return next(int(line.split()[1]) for line in stream if line.startswith("read_bytes"))


def resident_peak() -> int:
    """Bytes of this process in memory at its largest."""
    with open(f"/proc/{os.getpid()}/status", encoding="ascii") as stream:
        return next(int(line.split()[1]) << 10 for line in stream if line.startswith("VmHWM"))


if __name__ == "__main__":
    main()
