"""What a kernel is measured beside: SDPA's flash and cuDNN kernels, FlexAttention, Inductor.

The backend of torch.compile stands among them: the same kernel in a graph, with what Inductor puts around it.
Each peer computes the same attention from the same inputs. What a peer cannot express itself is put around
it and counted: norms of queries and keys ahead (compiled by Inductor), sinks behind, by the log-sum-exp.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from .forms import Model, Shape, function_of, norm

Run = Callable[[], Any]
#: Searches its own tiles too, where the kernel's are searched.
TUNED = "max-autotune-no-cudagraphs"


def peers(
    model: Model, shape: Shape, inputs: tuple[Tensor, ...], tune: bool = False
) -> dict[str, Run]:
    """The peers that can express a model's attention, by name.

    A failed compilation raises at the first call: nothing falls back to eager mode unseen.
    """
    mode = TUNED if tune else None

    def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
        made: Callable[..., Any] = torch.compile(function, dynamic=False, fullgraph=True, mode=mode)
        return made

    device = inputs[0].device.type
    inductor = compiled(function_of(model, shape))
    flex = compiled(flex_function(model, shape, device))
    flash = compiled(flex_function(model, shape, device, "FLASH"))
    fused = torch.compile(
        function_of(model, shape), backend="einfold", dynamic=False, options={"measure": "never"}
    )
    found: dict[str, Run] = {
        "backend einfold": without_gradients(fused, inputs),
        "Inductor": lambda: inductor(*inputs),
        "FlexAttention": lambda: flex(*inputs),
        "FlexAttention FLASH": lambda: flash(*inputs),
    }
    whole = model.window is None or model.window >= shape.keys
    if whole and model.softcap is None and not model.sinks:
        normed = compiled(_normed)
        for name, backend in (
            ("SDPA flash", SDPBackend.FLASH_ATTENTION),
            ("SDPA cuDNN", SDPBackend.CUDNN_ATTENTION),
        ):
            found[name] = _sdpa(model, shape, inputs, backend, normed)
    return found


def without_gradients(function: Callable[..., Any], inputs: tuple[Tensor, ...]) -> Run:
    """The call of what only infers."""

    def run() -> Any:
        with torch.no_grad():
            return function(*inputs)

    return run


def _normed(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor) -> tuple[Tensor, Tensor]:
    return norm(q, q_weight), norm(k, k_weight)


def _sdpa(
    model: Model,
    shape: Shape,
    inputs: tuple[Tensor, ...],
    backend: SDPBackend,
    normed: Callable[..., Any],
) -> Run:
    def run() -> Tensor:
        q, k, v = inputs[:3]
        if model.normed:
            q, k = normed(q, k, *inputs[-2:])
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(
                q, k, v, is_causal=not shape.decode, enable_gqa=True
            )

    return run


def flex_function(
    model: Model, shape: Shape, device: str, kernels: str = "AUTO"
) -> Callable[..., Tensor]:
    """A model's attention by FlexAttention; its mask's blocks are found here, ahead of the call.

    `kernels` are FlexAttention's own ("AUTO"), or "FLASH" for FlashAttention 4's, where that is installed.
    """
    from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

    ahead = shape.keys - shape.queries

    def score(x: Tensor, b: Tensor, h: Tensor, row: Tensor, key: Tensor) -> Tensor:
        return torch.tanh(x / model.softcap) * model.softcap if model.softcap else x

    def mask(b: Tensor, h: Tensor, row: Tensor, key: Tensor) -> Tensor:
        live = key <= row + ahead
        return live if model.window is None else live & (key > row + ahead - model.window)

    blocks = create_block_mask(mask, None, None, shape.queries, shape.keys, device=device)
    options: dict[str, Any] = {"block_mask": blocks, "enable_gqa": True}
    if kernels != "AUTO":
        options["kernel_options"] = {"BACKEND": kernels}
    if model.softcap is not None:
        options["score_mod"] = score

    def attention(q: Tensor, k: Tensor, v: Tensor, *extra: Tensor) -> Tensor:
        if model.normed:
            q, k = norm(q, extra[-2]), norm(k, extra[-1])
        if not model.sinks:
            plain: Tensor = flex_attention(q, k, v, **options)
            return plain
        out, aux = flex_attention(q, k, v, return_aux=AuxRequest(lse=True), **options)
        # A sink adds exp(sink) to the sum that weights are divided by.
        kept = torch.sigmoid(aux.lse - extra[0][None, :, None])
        made: Tensor = (out * kept[..., None]).to(v.dtype)
        return made

    return attention
