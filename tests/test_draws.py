"""Tests draw the same numbers in every run, whichever ran before: conftest seeds, nothing goes around it."""

from __future__ import annotations

import ast
import random
from collections.abc import Iterator
from pathlib import Path

import numpy
import pytest
import torch

from .conftest import seed_by

TESTS = Path(__file__).parent
#: Generators that draw a seed of their own where they are given none.
GENERATORS = ("default_rng", "Random", "RandomState", "PCG64", "SeedSequence")
#: What has no seed.
ENTROPY = ("urandom", "SystemRandom", "token_bytes", "token_hex", "randbits", "uuid4")
#: What draws from torch's own generator.
DRAWS = ("rand", "randn", "randint", "randperm", "rand_like", "randn_like", "normal", "manual_seed")


def draws(text: str) -> Iterator[str]:
    """What a file draws that no seed of conftest reaches."""
    tree = ast.parse(text)
    inside = {
        node
        for function in ast.walk(tree)
        if isinstance(function, (ast.FunctionDef, ast.Lambda))
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        of = getattr(getattr(node.func, "value", None), "id", "")
        unseeded = name in GENERATORS and not node.args and not node.keywords
        bare = of in ("torch", "random", "numpy", "np") and name == "seed" and not node.args
        own = any(keyword.arg == "generator" for keyword in node.keywords)
        loaded = of == "torch" and name in DRAWS and node not in inside and not own
        if unseeded or bare or loaded or name in ENTROPY:
            yield f"line {node.lineno}: {ast.unparse(node)}"


@pytest.mark.parametrize(
    "line",
    [
        "def f(): return np.random.default_rng()",
        "def f(): return random.Random()",
        "def f(): torch.seed()",
        "def f(): return os.urandom(3)",
        "WEIGHT = torch.randn(3)",
    ],
)
def test_it_finds_them(line: str) -> None:
    assert len(list(draws(line))) == 1


@pytest.mark.parametrize(
    "line",
    [
        "def f(): return random.Random(3)",
        "def f(): return torch.randn(3)",
        "WEIGHT = torch.randn(3, generator=SEEDED)",
    ],
)
def test_it_leaves_the_others(line: str) -> None:
    assert not list(draws(line))


def test_no_test_draws_without_a_seed() -> None:
    found = {
        path.relative_to(TESTS).as_posix(): lines
        for path in sorted(TESTS.rglob("*.py"))
        if (lines := list(draws(path.read_text("utf-8"))))
    }
    assert not found


@pytest.fixture
def drawn() -> float:
    return torch.rand(()).item()


@pytest.fixture
def drawn_too() -> float:
    return torch.rand(()).item()


def test_fixtures_draw_by_their_names(drawn: float, drawn_too: float) -> None:
    here = torch.rand(()).item(), random.random(), numpy.random.random()
    assert len({drawn, drawn_too, *here}) == 5
    seed_by("drawn")
    assert torch.rand(()).item() == drawn
    seed_by("tests/test_draws.py::test_fixtures_draw_by_their_names")
    assert (torch.rand(()).item(), random.random(), numpy.random.random()) == here
