"""MiKV: what other methods would evict stays in few bits, what matters in many."""

from __future__ import annotations

from dataclasses import dataclass

from ...ir.kv.store.mixed import MiKV as Storage
from .layers import PackingPass
from .shares import salient_tokens


@dataclass(frozen=True)
class MiKV(PackingPass):
    """Packs older tokens, a `share` of them in `high` bits, the rest in `low` (Yang et al. 2024, section 3).

    Before: `cache 0.0 heads=0,1 .. policy=full storage=f32`
    After:  `cache 0.0 heads=0,1 .. policy=full storage=mikv(..,high=8,low=2,salient=24,tokens=128,..)`

    Important are the tokens that got the most attention in sum, as H2O chooses them. Keys and values have a
    scale a token for every `group` channels. The keys' channels are balanced against the largest queries
    seen so far first, so that outlier channels do not drown the others (section 3.2, equation 4).

    Differs from the paper: the balancer is a granule's own, in float16, where the paper takes one of the
    whole prompt; it is used for both precisions. Attention is shared out among the tokens in the slots:
    that is all of a prompt with `prefill=exact`, but of what follows, only the tokens not packed yet. A
    token that was packed stays in its bits.
    """

    high: int = 8
    low: int = 2
    share: float = 0.2
    group: int = 32
    tokens: int = 128
    residual: int = 32
    slack: int = 64
    prefill: str = "exact"

    name = "mikv"

    def storage(self) -> Storage:
        return Storage(
            residual=self.residual,
            slack=self.slack,
            prefill=self.prefill,
            high=self.high,
            low=self.low,
            salient=salient_tokens(self.share, self.tokens),
            tokens=self.tokens,
            group=self.group,
        )
