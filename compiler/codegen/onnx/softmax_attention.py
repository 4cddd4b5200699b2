"""Lowerings of attention over the keys of a call: one operator, guarded where what it hides could show.

    out = Attention(q, k, v, added)      standard, either flavour
    out = MultiHeadAttention(q, k, v)    `ort`, by tiles: rows that come before heads, and nothing is hidden

Attention adds what hides a score, and gives 0 for a row that sees nothing. So a NaN or an infinity behind a
mask reaches its row, and a row that sees nothing is not the NaN that softmax gives. Where either may be, a
sum over the result and a look at the mask decide whether it stands, and else attention is spelled out:

    If(finite(sum(out)) and every row sees a key, out, softmax(where(visible, scale q k^T + bias, hidden)) v)

Where a mask keeps keys from whole blocks of rows (causal ones, windows), each block of rows is one such
operator over the keys that it may see (`row_blocks.py`), and attention with a softcap is spelled out so.

A sink is one more key in one more coordinate: q has the sink's logit there, the sink's key 1, all others 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, reduce
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import fx

from ...ir.ops import einfold_ops
from .builder import CONTRIB, Builder
from .lowerings import Context, lowering
from .row_blocks import FEWEST, Block, of_known, of_varying

aten = torch.ops.aten

#: What is added where a number stands in a score's place: it leaves nothing of a score, and is above -inf.
_COVERED = -1e38
#: onnxruntime takes a row of a mask for one that sees nothing where it holds no larger number.
_LOWEST = float(np.finfo(np.float32).min)


@lowering(einfold_ops.softmax_attention.default)
def softmax_attention(context: Context, node: fx.Node) -> ir.Value:
    call = _Call(context, context.arguments(node))
    builder = context.builder
    if call.found["softcap"]:
        return call.capped()
    out = call.each_block(call.fused, 1 if call.flat is not None else 2)
    finite, sighted, seen = call.trusted(out)
    tests = [test for test in (finite, sighted) if test is not None]
    if tests:

        def spelled_out() -> list[ir.Value]:
            return [call.arranged(call.spelled_out())]

        def looked_at() -> list[ir.Value]:
            """Zeros in a row may be values that are zeros."""
            assert seen is not None
            known = [test for test in (finite, seen()) if test is not None]
            return builder.choose(reduce(builder.both, known), kept, spelled_out)

        def kept() -> list[ir.Value]:
            return [builder.op("Identity", out)]

        other = spelled_out if seen is None else looked_at
        (out,) = builder.choose(reduce(builder.both, tests), kept, other)
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

    def each_block(self, attend: Callable[[Block | None], ir.Value], axis: int) -> ir.Value:
        """What `attend` gives for each block of rows, joined along their axis; or for all at once."""
        builder, rows, keys = self.builder, self.size("q_BHSD", 2), self.size("k_BKTD", 2)
        behind, ahead = self.found["behind"], self.found["ahead"]
        ahead = 0 if self.found["causal"] else ahead
        # A row's own key is in its block, seen or not.
        behind, ahead = (None if far is None else max(far, 0) for far in (behind, ahead))

        def joined(blocks: list[Block]) -> ir.Value:
            return builder.op("Concat", *(attend(block) for block in blocks), axis=axis)

        if (ahead is None and behind is None) or self.found["sinks"] is not None:
            return attend(None)
        if rows is not None and keys is not None:
            blocks = of_known(builder, rows, keys, behind, ahead)
            return joined(blocks) if blocks else attend(None)
        if not self._is_square:
            return attend(None)
        _ = self.flat, self.added  # what both branches read is made ahead of them
        count = builder.dim(self.context.value(self.found["q_BHSD"]), 2)
        few = builder.op("Less", builder.op("Squeeze", count), builder.constant(FEWEST, np.int64))
        (out,) = builder.choose(
            few,
            lambda: [builder.op("Identity", attend(None))],
            lambda: [joined(of_varying(builder, count, behind, ahead))],
        )
        return out

    @property
    def _is_square(self) -> bool:
        """Whether there are as many rows as keys, whatever their number."""
        rows, keys = (self.found[name].meta["val"].shape[2] for name in ("q_BHSD", "k_BKTD"))
        return str(rows) == str(keys)

    def fused(self, block: Block | None = None) -> ir.Value:
        """The attention as one operator, of all rows or of a block."""
        heads, kv_heads = self.size("q_BHSD", 1), self.size("k_BKTD", 1)
        flat, causal = self.flat, self.found["causal"]
        added, scale = self.added, self.found["scale"]
        if flat is None:
            q, k, v, added, scale = self._with_sinks()
        else:
            q, k, v = flat
        if block is not None:
            axis = 2 if flat is None else 1
            q, k, v = block.rows(q, axis), block.keys(k, axis), block.keys(v, axis)
            if added is not None:
                added = block.keys(block.rows(added, 2), 3)
            causal = causal and block.first == 0
            if self.found["causal"] and not causal:
                later = block.later(-math.inf)
                added = later if added is None else self.builder.op("Add", added, later)
        if flat is None:
            return self.builder.op("Attention", q, k, v, added, scale=scale, is_causal=int(causal))
        tiles = self.context.flavour == "ort" and heads == kv_heads
        if tiles and added is None and not causal:
            return self.builder.op(
                "MultiHeadAttention", q, k, v, domain=CONTRIB, num_heads=heads, scale=scale
            )
        return self.builder.op(
            "Attention",
            *(q, k, v, added),
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

    def capped(self) -> ir.Value:
        """The attention of blocks, spelled out; of all rows at once where NaN is among the values."""
        builder = self.builder
        made: list[Block | None] = []

        def spelled_out(block: Block | None) -> ir.Value:
            made.append(block)
            return self.spelled_out(block)

        out = self.each_block(spelled_out, 2)
        if made == [None]:
            return out
        (out,) = builder.choose(
            self._is_finite(out),
            lambda: [builder.op("Identity", out)],
            lambda: [builder.op("Identity", self.spelled_out())],
        )
        return out

    def _is_finite(self, out: ir.Value) -> ir.Value:
        total = self.builder.op("Abs", self.builder.op("ReduceSum", out, keepdims=0))
        return self.builder.op("Less", total, self.builder.floats(math.inf))

    def trusted(
        self, out: ir.Value
    ) -> tuple[ir.Value | None, ir.Value | None, Callable[[], ir.Value] | None]:
        """What the operator's result has to be to stand: finite, and of rows that see something.

        None for what always is. Where the second test may fail for rows that do see something, because their
        values are zeros, the third makes one of the mask itself.
        """
        builder, found = self.builder, self.found
        finite = None
        if found["visible"] is not None or found["causal"] or found["sinks"] is not None:
            finite = self._is_finite(out)
        # Without a bias, rows that see nothing are covered by a number, or wanted as zeros.
        covered = found["bias"] is None and found["hidden"] > -math.inf
        fewer = found["behind"] is not None or found["ahead"] is not None
        known = found["bias"] is None and (covered or found["zero_blind"])
        if covered and fewer:  # what they are a mean of is then not all there
            known = False
        if self.added is None or found["sinks"] is not None or known:
            return finite, None, None
        least = _COVERED / 2 if covered else _LOWEST

        def seen() -> ir.Value:
            best = builder.op("ReduceMax", self.added, builder.ints(-1), keepdims=0)
            worst = builder.op("ReduceMin", best, keepdims=0)
            return builder.op("Greater", worst, builder.floats(least))

        masks = [found[name] for name in ("bias", "visible") if found[name] is not None]
        if covered or all(self.context.shape(mask)[1] == 1 for mask in masks):
            return finite, seen(), None
        # A mask of each head's own is as large as the scores; such rows of the result are zeros.
        rows = out if self.flat is None else self._rows(out)
        sums = builder.op("ReduceL1", rows, builder.ints(-1), keepdims=0)
        least_sum = builder.op("ReduceMin", sums, keepdims=0)
        return finite, builder.op("Greater", least_sum, builder.floats(0.0)), seen

    def spelled_out(self, block: Block | None = None) -> ir.Value:
        """The attention in elementary operators, which hide by choosing: [B, H, S, F], or a block of that."""
        builder, found = self.builder, self.found
        query, keys, values = (
            self._heads("q_BHSD"),
            self._for_all_heads("k_BKTD"),
            self._for_all_heads("v_BKTF"),
        )
        bias, visible = (
            self.context.optional(found["bias"]),
            self.context.optional(found["visible"]),
        )
        if block is not None:
            query, keys, values = block.rows(query, 2), block.keys(keys, 2), block.keys(values, 2)
            bias, visible = (self._part(block, name) for name in ("bias", "visible"))
        cap = found["softcap"]
        query = builder.op("Mul", query, builder.floats(found["scale"] / (cap or 1.0)))
        scores = builder.op("MatMul", query, builder.transpose(keys, 0, 1, 3, 2))
        if cap:
            scores = builder.op("Mul", builder.op("Tanh", scores), builder.floats(cap))
        if bias is not None:
            scores = builder.op("Add", scores, bias)
        hidden = builder.floats(found["hidden"])
        if visible is not None:
            scores = builder.op("Where", visible, scores, hidden)
        if found["causal"]:
            later = self._later(scores) if block is None else block.later(1.0)
            scores = builder.op("Where", builder.cast(later, torch.bool), hidden, scores)
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

    def _later(self, scores: ir.Value) -> ir.Value:
        """[S, T]: 1 at keys behind a row's own place, else 0."""
        ones = ir.tensor(np.ones(1, np.float32))
        filled = self.builder.op(
            "ConstantOfShape", self.builder.op("Shape", scores, start=-2), value=ones
        )
        return self.builder.op("Trilu", filled, self.builder.constant(1, np.int64), upper=1)

    def _part(self, block: Block, name: str) -> ir.Value | None:
        """What a block's rows and keys have of a mask, which may be one for all of them."""
        if self.found[name] is None:
            return None
        mask, sizes = self.context.value(self.found[name]), self.context.shape(self.found[name])
        mask = mask if sizes[2] == 1 else block.rows(mask, 2)
        return mask if sizes[3] == 1 else block.keys(mask, 3)

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
        return out if self.flat is None else self.builder.transpose(self._rows(out), 0, 2, 1, 3)

    def _rows(self, out: ir.Value) -> ir.Value:
        """[B, S, H, F] of what the operator gives as [B, S, H * F]."""
        return self.builder.reshape(out, [0, 0, int(self.size("q_BHSD", 1) or 0), -1])


def _turned(node: fx.Node) -> fx.Node | None:
    """x [B, S, H, D] of x turned to [B, H, S, D]; None for what is no such turn."""
    arguments = tuple(node.args[1:])
    if node.target is aten.permute.default and arguments == ([0, 2, 1, 3],):
        return node.args[0]  # type: ignore[return-value]
    if node.target is aten.transpose.int and arguments in ((1, 2), (2, 1)):
        return node.args[0]  # type: ignore[return-value]
    return None
