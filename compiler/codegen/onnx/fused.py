"""A folded plan through `softmax_attention`, which both flavours lower (`softmax_attention.py`).

    state M = L :: max(t)                        O = softmax_attention(q, k, v, bias, visible, sinks, a)
    state D = exp(L - M) :: sum(t)          ->   D = 1, N = O
    state N = exp(L - M) * v :: sum(t)           finish as it stands
    L = a * (q . k) + bias where visible

The operator normalises by itself: the sum of its weights is 1, and the weighted sum is what it returns. It
gives no log-sum-exp, so what is added to a sum of weights must be a key of its own: a virtual coordinate of
the plan, or exp(c - M) beside D, as in softmax plus one, which is a key with the logit c and no value.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import torch

from ...ir.cascade.cascade import Statement
from ...ir.cascade.expr import Apply, Const, Expr, Ref, ranks_of, reads, rewrite, walk
from ...ir.cascade.plan import Plan
from ...ir.ops import einfold_ops
from ..cpu.expressions import on_virtual, simplified
from ..cpu.frame import Frame, NotLoweredError, Signature, Value
from ..cpu.heads import Heads, four, over_scores, query_of
from ..cpu.logits import Logits
from ..cpu.one_tile import inlined, run_maps
from ..cpu.reach import Places, Reach
from ..cpu.sdpa import Attention, attentions, hiding, with_ones, without_dead_zero
from ..cpu.sums import operand

Finish = tuple[Statement, ...]

#: What scores are computed with, beside a factor, where onnxruntime's own fusions leave nothing to gain.
_AS_FAST = ["matmul", "matmul", "softmax"]


@dataclass(frozen=True)
class ThroughAttention:
    """A function of the signature's inputs that gives its outputs.

    A call raises NotLoweredError where the plan is not made of attentions, or holds what no argument of the
    operator expresses.
    """

    flavour: str
    plan: Plan
    signature: Signature

    def __call__(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        try:
            found = attentions(self.plan)
        except NotLoweredError as error:
            raise NotLoweredError(_because(str(error))) from None
        if len(found) > 1:
            raise NotLoweredError(
                "several softmaxes meet in one product with the values, which each would do by itself"
            )
        frame = Frame.of(self.plan, self.signature, tensors)
        run_maps(frame, self.plan.before)
        finish = _with_rows(self.plan)
        finish = self._run(frame, found[0], finish)
        for statement in finish:
            known = {*frame.values, *frame.numbers}
            missing = [r.tensor for r in reads(statement.expr) if r.tensor not in known]
            if missing:
                raise NotLoweredError(_because(f"the outputs depend on {missing[0]}"))
            run_maps(frame, [statement])
        return frame.results(self.signature)

    def _run(self, frame: Frame, item: Attention, finish: Finish) -> Finish:
        """Computes one attention; the statements that follow, with what they read of its sums."""
        virtual = self.plan.ranks[self.plan.rank].virtual > 0
        finish, zero_blind = without_dead_zero(finish, item, virtual)
        finish, beside = _keys_beside(item, finish)
        if beside and hiding(self.plan, item.logits.bias) != Const(0.0):
            raise NotLoweredError(
                "rows that see nothing are NaN although a sink has weight in them"
            )
        values = [value for _, value in item.weighted]
        logits, softcap = _uncapped(item.logits)
        heads = Heads.of(frame, self.plan, logits, values)
        run_maps(frame, heads.needs(frame, self.plan))
        sinks = [*_virtual_keys(self.plan, item), *beside]
        places = _places(self.signature, heads)
        parts = [
            Heads.of(frame, self.plan, replace(logits, scores=name, scale=factor), values)
            for name, factor in logits.more
        ]
        for part in parts:
            run_maps(frame, part.needs(frame, self.plan))
        arguments = _arguments(frame, heads, logits, softcap, sinks, places, parts)
        reason = (_few_rows(arguments) if parts else "") or self._reason(heads, arguments)
        if reason:
            raise NotLoweredError(reason)
        results = _attend(frame, heads, arguments, zero_blind)
        for (state, _), result in zip(item.weighted, results, strict=True):
            frame.values[state.name] = result
        ones = {state.name for state in item.sums}
        return tuple(with_ones(statement, ones) for statement in finish)

    def _reason(self, heads: Heads, given: _Arguments) -> str:
        """Why the operator is not worth its place or cannot take it, or ""."""
        grouped = bool(heads.groups)
        shape: tuple[Any, ...] = tuple(given.query.shape)
        if grouped and not isinstance(shape[1], int):
            return "grouped heads whose number is known only at run time"
        if given.sinks is not None and not isinstance(shape[3], int):
            return "a sink beside heads whose size is known only at run time"
        hides = given.visible is not None or given.causal or given.sinks is not None
        if given.softcap:
            return _capped_reason(given)
        if grouped or hides or given.turned:
            return ""
        written = sorted(self.signature.operators)
        if self.flavour == "ort" and written == _AS_FAST:
            return "onnxruntime runs two products and a softmax as fast as one operator"
        of_heads = given.bias is not None and str(given.bias.shape[1]) != "1"
        if self.flavour == "ort" and of_heads and "softmax" in written:
            return "onnxruntime adds a bias for each head as fast as its operator takes one"
        return ""


def _few_rows(given: _Arguments) -> str:
    """Why products that are added stay apart, or "".

    Put side by side, keys are copied once. What that saves is a second look at all scores: with 16 heads over
    one of keys of 576, 4 rows take 1.5 times as long so, and 64 rows as long.
    """
    (_, heads, rows, _), (_, kv_heads, _, size) = given.query.shape, given.key.shape
    known = all(isinstance(number, int) for number in (heads, rows, kv_heads, size))
    if known and rows * heads >= 2 * size * kv_heads:
        return ""
    return (
        "scores go through add, and for few rows two products are faster than keys put side by side"
    )


def _capped_reason(given: _Arguments) -> str:
    """Why a softcap stays as written, or ""."""
    if given.sinks is not None:
        return "a softcap beside a sink"
    if not given.causal and given.reach == Reach():
        return (
            "scores go through tanh, which takes onnxruntime's attention three times as long as what is "
            "written, and rows that may see all keys leave nothing out"
        )
    if not given.causal and given.hidden > -math.inf:
        return "scores go through tanh, and a row that sees nothing would be a mean of fewer keys"
    return ""


def _because(reason: str) -> str:
    """What a plan that is no attention has to do with the operator."""
    if reason.startswith("the outputs depend on"):
        return f"{reason}, and the operator gives no statistics of its softmax"
    return reason


def _with_rows(plan: Plan) -> Finish:
    """What follows, with the rows beside states written out that are NaN where no key is live.

    So is what the operator gives.
    """
    rows = {}
    for step in plan.steps:
        expr = step.expr if isinstance(step, Statement) else None
        if isinstance(expr, Apply) and expr.op == "where":
            test, value, no = expr.args
            dead = isinstance(no, Const) and math.isnan(no.value)
            if dead and isinstance(test, Apply) and test.op == "isfinite":
                rows[step.name] = value

    def change(part: Expr) -> Expr | None:
        return rows.get(part.tensor) if isinstance(part, Ref) else None

    return tuple(replace(item, expr=rewrite(item.expr, change)) for item in plan.finish)


def _virtual_keys(plan: Plan, item: Attention) -> list[Expr]:
    """The logits at the virtual coordinates of the streamed rank, where values are 0."""
    streamed = {name: plan.rank in tensor.ranks for name, tensor in plan.inputs.items()}
    found = []
    for number in range(plan.ranks[plan.rank].virtual):
        for state, _ in item.weighted:
            if on_virtual(inlined(plan, state.body), plan.rank, number, streamed) != Const(0.0):
                raise NotLoweredError(f"a virtual coordinate of {plan.rank} has a value")
        logits = {
            _logit(on_virtual(inlined(plan, state.body), plan.rank, number, streamed), item)
            for state in item.sums
        }
        logit = logits.pop() if len(logits) == 1 else None
        if logit is None:
            raise NotLoweredError(f"a virtual coordinate of {plan.rank} is no key")
        found.append(logit)
    return found


def _keys_beside(item: Attention, finish: Finish) -> tuple[Finish, list[Expr]]:
    """What follows, and the logits of keys that it adds to the sum of weights."""
    sums = {state.name for state in item.sums}
    found: list[Expr] = []

    def change(part: Expr) -> Expr | None:
        if not isinstance(part, Apply) or part.op != "add":
            return None
        for one, other in (part.args, part.args[::-1]):
            logit = _logit(one, item)
            if logit is not None and isinstance(other, Ref) and other.tensor in sums:
                found.append(logit)
                return Const(1.0)
        return None

    changed = tuple(replace(s, expr=simplified(rewrite(s.expr, change))) for s in finish)
    if not found:
        return finish, []
    if len(set(found)) > 1 or any(r.tensor in sums for s in changed for r in reads(s.expr)):
        raise NotLoweredError("sums of weights are read with a sink and without")
    return changed, found[:1]


def _logit(expr: Expr, item: Attention) -> Expr | None:
    """c of exp(c - M); None where it is anything else."""
    inside = expr.args[0] if isinstance(expr, Apply) and expr.op == "exp" else None
    if isinstance(inside, Apply) and inside.args[-1] == item.reference.ref:
        return {"neg": Const(0.0), "sub": inside.args[0]}.get(inside.op)
    return None


@dataclass(frozen=True)
class _Arguments:
    """What the operator is called with; `turned` where queries came as [batch, rows, heads, size]."""

    query: torch.Tensor
    key: torch.Tensor
    values: tuple[torch.Tensor, ...]
    bias: torch.Tensor | None
    visible: torch.Tensor | None
    sinks: torch.Tensor | None
    scale: float
    hidden: float
    causal: bool
    reach: Reach
    softcap: float
    turned: bool


def _uncapped(logits: Logits) -> tuple[Logits, float]:
    """The scores scaled as ahead of their softcap, and that; 0 without one."""
    if logits.capped is None:
        return logits, 0.0
    if not isinstance(logits.scale, Const) or float(logits.scale.value) <= 0:
        raise NotLoweredError(
            "scores go through tanh, and are scaled behind it by what is no number"
        )
    scale = simplified(Apply("mul", (logits.capped, logits.scale)))
    return replace(logits, scale=scale, capped=None), float(logits.scale.value)


def _arguments(
    frame: Frame,
    heads: Heads,
    logits: Logits,
    softcap: float,
    sinks: Sequence[Expr],
    places: Places | None,
    parts: Sequence[Heads],
) -> _Arguments:
    query, scale = query_of(frame, heads)
    own = [*heads.batch, *heads.heads, heads.rank]
    beside = [_beside(frame, heads, part, own) for part in parts]
    query = torch.cat([query, *(q for q, _ in beside)], -1) if beside else query
    dtype = query.dtype
    if dtype != torch.float32:
        raise NotLoweredError(f"onnxruntime's attention takes float32, and this is {dtype}")
    turned = None
    numbers = all(isinstance(part, (Apply, Const)) for part in walk(heads.scale))
    if numbers and not beside:  # the scale is `scale`
        order = (heads.rows, (*heads.heads, *heads.groups), heads.inner)
        turned = _turned(frame, heads, heads.query, *order)
    keys = (heads.rank,), heads.heads
    key = None if beside else _turned(frame, heads, heads.key, *keys, heads.inner)
    if key is None:
        key = four(frame, operand(frame, heads.key, [*own, *heads.inner]), heads, heads.inner)
    key = torch.cat([key, *(k for _, k in beside)], -1) if beside else key
    values = []
    for value in heads.values:
        columns = heads.columns(frame, value)
        if len(columns) > 1:
            raise NotLoweredError("a row has sums of its own for several ranks of the values")
        given = _turned(frame, heads, value, *keys, columns)
        if given is None:
            given = four(frame, operand(frame, value, [*own, *columns]), heads, columns)
        values.append(given.to(dtype))
    bias, seen, hidden = _taken_apart(logits)
    causal, far = False, Reach()
    if seen is not None and not sinks and places is not None:
        causal = heads.is_causal(frame)
        if hidden == -math.inf and bias == Const(0.0):
            causal = causal or places.is_causal(seen)
        far = Reach() if causal else places.reach(seen)
    return _Arguments(
        query if turned is None else turned,
        key.to(dtype),
        tuple(values),
        None if bias == Const(0.0) else over_scores(frame, heads, bias).to(dtype),
        None if causal or seen is None else over_scores(frame, heads, seen),
        _side_by_side(frame, heads, sinks, dtype),
        scale,
        hidden,
        causal,
        far,
        softcap,
        turned is not None,
    )


def _beside(
    frame: Frame, heads: Heads, part: Heads, own: Sequence[str]
) -> tuple[torch.Tensor, torch.Tensor]:
    """(q, k) of a product that is added to the first, for the columns behind its own."""
    if (part.order, part.rank) != (heads.order, heads.rank):
        raise NotLoweredError("scores go through add, of products over other ranks")
    query, factor = query_of(frame, part)
    key = four(frame, operand(frame, part.key, [*own, *part.inner]), part, part.inner)
    return (query if factor == 1.0 else query * factor), key


def _places(signature: Signature, heads: Heads) -> Places | None:
    """What tells how far rows see; None where rows have no one place."""
    if len(heads.rows) != 1:
        return None
    known = {
        name: (tuple(dim[0] for dim in dims), signature.known[name])
        for name, dims in signature.inputs
        if name in signature.known and all(len(dim) == 1 for dim in dims)
    }
    return Places(heads.rows[0], heads.rank, known)


def _turned(
    frame: Frame,
    heads: Heads,
    expr: Expr,
    rows: Sequence[str],
    by: Sequence[str],
    last: Sequence[str],
) -> torch.Tensor | None:
    """A tensor that came as [batch, rows, heads, size] turned to [batch, heads, rows, size]; else None.

    To turn it is the last that is done, so that the operator's lowering sees that it came so.
    """
    value = frame.values.get(expr.tensor) if isinstance(expr, Ref) else None
    together = (*heads.batch, *rows, *by, *last)
    if value is None or not rows or not by or value.ranks != together:
        return None
    shape = [frame.count(ranks) for ranks in (heads.batch, rows, by, last)]
    return value.tensor.reshape(shape).permute(0, 2, 1, 3)


def _attend(frame: Frame, heads: Heads, given: _Arguments, zero_blind: bool) -> list[Value]:
    """The attention of each value: one call, over values side by side where there are several."""
    out = einfold_ops.softmax_attention(
        given.query,
        given.key,
        given.values[0] if len(given.values) == 1 else torch.cat(given.values, -1),
        given.bias,
        given.visible,
        given.sinks,
        given.scale,
        given.hidden,
        given.causal,
        zero_blind,
        given.reach.behind,
        given.reach.ahead,
        given.softcap,
    )
    columns = [heads.columns(frame, value) for value in heads.values]
    parts = [out]
    if len(columns) > 1:
        parts = out.split([frame.count(of_value) for of_value in columns], -1)
    return [
        Value(part.reshape(frame.shape((*heads.order, *of_value))), (*heads.order, *of_value))
        for part, of_value in zip(parts, columns, strict=True)
    ]


def _taken_apart(logits: Logits) -> tuple[Expr, Expr | None, float]:
    """(what is added to scores, where they are seen, what stands where they are not)."""
    bias, seen, hidden = logits.bias, [], set()
    while bias in logits.choices:
        choice = logits.choices[bias]
        seen.append(choice.seen)
        hidden.add(choice.hidden)
        bias = choice.bias
    if len(hidden) > 1 or any(part in logits.choices for part in walk(bias)):
        raise NotLoweredError("scores that are hidden are computed with")
    test = reduce(lambda a, b: Apply("and", (a, b)), seen) if seen else None
    return bias, test, hidden.pop() if hidden else -math.inf


def _side_by_side(
    frame: Frame, heads: Heads, sinks: Sequence[Expr], dtype: torch.dtype
) -> torch.Tensor | None:
    """The logits of sinks as [batch, heads, rows, sinks]."""
    if not sinks:
        return None
    if any(not ranks_of(sink) <= {*heads.order} for sink in sinks):
        raise NotLoweredError("a sink has ranks of its own")
    columns = [over_scores(frame, heads, sink, keys=False).to(dtype) for sink in sinks]
    if len(columns) == 1:
        return columns[0]
    return torch.cat(torch.broadcast_tensors(*columns), -1)
