"""How far from a row's own place a mask lets keys be seen.

    and(le(pos(t), pos(s)), lt(pos(s) - pos(t), 4))   ->   no more than 3 behind, none ahead

Of a mask whose numbers are known as the program is made, they are looked at.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...ir.cascade.expr import Apply, Const, Expr, Pos, Ref

#: Tests by what stands between the two sides, as `left - right <= 0` and whether equality fails it.
_ORDERS = {"le": (1, False), "lt": (1, True), "ge": (-1, False), "gt": (-1, True)}
_OPPOSITE = {"le": "gt", "lt": "ge", "ge": "lt", "gt": "le"}


@dataclass(frozen=True)
class Reach:
    """How many places behind and ahead of its own a row sees at most; None where nothing bounds it."""

    behind: int | None = None
    ahead: int | None = None

    def both(self, other: Reach) -> Reach:
        """Where both tests hold."""
        return Reach(_least(self.behind, other.behind), _least(self.ahead, other.ahead))

    def either(self, other: Reach) -> Reach:
        """Where one of two tests holds."""
        return Reach(_most(self.behind, other.behind), _most(self.ahead, other.ahead))


@dataclass(frozen=True)
class Places:
    """The rank of rows and that of keys, and masks whose numbers are known: ranks and an array, by name."""

    row: str
    key: str
    known: Mapping[str, tuple[tuple[str, ...], Any]] = field(default_factory=dict)

    def reach(self, test: Expr, negated: bool = False) -> Reach:
        """What a test bounds, or its opposite; a test of anything but places bounds nothing."""
        if isinstance(test, Ref):
            seen = self._seen(test, negated)
            return Reach() if seen is None else _measured(seen)
        if not isinstance(test, Apply):
            return Reach()
        if test.op == "not":
            return self.reach(test.args[0], not negated)
        if test.op in ("and", "or"):
            one, other = (self.reach(arg, negated) for arg in test.args)
            return one.both(other) if (test.op == "and") != negated else one.either(other)
        if test.op not in _ORDERS:
            return Reach()
        sign, strict = _ORDERS[_OPPOSITE[test.op] if negated else test.op]
        less, more = test.args if sign > 0 else test.args[::-1]
        if isinstance(less, Apply) and less.op == "abs":
            inside = less.args[0]
            other = self._bound(Apply("neg", (inside,)), more, strict)
            return self._bound(inside, more, strict).both(other)
        return self._bound(less, more, strict)

    def is_causal(self, test: Expr) -> bool:
        """Whether a mask whose numbers are known hides what lies ahead of each row, and nothing else."""
        negated = isinstance(test, Apply) and test.op == "not"
        mask = test.args[0] if isinstance(test, Apply) and negated else test
        if not isinstance(mask, Ref) or len(self.known.get(mask.tensor, ((), None))[0]) != 2:
            return False
        seen = self._seen(mask, negated)
        return seen is not None and bool(np.array_equal(seen, np.tri(*seen.shape, dtype=bool)))

    def _seen(self, mask: Ref, negated: bool) -> Any:
        """[rows, keys], true where some mask of any head lets a key be seen; None where it is not known."""
        ranks, array = self.known.get(mask.tensor, ((), None))
        if not {self.row, self.key} <= set(ranks):
            return None
        rest = tuple(at for at, rank in enumerate(ranks) if rank not in (self.row, self.key))
        seen = np.any(~array if negated else array, axis=rest)
        return seen if ranks.index(self.row) < ranks.index(self.key) else seen.T

    def _bound(self, less: Expr, more: Expr, strict: bool) -> Reach:
        """What `less <= more` says, or `less < more`, of whole numbers a * (key - row) + c <= 0."""
        terms = _linear(Apply("sub", (less, more)), self.row, self.key)
        if terms is None or terms[0] != -terms[1] or not terms[0]:
            return Reach()
        factor, _, constant = terms
        most = -constant / abs(factor)
        limit = math.ceil(most) - 1 if strict else math.floor(most)
        return Reach(ahead=limit) if factor > 0 else Reach(behind=limit)


def _measured(seen: Any) -> Reach:
    """The bounds of a mask [rows, keys]."""
    rows, keys = np.nonzero(seen)
    if not len(rows):
        return Reach()
    return Reach(behind=int((rows - keys).max()), ahead=int((keys - rows).max()))


def _linear(expr: Expr, row: str, key: str) -> tuple[float, float, float] | None:
    """(a, b, c) of a * pos(key) + b * pos(row) + c; None where it is anything else."""
    if isinstance(expr, Pos) and expr.rank in (row, key):
        return float(expr.rank == key), float(expr.rank == row), 0.0
    if isinstance(expr, Const):
        return (0.0, 0.0, float(expr.value)) if math.isfinite(expr.value) else None
    if not isinstance(expr, Apply) or expr.op not in ("add", "sub", "neg"):
        return None
    parts = [_linear(arg, row, key) for arg in expr.args]
    if expr.op == "neg" and parts[0] is not None:
        a, b, c = parts[0]
        return -a, -b, -c
    if len(parts) < 2 or parts[0] is None or parts[1] is None:
        return None
    sign = 1 if expr.op == "add" else -1
    (a, b, c), (d, e, f) = parts[0], parts[1]
    return a + sign * d, b + sign * e, c + sign * f


def _least(one: int | None, other: int | None) -> int | None:
    known = [bound for bound in (one, other) if bound is not None]
    return min(known) if known else None


def _most(one: int | None, other: int | None) -> int | None:
    return None if one is None or other is None else max(one, other)
