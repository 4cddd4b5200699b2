"""ZipCache: salient tokens, by normalized attention, in more bits than the others."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ....options import option
from ..mixed import Mixed
from ..packed import by_channel, by_token
from ..storage import STORAGES, GroupShape, Piece


@STORAGES.register
@dataclass(frozen=True)
class ZipCache(Mixed):
    """Packs older tokens, a `share` of them in `high` bits, the rest in `low` (He et al. 2024, section 4).

    Before: `cache 0.0 heads=0,1 .. policy=full storage=f32`
    After:  `cache 0.0 heads=0,1 .. policy=full storage=zipcache(..,high=4,low=2,salient=64,tokens=128)`

    Keys have a scale a channel; values are divided by the square root of each channel's largest magnitude,
    then have a scale a token (channel-separable, section 4.1). Salient are the tokens whose attention, over
    the number of queries that could see them, is highest (equation 8).

    Options: `tokens`, how many are packed together (the paper compresses every 100 new tokens); `share` of
    them that is salient, rounded to a multiple of 8 tokens (the paper: 0.6 on GSM8k, 0.8 on HumanEval).

    Measured on SmolLM2-135M-Instruct, recall behind 1,000 and 4,000 tokens: 0.57 and 0.40 by the defaults, at
    a KL of 0.031 and 17 % of the bytes, against 0.70 and 0.65 of the whole cache; with as many bytes
    `turboquant` in 3 bits has a KL of 0.0055.

    Differs from the paper: every query is counted, not a sample of probes; each KV head chooses its own
    tokens; scales are of a granule, not of a whole prompt. Attention is shared out among the tokens in the
    slots: that is all of a prompt with `prefill=exact`, but of what follows, only the tokens not packed yet.
    A token that was packed stays in its bits.
    """

    share: float = option(0.6)
    residual: int = 0

    name = method = "zipcache"

    @property
    def per_query(self) -> bool:
        return True

    def pieces(self, shape: GroupShape) -> Iterator[Piece]:
        for part, tokens, bits in self.parts:
            yield from by_channel(f"{part}_key", bits, tokens, tokens, shape.key_size)
            size = shape.value_size
            yield from by_token(f"{part}_value", bits, tokens, size, size)
        yield Piece("value_norm", 1, shape.value_size, "f16")
