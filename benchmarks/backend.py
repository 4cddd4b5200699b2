"""`backend="einfold"` beside `backend="inductor"`: compile time, and speed of attention as models write it.

    python benchmarks/backend.py [--threads 2] [--seconds 2] [--json FILE] [case ..]

Each case is run by both backends in turn, and the ratio of the medians is given: above 1, einfold is
faster. Compile times are of the first call; with Inductor's caches on disk warm they say little, so
`--cold` turns these off.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

HEADS, GROUPS, WIDTH = 16, 2, 64
SHAPES = {"prefill": (512, 512), "decode": (1, 1024)}
BACKENDS = ("inductor", "einfold")


def expanded(x: Tensor) -> Tensor:
    """Grouped heads repeated, as transformers' eager attention does."""
    b, h, t, d = x.shape
    return x[:, :, None].expand(b, h, GROUPS, t, d).reshape(b, h * GROUPS, t, d)


def scores(q: Tensor, k: Tensor) -> Tensor:
    found: Tensor = q @ expanded(k).transpose(2, 3) * WIDTH**-0.5
    return found


def softmax_written_out(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return torch.softmax(scores(q, k) + mask, dim=-1) @ expanded(v)


def softcap(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    s = torch.tanh(scores(q, k) / 50) * 50 + mask
    return torch.softmax(s, dim=-1, dtype=torch.float32).to(q.dtype) @ expanded(v)


def sinks(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    sink = torch.arange(HEADS, dtype=q.dtype).reshape(1, -1, 1, 1)
    s = torch.cat([scores(q, k) + mask, sink.expand(q.shape[0], -1, q.shape[2], -1)], dim=-1)
    s = s - s.max(dim=-1, keepdim=True).values
    return torch.softmax(s, dim=-1)[..., :-1] @ expanded(v)


def alibi(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    slopes = torch.exp2(-torch.arange(1, HEADS + 1) * 8 / HEADS)
    row = torch.arange(q.shape[2])[:, None] + k.shape[2] - q.shape[2]
    away = torch.arange(k.shape[2])[None, :] - row
    return torch.softmax(scores(q, k) + slopes[:, None, None] * away + mask, dim=-1) @ expanded(v)


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)


def sdpa_on_repeated_heads(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q, expanded(k), expanded(v), mask)


CASES: list[Callable[..., Tensor]] = [
    sdpa,
    sdpa_on_repeated_heads,
    softmax_written_out,
    softcap,
    sinks,
    alibi,
]


def inputs_of(queries: int, keys: int) -> list[Tensor]:
    """q, k, v, and a mask with transformers' finite lowest value."""
    torch.manual_seed(0)
    q = torch.randn(1, HEADS, queries, WIDTH)
    k, v = (torch.randn(1, HEADS // GROUPS, keys, WIDTH) for _ in range(2))
    live = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    return [q, k, v, torch.where(live, 0.0, torch.finfo(torch.float32).min)[None, None]]


def measure(case: Callable[..., Tensor], inputs: list[Tensor], seconds: float) -> dict[str, Any]:
    """Compile seconds and median seconds a call of both backends, run in turn."""
    from einfold import backend

    runs: dict[str, Callable[..., Tensor]] = {}
    compile_seconds, results = {}, {}
    backend.clear_reports()
    with torch.no_grad():
        for name in BACKENDS:
            # Code of its own, so that neither backend's guards are asked for the other.
            own = FunctionType(case.__code__.replace(), globals(), case.__name__)
            runs[name] = torch.compile(own, backend=name, dynamic=False)
            start = time.perf_counter()
            results[name] = runs[name](*inputs)
            compile_seconds[name] = time.perf_counter() - start
        torch.testing.assert_close(results["einfold"], results["inductor"], rtol=1e-3, atol=1e-4)
        times: dict[str, list[float]] = {name: [] for name in BACKENDS}
        end = time.perf_counter() + seconds
        while time.perf_counter() < end or len(times["einfold"]) < 5:
            for name, run in runs.items():
                start = time.perf_counter()
                run(*inputs)
                times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in times.items()}
    (cascade,) = backend.reports()[0].cascades
    return {
        "lowering": cascade.lowering,
        "reason": cascade.reason,
        "calls": len(times["einfold"]),
        "seconds": medians,
        "ratio": medians["inductor"] / medians["einfold"],
        "compile_seconds": compile_seconds,
    }


def main() -> None:
    """Runs the cases and prints a table; with --json also writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", metavar="case", help="names of cases; all without any")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seconds", type=float, default=2.0, help="measured seconds a case")
    parser.add_argument("--cold", action="store_true", help="without Inductor's caches on disk")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.cold:
        torch.compiler.config.force_disable_caches = True
    rows = []
    print("case, shape: ms inductor, ms einfold, ratio; compile s inductor, einfold; lowering")
    for case in CASES:
        if options.cases and case.__name__ not in options.cases:
            continue
        for shape, (queries, keys) in SHAPES.items():
            row = measure(case, inputs_of(queries, keys), options.seconds)
            rows.append({"case": case.__name__, "shape": shape, **row})
            a, b = (row["seconds"][name] * 1e3 for name in BACKENDS)
            c, d = (row["compile_seconds"][name] for name in BACKENDS)
            print(
                f"{case.__name__}, {shape}: {a:.2f}, {b:.2f}, {row['ratio']:.2f}; "
                f"{c:.1f}, {d:.1f}; {row['lowering']}",
                flush=True,
            )
    if options.json:
        about = {
            "torch": torch.__version__,
            "threads": options.threads,
            "cpu": platform.processor(),
        }
        with open(options.json, "w") as file:
            json.dump({"about": about, "rows": rows}, file, indent=2)


if __name__ == "__main__":
    main()
