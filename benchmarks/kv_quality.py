"""What packed KV caches cost in quality, at how many bytes, on a trained model.

python -m benchmarks.kv_quality [MODEL] [--windows N] [--out FILE] [--only NAME]

Compiles the model with every packed form below for the reference engine. Of each window of the text one half
is read as a prompt and settled; measured is the other half: perplexity, KL against the original in float32,
agreement of the likeliest token. Bytes are those of a packed token, over all numbers of its keys and values.
Prints a Markdown table; `--out` writes it to a file.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import einfold
from einfold.compiler.frontend.huggingface import find_model, load_reference
from einfold.compiler.ir.cache.layout import CacheLayout
from einfold.compiler.ir.cache.packing import Packed
from einfold.evaluate.quality import find_text
from einfold.evaluate.recall import windows
from einfold.evaluate.texts import read_documents
from einfold.runtime.tokenizer import Tokenizer

ROOT = Path(__file__).parents[1]

#: Tokens of a window, half of them the prompt.
WINDOW = 1024


def _named(method: str, **options: Any) -> tuple[str, dict[str, Any]]:
    shown = ", ".join(f"{name} {value}" for name, value in options.items())
    return f"{method} {shown}".strip(), {"method": method, **options}


FORMS = dict(
    [
        _named("kivi", bits=8),
        _named("kivi", bits=4),
        _named("kivi", bits=4, keys="token"),
        _named("kivi", bits=3),
        _named("kivi", bits=3, keys="token"),
        _named("kivi", bits=2),
        _named("kivi", bits=2, keys="token"),
        _named("kivi", bits=2, group=16),
        _named("kivi", bits=3, group=16),
        _named("kivi", key_bits=3, value_bits=2),
        _named("kivi", key_bits=2, value_bits=3),
        _named("gear", bits=2, rank=1, share=0.0),
        _named("gear", bits=2, rank=1),
        _named("gear", bits=2, rank=2),
        _named("gear", bits=2, rank=0),
        _named("gear", bits=3, rank=1),
        _named("zipcache"),
        _named("zipcache", high=4, low=4),
        _named("zipcache", high=2, low=2),
        _named("mikv"),
        _named("mikv", high=2, low=2),
        _named("mikv", high=4, low=2, share=0.5),
    ]
)


@dataclass
class Figures:
    """Means over all predicted tokens."""

    perplexity: float
    kl: float
    same: float


def texts(model: Path, count: int) -> list[list[int]]:
    """The first whole windows of the model's evaluation text."""
    encode = Tokenizer(model).encode_with_offsets
    found = windows(encode, read_documents(find_text(None, model)), WINDOW)
    return [piece.tokens for piece in found if len(piece.tokens) == WINDOW][:count]


def references(model: Path, pieces: list[list[int]]) -> list[Tensor]:
    """The original's log-probabilities behind each token of the second half, but for the last."""
    original = load_reference(find_model(model))
    found = []
    for tokens in pieces:
        with torch.no_grad():
            logits = original(torch.tensor([tokens])).logits[0, WINDOW // 2 : -1]
        found.append(torch.log_softmax(logits.float(), -1))
    return found


def measured(model: einfold.Model, pieces: list[list[int]], expected: list[Tensor]) -> Figures:
    """A compiled model's figures."""
    loss = kl = same = 0.0
    for tokens, wanted in zip(pieces, expected, strict=True):
        chunks = [torch.from_numpy(x.copy()) for _, x in model.logits(tokens, WINDOW // 2)]
        found = torch.log_softmax(torch.cat(chunks)[:-1], -1)
        target = torch.tensor(tokens[WINDOW // 2 + 1 :])[:, None]
        loss -= float(found.gather(1, target).double().sum())
        kl += float((wanted.exp() * (wanted - found)).double().sum())
        same += float((found.argmax(-1) == wanted.argmax(-1)).sum())
    count = sum(map(len, expected))
    return Figures(math.exp(loss / count), kl / count, same / count)


def bytes_a_number(layout: CacheLayout) -> float:
    """Bytes of a packed token over the numbers of its keys and values."""
    total, numbers = 0.0, 0
    for layer, _, group in layout.groups():
        shape = layer.shape(group)
        if isinstance(group.storage, Packed):
            total += group.storage.granule_bytes(shape) / group.storage.granule
        else:
            total += 4 * shape.heads * (shape.key_size + shape.value_size)
        numbers += shape.heads * (shape.key_size + shape.value_size)
    return total / numbers


def rows(model: Path, count: int, only: list[str]) -> Iterator[str]:
    """The table, line by line."""
    pieces = texts(model, count)
    expected = references(model, pieces)
    nothing = Figures(_perplexity(pieces, expected), 0.0, 1.0)
    yield f"{len(pieces)} windows of {WINDOW} tokens; original: perplexity {nothing.perplexity:.4f}.\n"
    yield "| cache | bits a number | perplexity | KL, nats | same token |"
    yield "|---|---|---|---|---|"
    for name, table in FORMS.items():
        if only and name not in only:
            continue
        recipe = {"target": "reference", "cache": {"quant": table}}
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "artifact"
            einfold.compile(model, out, recipe=recipe, check=False)
            loaded = einfold.load(out)
            found = measured(loaded, pieces, expected)
            bits = 8 * bytes_a_number(loaded.artifact.manifest.layout())
        change = found.perplexity / nothing.perplexity - 1
        yield f"| {name} | {bits:.2f} | {change:+.3%} | {found.kl:.5f} | {found.same:.4f} |"


def _perplexity(pieces: list[list[int]], expected: list[Tensor]) -> float:
    loss = 0.0
    for tokens, wanted in zip(pieces, expected, strict=True):
        target = torch.tensor(tokens[WINDOW // 2 + 1 :])[:, None]
        loss -= float(wanted.gather(1, target).double().sum())
    return math.exp(loss / sum(map(len, expected)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("model", nargs="?", type=Path, default=ROOT / "examples" / "tiny_llama")
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    lines = []
    for line in rows(options.model, options.windows, options.only):
        print(line, flush=True)
        lines.append(line)
    if options.out is not None:
        options.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
