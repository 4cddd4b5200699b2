"""What changed between two programs: operator counts, and the lines themselves."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from dataclasses import dataclass

_CALL = re.compile(r"^call %\S+ = ([\w.]+)\(")


@dataclass(frozen=True)
class ProgramDiff:
    """`counts` maps an operator to (before, after) where they differ; `lines` is a unified diff."""

    counts: dict[str, tuple[int, int]]
    lines: tuple[str, ...]

    @property
    def same(self) -> bool:
        return not self.lines


def diff_text(
    before: str, after: str, names: tuple[str, str] = ("before", "after"), context: int = 2
) -> ProgramDiff:
    """Compares two programs in textual form."""
    old, new = before.splitlines(), after.splitlines()
    count_old, count_new = _count(old), _count(new)
    counts = {
        op: (count_old[op], count_new[op])
        for op in sorted(count_old | count_new)
        if count_old[op] != count_new[op]
    }
    lines = difflib.unified_diff(old, new, *names, n=context, lineterm="")
    return ProgramDiff(counts, tuple(lines))


def _count(lines: list[str]) -> Counter[str]:
    return Counter(match.group(1) for line in lines if (match := _CALL.match(line)))
