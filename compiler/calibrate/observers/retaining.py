"""Retaining heads: networks that tell from a token's query, key and value how much it will be looked at.

Each layer's is trained while the text passes it, and what was found at a layer is kept like any statistic. So
a run that was interrupted goes on behind the last layer that is there, to the same bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ....errors import CalibrationError
from ...ir.program import Program, attention_nodes, before_rotary, call_arguments
from ..observer import OBSERVERS, Found, Observer
from ..sites import Site, attention, layer

#: Tokens of a row at most: a matrix of logits is of one row.
_ROW = 1024

#: Of each row this share, its end, is not learned from.
_JUDGED = 8

#: Steps between two looks at it.
_LOOK = 20

#: How far Adam goes at first, and how much of a weight goes with it.
_RATE, _DECAY = 0.005, 0.01


def site_of(number: int) -> str:
    """The name of an attention layer's site."""
    return f"{layer(number)}.retaining"


@OBSERVERS.register
@dataclass
class RetainingHeads(Observer):
    """`inner` [hidden, channels], `bias` [hidden] and `outer` [K, hidden] of each layer's network, and how
    much of the variance of what it should say it tells of tokens that it did not learn from (`told`).

    The text stands twice. The network should say of a token the largest logit that the queries of a KV head
    give it while the text is read again (Huang et al. 2024, section 4.1, where they are those of an answer).
    """

    layers: tuple[int, ...] = ()
    hidden: int = 64
    smooth: float = 0.0025
    steps: int = 300
    tokens: int = 4096

    name = "retaining"

    @property
    def key(self) -> str:
        """Layers are told by their sites, and so by the graph."""
        options = (self.hidden, self.smooth, self.steps, self.tokens)
        return f"retaining-{'-'.join(map(str, options))}"

    def reading(self, tokens_BS: Tensor, context: int) -> Tensor:
        flat = tokens_BS.flatten()[: self.tokens]
        length = min(_ROW, context // 2, len(flat))
        if length < 2 * _JUDGED:
            raise CalibrationError(
                f"retaining heads are trained on rows of {2 * _JUDGED} tokens or more, each read twice, but "
                f"the calibration text has {len(flat)} and the context is {context}: give a longer text, or "
                "compile for a longer context"
            )
        rows = len(flat) // length
        return flat[: rows * length].reshape(rows, length).repeat(1, 2)

    def sites(self, program: Program) -> list[Site]:
        found = []
        for node, shown in zip(attention_nodes(program), attention(program), strict=True):
            given = call_arguments(node)
            number = int(given["layer"])
            if number in self.layers:
                plain, _ = before_rotary(given, ("q_BSHD", "k_BSKD"))
                values = *shown.values, *zip(("queries", "keys"), plain.values(), strict=True)
                more = number, float(given["scale"])
                found.append(Site(site_of(number), values, more))
        return found

    def see(self, site: Site, *values: Any) -> Found:
        q_BSHD, k_BSKD, v_BSKD, plain_q, plain_k, number, scale = values
        length = q_BSHD.shape[1] // 2
        wanted_BTK = largest_logits(q_BSHD[:, length:], k_BSKD[:, :length], scale)
        inputs = [x[:, :length].flatten(2) for x in (plain_q, plain_k, v_BSKD)]
        return trained(
            torch.cat(inputs, -1), wanted_BTK, self.hidden, self.smooth, self.steps, seed=number
        )


def largest_logits(q_BSHD: Tensor, k_BTKD: Tensor, scale: float) -> Tensor:
    """The largest logit that the queries of each KV head give a key, [B, T, K]."""
    rows = zip(q_BSHD, k_BTKD, strict=True)
    found = [_largest(q_SHD, k_TKD) * scale for q_SHD, k_TKD in rows]
    return torch.stack(found)


def _largest(q_SHD: Tensor, k_TKD: Tensor) -> Tensor:
    """[T, K] of one row, a query head at a time."""
    heads = k_TKD.shape[1]
    found = []
    for keys_TD, queries_SED in zip(
        k_TKD.unbind(1), q_SHD.unflatten(1, (heads, -1)).unbind(1), strict=True
    ):
        best = [(query_SD @ keys_TD.T).amax(0) for query_SD in queries_SED.unbind(1)]
        found.append(torch.stack(best).amax(0))
    return torch.stack(found, -1)


def trained(
    inputs_BTE: Tensor, wanted_BTK: Tensor, hidden: int, smooth: float, steps: int, seed: int
) -> dict[str, Tensor]:
    """The network after so many steps of Adam over all tokens, as it was where it told most of those that it
    does not learn from.

    The loss is the smooth L1 norm of what is missing, and `smooth` times the square of what neighbours differ
    by. What is wanted is of mean 0 and variance 1 in each KV head here, for only the order of its tokens
    counts; so are the channels of the inputs, which `inner` and `bias` take in.
    """
    cut = wanted_BTK.shape[1] - wanted_BTK.shape[1] // _JUDGED
    mean_E, spread_E = _spread(inputs_BTE[:, :cut])
    mean_K, spread_K = _spread(wanted_BTK[:, :cut])
    x = (inputs_BTE.float() - mean_E) / spread_E
    wanted = (wanted_BTK.float() - mean_K) / spread_K
    random = torch.Generator().manual_seed(seed)
    channels, heads = x.shape[-1], wanted.shape[-1]
    inner = torch.randn(hidden, channels, generator=random) / math.sqrt(channels)
    outer = torch.randn(heads, hidden, generator=random) / math.sqrt(hidden)
    weights = [inner, torch.zeros(hidden), outer]
    best, told = weights, -math.inf
    with torch.enable_grad():
        leaves = [weight.clone().requires_grad_() for weight in weights]
        adam = torch.optim.AdamW(leaves, lr=_RATE, weight_decay=_DECAY, foreach=False)
        for step in range(steps + 1):
            if step % _LOOK == 0 or step == steps:
                with torch.no_grad():
                    now = _told(network(x[:, cut:], *leaves), wanted[:, cut:])
                if now > told:
                    best, told = [leaf.detach().clone() for leaf in leaves], now
            if step == steps:
                break
            adam.param_groups[0]["lr"] = _RATE * (1 + math.cos(math.pi * step / steps)) / 2
            said = network(x[:, :cut], *leaves)
            missing = functional.smooth_l1_loss(said, wanted[:, :cut])
            uneven = (said[:, 1:] - said[:, :-1]).square().mean()
            adam.zero_grad()
            (missing + smooth * uneven).backward()
            adam.step()
    if not math.isfinite(told):
        raise CalibrationError(
            "retaining heads cannot be trained: the logits on the calibration text are not finite"
        )
    inner, bias, outer = best
    inner = inner / spread_E
    return {
        "inner": inner,
        "bias": bias - inner @ mean_E,
        "outer": outer,
        "told": torch.tensor(told),
    }


def network(x: Tensor, inner: Tensor, bias: Tensor, outer: Tensor) -> Tensor:
    """silu(x inner' + bias) outer'."""
    return functional.linear(functional.silu(functional.linear(x, inner, bias)), outer)


def _spread(x_BTE: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel."""
    flat = x_BTE.float().flatten(0, 1)
    return flat.mean(0), flat.std(0).clamp(min=1e-6)


def _told(said: Tensor, wanted: Tensor) -> float:
    """1 - what is missing of the variance, a mean over heads."""
    flat = wanted.flatten(0, 1)
    off = (said - wanted).flatten(0, 1).square().mean(0)
    return float((1 - off / flat.var(0).clamp(min=1e-12)).mean())
