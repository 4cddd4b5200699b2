"""Whole numbers are divided by constants above 0 only; fractions by anything."""

from __future__ import annotations

import onnx
import pytest

from einfold.compiler.codegen.onnx.divisors import undivided

RIGHT = {
    "fractions": "g (float[N] x) => (y) { y = Div(x, x) }",
    "halves": "g (float16[N] x) => (y) { y = Div(x, x) }",
    "fractions by way of others": (
        "g (int64[N] n) => (y) { a = Cast<to=1>(n)  b = Sqrt(a)  c, d = Split<num_outputs=2>(b) "
        "e = Where(n, d, d)  y = Div(e, e) }"
    ),
    "one of two is known": "g (float[N] x, int64[N] n) => (y) { s = Sigmoid(n)  y = Div(s, n) }",
    "a constant": "g (int64[N] n) => (y) <int64[1] c = {3}> { y = Div(n, c)  z = Mod(n, c) }",
    "in a branch": (
        "g (bool p, float[N] x, int64[N] n) => (y) <int64[1] c = {3}> { y = If (p) <"
        "then_branch = t () => (a) { a = Div(x, x) }, else_branch = e () => (b) { b = Div(n, c) }> }"
    ),
    "what both branches give": (
        "g (bool p, float[N] x) => (y) { b = If (p) <"
        "then_branch = t () => (c) { c = Sqrt(x) }, else_branch = e () => (d) { d = Exp(x) }> y = Div(b, b) }"
    ),
}

WRONG = {
    "whole numbers": ("g (int64[N] n) => (y) { y = Div(n, n) }", "Div"),
    "nothing to divide by": ("g (int64[N] n) => (y) { y = Mod(n) }", "Mod"),
    "a remainder": ("g (int32[N] n) => (y) { y = Mod(n, n) }", "Mod"),
    "zero": ("g (int64[N] n) => (y) <int64[1] c = {0}> { y = Div(n, c) }", "Div"),
    "minus one": ("g (int64[N] n) => (y) <int64[1] c = {-1}> { y = Div(n, c) }", "Div"),
    "one of many is zero": ("g (int64[N] n) => (y) <int64[2] c = {3, 0}> { y = Mod(n, c) }", "Mod"),
    "cast back": ("g (float[N] x) => (y) { n = Cast<to=7>(x)  y = Div(n, n) }", "Div"),
    "a size": ("g (float[N] x) => (y) { n = Shape(x)  y = Div(n, n) }", "Div"),
    "a place": ("g (float[N] x) => (y) { v, i = TopK(x, x)  y = Div(i, i) }", "Div"),
    "computed": (
        "g (int64[N] n) => (y) <int64[1] c = {3}> { d = Sub(c, c)  y = Div(n, d) }",
        "Div",
    ),
    "a constant given anew": (
        "g (int64[1] c, int64[N] n) => (y) <int64[1] c = {3}> { y = Div(n, c) }",
        "Div",
    ),
    "what one of two branches gives": (
        "g (bool p, float[N] x, int64[N] n) => (y) { b = If (p) <"
        "then_branch = t () => (c) { c = Sqrt(x) }, else_branch = e () => (d) { d = Identity(n) }> "
        "y = Div(b, b) }",
        "Div",
    ),
    "the other of two results": (
        "g (bool p, float[N] x, int64[N] n) => (y) { a, b = If (p) <"
        "then_branch = t () => (c, f) { c = Sqrt(x)  f = Identity(n) }, "
        "else_branch = e () => (d, h) { d = Exp(x)  h = Identity(n) }> y = Div(b, a) }",
        "Div",
    ),
    "a name of two": (
        "g (bool p, float[N] x, int64[N] n) => (y) { y = If (p) <"
        "then_branch = t () => (a) { x = Identity(n)  a = Div(x, x) }, "
        "else_branch = e () => (b) { b = Div(x, x) }> }",
        "Div",
    ),
}


@pytest.mark.parametrize("what", RIGHT)
def test_what_may_divide(what: str) -> None:
    assert list(undivided(onnx.parser.parse_graph(RIGHT[what]))) == []


@pytest.mark.parametrize("what", WRONG)
def test_what_may_end_the_process(what: str) -> None:
    text, operator = WRONG[what]
    assert set(undivided(onnx.parser.parse_graph(text))) == {operator}
