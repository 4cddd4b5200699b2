"""How the ranks of an attention become the four dimensions of the kernel.

    q[b, h, g, s, d]  k[b, h, t, d]  v[b, h, t, f]

Ranks that keys and queries share are batch and heads, the others of the query its rows. With one row a
group (decoding), the heads of a group become rows, so that a group reads its keys once; otherwise they
stay heads, which the kernel takes as grouped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...ir.cascade.cascade import Statement
from ...ir.cascade.expr import Apply, Const, Expr, Pos, ranks_of, reads
from ...ir.cascade.plan import Plan
from .expressions import as_tensor, evaluate, factors, on_real, order_of, product
from .frame import Frame, NotLoweredError, Value
from .hiding import attention, attention_with_sum
from .logits import Logits
from .one_tile import inlined
from .sums import operand


@dataclass(frozen=True)
class Heads:
    """q, k and values as expressions, and the ranks of each of the kernel's dimensions."""

    query: Expr
    key: Expr
    values: tuple[Expr, ...]
    scale: Expr
    bias: Expr
    rank: str
    inner: tuple[str, ...]
    batch: tuple[str, ...]
    heads: tuple[str, ...]
    groups: tuple[str, ...]
    rows: tuple[str, ...]

    @classmethod
    def of(cls, frame: Frame, plan: Plan, logits: Logits, values: Sequence[Expr]) -> Heads:
        """Raises NotLoweredError where the product is not one of a query and a key."""
        item = next(s for s in plan.stream if s.name == logits.scores)
        parts = factors(on_real(item.expr))
        parts = [on_real(inlined(plan, part)) for part in parts]
        key = [part for part in parts if plan.rank in ranks_of(part)]
        query = [part for part in parts if plan.rank not in ranks_of(part)]
        if not key or not query:
            raise NotLoweredError("scores are no product of a query and a key")
        q, k = product(query), product(key)
        values = [on_real(inlined(plan, value)) for value in values]
        of_keys = set(ranks_of(k)).union(*(ranks_of(value) for value in values))
        shared = [r for r in item.ranks if r in of_keys and r != plan.rank]
        own = [r for r in item.ranks if r not in of_keys and r != plan.rank]
        if not set(item.over) <= ranks_of(q) & ranks_of(k):
            raise NotLoweredError("keys and queries do not share what is summed")
        long = own[-1:] if own and not _is_short(frame, own[-1:]) else []
        groups = [rank for rank in own if rank not in long]
        # Grouped heads must follow the heads that they belong to.
        if long and groups and len(groups) > 1:
            raise NotLoweredError("several ranks of grouped heads")
        return cls(
            q,
            k,
            tuple(values),
            logits.scale,
            logits.bias,
            plan.rank,
            tuple(item.over),
            tuple(shared[:-1]),
            tuple(shared[-1:]),
            tuple(groups) if long else (),
            tuple(long) if long else tuple(groups),
        )

    @property
    def order(self) -> tuple[str, ...]:
        """All ranks of a row of scores."""
        return (*self.batch, *self.heads, *self.groups, *self.rows)

    def columns(self, frame: Frame, value: Expr) -> list[str]:
        """The ranks of a value beside those of its key."""
        of_key = {*self.batch, *self.heads, self.rank}
        return [r for r in frame.sizes if r in ranks_of(value) and r not in of_key]

    def needs(self, frame: Frame, plan: Plan) -> list[Statement]:
        """The streamed sums that operands are made of, such as a norm or a projection of the keys."""
        wanted = {
            read.tensor
            for expr in (self.query, self.key, *self.values, self.bias, self.scale)
            for read in reads(expr)
        }
        found = []
        for item in reversed(plan.stream):
            if item.name in wanted and item.name not in frame.values:
                found.append(item)
                wanted |= {read.tensor for read in reads(item.expr)}
        return found[::-1]

    def dead(self, frame: Frame, hiding: Expr) -> Value:
        """Whether the part of a row's bias that may hide keys hides all of them."""
        own = order_of(hiding, self.order)
        bias = as_tensor(frame, evaluate(frame, hiding, [*own, self.rank]))
        return Value(bias.amax(-1) == -torch.inf, own)

    def is_causal(self, frame: Frame) -> bool:
        """Whether the bias hides exactly the keys after the row's own place, and nothing else."""
        if len(self.rows) != 1 or not isinstance(self.bias, Apply) or self.bias.op != "where":
            return False
        test, yes, no = self.bias.args
        if isinstance(test, Apply) and test.op == "not":
            test, yes, no = test.args[0], no, yes
        key, row = Pos(self.rank), Pos(self.rows[0])
        tests = (Apply("le", (key, row)), Apply("ge", (row, key)))
        return test in tests and yes == Const(0.0) and no == Const(-torch.inf)


def _is_short(frame: Frame, ranks: Sequence[str]) -> bool:
    size = frame.count(ranks)
    return isinstance(size, int) and size <= 1


def attend(frame: Frame, heads: Heads, statistics: bool) -> tuple[list[Value], Value | None]:
    """The attention of each value, and the log-sum-exp of the scores where it is wanted."""
    q, scale = query_of(frame, heads)
    key_order = [*heads.batch, *heads.heads, heads.rank, *heads.inner]
    k = four(frame, operand(frame, heads.key, key_order), heads, heads.inner)
    causal = heads.is_causal(frame)
    mask = None if causal else _mask(frame, heads, q.dtype)
    k = k.to(q.dtype)
    found: list[Value] = []
    statistic: Value | None = None
    for value in heads.values:
        columns = heads.columns(frame, value)
        order = [*heads.batch, *heads.heads, heads.rank, *columns]
        v = four(frame, operand(frame, value, order), heads, columns).to(q.dtype)
        shape = frame.shape((*heads.order, *columns))
        if statistics:
            if not _same(q.shape[-1], v.shape[-1]):
                raise NotLoweredError("the kernel's statistics want values as wide as keys")
            if mask is not None and mask.dtype == torch.bool:
                mask = torch.where(mask, 0.0, -torch.inf).to(q.dtype)
            out, lse = attention_with_sum(q, k, v, mask, causal, scale)
            kept = lse.reshape(frame.shape(heads.order))
            statistic = statistic or Value(kept, heads.order)
        elif causal or mask is not None:
            out = attention(q, k, v, mask, causal, scale)
        else:
            out = torch.nn.functional.scaled_dot_product_attention(
                q, k, v, scale=scale, enable_gqa=bool(heads.groups)
            )
        found.append(Value(out.reshape(shape), (*heads.order, *columns)))
    return found, statistic


def _same(a: Any, b: Any) -> bool:
    # Compared as text: asking symbols whether they are equal would add a guard.
    return str(a) == str(b)


def query_of(frame: Frame, heads: Heads) -> tuple[torch.Tensor, float]:
    """Queries [batch, heads, rows, inner], and the number that their scores are multiplied by."""
    q = operand(frame, heads.query, [*heads.order, *heads.inner])
    if not ranks_of(heads.scale) <= {*heads.order}:
        raise NotLoweredError("the scale varies along what is summed")
    scale = evaluate(frame, heads.scale, [*heads.order, *heads.inner])
    if not isinstance(scale, (int, float)):
        q = q * (scale.to(q.dtype) if isinstance(scale, torch.Tensor) else scale)
        scale = 1.0
    shape = [
        frame.count(heads.batch),
        frame.count((*heads.heads, *heads.groups)),
        frame.count(heads.rows),
        frame.count(heads.inner),
    ]
    return q.reshape(shape), float(scale)


def four(frame: Frame, tensor: torch.Tensor, heads: Heads, last: Sequence[str]) -> torch.Tensor:
    """Keys or values [batch, heads, keys, last] of a tensor over these ranks."""
    shape = [
        frame.count(heads.batch),
        frame.count(heads.heads),
        frame.size(heads.rank),
        frame.count(last),
    ]
    return tensor if list(tensor.shape) == shape else tensor.reshape(shape)


def _mask(frame: Frame, heads: Heads, dtype: torch.dtype) -> torch.Tensor | None:
    """The bias as [batch, heads, rows, keys], of size one where all of a dimension share it."""
    if heads.bias == Const(0.0):
        return None
    test = _as_test(heads.bias)
    bias = over_scores(frame, heads, heads.bias if test is None else test)
    return bias if bias.dtype == torch.bool else bias.to(dtype)


def over_scores(frame: Frame, heads: Heads, expr: Expr, keys: bool = True) -> torch.Tensor:
    """An expression as [batch, heads, rows, keys], of size one where all of a dimension share it.

    With `keys` the last dimension is there in full.
    """
    bias = as_tensor(frame, evaluate(frame, expr, [*heads.order, heads.rank]))
    bias = bias.reshape([1] * (len(heads.order) + 1)) if not bias.ndim else bias
    inside = ranks_of(expr)
    shape = []
    for group in (heads.batch, (*heads.heads, *heads.groups), heads.rows, (heads.rank,)):
        used = bool(inside & set(group)) or (keys and group == (heads.rank,))
        at = sum(len(g) for g in _before(heads, group))
        if used and group:
            sizes = frame.shape(group)
            bias = bias.expand(*bias.shape[:at], *sizes, *bias.shape[at + len(group) :])
            shape.append(frame.count(group))
        else:
            shape.append(1)
    return bias.reshape(shape)


def _before(heads: Heads, group: tuple[str, ...]) -> list[tuple[str, ...]]:
    groups = [heads.batch, (*heads.heads, *heads.groups), heads.rows, (heads.rank,)]
    return groups[: groups.index(group)]


def _as_test(bias: Expr) -> Expr | None:
    """The keys that are live, where the bias is 0 there and -inf elsewhere."""
    if not isinstance(bias, Apply) or bias.op != "where":
        return None
    test, yes, no = bias.args
    if yes == Const(0.0) and no == Const(-torch.inf):
        return test
    if no == Const(0.0) and yes == Const(-torch.inf):
        return Apply("not", (test,))
    return None
