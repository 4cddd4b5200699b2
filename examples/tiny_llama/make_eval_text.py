"""Writes `eval.txt`: held-out sources, and pass keys in held-out sources and in prose.

    python examples/tiny_llama/make_eval_text.py examples/tiny_llama

The same file comes out on every run with one version of Python. Documents are separated by a line
that holds only a form feed; the wording of the keys is that which `einfold eval` looks for.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from batches import Rows
from corpus import encode_corpus, held_out_documents
from tokenizers import Tokenizer

SEED = 11
EXCERPT = 2500
EXCERPTS = 6

#: Documents of one key, by tokens: how many of them, at depths from 2% to 95%.
ONE_KEY = ((1000, 32), (300, 6))

#: Documents of several keys with names.
SEVERAL_KEYS = ((1000, 8), (500, 2))


def excerpt(text: str, size: int) -> str:
    """Whole lines from the middle of a source, from a definition on where there is one."""
    middle = max(0, len(text) // 2 - size // 2)
    start = max(text.find("\ndef ", middle), text.find("\nclass ", middle)) + 1
    if not 0 < start <= len(text) - size:
        start = text.find("\n", middle) + 1
    return text[start : text.find("\n", start + size) + 1 or None]


def documents(tokenizer: Tokenizer) -> list[str]:
    """All documents of the file."""
    rng = np.random.default_rng(SEED)
    sources = held_out_documents()
    tokens = encode_corpus(tokenizer, sources.values())
    rows = Rows(tokenizer, tokens, list(sources.values()))
    long = [text for text in sources.values() if len(text) > 2 * EXCERPT]
    texts = [excerpt(text, EXCERPT) for text in long[:: max(1, len(long) // EXCERPTS)][:EXCERPTS]]
    for length, count in ONE_KEY:
        for depth in np.linspace(0.02, 0.95, count):
            in_prose = bool(rng.random() < 0.4)
            texts.append(rows.sized_key_text(rng, length, float(depth), in_prose).text)
    for length, count in SEVERAL_KEYS:
        for number in range(count):
            texts.append(rows.sized_key_text(rng, length, None, number % 2 == 1).text)
    return texts


def main() -> None:
    """Writes the file into the model folder, whose tokenizer it uses."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="the model folder")
    folder = parser.parse_args().folder
    texts = documents(Tokenizer.from_file(str(folder / "tokenizer.json")))
    # The sources hold no form feed: corpus.py leaves such files out.
    content = "\f\n".join(f"{text.strip(chr(10))}\n" for text in texts)
    (folder / "eval.txt").write_text(content, encoding="utf-8", newline="\n")
    print(f"{len(texts)} documents, {len(content)} bytes")


if __name__ == "__main__":
    main()
