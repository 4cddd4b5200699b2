"""Retrieval heads: which heads look back across the whole context (RazorAttention, section 3.2)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..stream import Found

#: How often the random tokens stand behind each other.
REPEATS = 4


def repeated_tokens(period: int, vocabulary: int, seed: int = 0) -> Tensor:
    """`period` random tokens, all different where the vocabulary allows it, REPEATS times: [1, tokens]."""
    generator = torch.Generator().manual_seed(seed)
    if period <= vocabulary:
        once = torch.randperm(vocabulary, generator=generator)[:period]
    else:
        once = torch.randint(vocabulary, (period,), generator=generator)
    return once.repeat(REPEATS)[None]


@dataclass
class RetrievalHeads:
    """Observes repeated tokens: each head's echo and induction score, [H] each.

    The echo score of a head is the attention that a token pays, on average, to the same token in earlier
    repeats; the induction score what it pays to the tokens that came after those.
    """

    period: int
    _sums: dict[str, Tensor] = field(default_factory=dict)
    _rows: int = 0

    def begin(self, q_BSHD: Tensor, k_BSKD: Tensor, v_BSKD: Tensor) -> None:
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
