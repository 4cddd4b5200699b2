"""Retrieval heads: which heads look back across the whole context (RazorAttention, section 3.2)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ....errors import CalibrationError
from ...ir.program import Program
from ..observer import OBSERVERS, Found, Observer
from ..sites import Site

#: How often the random tokens stand behind each other.
REPEATS = 4

#: Fewest random tokens that tell a retrieval head.
SHORTEST_PROBE = 16


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


def repeated_tokens(period: int, vocabulary: int, seed: int = 0) -> Tensor:
    """`period` random tokens, all different where the vocabulary allows it, REPEATS times: [1, tokens]."""
    generator = torch.Generator().manual_seed(seed)
    if period <= vocabulary:
        once = torch.randperm(vocabulary, generator=generator)[:period]
    else:
        once = torch.randint(vocabulary, (period,), generator=generator)
    return once.repeat(REPEATS)[None]


@OBSERVERS.register
@dataclass
class RetrievalHeads(Observer):
    """Observes repeated tokens: each head's echo and induction score, [H] each.

    The echo score of a head is the attention that a token pays, on average, to the same token in earlier
    repeats; the induction score what it pays to the tokens that came after those.
    """

    period: int
    _sums: dict[str, Tensor] = field(default_factory=dict)
    _rows: int = 0

    name = "retrieval_heads"

    @property
    def key(self) -> str:
        return f"retrieval-{self.period}"

    def sample(self, program: Program) -> tuple[Tensor, str]:
        tokens = repeated_tokens(self.period, program.model.vocabulary)
        return tokens, f"{self.period} random tokens, {REPEATS} times"

    def begin(self, site: Site, *values: Any) -> None:
        q_BSHD, _, _ = values
        heads = q_BSHD.shape[2]
        self._sums = {name: torch.zeros(heads) for name in ("echo", "induction")}
        self._rows = 0

    def block(self, start: int, weights_BHST: Tensor) -> None:
        rows = torch.arange(start, start + weights_BHST.shape[2])
        self._rows += int((rows >= self.period).sum()) * len(weights_BHST)
        for back in range(self.period, int(rows[-1]) + 1, self.period):
            seen = rows[rows >= back]
            for name, offset in (("echo", 0), ("induction", 1)):
                picked = weights_BHST[:, :, seen - start, seen - back + offset]
                self._sums[name] += picked.sum(dim=(0, 2))

    def end(self) -> Found:
        return {name: total / max(1, self._rows) for name, total in self._sums.items()}


def kv_scores(scores_H: Tensor, kv_heads: int) -> Tensor:
    """The score of each KV head: the largest of its query heads, [K]."""
    return scores_H.reshape(kv_heads, -1).amax(1)
