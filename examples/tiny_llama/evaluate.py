"""Measures a model folder: recall of pass keys, copying, and perplexity on held-out sources.

    python examples/tiny_llama/evaluate.py examples/tiny_llama

A key counts as recalled when all its five digits are right. The digits are read off in one pass:
where each of them is the most likely one after the right digits before it, greedy decoding writes
exactly these digits, and where one is not, it does not.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import numpy as np
import torch
from batches import Rows
from corpus import encode_corpus, held_out_documents
from recall import KeyDocument
from tokenizers import Tokenizer
from torch.nn.functional import cross_entropy
from transformers import LlamaForCausalLM

SEED = 7
DEPTHS = tuple(tenth / 10 for tenth in range(10))
LENGTHS = (250, 500, 1000, 1500)
SEGMENTS = (16, 32, 64, 128, 256, 500)


class Evaluation:
    """A model with its tokenizer and the held-out sources."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.documents = held_out_documents()
        tokens = encode_corpus(tokenizer, self.documents.values())
        self.rows = Rows(tokenizer, tokens, list(self.documents.values()))
        self.model = LlamaForCausalLM.from_pretrained(folder, dtype=dtype).eval()

    @torch.no_grad()
    def logits(self, ids: np.ndarray) -> torch.Tensor:
        """The logits of one row of ids."""
        return self.model(input_ids=torch.from_numpy(ids)[None], use_cache=False).logits[0].float()

    def recalled(self, document: KeyDocument) -> tuple[int, int, int]:
        """How many keys are recalled, how many were asked for, and the tokens of the document."""
        encoding = self.rows.tokenizer.encode(document.text)
        ids = np.array(encoding.ids, dtype=np.int64)
        starts = np.array([start for start, _ in encoding.offsets])
        right = np.zeros(len(ids), dtype=bool)
        right[1:] = self.logits(ids).argmax(-1).numpy()[:-1] == ids[1:]
        found = [bool(right[(starts >= a) & (starts < b)].all()) for a, b in document.answers]
        return sum(found), len(found), len(ids)

    def recall(self, length: int, samples: int) -> dict[str, float]:
        """Recall of one key without a name, by depth, in documents of about `length` tokens.

        Every other document has held-out sources around its key, the others have prose.
        """
        rng = np.random.default_rng([SEED, length])
        by_depth: dict[str, float] = {}
        sizes: list[int] = []
        for depth in DEPTHS:
            right = 0
            for sample in range(samples):
                document = self.rows.sized_key_text(rng, length, depth, sample % 2 == 1)
                hit, _, size = self.recalled(document)
                right += hit
                sizes.append(size)
            by_depth[f"{depth:.0%}"] = right / samples
        by_depth["all"] = sum(by_depth.values()) / len(DEPTHS)
        by_depth["mean tokens"] = sum(sizes) / len(sizes)
        return by_depth

    def named_recall(self, length: int, samples: int) -> dict[str, float]:
        """Recall in documents of one to six keys, named or not, asked for along the way too."""
        rng = np.random.default_rng([SEED, length, 1])
        counts = np.zeros(2)
        for sample in range(samples):
            document = self.rows.sized_key_text(rng, length, None, sample % 2 == 1)
            counts += self.recalled(document)[:2]
        return {"recall": counts[0] / counts[1], "questions": counts[1]}

    def copying(self, segment: int, samples: int) -> float:
        """Top-1 accuracy on the second copy of random tokens, all but its first token."""
        rng = np.random.default_rng([SEED, segment, 2])
        right = 0
        for _ in range(samples):
            part = rng.integers(1, self.rows.tokenizer.get_vocab_size(), size=segment)
            guesses = self.logits(np.concatenate([part, part])).argmax(-1).numpy()
            right += int((guesses[segment:-1] == part[1:]).sum())
        return right / (samples * (segment - 1))

    def perplexity(self, window: int = 1024) -> dict[str, float]:
        """Of the held-out sources, file by file, in windows that do not overlap."""
        loss, count, size = 0.0, 0, 0
        for text in self.documents.values():
            ids = encode_corpus(self.rows.tokenizer, [text]).astype(np.int64)
            size += len(text.encode())
            for start in range(0, len(ids) - 1, window):
                part = ids[start : start + window + 1]
                logits = self.logits(part[:-1])
                loss += float(cross_entropy(logits, torch.from_numpy(part[1:]), reduction="sum"))
                count += len(part) - 1
        return {
            "perplexity": math.exp(loss / count),
            "tokens": count,
            "bits per byte": loss / math.log(2) / size,
        }


def main() -> None:
    """Prints all figures as one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="the model folder")
    parser.add_argument("--samples", type=int, default=20, help="pass keys at each depth")
    parser.add_argument("--copies", type=int, default=40, help="segments of each length")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    evaluation = Evaluation(given.folder, getattr(torch, given.dtype))
    figures = {
        "recall": {length: evaluation.recall(length, given.samples) for length in LENGTHS},
        "named keys, 1000 tokens": evaluation.named_recall(1000, 5 * given.samples),
        "copying": {segment: evaluation.copying(segment, given.copies) for segment in SEGMENTS},
        "held-out": evaluation.perplexity(),
    }
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
