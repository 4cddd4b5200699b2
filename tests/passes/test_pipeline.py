from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from einfold.compiler.ir.program import Program
from einfold.compiler.passes.base import Pass, PassResult
from einfold.compiler.passes.fusion.fuse_linears import FuseLinears
from einfold.compiler.passes.raising.raise_linears import RaiseLinears
from einfold.compiler.pipeline import PassManager, language_model_passes
from einfold.errors import IRError

from ..programs import program

BODY = """
    input %x "x" : f32[B, 4]
    call %y = aten.neg.default(%x) : f32[B, 4]
    call %z = aten.exp.default(%y) : f32[B, 4]
    output "z" = %z
"""
LINEAR = """
    weight @w : f32[3, 4]
    input %x "x" : f32[B, 4]
    read %w "w" : f32[3, 4]
    call %y = aten.linear.default(%x, %w) : f32[B, 3]
    output "y" = %y
"""


@dataclass(frozen=True)
class Breaker(Pass):
    name = "breaker"

    def run(self, program: Program) -> PassResult:
        first, second = list(program.graph.nodes)[1:3]
        first.update_arg(0, second)
        return PassResult(changed=True)


def test_a_pass_that_breaks_the_program_is_named() -> None:
    with pytest.raises(IRError, match="pass breaker broke the program"):
        PassManager([Breaker()]).run(program(BODY))


@dataclass(frozen=True)
class Liar(Pass):
    """Promises what it does not do."""

    name = "liar"
    ensures = frozenset({"linears raised"})

    def run(self, program: Program) -> PassResult:
        return PassResult()


@dataclass(frozen=True)
class Speller(Pass):
    name = "speller"
    ensures = frozenset({"spelling checked"})

    def run(self, program: Program) -> PassResult:
        return PassResult()


def test_a_pass_that_comes_too_early_is_refused() -> None:
    with pytest.raises(
        IRError,
        match="fuse_linears needs what does not hold before it, 'linears raised': No product",
    ):
        PassManager([FuseLinears()]).run(program(LINEAR))
    PassManager([RaiseLinears(), FuseLinears()]).run(program(LINEAR))


def test_a_pass_that_breaks_its_promise_is_named() -> None:
    with pytest.raises(IRError, match="liar did not do what it ensures, 'linears raised': No pro"):
        PassManager([Liar()]).run(program(LINEAR))
    with pytest.raises(IRError, match="unknown fact 'spelling checked'; known: cache attached"):
        PassManager([Speller()]).run(program(LINEAR))


def test_dumps_and_progress(tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    records = PassManager(language_model_passes()[:3], tmp_path, lambda *a: told.append(a)).run(
        program(BODY)
    )
    names = [record.name for record in records]
    assert names == [name for name, _, _ in told]
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "00-captured.eir",
        *(f"{i:02d}-{n}.eir" for i, n in enumerate(names, 1)),
    ]
    assert all(record.seconds >= 0 for record in records)


def test_every_pass_says_what_it_is() -> None:
    for step in language_model_passes():
        assert step.name
        assert type(step).__doc__
        assert isinstance(step.options(), dict)
