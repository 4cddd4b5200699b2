"""What each method for the KV cache stores and costs, measured on a trained model: writes docs/methods.md.

python -m benchmarks.methods [MODEL] [--every N] [--only NAME ..] [--table]

Every registered method runs at its default options on every N-th document of the model's evaluation text;
the figures are kept in benchmarks/results/methods-MODEL.json, and `--only` measures some anew. `--table`
writes the page from the figures there are. `make methods` runs all of it. The figures of the real model are
those of `make quality` and `make quality-cache`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import einfold
from einfold.compiler.codegen.target import TARGETS
from einfold.compiler.passes.cache_methods import FAMILIES
from einfold.compiler.passes.kv_quant.static_int4 import StaticInt4
from einfold.compiler.passes.kv_quant.static_int8 import StaticInt8
from einfold.compiler.passes.method_text import Method
from einfold.errors import EinfoldError
from einfold.evaluate.quality import evaluate
from einfold.evaluate.recall import Window, windows
from einfold.evaluate.speed import measure_speed
from einfold.evaluate.texts import Document, read_documents
from einfold.model import Model

from .quality.measure import full_token_bytes
from .quality.pages import change, read, recall, results

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "examples" / "tiny_llama"
FACTS = ROOT / "docs" / "methods.toml"
PAGE = ROOT / "docs" / "methods.md"

#: The context of the decode rates, the tokens that are timed, and how often.
_CONTEXT, _NEW, _TURNS = 1800, 32, 5


@dataclass(frozen=True)
class Text:
    """What is read: documents of an evaluation text, and the same in a file."""

    documents: list[Document]
    file: Path

    @staticmethod
    def of(model: Path, every: int, folder: Path) -> Text:
        documents = read_documents(model / "eval.txt")[::every]
        file = folder / "text.txt"
        file.write_text("\n\f\n".join(d.text for d in documents), encoding="utf-8")
        return Text(documents, file)


def measure(
    model: Path,
    text: Text,
    cache: dict[str, Any],
    targets: Iterable[str] = TARGETS,
    full: Path | None = None,
) -> dict[str, Any]:
    """The figures of one recipe's `[cache]`: quality, shares of bytes, and which targets take it.

    It runs in onnxruntime where that takes it, else by the reference. With `full`, an artifact that keeps
    every token, speed too.
    """
    with tempfile.TemporaryDirectory() as folder:
        made: dict[str, Path] = {}
        for target in targets:
            try:
                recipe = {"cache": cache, "target": target}
                einfold.compile(model, Path(folder) / target, recipe=recipe, check=False)
                made[target] = Path(folder) / target
            except EinfoldError as error:
                print(f"  {target}: {error}", file=sys.stderr)
        engine = "onnx" if "onnx" in made else "reference"
        artifact = made.get("onnx") or made["reference"]
        loaded = einfold.load(artifact, engine=engine, threads=1)
        found = evaluate(loaded, model, text.file).data()
        pieces = list(windows(loaded.tokenizer.encode_with_offsets, text.documents, 2048))
        found |= shares(loaded, pieces)
        found["targets"] = sorted({*made, "reference"})
        if full is not None and "onnx" in made:
            found["speed"] = speed(made["onnx"], full)
        return found


def shares(model: Model, pieces: Sequence[Window]) -> dict[str, float]:
    """Bytes as a share of a full float32 cache's: at the end of the windows, and at the questions."""
    layout = model.engine.layout

    def share(lengths: list[int]) -> float:
        full = sum(lengths) * full_token_bytes(model)
        return sum(int(layout.bytes(1, length)) for length in lengths) / full

    at_questions = [key.answer[-1] + 1 for piece in pieces for key in piece.keys]
    return {
        "held": share([len(piece.tokens) for piece in pieces]),
        "held_at_questions": share(at_questions),
    }


def speed(artifact: Path, full: Path) -> float:
    """The rate of decoding behind a long context on one thread, over that of a full cache.

    The two take turns, so that what else the machine does meets both; the median of the turns is given.
    """

    def rate(folder: Path) -> float:
        found = measure_speed(folder, 1, [_CONTEXT], _NEW, 1, 1, 1, 512, lambda text, share: None)
        return found.decode_tokens_per_second[_CONTEXT]

    return statistics.median(rate(artifact) / rate(full) for _ in range(_TURNS))


def recipes() -> dict[str, dict[str, Any]]:
    """The `[cache]` of every method at its defaults, by name."""
    found: dict[str, dict[str, Any]] = {name: {"storage": name} for name in ("int8", "int4")}
    for family, known in FAMILIES.items():
        found |= {name: {family: {"method": name}} for name in known}
    return found


def on_real_model() -> dict[str, Any]:
    """Rows of the real model by the spelling of the command line, from the quality tables."""
    found = [read(results(name, "real"))["rows"] for name in ("quick", "cache")]
    return {name: row for rows in found for name, row in rows.items() if "refused" not in row}


def page(facts: Mapping[str, Any], figures: Mapping[str, Any], real: Mapping[str, Any]) -> str:
    """docs/methods.md; `figures` are the toy's, `real` the real model's."""
    rows = figures["rows"]
    lines = [_HEAD.format(**figures["read"])]
    for name, fact in facts.items():
        row = rows.get(name)
        option = "cache" if fact["family"] == "storage" else fact["family"]
        spelled = f"--{option} {name}"
        shown = real.get(spelled)
        of_real = ["-"] * 4 if shown is None else _real(shown)
        cells = [
            f"`{spelled}`",
            fact["paper"],
            fact["stored"],
            fact["bytes"],
            *_figures(row),
            *of_real,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines.append("\n## Differences from the papers, and options\n")
    kinds = {"int8": Method(StaticInt8), "int4": Method(StaticInt4)}
    kinds |= {n: k for known in FAMILIES.values() for n, k in known.items()}
    for name in facts:
        if name in kinds:
            lines.append(f"- **{name}**. {_said(kinds[name])}{_options(kinds[name])}")
    return "\n".join(lines) + "\n"


def _figures(row: Mapping[str, Any] | None) -> list[str]:
    if row is None:
        return ["not measured yet", *["-"] * 5]
    change = row["perplexity"] / row["reference_perplexity"] - 1
    return [
        ", ".join(row["targets"]),
        f"{row['held']:.2f}, {row['held_at_questions']:.2f}",
        f"{change:+.2%}",
        f"{row['kl']:.1e}",
        f"{row['recall']:.3f} ({row['reference_recall']:.3f})",
        f"{row['speed']:.2f}" if "speed" in row else "-",
    ]


def _real(row: Mapping[str, Any]) -> list[str]:
    held = row["cache_bytes"]["4000"] / row["full_cache_bytes"]["4000"]
    return [f"{held:.2f}", change(row), f"{row['kl']:.1e}", recall(row)]


def _said(kind: Method) -> str:
    """The docstring's paragraphs on what was measured and on the paper, on one line."""
    measured = kind.paragraph("Measured")
    differs = kind.paragraph("Differs from") or "No difference is noted."
    return f"{measured} {differs}" if measured else differs


def _options(kind: Method) -> str:
    options = kind.defaults()
    listed = ", ".join(f"`{key}={value}`" for key, value in options.items())
    return f" Defaults: {listed}." if listed else ""


_COLUMNS = (
    "method",
    "paper",
    "what is stored",
    "bytes a token and head",
    "targets",
    "held",
    "perplexity",
    "KL",
    "recall",
    "speed",
    "real: held at 4,000",
    "real: perplexity",
    "real: KL",
    "real: recall behind 1,000; 4,000",
)

_HEAD = f"""# Methods for the KV cache

Written by `make methods` (`benchmarks/methods.py`) from `docs/methods.toml`, the docstrings of the
passes, and figures measured on `{{model}}` in float32: {{tokens:,}} tokens behind prompts of half a
window in {{documents}} documents, and {{keys}} pass keys, each asked of a cache that was compressed right
before its question.

Each method runs at its defaults, which are made for contexts far longer than these documents of about
1,000 tokens: the figures tell that a method works and what it loses here, not which is best. Every method at
several budgets, beside kvpress where that has it, is in
[kvpress-tiny_llama.md](../benchmarks/results/kvpress-tiny_llama.md), the packed forms by bits a number in
[kv-quality](../benchmarks/results/2026-11-21-kv-quality-tiny_llama.md), and what both say in
[benchmarks](../benchmarks/README.md#compressed-caches).

Bytes are of one KV head and kept token, keys and values together: d numbers of each in float32 slots, b
bits, g numbers to a scale. "Held" is the share of a full float32 cache's bytes, allocated, at the end of
the documents and at the questions. Recall has the original's in brackets. Speed is the rate of decoding
behind 1,800 tokens in onnxruntime on one thread, against the full cache's; the model is so small that
little of it is attention, and the speeds on real shapes are those of `benchmarks/cpu_peers.py`.

The last columns are of a real pretrained model, SmolLM2-135M-Instruct (30 layers, 3 KV heads of 64), as
[quality.md](quality.md) measures it; there stand methods at several budgets, tails of the KL, and stacks.
Where the two models disagree, believe the real one: of the methods that let tokens go, begin with `kvzip`.
What a method says of itself below is measured on that model too.

| {" | ".join(_COLUMNS)} |
|{"---|" * len(_COLUMNS)}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path, nargs="?", default=MODEL)
    parser.add_argument("--every", type=int, default=3, help="read every N-th document")
    parser.add_argument("--only", nargs="*", help="methods to measure")
    parser.add_argument("--table", action="store_true", help="write the page and measure nothing")
    given = parser.parse_args()
    path = ROOT / "benchmarks" / "results" / f"methods-{given.model.name}.json"
    figures = json.loads(path.read_text()) if path.is_file() else {"rows": {}}
    with tempfile.TemporaryDirectory() as folder:
        text = Text.of(given.model, given.every, Path(folder))
        full = Path(folder) / "full"
        if not given.table:
            einfold.compile(given.model, full, check=False)
        for name, cache in ({} if given.table else recipes()).items():
            if given.only and name not in given.only:
                continue
            print(name, file=sys.stderr, flush=True)
            try:
                row = measure(given.model, text, cache, full=full)
            except (EinfoldError, KeyError) as error:
                print(f"  not measured: {error}", file=sys.stderr)
                continue
            figures["rows"][name] = row
            if row["prompt"] is not None:
                read = {key: row[key] for key in ("tokens", "documents", "keys")}
                figures["read"] = {"model": given.model.name, **read}
            path.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    facts = tomllib.loads(FACTS.read_text(encoding="utf-8"))
    PAGE.write_text(page(facts, figures, on_real_model()), encoding="utf-8")


if __name__ == "__main__":
    main()
