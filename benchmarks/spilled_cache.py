"""A cache of twice the memory that the process may use: `python -m benchmarks.spilled_cache`.

A small Llama with random weights continues a long prompt. Every run is a process; one within the budget is in
a memory cgroup of its size, so that the system's page cache cannot hold the file in its place. The disk's
bandwidth is measured right before and behind each. Beside them stand what `einfold plan` says, and the same
tokens from a cache in memory without a limit.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from datetime import date
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from .client import status_bytes
from .prepare import default_cache, own_python
from .report import machine, slug, table
from .streamed_weights import process

#: Of the model: its width, heads and the size of each.
WIDTH, HEADS, SIZE = 512, 8, 64

VOCABULARY = 512


def make(folder: Path, given: argparse.Namespace) -> Path:
    """The artifact; made where it is not there."""
    import einfold

    out = folder / f"spilled-{given.layers}-{given.context}-{given.cache}"
    if out.exists():
        return out
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=2 * WIDTH, head_dim=SIZE,
        num_hidden_layers=given.layers, num_attention_heads=HEADS, num_key_value_heads=HEADS,
        max_position_embeddings=given.context, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    einfold.compile(model, out, recipe="int4", cache=given.cache, check=False)
    return out


def child(artifact: Path, memory: int, given: argparse.Namespace) -> dict[str, Any]:
    """Reads a prompt within a budget, or without one (0), writes tokens, and tells what each took."""
    import einfold

    within = {"memory": memory, "context": given.context} if memory else {}
    model = einfold.load(artifact, threads=given.threads, chunk=given.chunk, **within)
    engine = model.engine
    prompt = np.random.default_rng(0).integers(3, VOCABULARY, given.context - given.new - 1)
    cache = engine.allocate(1, given.context, prompt.size)
    started = time.perf_counter()
    logits = engine.prefill(cache, [prompt])
    found: dict[str, Any] = {"prefill_seconds": time.perf_counter() - started}
    spilled, tokens, steps = model.spilled, [int(logits[0].argmax())], []
    found["prefill"] = _moved(spilled)
    for _ in range(given.new):
        before, started, busy = _moved(spilled), time.perf_counter(), os.times()
        one = np.array([[tokens[-1]]])
        logits = engine.step(cache, one, cache.lengths[:, None], np.zeros(1, np.int64))
        cache.advance(1, engine.runner.observed)
        tokens.append(int(logits[0].argmax()))
        after, done = _moved(spilled), os.times()
        processor = done.user + done.system - busy.user - busy.system
        moved = [b - a for a, b in zip(before, after, strict=True)]
        steps.append([time.perf_counter() - started, processor, *moved])
    names = ("seconds", "processor", "read", "written", "waited")
    found |= {
        name: list(values) for name, values in zip(names, zip(*steps, strict=True), strict=True)
    }
    return found | {"tokens": tokens, "peak": status_bytes(os.getpid(), "VmHWM")}


def _moved(spilled: Any) -> tuple[int, int, float]:
    """Bytes read and written so far, and seconds that were waited for them."""
    return (
        (0, 0, 0.0) if spilled is None else (spilled.read, spilled.written, spilled.waited_seconds)
    )


def run(artifact: Path, memory: int, given: argparse.Namespace, limited: bool) -> dict[str, Any]:
    """One child, in a cgroup where it is limited; its figures, or how it ended."""
    words = [own_python(), "-m", "benchmarks.spilled_cache", "--child", str(artifact), str(memory)]
    for name in ("context", "chunk", "threads", "new"):
        words += [f"--{name}", str(getattr(given, name))]
    return process(words, given, given.memory if limited else 0)


def measured(artifact: Path, given: argparse.Namespace) -> dict[str, Any]:
    """A run within the budget between two measurements of the machine, and its plan by these."""
    import einfold
    from einfold.compiler.ir.device import Device, write_device
    from einfold.runtime.memory.probe import disk_bandwidth, ram_bandwidth, ram_size

    def rates() -> tuple[float, float]:
        return ram_bandwidth(given.threads), disk_bandwidth(default_cache())[0]

    before = rates()
    found = run(artifact, given.memory, given, limited=True)
    ram, disk = (statistics.mean(pair) for pair in zip(before, rates(), strict=True))
    with TemporaryDirectory() as folder:
        file = Path(folder) / "device.toml"
        write_device(Device(given.threads, ram_size(), ram, disk, source="benchmark"), file)
        sizes = {"memory": given.memory, "context": given.context, "chunk": given.chunk}
        plan = einfold.plan(artifact, device=file, **sizes)
    return {"run": found, "plan": plan.data() | {"artifact": artifact.name}}


HEADS_OF_TABLE = (
    "round", "s a token", "by the plan", "processor's s", "waited s", "MiB read a token", "MiB written",
    "GB/s", "disk GB/s", "of the disk", "prompt s", "cgroup's MiB",
)  # fmt: skip


def line(number: int, found: dict[str, Any]) -> list[str]:
    ran, plan = found["run"], found["plan"]
    if "ended" in ran:
        return [str(number), ran["ended"], *[""] * (len(HEADS_OF_TABLE) - 2)]
    seconds = statistics.median(ran["seconds"])
    read, disk = statistics.median(ran["read"]), plan["device"]["disk_bandwidth"]
    return [
        str(number),
        f"{seconds:.3f}",
        f"{plan['seconds']:.3f} ({plan['bound']})",
        f"{statistics.median(ran['processor']):.3f}",
        f"{statistics.median(ran['waited']):.3f}",
        f"{read / 2**20:.0f}",
        f"{(ran['prefill'][1] + sum(ran['written'])) / 2**20:.0f}",
        f"{read / seconds / 1e9:.2f}",
        f"{disk / 1e9:.2f}",
        f"{100 * read / seconds / disk:.0f} %",
        f"{ran['prefill_seconds']:.1f}",
        f"{ran['cgroup_peak'] / 2**20:.0f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.spilled_cache", description=__doc__)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--context", type=int, default=6144)
    parser.add_argument("--cache", default="f32", choices=("f32", "int8"))
    parser.add_argument(
        "--memory", type=int, default=0, help="bytes; half of the cache's without it"
    )
    parser.add_argument("--chunk", type=int, default=256)
    parser.add_argument(
        "--new", type=int, default=8, help="tokens behind the prompt that are measured"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=15, help="of one run")
    parser.add_argument("--out", type=Path, help="a folder for the results")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        print(json.dumps(child(Path(given.child[0]), int(given.child[1]), given)))
        return
    import einfold

    artifact = make(default_cache(), given)
    sizes = {"context": given.context, "chunk": given.chunk}
    cache = einfold.plan(artifact, memory=1 << 40, **sizes).tiers.cache
    given.memory = given.memory or cache // 2
    if einfold.plan(artifact, memory=given.memory, **sizes).tiers.spill is None:
        parser.error(f"within {given.memory:,} bytes nothing is spilled; give less --memory")
    whole = run(artifact, 0, given, limited=False)
    alone = run(artifact, 0, given, limited=True)
    rounds = [measured(artifact, given) for _ in range(given.rounds)]
    same = all(found["run"].get("tokens") == whole.get("tokens") for found in rounds)
    report(given, cache, whole, alone, rounds, same)


def report(
    given: argparse.Namespace,
    cache: int,
    whole: dict[str, Any],
    alone: dict[str, Any],
    rounds: list[dict[str, Any]],
    same: bool,
) -> None:
    found, plan = machine(), rounds[0]["plan"]
    versions = {name: metadata.version(name) for name in ("einfold", "onnxruntime", "numpy")}
    spilled = plan["spilled"]
    text = [
        f"# A cache from the disk, {date.today()}, {found['cpu']}, {given.threads} threads\n",
        f"A Llama of {given.layers} layers, {WIDTH} wide, {HEADS} key-value heads of {SIZE}, random "
        f"weights in int4; a cache of {given.context:,} tokens in {given.cache}, {cache / 2**20:.0f} MiB, in "
        f"a memory cgroup of {given.memory / 2**20:.0f} MiB. A token behind the prompt, the median of "
        f"{given.new}. "
        f"{', '.join(f'{name} {text}' for name, text in versions.items())}. A shared machine: figures are of "
        "the same minutes, bandwidths the mean of before and behind each run.\n",
        f"Spilled are {len(spilled['layers'])} layers, {spilled['bytes'] / 2**20:.0f} MiB; peak by the "
        f"plan {plan['peak'] / 2**20:.0f} MiB. Tokens {'are' if same else 'ARE NOT'} those of a cache in "
        "memory.\n",
        table(list(HEADS_OF_TABLE), [line(n + 1, each) for n, each in enumerate(rounds)]),
        f"\nIn memory, no limit: {_of(whole)}. In memory in the cgroup: {_of(alone)}.",
    ]
    print("\n".join(text))
    if given.out:
        name = f"spilled-cache-{given.cache}-{date.today()}-{slug(found)}"
        (given.out / f"{name}.md").write_text("\n".join(text) + "\n", encoding="utf-8")
        data = {
            "machine": found,
            "versions": versions,
            "whole": whole,
            "alone": alone,
            "rounds": rounds,
        }
        (given.out / f"{name}.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def _of(ran: dict[str, Any]) -> str:
    if "ended" in ran:
        return str(ran["ended"])
    seconds, peak = statistics.median(ran["seconds"]), ran["peak"] / 2**20
    return f"{seconds:.3f} s a token, prompt {ran['prefill_seconds']:.1f} s, peak {peak:.0f} MiB"


if __name__ == "__main__":
    main()
