"""Sizes that may be numbers, as when the runtime allocates, or SymPy expressions, as in the account."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    import sympy

Size: TypeAlias = "int | sympy.Expr"


def least(a: Size, b: Size) -> Size:
    """The smaller of two sizes."""
    if isinstance(a, int) and isinstance(b, int):
        return min(a, b)
    import sympy

    smaller: sympy.Expr = sympy.Min(a, b)
    return smaller


def most(*sizes: Size) -> Size:
    """The largest of some sizes."""
    if all(isinstance(size, int) for size in sizes):
        return max(sizes)
    import sympy

    larger: sympy.Expr = sympy.Max(*sizes)
    return larger


def divided_up(a: Size, b: int) -> Size:
    """a / b, rounded up."""
    if isinstance(a, int):
        return -(-a // b)
    import sympy

    rounded: sympy.Expr = sympy.ceiling(a / b)
    return rounded


def divided_down(a: Size, b: int) -> Size:
    """a / b, rounded down."""
    if isinstance(a, int):
        return a // b
    import sympy

    rounded: sympy.Expr = sympy.floor(a / b)
    return rounded
