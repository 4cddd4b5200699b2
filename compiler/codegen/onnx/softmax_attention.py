"""Lowerings of attention over the keys of a call: one operator, guarded where what it hides could show.

    out = Attention(q, k, v, added)      standard, either flavour
    out = MultiHeadAttention(q, k, v)    `ort`, by tiles: rows that come before heads, and nothing is hidden

Attention adds what hides a score, and gives 0 for a row that sees nothing. So a NaN or an infinity behind a
mask reaches its row, and a row that sees nothing is not the NaN that softmax gives. Where either may be, a
sum over the result and a look at the mask decide whether it stands, and else attention is spelled out:

    If(finite(sum(out)) and every row sees a key, out, softmax(where(visible, scale q k^T + bias, hidden)) v)

A sink is one more key in one more coordinate: q has the sink's logit there, the sink's key 1, all others 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import fx

from ...ir.ops import einfold_ops
from .builder import CONTRIB, Builder
from .lowerings import Context, lowering

aten = torch.ops.aten

#: What is added where a number stands in a score's place: it leaves nothing of a score, and is above -inf.
_COVERED = -1e38
#: onnxruntime takes a row of a mask for one that sees nothing where it holds no larger number.
_LOWEST = float(np.finfo(np.float32).min)


@lowering(einfold_ops.softmax_attention.default)
def softmax_attention(context: Context, node: fx.Node) -> ir.Value:
    call = _Call(context, context.arguments(node))
    builder, out = context.builder, call.fused()
    trusted = call.trusted(out)
    if trusted is not None:
        (out,) = builder.choose(
            trusted,
            lambda: [builder.op("Identity", out)],
            lambda: [call.arranged(call.spelled_out())],
        )
    return call.by_heads(out)


@dataclass(frozen=True)
class _Call:
    """One call. Its result is [B, H, S, F], or [B, S, H * F] where queries, keys and values came so."""

    context: Context
    found: dict[str, Any]

    @property
    def builder(self) -> Builder:
        return self.context.builder

    def size(self, name: str, axis: int) -> int | None:
        return self.context.shape(self.found[name])[axis]

    @cached_property
    def flat(self) -> list[ir.Value] | None:
        """q, k and v as [B, S or T, heads * size], where each was turned from [B, S or T, heads, size]."""
        sources = [_turned(self.found[name]) for name in ("q_BHSD", "k_BKTD", "v_BKTF")]
        sizes = [self.context.shape(s)[2:] for s in sources if s is not None]
        if len(sizes) < 3 or self.found["sinks"] is not None or any(None in s for s in sizes):
            return None
        if self.found["scale"] <= 0:
            return None
        return [self.builder.reshape(self.context.value(source), [0, 0, -1]) for source in sources]

    @cached_property
    def added(self) -> ir.Value | None:
        """The mask [B or 1, H or 1, S, T]: what is added to scores."""
        builder, bias, visible = self.builder, self.found["bias"], self.found["visible"]
        if bias is None and visible is None:
            return None
        found = self.context.optional(bias)
        if visible is not None:
            cover = -math.inf if self.found["hidden"] == -math.inf else _COVERED
            shown = builder.floats(0.0) if found is None else found
            found = builder.op("Where", self.context.value(visible), shown, builder.floats(cover))
        sizes = [self.context.shape(mask)[2:] for mask in (bias, visible) if mask is not None]
        whole = [self.size("q_BHSD", 2), self.size("k_BKTD", 2)]
        if any({own[at] for own in sizes} == {1} != {whole[at]} for at in (0, 1)):
            found = builder.op("Expand", found, self._shape_of_scores())
        return found

    def _shape_of_scores(self) -> ir.Value:
        """[1, 1, S, T]."""
        builder, value = self.builder, self.context.value
        rows, keys = (builder.dim(value(self.found[x]), 2) for x in ("q_BHSD", "k_BKTD"))
        return builder.shared("Concat", builder.ints(1, 1), rows, keys, axis=0)

    def fused(self) -> ir.Value:
        """The attention as one operator."""
        heads, kv_heads = self.size("q_BHSD", 1), self.size("k_BKTD", 1)
        scale, causal = self.found["scale"], self.found["causal"]
        if self.flat is None:
            q, k, v, added, scale = self._with_sinks()
            return self.builder.op("Attention", q, k, v, added, scale=scale, is_causal=int(causal))
        if (
            self.context.flavour == "ort"
            and heads == kv_heads
            and self.added is None
            and not causal
        ):
            return self.builder.op(
                "MultiHeadAttention", *self.flat, domain=CONTRIB, num_heads=heads, scale=scale
            )
        return self.builder.op(
            "Attention",
            *self.flat,
            self.added,
            scale=scale,
            is_causal=int(causal),
            q_num_heads=heads,
            kv_num_heads=kv_heads,
        )

    def _with_sinks(self) -> tuple[ir.Value, ir.Value, ir.Value, ir.Value | None, float]:
        """(q, k, v, the mask, the scale) with each sink as a key behind the others."""
        builder, value = self.builder, self.context.value
        q, k, v = (value(self.found[name]) for name in ("q_BHSD", "k_BKTD", "v_BKTF"))
        scale, sinks = self.found["scale"], self.found["sinks"]
        if sinks is None and scale > 0:  # onnxruntime takes no other scale
            return q, k, v, self.added, scale
        q = builder.op("Mul", q, builder.floats(scale))
        if sinks is None:
            return q, k, v, self.added, 1.0
        number = int(self.context.shape(sinks)[3] or 1)
        rows = builder.op("Shape", q, end=3)
        logits = builder.op(
            "Expand", value(sinks), builder.op("Concat", rows, builder.ints(number), axis=0)
        )
        q = builder.op("Concat", q, logits, axis=3)
        width = int(self.size("k_BKTD", 3) or 0)
        keys = np.eye(number, width + number, width, dtype=np.float32)
        heads = builder.op("Shape", k, end=2)
        shape = builder.op("Concat", heads, builder.ints(number, width + number), axis=0)
        k = builder.op("Pad", k, builder.ints(0, 0, 0, 0, 0, 0, 0, number))
        k = builder.op(
            "Concat", k, builder.op("Expand", builder.constant(keys, np.float32), shape), axis=2
        )
        v = builder.op("Pad", v, builder.ints(0, 0, 0, 0, 0, 0, number, 0))
        added = self.added
        if added is not None:
            added = builder.op("Pad", added, builder.ints(0, 0, 0, 0, 0, 0, 0, number))
        return q, k, v, added, 1.0

    def trusted(self, out: ir.Value) -> ir.Value | None:
        """Whether the operator's result is what the attention spelled out gives; None where it always is."""
        builder, tests = self.builder, []
        hides = self.found["visible"] is not None or self.found["causal"]
        if hides or self.found["sinks"] is not None:
            total = builder.op("Abs", builder.op("ReduceSum", out, keepdims=0))
            tests.append(builder.op("Less", total, builder.floats(math.inf)))
        # Without a bias, rows that see nothing are covered by a number, or wanted as zeros.
        known = self.found["hidden"] > -math.inf or self.found["zero_blind"]
        sighted = self.found["sinks"] is not None or (self.found["bias"] is None and known)
        if self.added is not None and not sighted:
            best = builder.shared("ReduceMax", self.added, builder.ints(-1), keepdims=0)
            worst = builder.shared("ReduceMin", best, keepdims=0)
            tests.append(builder.shared("Greater", worst, builder.floats(_LOWEST)))
        if len(tests) == 2:
            return builder.op("And", *tests)
        return tests[0] if tests else None

    def spelled_out(self) -> ir.Value:
        """The attention in elementary operators, which hide by choosing: [B, H, S, F]."""
        builder, found = self.builder, self.found
        query = builder.op("Mul", self._heads("q_BHSD"), builder.floats(found["scale"]))
        keys, values = self._for_all_heads("k_BKTD"), self._for_all_heads("v_BKTF")
        scores = builder.op("MatMul", query, builder.transpose(keys, 0, 1, 3, 2))
        if found["bias"] is not None:
            scores = builder.op("Add", scores, self.context.value(found["bias"]))
        if found["visible"] is not None:
            hidden = builder.floats(found["hidden"])
            scores = builder.op("Where", self.context.value(found["visible"]), scores, hidden)
        if found["causal"]:
            ones = ir.tensor(np.ones(1, np.int32))
            shape = builder.op("Shape", scores, start=-2)
            seen = builder.op("Trilu", builder.op("ConstantOfShape", shape, value=ones), upper=0)
            seen = builder.cast(seen, torch.bool)
            scores = builder.op("Where", seen, scores, builder.floats(-math.inf))
        if found["sinks"] is not None:
            number = int(self.context.shape(found["sinks"])[3] or 1)
            rows = builder.op("Shape", scores, end=3)
            shape = builder.op("Concat", rows, builder.ints(number), axis=0)
            sinks = builder.op("Expand", self.context.value(found["sinks"]), shape)
            scores = builder.op("Concat", scores, sinks, axis=3)
            values = builder.op("Pad", values, builder.ints(0, 0, 0, 0, 0, 0, number, 0))
        out = builder.op("MatMul", builder.op("Softmax", scores, axis=-1), values)
        if not found["zero_blind"]:
            return out
        best = builder.op("ReduceMax", scores, builder.ints(-1), keepdims=1)
        blind = builder.op("Equal", best, builder.floats(-math.inf))
        return builder.op("Where", blind, builder.floats(0.0), out)

    def _heads(self, name: str) -> ir.Value:
        """q, k or v by heads, turned here where it came flat: a branch that is not taken turns nothing."""
        source = _turned(self.found[name]) if self.flat is not None else None
        if source is None:
            return self.context.value(self.found[name])
        return self.builder.transpose(self.context.value(source), 0, 2, 1, 3)

    def _for_all_heads(self, name: str) -> ir.Value:
        """Keys or values with a head for each that reads them."""
        builder, own = self.builder, self._heads(name)
        heads, kv_heads, size = self.size("q_BHSD", 1), self.size(name, 1), self.size(name, 3)
        if heads is None or kv_heads is None or heads == kv_heads:
            return own
        own = builder.op("Unsqueeze", own, builder.ints(2))
        own = builder.op("Expand", own, builder.ints(1, 1, heads // kv_heads, 1, 1))
        return builder.reshape(own, [0, heads, -1, int(size or -1)])

    def arranged(self, out: ir.Value) -> ir.Value:
        """[B, H, S, F] as the operator gives it."""
        if self.flat is None:
            return out
        return self.builder.reshape(self.builder.transpose(out, 0, 2, 1, 3), [0, 0, -1])

    def by_heads(self, out: ir.Value) -> ir.Value:
        """What the operator gives as [B, H, S, F]."""
        if self.flat is None:
            return out
        heads = int(self.size("q_BHSD", 1) or 0)
        out = self.builder.reshape(out, [0, 0, heads, -1])
        return self.builder.transpose(out, 0, 2, 1, 3)


def _turned(node: fx.Node) -> fx.Node | None:
    """x [B, S, H, D] of x turned to [B, H, S, D]; None for what is no such turn."""
    arguments = tuple(node.args[1:])
    if node.target is aten.permute.default and arguments == ([0, 2, 1, 3],):
        return node.args[0]  # type: ignore[return-value]
    if node.target is aten.transpose.int and arguments in ((1, 2), (2, 1)):
        return node.args[0]  # type: ignore[return-value]
    return None
