"""Budgets that are scaled to the length of a prompt, as shares of prompts are measured."""

from __future__ import annotations

from benchmarks import kept_tokens
from einfold.compiler.ir.kv.keep.expected import Expected
from einfold.compiler.ir.kv.keep.full import Full
from einfold.compiler.ir.kv.keep.policy import Policy
from einfold.compiler.ir.kv.keep.voted import Voted
from einfold.compiler.ir.kv.layout import CacheLayout, HeadGroup, LayerCache
from einfold.compiler.recipe import Recipe


def scaled(ratio: float, *policies: Policy) -> list[Policy]:
    groups = tuple(HeadGroup((head,), policy) for head, policy in enumerate(policies))
    layout = CacheLayout((LayerCache(0, len(groups), 8, 8, groups),))
    return [group.policy for _, _, group in kept_tokens.scaled(layout, ratio).groups()]


def test_budgets_are_scaled() -> None:
    half, fixed, voted = Expected(tokens=100), Expected(tokens=101, recent=32), Voted(tokens=102)
    found = scaled(4.0, half, fixed, voted, Full())
    assert [policy.lead + policy.newest for policy in found[:3]] == [400, 404, 408]
    assert [policy.newest for policy in found[:3]] == [200, 32, 32]
    assert found[3] == Full()


def test_budgets_that_differ_still_do() -> None:
    """The graph has a counter of slots for each."""
    found = scaled(0.05, *(Expected(tokens=tokens) for tokens in (40, 48, 56, 800)))
    assert [policy.lead + policy.newest for policy in found] == [8, 9, 10, 40]


def test_rows_are_recipes() -> None:
    rows = list(kept_tokens.rows())
    assert len({(name, shares) for name, _, shares in rows}) == len(rows)
    for _, prune, shares in rows:
        Recipe.build({"cache": {"prune": prune}})
        assert set(shares) <= set(kept_tokens.SHARES)
