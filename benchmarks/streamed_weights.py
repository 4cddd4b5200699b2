"""A model of twice the memory that it may use: `python -m benchmarks.streamed_weights`.

Every run is a process in a memory cgroup of the budget's size, so that the system's page cache cannot hold
the file in its place. A round is a run by pages of a packed copy, one that packs in every step, and, with
`--peers-python`, llama.cpp over a file that it maps and accelerate with layers on the disk. The bandwidth of
direct reads and the rate of packing are measured right before and behind each run by pages; beside them
stand what `einfold plan` makes of these, and the same tokens from resident weights without a limit.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from datetime import date
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from .client import ROOT, environment, status_bytes
from .entries import EINFOLD, Form
from .memory_cgroup import cgroup
from .prepare import Kitchen, default_cache, own_python
from .report import machine, slug, table

#: Tokens of the prompt; what is measured is a token behind it.
PROMPT = 8


def child(artifact: Path, memory: int, options: argparse.Namespace) -> dict[str, Any]:
    """Loads within a budget, or without one (0), writes tokens, and tells what it took."""
    import einfold

    if options.packing:
        from einfold.compiler.codegen.onnx.cut_model import CutModel

        cut: Any = CutModel
        cut.why_not_paged = lambda _: "asked for"
    started = time.perf_counter()
    within = {"memory": memory, "context": options.context} if memory else {}
    model = einfold.load(artifact, threads=options.threads, chunk=options.chunk, **within)
    loaded = time.perf_counter() - started
    runner: Any = model.engine.runner
    prompt = [5 + n % 100 for n in range(PROMPT)]
    # The prompt is a step of its own, which reads more: what it takes is measured and subtracted.
    model.generate(prompt, max_new_tokens=2, ignore_eos=True)
    first = spent(runner, lambda: model.generate(prompt, max_new_tokens=1, ignore_eos=True))
    found: list[Any] = []
    both = spent(
        runner,
        lambda: found.append(
            model.generate(prompt, max_new_tokens=options.tokens, ignore_eos=True)
        ),
    )
    steps = model.timings.decode_tokens
    return {
        "tokens": found[0].tokens,
        "load_seconds": loaded,
        "prefill_seconds": model.timings.prefill_seconds,
        "decode_seconds": model.timings.decode_seconds / model.timings.decode_tokens,
        "fetched_a_step": (both[0] - first[0]) / steps,
        "from_the_disk_a_step": (both[2] - first[2]) / steps,
        "processor_seconds_a_step": (both[1] - first[1]) / steps,
        "paged": bool(model.plan and model.plan.tiers.paged),
        "peak": status_bytes(os.getpid(), "VmHWM"),
    }


def spent(runner: Any, run: Callable[[], object]) -> tuple[int, float, int]:
    """Bytes that the runner asked the disk for, seconds of the processor, and bytes that the disk gave this
    process."""
    bytes_before, disk_before, before = getattr(runner, "fetched", 0), disk_bytes(), os.times()
    run()
    after = os.times()
    seconds = after.user + after.system - before.user - before.system
    fetched = getattr(runner, "fetched", 0) - bytes_before
    return fetched, seconds, disk_bytes() - disk_before


def disk_bytes() -> int:
    """Bytes that disks gave this process; pages that the system took away and that are read again too."""
    words = Path("/proc/self/io").read_text(encoding="ascii").split()
    return int(words[words.index("read_bytes:") + 1])


def run(
    artifact: Path, memory: int, given: argparse.Namespace, limited: bool, packing: bool = False
) -> dict[str, Any]:
    """One child, in a cgroup where it is limited; its figures, or how it ended."""
    words = [
        own_python(),
        "-m",
        "benchmarks.streamed_weights",
        "--child",
        str(artifact),
        str(memory),
    ]
    for name in ("tokens", "context", "chunk", "threads"):
        words += [f"--{name}", str(getattr(given, name))]
    return process(words + ["--packing"] * packing, given, given.memory if limited else 0)


def peer(engine: str, model: Path, given: argparse.Namespace, limit: int) -> dict[str, Any]:
    """A peer in its cgroup; what of its files others left in memory is let go first."""
    for path in [model] if model.is_file() else model.glob("*.safetensors"):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    words = [given.peers_python, "-m", "benchmarks.streamed_peers", engine, str(model)]
    tokens = min(given.tokens, 3) if engine == "accelerate" else given.tokens  # seconds each
    words += ["--tokens", str(tokens), "--threads", str(given.threads)]
    return process(words, given, limit)


def process(words: list[str], given: argparse.Namespace, limit: int) -> dict[str, Any]:
    """What a process printed, or how it ended, in a cgroup of so many bytes; 0 is none."""
    with cgroup(limit) if limit else nullcontext() as group:
        done = subprocess.run(
            words, capture_output=True, text=True, cwd=ROOT, preexec_fn=group.enter if group else None,
            env=environment(default_cache(), given.threads), timeout=given.minutes * 60, check=False,
        )  # fmt: skip
        held = group.peak() if group else 0
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["killed"]
        return {"ended": f"exit {done.returncode}: {last[0]}"}
    return {**json.loads(done.stdout.splitlines()[-1]), "cgroup_peak": held}


def measured(artifact: Path, given: argparse.Namespace) -> dict[str, Any]:
    """The machine's numbers now, and a run within the budget between them."""
    import einfold
    from einfold.compiler.codegen.onnx.packing_rate import packing_rate
    from einfold.compiler.ir.device import Device, write_device
    from einfold.runtime.memory.probe import file_bandwidth, ram_bandwidth, ram_size

    weights = artifact / "weights.safetensors"
    bandwidth, direct = file_bandwidth(weights)
    rates = (ram_bandwidth(given.threads), bandwidth, packing_rate())
    found = run(artifact, given.memory, given, limited=True)
    again = (ram_bandwidth(given.threads), file_bandwidth(weights)[0], packing_rate())
    ram, disk, packing = (statistics.mean(pair) for pair in zip(rates, again, strict=True))
    with TemporaryDirectory() as folder:
        file = Path(folder) / "device.toml"
        write_device(Device(given.threads, ram_size(), ram, disk, packing, "benchmark"), file)
        plan = einfold.plan(
            artifact, memory=given.memory, context=given.context, chunk=given.chunk, device=file
        )
    data = plan.data() | {"artifact": artifact.name}
    return {"run": found, "beside": others(artifact, given), "plan": data, "direct": direct}


def bound(plan: dict[str, Any]) -> float:
    """Seconds below which no token is within the budget: the longer of computing and of reading what memory
    has no room for, with no room for what is read ahead."""
    room = plan["budget"] - plan["process"] - plan["cache"] - plan["activations"]
    weights = sum(op["held"] for op in plan["super_ops"])
    reading = (weights - room) / plan["device"]["disk_bandwidth"]
    return float(max(reading, plan["compute_seconds"]))


def others(artifact: Path, given: argparse.Namespace) -> dict[str, Any]:
    """What runs beside it in the same round."""
    if given.alone:
        return {}
    found = {"packing": run(artifact, given.memory, given, limited=True, packing=True)}
    if given.peers_python:
        found["llama.cpp"] = peer("llama.cpp", given.gguf, given, given.memory)
        found["accelerate"] = peer("accelerate", given.checkpoint, given, given.accelerate)
    return found


def line(number: int, found: dict[str, Any]) -> list[str]:
    ran, plan = found["run"], found["plan"]
    device = plan["device"]
    if "ended" in ran:
        return [str(number), ran["ended"], *[""] * 13]
    rate = ran["fetched_a_step"] / ran["decode_seconds"]
    return [
        str(number),
        f"{1 / ran['decode_seconds']:.3f}",
        f"{ran['decode_seconds']:.3f}",
        f"{ran['processor_seconds_a_step']:.3f}",
        f"{plan['seconds']:.3f} ({plan['bound']})",
        f"{ran['decode_seconds'] / plan['seconds']:.2f}",
        f"{ran['decode_seconds'] / bound(plan):.2f}",
        f"{ran['fetched_a_step'] / plan['fetched']:.3f}",
        f"{ran['from_the_disk_a_step'] / plan['fetched']:.3f}",
        f"{device['disk_bandwidth'] / 1e9:.2f}",
        f"{device['pack_bandwidth'] / 1e9:.2f}",
        f"{100 * rate / device['disk_bandwidth']:.0f} %",
        f"{100 * rate / device['pack_bandwidth']:.0f} %",
        f"{ran['peak'] / 2**20:.0f}",
        f"{ran['cgroup_peak'] / 2**20:.0f}",
    ]


HEADS = (
    "round", "tokens/s", "s a token", "processor's s", "s by the plan", "measured/plan", "measured/bound",
    "bytes/plan", "from the disk/plan", "disk GB/s",
    "packing GB/s",
    "of the disk", "of packing", "peak MiB", "cgroup's MiB",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.streamed_weights", description=__doc__)
    parser.add_argument("--shape", default="llama-3.2-1b")
    parser.add_argument("--artifact", type=Path, help="one that is there, in place of a shape")
    parser.add_argument(
        "--memory", type=int, default=0, help="bytes; half of the weights' without it"
    )
    parser.add_argument("--tokens", type=int, default=12)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--chunk", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=8, help="of one run")
    parser.add_argument("--out", type=Path, help="a folder for the results")
    parser.add_argument("--peers-python", help="interpreter of `make bench-peers`, with accelerate")
    parser.add_argument(
        "--accelerate",
        type=int,
        default=0,
        help="bytes of its cgroup; half of its weights without it",
    )
    parser.add_argument("--alone", action="store_true", help="nothing beside it in the rounds")
    parser.add_argument("--packing", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        print(json.dumps(child(Path(given.child[0]), int(given.child[1]), given)))
        return
    peers = given.peers_python or own_python()
    kitchen = Kitchen(default_cache(), own_python(), peers, given.threads, print)
    artifact = given.artifact or kitchen.form(given.shape, Form(EINFOLD, ("int4",)))
    size = (artifact / "weights.safetensors").stat().st_size
    given.memory = given.memory or size // 2
    if given.peers_python:
        given.gguf = kitchen.form(given.shape, Form("gguf"))
        given.checkpoint = kitchen.model(given.shape)
        held = sum(file.stat().st_size for file in given.checkpoint.glob("*.safetensors"))
        given.accelerate = given.accelerate or held // 2
    resident = run(artifact, 0, given, limited=False)
    alone = run(artifact, 0, given, limited=True)
    rounds = []
    for _ in range(given.rounds):
        rounds.append(measured(artifact, given))
        print(json.dumps(rounds[-1]), file=sys.stderr, flush=True)  # each takes minutes
    same = all(
        ran.get("tokens") == resident.get("tokens")
        for found in rounds
        for ran in (found["run"], found["beside"].get("packing", found["run"]))
    )
    report(given, size, resident, alone, rounds, same)


def report(
    given: argparse.Namespace,
    size: int,
    resident: dict[str, Any],
    alone: dict[str, Any],
    rounds: list[dict[str, Any]],
    same: bool,
) -> None:
    found = machine()
    versions = {name: metadata.version(name) for name in ("einfold", "onnxruntime", "numpy")}
    plan = rounds[0]["plan"]
    tiers = [op["tier"] for op in plan["super_ops"]]
    text = [
        f"# Weights from the disk, {date.today()}, {found['cpu']}, {given.threads} threads\n",
        f"{given.shape}, int4 in blocks of 32 and the head in int8: {size / 2**20:.0f} MiB of weights in a "
        f"memory cgroup of {given.memory / 2**20:.0f} MiB; {PROMPT} tokens of a prompt, {given.tokens} new "
        f"ones, room for {given.context}. {', '.join(f'{k} {v}' for k, v in versions.items())}. A shared "
        "machine: figures are of the same minutes, bandwidths the mean of before and behind each run.\n",
        f"Pinned {tiers.count('pinned')} super-ops, streamed {tiers.count('streamed')}: "
        f"{plan['fetched'] / 2**20:.0f} MiB a token. Peak by the plan {plan['peak'] / 2**20:.0f} MiB. Tokens "
        f"{'are' if same else 'ARE NOT'} those of resident weights. Reads are "
        f"{'direct' if rounds[0]['direct'] else 'through the page cache'}.\n",
        table(list(HEADS), [line(n + 1, found) for n, found in enumerate(rounds)]),
        "\nThe same rounds beside others, seconds a token; the last column is the median of each round's "
        "ratio to the run by pages.\n",
        table(*beside(rounds)),
        f"\nResident, no limit: {_of(resident)}. Resident in the cgroup: {_of(alone)}.",
    ]
    print("\n".join(text))
    if given.out:
        name = f"streamed-weights-{date.today()}-{slug(found)}"
        (given.out / f"{name}.md").write_text("\n".join(text) + "\n", encoding="utf-8")
        data = {
            "machine": found,
            "versions": versions,
            "resident": resident,
            "alone": alone,
            "rounds": rounds,
        }
        (given.out / f"{name}.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def beside(rounds: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """The table of what ran in the same rounds."""
    heads = [
        "",
        *(f"round {n + 1}" for n in range(len(rounds))),
        "MiB a token",
        "cgroup's MiB",
        "ratio",
    ]
    rows = []
    for name in ("pages", *rounds[0]["beside"]):
        runs = [r["run"] if name == "pages" else r["beside"][name] for r in rounds]
        whole = [r for r in runs if "ended" not in r]
        ratios = [
            ran["decode_seconds"] / r["run"]["decode_seconds"]
            for ran, r in zip(runs, rounds, strict=True)
            if "ended" not in ran and "ended" not in r["run"]
        ]
        mean = [statistics.median(r[k] for r in whole) / 2**20 if whole else 0 for k in (
            "fetched_a_step", "cgroup_peak",
        )]  # fmt: skip
        rows.append(
            [
                name,
                *(r["ended"] if "ended" in r else f"{r['decode_seconds']:.2f}" for r in runs),
                *(f"{value:.0f}" for value in mean),
                f"{statistics.median(ratios):.2f}" if ratios else "",
            ]
        )
    return heads, rows


def _of(ran: dict[str, Any]) -> str:
    if "ended" in ran:
        return str(ran["ended"])
    return f"{1 / ran['decode_seconds']:.1f} tokens/s, peak {ran['peak'] / 2**20:.0f} MiB"


if __name__ == "__main__":
    main()
