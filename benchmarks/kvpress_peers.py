"""einfold's methods that keep fewer tokens beside kvpress's, on the same documents at equal budgets.

python -m benchmarks.kvpress_peers --kvpress-python PYTHON [MODEL] [--missing] [--every N]

kvpress runs in an environment of its own (`make methods-peers` makes it). A budget is the tokens that a
KV head keeps of a prompt. kvpress compresses a prompt once and keeps all that follows; einfold goes on
letting tokens go. So the bytes that are really held are told beside each figure: at the end of the
documents, and at the questions. Writes a table to benchmarks/results/kvpress-MODEL.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

from einfold.compiler.calibrate.text import DEFAULT
from einfold.compiler.passes.cache_methods import FAMILIES
from einfold.errors import EinfoldError
from einfold.evaluate.quality import PROMPT
from einfold.evaluate.recall import windows
from einfold.runtime.tokenizer import Tokenizer

from .methods import MODEL, ROOT, Text, measure

WORKER = Path(__file__).parent / "workers" / "kvpress_cache.py"

#: Tokens that may gather before einfold's methods let some go: small, as these documents are.
_SLACK = 32

#: DuoAttention asks for so many texts to score heads on.
_TEXTS = 50


def settings(budget: int) -> dict[str, dict[str, Any]]:
    """einfold's `[cache]` tables that keep so many tokens a head, by what the table calls them."""
    tables: dict[str, dict[str, Any]] = {
        "streaming_llm": {"sinks": 4, "recent": budget - 4},
        "snapkv": {"tokens": budget, "observe": min(32, budget // 2)},
        "h2o": {"tokens": budget},
        "expected_attention": {"tokens": budget},
        "ems": {"tokens": budget, "recent": min(32, budget // 2)},
        # a quarter of the heads keeps all, as DuoAttention's in the worker
        "razor_attention": {"induction": 0.2, "echo": 0.05, "recent": budget - 4},
    }
    return {
        name: {"prune": {"method": name, "slack": _SLACK, **table}}
        for name, table in tables.items()
        if name in FAMILIES["prune"]
    }


def packed() -> dict[str, dict[str, Any]]:
    """Methods that have no budget of tokens, and stacks, at several budgets of bytes, by name."""
    found: dict[str, dict[str, Any]] = {"int8": {"storage": "int8"}}
    razor = {"method": "razor_attention", "induction": 0.2, "echo": 0.05, "recent": 124}
    found["razor_attention 128 + int8"] = {"storage": "int8", "prune": razor | {"slack": _SLACK}}
    # Nine tokens in thirty of what the full cache holds.
    found["razor_attention 32, slack 8"] = {"prune": razor | {"recent": 28, "slack": 8}}
    found["razor_attention 128 + kivi, 4 bits"] = {
        "prune": razor | {"slack": _SLACK},
        "quant": {"method": "kivi", "bits": 4, "residual": 32, "slack": _SLACK},
    }
    tables: dict[tuple[str, str], list[dict[str, Any]]] = {
        ("quant", "kivi"): [{"bits": bits} for bits in (8, 4, 3, 2)],
        ("quant", "gear"): [{"bits": 4}, {"bits": 2}, {"bits": 2, "rank": 1}],
        ("quant", "zipcache"): [{"high": 4, "low": 4}, {"high": 4, "low": 2}],
        ("quant", "mikv"): [{"high": 8, "low": 4}, {"high": 8, "low": 2}],
        ("share", "cross_layer"): [{"layers": 1}],
        ("share", "minicache"): [{"start": 0.5}, {"start": 0.5, "retained": 0.25}],
        ("share", "cskv"): [{"keep": keep} for keep in (0.5, 0.35, 0.2)],
    }
    for (family, name), options in tables.items():
        window = {"residual": 32, "slack": _SLACK} if family == "quant" else {}
        for each in options:
            label = ", ".join([name, *(f"{key} {value}" for key, value in each.items())])
            found[label] = {family: {"method": name, **window, **each}}
    return found


def einfold_rows(
    model: Path, text: Text, budgets: list[int], done: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """The rows that are done, and those that lack among them."""
    wanted: list[tuple[str, int | None, dict[str, Any]]] = [
        (name, budget, cache) for budget in budgets for name, cache in settings(budget).items()
    ]
    wanted += [(name, None, cache) for name, cache in packed().items()]
    rows = list(done)
    known = {(row["method"], row["budget"]) for row in done}
    for name, budget, cache in wanted:
        if (name, budget) in known:
            continue
        print(f"einfold {name} {budget or ''}", file=sys.stderr, flush=True)
        try:
            found = measure(model, text, cache, ("onnx", "reference"))
            rows.append({"method": name, "budget": budget, **found})
        except (EinfoldError, KeyError) as error:
            print(f"  not measured: {error}", file=sys.stderr)
    return rows


def kvpress_rows(
    model: Path, text: Text, budgets: list[int], python: Path, folder: Path
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """What the worker measured, and the versions it ran."""
    pieces = windows(Tokenizer(model).encode_with_offsets, text.documents, 2048)
    scored_on = DEFAULT.read_text(encoding="utf-8")
    size = len(scored_on) // 3
    job = {
        "model": str(model.resolve()),
        "windows": [
            {"tokens": p.tokens, "keys": [{"asked": k.asked, "answer": k.answer} for k in p.keys]}
            for p in pieces
        ],
        "share": PROMPT,
        "budgets": budgets,
        "texts": [scored_on[i % 3 * size :][:size] for i in range(_TEXTS)],
    }
    (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
    quiet = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "PYTHONPATH": ""}
    done = subprocess.run(
        [python, WORKER, folder / "job.json"],
        env=os.environ | quiet,
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    found = json.loads(done.stdout)
    return found["rows"], found["versions"]


def table(rows: list[tuple[str, dict[str, Any]]]) -> str:
    """The table in Markdown; rows of (engine, figures)."""
    lines = [
        "| engine | method | budget | held, end | held, questions | perplexity | KL | top-1 | recall |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for engine, row in rows:
        change = row["perplexity"] / row["reference_perplexity"] - 1
        lines.append(
            f"| {engine} | {row['method']} | {row['budget'] or '-'} | {row['held']:.2f} "
            f"| {row['held_at_questions']:.2f} | {change:+.2%} | {row['kl']:.2e} | {row['top1']:.4f} "
            f"| {row['recall']:.3f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path, nargs="?", default=MODEL)
    parser.add_argument(
        "--kvpress-python", type=Path, help="[default: kvpress's last figures are taken again]"
    )
    parser.add_argument("--missing", action="store_true", help="measure what has no figures yet")
    parser.add_argument("--every", type=int, default=3, help="read every N-th document")
    parser.add_argument("--budgets", type=int, nargs="*", default=[256, 128, 64])
    given = parser.parse_args()
    name = given.model.name
    results = ROOT / "benchmarks" / "results" / f"kvpress-{name}.json"
    with tempfile.TemporaryDirectory() as folder:
        text = Text.of(given.model, given.every, Path(folder))
        if given.kvpress_python is not None:
            theirs, versions = kvpress_rows(
                given.model, text, given.budgets, given.kvpress_python, Path(folder)
            )
            write(results, {"versions": versions, "kvpress": theirs, "einfold": []})
        figures = json.loads(results.read_text(encoding="utf-8"))
        done = figures["einfold"] if given.missing else []
        figures["einfold"] = einfold_rows(given.model, text, given.budgets, done)
        write(results, figures)
    rows = [(engine, row) for engine in ("kvpress", "einfold") for row in figures[engine]]
    rows.sort(key=lambda row: -(row[1]["budget"] or 0))
    page = _PAGE.format(
        name=name,
        date=date.today(),
        versions=", ".join(f"{key} {value}" for key, value in figures["versions"].items()),
        table=table(rows),
        of=len(text.documents),
        **figures["kvpress"][0],
    )
    results.with_suffix(".md").write_text(page, encoding="utf-8")


def write(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


_PAGE = """# Compressed caches beside kvpress: {name}

{date}; {versions} for kvpress. {tokens:,} tokens behind prompts of half a document in {of} documents;
{keys} pass keys, each asked of a cache that was compressed right before its question. The original in
float32 has perplexity {reference_perplexity:.3f} on these tokens and recalls {reference_recall:.3f}.

A budget is the tokens that a KV head keeps of a prompt. "Held" is the share of a full float32 cache's
bytes that is really allocated, at the end of the documents and at the questions. kvpress keeps all that
follows a prompt; AdaKV and DuoAttention hide tokens there and free nothing. einfold lets tokens go all
the time, {{slack}} at once. DuoAttention keeps a quarter of the heads whole, found by kvpress's own
scoring on einfold's calibration text (it would download BookSum), with 4 sinks in place of 128.
razor_attention keeps a quarter of the heads, too.

{table}
""".replace("{{slack}}", str(_SLACK))


if __name__ == "__main__":
    main()
