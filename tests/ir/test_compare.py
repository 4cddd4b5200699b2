import math

import numpy as np
import pytest

from einfold.compiler.ir.compare import Difference, difference


@pytest.mark.parametrize(
    ("found", "expected", "result"),
    [
        ([1.0, 2.5], [1.0, 2.0], Difference(0.5, 2.0)),
        ([0.1], [0.0], Difference(0.1, 1.0)),
        ([math.nan, math.inf, -3.0], [math.nan, math.inf, -3.0], Difference(0.0, 3.0)),
        ([math.nan], [1.0], Difference(math.inf, 1.0)),
        ([1.0], [math.nan], Difference(math.inf, 1.0)),
        ([math.inf], [-math.inf], Difference(math.inf, 1.0)),
        ([1.0], [[1.0]], Difference(math.inf, 1.0)),
        ([True, False], [True, True], Difference(1.0, 1.0)),
        ([], [], Difference(0.0, 1.0)),
    ],
)
def test_difference(found: list[float], expected: list[float], result: Difference) -> None:
    assert difference(found, expected) == result


def test_difference_is_a_share_of_the_largest() -> None:
    assert difference(np.array([99.0], np.float32), np.array([100.0], np.float32)).share == 0.01
