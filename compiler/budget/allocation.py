"""Which of several forms each thing takes, so that all fit a budget and little is lost."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ...errors import IRError


@dataclass(frozen=True)
class Form:
    """A form that a thing may take: its bytes, and what is lost by it."""

    nbytes: int
    loss: float


def allocate(forms: Mapping[str, Sequence[Form]], budget: int) -> dict[str, int]:
    """The place of the form that each thing takes, where all together have `budget` bytes at most and the sum
    of their losses is least, or nearly so.

    Everything begins with its fewest bytes. Then the step is made, time and again, that saves most loss a
    byte; one that no longer fits is left out. Steps lead along the lower hull of a thing's forms, so that
    each saves less a byte than the one before. What is saved is all that could be, but for less than one
    step: the solution of the relaxed problem differs from it in one thing.

    The problem is that of Hubara et al. 2020 (Layer-wise Calibration and Integer Programming, section 4).
    Raises IRError where not even the smallest forms fit.
    """
    hulls = {name: _hull(each) for name, each in forms.items()}
    chosen = dict.fromkeys(hulls, 0)
    left = budget - sum(forms[name][hull[0]].nbytes for name, hull in hulls.items())
    steps: list[tuple[float, str, int]] = []
    if left < 0:
        raise IRError(f"{budget - left:,} bytes are the least, and {budget:,} are given")

    def offer(name: str) -> None:
        at, hull = chosen[name], hulls[name]
        if at + 1 < len(hull):
            slope = _slope(forms[name][hull[at]], forms[name][hull[at + 1]])
            heapq.heappush(steps, (slope, name, at + 1))

    for name in forms:
        offer(name)
    while steps:
        _, name, at = heapq.heappop(steps)
        hull = hulls[name]
        more = forms[name][hull[at]].nbytes - forms[name][hull[at - 1]].nbytes
        if more <= left:
            left -= more
            chosen[name] = at
            offer(name)
    return {name: hulls[name][at] for name, at in chosen.items()}


def _hull(forms: Sequence[Form]) -> list[int]:
    """The forms, by their places, on the lower convex hull over bytes: rising in bytes, falling in loss."""
    order = sorted(range(len(forms)), key=lambda at: (forms[at].nbytes, forms[at].loss))
    hull: list[int] = []
    for at in _falling(forms, order):
        while len(hull) > 1 and _slope(forms[hull[-2]], forms[hull[-1]]) >= _slope(
            forms[hull[-1]], forms[at]
        ):
            hull.pop()
        hull.append(at)
    return hull


def _falling(forms: Sequence[Form], order: Sequence[int]) -> Iterator[int]:
    """Those that lose less than all smaller ones."""
    least = float("inf")
    for at in order:
        if forms[at].loss < least:
            least = forms[at].loss
            yield at


def _slope(smaller: Form, larger: Form) -> float:
    return (larger.loss - smaller.loss) / (larger.nbytes - smaller.nbytes)
