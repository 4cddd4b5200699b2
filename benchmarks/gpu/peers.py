"""What a kernel is measured beside: SDPA's flash and cuDNN kernels, FlexAttention, Inductor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from .forms import Model, Shape, function_of

Run = Callable[[], Any]


def peers(model: Model, shape: Shape, inputs: tuple[Tensor, ...]) -> dict[str, Run]:
    """The peers that can express a model's attention, by name."""
    found: dict[str, Run] = {"Inductor": _inductor(model, shape, inputs)}
    plain = model.softcap is None and not model.sinks and not model.normed
    if plain and (model.window is None or model.window >= shape.keys):
        for name, backend in (
            ("SDPA flash", SDPBackend.FLASH_ATTENTION),
            ("SDPA cuDNN", SDPBackend.CUDNN_ATTENTION),
        ):
            found[name] = _sdpa(shape, inputs, backend)
    if not model.sinks and not model.normed:
        found["FlexAttention"] = _flex(model, shape, inputs)
    return found


def _sdpa(shape: Shape, inputs: tuple[Tensor, ...], backend: SDPBackend) -> Run:
    q, k, v = inputs[:3]

    def run() -> Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(
                q, k, v, is_causal=not shape.decode, enable_gqa=True
            )

    return run


def _inductor(model: Model, shape: Shape, inputs: tuple[Tensor, ...]) -> Run:
    compiled = torch.compile(function_of(model, shape), dynamic=False)
    return lambda: compiled(*inputs)


def _flex(model: Model, shape: Shape, inputs: tuple[Tensor, ...]) -> Run:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    q, k, v = inputs[:3]
    ahead = shape.keys - shape.queries

    def score(x: Tensor, b: Tensor, h: Tensor, row: Tensor, key: Tensor) -> Tensor:
        return x if model.softcap is None else torch.tanh(x / model.softcap) * model.softcap

    def mask(b: Tensor, h: Tensor, row: Tensor, key: Tensor) -> Tensor:
        live = key <= row + ahead
        return live if model.window is None else live & (key > row + ahead - model.window)

    blocks = create_block_mask(mask, None, None, shape.queries, shape.keys, device="cuda")
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda: compiled(q, k, v, score_mod=score, block_mask=blocks, enable_gqa=True)
