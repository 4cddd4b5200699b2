"""Attention over all keys of a call, without a cache: what `fuse_attention` finds in a graph."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from .record import OPERATORS, Operator


@OPERATORS.register
@dataclass(eq=False)
class SoftmaxAttention(Operator):
    """softmax(scale * q k^T + bias) v [B, H, S, F]; each head of k and v is read by H / K heads of q.

    `bias` is added to the scores, and `visible` says where a score counts: where it does not, `hidden` stands
    in its place. Both broadcast over [B, H, S, T], with as many axes. `causal` hides the keys after a row's
    own place too. `sinks`, over [B, H, S, N], are logits that take part in the softmax and have no value.

    `behind` and `ahead` say how far from a row's own place `visible` lets it see at most, so that a target
    may leave other keys out. With `softcap` scores are softcap * tanh(scores / softcap) ahead of the bias.

    A row that sees nothing, all its scores -inf, gives NaN, as the softmax of such a row does; with
    `zero_blind` it gives zeros, as torch's scaled_dot_product_attention does.
    """

    name = "softmax_attention"

    q_BHSD: Tensor
    k_BKTD: Tensor
    v_BKTF: Tensor
    bias: Tensor | None
    visible: Tensor | None
    sinks: Tensor | None
    scale: float
    hidden: float
    causal: bool = False
    zero_blind: bool = False
    behind: int | None = None
    ahead: int | None = None
    softcap: float = 0.0

    def run(self) -> Tensor:
        group = self.q_BHSD.shape[1] // self.k_BKTD.shape[1]
        k, v = (x.repeat_interleave(group, 1) for x in (self.k_BKTD, self.v_BKTF))
        scores = self.q_BHSD @ k.mT * self.scale
        if self.softcap:
            scores = torch.tanh(scores / self.softcap) * self.softcap
        if self.bias is not None:
            scores = scores + self.bias
        if self.visible is not None:
            scores = torch.where(self.visible, scores, self.hidden)
        near = self._near(scores)
        if near is not None:
            scores = torch.where(near, scores, self.hidden)
        keys = scores.shape[-1]
        if self.sinks is not None:
            sinks = self.sinks.expand(*scores.shape[:-1], -1)
            scores = torch.cat((scores, sinks), dim=-1)
        weights = scores.softmax(-1)
        if self.zero_blind:
            blind = scores.amax(-1, keepdim=True) == -math.inf
            weights = torch.where(blind, 0.0, weights)
        return weights[..., :keys] @ v

    def _near(self, scores: Tensor) -> Tensor | None:
        """The keys that are near enough to each row's place; None where all are."""
        place = torch.arange(scores.shape[-2], device=scores.device)[:, None]
        away = torch.arange(scores.shape[-1], device=scores.device) - place
        tests = [away <= 0] if self.causal else []
        if self.ahead is not None:
            tests.append(away <= self.ahead)
        if self.behind is not None:
            tests.append(away >= -self.behind)
        return reduce(torch.logical_and, tests) if tests else None

    def shapes(self) -> Tensor:
        heads, kv_heads = self.q_BHSD.shape[1], self.k_BKTD.shape[1]
        if heads % kv_heads or self.v_BKTF.shape[1] != kv_heads:
            raise ValueError(f"{heads} heads of queries over {kv_heads} of keys")
        if any(x is not None and x.ndim != 4 for x in (self.bias, self.visible, self.sinks)):
            raise ValueError("bias, visible and sinks have four axes")
        return self.q_BHSD.new_empty((*self.q_BHSD.shape[:-1], self.v_BKTF.shape[-1]))
