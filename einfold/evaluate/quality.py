"""Quality of an artifact against the original model: perplexity, KL, top-1 agreement, recall, bytes.

Both models read the same tokens (teacher forcing). The original runs in float32 through transformers,
so the figures measure everything that einfold did, the runtime included.

A cache that lets tokens go is measured as it is used: a part of each window is read as a prompt and
compressed, and what is measured is the rest, which goes through the compressed cache. Pass keys are asked
for in readings of their own, whose prompt ends right before the question: compression must not know what
will be asked (kvpress compresses its contexts so, without their questions).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..compiler.ir.kv.layout import CacheLayout
from ..compiler.ir.manifest import NAME
from ..errors import ModelError, PromptError
from ..model import Model
from .recall import KeyPlace, Recall, Window, windows
from .texts import DEFAULT, read_documents

#: Tokens that the original model reads at a step; bounds the memory of its logits.
_STEP = 256

#: The share of a window that is read as a prompt where the cache lets tokens go.
PROMPT = 0.5

Progress = Callable[[str, float], None]
IntArray = npt.NDArray[np.int64]


@dataclass
class Quality:
    """What `einfold eval` reports. `kl` is KL(original || artifact) in nats a token; `recall` the share
    of pass keys whose every token the artifact predicts, None where the text asks for none; `prompt` the
    share of each window that was read before it was measured, None where the cache keeps everything and a
    query reads all of it; `note` a sentence where a cache was not read as it is used."""

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
    prompt: float | None = None
    note: str = ""
    recall_by_depth: list[dict[str, Any]] = field(default_factory=list)
    recall_by_length: list[dict[str, Any]] = field(default_factory=list)

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
    recall: Recall = field(default_factory=Recall)


def evaluate(
    model: Model,
    against: str | Path,
    text: str | Path | None = None,
    window: int | None = None,
    progress: Progress | None = None,
    prompt: float = PROMPT,
) -> Quality:
    """Measures `model` against the original in the folder `against`, or against another artifact of it.

    `text` is a file of documents, separated by lines that hold a form feed; the original's own
    `eval.txt` or a built-in text where it is not given. Documents longer than `window` tokens (the
    artifact's context, at most 2,048, by default) are read in windows of that many. Where the cache lets
    tokens go, or a query reads few of them, the share `prompt` of each is read before it is compressed, and
    measured is what follows.
    """
    if not 0 <= prompt < 1:
        raise PromptError(f"the prompt's share of a window is from 0 to less than 1, not {prompt}")
    layout = model.engine.layout
    share = prompt if layout.clocks() or layout.chooses else None
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
    pieces = list(windows(model.tokenizer.encode_with_offsets, documents, limit))
    sums = _Sums()
    for number, piece in enumerate(pieces):
        tell("reading the text", number / len(pieces))
        _measure(model, original, piece, share, sums)
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
        recall=sums.recall.share,
        reference_recall=sums.recall.reference_share,
        tokens=count,
        keys=len(sums.recall.places),
        documents=len(documents),
        bytes=measure_bytes(model, 1, max(len(piece.tokens) for piece in pieces)),
        prompt=share,
        note=_note(layout, share),
        recall_by_depth=sums.recall.by_depth(),
        recall_by_length=sums.recall.by_length(),
    )


def _note(layout: CacheLayout, share: float | None) -> str:
    """What to say of a reading without a prompt, of which some methods make something else."""
    exact = any(group.exact for group in layout.clocks().values())
    if share != 0 or not exact:
        return ""
    return (
        "no prompt was read: a cache that keeps all of a prompt before it is compressed (prefill=exact) let "
        "tokens go from the start, as if it streamed"
    )


def find_text(text: str | Path | None, against: Path) -> Path:
    """The text to evaluate on: the one named, the original's own eval.txt, or the built-in one."""
    if text is not None:
        return Path(text)
    own = against / "eval.txt"
    return own if own.is_file() else DEFAULT


def measure_bytes(model: Model, batch: int, tokens: int) -> dict[str, int]:
    """Bytes by the account and as they are held: `predicted` and `measured` must be equal.

    `cache` is held once a prompt has been read, `cache_peak` at most while one of `tokens` tokens is.

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
        "cache_peak": int(layout.peak_bytes(batch, tokens, tokens)),
        "predicted": predicted,
        "measured": model.engine.runner.weight_bytes + cache.nbytes,
    }


class _Reference(Protocol):
    vocabulary: int

    def log_probabilities(self, tokens: list[int]) -> Iterator[tuple[int, Tensor]]:
        """(start, log-probabilities [tokens of the step, V]) of each step."""


class _Original:
    """The original model in float32, read in steps."""

    def __init__(self, name: str | Path) -> None:
        from ..compiler.frontend.checkpoint import load_reference
        from ..compiler.frontend.huggingface import find_model

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
        from ..model import language_model, load

        self.model = language_model(load(folder))
        self.vocabulary = self.model.engine.vocabulary

    def log_probabilities(self, tokens: list[int]) -> Iterator[tuple[int, Tensor]]:
        for start, logits in self.model.logits(tokens):
            yield start, torch.log_softmax(torch.from_numpy(logits), dim=-1)


def _measure(
    model: Model, original: _Reference, window: Window, share: float | None, sums: _Sums
) -> None:
    """Adds one window. `share` of it is a prompt; None where all is kept and read anyway."""
    tokens = window.tokens
    first = 0 if share is None else int(len(tokens) * share)
    best = np.zeros(len(tokens), np.int64)
    reference_best = np.zeros(len(tokens), np.int64)
    mine = _Rows((at, torch.from_numpy(logits)) for at, logits in model.logits(tokens, first))
    for start, reference in original.log_probabilities(tokens):
        end = start + len(reference)
        reference_best[start:end] = reference.argmax(-1).numpy()
        start, reference = max(start, first), reference[max(0, first - start) :]
        if start >= end:
            continue  # all of this step belongs to the prompt
        found = torch.log_softmax(mine.take(end - start), dim=-1)
        best[start:end] = found.argmax(-1).numpy()
        predicted = min(end, len(tokens) - 1) - start  # nothing follows the last token
        found, reference = found[:predicted], reference[:predicted]
        target = torch.tensor(tokens[start + 1 : start + 1 + predicted])[:, None]
        sums.tokens += predicted
        sums.loss -= float(found.gather(1, target).double().sum())
        sums.reference_loss -= float(reference.gather(1, target).double().sum())
        sums.kl += float((reference.exp() * (reference - found)).double().sum())
        sums.same += int((found.argmax(-1) == reference.argmax(-1)).sum())
    for key in window.keys:
        if share is not None:
            best = _answered(model, tokens, key)
        sums.recall.add(key, _recalled(best, tokens, key), _recalled(reference_best, tokens, key))


def _answered(model: Model, tokens: list[int], key: KeyPlace) -> IntArray:
    """The likeliest token behind each of the question's, asked of a cache that was compressed before it."""
    best = np.zeros(len(tokens), np.int64)
    for start, logits in model.logits(tokens[: key.answer[-1] + 1], key.asked):
        best[start : start + len(logits)] = logits.argmax(-1)
    return best


def _recalled(best: IntArray, tokens: list[int], key: KeyPlace) -> bool:
    return all(best[place - 1] == tokens[place] for place in key.answer)


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
