"""What a pass may ask of the model while the pipeline runs."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from blake3 import blake3
from torch import Tensor

from ...errors import CalibrationError
from ..ir.printer import print_program
from ..ir.program import Program
from .observers.retrieval_heads import REPEATS, RetrievalHeads, repeated_tokens
from .observers.text_statistics import AttentionMass, KeyValues, similarity
from .stream import Observer, Tell, cut_behind_attention, stream

#: Part of the key under which statistics are kept: to be raised when what they mean changes.
_VERSION = 2

#: Fewest random tokens that tell a retrieval head.
SHORTEST_PROBE = 16


@dataclass
class Statistics:
    """Statistics of one model, measured when they are asked for and kept until the process ends.

    `text` gives the calibration text [rows, tokens] and where it is from. `model` gives a name for the
    model's weights, so that what was measured can be found again in `folder`; without either nothing is kept.
    """

    text: Callable[[], tuple[Tensor, str]]
    model: Callable[[], str] | None = None
    folder: Path | None = None
    tell: Tell | None = None
    read: list[str] = field(default_factory=list)
    """What was read, in words, for the report."""
    _found: dict[str, dict[int, dict[str, Tensor]]] = field(default_factory=dict)

    def retrieval_heads(self, program: Program, probe: int) -> dict[int, dict[str, Tensor]]:
        """`echo` and `induction` [H] of each layer, on `probe` random tokens that repeat.

        Raises CalibrationError as `probe_period` does.
        """
        period = probe_period(probe, program.model.context)
        tokens = repeated_tokens(period, program.model.vocabulary)
        origin = f"{period} random tokens, {REPEATS} times"
        return self._measured(
            f"retrieval-{period}", program, tokens, [RetrievalHeads(period)], origin
        )

    def of_text(self, program: Program) -> dict[int, dict[str, Tensor]]:
        """What `AttentionMass` and `KeyValues` find of each layer on the calibration text."""
        tokens, origin = self.text()
        observers: list[Observer] = [AttentionMass(), KeyValues()]
        where = f"{tokens.numel()} tokens of {origin}"
        return self._measured("text", program, tokens, observers, where)

    def similarity(self, program: Program, part: str) -> Tensor:
        """Mean cosine [L, L] between layers of the "key"s (rotated) or "value"s of a token, all heads."""
        found = self.of_text(program)
        return similarity([found[layer][f"{part}_sample"] for layer in sorted(found)])

    def _measured(
        self, name: str, program: Program, tokens: Tensor, observers: list[Observer], origin: str
    ) -> dict[int, dict[str, Tensor]]:
        if name not in self._found:
            self._found[name] = stream(
                program, tokens, observers, self._place(name, program, tokens), self.tell
            )
            self.read.append(origin)
        return self._found[name]

    def _place(self, name: str, program: Program, tokens: Tensor) -> Path | None:
        """A folder whose name says which model, graph and text were measured."""
        if self.folder is None or self.model is None:
            return None
        digest = hashlib.sha256(f"{_VERSION} {self.model()}\n".encode())
        digest.update(_text(program).encode())
        digest.update(tokens.numpy().tobytes())
        return self.folder / f"{name}-{digest.hexdigest()[:24]}"


def probe_period(probe: int, context: int) -> int:
    """How many random tokens are repeated to find retrieval heads: `probe`, or what the context has room for.

    Raises CalibrationError where that is too few to tell anything.
    """
    period = min(probe, context // REPEATS)
    if period < SHORTEST_PROBE:
        raise CalibrationError(
            f"retrieval heads show on {SHORTEST_PROBE} random tokens repeated {REPEATS} times at least; "
            f"a probe of {probe} in a context of {context} tokens is too short"
        )
    return period


def _text(program: Program) -> str:
    return print_program(cut_behind_attention(program))


def fingerprint(files: Sequence[Path]) -> str:
    """Names a model by its files: what they are called, how large, when written."""
    stats = [(path.resolve(), path.stat()) for path in sorted(files)]
    return "\n".join(f"{path} {stat.st_size} {stat.st_mtime_ns}" for path, stat in stats)


def digest_of(state: Mapping[str, Tensor]) -> str:
    """Names a model in memory by its weights: their names, shapes, types and bytes."""
    digest = blake3()
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        plain = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(plain.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def kv_scores(scores_H: Tensor, kv_heads: int) -> Tensor:
    """The score of each KV head: the largest of its query heads, [K]."""
    return scores_H.reshape(kv_heads, -1).amax(1)
