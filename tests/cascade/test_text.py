"""Cascades print and read back, break no rule unnoticed, and mean what the paper says."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from einfold.compiler.ir.cascade.cascade import Cascade
from einfold.compiler.ir.cascade.evaluate import evaluate
from einfold.compiler.ir.cascade.expr import Apply, Const, Expr, Index, Pos, Ref, Size, Virtual
from einfold.compiler.ir.cascade.operators import OPERATORS
from einfold.compiler.ir.cascade.parser import parse, parse_expr
from einfold.compiler.ir.cascade.printer import print_cascade, print_expr
from einfold.compiler.ir.cascade.verifier import verify
from einfold.errors import IRError

from .texts import FLASH, HEADER, NAIVE


def expressions() -> st.SearchStrategy[Expr]:
    index = st.one_of(
        st.builds(Index, st.sampled_from("stuv"), st.integers(0, 2)),
        st.builds(Index, st.just(""), st.integers(0, 3)),
        st.builds(Index, st.sampled_from("ij"), st.just(0), st.just(True)),
    )
    leaf = st.one_of(
        st.builds(Const, st.floats(allow_nan=False)),
        st.builds(Const, st.booleans()),
        st.builds(Ref, st.sampled_from(["A", "m.old", "x_1"]), st.lists(index).map(tuple)),
        st.builds(Pos, st.just("t")),
        st.builds(Size, st.just("t")),
        st.builds(Virtual, st.just("t"), st.integers(0, 2)),
    )

    def grow(inner: st.SearchStrategy[Expr]) -> st.SearchStrategy[Expr]:
        return st.sampled_from(list(OPERATORS.values())).flatmap(
            lambda op: st.tuples(*[inner] * op.arity).map(lambda args: Apply(op.name, args))
        )

    return st.recursive(leaf, grow, max_leaves=12)


@given(expressions())
def test_expressions_read_back(expr: Expr) -> None:
    assert parse_expr(print_expr(expr)) == expr


@pytest.mark.parametrize("text", [NAIVE, FLASH])
def test_cascades_read_back(text: str) -> None:
    cascade = parse(text)
    verify(cascade)
    assert print_cascade(cascade) == text


def test_the_paper_s_cascades_agree() -> None:
    random = np.random.default_rng(0)
    q, k, v = (random.normal(size=size) for size in [(3, 4), (6, 4), (6, 5)])
    weights = np.exp(q @ k.T)
    expected = weights / weights.sum(1, keepdims=True) @ v
    np.testing.assert_allclose(evaluate(parse(NAIVE), {"Q": q, "K": k, "V": v})["AV"], expected)
    tiles = {"Q": q, "K": k.reshape(3, 2, 4), "V": v.reshape(3, 2, 5)}
    np.testing.assert_allclose(evaluate(parse(FLASH), tiles)["AV"], expected)


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        ("M[s] = X[s]", "before it is computed"),
        ("M[s] = A[s, t]", "leaves t neither kept nor reduced"),
        ("M[s, t] = A[s, t] :: max(t)", "reduces over t and keeps it"),
        ("M[t, s] = A[t, s]", "declare it a second time"),
        ("M[s] = A[s] :: max(t)", "at 1 coordinates; it has 2"),
        ("A[s, t] = A[s, t]", "a second time"),
        ("M[s, q] = A[s, t]", "not declared"),
        ("M[s, t] = where(virtual(t, 0), 0, A[s, t])", "virtual coordinate 0"),
        ("M[s+1] = A[s, t] :: max(t)", "not iterative"),
        ("M[s] = A[s, 0]", "not an iterative rank"),
    ],
)
def test_a_broken_rule_is_named(lines: str, sentence: str) -> None:
    with pytest.raises(IRError, match=r"`") as caught:
        verify(parse(f"{HEADER}input A[s, t]\n{lines}\noutput M\n"))
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    "line",
    [
        "M[s] = __import__('os')",
        "M[s] = f(A[s])",
        "M[s] = 1 +",
        "M[s] = A[s] :: prod(s)",
        "= 3",
        "M[s] = " + "(" * 500 + "1" + ")" * 500,
    ],
)
def test_text_that_does_not_read_is_refused_with_its_line(line: str) -> None:
    with pytest.raises(IRError, match="line 6"):
        parse(HEADER + line + "\n")


def test_virtual_coordinates_see_zero_inputs_and_leave_no_output() -> None:
    cascade: Cascade = parse(
        "einfold.cascade 1\nrank t : T virtual 1\ninput A[t]\n"
        "B[t] = where(virtual(t, 0), 5, A[t])\nS[] = B[t] :: sum(t)\noutput B\noutput S\n"
    )
    found = evaluate(cascade, {"A": np.array([1.0, 2.0])})
    np.testing.assert_array_equal(found["B"], [1.0, 2.0])
    assert found["S"] == 8.0
