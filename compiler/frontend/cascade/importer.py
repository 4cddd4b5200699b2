"""Imports an FX graph at ATen level, before or after dispatch, as one cascade.

    S = q @ k.transpose(-1, -2) * scale        S[h, s, t] = q[h, s, d] * k[h, t, d] :: sum(d)
    P = torch.softmax(S, -1)              ->   ..max, ..exp, ..sum over t
    O = P @ v                                  O[h, s, f] = P[h, s, t] * v[h, t, f] :: sum(t)

What has no form as a cascade becomes an input, bound to the node that computes it, and whatever such a
node reads becomes an output. Nothing is matched by its name or as a pattern: each operator says what it
computes, and ranks follow the values.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from ....errors import IRError, UnsupportedError
from ...ir.cascade.cascade import statement
from ...ir.cascade.expr import Expr, Ref, Size, reads
from ...ir.cascade.verifier import verify
from ...ir.types import hint_of
from . import view_operators  # noqa: F401 - registers its handlers
from .context import Context, Value
from .elementwise import RULES, elementwise
from .finish import finish_cascade
from .imported import Binding, Imported
from .operators import constant
from .ranks import NotExpressedError
from .registry import HANDLERS, Call


def import_graph(
    graph: fx.Graph,
    constants: Mapping[str, torch.Tensor] | None = None,
    names: Mapping[str, str] | None = None,
    weights: Iterable[str] = (),
) -> Imported:
    """The cascade of a graph whose nodes carry `meta["val"]`.

    `constants` gives placeholders whose value is known, `names` what others are called in the cascade,
    `weights` which of them are parameters.
    Raises UnsupportedError where an output is no cascade.
    """
    outside: dict[str, str] = {}
    while True:
        try:
            importer = _Importer(constants or {}, names or {}, frozenset(weights), outside)
            return importer.run(graph)
        except _JoinedError as error:
            if error.join in outside:
                raise
            outside[error.join] = f"{error.reader} needs it whole"


class _JoinedError(UnsupportedError):
    """A tensor with virtual coordinates, made by `join`, is needed as it is by an operator without a form."""

    def __init__(self, join: str, reader: str) -> None:
        super().__init__(f"{join} joins tensors, and {reader} has no form as a cascade")
        self.join, self.reader = join, reader


@dataclass(frozen=True)
class _Symbol:
    """A size that is a number of the graph."""

    hint: int
    expr: Expr | None


class _Importer:
    def __init__(
        self,
        constants: Mapping[str, torch.Tensor],
        names: Mapping[str, str],
        weights: frozenset[str],
        outside: Mapping[str, str],
    ) -> None:
        self.constants, self.names, self.weights = constants, names, weights
        self.outside = outside
        self.context = Context()
        self.values: dict[fx.Node, Any] = {}
        self.opaque: dict[str, str] = {}
        self.extra: list[tuple[str, Value]] = []
        self.feeds: dict[str, tuple[str, ...]] = {}

    def run(self, graph: fx.Graph) -> Imported:
        results: list[tuple[str, Value]] = []
        for node in graph.nodes:
            if node.op == "output":
                flat = [n for n in _flat(node.args) if isinstance(self.values.get(n), Value)]
                results = [(n.name, self.values[n]) for n in flat]
            elif node.op in ("placeholder", "get_attr"):
                self.values[node] = self._given(node)
            elif node.op == "call_function":
                self.values[node] = self._call(node)
        results += self.extra
        bindings = [self._output(name, value) for name, value in results]
        cascade, inputs, outputs, nodes, sizes = finish_cascade(self.context, bindings)
        try:
            verify(cascade)
        except IRError as error:
            raise UnsupportedError(f"the graph gives no sound cascade: {error}") from error
        return Imported(
            cascade,
            tuple(Binding(str(key), name, dims) for key, name, dims in inputs),
            tuple(Binding(str(key), name, dims) for key, name, dims in outputs),
            self.opaque,
            sizes,
            frozenset(name for key, name, _ in inputs if key in self.weights),
            {name: Binding(str(key), name, dims) for key, name, dims in nodes},
            self.feeds,
        )

    def _given(self, node: fx.Node) -> Any:
        value = node.meta.get("val")
        known = self.constants.get(node.name)
        if known is not None and known.numel() == 1 and known.ndim == 0:
            return constant(known.item())
        return self._source(node, value)

    def _source(self, node: fx.Node, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            sizes, extents = _sizes(value)
            name = self.names.get(node.name, node.name)
            return self.context.source(name, name, sizes, _kind(value.dtype), extents)
        if isinstance(value, (tuple, list)):
            return tuple(None for _ in value)
        if isinstance(value, torch.SymInt):
            return _Symbol(hint_of(value), None)
        if isinstance(value, torch.SymFloat):
            # A number that the program may change is an input like any other.
            return self.context.source(node.name, node.name, (), "real", ())
        return value

    def _call(self, node: fx.Node) -> Any:
        if node.target is operator.getitem:
            return self._item(node)
        if isinstance(node.meta.get("val"), (torch.SymInt, int)):
            return _Symbol(hint_of(node.meta["val"]), self._size_of(node))
        if node.target is torch.ops.aten._assert_tensor_metadata.default:
            return None
        try:
            value = self._express(node)
        except NotExpressedError as error:
            self.opaque[node.name] = str(error)
            self.feeds[node.name] = tuple(source.name for source in node.all_input_nodes)
            for source in node.all_input_nodes:
                used = self.values[source]
                if isinstance(used, Value) and not self._is_outside(used):
                    self._check_whole(node, used)
                    self.extra.append((source.name, used))
            return self._source(node, node.meta.get("val"))
        self._check_shape(node, value)
        self._remember(node, value)
        if isinstance(value, Value) and len(node.users) > 1 and any(reads(value.expr)):
            value = self.context.state(node.name, value)
            self._remember(node, value)
        return value

    def _item(self, node: fx.Node) -> Any:
        """One of several results. One without a form is an input; whoever makes it then stays outside too."""
        maker, at = node.args
        found = self.values[maker]  # type: ignore[index]
        item = found[int(at)] if isinstance(found, tuple) else None  # type: ignore[arg-type]
        if item is not None:
            return item
        if isinstance(maker, fx.Node) and maker.op == "call_function" and node.users:
            self.opaque.setdefault(maker.name, f"result {at} of it has no form as a cascade")
            self.opaque[node.name] = f"it is result {at} of {maker.name}"
        return self._source(node, node.meta["val"])

    def _remember(self, node: fx.Node, value: Any) -> None:
        """Which tensor of the graph a statement holds, where it holds one."""
        if isinstance(value, Value) and isinstance(value.expr, Ref) and not value.real:
            self.context.origins.setdefault(value.expr.tensor, (node.name, value.dims))

    def _check_shape(self, node: fx.Node, value: Any) -> None:
        """The ranks of a result must multiply to its shape; otherwise an operator was read wrongly."""
        several = isinstance(value, tuple)
        pairs = (
            zip(value, node.meta["val"], strict=False) if several else [(value, node.meta["val"])]
        )
        for one, real in pairs:
            if isinstance(one, Value):
                one = self.context.now(one)
                size = self.context.ranks.size
                found = [math.prod(size(rank, one.real) for rank in dim) for dim in one.dims]
                if found != _sizes(real)[0]:
                    raise UnsupportedError(f"{node.name} was read as {found}, but is {real.shape}")

    def _check_whole(self, reader: fx.Node, value: Value) -> None:
        value = self.context.now(value)
        for rank in value.ranks:
            if self.context.ranks.virtual.get(rank) and rank not in value.real:
                raise _JoinedError(self.context.joins[rank], reader.name)

    def _is_outside(self, value: Value) -> bool:
        return isinstance(value.expr, Ref) and value.expr.tensor in self.context.sources

    def _size_of(self, node: fx.Node) -> Expr | None:
        if node.target is not torch.ops.aten.sym_size.int:
            return None
        value = self.context.now(self.values[node.args[0]])  # type: ignore[index]
        group = value.dims[int(node.args[1])]  # type: ignore[arg-type]
        return Size(group[0]) if len(group) == 1 else None

    def _express(self, node: fx.Node) -> Any:
        target = node.target
        if node.name in self.outside:
            raise NotExpressedError(self.outside[node.name])
        if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
            raise NotExpressedError(f"{target} is no ATen operator")
        if target._schema.is_mutable:
            raise UnsupportedError(
                f"{target} writes into its argument; functionalize the graph first"
            )
        name = target._schema.name.split("::")[1]
        meta = node.meta.get("val")
        first = meta[0] if isinstance(meta, (tuple, list)) else meta
        if not isinstance(first, torch.Tensor):
            raise NotExpressedError(f"aten.{name} computes no tensor")
        sizes, extents = _sizes(first)
        kind = _kind(first.dtype)
        if name in RULES:
            args = [self._argument(arg, True) for arg in node.args]
            kwargs = {key: self._argument(arg, True) for key, arg in node.kwargs.items()}
            if any(isinstance(arg, Value) or key not in _OPTIONS for key, arg in kwargs.items()):
                raise NotExpressedError(f"aten.{name} with {', '.join(kwargs)}")
            return elementwise(self.context, name, args, kwargs, kind)
        if name not in HANDLERS:
            raise NotExpressedError(f"aten.{name} has no form as a cascade")
        arguments = {}
        for at, declared in enumerate(target._schema.arguments):
            if at < len(node.args):
                arguments[declared.name] = self._argument(node.args[at], False)
            elif declared.name in node.kwargs:
                arguments[declared.name] = self._argument(node.kwargs[declared.name], False)
        call = Call(self.context, node.name, arguments, sizes, extents, kind)
        several = meta if isinstance(meta, (tuple, list)) else [meta]
        arguments["results"] = [_sizes(v)[0] for v in several if isinstance(v, torch.Tensor)]
        arguments["operator"] = name
        arguments["dtype"] = first.dtype
        return HANDLERS[name](call)

    def _argument(self, arg: Any, point_by_point: bool) -> Any:
        if isinstance(arg, (list, tuple)):
            return [self._argument(item, point_by_point) for item in arg]
        if not isinstance(arg, fx.Node):
            return hint_of(arg) if isinstance(arg, torch.SymInt) else arg
        found = self.values[arg]
        if isinstance(found, _Symbol):
            if not point_by_point:
                return found.hint
            if found.expr is None:
                raise NotExpressedError("a size that is computed")
            return found.expr
        if isinstance(found, Value):
            return self.context.now(found)
        return found

    def _output(self, node: str, value: Value) -> tuple[str, Value]:
        value = self.context.now(value)
        for rank in value.ranks:
            if self.context.ranks.virtual.get(rank) and rank not in value.real:
                raise UnsupportedError(
                    f"output {node} holds a joined tensor, which a cascade does not write"
                )
        expr = value.expr
        written = isinstance(expr, Ref) and expr.tensor not in self.context.sources
        if not written or not isinstance(expr, Ref) or expr.ranks != value.ranks:
            name = self.context.name(f"{node}_out" if node in self.context.sources else node)
            self.context.statements.append(statement(name, value.ranks, expr))
            value = replace(value, expr=Ref(name, self.context.statements[-1].indices))
        return node, value


#: What pointwise operators take by keyword and their rules understand.
_OPTIONS = {"alpha", "rounding_mode", "approximate", "nan", "posinf", "neginf", "beta"}


def _flat(value: Any) -> list[fx.Node]:
    if isinstance(value, fx.Node):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [n for item in value for n in _flat(item)] if isinstance(value, (list, tuple)) else []


def _sizes(value: torch.Tensor) -> tuple[list[int], list[str]]:
    shape: tuple[Any, ...] = tuple(value.shape)
    return [hint_of(size) for size in shape], [str(size) for size in shape]


def _kind(dtype: torch.dtype) -> str:
    if dtype == torch.bool:
        return "bool"
    return "real" if dtype.is_floating_point else "integer"
