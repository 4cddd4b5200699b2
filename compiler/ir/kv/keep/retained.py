"""Locret's retaining heads: a small network says of a token, as it comes, whether it should stay."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .....errors import IRError
from ...options import option
from ..attention_sums import host
from .heavy_hitters import HeavyHitters
from .policy import POLICIES, Floats, Row


@POLICIES.register
@dataclass(frozen=True)
class Retained(HeavyHitters):
    """Keeps the newest tokens and those that trained heads score highest (Huang et al. 2024, sections 4.1 and
    4.2).

    Before: `cache 0.0 heads=0,1 .. policy=full`
    After:  `cache 0.0 heads=0,1 .. policy=retained(heavy=128,recent=128,slack=64,prefill=streaming,..)`, and
    the weights `cache.0.retaining_inner.MARK` [hidden, channels], `.._bias.MARK` and `.._outer.MARK` [KV
    heads, hidden]

    In each layer silu([q, k, v] W1) W2 gives a score of a token for each KV head, when the token is read and
    for good. It is trained to tell the largest logit that a query gives the token while the text comes again.

    Options: `tokens`, the budget of a head; `recent`, how many of them are the newest (half where it is not
    given); `slack`, tokens that may gather before each head chooses anew; `prefill`, `streaming` (each head
    chooses after every chunk, so that memory does not grow with the prompt) or `exact`; `sinks`, how many of
    the first tokens stay, whatever the heads say of them; `hidden`, the width of the network; `smooth`, what
    counts that neighbours get like scores (alpha in the paper); `steps` of the training; `read`, how many
    tokens of the calibration text it is trained on; `heads`, an artifact that was compiled of the same model
    with `--prune locret`, whose heads are taken in place of training.

    Measured on SmolLM2-135M-Instruct, recall behind 1,000 and 4,000 tokens: 0.05 and 0.00 by the defaults,
    against 0.70 and 0.65 with every token; KL 0.090, where H2O has 0.049 and Expected Attention 0.083 (0.29
    without first tokens). KVzip recalls 0.60 behind 1,000 over these scores with budgets by head.

    Differs from the paper: what is told are the queries of the same text read again, not of answers to a
    prompt; the logits of each KV head are of mean 0 and variance 1, the network has 64 hidden numbers, and
    a layer's is trained in 300 steps over all tokens of one text, not in 3,000 over many. Training has few
    first tokens to learn from, so they stay by rule. The newest tokens are a part of the budget also where
    a prompt ends, and tokens that are generated compete.
    """

    prefill: str = "streaming"
    sinks: int = 4
    hidden: int = option(64)
    smooth: float = option(0.0025)
    steps: int = option(300)
    read: int = option(4096)
    heads: str = option("")

    name = "retained"
    method = "locret"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hidden < 1 or self.steps < 1 or self.read < 32 or not 0 <= self.smooth < 1e6:
            raise IRError(
                f"{self.method} trains heads of 1 or more hidden numbers in 1 or more steps on 32 or more "
                f"tokens, with smooth 0 or more, not {self.hidden}, {self.steps}, {self.read} and "
                f"{self.smooth:g}"
            )
        if not 0 <= self.sinks <= self.heavy:
            raise IRError(
                f"{self.name}: the {self.heavy} tokens that are chosen beside the newest include the sinks, "
                f"0 or more of them, not {self.sinks}; raise tokens or lower sinks"
            )

    @property
    def told(self) -> bool:
        return True

    def says(self) -> str:
        return f"{self.heavy} tokens by trained heads and {self.recent} recent ones"

    def token_scores(self, row: Row, used: int) -> Floats:
        """What the heads said of each slot's token, [K, used]; sinks above all others."""
        said_KT: Floats = host(row["score"])[:, :used].copy()
        said_KT[:, : self.sinks] = np.inf
        return said_KT
