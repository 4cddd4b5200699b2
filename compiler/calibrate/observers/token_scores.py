"""What a policy would choose the tokens of the calibration text by."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...ir.kv.attention_sums import fading_sums
from ...ir.kv.keep.policy import Policy
from ...ir.kv.keep.voted import Voted
from ...ir.program import call_arguments
from ...ir.record_text import show
from ..observer import OBSERVERS, Found, Observer
from ..sites import Site


@OBSERVERS.register
@dataclass
class TokenScores(Observer):
    """The scores of a policy at the end of the first `tokens` of the text, read as one prompt.

    `score` [K, T]: the policy is shown queries, keys and values as the runtime shows them. But queries are
    turned already, as by a cache for transformers: one that thinks of those to come (`Policy.ahead`) takes
    them as they are.
    """

    policy: Policy = field(default_factory=lambda: Voted(chosen=1))
    tokens: int = 1024

    name = "token_scores"

    @property
    def key(self) -> str:
        return f"token-scores-{show(self.policy)}-{self.tokens}"

    def reading(self, tokens_BS: Tensor, context: int) -> Tensor:
        return tokens_BS.flatten()[: min(self.tokens, context)][None]

    def see(self, site: Site, *values: Any) -> Found:
        q_BSHD, k_BSKD, v_BSKD = values
        assert site.attention is not None
        heads, size = k_BSKD.shape[2:]
        policy = self.policy.fitted(q_BSHD.shape[2] // heads)
        scale = float(call_arguments(site.attention)["scale"])
        q_SHD = (q_BSHD[0] * scale).float().numpy()
        row = {
            part: x_BSKD[0].transpose(0, 1).float().numpy()
            for part, x_BSKD in (("key", k_BSKD), ("value", v_BSKD))
        }
        for name, shape in policy.buffers(1, heads, size, True):
            row[name] = np.zeros([int(length) for length in shape[1:]], np.float32)
        policy.watch(row, q_SHD)
        if policy.scores:
            row |= fading_sums(q_SHD, row["key"], 0, policy.scores)
        score_KT = policy.token_scores(row, len(q_SHD))
        assert score_KT is not None
        return {"score": torch.from_numpy(score_KT.astype(np.float32))}
