"""torch's scaled_dot_product_attention in ONNX: ranks, broadcasting, groups, rows that see nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional

import einfold

from ...quick import rarely

B, H, S, T, D = 2, 4, 5, 9, 8


def r(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def seen(*shape: int) -> Tensor:
    """A mask of truth values; the first row of it sees nothing."""
    mask = r(*shape) > -0.3
    mask.view(-1, shape[-1])[0] = False
    return mask


class Attention(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        return functional.scaled_dot_product_attention(q, k, v, mask, **self.options)


FOUR = r(B, H, S, D), r(B, H, T, D), r(B, H, T, 6)
CASES: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "plain": (FOUR, {}),
    "scale": (FOUR, {"scale": 0.3}),
    "scale of 0": (FOUR, {"scale": 0.0}),
    "negative scale": (FOUR, {"scale": -0.5}),
    "causal, more keys": (FOUR, {"is_causal": True}),
    "causal, more queries": ((r(B, H, T, D), r(B, H, S, D), r(B, H, S, D)), {"is_causal": True}),
    "two axes": ((r(S, D), r(T, D), r(T, D)), {}),
    "three axes": ((r(H, S, D), r(H, T, D), r(H, T, D)), {}),
    "three axes, mask": ((r(H, S, D), r(H, T, D), r(H, T, D), seen(H, S, T)), {}),
    "five axes": ((r(3, B, H, S, D), r(3, B, H, T, D), r(3, B, H, T, D), seen(S, T)), {}),
    "groups": ((r(B, H, S, D), r(B, 2, T, D), r(B, 2, T, 6)), {"enable_gqa": True}),
    "groups of three axes": ((r(H, S, D), r(2, T, D), r(2, T, D)), {"enable_gqa": True}),
    "groups, mask": (
        (r(B, H, S, D), r(B, 1, T, D), r(B, 1, T, D), seen(B, 1, 1, T)),
        {"enable_gqa": True},
    ),
    "groups, causal": (
        (r(B, H, S, D), r(B, 2, S, D), r(B, 2, S, D)),
        {"enable_gqa": True, "is_causal": True},
    ),
    "one row of keys for all": ((r(B, H, S, D), r(1, H, T, D), r(1, H, T, D)), {}),
    "one head of keys for all": ((r(B, H, S, D), r(B, 1, T, D), r(B, 1, T, D), seen(S, T)), {}),
    "in double precision": (tuple(x.double() for x in FOUR), {}),
    **{
        f"mask {list(mask.shape)} {kind}": ((*FOUR, mask), {})
        for shape in (
            (S, T),
            (1, T),
            (S, 1),
            (B, 1, S, T),
            (B, 1, 1, T),
            (1, H, S, T),
            (B, H, 1, T),
        )
        for kind, mask in (("added", r(*shape)), ("of truth values", seen(*shape)))
    },
    "mask with -inf, a blind row": (
        (*FOUR, torch.zeros(S, T).masked_fill(~seen(S, T), -torch.inf)),
        {},
    ),
    "mask of the lowest number": (
        (*FOUR, torch.zeros(S, T).masked_fill(~seen(S, T), torch.finfo(torch.float32).min)),
        {},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_against_torch(case: str, tmp_path: Path) -> None:
    arguments, options = CASES[case]
    module = Attention(**options)
    path = einfold.export_onnx(module, tmp_path / "a", arguments)
    session = onnxruntime.InferenceSession(str(path))
    names = [node.name for node in session.get_inputs()]
    feeds = {name: x.numpy() for name, x in zip(names, arguments, strict=True)}
    expected = module(*arguments)
    assert expected.isfinite().all()
    np.testing.assert_allclose(session.run(None, feeds)[0], expected.numpy(), atol=2e-6)


def test_what_a_mask_hides_does_not_matter(tmp_path: Path) -> None:
    """NaN, infinity and overflow in keys of slots that no truth value shows."""
    q, k, v = r(B, H, S, D), r(B, H, T, D), r(B, H, T, D)
    mask = (torch.arange(T) < 6).expand(1, 1, 1, T)
    path = einfold.export_onnx(Attention(), tmp_path / "a", (q, k, v, mask))
    session = onnxruntime.InferenceSession(str(path))
    expected = functional.scaled_dot_product_attention(q, k, v, mask).numpy()
    for number in (torch.nan, torch.inf, -torch.inf, 3e38):
        hidden = k.clone()
        hidden[:, :, 6:] = number
        feeds = dict(zip("qkv", (q.numpy(), hidden.numpy(), v.numpy()), strict=True))
        found = session.run(None, feeds | {"mask": mask.numpy()})[0]
        np.testing.assert_allclose(found, expected, atol=2e-6)


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        out: Tensor = self.encoder(x, src_key_padding_mask=padding)
        return out


class Heads(nn.Module):
    def __init__(self, weights: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.weights = weights

    def forward(self, x: Tensor, padding: Tensor) -> Any:
        return self.attention(x, x, x, key_padding_mask=padding, need_weights=self.weights)


@pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11),
    reason="torch 2.10 traces these at fixed sizes alone: it does not see that min(S, 2 S) is S",
)
@pytest.mark.parametrize(
    ("module", "portable"),
    [
        (Encoder(), False),
        rarely(Encoder(), True),
        rarely(Heads(False), False),
        (Heads(False), True),
        rarely(Heads(True), False),
        rarely(Heads(True), True),
    ],
)
def test_padding_of_torch_s_own_layers(module: nn.Module, portable: bool, tmp_path: Path) -> None:
    """At other sizes too, which the export's own check compares."""
    padding = torch.tensor([[False] * 5 + [True] * 4, [False] * 9])
    axes = {0: Dim("B"), 1: Dim("S")}
    einfold.export_onnx(
        module,
        tmp_path / "a",
        (r(2, 9, 16), padding),
        dynamic_shapes=(axes, axes),
        portable=portable,
    )
