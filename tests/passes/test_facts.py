"""Each fact on a program where it holds and on one where it does not; and every pass names known facts."""

from __future__ import annotations

import pytest

from einfold.compiler.ir.program import Program
from einfold.compiler.passes.base import Pass
from einfold.compiler.passes.cache.attach_cache import AttachCache
from einfold.compiler.passes.cache.plan_cache import PlanCache
from einfold.compiler.passes.facts import FACTS, failing
from einfold.compiler.passes.raising.raise_linears import RaiseLinears
from einfold.compiler.passes.raising.raise_norms import RaiseNorms
from einfold.compiler.pipeline import language_model_passes, module_passes
from einfold.compiler.recipe import Recipe

from ..programs import program

ATTENTION = """
    input %q "q" : f32[B, S, 4, 8]
    input %k "k" : f32[B, S, 2, 8]
    call %o = einfold.attention(%q, %k, %k, none, 3, 0.25, 5, 0.0) : f32[B, S, 4, 8]
    output "o" = %o
"""
X = """
    weight @w : f32[4, 4]
    weight @n : f32[4]
    input %x "x" : f32[B, 4]
    read %w "w" : f32[4, 4]
    read %n "n" : f32[4]
"""
SPELLINGS = [
    ("linears raised", "call %y = aten.linear.default(%x, %w) : f32[B, 4]"),
    ("linears raised", "call %y = aten.mm.default(%x, %w) : f32[B, 4]"),
    ("linears raised", "call %y = aten.addmm.default(%n, %x, %w) : f32[B, 4]"),
    ("norms raised", "call %y = aten.layer_norm.default(%x, [4], %n) : f32[B, 4]"),
    (
        "norms raised",
        """call %a = aten.pow.Tensor_Scalar(%x, 2) : f32[B, 4]
        call %b = aten.mean.dim(%a, [-1], true) : f32[B, 1]
        call %c = aten.add.Tensor(%b, 1e-05) : f32[B, 1]
        call %d = aten.rsqrt.default(%c) : f32[B, 1]
        call %y = aten.mul.Tensor(%x, %d) : f32[B, 4]""",
    ),
]
#: What the pass leaves, which breaks no promise.
LEFT = [
    "call %y = aten.mm.default(%x, %x) : f32[4, 4]",
    "call %y = aten.addmm.default(%n, %x, %w, alpha=2) : f32[4, 4]",
]


def holds(name: str, found: Program) -> bool:
    return not failing(found, frozenset({name}))


@pytest.mark.parametrize(("name", "lines"), SPELLINGS)
def test_spellings(name: str, lines: str) -> None:
    found = program(X + lines + '\noutput "y" = %y')
    assert not holds(name, found)
    RaiseLinears().run(found)
    RaiseNorms().run(found)
    assert holds(name, found)


@pytest.mark.parametrize("lines", LEFT)
def test_what_cannot_be_raised_breaks_no_promise(lines: str) -> None:
    found = program(X.replace("[B, 4]", "[4, 4]") + lines + '\noutput "y" = %y')
    assert holds("linears raised", found)


def test_the_cache() -> None:
    found = program(ATTENTION)
    assert not holds("cache planned", found) and not holds("cache attached", found)
    PlanCache().run(found)
    assert holds("cache planned", found) and not holds("cache attached", found)
    AttachCache().run(found)
    assert holds("cache attached", found)
    assert not holds("cache planned", found), "what refines the layout comes too late now"


def test_a_program_without_attention_has_nothing_to_plan() -> None:
    found = program(X + 'call %y = aten.neg.default(%x) : f32[B, 4]\noutput "y" = %y')
    assert all(holds(name, found) for name in FACTS)


def test_every_pass_names_facts_that_there_are() -> None:
    steps: list[Pass] = [*language_model_passes(), *module_passes()]
    steps += Recipe().weight_passes() + Recipe().cache_passes()
    for step in steps:
        assert step.requires | step.ensures <= FACTS.keys(), step.name
    assert all(function.__doc__ for function in FACTS.values())
