"""Takes steps of one token with a model of experts within a budget, in a process of its own, of any version.

    python experts.py ARTIFACT MEMORY TOKENS POLICY WAY < ids

MEMORY is in bytes, POLICY `own`, or `lru` where einfold has the choice. WAY is `write` for so many sampled
tokens behind the ids, or `read` for the last of the ids, read one by one. Prints what a token took as JSON.
"""

from __future__ import annotations

import json
import sys
from typing import Any


def main() -> None:
    import einfold

    folder, policy, way = sys.argv[1], *sys.argv[4:6]
    memory, tokens = int(sys.argv[2]), int(sys.argv[3])
    if policy == "lru":
        from einfold.compiler.codegen.onnx.paging import PagedRunner
        from einfold.runtime.memory.experts import Recent

        PagedRunner.policy = Recent
    ids = [int(word) for word in sys.stdin.read().split()]
    model: Any = einfold.load(
        folder,
        memory=memory,
        context=len(ids) + tokens,
        chunk=1 if way == "read" else 64,
        threads=1,
    )

    def taken(ids: list[int], count: int) -> tuple[list[int], int, int, int]:
        """Tokens, bytes from the disk, units asked for and held, of a text and tokens behind it."""
        before, counts = disk_bytes(), model.engine.runner.reader.counts
        asked, held = getattr(counts, "asked", 0), getattr(counts, "held", 0)
        found = model.generate(
            ids, max_new_tokens=count, ignore_eos=True, temperature=1.0, seed=0
        ).tokens
        now = getattr(counts, "asked", 0) - asked, getattr(counts, "held", 0) - held
        return found, disk_bytes() - before, *now

    if way == "read":
        taken(ids[:-tokens], 1)  # what each kind of step reads is learned
        found, size, asked, held = taken(ids[-tokens:], 1)
        seconds, beside = model.timings.prefill_seconds / tokens, 0
    else:
        taken(ids, 2)
        beside = taken(ids, 1)[1]  # of the prompt
        found, size, asked, held = taken(ids, tokens)
        seconds = model.timings.decode_seconds / model.timings.decode_tokens
        tokens -= 1
    result = {
        "tokens": found,
        "seconds": seconds,
        "disk_bytes": (size - beside) / tokens,
        "prompt_bytes": beside,
        "hit_rate": held / asked if asked else None,
        "plan": model.plan.data(),
    }
    print(json.dumps(result))
    model.engine.runner.close()


def disk_bytes() -> int:
    """Bytes that this process had the disk read."""
    with open("/proc/self/io", encoding="ascii") as stream:
        return next(int(line.split()[1]) for line in stream if line.startswith("read_bytes"))


if __name__ == "__main__":
    main()
