"""Lines of generated source, and expressions of a plan turned into values there.

What does not change from tile to tile is computed once, ahead of the loop, wherever it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from ...ir.cascade.cascade import Statement, Tensor
from ...ir.cascade.expr import Apply, Const, Expr, Pos, Ref, Size, Virtual, reads
from ...ir.cascade.plan import Plan
from .names import Names
from .pressure import Product
from .roles import ROW, STEP, STREAM, Roles
from .values import OPPOSITE, TEST, WHOLE, Value, number, operate

#: Worth a variable of its own when it has the axes of a tile.
_DEAR = ("exp", "pow", "tanh", "sigmoid", "log", "div", "sqrt", "erf", "where", "softplus")


@dataclass
class Function:
    """What the whole of one generated function shares.

    `types` are storage types of tensors, `padded` the sizes of lanes as powers of two, `names` the
    identifiers. The rest collects what is met: tensors and extents that become arguments, helpers that are
    called, and what is in registers beside states and scores: by a name, axes and how often, and products.
    """

    plan: Plan
    roles: Roles
    types: Mapping[str, str]
    sizes: Mapping[str, int]
    dot: str
    precision: str
    load: Callable[[Block, Ref], Value]
    """Reads an input (`memory.load`). It and `reduce` are written in blocks, so blocks are given them."""
    reduce: Callable[[Block, str, Expr, tuple[str, ...]], Value]
    """Reduces an expression over axes (`reduce.reduce`)."""
    shared: Mapping[tuple[str, str], int] = field(default_factory=dict)
    """Neighbours along a rank that share an element of an input, by (input, rank); 1 where not named."""
    listed: bool = False
    """Whether streamed coordinates come from a list (`listed.py`), so that neighbours are none in memory."""
    names: Names = field(default_factory=Names)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    extents: dict[str, None] = field(default_factory=dict)
    helpers: set[str] = field(default_factory=set)
    held: dict[str, tuple[tuple[str, ...], int]] = field(default_factory=dict)
    products: set[Product] = field(default_factory=set)

    @property
    def virtual(self) -> int:
        """How many virtual coordinates the streamed rank has."""
        return self.plan.ranks[self.roles.stream].virtual

    @property
    def order(self) -> tuple[str, ...]:
        """Every axis, in the order in which tiles have them."""
        return (ROW, STREAM, *self.roles.lanes)

    def padded(self, lane: str) -> int:
        """The size of a lane as a power of two that matrix instructions take; a step's, where walked."""
        whole = max(16, 1 << (self.sizes[lane] - 1).bit_length())
        return min(whole, STEP) if lane in self.roles.walked else whole

    def extent(self, rank: str) -> Value:
        """How many real coordinates a rank has."""
        if rank in self.roles.lanes:
            return number(self.sizes[rank])
        self.extents[rank] = None
        return Value(self.names.of(("size", rank), f"n_{rank}"), (), "i32")

    def index(self, rank: str) -> Value:
        """The coordinates along a rank."""
        axis = self.roles.axis(rank)
        name = self.names.of(("index", rank), f"at_{rank}")
        return Value(name, (axis,) if axis else (), "i32", self.depth((axis,) if axis else ()))

    def depth(self, axes: Sequence[str]) -> int:
        """The number of loops in which a tile along these axes is another one each turn."""
        return 2 if set(axes) & set(self.roles.walked) else int(STREAM in axes)

    def stride(self, tensor: str, rank: str) -> str:
        """The name of a tensor's stride."""
        return self.names.of(("stride", tensor, rank), f"{self.variable(tensor)}_{rank}")

    def variable(self, tensor: str) -> str:
        """The identifier of a tensor's tile."""
        return self.names.of(("tensor", tensor), tensor)

    def pointer(self, tensor: str) -> str:
        """The identifier of a tensor's first element."""
        return self.names.of(("pointer", tensor), f"{self.variable(tensor)}_ptr")

    def multiplies(
        self, left: tuple[str, str], right: tuple[str, str], still: bool, made: bool
    ) -> None:
        """Takes note of a matrix product in the kernel's own type, for the registers that it needs."""
        wide = self.dot == "fp32"
        split, exact = wide and self.precision == "tf32x3", wide and self.precision == "ieee"
        self.products.add(Product(left, right, 4 if wide else 2, still, made, split, exact))

    def live(self, axis: str) -> str | None:
        """The mask of an axis, over that axis alone; None where all of it is live."""
        if axis == ROW:
            return "live_row"
        if axis == STREAM:
            return "real_t" if self.virtual else "live_t"
        size = self.sizes[axis]
        index = self.names.of(("index", axis), f"at_{axis}")
        return None if size % self.padded(axis) == 0 else f"({index} < {size})"


@dataclass
class Block:
    """One level of nesting. `outer` is the block ahead of the loop, or None for that block itself.

    `along` is the rank whose coordinates change from turn to turn of the loop.
    """

    kernel: Function
    outer: Block | None = None
    along: str = ""
    lines: list[str] = field(default_factory=list)
    bound: dict[str, Value] = field(default_factory=dict)
    cache: dict[Expr, Value] = field(default_factory=dict)

    def put(self, line: str) -> None:
        """One more line."""
        self.lines.append(line)

    def keep(self, wanted: str, value: Value) -> Value:
        """The value under a name, assigned where it is first known."""
        block = self.home(value.inner)
        name = self.kernel.names.fresh(wanted)
        block.put(f"{name} = {value.text}")
        return replace(value, text=name, level=9)

    @property
    def depth(self) -> int:
        """In how many loops this block is."""
        return 0 if self.outer is None else self.outer.depth + 1

    def home(self, inner: int) -> Block:
        """The outermost block that knows a value which changes in so many loops."""
        block = self
        while block.outer is not None and inner < block.depth:
            block = block.outer
        return block

    def value(self, expr: Expr, env: Mapping[str, Value] | None = None) -> Value:
        """The value of an expression; `env` names values that stand ahead of the block's own."""
        env = env or {}
        block = self
        if not any(read.tensor in env for read in reads(expr)):
            while block.outer is not None and not block._changes(expr):
                block = block.outer
            if expr in block.cache:
                return block.cache[expr]
            found = block._make(expr, {})
            block.cache[expr] = found
            return found
        return self._make(expr, env)

    def _changes(self, expr: Expr) -> bool:
        """Whether the expression has another value each turn."""
        found = [self._find(read.tensor) for read in reads(expr)]
        return _streams(expr, self.along) or any(
            value is not None and value.inner >= self.depth for value in found
        )

    def _find(self, name: str) -> Value | None:
        if name in self.bound:
            return self.bound[name]
        return self.outer._find(name) if self.outer is not None else None

    def _make(self, expr: Expr, env: Mapping[str, Value]) -> Value:
        kernel = self.kernel
        if isinstance(expr, Const):
            return number(expr.value)
        if isinstance(expr, Pos):
            return kernel.index(expr.rank)
        if isinstance(expr, Size):
            return kernel.extent(expr.rank)
        if isinstance(expr, Virtual):
            return self._virtual(expr)
        if isinstance(expr, Ref):
            return self._read(expr, env)
        return self._apply(expr, env)

    def _virtual(self, expr: Virtual) -> Value:
        index, size = self.kernel.index(expr.rank), self.kernel.extent(expr.rank)
        end = f"{size.text} + {expr.number}" if expr.number else size.text
        return Value(f"{index.text} == {end}", index.axes, "i1", index.inner, TEST)

    def _read(self, expr: Ref, env: Mapping[str, Value]) -> Value:
        if expr.tensor in env:
            return env[expr.tensor]
        found = self._find(expr.tensor)
        if found is not None:
            return found
        item = next((s for s in self.kernel.plan.before if s.name == expr.tensor), None)
        if item is None:
            return self.kernel.load(self, expr)
        return self._once(item)

    def _once(self, item: Statement) -> Value:
        """A statement from ahead of the stream, computed where it is first read."""
        home = self.home(0)
        if item.op is None:
            value = home.value(item.expr)
        else:
            value = self.kernel.reduce(home, item.op, item.expr, self.kernel.roles.axes(item.over))
        value = value if value.type == "i1" else value.cast("fp32")
        home.bound[item.name] = home.keep(item.name, value)
        return home.bound[item.name]

    def _apply(self, expr: Apply, env: Mapping[str, Value]) -> Value:
        if expr.op == "not" and isinstance(expr.args[0], Apply):
            test = expr.args[0]
            if test.op in OPPOSITE:
                sides = [self.value(arg, env) for arg in test.args]
                # NaN is neither below nor above: only a test of integers has an opposite.
                if all(s.type in WHOLE or s.type == "const" for s in sides):
                    return operate(OPPOSITE[test.op], sides, self.kernel.order)
        args = [self.value(arg, env) for arg in expr.args]
        if expr.op == "pow" or expr.op in ("softplus", "sign", "trunc", "round"):
            # Written with its argument more than once.
            args = [self.keep("part", a) if a.level < 9 and a.type != "const" else a for a in args]
        made = operate(expr.op, args, self.kernel.order)
        if expr.op in ("floordiv", "mod"):
            self.kernel.helpers.add(expr.op)
        if expr.op in _DEAR and len(made.axes) > 1 and made.text not in ("True", "False"):
            return self.keep(_HINTS.get(expr.op, expr.op), made)
        return made


_HINTS = {"exp": "power", "pow": "power", "div": "quotient", "where": "chosen"}


def _streams(expr: Expr, rank: str) -> bool:
    if isinstance(expr, Ref):
        return rank in expr.ranks
    if isinstance(expr, (Pos, Virtual)):
        return expr.rank == rank
    return isinstance(expr, Apply) and any(_streams(arg, rank) for arg in expr.args)
