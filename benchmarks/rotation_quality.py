"""What rotating heads before codes changes on SmolLM2-135M-Instruct: `python -m benchmarks.rotation_quality`.

Every form reads the same windows as `benchmarks/quality`, by the reference: half of each is a prompt that is
packed when it has been read, the rest goes through the cache. KL(original || packed) in nats, of the
model in transformers, in float32. Each row is printed when it was measured.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import einfold

from .quality.measure import Original, figures
from .quality.subjects import real

#: Bytes are the same in all forms of as many bits.
#: First tokens are packed as well, so that what rotation does is seen by itself.
_PACKED = {"sinks": 0}

_KEYS = {"channel": ("none", "keys", "values", "both"), "token": ("none", "keys", "both")}


def forms(widths: list[int]) -> Iterator[tuple[str, dict[str, Any]]]:
    """What is measured, by the text that the command line takes."""
    for bits in widths:
        for keys, rotations in _KEYS.items():
            for rotate in rotations:
                options = {"bits": bits, "keys": keys, "rotate": rotate}
                shown = ",".join(f"{name}={value}" for name, value in options.items())
                yield f"kivi:{shown}", {"method": "kivi", **options, **_PACKED}
        for rotate in ("none", "both"):
            options = {"bits": bits, "rotate": rotate}
            yield f"gear:bits={bits},rotate={rotate}", {"method": "gear", **options, **_PACKED}


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.rotation_quality", description=__doc__)
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--windows", type=int, default=2, help="of eight, evenly chosen [2]")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    whole = real()
    windows = whole.windows[:: len(whole.windows) // given.windows][: given.windows]
    subject = replace(whole, windows=windows, questions=[])
    original = Original.of(subject)
    print("| form | cache at 4,000 tokens | perplexity | KL | KL, 99 % | same token |")
    print("|---|---|---|---|---|---|", flush=True)
    for name, table in forms(given.bits):
        recipe = {"target": "reference", "cache": {"quant": table}}
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "artifact"
            einfold.compile(subject.folder, out, recipe=recipe, check=False)
            found = figures(einfold.load(out, threads=given.threads), subject, original)
        cells = (
            f"`{name}`",
            f"{found['cache_bytes']['4000'] / 1e6:.1f} MB",
            f"{found['perplexity'] / found['reference_perplexity'] - 1:+.1%}",
            f"{found['kl']:.4f}",
            f"{found['kl_p99']:.3f}",
            f"{found['same']:.1%}",
        )
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
