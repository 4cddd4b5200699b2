"""Rows for training: text, repeated random tokens and pass-key documents, mixed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from model import END_OF_TEXT
from prose import prose
from recall import KeyDocument, key_document, repeated
from tokenizers import Tokenizer

#: The weight of an answer's digit in the loss; other tokens have 1.
ANSWER_WEIGHT = 8.0


@dataclass(frozen=True)
class Stage:
    """A part of training: lengths of rows with their shares, and the share of each kind of row."""

    until: float
    lengths: tuple[tuple[int, float], ...]
    text: float
    repeats: float
    tokens: int = 8192


STAGES = (
    Stage(0.24, ((48, 0.3), (96, 0.4), (192, 0.3)), text=0.20, repeats=0.55, tokens=4096),
    Stage(0.40, ((128, 0.2), (256, 0.4), (512, 0.4)), text=0.35, repeats=0.35, tokens=4096),
    Stage(0.75, ((512, 0.4), (1024, 0.6)), text=0.35, repeats=0.30),
    Stage(1.00, ((512, 0.2), (1024, 0.5), (1536, 0.3)), text=0.35, repeats=0.30),
)


def stage(progress: float) -> Stage:
    """The stage at a progress of 0 to 1."""
    return next((part for part in STAGES if progress < part.until), STAGES[-1])


class Rows:
    """Draws rows of token ids with the weight that each token has in the loss."""

    def __init__(self, tokenizer: Tokenizer, tokens: np.ndarray, documents: list[str]) -> None:
        self.tokenizer = tokenizer
        self.tokens = tokens
        self.text = "\n".join(documents)
        sample = prose(np.random.default_rng(0), 20000)
        #: Characters per token, of sources and of prose.
        self.density = (len(self.text) / len(tokens), 20000 / len(tokenizer.encode(sample).ids))

    def code(self, rng: np.random.Generator, characters: int) -> str:
        """Whole lines of source of about that many characters."""
        if characters <= 0:
            return ""
        start = self.text.find("\n", int(rng.integers(len(self.text) - characters - 20000))) + 1
        end = self.text.find("\n", start + max(0, characters - 20)) + 1
        return self.text[start : end or None]

    def window(self, rng: np.random.Generator, length: int) -> np.ndarray:
        """Consecutive tokens of the sources."""
        start = int(rng.integers(len(self.tokens) - length))
        return self.tokens[start : start + length].astype(np.int64)

    def key_text(
        self,
        rng: np.random.Generator,
        length: int,
        depth: float | None = None,
        in_prose: bool | None = None,
    ) -> KeyDocument:
        """A pass-key document of about `length` tokens; with a depth, with that one key only."""
        if in_prose is None:
            in_prose = bool(rng.random() < 0.4)
        characters = int(length * self.density[in_prose])
        if depth is not None:
            depths, asked, named = [depth], [], False
        else:
            count = int(rng.integers(1, 2 + min(5, length // 80)))
            depths = rng.random(count).tolist()
            asked = rng.random(int(rng.integers(0, 1 + min(4, length // 80)))).tolist()
            named = bool(rng.random() < 0.5)

        def filler(wanted: int) -> str:
            if wanted <= 0:
                return ""
            return prose(rng, wanted) if in_prose else self.code(rng, wanted)

        used = 40 * (2 * len(depths) + len(asked))
        return key_document(rng, filler, max(0, characters - used), depths, asked, named)

    def sized_key_text(
        self, rng: np.random.Generator, length: int, depth: float | None, in_prose: bool
    ) -> KeyDocument:
        """A pass-key document within 5% of `length` tokens."""
        wanted = float(length)
        while True:
            document = self.key_text(rng, round(wanted), depth, in_prose)
            size = len(self.tokenizer.encode(document.text).ids)
            if abs(size - length) <= 0.05 * length:
                return document
            wanted = 0.5 * wanted + 0.5 * min(2.0 * length, wanted * length / size)

    def encode(self, document: KeyDocument) -> tuple[np.ndarray, np.ndarray]:
        """A document's token ids, and which of them are digits of an answer."""
        encoding = self.tokenizer.encode(document.text)
        ids = np.array(encoding.ids, dtype=np.int64)
        starts = np.array([start for start, _ in encoding.offsets])
        answer = np.zeros(len(ids), dtype=bool)
        for start, end in document.answers:
            answer |= (starts >= start) & (starts < end)
        return ids, answer

    def key_row(self, rng: np.random.Generator, length: int) -> tuple[np.ndarray, np.ndarray]:
        """One or several pass-key documents, cut to the length at the left."""
        rows: list[np.ndarray] = []
        weights: list[np.ndarray] = []
        total = 0
        while total < length:
            left = length - total
            size = left if rng.random() < 0.6 else int(rng.integers(40, max(41, left)))
            ids, answer = self.encode(self.key_text(rng, size))
            rows = [np.array([END_OF_TEXT]), ids, *rows]
            weights = [np.ones(1), np.where(answer, ANSWER_WEIGHT, 1.0), *weights]
            total += len(ids) + 1
        # Without the beginning, an answer can be one that was never stated: rare, and harmless.
        return np.concatenate(rows)[-length:], np.concatenate(weights)[-length:]

    def row(
        self, rng: np.random.Generator, length: int, part: Stage
    ) -> tuple[np.ndarray, np.ndarray]:
        """A row of any kind."""
        kind = rng.random()
        if kind < part.text:
            return self.window(rng, length), np.ones(length)
        if kind < part.text + part.repeats:
            return repeated(rng, length, self.tokenizer.get_vocab_size())
        return self.key_row(rng, length)

    def batch(self, rng: np.random.Generator, progress: float) -> tuple[torch.Tensor, torch.Tensor]:
        """The rows of one step, all of one length: ids and weights."""
        part = stage(progress)
        lengths = [length for length, _ in part.lengths]
        length = int(rng.choice(lengths, p=[share for _, share in part.lengths]))
        rows = [self.row(rng, length, part) for _ in range(max(1, round(part.tokens / length)))]
        ids = torch.from_numpy(np.stack([row for row, _ in rows]))
        weights = torch.from_numpy(np.stack([weight for _, weight in rows]).astype(np.float32))
        return ids, weights
