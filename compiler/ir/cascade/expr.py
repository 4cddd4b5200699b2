"""Expressions: what a statement computes at one point of its ranks.

Small frozen trees of the project's own. SymPy never builds or reads them; `analysis/cascade/symbolic.py`
translates where a computation is wanted, so that nothing is rewritten behind the compiler's back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Union

from .operators import OPERATORS


@dataclass(frozen=True, order=True)
class Index:
    """Where a tensor is read or written along one dimension.

    `t` is the coordinate itself, `i+1` the next one of an iterative rank, `3` a fixed coordinate and
    `#i` the coordinate after the last (an iterative rank of n steps leaves n + 1 values: 0 to n).
    """

    rank: str = ""
    offset: int = 0
    end: bool = False

    def __str__(self) -> str:
        if self.end:
            return f"#{self.rank}"
        if not self.rank:
            return str(self.offset)
        return f"{self.rank}+{self.offset}" if self.offset else self.rank


@dataclass(frozen=True)
class Const:
    """A number or a truth value."""

    value: float | bool


@dataclass(frozen=True)
class Ref:
    """A tensor at the given coordinates."""

    tensor: str
    indices: tuple[Index, ...] = ()

    @property
    def ranks(self) -> tuple[str, ...]:
        """The ranks that vary in this read; fixed coordinates and ends are no ranks."""
        return tuple(index.rank for index in self.indices if index.rank and not index.end)


@dataclass(frozen=True)
class Pos:
    """The coordinate along a rank as a number: how causal, window and ALiBi terms are written."""

    rank: str


@dataclass(frozen=True)
class Size:
    """How many real coordinates a rank has; in a running value, how many were seen so far."""

    rank: str


@dataclass(frozen=True)
class Virtual:
    """Whether the coordinate is the rank's virtual one of this number (an attention sink is one)."""

    rank: str
    number: int = 0


@dataclass(frozen=True)
class Apply:
    """An operator of `operators.OPERATORS` on its arguments."""

    op: str
    args: tuple[Expr, ...]

    def __post_init__(self) -> None:
        if self.op not in OPERATORS or len(self.args) != OPERATORS[self.op].arity:
            raise ValueError(f"no operator {self.op!r} with {len(self.args)} arguments")


Expr = Union[Const, Ref, Pos, Size, Virtual, Apply]  # noqa: UP007 - a name used in annotations above

ZERO, ONE = Const(0.0), Const(1.0)
#: The one NaN that expressions hold, so that equal expressions compare equal.
NAN = Const(float("nan"))


def ref(tensor: str, *ranks: str) -> Ref:
    """`tensor` read at the plain coordinates of `ranks`."""
    return Ref(tensor, tuple(Index(rank) for rank in ranks))


def apply(op: str, *args: Expr | float) -> Apply:
    """An operator on expressions and numbers."""
    return Apply(op, tuple(arg if isinstance(arg, _NODES) else Const(arg) for arg in args))


_NODES = (Const, Ref, Pos, Size, Virtual, Apply)


def is_number(expr: Expr, value: float) -> bool:
    """Whether the expression is this very constant."""
    return isinstance(expr, Const) and not isinstance(expr.value, bool) and expr.value == value


def add(a: Expr, b: Expr) -> Expr:
    """a + b, without a zero."""
    if is_number(a, 0):
        return b
    return a if is_number(b, 0) else Apply("add", (a, b))


def sub(a: Expr, b: Expr) -> Expr:
    """a - b, without a zero on the right."""
    if is_number(a, 0):
        return Apply("neg", (b,))
    return a if is_number(b, 0) else Apply("sub", (a, b))


def mul(a: Expr, b: Expr) -> Expr:
    """a * b, without a one. A zero stays: 0 * inf is not 0."""
    if is_number(a, 1):
        return b
    return a if is_number(b, 1) else Apply("mul", (a, b))


def div(a: Expr, b: Expr) -> Expr:
    """a / b, without a one below."""
    return a if is_number(b, 1) else Apply("div", (a, b))


def walk(expr: Expr) -> Iterator[Expr]:
    """The expression and everything in it, outermost first."""
    yield expr
    if isinstance(expr, Apply):
        for arg in expr.args:
            yield from walk(arg)


def reads(expr: Expr) -> Iterator[Ref]:
    """Every read of a tensor in the expression."""
    return (part for part in walk(expr) if isinstance(part, Ref))


def ranks_of(expr: Expr) -> frozenset[str]:
    """The ranks along which the expression's value can vary. `Size` varies along none."""
    found: set[str] = set()
    for part in walk(expr):
        if isinstance(part, Ref):
            found.update(part.ranks)
        elif isinstance(part, (Pos, Virtual)):
            found.add(part.rank)
    return frozenset(found)


def rewrite(expr: Expr, change: Callable[[Expr], Expr | None]) -> Expr:
    """The expression with every part for which `change` gives something replaced, outermost first."""
    changed = change(expr)
    if changed is not None:
        return changed
    if isinstance(expr, Apply):
        args = tuple(rewrite(arg, change) for arg in expr.args)
        return expr if args == expr.args else Apply(expr.op, args)
    return expr


_WHOLE: Mapping[str, Callable[..., float]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "neg": lambda a: -a,
}


def without_constants(expr: Expr) -> Expr:
    """The expression with whole numbers computed, and tests that are known left out."""
    if not isinstance(expr, Apply):
        return expr
    args = tuple(without_constants(arg) for arg in expr.args)
    known = [arg.value for arg in args if isinstance(arg, Const)]
    if expr.op in _WHOLE and len(known) == len(args) and all(_is_whole(value) for value in known):
        return Const(float(_WHOLE[expr.op](*map(float, known))))
    if expr.op == "not" and known:
        return Const(not known[0])
    if expr.op in ("and", "or") and known:
        rest = [arg for arg in args if not isinstance(arg, Const)]
        decides = expr.op == "or"
        if any(bool(value) is decides for value in known) or not rest:
            return Const(decides if any(bool(v) is decides for v in known) else not decides)
        return rest[0]
    if expr.op == "where" and isinstance(args[0], Const):
        return args[1] if args[0].value else args[2]
    return Apply(expr.op, args)


def _is_whole(value: float | bool) -> bool:
    return not isinstance(value, bool) and float(value).is_integer() and abs(value) < 2**31


def rename_ranks(expr: Expr, names: Mapping[str, str]) -> Expr:
    """The expression over other ranks."""

    def change(part: Expr) -> Expr | None:
        if isinstance(part, Ref):
            return Ref(part.tensor, tuple(rename_index(index, names) for index in part.indices))
        if isinstance(part, Pos):
            return Pos(names.get(part.rank, part.rank))
        if isinstance(part, Size):
            return Size(names.get(part.rank, part.rank))
        if isinstance(part, Virtual):
            return Virtual(names.get(part.rank, part.rank), part.number)
        return None

    return rewrite(expr, change)


def rename_index(index: Index, names: Mapping[str, str]) -> Index:
    """The index over another rank."""
    return Index(names.get(index.rank, index.rank), index.offset, index.end)


def rename_tensors(expr: Expr, names: Mapping[str, str]) -> Expr:
    """The expression reading other tensors at the same coordinates."""
    return rewrite(
        expr,
        lambda part: (
            Ref(names.get(part.tensor, part.tensor), part.indices)
            if isinstance(part, Ref)
            else None
        ),
    )
