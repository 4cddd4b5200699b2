"""MiKV: what other methods would evict stays in few bits, what matters in many."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ....options import option
from ..mixed import Mixed
from ..packed import by_token, check_divides
from ..storage import STORAGES, GroupShape, Piece


@STORAGES.register
@dataclass(frozen=True)
class MiKV(Mixed):
    """Packs older tokens, a `share` of them in `high` bits, the rest in `low` (Yang et al. 2024, section 3).

    Before: `cache 0.0 heads=0,1 .. policy=full storage=f32`
    After:  `cache 0.0 heads=0,1 .. policy=full storage=mikv(..,high=8,low=2,salient=24,tokens=128,..)`

    Important are the tokens that got the most attention in sum, as H2O chooses them. Keys and values have a
    scale a token for every `group` channels. The keys' channels are balanced against the largest queries
    seen so far first, so that outlier channels do not drown the others (section 3.2, equation 4).

    Measured on SmolLM2-135M-Instruct, recall behind 1,000 and 4,000 tokens: 0.25 and 0.20 by the defaults, at
    a KL of 0.083 and 18 % of the bytes, against 0.70 and 0.65 of the whole cache; with as many bytes
    `turboquant` in 3 bits has a KL of 0.0055. Attention in sum finds fewer of the tokens that are asked for
    later than `zipcache`'s, which is normalized.

    Differs from the paper: the balancer is a granule's own, in float16, where the paper takes one of the
    whole prompt; it is used for both precisions. Attention is shared out among the tokens in the slots:
    that is all of a prompt with `prefill=exact`, but of what follows, only the tokens not packed yet. A
    token that was packed stays in its bits.
    """

    high: int = 8
    group: int = 32
    share: float = option(0.2)
    residual: int = 32

    name = method = "mikv"

    @property
    def balanced(self) -> bool:
        return True

    def check(self, shape: GroupShape) -> None:
        super().check(shape)
        for part in ("key", "value"):
            size = shape.size(part)
            check_divides(self.name, "group", self.group, f"{part} size of a head,", size)

    def pieces(self, shape: GroupShape) -> Iterator[Piece]:
        for part, tokens, bits in self.parts:
            for of in ("key", "value"):
                yield from by_token(f"{part}_{of}", bits, tokens, self.group, shape.size(of))
        yield Piece("key_balance", 1, shape.key_size, "f16")
