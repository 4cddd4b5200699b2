"""One weight in each format on onnxruntime: `python -m benchmarks.weight_formats [--out DIR] [SCHEME ..]`.

A linear of [19456, 896], as wide as the gate and up projections of two layers of a 0.5B model together, on
one thread, with 1 row and with 128. All formats are loaded at once and take turns in rounds; what counts is
the processor's clock, so that waiting for a shared machine is left out, and the least over rounds. Memory is
what is anonymous once the model is loaded, and the most while it was (VmHWM), each format in a process of its
own.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import tempfile
import time
from datetime import date
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch

from einfold.compiler.codegen.onnx.lower import lower
from einfold.compiler.ir.parser import parse
from einfold.compiler.ir.printer import print_program
from einfold.compiler.ir.quant.scheme import PRESETS, read_scheme
from einfold.compiler.ir.weights import Weight
from einfold.compiler.ir.weights_file import write_weights
from einfold.compiler.passes.weight_quant.quantize_weights import QuantizeWeights
from einfold.compiler.passes.weight_quant.round_activations import RoundActivations

from .report import machine

ROWS, WIDTH = 19456, 896
GRAPH = f"""einfold.ir 1
model architecture="linear" vocabulary=8 context=8 hidden={WIDTH}
weight @w.weight : f32[{ROWS}, {WIDTH}]
input %x "x" : f32[N, {WIDTH}]
read %w "w.weight" : f32[{ROWS}, {WIDTH}]
call %y = einfold.linear(%x, %w, none) : f32[N, {ROWS}]
output "y" = %y
"""
#: Beside the presets.
MORE = (
    "grouped(bits=4,block=32,symmetric=0)",
    "grouped(bits=4,block=32,scales=f16)",
    "grouped(bits=4,block=32,scales=q8)",
    "grouped(bits=4,block=128)",
    "grouped(bits=3,block=64)",
    "grouped(bits=2,block=16)",
    "grouped(bits=8,block=0)",
    "grouped(bits=8,block=0) x int8",
    "qserve x int8",
)


def write(text: str, folder: Path) -> float:
    """Writes the linear in a scheme, or as it comes; bits a weight in the file. Behind " x " stands what
    activations are rounded to."""
    scheme, _, activations = text.partition(" x ")
    weight = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(0))
    found = parse(GRAPH, lambda name, declared: Weight.of(weight))
    if text != "fp32":
        QuantizeWeights(read_scheme(scheme)).run(found)
    if activations:
        RoundActivations().run(found)
    copies = {name: found.weights[name].load() for name in found.weights}
    found = parse(print_program(found), lambda name, declared: Weight.of(copies[name]))
    placements, _ = write_weights(found.weights, folder / "w.safetensors")
    ir.save(lower(found, "w.safetensors", placements), folder / "m.onnx")
    return 8 * sum(copy.nbytes for copy in copies.values()) / weight.numel()


def session(folder: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    path = str(folder / "m.onnx")
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _status() -> dict[str, int]:
    """Kilobytes of memory by kind."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return {
        k: int(v.split()[0]) for k, _, v in (line.partition(":") for line in lines) if "kB" in v
    }


def memory(folder: Path) -> tuple[float, float, float]:
    """Bytes a weight held once the model is loaded, and at most while it was; seconds of the processor."""
    trim = ctypes.CDLL(None).malloc_trim  # what was let go of is not to be taken again
    trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    before, start = _status(), time.process_time()
    kept = session(folder)
    seconds = time.process_time() - start
    peak = _status()["VmHWM"] - before["VmRSS"]
    trim(0)
    held = _status()["RssAnon"] - before["RssAnon"]
    del kept
    return held * 1024 / (ROWS * WIDTH), peak * 1024 / (ROWS * WIDTH), seconds


def times(folders: dict[str, Path], rounds: int) -> dict[str, dict[int, float]]:
    """Milliseconds of the processor for a product with so many rows, the least over rounds."""
    sessions = {text: session(folder) for text, folder in folders.items()}
    found: dict[str, dict[int, float]] = {text: {} for text in folders}
    for rows in (1, 128):
        x = np.random.default_rng(0).standard_normal((rows, WIDTH)).astype(np.float32)
        for at in range(1 + rounds):
            for text in [*folders][at % len(folders) :] + [*folders][: at % len(folders)]:
                start = time.process_time()
                for _ in range(5 if rows == 1 else 1):
                    sessions[text].run(None, {"x": x})
                spent = (time.process_time() - start) * 1e3 / (5 if rows == 1 else 1)
                if at:  # the first time memory is taken
                    found[text][rows] = min(spent, found[text].get(rows, spent))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("schemes", nargs="*")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    presets = [str(preset.scheme) for preset in PRESETS.values() if preset.scheme is not None]
    texts = asked.schemes or ["fp32", *presets, *MORE]
    with tempfile.TemporaryDirectory() as root:
        folders = {text: Path(root) / str(at) for at, text in enumerate(texts)}
        bits, held = {}, {}
        for text, folder in folders.items():
            os.mkdir(folder)
            bits[text] = write(text, folder)
            with get_context("fork").Pool(1) as pool:
                held[text] = pool.apply(memory, (folder,))
        spent = times(folders, asked.rounds)
    rows: list[dict[str, Any]] = [
        {"format": text, "bits": bits[text], "held": held[text], "ms": spent[text]}
        for text in texts
    ]
    page = _page(rows)
    print(page)
    if asked.out is not None:
        (asked.out / "weight_formats.json").write_text(
            json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n"
        )
        (asked.out / "weight_formats.md").write_text(page)


def _page(rows: list[dict[str, Any]]) -> str:
    int4 = next((row["ms"] for row in rows if row["format"] == str(PRESETS["int4"].scheme)), None)
    where = machine()
    lines = [
        "# Formats of weights on onnxruntime\n",
        f"{date.today()}, {where['cpu']} ({where['flags']}), onnxruntime {onnxruntime.__version__}, one "
        f"thread. A weight [{ROWS}, {WIDTH}], memory in bytes a weight: `benchmarks/weight_formats.py`.\n",
        "| format | bits in the file | bytes held | bytes at most | load s | ms, 1 row | ms, 128 rows |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        beside = [
            f"{row['ms'][n]:.2f}" + (f" ({row['ms'][n] / int4[n]:.2f} of int4)" if int4 else "")
            for n in (1, 128)
        ]
        held, most, load = row["held"]
        lines.append(
            f"| {row['format']} | {row['bits']:.2f} | {held:.2f} | {most:.2f} | {load:.2f} | "
            f"{' | '.join(beside)} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
