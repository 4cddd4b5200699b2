"""The attention of four models as plain torch, at the shapes of prefill and decode.

B batch, H query heads, K KV heads, S queries, T keys, D head size. Decode has one query over a cache of T
keys; a window then leaves the last ones. Qwen3 norms queries and keys ahead of rotary embedding, so that a
cache holds normed keys and attention is Llama's; here the norms are part of what is fused, as they stand in
a model without rotary embedding.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Model:
    """What a model's attention is made of. Sources: the configs of the models on the Hugging Face hub."""

    name: str
    heads: int
    kv_heads: int
    head_size: int
    softcap: float | None = None
    window: int | None = None
    sinks: bool = False
    normed: bool = False


MODELS = [
    Model("Llama-3-8B", 32, 8, 128),
    Model("Qwen3-8B", 32, 8, 128, normed=True),
    Model("Gemma2-9B", 16, 8, 256, softcap=50.0),
    Model("Gemma2-9B window", 16, 8, 256, softcap=50.0, window=4096),
    Model("GPT-OSS-20B", 64, 8, 64, sinks=True),
    Model("GPT-OSS-20B window", 64, 8, 64, sinks=True, window=128),
]


@dataclass(frozen=True)
class Shape:
    """One measurement: so many rows of a batch, queries and keys."""

    batch: int
    queries: int
    keys: int

    @property
    def decode(self) -> bool:
        """Whether one query a row is what is computed."""
        return self.queries == 1


SHAPES = [
    Shape(1, 2048, 2048),
    Shape(1, 8192, 8192),
    Shape(1, 1, 8192),
    Shape(16, 1, 8192),
    Shape(1, 1, 65536),
]


def inputs_of(model: Model, shape: Shape, device: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Random q, k, v, the sinks where there are any and the norms' weights where there are any."""
    b, s, t, d = shape.batch, shape.queries, shape.keys, model.head_size

    def random(*sizes: int) -> Tensor:
        return torch.randn(*sizes, device=device, dtype=dtype)

    found = [
        random(b, model.heads, s, d),
        random(b, model.kv_heads, t, d),
        random(b, model.kv_heads, t, d),
    ]
    if model.sinks:
        found.append(random(model.heads))
    if model.normed:
        found += [random(d), random(d)]
    return tuple(found)


def norm(x: Tensor, weight: Tensor) -> Tensor:
    """RMSNorm of the last axis, as Qwen3 has it on queries and keys."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype) * weight


def function_of(model: Model, shape: Shape) -> Callable[..., Any]:
    """The attention of a model, written out: what the compiler is given, and what Inductor is."""
    groups = model.heads // model.kv_heads
    s, t, d = shape.queries, shape.keys, model.head_size

    def attention(q: Tensor, k: Tensor, v: Tensor, *extra: Tensor) -> Tensor:
        b = q.shape[0]
        if model.normed:
            q, k = norm(q, extra[-2]), norm(k, extra[-1])
        q = q.reshape(b, model.kv_heads, groups, s, d)
        scores = torch.einsum("bkgsd,bktd->bkgst", q, k).float() / math.sqrt(d)
        if model.softcap is not None:
            scores = torch.tanh(scores / model.softcap) * model.softcap
        live = _live(model, s, t, q.device)
        if live is not None:
            scores = torch.where(live, scores, -math.inf)
        if model.sinks:
            sink = extra[0].reshape(1, model.kv_heads, groups, 1, 1).expand(b, -1, -1, s, 1)
            scores = torch.cat([scores, sink.float()], dim=-1)
        weights = torch.softmax(scores, dim=-1)
        weights = weights[..., :-1] if model.sinks else weights
        mixed = torch.einsum("bkgst,bktd->bkgsd", weights.to(v.dtype), v)
        return mixed.reshape(b, model.heads, s, d)

    return attention


def _live(model: Model, s: int, t: int, device: torch.device) -> Tensor | None:
    """Which keys a query sees; None where it sees all."""
    if s == 1 and (model.window is None or model.window >= t):
        return None
    rows = torch.arange(s, device=device)[:, None] + (t - s)
    keys = torch.arange(t, device=device)[None, :]
    if s == 1:
        assert model.window is not None
        return keys > rows - model.window
    if model.window is None:
        return keys <= rows
    return (keys <= rows) & (keys > rows - model.window)


def work(model: Model, shape: Shape) -> tuple[float, float]:
    """Bytes that must be moved and floating-point operations that must be done, by the mathematics."""
    seen = float(min(shape.keys, model.window or shape.keys))
    pairs = seen if shape.decode else shape.queries * seen - (seen * seen / 2 if seen else 0)
    if not shape.decode and model.window is None:
        pairs = shape.queries * shape.keys / 2
    read = min(seen + shape.queries - 1, shape.keys)
    moved = 2.0 * shape.batch * model.head_size
    moved *= 2 * model.kv_heads * read + 2 * model.heads * shape.queries
    return moved, 4.0 * shape.batch * model.heads * model.head_size * pairs
