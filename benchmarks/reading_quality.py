"""What reading few pages changes on SmolLM2-135M-Instruct: `python -m benchmarks.reading_quality`.

Each text is read as a prompt, once for each storage; then the tokens behind it go through the cache one by
one (teacher forcing), as decoding does, for every way of reading: keys and values are copied, and statistics
of pages found for them. KL(everything || few) in nats and the share of tokens with the same likeliest next
one are over prose of the Canterbury corpus, float32 slots and everything read being the original. Recall is
over lists of things that stand in such prose (`benchmarks/quality`), which are asked for behind all of it.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

import einfold
from einfold.compiler.ir.kv.layout import BOUNDS
from einfold.runtime import alike
from einfold.runtime.cache import Cache
from einfold.runtime.engine import Engine
from einfold.runtime.tokenizer import Tokenizer

from . import real_model
from .client import ROOT
from .quality.sets import LIKE_KEYS
from .quality.subjects import Questions, corpus_text, list_of_things, paragraphs
from .report import machine, slug, table

Floats = npt.NDArray[np.float32]

_TEXTS = ("alice29.txt", "lcet10.txt", "plrabn12.txt", "asyoulik.txt")

#: The table `[cache.read]` by name; None reads everything.
WAYS: dict[str, dict[str, Any] | None] = {
    "everything": None,
    "quest": {"method": "quest"},
    "quest:share=0.0625,tokens=1024": {"method": "quest", "share": 0.0625, "tokens": 1024},
    "quest:page=8": {"method": "quest", "page": 8},
    "quest:page=8,spread=0.35,alike=256": {"method": "quest", **LIKE_KEYS},
    "quest:page=16": {"method": "quest", "page": 16},
    "quest:page=16,spread=1": {"method": "quest", "page": 16, "spread": 1.0},
    "shadowkv": {"method": "shadowkv"},
    "shadowkv:page=8": {"method": "shadowkv", "page": 8},
    "shadowkv:outliers=0": {"method": "shadowkv", "outliers": 0},
}

#: Tokens behind a prompt that are measured.
_MEASURED = 192


class Ways:
    """Engines of one storage for all ways of reading, over prompts that the first of them reads."""

    def __init__(self, folder: Path, storage: str, names: tuple[str, ...], threads: int) -> None:
        self.engines: dict[str, Engine] = {}
        for name in names:
            recipe = {"target": "onnx", "cache": {"storage": storage, "read": WAYS[name]}}
            out = folder / f"{storage}-{len(self.engines)}"
            einfold.compile(real_model.folder(), out, recipe=recipe, check=False)
            self.engines[name] = einfold.load(out, threads=threads).engine

    def read(self, tokens: list[int], prompt: int) -> Iterator[tuple[str, Floats]]:
        """Of each way the logits behind every token from the prompt's last one on."""
        first = next(iter(self.engines.values()))
        whole = first.allocate(1, len(tokens), prompt)
        first.prefill(whole, [np.asarray(tokens[: prompt - 1])])
        for name, engine in self.engines.items():
            cache = engine.allocate(1, len(tokens))
            _copy(whole, cache, prompt - 1)
            cache.assume(prompt - 1)
            alike.regroup(cache, np.zeros(1, np.int64))
            row = np.asarray(tokens)
            parts = engine.stream(cache, row, all_logits=True, start=prompt - 1)
            if name == "everything":
                parts = _alone(engine, cache, row, prompt - 1)
            yield name, np.concatenate([logits for _, logits in parts])


def _alone(engine: Engine, cache: Cache, row: Any, start: int) -> Iterator[tuple[int, Floats]]:
    """As `Engine.stream`, one token a step."""
    for place in range(start, len(row)):
        cache.make_room(1)
        ids, positions = row[None, place : place + 1], np.array([[place]])
        logits = engine.step(cache, ids, positions, np.zeros(1, np.int64)).copy()
        cache.advance(1)
        yield place, logits


def _copy(whole: Cache, cache: Cache, tokens: int) -> None:
    """Puts the tokens of one cache into another, with the statistics that go with them."""
    for layer, index, group in cache.layout.groups():
        prefix = f"cache.{layer.layer}.{index}"
        for part in ("key", "value"):
            name = f"{prefix}.{part}"
            cache.buffers[name][:, :, :tokens] = whole.buffers[name][:, :, :tokens]
        if group.reader.bounded:
            group.reader.choosing.refresh(
                group.reader,
                torch.from_numpy(cache.buffers[f"{prefix}.{BOUNDS}"]),
                torch.from_numpy(cache.buffers[f"{prefix}.key"]),
                torch.zeros(1, dtype=torch.int64),
                tokens,
            )


def prose(encode: Any, length: int, count: int) -> list[list[int]]:
    """Texts of so many tokens."""
    found = []
    for name in _TEXTS[:count]:
        text = corpus_text(name)
        start = len(text) // 8  # behind title pages and lists of persons
        found.append(encode(text[start : start + 8 * length])[:length])
    return found


def log_shares(logits: Floats) -> torch.Tensor:
    return torch.log_softmax(torch.from_numpy(logits), -1)


def recalled(best: Any, questions: Questions) -> list[bool]:
    """Whether each answer's tokens were the likeliest; `best` begins behind the prompt's last token."""
    first, tokens = questions.prompt, questions.tokens
    return [all(best[at - first] == tokens[at] for at in answer) for answer in questions.answers]


def measure(ways: dict[str, Ways], length: int, texts: int, lists: int) -> dict[str, Any]:
    """Figures by storage and way, behind prompts of so many tokens."""
    encode = Tokenizer(real_model.folder()).encode
    rows: dict[str, dict[str, list[Any]]] = {}
    for number, tokens in enumerate(prose(encode, length, texts)):
        original = None
        for storage, found in ways.items():
            for name, logits in found.read(tokens, length - _MEASURED):
                shares = log_shares(logits)
                original = shares if original is None else original
                row = rows.setdefault(f"{storage}, {name}", {"kl": [], "same": [], "recall": []})
                row["kl"] += (original.exp() * (original - shares)).sum(-1).tolist()
                row["same"] += (original.argmax(-1) == shares.argmax(-1)).tolist()
        print(f"{length}: text {number + 1} of {texts}", file=sys.stderr, flush=True)
    parts = list(paragraphs(corpus_text("lcet10.txt")[60_000:]))
    for seed in range(lists):
        questions = list_of_things(encode, iter(parts[10 * seed :]), length - 400, seed)
        for storage, found in ways.items():
            for name, logits in found.read(questions.tokens, questions.prompt):
                hits = recalled(logits.argmax(-1), questions)
                rows[f"{storage}, {name}"]["recall"] += hits
        print(f"{length}: list {seed + 1} of {lists}", file=sys.stderr, flush=True)
    return {
        name: {
            "kl": float(np.mean(row["kl"])),
            "kl_p99": float(np.quantile(row["kl"], 0.99)),
            "same": float(np.mean(row["same"])),
            "tokens": len(row["kl"]),
            "recall": float(np.mean(row["recall"])) if row["recall"] else None,
            "questions": len(row["recall"]),
        }
        for name, row in rows.items()
    }


def page(figures: dict[int, dict[str, Any]]) -> str:
    """The table."""
    rows = [
        [
            f"{length:,}",
            name,
            f"{row['kl']:.4f}",
            f"{row['kl_p99']:.3f}",
            f"{row['same']:.3f}",
            "-" if row["recall"] is None else f"{row['recall']:.3f}",
        ]
        for length, found in figures.items()
        for name, row in found.items()
    ]
    return table(["tokens", "cache", "KL, nats", "its 99th of 100", "same token", "recall"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.reading_quality", description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 7168])
    parser.add_argument("--storages", nargs="+", choices=["f32", "int8"], default=["f32"])
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--texts", type=int, default=3)
    parser.add_argument("--lists", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        ways = {
            storage: Ways(Path(folder), storage, tuple(given.ways), given.threads)
            for storage in given.storages
        }
        figures = {}
        for length in given.lengths:
            figures[length] = measure(ways, length, given.texts, given.lists)
            write(figures, given.texts, given.lists)
    print(f"{time.perf_counter() - start:.0f} s", file=sys.stderr)


def write(figures: dict[int, dict[str, Any]], texts: int, lists: int) -> None:
    """Puts what has been measured so far under results."""
    about = machine() | {"onnxruntime": metadata.version("onnxruntime")}
    name = f"reading-quality-{date.today().isoformat()}-{slug(about)}"
    out = ROOT / "benchmarks" / "results" / name
    data = {"machine": about, "figures": figures}
    out.with_suffix(".json").write_text(json.dumps(data, indent=1) + "\n")
    first = next(iter(next(iter(figures.values())).values()))
    out.with_suffix(".md").write_text(
        f"# What reading few pages changes, {name}\n\nSmolLM2-135M-Instruct, steps of one token behind a "
        f"prompt, in onnxruntime: {first['tokens']} tokens of {texts} texts, {first['questions']} questions "
        f"about {lists} lists, at each length.\n\n{page(figures)}\n"
    )


if __name__ == "__main__":
    main()
