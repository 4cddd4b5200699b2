"""Figures of one compiled model beside the original."""

from __future__ import annotations

import math
import re
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from blake3 import blake3

import einfold
from einfold.compiler.frontend.huggingface import find_model, load_reference
from einfold.compiler.ir.file_hash import file_hash
from einfold.compiler.ir.kv.layout import PARTS
from einfold.compiler.ir.manifest import GRAPH
from einfold.compiler.ir.peak_memory import peak_memory
from einfold.errors import EinfoldError

from ..fetch import cache_folder
from .subjects import WINDOW, Questions, Subject

Floats = npt.NDArray[np.float32]

#: Of a window so many tokens are the prompt.
PROMPT = WINDOW // 2

#: So many tokens are written behind a prompt to measure what one takes.
WRITTEN = 17


@dataclass(frozen=True)
class Original:
    """What the original says of a subject's texts, computed once and kept on the disk."""

    windows: list[Floats]
    """Of each window log-probabilities [WINDOW - PROMPT - 1, V], behind the tokens after the prompt."""
    recalled: dict[int, list[bool]]
    """Whether each answer was recalled, by label."""

    @staticmethod
    def of(subject: Subject) -> Original:
        """From the cache folder, or by transformers in float32."""
        weights = file_hash(subject.folder / "model.safetensors")
        said = repr((weights, subject.windows, subject.questions))
        folder = (
            cache_folder() / "quality" / f"{subject.name}-{blake3(said.encode()).hexdigest()[:16]}"
        )
        folder.mkdir(parents=True, exist_ok=True)
        files = [folder / f"{number}.npy" for number in range(len(subject.windows))]
        best = [folder / f"best-{number}.npy" for number in range(len(subject.questions))]
        if not all(file.is_file() for file in (*files, *best)):
            _compute(subject, files, best)
        asked = list(zip(subject.questions, map(np.load, best), strict=True))
        return Original([np.load(file, mmap_mode="r") for file in files], hits(asked))


def _compute(subject: Subject, files: list[Path], best: list[Path]) -> None:
    model = load_reference(find_model(subject.folder))

    def logits(tokens: list[int], start: int) -> torch.Tensor:
        with torch.no_grad():
            found: torch.Tensor = model(torch.tensor([tokens]), logits_to_keep=len(tokens) - start)
        return found.logits[0].float()  # type: ignore[attr-defined,no-any-return]

    for file, tokens in zip(files, subject.windows, strict=True):
        rows = torch.log_softmax(logits(tokens, PROMPT)[:-1], -1)
        _save(file, rows.numpy())
    for file, questions in zip(best, subject.questions, strict=True):
        _save(file, logits(questions.tokens, questions.prompt - 1).argmax(-1).numpy())


def _save(file: Path, data: npt.NDArray[Any]) -> None:
    beside = file.with_suffix(".tmp.npy")
    np.save(beside, data)
    beside.rename(file)


def hits(asked: list[tuple[Questions, npt.NDArray[np.int64]]]) -> dict[int, list[bool]]:
    """Whether each answer was recalled, by label, in the order in which they were asked for.

    The array holds the likeliest token behind each token from the prompt's last one on.
    """
    found: dict[int, list[bool]] = defaultdict(list)
    for questions, best in asked:
        first = questions.prompt - 1
        found[questions.label] += [
            all(bool(best[place - 1 - first] == questions.tokens[place]) for place in answer)
            for answer in questions.answers
        ]
    return dict(sorted(found.items()))


def shares(found: Mapping[int, list[bool]]) -> dict[int, float]:
    """Recall by label."""
    return {label: sum(each) / len(each) for label, each in found.items()}


def compiled(folder: Path, out: Path, table: dict[str, Any]) -> dict[str, Any]:
    """Compiles; gives the seconds of the processors that it took and the largest memory of the process, which
    is to do nothing else. With what can't be compiled, the reason in their place."""
    used = time.process_time()
    try:
        einfold.compile(folder, out, recipe=table, check=False)
    except EinfoldError as error:
        return {"refused": str(error)}
    return {"compile_seconds": time.process_time() - used, "compile_bytes": peak_memory()}


def figures(model: einfold.Model, subject: Subject, original: Original) -> dict[str, Any]:
    """Quality and bytes. KL(original || compiled) in nats, over the tokens behind the prompts."""
    kl: list[npt.NDArray[np.float64]] = []
    parts: list[Floats]
    loss = wanted_loss = 0.0
    same = 0
    for tokens, wanted in zip(subject.windows, original.windows, strict=True):
        at, parts = 0, []
        target = np.asarray(tokens[PROMPT + 1 :])
        for rows in _rows(model, tokens, PROMPT):
            count = min(len(rows), len(target) - at)  # nothing follows the last token
            said = torch.log_softmax(torch.from_numpy(rows[:count]), -1)
            expected = torch.from_numpy(np.array(wanted[at : at + count]))
            aim = torch.from_numpy(target[at : at + count])[:, None]
            parts.append((expected.exp() * (expected - said)).sum(-1).numpy())
            loss -= float(said.gather(1, aim).double().sum())
            wanted_loss -= float(expected.gather(1, aim).double().sum())
            same += int((said.argmax(-1) == expected.argmax(-1)).sum())
            at += count
        kl.append(np.concatenate(parts).astype(np.float64))
    each = np.concatenate(kl)
    found = hits([(q, best_behind(model, q)) for q in subject.questions])
    layout = model.engine.layout
    prompts = [q.tokens[: q.prompt] for q in subject.questions] or subject.windows
    return {
        "perplexity": math.exp(loss / each.size),
        "reference_perplexity": math.exp(wanted_loss / each.size),
        "tokens": int(each.size),
        "kl": float(each.mean()),
        "kl_windows": [float(window.mean()) for window in kl],
        "kl_p99": float(np.quantile(each, 0.99)),
        "kl_p999": float(np.quantile(each, 0.999)),
        "kl_max": float(each.max()),
        "same": same / each.size,
        "recall": {str(label): share for label, share in shares(found).items()},
        "reference_recall": {str(k): share for k, share in shares(original.recalled).items()},
        "hits": {str(label): _text(each) for label, each in found.items()},
        "reference_hits": {str(label): _text(each) for label, each in original.recalled.items()},
        "questions": sum(len(questions.answers) for questions in subject.questions),
        "weight_bytes": model.engine.runner.weight_bytes,
        "cache_bytes": {str(n): int(layout.bytes(1, n)) for n in (1000, 4000)},
        "full_cache_bytes": {str(n): n * full_token_bytes(model) for n in (1000, 4000)},
        "milliseconds": milliseconds(model, max(prompts, key=len)),
    } | _read(model)


def milliseconds(model: einfold.Model, prompt: list[int]) -> dict[str, float]:
    """What a token of a prompt takes of the processors, and one behind it, all threads together: others on a
    busy machine change that less than they change time."""
    at = [time.process_time()]

    def written(row: int, token: int) -> bool:
        at.append(time.process_time())
        return False  # go on

    model.engine.generate([prompt], WRITTEN, on_token=written)
    first, *later = (1e3 * (end - start) for start, end in pairwise(at))
    return {"prompt": first / len(prompt), "token": statistics.median(later)}


def _read(model: einfold.Model) -> dict[str, dict[str, int]]:
    """Bytes of the cache that a step reads, where a reader leaves some of what is held."""
    layout = model.engine.layout
    if all(group.reader.whole for _, _, group in layout.groups()):
        return {}
    return {"read_bytes": {str(n): layout.read_bytes(1, n) for n in (1000, 4000)}}


def _text(found: list[bool]) -> str:
    """`1` for an answer that was recalled and `0` for one that was not."""
    return "".join(str(int(each)) for each in found)


#: Of heads with fewer channels in the layout than the model has, the weights that tell how many it has.
_NARROWED = re.compile(r"weight @cache\.(\d+)\.(key|value)_basis\.\w+ : f32\[\d+, (\d+), \d+\]")


def full_token_bytes(model: einfold.Model) -> int:
    """Bytes of one token in a cache that keeps everything of the model's heads in float32."""
    graph = model.artifact.file(GRAPH).read_text(encoding="utf-8")
    whole = {(int(n), part): int(size) for n, part, size in _NARROWED.findall(graph)}
    return sum(
        4 * layer.kv_heads * whole.get((layer.layer, part), layer.size(part))
        for layer in model.engine.layout.layers
        for part in PARTS
    )


def _rows(model: einfold.Model, tokens: list[int], prompt: int) -> Iterator[Floats]:
    for _, logits in model.logits(tokens, prompt):
        yield logits


def best_behind(model: einfold.Model, questions: Questions) -> npt.NDArray[np.int64]:
    """The likeliest token behind each from the prompt's last one on, which is asked of the cache too."""
    found = [rows.argmax(-1) for rows in _rows(model, questions.tokens, questions.prompt - 1)]
    return np.concatenate(found)
