"""Cases of a test that `make test` runs, and those that `make test-slow` has: what one case shows of a road
through the code, few more show again."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def rarely(*values: Any) -> Any:
    """A case that is slow, and whose like `make test` runs."""
    return pytest.param(*values, marks=pytest.mark.slow)


def quick(cases: Iterable[Any], *few: Any) -> list[Any]:
    """All the cases; those that are none of the `few` are slow. A case of several values is a tuple."""
    found = list(cases)
    missing = [case for case in few if case not in found]
    assert not missing, f"there are no cases {missing}"
    return [
        case if case in few else rarely(*(case if isinstance(case, tuple) else (case,)))
        for case in found
    ]
