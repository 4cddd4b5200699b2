"""KVzip's score: what a model looks at while it writes down again what it has read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..observer import OBSERVERS, Found, Observer
from ..sites import Site


@OBSERVERS.register
@dataclass
class Reconstruction(Observer):
    """The first `tokens` of the text stand twice: `score` [K, T] is the most attention that a token gets, of
    any query head of a KV head, while they are read again (Kim et al. 2025, section 3.2).

    Differs from the paper: no sentence asks for the repetition; the text simply comes again, at once.
    """

    tokens: int = 1024
    _length: int = 0
    _kv_heads: int = 1
    _best_HT: Tensor = field(default_factory=lambda: torch.empty(0))

    name = "reconstruction"

    @property
    def key(self) -> str:
        return f"reconstruction-{self.tokens}"

    def reading(self, tokens_BS: Tensor, context: int) -> Tensor:
        return tokens_BS.flatten()[: min(self.tokens, context // 2)].repeat(2)[None]

    def begin(self, site: Site, *values: Any) -> None:
        q_BSHD, k_BSKD, _ = values
        self._length, self._kv_heads = q_BSHD.shape[1] // 2, k_BSKD.shape[2]
        self._best_HT = torch.zeros(q_BSHD.shape[2], self._length)

    def block(self, start: int, weights_BHST: Tensor) -> None:
        again = weights_BHST[0, :, max(0, self._length - start) :, : self._length]
        if again.shape[1]:
            self._best_HT = torch.maximum(self._best_HT, again.amax(1).float())

    def end(self) -> Found:
        return {"score": self._best_HT.reshape(self._kv_heads, -1, self._length).amax(1)}
