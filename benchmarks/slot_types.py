"""Slots of each type in onnxruntime's attention: `python -m benchmarks.slot_types`.

One GroupQueryAttention of SmolLM2's shape (9 query and 3 KV heads of 64), or another, over a cache that it
writes in place, on two threads or so many. Time: it decodes one token; the kinds take turns, and the
table has the medians. Memory: what the process grows by at its peak, for a step of a prompt, in bytes a slot.

- float32: queries, keys, values and slots.
- float16 slots: the slots alone, the rest in float32.
- float16 throughout: queries, keys, values and the result too.
- int8: slots with a scale a channel, the rest in float32.
- int4: the same in codes of 4 bits, two a byte.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper

from .client import status_bytes
from .report import machine, table


@dataclass(frozen=True)
class Shape:
    """What is attended with: query heads, KV heads, numbers of a head; and on how many threads."""

    heads: int = 9
    kv_heads: int = 3
    size: int = 64
    threads: int = 2


_TYPES = {
    np.float32: TensorProto.FLOAT,
    np.float16: TensorProto.FLOAT16,
    np.int8: TensorProto.INT8,
    np.uint8: TensorProto.UINT8,
    np.int32: TensorProto.INT32,
}

#: By name: the types of queries and of slots.
KINDS: dict[str, tuple[Any, Any]] = {
    "float32": (np.float32, np.float32),
    "float16 slots": (np.float32, np.float16),
    "float16 throughout": (np.float16, np.float16),
    "int8": (np.float32, np.int8),
    "int4": (np.float32, np.uint8),
}

#: Bits of codes, by the type of the slots.
_BITS = {np.int8: 8, np.uint8: 4}


def feeds(shape: Shape, kind: str, used: int, new: int) -> dict[str, Any]:
    """The inputs of a step of `new` tokens behind `used` slots."""
    computed, stored = KINDS[kind]
    random = np.random.default_rng(0)
    found: dict[str, Any] = {
        name: random.standard_normal((1, new, heads * shape.size)).astype(computed)
        for name, heads in (("q", shape.heads), ("k", shape.kv_heads), ("v", shape.kv_heads))
    }
    bits = _BITS.get(stored, 0)
    for name in ("keys", "values"):
        slots: Any = random.standard_normal((1, shape.kv_heads, used + new, shape.size))
        if bits == 4:
            codes = (slots * 3).clip(-8, 7).astype(np.int8) + 8
            slots = codes[..., 0::2] + 16 * codes[..., 1::2]
        found[name] = (slots * 30 if bits == 8 else slots).astype(stored)
    found |= {
        "last": np.array([used + new - 1], np.int32),
        "total": np.array(used + new, np.int32),
    }
    if bits:
        scale = np.full((shape.kv_heads, shape.size), 1 / 30 if bits == 8 else 1 / 3, np.float32)
        found |= {"key_scale": scale, "value_scale": scale}
    return found


def step(shape: Shape, kind: str, used: int, new: int = 1) -> Callable[[], float]:
    """A step of `new` tokens; gives the seconds that it took."""
    given = feeds(shape, kind, used, new)
    quantized = "key_scale" in given
    none = [""] * 5
    form: dict[str, Any] = {}
    if quantized:
        form |= {"kv_cache_bit_width": _BITS[KINDS[kind][1]]}
        form |= {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL"}
    node = helper.make_node(
        "GroupQueryAttention",
        [*list(given)[:7], *([*none, "key_scale", "value_scale"] if quantized else [])],
        ["out", "keys_out", "values_out"],
        domain="com.microsoft",
        num_heads=shape.heads,
        kv_num_heads=shape.kv_heads,
        **form,
    )

    def described(name: str, array: Any) -> Any:
        return helper.make_tensor_value_info(name, _TYPES[array.dtype.type], array.shape)

    results = {"out": given["q"], "keys_out": given["keys"], "values_out": given["values"]}
    graph = helper.make_graph(
        [node],
        "attention",
        [described(*item) for item in given.items()],
        [described(*item) for item in results.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    options = ort.SessionOptions()
    options.intra_op_num_threads = shape.threads
    session = ort.InferenceSession(
        helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString(),
        options,
        providers=["CPUExecutionProvider"],
    )
    binding = session.io_binding()
    held = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in given.items()}
    for name, value in held.items():
        binding.bind_ortvalue_input(name, value)
    binding.bind_output("out")
    for name in ("keys", "values"):
        binding.bind_ortvalue_output(f"{name}_out", held[name])

    def run() -> float:
        start = time.perf_counter()
        session.run_with_iobinding(binding)
        return time.perf_counter() - start

    return run


def child(kind: str, slots: int, new: int) -> None:
    """Prints the bytes a slot by which the process grows in its first step."""
    run = step(Shape(), kind, slots - new, new)
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = status_bytes(os.getpid(), "VmRSS")
    run()
    print(round((status_bytes(os.getpid(), "VmHWM") - before) / slots))


def held(kind: str, slots: int, new: int) -> int:
    words = ["-m", "benchmarks.slot_types", "--child", kind, str(slots), str(new)]
    found = subprocess.run([sys.executable, *words], check=True, capture_output=True, text=True)
    return int(found.stdout)


def times(shape: Shape, used: int, rounds: int) -> list[list[str]]:
    """A row a kind: the median milliseconds of a step of one token behind so many."""
    steps = {kind: step(shape, kind, used) for kind in KINDS}
    taken: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for _ in range(rounds):
        for kind, run in steps.items():
            run()  # its own caches are warm again
            taken[kind].append(run())
    found = {kind: statistics.median(seconds) * 1e3 for kind, seconds in taken.items()}
    return [
        [f"{used:,}", kind, f"{ms:.2f}", f"{ms / found['float32']:.2f}"]
        for kind, ms in found.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.slot_types", description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1000, 4000])
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--heads", type=int, nargs=3, default=[9, 3, 64], help="query, KV, size")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--slots", type=int, default=16_000, help="for the memory")
    parser.add_argument("--chunk", type=int, default=512, help="tokens of a prompt's step")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        kind, slots, new = given.child
        child(kind, int(slots), int(new))
        return
    print(machine())
    print(f"onnxruntime {ort.__version__}\n")
    heads, kv_heads, size = given.heads
    shape = Shape(heads, kv_heads, size, given.threads)
    rows = [row for used in given.tokens for row in times(shape, used, given.rounds)]
    print(table(["tokens", "kind", "ms a step", "of float32"], rows))
    memory = [[kind, f"{held(kind, given.slots, given.chunk):,}"] for kind in KINDS]
    print(f"\nA step of {given.chunk} tokens over {given.slots:,} slots:\n")
    print(table(["kind", "bytes a slot"], memory))


if __name__ == "__main__":
    main()
