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
from .expressions import as_tensor, on_real, on_virtual
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
        frame = Frame.of(self.plan, self.signature, tensors)
        halves = any(value.tensor.dtype == torch.float16 for value in frame.values.values())
        # At a fixed reference exp reaches past what float16 can hold.
        run_whole(frame, self.plan if halves else self.plan.with_static_references())
        return frame.results(self.signature)


def run_whole(frame: Frame, plan: Plan) -> None:
    """The plan with the whole rank as one tile; the frame has its inputs, and then all that it computes."""
    run_maps(frame, plan.before)
    run_maps(frame, plan.stream)
    for step in plan.steps:
        _run_step(frame, plan, step)
    run_maps(frame, plan.finish)
    run_maps(frame, plan.emit)
    if plan.dead == "zero":
        for name in plan.outputs:
            value = frame.values[name]
            alive = torch.where(torch.isnan(value.tensor), 0.0, value.tensor)
            frame.values[name] = Value(alive, value.ranks)


def run_maps(frame: Frame, items: Sequence[Statement]) -> None:
    """Statements in order."""
    for item in items:
        expr = held(frame, item.expr)
        frame.values[item.name] = reduced(frame, expr, item.op, item.over, item.ranks)


def held(frame: Frame, expr: Expr) -> Expr:
    """The expression at the coordinates that the frame's tensors hold."""
    return expr if frame.virtual else on_real(expr)


def _run_step(frame: Frame, plan: Plan, step: State | Statement | Reference) -> None:
    if isinstance(step, Statement):
        run_maps(frame, [step])
    elif isinstance(step, Reference):
        _renew(frame, step)
    else:
        body = cleaned(frame, step.body)
        found = reduced(frame, held(frame, body), step.op, step.over, step.ranks)
        frame.values[step.name] = with_virtual(frame, plan, step, body, found)


def cleaned(frame: Frame, expr: Expr) -> Expr:
    """The expression reading references as numbers that are finite."""
    names = {
        read.tensor: read.tensor + CLEAN
        for read in reads(expr)
        if read.tensor + CLEAN in frame.values
    }
    return rename_tensors(expr, names)


def _renew(frame: Frame, step: Reference) -> None:
    if step.source:
        value = frame.values[step.source]
        frame.values[step.name] = value
        finite = torch.where(torch.isfinite(value.tensor), value.tensor, 0.0)
        frame.values[step.name + CLEAN] = Value(finite, value.ranks)
    else:
        frame.values[step.name] = Value(as_tensor(frame, float(step.static or 0.0)), ())


def with_virtual(frame: Frame, plan: Plan, step: State, body: Expr, real: Value) -> Value:
    """A state joined with what virtual coordinates of the streamed rank add that no tensor holds."""
    rank = plan.rank
    if rank in frame.virtual:
        return real
    streamed = {name: rank in tensor.ranks for name, tensor in plan.inputs.items()}
    for number in range(plan.ranks[rank].virtual):
        extra = on_virtual(inlined(plan, body), rank, number, streamed)
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
