"""Hooks into transformers that keep attention and expert routing whole while a model is traced.

This file and `huggingface.py` are the only ones that touch transformers' internals.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from ...errors import UnsupportedError
from ..ir.ops import einfold_ops
from ..ir.ops.activation import GATES, gated_activation_reference
from .masks import Mask, read_mask

NAME = "einfold"

#: Keyword arguments that say nothing about which keys a query sees or how it weighs them.
_HARMLESS = {
    "position_ids",
    "cache_position",
    "use_cache",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "return_dict",
    "position_embeddings",
    "is_causal",
    "logits_to_keep",
    "num_items_in_batch",
    "head_mask",
    "attention_dropout",
}


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Mask | Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **rest: Any,
) -> tuple[Tensor, None]:
    """One `einfold::attention` for one call of a model's attention. q, k, v come as [B, heads, S, D].

    Attention to what an encoder made is torch's own operator (`Crossing`).
    """
    crossing = _CROSSING.get()
    if crossing is not None and crossing.holds(key):
        return crossing.attention(module, query, key, value, scaling, softcap, s_aux), None
    layer = getattr(module, "layer_idx", None)
    where = f"layer {layer} ({type(module).__name__})"
    if layer is None:
        raise UnsupportedError(
            f"{where}: the attention module has no layer_idx, so its cache has no place"
        )
    if isinstance(attention_mask, Mask):  # the mask decides, where there is one
        sliding_window = attention_mask.window_at(where)
    elif attention_mask is not None:
        raise UnsupportedError(
            f"{where}: the model builds an attention mask of its own, which is not captured"
        )
    if getattr(module, "is_causal", True) is False or rest.get("is_causal") is False:
        raise UnsupportedError(
            f"{where}: attention is not causal; einfold compiles causal language models"
        )
    table = rest.pop("position_bias", None)
    if table is not None and (crossing is None or not crossing.is_table(table)):
        raise UnsupportedError(
            f"{where}: the model adds a bias of its own to attention, which is not captured"
        )
    unknown = sorted(
        k for k, v in rest.items() if k not in _HARMLESS and v is not None and v is not False
    )
    if unknown:
        raise UnsupportedError(
            f"{where}: the attention takes {', '.join(unknown)}, which einfold does not know"
        )
    out = einfold_ops.attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        s_aux,
        layer,
        float(query.shape[-1] ** -0.5 if scaling is None else scaling),
        int(sliding_window or 0),
        float(softcap or 0.0),
        *(() if table is None else (table,)),
    )
    return out, None


class Crossing:
    """A decoder's attention to what is given from outside, and to its own tokens by how far apart they are:
    `tables` are those of its relative positions, as they come to be read."""

    def __init__(self, tables: Sequence[Tensor]) -> None:
        self._tables = tables
        self._keys: dict[int, Tensor] = {}
        self._mask_BT: Tensor | None = None
        self.modules: dict[int, nn.Module] = {}
        """The cross-attention of each layer that came through the hook."""

    def holds(self, key: Tensor) -> bool:
        """Whether keys are among those from outside."""
        return any(key is known for known in self._keys.values())

    def is_table(self, bias: Any) -> bool:
        """Whether a bias is a table that was put in the place of relative positions."""
        return any(bias is table for table in self._tables)

    def attention(
        self,
        module: nn.Module,
        query_BHSD: Tensor,
        key_BKTD: Tensor,
        value_BKTD: Tensor,
        scaling: float | None,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        """Attention to all tokens that are there, [B, S, H, D]."""
        layer = next(layer for layer, known in self._keys.items() if key_BKTD is known)
        relative = getattr(module, "has_relative_attention_bias", False)
        if softcap or sinks is not None or relative:
            raise UnsupportedError(
                f"layer {layer}: cross-attention with a softcap, sinks or relative positions is not captured"
            )
        self.modules[layer] = module
        mask = None if self._mask_BT is None else self._mask_BT[:, None, None]
        grouped = getattr(module, "num_key_value_groups", 1) > 1
        out = nn.functional.scaled_dot_product_attention(
            query_BHSD, key_BKTD, value_BKTD, mask, scale=scaling, enable_gqa=grouped
        )
        return out.transpose(1, 2)

    @contextmanager
    def on(self, keys: Mapping[int, Tensor], mask_BT: Tensor | None) -> Iterator[None]:
        """The attention of a decoder is captured so while the block runs. `keys` [B, K, T, D] are those of
        its cross-attention, by layer; the mask, bool [B, T], says which of the T tokens are there."""
        self._keys, self._mask_BT = dict(keys), mask_BT
        token = _CROSSING.set(self)
        try:
            yield
        finally:
            _CROSSING.reset(token)
            self._keys, self._mask_BT = {}, None


_CROSSING: ContextVar[Crossing | None] = ContextVar("crossing", default=None)


def _experts(module: Any, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """One `einfold::experts` for one call of a model's expert block."""
    gate_up, down = module.gate_up_proj, module.down_proj
    gate_up_bias = getattr(module, "gate_up_proj_bias", None)
    down_bias = getattr(module, "down_proj_bias", None)
    if module.is_transposed:
        gate_up, down = gate_up.transpose(1, 2), down.transpose(1, 2)
    kind, alpha, limit, interleaved = module._einfold_gate
    if interleaved:
        gate_up = torch.cat((gate_up[:, 0::2], gate_up[:, 1::2]), dim=1)
        if gate_up_bias is not None:
            gate_up_bias = torch.cat((gate_up_bias[:, 0::2], gate_up_bias[:, 1::2]), dim=1)
    out: Tensor = einfold_ops.experts(
        x, index, weight, gate_up, gate_up_bias, down, down_bias, kind, alpha, limit
    )
    return out


def register() -> None:
    """Makes the attention and expert implementation "einfold" known to transformers (idempotent)."""
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, read_mask)
    ALL_EXPERTS_FUNCTIONS.register(NAME, _experts)


def install(model: Any) -> None:
    """Switches a model to the einfold hooks; raises UnsupportedError for what they can't express."""
    register()
    for name, module in model.named_modules():
        if hasattr(module, "_apply_gate") and hasattr(module, "is_transposed"):
            module._einfold_gate = _probe_gate(name, module)
    model.set_attn_implementation(NAME)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation(NAME)


def _probe_gate(name: str, module: Any) -> tuple[str, float, float, bool]:
    """Finds which known gate a module's own `_apply_gate` is, by comparing numbers.

    Gives (kind, alpha, limit, interleaved). The probe decides, not the module's class or name.
    """
    if not getattr(module, "has_gate", True) or getattr(module, "has_post_expert_norm", False):
        raise UnsupportedError(
            f"{name}: experts without a gate, or with a norm behind them, are not supported"
        )
    alpha = float(getattr(module, "alpha", 1.0))
    limit = float(getattr(module, "limit", None) or 0.0)
    probe = torch.randn(8, 64, generator=torch.Generator().manual_seed(0)) * 6
    want = module._apply_gate(probe)
    for interleaved in (False, True):
        gate, up = (probe[:, 0::2], probe[:, 1::2]) if interleaved else probe.chunk(2, dim=-1)
        for kind in GATES:
            got = gated_activation_reference(gate, up, kind, alpha, limit)
            if torch.allclose(got, want, rtol=1e-5, atol=1e-6):
                return kind, alpha, limit, interleaved
    raise UnsupportedError(f"{name}: its gated activation is none of {', '.join(GATES)}")


@contextmanager
def hollow_parameters() -> Iterator[None]:
    """Modules built inside get parameters of the right shape that take no memory (stride 0)."""
    original: Callable[..., None] = nn.Module.register_parameter

    def register_hollow(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and any(param.stride()):
            empty = torch.zeros((), dtype=param.dtype).expand(param.shape)
            param = nn.Parameter(empty, requires_grad=False)
        original(self, name, param)

    convolution = nn.modules.conv._ConvNd
    drawn = (
        convolution.reset_parameters
    )  # copies what it drew into the weight, which has no room for it
    nn.Module.register_parameter = register_hollow  # type: ignore[method-assign]
    convolution.reset_parameters = lambda self: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]
        convolution.reset_parameters = drawn  # type: ignore[method-assign]


__all__ = ["Crossing", "hollow_parameters", "install", "register"]
