"""Experts that stay from token to token, beside an LRU and another version of einfold.

    python -m benchmarks.streamed_experts ARTIFACT [--parts 0.25 0.5] [--other TREE] [--out FOLDER]

Every run is a process in a memory cgroup of its budget: what the process takes beside weights, and a part of
the weights' bytes. A round is a run of each: `own` policy, an LRU in its place, and `other`, the same from
another checkout. Bytes from the disk are the system's count for the process. Tokens are sampled, with one
seed, behind a prompt of held-out text, or with `--read` those of that text, read one by one. Packed copies
and what runs keep of experts lie in the benchmark's own cache, not in the user's.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

from .client import ROOT
from .expert_models import held_out
from .memory_cgroup import cgroup
from .prepare import default_cache, own_python
from .report import machine, slug, table

#: Tokens of the prompt.
PROMPT = 64

_WORKER = Path(__file__).parent / "workers" / "experts.py"


def run(
    artifact: Path, memory: int, given: argparse.Namespace, tree: Path, policy: str
) -> dict[str, Any]:
    """One process in its cgroup; what it printed, or how it ended."""
    way = "read" if given.read else "write"
    count = PROMPT + given.tokens if given.read else PROMPT
    ids = " ".join(str(byte) for byte in held_out()[:count])
    cache = default_cache() / "experts"
    for kept in cache.rglob("experts.json"):  # what the run before found would be planned with
        kept.unlink()
    with cgroup(memory) as group:
        done = subprocess.run(
            [own_python(), str(_WORKER), str(artifact), str(memory), str(given.tokens), policy, way],
            capture_output=True, text=True, input=ids, cwd=tree, preexec_fn=group.enter, check=False,
            env=os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "EINFOLD_CACHE": str(cache)},
            timeout=900,
        )  # fmt: skip
        peak = group.peak()
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["killed"]
        return {"ended": f"exit {done.returncode}: {last[0][:160]}"}
    return {**json.loads(done.stdout.splitlines()[-1]), "cgroup_peak": peak}


def line(
    name: str, part: float, runs: list[dict[str, Any]], own: list[dict[str, Any]]
) -> list[str]:
    """The medians of a variant's runs, and of the ratios to the run of the same round."""
    whole = [found for found in runs if "ended" not in found]
    if not whole:
        return [f"{part:g}", name, runs[0]["ended"], *[""] * 7]

    def middle(key: str) -> float:
        return float(statistics.median(found[key] for found in whole))

    pairs = zip(runs, own, strict=True)
    ratios = [
        a["seconds"] / b["seconds"] for a, b in pairs if "ended" not in a and "ended" not in b
    ]
    plan = whole[0]["plan"]
    told = plan.get("experts")
    return [
        f"{part:g}",
        name,
        f"{middle('disk_bytes') / 2**20:.1f}",
        f"{plan['fetched'] / 2**20:.1f}",
        "" if whole[0]["hit_rate"] is None else f"{middle('hit_rate'):.3f}",
        "" if told is None else f"{told['hit_rate']:.3f}{'' if told['measured'] else ' (assumed)'}",
        f"{middle('seconds'):.3f}",
        f"{statistics.median(ratios):.2f}" if ratios else "",
        f"{middle('prompt_bytes') / 2**20:.0f}",
        f"{max(f['cgroup_peak'] for f in whole) / 2**20:.0f} of {plan['budget'] / 2**20:.0f}",
    ]


def _figures(found: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in found.items() if name not in ("plan", "tokens")}


HEADS = (
    "weights held", "", "MiB a token", "by the plan", "hit rate", "by the plan", "s a token", "ratio to own",
    "MiB of the prompt", "cgroup's MiB",
)  # fmt: skip


def main() -> None:
    import einfold

    parser = argparse.ArgumentParser(prog="benchmarks.streamed_experts", description=__doc__)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--parts", type=float, nargs="+", default=[0.25, 0.5])
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--read", action="store_true", help="a text, in place of writing one")
    parser.add_argument("--other", type=Path, help="a checkout of another version")
    parser.add_argument("--out", type=Path, help="a folder for the results")
    given = parser.parse_args()
    context = PROMPT + given.tokens * (2 if given.read else 1)
    room = {"context": context, "chunk": 1 if given.read else 64}
    fixed = einfold.plan(given.artifact, memory=1 << 40, **room).tiers.fixed.total
    size = (given.artifact / "weights.safetensors").stat().st_size
    variants = [("own", ROOT, "own"), ("LRU", ROOT, "lru")]
    if given.other:
        variants.append(("other", given.other, "own"))
    lines, runs_of = [], {}
    for part in given.parts:
        found: dict[str, list[dict[str, Any]]] = {name: [] for name, _, _ in variants}
        for number in range(given.rounds):
            order = variants[number % len(variants) :] + variants[: number % len(variants)]
            for name, tree, policy in order:
                memory = fixed + round(part * size)
                found[name].append(run(given.artifact, memory, given, tree, policy))
                print(part, name, json.dumps(found[name][-1]), file=sys.stderr, flush=True)
        lines += [line(name, part, runs, found["own"]) for name, runs in found.items()]
        runs_of[f"{part:g}"] = found
    every = [r for found in runs_of.values() for runs in found.values() for r in runs]
    whole = [r["tokens"] for r in every if "ended" not in r]
    same = all(tokens == whole[0] for tokens in whole)
    this = machine()
    versions = {name: metadata.version(name) for name in ("einfold", "onnxruntime", "numpy")}
    text = [
        f"# Experts from the disk, {date.today()}, {this['cpu']}, 1 thread\n",
        f"{given.artifact.name}: {size / 2**20:.0f} MiB of weights, {fixed / 2**20:.0f} MiB beside them; "
        f"{PROMPT} + {given.tokens} tokens {'read' if given.read else 'written'}, {given.rounds} rounds; "
        f"tokens {'are' if same else 'ARE NOT'} the same in every run. "
        f"{', '.join(f'{k} {v}' for k, v in versions.items())}.\n",
        table(list(HEADS), lines),
    ]
    print("\n".join(text))
    if given.out:
        way = "read" if given.read else "written"
        file = (
            given.out / f"streamed-experts-{given.artifact.name}-{way}-{date.today()}-{slug(this)}"
        )
        file.with_name(f"{file.name}.md").write_text("\n".join(text) + "\n", encoding="utf-8")
        # Of a part all runs have one plan, and all wrote the same tokens, or the page says otherwise.
        plans = {part: found["own"][0].get("plan") for part, found in runs_of.items()}
        runs = {
            part: {name: [_figures(run) for run in runs] for name, runs in found.items()}
            for part, found in runs_of.items()
        }
        kept = {"machine": this, "versions": versions, "plans": plans, "runs": runs}
        file.with_name(f"{file.name}.json").write_text(
            json.dumps(kept, indent=1) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    main()
