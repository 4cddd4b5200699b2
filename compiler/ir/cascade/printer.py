"""The textual form of a cascade, one statement a line, in the notation of FuseMax in plain letters.

    einfold.cascade 1
    rank t : T virtual 1
    input K[t, d]
    S[s, t] = Q[s, d] * K[t, d] :: sum(d)
    M[s] = S[s, t] :: max(t)
    output O

What the paper sets as `M_s = S_{s,t} :: V_t max` is `M[s] = S[s, t] :: max(t)`. `parser.parse` reads it
back to an equal cascade.
"""

from __future__ import annotations

from collections.abc import Iterator

from .cascade import Cascade, Rank, Statement, Tensor
from .expr import Apply, Const, Expr, Index, Pos, Ref, Size, Virtual
from .operators import OPERATORS

FORMAT = "einfold.cascade 1"

#: A minus in front binds as tightly as a product, below a power.
_NEGATION = 6


def print_cascade(cascade: Cascade) -> str:
    """The whole cascade as text."""
    return "\n".join(_lines(cascade)) + "\n"


def _lines(cascade: Cascade) -> Iterator[str]:
    yield FORMAT
    if cascade.dead != "as written":
        yield f"dead rows {cascade.dead}"
    for rank in cascade.ranks.values():
        yield print_rank(rank)
    for tensor in cascade.inputs.values():
        yield print_input(tensor)
    for item in cascade.statements:
        yield print_statement(item)
    for name in cascade.outputs:
        yield f"output {name}"


def print_rank(rank: Rank) -> str:
    """A rank's line."""
    virtual = f" virtual {rank.virtual}" if rank.virtual else ""
    return f"rank {rank.name} : {rank.extent}{virtual}{' iterative' if rank.iterative else ''}"


def print_input(tensor: Tensor) -> str:
    """An input's line."""
    kind = "" if tensor.kind == "real" else f" : {tensor.kind}"
    return f"input {tensor.name}[{', '.join(tensor.ranks)}]{kind}"


def print_statement(item: Statement) -> str:
    """A statement's line."""
    tail = f" :: {item.op}({', '.join(item.over)})" if item.op else ""
    return f"{item.name}{_indices(item.indices)} = {print_expr(item.expr)}{tail}"


def print_expr(expr: Expr, above: int = 0) -> str:
    """An expression, with brackets where the operator around it (precedence `above`) needs them."""
    if isinstance(expr, Const):
        text = print_number(expr.value)
        return f"({text})" if text.startswith("-") and above >= _NEGATION else text
    if isinstance(expr, Ref):
        return f"{expr.tensor}{_indices(expr.indices)}"
    if isinstance(expr, Pos):
        return f"pos({expr.rank})"
    if isinstance(expr, Size):
        return f"size({expr.rank})"
    if isinstance(expr, Virtual):
        return f"virtual({expr.rank}, {expr.number})"
    return _print_apply(expr, above)


def _print_apply(expr: Apply, above: int) -> str:
    op = OPERATORS[expr.op]
    if op.symbol:
        # Read from the left, so the right argument needs brackets at its own level; a power on both sides.
        left = print_expr(expr.args[0], op.precedence + (op.name == "pow"))
        right = print_expr(expr.args[1], op.precedence + 1)
        text, level = f"{left} {op.symbol} {right}", op.precedence
    elif op.name == "neg" and not isinstance(expr.args[0], Const):
        text, level = f"-{print_expr(expr.args[0], _NEGATION + 1)}", _NEGATION
    else:
        return f"{op.name}({', '.join(print_expr(arg) for arg in expr.args)})"
    return f"({text})" if level < above else text


def print_number(value: float | bool) -> str:
    """A number or truth value, read back to the same one."""
    if isinstance(value, bool):
        return "true" if value else "false"
    value = float(value)
    if value.is_integer() and abs(value) < 1e15:
        return str(int(value)) if str(value) != "-0.0" else "-0.0"
    return repr(value)


def _indices(indices: tuple[Index, ...]) -> str:
    return f"[{', '.join(map(str, indices))}]"
