"""Methods that keep a share of a prompt, on SmolLM2-135M-Instruct: `python -m benchmarks.kept_tokens`.

Each method keeps 50, 25 and 12 % of every prompt. A row is compiled once; its budgets of tokens are then
scaled to the length of each prompt, so that shares are what they are called. Recall and KL are as
`benchmarks/quality` measures them: what is asked comes behind the compressed prompt. "Held" are the bytes
that are allocated behind 4,000 tokens, of those of a float32 cache that keeps all; slack is a part of them.

Rows are kept as they are measured, and what is there is not measured again.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import einfold
from einfold.compiler.ir.kv.keep.expected import Expected
from einfold.compiler.ir.kv.keep.heavy_hitters import HeavyHitters
from einfold.compiler.ir.kv.keep.policy import Policy
from einfold.compiler.ir.kv.keep.voted import Voted
from einfold.compiler.ir.kv.layout import CacheLayout

from .client import ROOT
from .quality.measure import PROMPT, Original, best_behind, figures, full_token_bytes, hits, shares
from .quality.subjects import Subject, real
from .report import table

OUT = ROOT / "benchmarks" / "results" / "kept-tokens"

SHARES = (0.25, 0.5, 0.12)

#: The prompt whose budgets a row is compiled for.
_COMPILED = 1024

#: The smallest budget that a scaled policy has.
_FEWEST = 8

#: Methods of one budget for all heads, compiled once, and those whose budgets go by the share; with the
#: shares that they are measured at.
FLAT: dict[str, tuple[dict[str, Any], tuple[float, ...]]] = {
    "expected_attention": ({"method": "expected_attention"}, SHARES),
    "snapkv": ({"method": "snapkv"}, SHARES),
    "expected_attention, recent 32": ({"method": "expected_attention", "recent": 32}, (0.25, 0.5)),
}
BY_HEAD: dict[str, tuple[dict[str, Any], tuple[float, ...]]] = {
    "kvzip": ({"method": "kvzip"}, SHARES),
    "kvzip, int8": ({"method": "kvzip"}, (0.25,)),
    "kvzip, by snapkv": ({"method": "kvzip", "by": "snapkv"}, (0.25,)),
    "ada_kv, by expected_attention": ({"method": "ada_kv", "by": "expected_attention"}, (0.25,)),
    "pyramid_kv, by expected_attention": (
        {"method": "pyramid_kv", "by": "expected_attention"},
        (0.25,),
    ),
}


def rows() -> Iterator[tuple[str, dict[str, Any], tuple[float, ...]]]:
    """(name, `[cache.prune]` for a share of 1,024 tokens, shares that it is measured at)."""
    for name, (table_, measured) in FLAT.items():
        yield name, table_ | {"tokens": round(measured[0] * _COMPILED)}, measured
    for name, (table_, measured) in BY_HEAD.items():
        for share in measured:
            budget: dict[str, Any] = {"tokens": round(share * _COMPILED)}
            if table_["method"] != "pyramid_kv":
                budget["share"] = share
            yield name, table_ | budget, (share,)


def scaled(layout: CacheLayout, ratio: float) -> CacheLayout:
    """The layout with every budget of tokens times a ratio; budgets that differ still do."""
    policies: dict[Policy, Policy] = {}
    last = 0
    for old in sorted({g.policy for _, _, g in layout.groups() if g.moves}, key=_budget):
        last = max(last + 1, _FEWEST, round(_budget(old) * ratio))
        newest = old.newest
        if not isinstance(old, Voted) and 2 * newest >= _budget(old) - 1:
            newest = last // 2
        if isinstance(old, HeavyHitters):
            policies[old] = replace(old, heavy=last - newest, recent=newest)
        elif isinstance(old, Voted):
            policies[old] = replace(old, chosen=max(1, last - newest))
        elif isinstance(old, Expected):
            policies[old] = replace(old, chosen=max(old.sinks, last - newest), recent=newest)
    return CacheLayout(
        tuple(
            replace(
                layer,
                groups=tuple(
                    replace(g, policy=policies.get(g.policy, g.policy)) for g in layer.groups
                ),
            )
            for layer in layout.layers
        )
    )


def _budget(policy: Policy) -> int:
    return policy.lead + policy.newest


def measure(
    model: einfold.Model, subject: Subject, original: Original, share: float, compiled: float
) -> dict[str, Any]:
    """Figures at one share of a model that was compiled for another one."""
    engine, whole = model.engine, model.engine.layout

    def keep(prompt: int) -> None:
        engine.layout = scaled(whole, share / compiled * prompt / _COMPILED)

    keep(PROMPT)
    found = figures(model, replace(subject, questions=[]), original)
    asked = []
    for questions in subject.questions:
        keep(questions.prompt)
        asked.append((questions, best_behind(model, questions)))
    keep(4000)
    held = int(engine.layout.bytes(1, 4000)) / (4000 * full_token_bytes(model))
    engine.layout = whole
    return {
        "recall": {str(label): value for label, value in shares(hits(asked)).items()},
        "kl": found["kl"],
        "kl_p99": found["kl_p99"],
        "same": found["same"],
        "tokens": found["tokens"],
        "held": held,
        "questions": sum(len(questions.answers) for questions, _ in asked),
    }


def page(data: dict[str, Any]) -> str:
    """The table."""
    whole = data["whole"]
    cells = [
        [
            name,
            share,
            f"{row['held']:.3f}",
            *(f"{row['recall'][label]:.2f}" for label in ("1000", "4000")),
            f"{row['kl']:.3f}",
            f"{row['same']:.1%}",
        ]
        for share, found in data["rows"].items()
        for name, row in found.items()
    ]
    return (
        "# Methods that keep a share of a prompt's tokens\n\n"
        "SmolLM2-135M-Instruct, `python -m benchmarks.kept_tokens`, in onnxruntime. Of the questions "
        f"{whole['1000']:.2f} behind 1,000 tokens and {whole['4000']:.2f} behind 4,000 are answered from the "
        "whole cache.\n\n"
        + table(
            ["method", "share", "held, 4,000", "recall, 1,000", "recall, 4,000", "KL", "same"],
            cells,
        )
        + "\n"
    )


def write(data: dict[str, Any]) -> None:
    """Puts what has been measured so far under results."""
    OUT.with_suffix(".json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    OUT.with_suffix(".md").write_text(page(data), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.kept_tokens", description=__doc__)
    parser.add_argument("--windows", type=int, default=2, help="of prose, of eight [2]")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", default="", help="rows whose name has this in it")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    subject = real()
    chosen = np.linspace(0, len(subject.windows) - 1, given.windows).round().astype(int)
    subject = replace(subject, windows=[subject.windows[place] for place in chosen])
    original = Original.of(subject)
    path = OUT.with_suffix(".json")
    data = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"rows": {}}
    data["whole"] = {str(label): value for label, value in shares(original.recalled).items()}
    for name, prune, measured in rows():
        left = [x for x in measured if name not in data["rows"].setdefault(f"{x:.0%}", {})]
        if given.only not in name or not left:
            continue
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "artifact"
            storage = "int8" if name.endswith("int8") else "f32"
            recipe = {"target": "onnx", "cache": {"prune": prune, "storage": storage}}
            einfold.compile(subject.folder, out, recipe=recipe, check=False)
            model = einfold.load(out, threads=given.threads)
            for share in left:
                row = measure(model, subject, original, share, prune["tokens"] / _COMPILED)
                data["rows"][f"{share:.0%}"][name] = row
                write(data)
                print(name, share, row, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
