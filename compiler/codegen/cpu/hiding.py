"""Attention through torch's kernel, and spelled out where what a mask hides would get through that.

The kernel adds its mask to the scores: NaN, an infinity or a product that overflows stays what it is, and
then the whole row is NaN. So where a result is not finite (one sum over it tells), it is computed again with
the hidden scores replaced. That costs time only where there is something to hide.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

aten = torch.ops.aten

#: A finite mask value below which no score shows.
HIDDEN = -1e20


@torch.library.custom_op("einfold_cpu::attention", mutates_args=())
def attention(
    q_BHSD: Tensor, k_BKTD: Tensor, v_BKTF: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> Tensor:
    """[B, H, S, F]; `mask` broadcasts over [B, H, S, T], truth values or what is added."""
    out = torch.nn.functional.scaled_dot_product_attention(
        q_BHSD,
        k_BKTD,
        v_BKTF,
        mask,
        0.0,
        causal,
        scale=scale,
        enable_gqa=q_BHSD.shape[1] != k_BKTD.shape[1],
    )
    if not math.isfinite(out.sum().item()):
        out = _spelled_out(q_BHSD, k_BKTD, v_BKTF, mask, causal, scale)[0]
    return _rows_first(out)


@attention.register_fake
def _(
    q_BHSD: Tensor, k_BKTD: Tensor, v_BKTF: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> Tensor:
    batch, heads, rows, _ = q_BHSD.shape
    return q_BHSD.new_empty(batch, rows, heads, v_BKTF.shape[-1]).transpose(1, 2)


@torch.library.custom_op("einfold_cpu::attention_with_sum", mutates_args=())
def attention_with_sum(
    q_BHSD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """[B, H, S, D] and the log-sum-exp of the scores [B, H, S]; `mask` is what is added."""
    out, total = aten._scaled_dot_product_flash_attention_for_cpu(
        q_BHSD, k_BKTD, v_BKTD, 0.0, causal, attn_mask=mask, scale=scale
    )
    if not math.isfinite(out.sum().item()):
        out, total = _spelled_out(q_BHSD, k_BKTD, v_BKTD, mask, causal, scale)
    return _rows_first(out), total.contiguous()


@attention_with_sum.register_fake
def _(
    q_BHSD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    batch, heads, rows, _ = q_BHSD.shape
    out = q_BHSD.new_empty(batch, rows, heads, v_BKTD.shape[-1]).transpose(1, 2)
    total = q_BHSD.new_empty(batch, heads, rows, dtype=_sums_in(q_BHSD.dtype))
    return out, total


def _sums_in(dtype: torch.dtype) -> torch.dtype:
    """The type of the kernel's log-sum-exp."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _rows_first(out_BHSF: Tensor) -> Tensor:
    """In the memory order that the kernel gives, whichever way it was computed."""
    rows = out_BHSF.transpose(1, 2)
    return out_BHSF if rows.is_contiguous() else rows.contiguous().transpose(1, 2)


def _spelled_out(
    q_BHSD: Tensor, k_BKTD: Tensor, v_BKTF: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    dtype = _sums_in(q_BHSD.dtype)
    group = q_BHSD.shape[1] // k_BKTD.shape[1]
    k, v = (x.to(dtype).repeat_interleave(group, 1) for x in (k_BKTD, v_BKTF))
    scores = q_BHSD.to(dtype) @ k.mT * scale
    if causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        scores = torch.where(seen, scores, -math.inf)
    if mask is not None and mask.dtype == torch.bool:
        scores = torch.where(mask, scores, -math.inf)
    elif mask is not None:
        added = mask.to(dtype)
        scores = torch.where(added <= HIDDEN, added, scores + added)
    blind = scores.amax(-1, keepdim=True) == -math.inf
    weights = torch.where(blind, 0.0, scores.softmax(-1))
    return (weights @ v).to(q_BHSD.dtype), scores.logsumexp(-1)
