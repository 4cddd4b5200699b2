"""Forms under a budget: beside every choice that there is."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from einfold.compiler.budget.allocation import Form, allocate
from einfold.errors import IRError

FORM = st.builds(Form, st.integers(1, 20), st.integers(0, 40))
THINGS = st.lists(st.lists(FORM, min_size=1, max_size=4), min_size=1, max_size=4)


def lost(forms: list[list[Form]], places: tuple[int, ...]) -> float:
    return sum(each[place].loss for each, place in zip(forms, places, strict=True))


def taken(forms: list[list[Form]], places: tuple[int, ...]) -> int:
    return sum(each[place].nbytes for each, place in zip(forms, places, strict=True))


@given(THINGS, st.integers(1, 80))
def test_all_fit_and_what_is_lost_is_within_a_step_of_the_least(
    forms: list[list[Form]], budget: int
) -> None:
    named = {str(number): each for number, each in enumerate(forms)}
    every = list(product(*(range(len(each)) for each in forms)))
    fitting = [places for places in every if taken(forms, places) <= budget]
    if not fitting:
        with pytest.raises(IRError, match="bytes are the least"):
            allocate(named, budget)
        return
    found = tuple(allocate(named, budget)[name] for name in named)
    assert taken(forms, found) <= budget
    best = min(lost(forms, places) for places in fitting)
    step = max(max(f.loss for f in each) - min(f.loss for f in each) for each in forms)
    assert best <= lost(forms, found) <= best + step


def test_bytes_go_where_they_save_most() -> None:
    forms = {
        "felt": [Form(1, 100.0), Form(2, 10.0), Form(4, 0.0)],
        "not": [Form(1, 1.0), Form(2, 0.5), Form(4, 0.0)],
    }
    assert allocate(forms, 2) == {"felt": 0, "not": 0}
    assert allocate(forms, 4) == {"felt": 1, "not": 1}
    assert allocate(forms, 5) == {"felt": 2, "not": 0}
    assert allocate(forms, 8) == {"felt": 2, "not": 2}


def test_a_form_that_no_budget_wants_is_passed_over() -> None:
    """It lies above the line from the one before to the one behind."""
    forms = {"x": [Form(1, 10.0), Form(2, 9.0), Form(3, 0.0)]}
    assert [allocate(forms, budget)["x"] for budget in (1, 2, 3)] == [0, 0, 2]
