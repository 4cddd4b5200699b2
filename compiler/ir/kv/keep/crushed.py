"""KVCrush: representatives of what SnapKV would let go of."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .....errors import IRError
from .policy import POLICIES, Ints, Row
from .voted import Voted


@POLICIES.register
@dataclass(frozen=True)
class Crushed(Voted):
    """Keeps what SnapKV keeps with a part of the budget, and representatives of the other tokens with the
    rest, by which heads attend to them (Jha et al. 2025, section 3).

    Before: `cache 0.0 heads=0,1 .. policy=full`
    After:  `cache 0.0 heads=0,1 .. policy=crushed(chosen=224,observe=32,..,share=0.25)`

    A token's signature has a bit for each query head: whether it is in the half of the prompt that this head
    of the prompt's last tokens attends to more. The tokens that votes would let go of are ordered by the
    Hamming distance of their signature from the anchor, which is the signature of most of them, bit by bit,
    and cut into as many groups of one size as there are representatives; the one in the middle of each stays.

    Options: as SnapKV's, and `share`, the part of the chosen tokens that are representatives.

    Measured on SmolLM2-135M-Instruct, recall behind 1,000 and 4,000 tokens: 0.03 and 0.00 by the defaults,
    against 0.70 and 0.65 with every token. The KL is 0.163, and 0.185 by `snapkv` with as many bytes, as the
    authors find; but one of eight texts makes the difference (0.179 and 0.370), the others are within 0.008.
    On examples/tiny_llama it is 0.106 and 0.105, and tokens that stand for others take the place of some that
    votes had found: of 28 pass keys 20 are recalled, 24 by `snapkv`, 13 with a `share` of 0.5.

    Differs from the paper: each KV head has its own important tokens and representatives, by signatures of
    all heads of its group; bits are of the half that a head attends to more, and the anchor is what most bits
    are, so that nothing is drawn. The important tokens are SnapKV's, with `pyramid_kv:by=kvcrush` and
    `ada_kv:by=kvcrush` in budgets by layer and head; what is generated passes in a window, as SnapKV's here.
    """

    share: float = 0.25

    name = "crushed"
    method = "kvcrush"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.share <= 1:
            raise IRError(
                f"{self.name}: share is a part of the chosen tokens, 0 to 1, not {self.share}"
            )

    def says(self) -> str:
        return f"{super().says()}, {self.representatives(self.chosen)} for others like them"

    def representatives(self, count: int) -> int:
        """How many of so many chosen tokens stand for others."""
        return round(self.share * count)

    def staying(self, row: Row, used: int, leaving: int) -> Ints | None:
        score_KT = self.token_scores(row, used)
        if score_KT is None:
            return None  # the prompt was read: what was chosen stays in front
        older = used - self.observe
        count = older - leaving
        ordered_KT = np.argsort(-score_KT[:, :older], axis=1, kind="stable")
        important = count - self.representatives(count)
        rest_KR = np.sort(ordered_KT[:, important:], axis=1)
        others = self.spread(self.signatures(row, older), rest_KR, count - important)
        chosen_KC = np.sort(np.concatenate((ordered_KT[:, :important], others), axis=1), axis=1)
        newest_KN = np.broadcast_to(np.arange(older, used), (len(chosen_KC), self.observe))
        return np.concatenate((chosen_KC, newest_KN), axis=1)

    def signatures(self, row: Row, older: int) -> npt.NDArray[np.bool_]:
        """Whether each query head attends to a token more than to half of them, [heads, older]."""
        votes_HT = self.votes(row, older).reshape(-1, older)
        return votes_HT > np.median(votes_HT, axis=1, keepdims=True)

    def spread(self, signs_HT: npt.NDArray[np.bool_], rest_KR: Ints, count: int) -> Ints:
        """Of the tokens that each KV head would let go of, so many that stand for all, [K, count]."""
        signs_HKR = signs_HT[:, rest_KR]
        anchor_HK1 = signs_HKR.mean(-1, keepdims=True) > 0.5
        distance_KR = (signs_HKR != anchor_HK1).sum(0)
        near_KR = np.argsort(distance_KR, axis=1, kind="stable")
        middle = ((np.arange(count) + 0.5) * rest_KR.shape[1] / max(1, count)).astype(np.int64)
        return np.take_along_axis(rest_KR, near_KR[:, middle], axis=1)
