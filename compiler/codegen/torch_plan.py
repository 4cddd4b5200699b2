"""Statements and plans in plain torch: the reference for kernels, and what runs beside them.

A plan run whole has its stream as one tile: states are reductions under the references of that tile, and
no correction is needed. Contractions are einsums, so nothing has more ranks than its operands together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..ir.cascade.cascade import Statement, statement
from ..ir.cascade.expr import Apply, Const, Expr, Pos, Ref, Size, Virtual, ranks_of
from ..ir.cascade.plan import Plan, Reference
from .torch_functions import FUNCTIONS

_MEANINGS: dict[str, Callable[..., Tensor]] = {
    **FUNCTIONS,
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.true_divide,
    "floordiv": torch.floor_divide,
    "mod": torch.remainder,
    "pow": torch.pow,
    "or": torch.logical_or,
    "and": torch.logical_and,
    "not": torch.logical_not,
    "eq": torch.eq,
    "ne": torch.ne,
    "lt": torch.lt,
    "le": torch.le,
    "gt": torch.gt,
    "ge": torch.ge,
    "neg": torch.neg,
    "where": torch.where,
    "max": torch.maximum,
    "min": torch.minimum,
    "shift_right": torch.bitwise_right_shift,
    "bits": torch.bitwise_and,
}
_CASTS = ("f64", "f32", "f16", "bf16")
_REDUCE: dict[str, Callable[..., Tensor]] = {"sum": torch.sum, "max": torch.amax, "min": torch.amin}


class TorchStatements:
    """Runs statements on tensors. `values` has a tensor for each name, over the ranks in `ranks`.

    `virtual` has the ranks with coordinates past the real ones, which tensors have as well; arithmetic
    is in `dtype`.
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        virtual: Mapping[str, int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.sizes, self.virtual, self.dtype, self.device = sizes, virtual, dtype, device
        self.values: dict[str, Tensor] = {}
        self.ranks: dict[str, tuple[str, ...]] = {}

    def give(self, name: str, ranks: tuple[str, ...], tensor: Tensor) -> None:
        """A tensor over the real coordinates of its ranks; virtual ones read 0."""
        if tensor.is_floating_point():
            tensor = tensor.to(self.dtype)
        pads = [size for rank in reversed(ranks) for size in (0, self.virtual.get(rank, 0))]
        self.put(name, ranks, functional.pad(tensor, pads) if any(pads) else tensor)

    def put(self, name: str, ranks: tuple[str, ...], tensor: Tensor) -> None:
        """A tensor over all coordinates of its ranks."""
        self.values[name], self.ranks[name] = tensor, ranks

    def real(self, name: str) -> Tensor:
        """A value at the real coordinates alone."""
        cut = tuple(slice(0, self.sizes[rank]) for rank in self.ranks[name])
        return self.values[name][cut]

    def run(self, items: Iterable[Statement]) -> None:
        """Adds the results of statements to the values."""
        for item in items:
            self.put(item.name, item.ranks, self.compute(item))

    def compute(self, item: Statement) -> Tensor:
        """The result of one statement over its ranks."""
        if item.op == "sum":
            found = self._contracted(item)
            if found is not None:
                return found
        axes = [*item.ranks, *item.over]
        value = self.evaluate(item.expr, axes)
        value = value.expand([self._length(rank) for rank in axes])
        if item.op is None:
            return value.clone()
        if value.dtype == torch.bool or not value.is_floating_point():
            value = value.to(self.dtype)
        return _REDUCE[item.op](value, dim=tuple(range(len(item.ranks), len(axes))))

    def _length(self, rank: str) -> int:
        return self.sizes[rank] + self.virtual.get(rank, 0)

    def _contracted(self, item: Statement) -> Tensor | None:
        factors = _factors(item.expr)
        inside = set().union(*(ranks_of(factor) for factor in factors))
        if len(factors) < 2 or inside != {*item.ranks, *item.over}:
            return None
        letters = {rank: chr(97 + at) for at, rank in enumerate(sorted(inside))}
        operands, terms = [], []
        for factor in factors:
            ranks = sorted(ranks_of(factor))
            value = self.evaluate(factor, ranks).to(self.dtype)
            operands.append(value.expand([self._length(rank) for rank in ranks]))
            terms.append("".join(letters[rank] for rank in ranks))
        result = "".join(letters[rank] for rank in item.ranks)
        made: Tensor = torch.einsum(f"{','.join(terms)}->{result}", *operands)
        return made

    def evaluate(self, expr: Expr, axes: list[str]) -> Tensor:
        """The expression over `axes`, of length 1 where it does not vary."""
        if isinstance(expr, Const):
            kind = torch.bool if isinstance(expr.value, bool) else self.dtype
            return torch.tensor(expr.value, dtype=kind, device=self.device)
        if isinstance(expr, Size):
            return torch.tensor(float(self.sizes[expr.rank]), dtype=self.dtype, device=self.device)
        if isinstance(expr, (Pos, Virtual)):
            at = torch.arange(self._length(expr.rank), device=self.device)
            if isinstance(expr, Virtual):
                return self._along(at == self.sizes[expr.rank] + expr.number, (expr.rank,), axes)
            return self._along(at, (expr.rank,), axes)
        if isinstance(expr, Ref):
            return self._along(self.values[expr.tensor], expr.ranks, axes)
        if expr.op in _CASTS:
            return self.evaluate(expr.args[0], axes).to(self.dtype)
        return self._apply(expr.op, [self.evaluate(arg, axes) for arg in expr.args])

    def _apply(self, op: str, args: list[Tensor]) -> Tensor:
        whole = op in ("shift_right", "bits", "floordiv", "mod")
        test = op in ("or", "and", "not", "where", "eq", "ne", "lt", "le", "gt", "ge")
        if whole and op in ("shift_right", "bits"):
            args = [arg.to(torch.int64) for arg in args]
        elif not whole and not test:
            args = [arg.to(self.dtype) for arg in args]
        elif op == "where":
            kind = torch.promote_types(args[1].dtype, args[2].dtype)
            args = [args[0].to(torch.bool), args[1].to(kind), args[2].to(kind)]
        return _MEANINGS[op](*args)

    def _along(self, tensor: Tensor, ranks: tuple[str, ...], axes: list[str]) -> Tensor:
        order = sorted(range(len(ranks)), key=lambda at: axes.index(ranks[at]))
        shape = [1] * len(axes)
        for at in order:
            shape[axes.index(ranks[at])] = tensor.shape[at]
        return tensor.permute(order).reshape(shape)


def _factors(expr: Expr) -> list[Expr]:
    if isinstance(expr, Apply) and expr.op == "mul":
        return [factor for arg in expr.args for factor in _factors(arg)]
    if isinstance(expr, Apply) and expr.op == "div":
        return [*_factors(expr.args[0]), Apply("div", (Const(1.0), expr.args[1]))]
    return [expr]


def run_plan(
    plan: Plan,
    inputs: Mapping[str, Tensor],
    sizes: Mapping[str, int],
    dtype: torch.dtype = torch.float64,
) -> dict[str, Tensor]:
    """The outputs of a plan for inputs over its ranks, computed in `dtype`."""
    some: Any = next(iter(inputs.values()))
    virtual = {name: rank.virtual for name, rank in plan.ranks.items() if rank.virtual}
    torch_values = TorchStatements(sizes, virtual, dtype, some.device)
    for name, tensor in plan.inputs.items():
        torch_values.give(name, tensor.ranks, inputs[name])
    torch_values.run([*plan.before, *plan.stream])
    raw: dict[str, Tensor] = {}
    for step in plan.steps:
        if isinstance(step, Statement):
            for name, value in raw.items():
                torch_values.put(name, plan.ranks_of(name), value)
            torch_values.run([step])
            _read_as_zero(torch_values, plan, raw)
        elif isinstance(step, Reference):
            value = _followed(torch_values, step)
            raw[step.name] = value
            torch_values.put(step.name, step.ranks, torch.where(value.isfinite(), value, 0.0))
        else:
            torch_values.run([statement(step.name, step.ranks, step.body, step.op, step.over)])
    for name, value in raw.items():
        torch_values.put(name, plan.ranks_of(name), value)
    torch_values.run([*plan.finish, *plan.emit])
    found = {name: torch_values.real(name) for name in plan.outputs}
    if plan.dead == "zero":
        found = {name: torch.where(value.isnan(), 0.0, value) for name, value in found.items()}
    return found


def _read_as_zero(values: TorchStatements, plan: Plan, raw: Mapping[str, Tensor]) -> None:
    for name, value in raw.items():
        values.put(name, plan.ranks_of(name), torch.where(value.isfinite(), value, 0.0))


def _followed(values: TorchStatements, step: Reference) -> Tensor:
    if step.source:
        return values.values[step.source]
    shape = [values.sizes[rank] + values.virtual.get(rank, 0) for rank in step.ranks]
    return torch.full(shape, float(step.static or 0.0), dtype=values.dtype, device=values.device)
