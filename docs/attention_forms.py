"""Forms of attention and of its relatives, as anybody might write them in plain torch.

None has an annotation. `attention_table.py` imports each, folds it and writes `attention.md`;
`tests/cascade` checks each against float64 torch. B batch, H heads, K KV heads, S queries, T keys,
D head size, F value size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

B, H, K, S, T, D = 2, 4, 2, 5, 12, 8
NEG = -1e30


@dataclass(frozen=True)
class Form:
    """A function, example inputs, and what folding is expected to make of it.

    `folds` is "one pass", "one already" (nothing to fold), "two" (two are needed) or "refused".
    """

    name: str
    function: Callable[..., Any]
    inputs: Callable[[], tuple[Tensor, ...]]
    folds: str = "one pass"
    factor: str = ""


FORMS: list[Form] = []


class AsModule(nn.Module):
    """A function of tensors as a module, which is what is exported."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *tensors: Tensor) -> Any:
        return self.function(*tensors)


def in_float32(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """A form's inputs as models have them: real numbers in single precision."""
    return tuple(x.float() if x.is_floating_point() else x for x in inputs)


def form(
    name: str, inputs: Callable[[], tuple[Tensor, ...]], folds: str = "one pass", factor: str = ""
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Adds a function to the catalogue."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        FORMS.append(Form(name, function, inputs, folds, factor))
        return function

    return register


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def qkv() -> tuple[Tensor, ...]:
    return _random(B, H, S, D), _random(B, H, T, D), _random(B, H, T, D)


def square() -> tuple[Tensor, ...]:
    return _random(B, H, T, D), _random(B, H, T, D), _random(B, H, T, D)


def with_extra(*extra: Callable[[], Tensor]) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (*qkv(), *(make() for make in extra))


def bool_mask() -> Tensor:
    return torch.rand(B, 1, S, T) < 0.8


@form("softmax", qkv)
def softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT, dim=-1) @ v


@form("softmax over another dimension", qkv)
def softmax_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("bhts,bhtd->bhsd", torch.softmax(k @ q.mT, dim=-2), v)


@form("softmax by exp and sum", qkv)
def softmax_by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    return (weights / weights.sum(-1, keepdim=True)) @ v


@form("softmax divided last", qkv)
def softmax_divided_last(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    weights = torch.exp(scores - scores.max(dim=-1, keepdim=True).values)
    return (weights @ v) / weights.sum(-1, keepdim=True)


@form("softmax by logsumexp", qkv)
def softmax_by_logsumexp(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    return torch.exp(scores - scores.logsumexp(-1, keepdim=True)) @ v


@form("softmax by log_softmax", qkv)
def softmax_by_log(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return functional.log_softmax(q @ k.mT, dim=-1).exp() @ v


@form("softmax by base two", qkv)
def softmax_base_two(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT * math.log2(math.e)
    weights = torch.exp2(scores - scores.amax(-1, keepdim=True))
    return (weights / weights.sum(-1, keepdim=True)) @ v


@form("softmax without a maximum", qkv, "one pass")
def softmax_unstable(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.exp(q @ k.mT)
    return (weights / weights.sum(-1, keepdim=True)) @ v


@form("softmax of shifted scores", qkv)
def softmax_shifted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    scores = scores - scores.max(dim=-1, keepdim=True).values
    return torch.softmax(scores, dim=-1) @ v


@form("softmax in float32, weights narrowed", qkv)
def softmax_cast(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.softmax((q @ k.mT).float(), dim=-1, dtype=torch.float32).to(v.dtype)
    return weights @ v


@form("self-attention of one tensor", lambda: (_random(B, T, D),))
def self_attention(x: Tensor) -> Tensor:
    return torch.softmax(x @ x.mT / math.sqrt(D), dim=-1) @ x


@form("with projections", lambda: (_random(B, T, D), _random(D, D), _random(D, D), _random(D, D)))
def projections(x: Tensor, w_q: Tensor, w_k: Tensor, w_v: Tensor) -> Tensor:
    q, k, v = x @ w_q, x @ w_k, x @ w_v
    return torch.softmax(q @ k.mT, dim=-1) @ v


@form("scaled_dot_product_attention", with_extra(bool_mask))
def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@form("scaled_dot_product_attention, causal", square)
def sdpa_causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return functional.scaled_dot_product_attention(q, k, v, is_causal=True)


@form("scale by division", qkv)
def scale_division(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT / math.sqrt(D), dim=-1) @ v


@form("scale by a tensor", with_extra(lambda: torch.rand(H, 1, 1, dtype=torch.float64)))
def scale_tensor(q: Tensor, k: Tensor, v: Tensor, scale: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT * scale, dim=-1) @ v


@form("additive mask", with_extra(lambda: _random(B, 1, S, T)))
def additive_mask(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT + mask, dim=-1) @ v


@form("boolean mask, -inf", with_extra(bool_mask))
def boolean_mask(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return torch.softmax((q @ k.mT).masked_fill(~mask, -math.inf), dim=-1) @ v


@form("boolean mask, -1e30", with_extra(bool_mask))
def finite_mask(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return torch.softmax(torch.where(mask, q @ k.mT, NEG), dim=-1) @ v


@form("mask after the exponential", with_extra(bool_mask))
def late_mask(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = q @ k.mT
    weights = torch.exp(scores - scores.amax(-1, keepdim=True)) * mask
    return (weights / (weights.sum(-1, keepdim=True) + 1e-6)) @ v


@form("causal by tril", square)
def causal_tril(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    live = torch.tril(torch.ones(T, T, dtype=torch.bool))
    return torch.softmax((q @ k.mT).masked_fill(~live, -math.inf), dim=-1) @ v


@form("causal by positions", qkv)
def causal_positions(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    rows = torch.arange(S)[:, None] + (T - S)
    live = torch.arange(T)[None, :] <= rows
    return torch.softmax(torch.where(live, q @ k.mT, -math.inf), dim=-1) @ v


@form("sliding window", square)
def sliding_window(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    place = torch.arange(T)
    away = place[:, None] - place[None, :]
    live = (away >= 0) & (away < 4)
    return torch.softmax(torch.where(live, q @ k.mT, NEG), dim=-1) @ v


def documents() -> tuple[Tensor, ...]:
    return *square(), torch.randint(0, 3, (B, T)).sort(-1).values


@form("document mask", documents)
def document_mask(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    place = torch.arange(T)
    live = (ids[:, :, None] == ids[:, None, :]) & (place[:, None] >= place)
    return torch.softmax(torch.where(live[:, None], q @ k.mT, -math.inf), dim=-1) @ v


@form("ALiBi", square)
def alibi(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    place = torch.arange(T, dtype=q.dtype)
    slopes = torch.exp2(-2.0 * (torch.arange(H, dtype=q.dtype) + 1))
    bias = slopes[:, None, None] * (place[None, :] - place[:, None])
    live = place[:, None] >= place[None, :]
    return torch.softmax(torch.where(live, q @ k.mT + bias, -math.inf), dim=-1) @ v


@form("relative bias", with_extra(lambda: _random(H, S, T)))
def relative_bias(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT + bias[None], dim=-1) @ v


@form("softcap", square)
def softcap(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.tanh(q @ k.mT / 20.0) * 20.0
    live = torch.tril(torch.ones(T, T, dtype=torch.bool))
    return torch.softmax(scores.masked_fill(~live, -math.inf), dim=-1) @ v


@form("sinks by concatenation", with_extra(lambda: _random(H)))
def sinks(q: Tensor, k: Tensor, v: Tensor, sink: Tensor) -> Tensor:
    scores = torch.cat([q @ k.mT, sink.reshape(1, H, 1, 1).expand(B, H, S, 1)], dim=-1)
    scores = scores - scores.max(dim=-1, keepdim=True).values
    return torch.softmax(scores, dim=-1)[..., :-1] @ v


@form("sinks in front", with_extra(lambda: _random(H)))
def sinks_in_front(q: Tensor, k: Tensor, v: Tensor, sink: Tensor) -> Tensor:
    scores = torch.cat([sink.reshape(1, H, 1, 1).expand(B, H, S, 1), q @ k.mT], dim=-1)
    return torch.softmax(scores, dim=-1)[..., 1:] @ v


@form("softmax plus one", qkv)
def softmax_plus_one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    top = scores.amax(-1, keepdim=True)
    weights = torch.exp(scores - top)
    return (weights / (torch.exp(-top) + weights.sum(-1, keepdim=True))) @ v


@form("sigmoid attention", qkv, "one already")
def sigmoid_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.sigmoid(q @ k.mT / math.sqrt(D) - math.log(T)) @ v


@form("ReLU attention", qkv, "one already")
def relu_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.relu(q @ k.mT / math.sqrt(D)) / T @ v


@form("linear attention", qkv, "one already")
def linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k = functional.elu(q) + 1, functional.elu(k) + 1
    return (q @ (k.mT @ v)) / (q * k.sum(-2, keepdim=True)).sum(-1, keepdim=True)


@form("linear attention, causal", square, "one pass")
def linear_causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.tril((functional.elu(q) + 1) @ (functional.elu(k) + 1).mT)
    return (scores / scores.sum(-1, keepdim=True)) @ v


def differential_inputs() -> tuple[Tensor, ...]:
    q1, k1, v = qkv()
    q2, k2, _ = qkv()
    return q1, k1, q2, k2, v, _random(1)


@form("differential attention", differential_inputs)
def differential(
    q1: Tensor, k1: Tensor, q2: Tensor, k2: Tensor, v: Tensor, weight: Tensor
) -> Tensor:
    one = torch.softmax(q1 @ k1.mT / math.sqrt(D), dim=-1)
    two = torch.softmax(q2 @ k2.mT / math.sqrt(D), dim=-1)
    return (one - weight * two) @ v


@form("cosine attention", qkv)
def cosine(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = functional.normalize(q, dim=-1) @ functional.normalize(k, dim=-1).mT
    return torch.softmax(scores * 10.0, dim=-1) @ v


@form("RMS-normed queries and keys", with_extra(lambda: _random(D), lambda: _random(D)))
def qk_norm(q: Tensor, k: Tensor, v: Tensor, w_q: Tensor, w_k: Tensor) -> Tensor:
    q = q * torch.rsqrt(q.pow(2).mean(-1, keepdim=True) + 1e-6) * w_q
    k = k * torch.rsqrt(k.pow(2).mean(-1, keepdim=True) + 1e-6) * w_k
    return torch.softmax(q @ k.mT, dim=-1) @ v


def latent_inputs() -> tuple[Tensor, ...]:
    latent, rope = 6, 4
    return (
        _random(B, H, S, D),
        _random(B, H, S, rope),
        _random(B, T, latent),
        _random(B, T, rope),
        _random(H, D, latent),
        _random(H, latent, D),
    )


@form("MLA, latent form", latent_inputs)
def latent(
    q: Tensor, q_rope: Tensor, c: Tensor, k_rope: Tensor, w_uk: Tensor, w_uv: Tensor
) -> Tensor:
    absorbed = torch.einsum("bhsd,hdl->bhsl", q, w_uk)
    scores = torch.einsum("bhsl,btl->bhst", absorbed, c)
    scores = scores + torch.einsum("bhsr,btr->bhst", q_rope, k_rope)
    weights = torch.softmax(scores / math.sqrt(D), dim=-1)
    return torch.einsum("bhsl,hlf->bhsf", torch.einsum("bhst,btl->bhsl", weights, c), w_uv)


def grouped() -> tuple[Tensor, ...]:
    return _random(B, H, S, D), _random(B, K, T, D), _random(B, K, T, D)


@form("GQA by repeat_interleave", grouped)
def gqa_repeat(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (x.repeat_interleave(H // K, dim=1) for x in (k, v))
    return torch.softmax(q @ k.mT, dim=-1) @ v


@form("GQA by expand and reshape", grouped)
def gqa_expand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (x[:, :, None].expand(B, K, H // K, T, D).reshape(B, H, T, D) for x in (k, v))
    return torch.softmax(q @ k.mT, dim=-1) @ v


@form("GQA by reshaped queries", grouped)
def gqa_reshape(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q = q.reshape(B, K, H // K, S, D)
    weights = torch.softmax(torch.einsum("bkgsd,bktd->bkgst", q, k), dim=-1)
    return torch.einsum("bkgst,bktd->bkgsd", weights, v).reshape(B, H, S, D)


def _integers(*shape: int) -> Tensor:
    return torch.randint(-127, 127, shape, dtype=torch.int8)


def _scale(*shape: int) -> Tensor:
    return torch.rand(*shape, dtype=torch.float64) / 64 + 1e-3


def per_token() -> tuple[Tensor, ...]:
    kv, scale, zero = _integers(2, B, H, T, D), _scale(2, B, H, T, 1), _integers(2, B, H, T, 1)
    return _random(B, H, S, D), kv[0], kv[1], scale[0], scale[1], zero[0], zero[1]


def per_channel() -> tuple[Tensor, ...]:
    kv, scale, zero = _integers(2, B, H, T, D), _scale(2, B, H, 1, D), _integers(2, B, H, 1, D)
    return _random(B, H, S, D), kv[0], kv[1], scale[0], scale[1], zero[0], zero[1]


@form("K/V dequantized, per channel", per_channel)
@form("K/V dequantized, per token", per_token)
def dequantized(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    k_zero: Tensor,
    v_zero: Tensor,
) -> Tensor:
    k = (k.to(q.dtype) - k_zero.to(q.dtype)) * k_scale
    v = (v.to(q.dtype) - v_zero.to(q.dtype)) * v_scale
    return torch.softmax(q @ k.mT, dim=-1) @ v


@form("log-sum-exp as an output", qkv)
def with_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    scores = q @ k.mT
    return torch.softmax(scores, dim=-1) @ v, torch.logsumexp(scores, dim=-1)


@form("mean and variance under the attention", qkv)
def moments(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    weights = torch.softmax(q @ k.mT, dim=-1)
    mean = weights @ v
    away = (v[:, :, None] - mean[:, :, :, None]) ** 2
    return mean, torch.einsum("bhst,bhstd->bhsd", weights, away)


@form("entropy of the attention", qkv)
def entropy(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    logs = functional.log_softmax(q @ k.mT, dim=-1)
    weights = logs.exp()
    return weights @ v, -(weights * logs).sum(-1)


@form("entropy by p log p", qkv)
def entropy_by_p(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    weights = torch.softmax(q @ k.mT, dim=-1)
    return weights @ v, -(weights * torch.log(weights)).sum(-1)


def pair() -> tuple[Tensor, ...]:
    q, k, v = square()
    return q, k, v, _random(B, T, T, 6), _random(6, H), torch.rand(B, T) < 0.8, _random(B, H, T, D)


@form("Evoformer: pair bias and gating", pair)
def evoformer(
    q: Tensor, k: Tensor, v: Tensor, z: Tensor, w: Tensor, live: Tensor, gate: Tensor
) -> Tensor:
    bias = (z @ w).permute(0, 3, 1, 2)
    masked = torch.where(live[:, None, None, :], 0.0, -1e9)
    weights = torch.softmax(q @ k.mT / math.sqrt(D) + bias + masked, dim=-1)
    return torch.sigmoid(gate) * (weights @ v)


@form("talking heads", with_extra(lambda: _random(H, H)))
def talking_heads(q: Tensor, k: Tensor, v: Tensor, mix: Tensor) -> Tensor:
    weights = torch.softmax(q @ k.mT, dim=-1)
    return torch.einsum("bhst,he,betd->besd", weights, mix, v)


def classes() -> tuple[Tensor, ...]:
    return _random(6, 16) * 3, torch.randint(0, 16, (6,))


@form("cross-entropy, smoothed, with z-loss", classes)
def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    loss = functional.cross_entropy(logits, target, label_smoothing=0.1)
    return loss + 1e-4 * torch.logsumexp(logits, -1).square().mean()


def normed() -> tuple[Tensor, ...]:
    return _random(5, 16), _random(16), _random(16), _random(7, 16)


@form("LayerNorm into a matrix product", normed)
def norm_matmul(x: Tensor, weight: Tensor, bias: Tensor, w: Tensor) -> Tensor:
    return functional.linear(functional.layer_norm(x, (16,), weight, bias), w)


@form("RMSNorm into a matrix product", normed)
def rms_matmul(x: Tensor, weight: Tensor, bias: Tensor, w: Tensor) -> Tensor:
    return (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * weight + bias) @ w.mT


@form("probabilities as an output", qkv, "two")
def with_probabilities(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    weights = torch.softmax(q @ k.mT, dim=-1)
    return weights @ v, weights


@form("a second hop over the same keys", qkv, "refused", "matmul_1[b, h, s, d]")
def second_hop(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    first = torch.softmax(q @ k.mT, dim=-1) @ k
    return torch.softmax(first @ k.mT, dim=-1) @ v


@form("weights rounded by their final scale", qkv, "refused", "round")
def rounded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.softmax(q @ k.mT, dim=-1)
    step = weights.amax(-1, keepdim=True) / 127
    return torch.round(weights / step) * step @ v


@form("threshold on the final maximum", qkv, "refused", ">")
def threshold(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    live = scores > scores.amax(-1, keepdim=True) - 3
    return torch.softmax(scores.masked_fill(~live, -math.inf), dim=-1) @ v


@form("sigmoid of the maximum under exp", qkv, "refused", "sigmoid")
def sigmoid_of_maximum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    return torch.exp(scores * torch.sigmoid(scores.amax(-1, keepdim=True))) @ v


@form("ReLU of scores less their maximum", qkv, "refused", "relu")
def relu_of_difference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    return torch.relu(scores - scores.mean(-1, keepdim=True)) @ v
