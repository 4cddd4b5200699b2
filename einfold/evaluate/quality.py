"""Quality of an artifact against the original model: perplexity, KL, top-1 agreement, recall, bytes.

Both models read the same tokens (teacher forcing). The original runs in float32 through transformers,
so the figures measure everything that einfold did, the runtime included.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..compiler.ir.manifest import NAME
from ..errors import ModelError, PromptError
from ..model import Model
from .texts import DEFAULT, Document, read_documents

#: Tokens that the original model reads at a step; bounds the memory of its logits.
_STEP = 256

Progress = Callable[[str, float], None]


@dataclass
class Quality:
    """What `einfold eval` reports. `kl` is KL(original || artifact) in nats a token; `recall` the share
    of pass keys whose every token the artifact predicts, None where the text asks for none."""

    perplexity: float
    reference_perplexity: float
    kl: float
    top1: float
    recall: float | None
    reference_recall: float | None
    tokens: int
    keys: int
    documents: int
    bytes: dict[str, int]

    def data(self) -> dict[str, Any]:
        return dict(vars(self))


@dataclass
class _Sums:
    """Running sums over predicted tokens."""

    tokens: int = 0
    loss: float = 0.0
    reference_loss: float = 0.0
    kl: float = 0.0
    same: int = 0
    keys: list[bool] = field(default_factory=list)
    reference_keys: list[bool] = field(default_factory=list)


def evaluate(
    model: Model,
    against: str | Path,
    text: str | Path | None = None,
    window: int | None = None,
    progress: Progress | None = None,
) -> Quality:
    """Measures `model` against the original in the folder `against`, or against another artifact of it.

    `text` is a file of documents, separated by lines that hold a form feed; the original's own
    `eval.txt` or a built-in text where it is not given. Documents longer than `window` tokens (the
    artifact's context, at most 2,048, by default) are read in windows of that many.
    """
    tell = progress or (lambda message, share: None)
    documents = read_documents(find_text(text, Path(against)))
    limit = min(2048 if window is None else window, model.engine.context)
    if limit < 2:
        raise PromptError("an evaluation window needs two tokens at least")
    tell("loading the original", 0.0)
    original: _Reference = (
        _Artifact(Path(against)) if (Path(against) / NAME).is_file() else _Original(against)
    )
    if original.vocabulary != model.engine.vocabulary:
        raise ModelError(
            f"{against} has {original.vocabulary} tokens, the artifact {model.engine.vocabulary}: "
            "it was compiled from another model"
        )
    pieces = [piece for doc in documents for piece in _windows(model, doc, limit)]
    sums, largest = _Sums(), 0
    for number, (tokens, keys) in enumerate(pieces):
        tell("reading the text", number / len(pieces))
        _measure(model, original, tokens, keys, sums)
        largest = max(largest, len(tokens))
    if not sums.tokens:
        raise PromptError("the text has no document of two tokens or more")
    for name, loss in ((model.artifact.folder, sums.loss), (against, sums.reference_loss)):
        if not math.isfinite(loss):
            raise ModelError(f"{name} gives logits that are not finite on the text")
    count = sums.tokens
    return Quality(
        perplexity=math.exp(sums.loss / count),
        reference_perplexity=math.exp(sums.reference_loss / count),
        kl=sums.kl / count,
        top1=sums.same / count,
        recall=_share(sums.keys),
        reference_recall=_share(sums.reference_keys),
        tokens=count,
        keys=len(sums.keys),
        documents=len(documents),
        bytes=measure_bytes(model, 1, largest),
    )


def find_text(text: str | Path | None, against: Path) -> Path:
    """The text to evaluate on: the one named, the original's own eval.txt, or the built-in one."""
    if text is not None:
        return Path(text)
    own = against / "eval.txt"
    return own if own.is_file() else DEFAULT


def measure_bytes(model: Model, batch: int, tokens: int) -> dict[str, int]:
    """Bytes by the account and as they are held: `predicted` and `measured` must be equal.

    Weights are counted as they lie in the file that the runtime maps. The copies that onnxruntime packs
    for the processor come on top; the benchmarks' peak memory shows them.
    """
    from ..runtime.cache import Cache

    manifest = model.artifact.manifest
    layout = manifest.layout()
    cache = Cache.allocate(layout, batch, tokens)
    predicted = manifest.weight_bytes + int(layout.bytes(batch, tokens))
    return {
        "weights": model.engine.runner.weight_bytes,
        "cache": cache.nbytes,
        "predicted": predicted,
        "measured": model.engine.runner.weight_bytes + cache.nbytes,
    }


def _share(hits: list[bool]) -> float | None:
    return sum(hits) / len(hits) if hits else None


def _windows(
    model: Model, doc: Document, limit: int
) -> Iterator[tuple[list[int], list[list[int]]]]:
    """(tokens, keys) of each window; a key is the positions of its tokens."""
    tokens, offsets = model.tokenizer.encode_with_offsets(doc.text)
    for start in range(0, len(tokens), limit):
        part = tokens[start : start + limit]
        keys = []
        for low, high in doc.keys:
            places = [i for i, (a, b) in enumerate(offsets) if a < high and b > low]
            if places and places[0] > start and places[-1] < start + len(part):
                keys.append([place - start for place in places])
        if len(part) > 1:
            yield part, keys


class _Reference(Protocol):
    vocabulary: int

    def log_probabilities(self, tokens: list[int]) -> Iterator[tuple[int, Tensor]]:
        """(start, log-probabilities [tokens of the step, V]) of each step."""


class _Original:
    """The original model in float32, read in steps."""

    def __init__(self, name: str | Path) -> None:
        from ..compiler.frontend.huggingface import find_model, load_reference

        self.model = load_reference(find_model(name))
        self.vocabulary = int(self.model.get_output_embeddings().weight.shape[0])

    def log_probabilities(self, tokens: list[int]) -> Iterator[tuple[int, Tensor]]:
        ids = torch.tensor([tokens])
        past = None
        for start in range(0, len(tokens), _STEP):
            with torch.no_grad():
                out = self.model(
                    ids[:, start : start + _STEP], past_key_values=past, use_cache=True
                )
            past = out.past_key_values
            yield start, torch.log_softmax(out.logits[0].float(), dim=-1)


class _Artifact:
    """Another artifact of the same model, such as the other ONNX flavour, in place of the original."""

    def __init__(self, folder: Path) -> None:
        from .. import load

        self.model = load(folder)
        self.vocabulary = self.model.engine.vocabulary

    def log_probabilities(self, tokens: list[int]) -> Iterator[tuple[int, Tensor]]:
        for start, logits in self.model.logits(tokens):
            yield start, torch.log_softmax(torch.from_numpy(logits), dim=-1)


def _measure(
    model: Model, original: _Reference, tokens: list[int], keys: list[list[int]], sums: _Sums
) -> None:
    best = np.zeros(len(tokens), np.int64)
    reference_best = np.zeros(len(tokens), np.int64)
    mine = _Rows((start, torch.from_numpy(logits)) for start, logits in model.logits(tokens))
    for start, reference in original.log_probabilities(tokens):
        end = start + len(reference)
        found = torch.log_softmax(mine.take(end - start), dim=-1)
        best[start:end] = found.argmax(-1).numpy()
        reference_best[start:end] = reference.argmax(-1).numpy()
        predicted = min(end, len(tokens) - 1) - start  # nothing follows the last token
        found, reference = found[:predicted], reference[:predicted]
        target = torch.tensor(tokens[start + 1 : start + 1 + predicted])[:, None]
        sums.tokens += predicted
        sums.loss -= float(found.gather(1, target).double().sum())
        sums.reference_loss -= float(reference.gather(1, target).double().sum())
        sums.kl += float((reference.exp() * (reference - found)).double().sum())
        sums.same += int((found.argmax(-1) == reference.argmax(-1)).sum())
    wanted = np.array(tokens)
    for places in keys:
        before = np.array(places) - 1
        sums.keys.append(bool((best[before] == wanted[places]).all()))
        sums.reference_keys.append(bool((reference_best[before] == wanted[places]).all()))


class _Rows:
    """Rows that come in chunks of one size, taken in pieces of another."""

    def __init__(self, chunks: Iterator[tuple[int, Tensor]]) -> None:
        self._chunks = chunks
        self._rest: Tensor | None = None

    def take(self, count: int) -> Tensor:
        parts: list[Tensor] = []
        while count > 0:
            if self._rest is None or not len(self._rest):
                self._rest = next(self._chunks)[1].clone()  # the runner uses the buffer again
            parts.append(self._rest[:count])
            self._rest = self._rest[count:]
            count -= len(parts[-1])
        return torch.cat(parts)
