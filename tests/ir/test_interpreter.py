"""What the interpreter holds of a program's weights while it runs."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace

import pytest
import torch

from einfold.compiler.calibrate.snapshot import text_inputs
from einfold.compiler.driver import wrap_model
from einfold.compiler.frontend.export import capture_language_model
from einfold.compiler.ir.interpreter import Interpreter, Run
from einfold.compiler.ir.program import Program

from .. import models

TEXT = torch.arange(8)[None]


@pytest.fixture
def program() -> Program:
    found = wrap_model(models.build("llama"))
    program = capture_language_model(found.source, found.config, models.CONTEXT, found.state)
    first = next(n for n, node in enumerate(program.graph.nodes) if node.op == "call_function")
    named = [n for n, node in enumerate(program.graph.nodes) if node.op == "get_attr"]
    assert (
        len([n for n in named if n < first]) > len(named) / 2
    )  # a trace names them before it calls
    return program


def _told(program: Program, alive: weakref.WeakSet[torch.Tensor]) -> list[int]:
    """Has each weight give a copy; how many of these there are beside it whenever one is loaded."""
    most = list[int]()

    for name in list(program.weights):
        weight = program.weights[name]

        def load(weight: object = weight) -> torch.Tensor:
            gc.collect(1)  # what is older was there before, and is much in a process of many tests
            most.append(len(alive))
            copy: torch.Tensor = weight.load().clone()  # type: ignore[attr-defined]
            alive.add(copy)
            return copy

        program.weights.restore({name: replace(weight, load=load)})
    return most


def test_one_call_s_weights_are_held_at_a_time(program: Program) -> None:
    want = Interpreter(program).run(text_inputs(TEXT))["logits"]
    alive = weakref.WeakSet[torch.Tensor]()
    beside = _told(program, alive)
    got = Interpreter(program, keep_weights=False).run(text_inputs(TEXT))["logits"]
    assert torch.equal(got, want)
    assert len(beside) >= len(list(program.weights)) and max(beside) <= 2
    kept = Interpreter(program)
    kept.run(text_inputs(TEXT))
    count = len(beside)
    kept.run(text_inputs(TEXT))
    assert len(beside) == count, "kept weights were loaded again"


def test_a_run_goes_on_where_another_stood_with_no_weights_between(program: Program) -> None:
    interpreter = Interpreter(program, keep_weights=False)
    want = interpreter.run(text_inputs(TEXT))["logits"]
    calls = [node for node in program.graph.nodes if node.op == "call_function"]
    for stop in calls[len(calls) // 3 :: len(calls) // 3]:
        run = Run(interpreter, text_inputs(TEXT))
        run.until(stop)
        names = {node.name for node in program.graph.nodes if node.op == "get_attr"}
        assert names.isdisjoint(run.known)
        alive = weakref.WeakSet[torch.Tensor]()
        beside = _told(program, alive)
        later = Run(interpreter, text_inputs(TEXT), stop, run.known)
        assert not beside
        assert torch.equal(later.results()["logits"], want)
