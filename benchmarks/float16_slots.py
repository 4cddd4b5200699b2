"""Slots in float16 in onnxruntime's attention, beside float32 and int8: `python -m benchmarks.float16_slots`.

One GroupQueryAttention of SmolLM2's shape (9 query and 3 KV heads of 64) over a cache that it writes in
place, on two threads. Time: it decodes one token; the kinds take turns, and the table has the medians.
Memory: what the process grows by at its peak, for a step of a prompt, in bytes a slot.

- float32: queries, keys, values and slots.
- float16 slots: the slots alone, the rest in float32.
- float16 throughout: queries, keys, values and the result too.
- int8: slots with a scale a channel, the rest in float32.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper

from .client import status_bytes
from .report import machine, table

HEADS, KV_HEADS, SIZE, THREADS = 9, 3, 64, 2

_TYPES = {
    np.float32: TensorProto.FLOAT,
    np.float16: TensorProto.FLOAT16,
    np.int8: TensorProto.INT8,
    np.int32: TensorProto.INT32,
}

#: By name: the types of queries and of slots.
KINDS: dict[str, tuple[Any, Any]] = {
    "float32": (np.float32, np.float32),
    "float16 slots": (np.float32, np.float16),
    "float16 throughout": (np.float16, np.float16),
    "int8": (np.float32, np.int8),
}


def feeds(kind: str, used: int, new: int) -> dict[str, Any]:
    """The inputs of a step of `new` tokens behind `used` slots."""
    computed, stored = KINDS[kind]
    random = np.random.default_rng(0)
    found: dict[str, Any] = {
        name: random.standard_normal((1, new, heads * SIZE)).astype(computed)
        for name, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS))
    }
    for name in ("keys", "values"):
        slots = random.standard_normal((1, KV_HEADS, used + new, SIZE))
        found[name] = (slots * 30 if stored is np.int8 else slots).astype(stored)
    found |= {
        "last": np.array([used + new - 1], np.int32),
        "total": np.array(used + new, np.int32),
    }
    if stored is np.int8:
        scale = np.full((KV_HEADS, SIZE), 1 / 30, np.float32)
        found |= {"key_scale": scale, "value_scale": scale}
    return found


def step(kind: str, used: int, new: int = 1) -> Callable[[], float]:
    """A step of `new` tokens; gives the seconds that it took."""
    given = feeds(kind, used, new)
    quantized = "key_scale" in given
    none = [""] * 5
    form: dict[str, Any] = {}
    if quantized:
        form |= {"kv_cache_bit_width": 8}
        form |= {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL"}
    node = helper.make_node(
        "GroupQueryAttention",
        [*list(given)[:7], *([*none, "key_scale", "value_scale"] if quantized else [])],
        ["out", "keys_out", "values_out"],
        domain="com.microsoft",
        num_heads=HEADS,
        kv_num_heads=KV_HEADS,
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
    options.intra_op_num_threads = THREADS
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
    run = step(kind, slots - new, new)
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = status_bytes(os.getpid(), "VmRSS")
    run()
    print(round((status_bytes(os.getpid(), "VmHWM") - before) / slots))


def held(kind: str, slots: int, new: int) -> int:
    words = ["-m", "benchmarks.float16_slots", "--child", kind, str(slots), str(new)]
    found = subprocess.run([sys.executable, *words], check=True, capture_output=True, text=True)
    return int(found.stdout)


def times(used: int, rounds: int) -> list[list[str]]:
    steps = {kind: step(kind, used) for kind in KINDS}
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
    parser = argparse.ArgumentParser(prog="benchmarks.float16_slots", description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1000, 4000])
    parser.add_argument("--rounds", type=int, default=200)
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
    rows = [row for used in given.tokens for row in times(used, given.rounds)]
    print(table(["tokens", "kind", "ms a step", "of float32"], rows))
    memory = [[kind, f"{held(kind, given.slots, given.chunk):,}"] for kind in KINDS]
    print(f"\nA step of {given.chunk} tokens over {given.slots:,} slots:\n")
    print(table(["kind", "bytes a slot"], memory))


if __name__ == "__main__":
    main()
