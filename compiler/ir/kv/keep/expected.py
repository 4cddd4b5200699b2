"""Expected Attention: what the queries that are still to come are expected to attend to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .....errors import IRError
from ...options import derived, later, missing, option, settle
from ..attention_sums import host
from ..sizes import Size
from .once import ChosenOnce
from .policy import POLICIES, Floats, Row

#: Numbers of an intermediate that are held at a time.
_BLOCK = 1 << 20


@POLICIES.register
@dataclass(frozen=True)
class Expected(ChosenOnce):
    """Keeps of a prompt what later queries are expected to attend to (Devoto et al. 2025, section 3).

    Before: `cache 0.0 heads=0,1 .. policy=full`
    After:  `cache 0.0 heads=0,1 .. policy=expected(chosen=128,recent=128,sinks=4,future=512,..)`

    The queries of a head are taken for normal, with the mean m and the covariance C that the prompt's have
    before their rotary embedding, and later ones for these turned by R, its mean over the next `future`
    positions. A token of key k then expects the weight exp(k R m + k R C R' k / 2), as a share of all
    tokens', times the length of its value: what it adds to the output. Query heads that share a KV head are
    averaged.

    Options: `tokens`, the budget of a head; `recent`, how many of them are the newest (half where it is not
    given); `sinks`, the first tokens, which stay and whose queries are left out, for they are unlike all
    others; `future`; `norm`, whether lengths of values count; `epsilon`, what is added to each share before
    they do; `slack`, tokens that may be generated before old ones leave.

    Measured on SmolLM2-135M-Instruct, recall behind 1,000 and 4,000 tokens: 0.12 and 0.00 by the defaults,
    0.45 and 0.35 with half of a prompt's tokens, 0.17 and 0.10 with a quarter, 0.70 and 0.65 with all; with
    budgets by head (`kvzip`) the same scores keep it.

    Differs from the paper: where the rotary embedding is not known (another position embedding, or a cache
    for transformers, which brings queries that are turned already), and where keys are rotated over their
    channels behind it (int4 slots), mean and covariance are of the queries as they are. The newest tokens
    stay, and what is generated passes in a window as long, for the bytes are fixed at compile time; the paper
    chooses among all of the prompt and keeps all that follows. Over int8 and int4 the length of a value is
    that of its codes. A prompt shorter than the budget stays whole.
    """

    chosen: int = derived()
    recent: int = later()
    sinks: int = 4
    future: int = 512
    norm: bool = True
    epsilon: float = 0.0
    slack: int = 64
    queries: int = derived(1)
    tokens: int = option(256)

    name = "expected"
    method = "expected_attention"

    def __post_init__(self) -> None:
        if missing(self.recent):
            settle(self, recent=max(1, self.tokens // 2))
        self.fit("recent")
        if not 0 <= self.sinks <= self.chosen:
            raise IRError(
                f"{self.name}: the {self.chosen} tokens that are chosen beside the newest include the sinks, "
                f"0 or more of them, not {self.sinks}; raise tokens or lower sinks"
            )
        if not 0 <= self.epsilon < np.inf or self.future < 1:
            raise IRError(
                f"{self.name}: epsilon is 0 or more and future 1 or more, not {self.epsilon} and "
                f"{self.future}"
            )

    @property
    def newest(self) -> int:
        return self.recent

    @property
    def ahead(self) -> int:
        return self.future

    def buffers(
        self, batch: Size, heads: int, key_size: int, reading: bool
    ) -> Iterator[tuple[str, tuple[Size, ...]]]:
        """`moments`: sums of x x' over queries, where x is a query with a 1 in front: so how many they are,
        their sum, and their second moments. `turns`: what `passes/cache/look_ahead.py` shows behind the last
        of them. `seen`: how many there were, sinks among them."""
        if reading:
            yield "moments", (batch, heads * self.queries, key_size + 1, key_size + 1)
            yield "turns", (batch, 2 * heads + 1, key_size)
            yield "seen", (batch, 1)

    def fitted(self, queries: int) -> Expected:
        return replace(self, queries=queries)

    def says(self) -> str:
        return (
            f"{self.chosen} tokens of the prompt by the attention they are expected to get, and "
            f"{self.recent} recent ones"
        )

    def watch(self, row: Row, q_SHD: Any) -> None:
        """Adds the moments of new queries, but for those of the first tokens."""
        moments_HEE = row.get("moments")
        if moments_HEE is None:
            return
        heads = len(moments_HEE)
        if q_SHD.shape[1] > heads:
            row["turns"][:] = q_SHD[-1, heads:]
            q_SHD = q_SHD[:, :heads]
        q_HSD = q_SHD[max(0, self.sinks - int(row["seen"][0])) :].swapaxes(0, 1)
        sum_HD, second_HDD = q_HSD.sum(1), q_HSD.swapaxes(1, 2) @ q_HSD
        moments_HEE[:, 0, 0] += q_HSD.shape[1]
        moments_HEE[:, 0, 1:] += sum_HD
        moments_HEE[:, 1:, 0] += sum_HD
        moments_HEE[:, 1:, 1:] += second_HDD
        row["seen"][:] += q_SHD.shape[0]

    def token_scores(self, row: Row, used: int) -> Floats | None:
        """What each slot is expected to add to the output, [K, used]; sinks above all others."""
        if "moments" not in row:
            return None
        if used <= self.sinks:
            return np.full((len(row["key"]), used), np.inf, np.float32)
        moments_HEE = host(row["moments"])
        count = max(1.0, float(moments_HEE[0, 0, 0]))
        mean_HD = moments_HEE[:, 0, 1:] / count
        spread_HDD = moments_HEE[:, 1:, 1:] / count - mean_HD[:, :, None] * mean_HD[:, None]
        mean_HD, spread_HDD = self._turned(host(row["turns"]), mean_HD, spread_HDD)
        keys_KTD = host(row["key"][:, self.sinks : used]).astype(np.float32, copy=False)
        score_KT = np.zeros((len(keys_KTD), used), np.float32)
        shares_KT = np.zeros(keys_KTD.shape[:2], np.float32)
        for head, keys_TD in enumerate(keys_KTD):
            for query in range(head * self.queries, (head + 1) * self.queries):
                shares_KT[head] += _expected(keys_TD, mean_HD[query], spread_HDD[query])
        shares_KT = shares_KT / self.queries + self.epsilon
        if self.norm:
            values_KTD = host(row["value"][:, self.sinks : used]).astype(np.float32, copy=False)
            shares_KT *= np.linalg.norm(values_KTD, axis=-1)
        score_KT[:, : self.sinks] = np.inf
        score_KT[:, self.sinks :] = shares_KT
        return score_KT

    def _turned(
        self, turns_PD: Floats, mean_HD: Floats, spread_HDD: Floats
    ) -> tuple[Floats, Floats]:
        """Mean and covariance of later queries; as they are where no turns were shown."""
        if not turns_PD[:-1].any():
            return mean_HD, spread_HDD
        own, pair = np.arange(turns_PD.shape[1]), turns_PD[-1].round().astype(np.int64)
        one_KD, two_KD = np.split(turns_PD[:-1], 2)
        first = pair >= own
        turn_KDD = np.zeros((len(one_KD), len(own), len(own)), np.float32)
        turn_KDD[:, own, pair] = np.where(first, two_KD, one_KD)
        turn_KDD[:, own, own] = np.where(first, one_KD, two_KD)
        turn_HDD = turn_KDD.repeat(self.queries, 0)
        later_HD: Floats = np.einsum("hde,he->hd", turn_HDD, mean_HD)
        later_HDD: Floats = np.einsum(
            "hde,hef,hgf->hdg", turn_HDD, spread_HDD, turn_HDD, optimize=True
        )
        return later_HD, later_HDD


def _expected(keys_TD: Floats, mean_D: Floats, spread_DD: Floats) -> Floats:
    """The share of each token in the weights that normal queries are expected to give, [T]."""
    logits = keys_TD @ mean_D
    block = max(1, _BLOCK // keys_TD.shape[1])
    for start in range(0, len(keys_TD), block):
        part_TD = keys_TD[start : start + block]
        logits[start : start + block] += ((part_TD @ spread_DD) * part_TD).sum(1) / 2
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()  # type: ignore[no-any-return]
