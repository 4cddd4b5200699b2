"""A plan with the whole rank as its one tile: no corrections, and what the derivation moved stays moved.

    state M = L :: max(t)                        M = L.amax(t)
    state D = exp(L - M) :: sum(t)          ->   D = exp(L - M).sum(t)
    state N = exp(L - M) * v :: sum(t)           N = exp(L - M) @ v
    finish O = N / D                             O = N / D

Beside the graph as it was written: the division comes last, equal reductions are one, grouped heads
share their keys, and a static reference saves the maximum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ...ir.cascade.cascade import Statement
from ...ir.cascade.expr import Const, Expr, Ref, reads, rename_tensors, rewrite
from ...ir.cascade.plan import Plan, Reference, State
from .expressions import on_real, on_virtual
from .frame import Frame, NotLoweredError, Signature, Value
from .sums import mapped, reduced

CLEAN = ".clean"


@dataclass(frozen=True)
class OneTile:
    """A function of the signature's inputs that gives its outputs."""

    plan: Plan
    signature: Signature

    def __call__(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Raises NotLoweredError where the plan has no form in plain torch."""
        plan = self.plan
        if torch.float16 not in (tensor.dtype for tensor in tensors):
            # At a fixed reference exp reaches past what float16 can hold.
            plan = plan.with_static_references()
        frame = Frame.of(plan, self.signature, tensors)
        run_maps(frame, plan.before)
        run_maps(frame, plan.stream)
        for step in plan.steps:
            run_step(frame, step)
        run_maps(frame, plan.finish)
        run_maps(frame, plan.emit)
        return frame.results(self.signature)


def run_maps(frame: Frame, items: Sequence[Statement]) -> None:
    """Statements in order, at real coordinates."""
    for item in items:
        frame.values[item.name] = reduced(frame, on_real(item.expr), item.op, item.over, item.ranks)


def run_step(frame: Frame, step: State | Statement | Reference) -> None:
    """One step over the whole rank."""
    if isinstance(step, Statement):
        run_maps(frame, [step])
    elif isinstance(step, Reference):
        _renew(frame, step)
    else:
        body = cleaned(frame, step.body)
        real = reduced(frame, on_real(body), step.op, step.over, step.ranks)
        frame.values[step.name] = with_virtual(frame, step, body, real)


def cleaned(frame: Frame, expr: Expr) -> Expr:
    """The expression reading references as numbers that are finite."""
    names = {
        r.name: r.name + CLEAN for r in frame.plan.references if r.name + CLEAN in frame.values
    }
    return rename_tensors(expr, names)


def _renew(frame: Frame, step: Reference) -> None:
    if step.source:
        value = frame.values[step.source]
        frame.values[step.name] = value
        finite = torch.where(torch.isfinite(value.tensor), value.tensor, 0.0)
        frame.values[step.name + CLEAN] = Value(finite, value.ranks)
    else:
        fixed = torch.scalar_tensor(float(step.static or 0.0), dtype=torch.float32)
        frame.values[step.name] = Value(fixed.to(frame.device), ())


def with_virtual(frame: Frame, step: State, body: Expr, real: Value) -> Value:
    """A state joined with what the virtual coordinates of the streamed rank add to it."""
    rank = frame.plan.rank
    streamed = {name: rank in tensor.ranks for name, tensor in frame.plan.inputs.items()}
    count = frame.plan.ranks[rank].virtual
    for number in range(count):
        extra = on_virtual(inlined(frame.plan, body), rank, number, streamed)
        if rank in {r for part in reads(extra) for r in part.ranks}:
            raise NotLoweredError("a virtual coordinate reads what is streamed")
        if set(step.over) != {rank}:
            raise NotLoweredError("a virtual coordinate of a reduction over several ranks")
        if step.op == "sum" and extra == Const(0.0):
            continue
        value = mapped(frame, extra, step.ranks)
        a, b = real.over(step.ranks), value.over(step.ranks)
        joined = a + b if step.op == "sum" else torch.maximum(a, b)
        if step.op == "min":
            joined = torch.minimum(a, b)
        real = Value(joined, step.ranks)
    return real


def inlined(plan: Plan, expr: Expr) -> Expr:
    """The expression with streamed maps written out, down to inputs and sums."""
    maps = {item.name: item for item in plan.stream}

    def change(part: Expr) -> Expr | None:
        if not isinstance(part, Ref) or part.tensor not in maps:
            return None
        item = maps[part.tensor]
        if item.op is None:
            return inlined(plan, item.expr)
        return None

    return rewrite(expr, change)
