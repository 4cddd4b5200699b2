"""Random cascades over a streamed rank t, for Hypothesis: maps and reductions that build on each other."""

from __future__ import annotations

from hypothesis import strategies as st

from einfold.compiler.ir.cascade.cascade import Cascade, Rank, Statement, Tensor, statement
from einfold.compiler.ir.cascade.expr import Apply, Const, Expr, Pos, Size, apply, ranks_of, ref

RANKS = {name: Rank(name, name.upper()) for name in "sft"}
INPUTS = {
    "x": Tensor("x", ("s", "t")),
    "y": Tensor("y", ("s", "t")),
    "v": Tensor("v", ("t", "f")),
    "c": Tensor("c", ("s",)),
    "live": Tensor("live", ("s", "t"), "bool"),
}
#: Bounded, so that nothing grows beyond what float64 compares well.
TAME = ("tanh", "sigmoid", "sin")


def _tame(expr: Expr) -> Expr:
    return apply("tanh", expr)


@st.composite
def cascades(draw: st.DrawFn) -> Cascade:
    """A cascade whose every statement is of a modest size, some folding, some not."""
    statements: list[Statement] = []
    along: list[Expr] = [ref("x", "s", "t"), ref("y", "s", "t"), ref("v", "t", "f")]
    rows: list[Expr] = [ref("c", "s")]
    maxima: list[tuple[Expr, Expr]] = []
    for number in range(draw(st.integers(2, 7))):
        kind = draw(
            st.sampled_from(["map", "mixed", "sum", "max", "softmax", "row", "mask", "moment"])
        )
        pick = draw(st.sampled_from(along))
        name = f"a{number}"
        if kind == "map":
            expr = draw(
                st.sampled_from([apply(op, pick) for op in TAME] + [apply("mul", pick, 0.5)])
            )
            _add(statements, along, name, expr)
        elif kind == "mixed":
            row = draw(st.sampled_from(rows))
            op = draw(st.sampled_from(["add", "sub", "mul"]))
            expr = apply(op, pick, row)
            _add(statements, along, name, _tame(expr) if draw(st.booleans()) else expr)
        elif kind == "mask":
            test = draw(st.sampled_from([ref("live", "s", "t"), apply("le", Pos("t"), Pos("s"))]))
            fill = draw(st.sampled_from([0.0, -1e30, float("-inf")]))
            if fill == 0.0:
                _add(statements, along, name, Apply("where", (test, pick, Const(0.0))))
            else:
                masked = statement(
                    name, _ranks(pick, test), Apply("where", (test, pick, Const(fill)))
                )
                statements.append(masked)
                rows.append(_softmax(statements, along, maxima, f"{name}_", masked.ref))
        elif kind == "sum":
            expr = apply("div", pick, Size("t"))
            item = statement(name, _less(pick), expr, "sum", ("t",))
            statements.append(item)
            rows.append(item.ref)
        elif kind == "max":
            op = draw(st.sampled_from(["max", "min"]))
            item = statement(name, _less(pick), pick, op, ("t",))
            statements.append(item)
            rows.append(item.ref)
        elif kind == "softmax":
            rows.append(_softmax(statements, along, maxima, f"{name}_", pick))
        elif kind == "moment":
            row = draw(st.sampled_from(rows))
            power = float(draw(st.integers(1, 3)))
            away = apply("pow", apply("sub", pick, row), power)
            item = statement(name, _less(away), apply("div", away, Size("t")), "sum", ("t",))
            statements.append(item)
            rows.append(_named(statements, f"{name}_r", _tame(item.ref)))
        else:
            one, other = draw(st.sampled_from(rows)), draw(st.sampled_from(rows))
            rows.append(
                _named(statements, name, apply(draw(st.sampled_from(["add", "sub"])), one, other))
            )
    named = [item.name for item in statements if not item.name.endswith("_m")]
    count = draw(st.integers(1, min(3, len(named))))
    outputs = named[-1:] + draw(st.permutations(named[:-1]))[: count - 1]
    return Cascade(RANKS, INPUTS, tuple(statements), tuple(outputs)).pruned()


def _ranks(*exprs: Expr) -> list[str]:
    found = frozenset().union(*(ranks_of(expr) for expr in exprs))
    return [rank for rank in RANKS if rank in found]


def _less(expr: Expr) -> list[str]:
    return [rank for rank in _ranks(expr) if rank != "t"]


def _named(statements: list[Statement], name: str, expr: Expr) -> Expr:
    item = statement(name, _ranks(expr), expr)
    statements.append(item)
    return item.ref


def _add(statements: list[Statement], along: list[Expr], name: str, expr: Expr) -> None:
    found = _named(statements, name, expr)
    if "t" in ranks_of(found):
        along.append(found)


def _softmax(
    statements: list[Statement],
    along: list[Expr],
    maxima: list[tuple[Expr, Expr]],
    name: str,
    scores: Expr,
) -> Expr:
    """Adds max, exp, sum; the normaliser is what is returned."""
    top = statement(f"{name}m", _less(scores), scores, "max", ("t",))
    weight = statement(f"{name}e", _ranks(scores), apply("exp", apply("sub", scores, top.ref)))
    total = statement(f"{name}d", _less(scores), weight.ref, "sum", ("t",))
    share = statement(f"{name}p", _ranks(scores), apply("div", weight.ref, total.ref))
    statements += [top, weight, total, share]
    along.append(share.ref)
    maxima.append((scores, top.ref))
    return total.ref
