"""Runs in the arena that come again are captured and replayed, over simulated CUDA graphs."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

from einfold.compiler.ir.interpreter import Interpreter
from einfold.compiler.ir.ops.norm import rms_norm_reference
from einfold.compiler.ir.ops.record import in_place
from einfold.compiler.memory.arena import InArena
from einfold.compiler.memory.captured import KEPT
from einfold.compiler.memory.expand import INSTEAD

from ..programs import program
from ..simulated_graphs import SimulatedGraphs

SMALL = """
    weight @w : f32[8]
    input %x "x" : f32[B, 8]
    read %w "w" : f32[8]
    call %a = aten.mul.Tensor(%x, %w) : f32[B, 8]
    call %n = einfold.rms_norm.default(%a, %w, 1e-06) : f32[B, 8]
    call %b = aten.exp.default(%n) : f32[B, 8]
    call %c = aten.neg.default(%b) : f32[B, 8]
    output "c" = %c
"""


def made(text: str = SMALL) -> tuple[InArena, Interpreter, SimulatedGraphs]:
    """A program in an arena whose runs are captured, and as ever."""
    found, graphs, kept = program(text), SimulatedGraphs(), {"w": torch.rand(8) + 0.5}
    arena = InArena(found, instead={}, kept=kept, capture=graphs)
    return arena, Interpreter(found, kept=kept, instead=in_place()), graphs


def test_the_second_run_over_the_same_memory_is_captured() -> None:
    arena, plain, graphs = made()
    x = torch.empty(3, 8)
    for turn in range(5):
        x.uniform_()
        expected = plain.run({"x": x})["c"]
        assert torch.allclose(arena.run({"x": x})["c"], expected)
        assert (graphs.captured, graphs.replayed) == (turn > 0, turn)


def test_memory_that_lies_elsewhere_is_captured_anew() -> None:
    """So many places are kept, those that were used last."""
    arena, plain, graphs = made()
    given = [torch.rand(3, 8) for _ in range(KEPT + 1)]

    def run(x: torch.Tensor) -> None:
        assert torch.allclose(arena.run({"x": x})["c"], plain.run({"x": x})["c"])

    for x in given:
        for _ in range(3):
            run(x)
    assert (graphs.captured, graphs.replayed) == (KEPT + 1, 2 * (KEPT + 1))
    run(given[-1])
    run(given[0])  # it went
    assert graphs.replayed == 2 * (KEPT + 1) + 1


def test_a_larger_arena_forgets_what_was_captured_in_the_smaller() -> None:
    arena, plain, graphs = made()
    small, large = torch.rand(2, 8), torch.rand(64, 8)
    for x in (small, small, small, large, small, small, small):
        assert torch.allclose(arena.run({"x": x})["c"], plain.run({"x": x})["c"])
    assert graphs.captured == 2


def test_what_is_written_in_place_is_given_back_and_not_held() -> None:
    arena, plain, graphs = made("""
        input %x "x" : f32[2, 8]
        input %cache "cache" : f32[4, 8]
        input %at "at" : i64[2]
        call %a = aten.exp.default(%x) : f32[2, 8]
        call %written = aten.index_copy_.default(%cache, 0, %at, %a) : f32[4, 8]
        call %total = aten.sum.dim_IntList(%written, [0]) : f32[8]
        output "cache" = %written
        output "total" = %total
    """)
    x, at, cache = torch.rand(2, 8), torch.tensor([0, 1]), torch.zeros(4, 8)
    beside = cache.clone()
    for turn in range(5):
        x.uniform_()
        at.fill_(0).add_(torch.tensor([turn % 4, (turn + 1) % 4]))
        found = arena.run({"x": x, "cache": cache, "at": at})
        expected = plain.run({"x": x, "cache": beside, "at": at})
        assert found["cache"].data_ptr() == cache.data_ptr()
        assert torch.equal(cache, beside) and torch.equal(found["total"], expected["total"])
    assert graphs.replayed == 4
    gone = weakref.ref(cache)
    del cache, found
    graphs.forget()  # CUDA holds addresses alone
    gc.collect()
    assert gone() is None


def broken(run: Callable[[], None]) -> Any:
    raise RuntimeError("CUDA error: operation not permitted when stream is capturing")


def test_a_run_that_cannot_be_captured_is_run_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """And is not tried again."""
    arena, plain, graphs = made()
    tried = []
    monkeypatch.setattr(graphs, "capture", lambda run: (tried.append(run), broken(run)))
    x = torch.empty(3, 8)
    for _ in range(4):
        x.uniform_()
        assert torch.allclose(arena.run({"x": x})["c"], plain.run({"x": x})["c"])
    assert len(tried) == 1


def test_a_call_that_asks_what_its_tensors_hold_keeps_its_plan_from_being_captured() -> None:
    found, graphs = program(SMALL), SimulatedGraphs()
    node = next(node for node in found.graph.nodes if node.name == "n")
    asked = []

    def whole(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        asked.append(float(x.sum()))  # the meta device has none
        return rms_norm_reference(x, weight, eps)

    kept = {"w": torch.rand(8)}
    arena = InArena(found, instead={node: whole}, kept=kept, capture=graphs)
    x = torch.rand(3, 8)
    for _ in range(4):
        assert torch.allclose(
            arena.run({"x": x})["c"], Interpreter(found, kept=kept).run({"x": x})["c"]
        )
    [planned] = arena._runs.values()
    assert any(INSTEAD in node.meta for node in planned._interpreter.program.graph.nodes)
    assert len(asked) == 4 and not graphs.captured


def test_weights_that_move_keep_all_runs_from_being_captured() -> None:
    found, graphs = program(SMALL), SimulatedGraphs()
    kept, x = {"w": torch.rand(8)}, torch.rand(3, 8)
    arena = InArena(found, instead={}, kept=kept, moving={"w"}, capture=graphs)
    for _ in range(4):
        kept["w"] = torch.rand(8)
        expected = Interpreter(found, kept=kept).run({"x": x})["c"]
        assert torch.allclose(arena.run({"x": x})["c"], expected)
    assert not graphs.captured
