"""Runs a model of twice the memory that it may use of a CUDA device, and times it beside accelerate.

    python -m benchmarks.gpu.offload [--shape llama-3.2-1b] [--part 0.5] [--tokens 32] [--out FILE]

Nothing here has run on a GPU yet: it was written, and its parts without a device were tested, on CPUs.
A model of a real shape with random weights is compiled to int4 for Triton, and loaded with room for a part of
its weights on the device; the rest lies in page-locked memory and is copied in every step. A token's seconds
are the median behind a prompt, beside what the plan makes of the bandwidths that are measured here; the bytes
of a token over its seconds are a share of the bandwidth of the link. Beside it stand all weights on the
device, and accelerate, which has the same part of the bfloat16 checkpoint on the device and the rest in the
machine's memory.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

import einfold
from benchmarks.shapes import SHAPES, write_model
from einfold.compiler.ir.device import Device, write_device
from einfold.errors import OutOfMemoryError
from einfold.planning import Plan
from einfold.runtime.memory.gpu_probe import measured_gpu

from .table import Table, beside, has_device, versions

#: Tokens of the prompt, and of prompt and answer together that there is room for.
PROMPT, CONTEXT = 64, 512


@dataclass(frozen=True)
class Run:
    """Tokens within a budget."""

    seconds: float
    """Of a token, the median."""
    copied: float
    """Bytes that were copied for one."""


def budget_of(artifact: Path, part: float) -> int:
    """The memory of the device that holds so large a part of the weights, beside what is not weights."""
    tiers = einfold.plan(artifact, memory=1 << 50, context=CONTEXT).tiers
    weights = sum(piece.held for piece in tiers.pieces)
    return tiers.fixed.total + int(part * weights)


def planned(artifact: Path, memory: int, device: Device) -> Plan:
    """What the plan for a device says."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "device.toml"
        write_device(device, path)
        return einfold.plan(artifact, memory=memory, context=CONTEXT, device=path)


def timed(model: Any, tokens: int) -> Run:
    """Writes tokens behind a prompt. A step ends with its logits on the host."""
    prompt = [5 + n % 100 for n in range(PROMPT)]
    model.generate(prompt, max_new_tokens=4, ignore_eos=True)  # compiles what it launches
    runner, seconds, copied = model.engine.runner, list[float](), list[int]()
    step = runner.step

    def timed_step(*given: Any) -> Any:
        started = time.perf_counter()
        logits = step(*given)
        seconds.append(time.perf_counter() - started)
        copied.append(getattr(runner, "fetched", 0))
        return logits

    runner.step = timed_step
    model.generate(prompt, max_new_tokens=tokens + 1, ignore_eos=True)
    return Run(statistics.median(seconds[1:]), (copied[-1] - copied[0]) / (len(copied) - 1))


def resident(artifact: Path, tokens: int) -> float:
    """Seconds of a token with all weights on the device; raises OutOfMemoryError where they have no room."""
    model = einfold.load(artifact)
    if model.plan is not None:
        raise OutOfMemoryError("not all of the weights have room on the device")
    return timed(model, tokens).seconds


def accelerate(folder: Path, share: float, tokens: int) -> Callable[[], float]:
    """Seconds of a token by accelerate, with a share of the checkpoint's bytes on the device."""

    def seconds() -> float:
        from transformers import AutoModelForCausalLM

        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        room: dict[int | str, int] = {0: int(share * size), "cpu": 2 * size}
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16, device_map="auto", max_memory=room
        )
        ids = torch.tensor([[5 + n % 100 for n in range(PROMPT)]], device="cuda")
        past, found = None, list[float]()
        with torch.no_grad():
            for _ in range(tokens + 1):
                started = time.perf_counter()
                out = model(ids, past_key_values=past, use_cache=True, logits_to_keep=1)
                past, ids = out.past_key_values, out.logits[:, -1:].argmax(-1).to("cuda")
                torch.cuda.synchronize()
                found.append(time.perf_counter() - started)
        return statistics.median(found[1:])

    return seconds


def row(plan: Plan, run: Run, link: float, others: str) -> str:
    """A row of the table."""
    tiers = plan.tiers
    weights = sum(piece.held for piece in tiers.pieces)
    sizes = (tiers.budget, weights, tiers.fetched, run.copied)
    cells = [f"{size / 2**20:,.0f}" for size in sizes]
    cells += [f"{1 / run.seconds:.2f}", f"{run.seconds / plan.step.seconds:.2f}x"]
    cells += [f"{run.copied / run.seconds / link:.0%}", others]
    return f"| {' | '.join(cells)} |"


def heading(name: str, shape: str, device: Device) -> list[str]:
    """What stands above the rows."""
    return [
        f"# Weights that have no room on {name}: {SHAPES[shape].title} in int4",
        "",
        f"{versions()}. A copy from page-locked memory moves {device.link_bandwidth / 1e9:.1f} GB/s, and the "
        f"device's memory {device.gpu_bandwidth / 1e9:,.0f} GB/s, measured in the same run. One row of "
        f"{PROMPT} tokens, then one token after the other. The plan's seconds are made of these two "
        "bandwidths; the link's share is the bytes that were copied for a token over its seconds. A peer at "
        "1.20x takes 1.20 times as long.",
        "",
        "| budget MiB | weights MiB | copied MiB by the plan | copied MiB | tokens a second | over the "
        "plan | share of the link | peers |",
        "|---|---|---|---|---|---|---|---|",
    ]


def main() -> int:
    """Runs the benchmark; without a CUDA device it says so and measures nothing."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--shape", default="llama-3.2-1b", choices=sorted(SHAPES))
    parser.add_argument("--part", type=float, default=0.5, help="of the weights on the device")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--out", type=Path, help="where the table goes")
    options = parser.parse_args()
    if not has_device():
        return 1
    gpu = measured_gpu()
    assert gpu is not None
    memory, reading, link = gpu
    device = Device(
        gpu_memory=memory, gpu_bandwidth=reading, link_bandwidth=link, gpu_source="measured"
    )
    table = Table("offload", options.shape, options.out)
    table.add(*heading(torch.cuda.get_device_name(), options.shape, device))
    with TemporaryDirectory() as kept:
        model, artifact = Path(kept) / "model", Path(kept) / "artifact"
        write_model(options.shape, model)
        einfold.compile(model, artifact, target="triton", recipe="int4", check=False)
        budget = budget_of(artifact, options.part)
        plan = planned(artifact, budget, device)
        streamed = einfold.load(artifact, memory=budget, context=CONTEXT)
        run = timed(streamed, options.tokens)
        streamed.engine.runner.close()  # its page-locked memory goes before others come
        del streamed
        peers = {
            "all on the device": lambda: resident(artifact, options.tokens),
            "accelerate, bfloat16": accelerate(model, options.part, options.tokens),
        }
        others = beside(peers, lambda seconds: seconds(), run.seconds)
        table.add(row(plan, run, link, others))
    return 0


if __name__ == "__main__":
    sys.exit(main())
