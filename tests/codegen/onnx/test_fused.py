"""Attention that modules spell out, exported: every form of the catalogue, fused or left with a reason.

What was fused computes what the module does: for one query and an odd number of keys, at other sizes, in rows
that see nothing, and with NaN and infinities behind masks.
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Callable
from importlib import util
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional

import einfold
from einfold.compiler.codegen.cpu.heads import query_of
from einfold.compiler.codegen.onnx import fused
from einfold.compiler.codegen.onnx.lowerings import Context
from einfold.compiler.codegen.onnx.target import Onnx
from einfold.compiler.frontend.modules import capture_module
from einfold.compiler.ir.ops.softmax_attention import SoftmaxAttention
from einfold.compiler.passes.base import Note
from einfold.compiler.passes.fusion.fuse_attention import FuseAttention
from einfold.compiler.pipeline import PassManager, module_passes
from einfold.errors import EinfoldError

from ...cascade.conftest import DOCS
from ...programs import calls, program, run
from ...quick import quick


def catalogue_of(**sizes: int) -> Any:
    """The catalogue of `docs/attention_forms.py` at other sizes, apart from the one that other tests read."""
    name = "attention_forms_at_other_sizes"
    spec = util.spec_from_file_location(name, DOCS / "attention_forms.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    vars(module).update(sizes)
    return module


B, H, K, S, T, D = 2, 4, 2, 1, 13, 6
CATALOGUE = catalogue_of(B=B, H=H, K=K, S=S, T=T, D=D)
FORMS: dict[str, Any] = {form.name: form for form in CATALOGUE.FORMS}
FLAVOURS = pytest.mark.parametrize("portable", [False, True], ids=["ort", "portable"])

AS_FAST = "as fast as one operator"
OF_HEADS = "adds a bias for each head as fast"
NO_EXPONENTIALS = "nothing is weighted by exponentials"

#: Why a form stays as it is written, in both flavours. Where nothing feeds a product, there is no region.
LEFT = {
    "softmax without a maximum": "no weights are exponentials less their maximum",
    "mask after the exponential": "the outputs depend on amax",
    "sigmoid attention": "",
    "ReLU attention": "",
    "linear attention": "",
    "linear attention, causal": NO_EXPONENTIALS,
    "differential attention": "several softmaxes meet in one product",
    "MLA, latent form": "for few rows two products are faster",
    "log-sum-exp as an output": "the outputs depend on softmax",
    "mean and variance under the attention": "the outputs depend on matmul",
    "entropy of the attention": "the outputs depend on",
    "entropy by p log p": "the outputs depend on",
    "talking heads": "for several ranks of the values",
    "cross-entropy, smoothed, with z-loss": "",
    "LayerNorm into a matrix product": "",
    "RMSNorm into a matrix product": "",
    "probabilities as an output": "an output carries the keys",
    "weights rounded by their final scale": "round",
    "threshold on the final maximum": "amax",
    "sigmoid of the maximum under exp": "sigmoid",
    "ReLU of scores less their maximum": NO_EXPONENTIALS,
}

#: Why a form stays as it is written for onnxruntime.
LEFT_FOR_ORT = {
    "softmax": AS_FAST,
    "softmax in float32, weights narrowed": AS_FAST,
    "self-attention of one tensor": AS_FAST,
    "with projections": AS_FAST,
    "scale by division": AS_FAST,
    "cosine attention": AS_FAST,
    "RMS-normed queries and keys": AS_FAST,
    "K/V dequantized, per token": AS_FAST,
    "K/V dequantized, per channel": AS_FAST,
    "a second hop over the same keys": AS_FAST,
    "relative bias": OF_HEADS,
    "Evoformer: pair bias and gating": OF_HEADS,
}


def inputs_of(form: Any) -> tuple[Tensor, ...]:
    found: tuple[Tensor, ...] = CATALOGUE.in_float32(form.inputs())
    return found


def export(
    function: Callable[..., Any],
    inputs: tuple[Tensor, ...],
    out: Path,
    portable: bool,
    **options: Any,
) -> Path:
    return einfold.export_onnx(
        CATALOGUE.AsModule(function), out / "a", inputs, portable=portable, **options
    )


def operators(path: Path) -> Counter[str]:
    """How often each operator stands in a model, branches left out."""
    model = onnx.load(path, load_external_data=False)
    return Counter(node.op_type for node in model.graph.node)


def outputs(path: Path, inputs: tuple[Tensor, ...]) -> list[Any]:
    session = onnxruntime.InferenceSession(str(path))
    feeds = {node.name: int(node.name.rpartition("_")[2]) for node in session.get_inputs()}
    found: list[Any] = session.run(None, {n: inputs[at].numpy() for n, at in feeds.items()})
    return found


def compare(path: Path, function: Callable[..., Any], inputs: tuple[Tensor, ...]) -> None:
    """Within 1e-5 of the largest number, NaN and infinities in the same places."""
    wanted = function(*inputs)
    for got, want in zip(
        outputs(path, inputs), wanted if isinstance(wanted, tuple) else (wanted,), strict=True
    ):
        finite = want[want.isfinite()]
        scale = max(1.0, float(finite.abs().max())) if finite.numel() else 1.0
        np.testing.assert_allclose(got, want.numpy(), rtol=0, atol=1e-5 * scale)


def notes_of(
    function: Callable[..., Any], inputs: tuple[Tensor, ...], portable: bool, sizes: Any = None
) -> list[Note]:
    """What the pass did to a function's regions and what it left, with the reasons."""
    captured = capture_module(CATALOGUE.AsModule(function), inputs, sizes)
    target = Onnx(portable=portable)
    records = PassManager(module_passes("onnx", target.attention())).run(captured.program)
    return next(record.notes for record in records if record.name == "fuse_attention")


@FLAVOURS
@pytest.mark.parametrize("name", FORMS)
def test_every_form_is_fused_or_left_with_its_reason(
    name: str, portable: bool, tmp_path: Path
) -> None:
    form = FORMS[name]
    inputs = inputs_of(form)
    notes = notes_of(form.function, inputs, portable)
    reason = LEFT.get(name, None if portable else LEFT_FOR_ORT.get(name))
    if reason is not None:
        assert {note.action for note in notes} <= {"skipped"}
        assert reason in "; ".join(note.what for note in notes)
        assert bool(notes) == bool(reason)
        return
    assert {note.action for note in notes} == {"applied"}
    path = export(form.function, inputs, tmp_path, portable)
    spelled = "Softmax" if name == "softcap" else "Attention"
    assert operators(path)[spelled] == len(notes)
    compare(path, form.function, inputs)


@FLAVOURS
def test_products_that_are_added(portable: bool, tmp_path: Path) -> None:
    """Queries and keys of both side by side, each with its factor, where rows are many."""

    def added_products(
        q: Tensor, k: Tensor, v: Tensor, q_more: Tensor, k_more: Tensor, mask: Tensor
    ) -> Tensor:
        scores = q @ k.mT / 3 + 0.7 * (q_more @ k_more.mT)
        return torch.softmax((scores * 0.5).masked_fill(~mask, -math.inf), dim=-1) @ v

    rows = 40
    q, k, v = torch.randn(B, H, rows, D), torch.randn(B, H, T, D), torch.randn(B, H, T, D)
    more = torch.randn(B, H, rows, 3), torch.randn(B, 1, T, 3)
    inputs = (q, k, v, *more, torch.rand(B, 1, rows, T) < 0.7)
    path = export(added_products, inputs, tmp_path / "a", portable)
    assert operators(path)["Attention"] == 1
    compare(path, added_products, inputs)
    latent = CATALOGUE.latent
    q, q_rope, c, k_rope, w_uk, w_uv = inputs_of(FORMS["MLA, latent form"])
    inputs = (q.expand(-1, -1, rows, -1), q_rope.expand(-1, -1, rows, -1), c, k_rope, w_uk, w_uv)
    path = export(latent, inputs, tmp_path / "b", portable)
    assert operators(path)["Attention"] == 1
    compare(path, latent, inputs)


def masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return torch.softmax((q @ k.mT / 8).masked_fill(~mask, -math.inf), dim=-1) @ v


def covered(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return torch.softmax((q @ k.mT / 8).masked_fill(~mask, -1e30), dim=-1) @ v


def covered_by_less(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return torch.softmax(torch.where(mask, q @ k.mT / 8, -1e9), dim=-1) @ v


def added(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    bias = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, -math.inf)
    return torch.softmax(q @ k.mT / 8 + bias, dim=-1) @ v


def added_lowest(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    bias = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, torch.finfo(q.dtype).min)
    return torch.softmax(q @ k.mT / 8 + bias, dim=-1) @ v


def zeroed(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return functional.scaled_dot_product_attention(q, k, v, mask)


def with_a_sink(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = (q @ k.mT / 8).masked_fill(~mask, -math.inf)
    sink = torch.arange(H).reshape(H, 1, 1).expand(*q.shape[:3], 1) / 2.0
    return torch.softmax(torch.cat([scores, sink], -1), dim=-1)[..., :-1] @ v


def biased(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    place = torch.arange(k.shape[2])
    bias = torch.arange(H)[:, None, None] * (place / 8.0)
    return torch.softmax(torch.where(mask, q @ k.mT / 8 + bias, -math.inf), dim=-1) @ v


MASKED = [masked, covered, covered_by_less, added, added_lowest, zeroed, with_a_sink, biased]
SHAPES = [(B, 1, 3, T), (B, 1, 1, T), (1, H, 3, T), (3, T), (3, 1)]


@pytest.mark.parametrize(
    ("function", "portable"),
    quick(
        [(function, portable) for function in MASKED for portable in (False, True)],
        *((function, False) for function in MASKED),
        (masked, True),
    ),
)
def test_masks(function: Callable[..., Any], portable: bool, tmp_path: Path) -> None:
    """Masks that broadcast, with rows that see nothing, and what stands behind them: as the module has it."""
    q, k, v = torch.randn(B, H, 3, D), torch.randn(B, H, T, D), torch.randn(B, H, T, D)
    for number, shape in enumerate(SHAPES):
        mask = torch.rand(shape) < 0.7
        mask[..., :1] = True
        folder = tmp_path / str(number)
        path = export(function, (q, k, v, mask), folder, portable)
        of_heads = shape[1:2] == (H,) and function in (added, added_lowest)
        assert operators(path)["Attention"] == (portable or not of_heads)
        compare(path, function, (q, k, v, mask))
        blind = mask.clone()
        blind.view(-1, shape[-1])[-1] = False
        compare(path, function, (q, k, v, blind))
        compare(path, function, (q, k, v, torch.zeros_like(mask)))
        if shape[-1] > 1 and function is not zeroed:  # torch's own kernel adds its mask
            mask[..., -1:] = False
            # Beside an addition it shows that queries are scaled ahead of the product, which then fits.
            largest = () if function in (added, added_lowest) else (3e38,)
            for value in (math.nan, math.inf, -math.inf, *largest):
                for hidden in (k, v):
                    changed = hidden.clone()
                    changed[:, :, -1] = value
                    inputs = (q, changed, v) if hidden is k else (q, k, changed)
                    compare(path, function, (*inputs, mask))


class Block(nn.Module):
    """Self-attention with projections, grouped heads and a causal mask, as models have it."""

    def __init__(self, kv_heads: int = H, masked: bool = False) -> None:
        super().__init__()
        self.kv_heads, self.masked = kv_heads, masked
        self.q, self.o = nn.Linear(32, H * 8), nn.Linear(H * 8, 32)
        self.k, self.v = nn.Linear(32, kv_heads * 8), nn.Linear(32, kv_heads * 8)

    def forward(self, x: Tensor) -> Tensor:
        batch, rows = x.shape[:2]
        q = self.q(x).view(batch, rows, H, 8).transpose(1, 2)
        k = self.k(x).view(batch, rows, self.kv_heads, 8).transpose(1, 2)
        v = self.v(x).view(batch, rows, self.kv_heads, 8).transpose(1, 2)
        if self.kv_heads != H:
            k, v = (y.repeat_interleave(H // self.kv_heads, 1) for y in (k, v))
        scores = q @ k.mT / math.sqrt(8)
        if self.masked:
            place = torch.arange(rows)
            scores = torch.where(place <= place[:, None], scores, -math.inf)
        out: Tensor = self.o((scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, rows, H * 8))
        return out


class Scaled(Block):
    """Rows whose scores are scaled by their place."""

    def forward(self, x: Tensor) -> Tensor:
        batch, rows = x.shape[:2]
        q, k, v = (y(x).view(batch, rows, H, 8).transpose(1, 2) for y in (self.q, self.k, self.v))
        scores = q @ k.mT * torch.log(torch.arange(rows) + 2.0)[:, None]
        return (scores.softmax(-1) @ v).transpose(1, 2)


def test_a_scale_by_place(tmp_path: Path) -> None:
    """It goes into the queries, which are then not as they came."""
    shapes = ({0: Dim("batch"), 1: Dim("rows")},)
    x = torch.randn(2, 7, 32)
    path = einfold.export_onnx(Scaled().eval(), tmp_path / "a", (x,), dynamic_shapes=shapes)
    assert operators(path)["Attention"] == 1


@FLAVOURS
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "causal"])
@pytest.mark.parametrize("kv_heads", [H, K])
def test_modules_of_any_size(kv_heads: int, masked: bool, portable: bool, tmp_path: Path) -> None:
    """Heads behind rows are taken as they come, nothing is turned; the check compares a second size."""
    module = Block(kv_heads, masked).eval()
    shapes = ({0: Dim("batch"), 1: Dim("rows")},)
    path = einfold.export_onnx(
        module, tmp_path / "a", (torch.randn(2, 7, 32),), dynamic_shapes=shapes, portable=portable
    )
    tiled = not portable and not masked and kv_heads == H
    found = operators(path)
    if masked:  # one for few rows or blocks of them, and one on whether that stands
        assert found["If"] == 2
    else:
        assert found["MultiHeadAttention" if tiled else "Attention"] == 1
    assert not found["Softmax"]
    for size in ((1, 1, 32), (3, 29, 32)):
        x = torch.randn(size)
        with torch.no_grad():
            (got,) = onnxruntime.InferenceSession(str(path)).run(None, {"x": x.numpy()})
            np.testing.assert_allclose(got, module(x).numpy(), atol=1e-5)


def test_rows_and_keys_of_any_number(tmp_path: Path) -> None:
    """Queries and keys of their own sizes, with a mask that broadcasts over rows."""
    batch, rows, keys = Dim("batch"), Dim("rows"), Dim("keys")
    shapes = (({0: batch, 2: rows}, {0: batch, 2: keys}, {0: batch, 2: keys}, {0: batch, 3: keys}),)
    mask = torch.ones(B, 1, 1, T, dtype=torch.bool)
    inputs = torch.randn(B, H, 3, D), torch.randn(B, H, T, D), torch.randn(B, H, T, D), mask
    path = export(masked, inputs, tmp_path, False, dynamic_shapes=shapes)
    assert operators(path)["Attention"] == 1
    mask = torch.rand(3, 1, 1, 5) < 0.5
    compare(path, masked, (torch.randn(3, H, 1, D), *torch.randn(2, 3, H, 5, D), mask))


def test_a_wrong_lowering_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another scale in what would stand in the graph."""
    monkeypatch.setattr(fused, "query_of", lambda *a: (query_of(*a)[0], 0.5))
    inputs = torch.randn(B, H, 3, D), torch.randn(B, H, T, D), torch.randn(B, H, T, D)
    (note,) = notes_of(masked, (*inputs, torch.ones(3, T, dtype=torch.bool)), False)
    assert note.action == "skipped"
    assert note.what == "it does not agree with the region on random tensors"


def test_a_wrong_model_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another scale in what is written: the export's own check finds it."""
    given = Context.arguments
    monkeypatch.setattr(Context, "arguments", lambda *a: given(*a) | {"scale": 0.5})
    inputs = torch.randn(B, H, 3, D), torch.randn(B, H, T, D), torch.randn(B, H, T, D)
    mask = torch.ones(3, T, dtype=torch.bool)
    with pytest.raises(EinfoldError, match="the exported model differs from what is right"):
        export(masked, (*inputs, mask), tmp_path, False)
    assert not list(tmp_path.iterdir())


SPELLED = """
    input %q "q" : f32[B, 4, S, 8]
    input %k "k" : f32[B, 4, N, 8]
    input %v "v" : f32[B, 4, N, 8]
    input %mask "mask" : bool[S, N]
    call %kt = aten.transpose.int(%k, -2, -1) : f32[B, 4, 8, N]
    call %s = aten.matmul.default(%q, %kt) : f32[B, 4, S, N]
    call %d = aten.div.Tensor(%s, 2.0) : f32[B, 4, S, N]
    call %n = aten.bitwise_not.default(%mask) : bool[S, N]
    call %m = aten.masked_fill.Scalar(%d, %n, -inf) : f32[B, 4, S, N]
    call %p = aten.softmax.int(%m, -1) : f32[B, 4, S, N]
    call %o = aten.matmul.default(%p, %v) : f32[B, 4, S, 8]
    output "o" = %o
"""


def test_text_in_text_out() -> None:
    found = program(SPELLED)
    given = {name: torch.randn(2, 4, size, 8) for name, size in (("q", 3), ("k", 5), ("v", 5))}
    given["mask"] = torch.rand(3, 5) < 0.5
    want = run(found, **given)
    result = FuseAttention("onnx", Onnx().attention()).run(found)
    assert calls(found) == [
        "aten.unsqueeze.default(%mask, 0)",
        "aten.unsqueeze.default(%1, 1)",
        "einfold.softmax_attention(%q, %k, %v, none, %2, none, 0.5, -inf)",
    ]
    torch.testing.assert_close(run(found, **given), want, equal_nan=True)
    (note,) = result.notes
    assert note == Note("applied", "o", "3 -> 1 passes over the keys, attention of the target onnx")


def test_what_the_target_does_not_take_stays() -> None:
    text = SPELLED.replace("aten.div.Tensor(%s, 2.0)", "aten.tanh.default(%s)")
    for make, reason in (
        (Onnx().attention(), "scores go through tanh, which takes onnxruntime's attention three"),
        (None, "the target onnx has no operator for attention"),
    ):
        found = program(text)
        before = calls(found)
        result = FuseAttention("onnx", make).run(found)
        assert not result.changed and calls(found) == before
        assert reason in result.notes[0].what


def test_the_operator_refuses_what_does_not_fit() -> None:
    q, k = torch.randn(1, 4, 3, 8), torch.randn(1, 3, 5, 8)
    with pytest.raises(ValueError, match="4 heads of queries over 3 of keys"):
        SoftmaxAttention(q, k, k, None, None, None, 1.0, -math.inf).shapes()
    with pytest.raises(ValueError, match="have four axes"):
        SoftmaxAttention(q, q, q, torch.zeros(3, 3), None, None, 1.0, -math.inf).shapes()


def test_a_sink_wants_a_head_size_that_is_known(tmp_path: Path) -> None:
    form = FORMS["softmax plus one"]
    inputs = inputs_of(form)
    sizes = (tuple(dict.fromkeys(range(4), Dim.AUTO) for _ in inputs),)
    (note,) = notes_of(form.function, inputs, False, sizes)
    assert note.what == "a sink beside heads whose size is known only at run time"
