"""DuoAttention: which heads keep all, and what the gates are that say so."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from einfold.compiler.calibrate.head_gates import GatedReading, HeadGates, descend
from einfold.compiler.calibrate.observer import Found
from einfold.compiler.calibrate.statistics import Statistics
from einfold.compiler.ir.program import Program
from einfold.compiler.ir.verifier import verify
from einfold.compiler.passes.cache.attach_cache import AttachCache
from einfold.compiler.passes.cache.plan_cache import PlanCache
from einfold.compiler.passes.kv_prune.duo_attention import DuoAttention
from einfold.compiler.recipe import Recipe
from einfold.errors import CalibrationError, RecipeError

from ..calibrate.common import BODY
from ..programs import program, run

#: The body has keys and queries of four heads, and a second layer with a window of its own and a softcap.
TEXT = torch.randint(11, (40,), generator=torch.Generator().manual_seed(5))
ASKED = torch.randint(11, (2, 6), generator=torch.Generator().manual_seed(6))


def planned(body: str = BODY) -> Program:
    found = program(body)
    PlanCache().run(found)
    return found


class Known(Statistics):
    """Statistics with given gates in place of learned ones."""

    def __init__(self, gates: list[list[float]]) -> None:
        self.gates = gates

    def learned(self, program: Program, learner: HeadGates) -> dict[str, Found]:
        return {f"layer-{n}": {"gate": torch.tensor(each)} for n, each in enumerate(self.gates)}


def test_heads_with_the_largest_gates_keep_all() -> None:
    found = planned(BODY.replace(", 1, 0.5, 5, 3.0)", ", 1, 0.5, 0, 3.0)"))
    found.statistics = Known([[0.1, 0.9, 0.2, 1.0], [0.0, 0.3, 0.1, 0.0]])
    result = DuoAttention(full=0.375, sinks=2, recent=8, slack=4).run(found)
    assert found.layout is not None
    assert [(group.heads, group.policy.name) for _, _, group in found.layout.groups()] == [
        ((1, 3), "full"),
        ((0, 2), "window"),
        ((1,), "full"),
        ((0, 2, 3), "window"),
    ]
    assert [note.what for note in result.notes] == [
        "2 of 4 KV heads keep all; 2 keep 2 sinks and 8 recent tokens",
        "1 of 4 KV heads keep all; 3 keep 2 sinks and 8 recent tokens",
    ]
    AttachCache().run(found)
    verify(found, deep=True)


def test_without_weights_the_bytes_are_the_same() -> None:
    body = BODY.replace(", 1, 0.5, 5, 3.0)", ", 1, 0.5, 0, 3.0)")
    blind, seeing = planned(body), planned(body)
    seeing.statistics = Known([[1, 1, 0, 1], [0, 0, 0, 0]])
    notes = [
        DuoAttention(full=0.375, recent=8, slack=4).run(each).notes for each in (blind, seeing)
    ]
    assert blind.layout is not None and seeing.layout is not None
    assert blind.layout.lines() != seeing.layout.lines()
    assert blind.layout.account() == seeing.layout.account()
    assert [note.where for note in notes[0] if note.action == "skipped"] == ["heads"]


def test_what_cannot_be_is_refused() -> None:
    for options, message in (
        ({"full": 1.5}, "the share of KV heads that keep all, 0 to 1, not 1.5"),
        ({"steps": 0}, "on 1 or more tokens in 1 or more steps"),
        ({"recent": 0}, "cache.prune: a window keeps"),
    ):
        with pytest.raises(RecipeError, match=message):
            Recipe.build({"cache": {"prune": {"method": "duo_attention", **options}}})
    with pytest.raises(CalibrationError, match="text of 25 tokens 25 are read: give a longer text"):
        HeadGates(((0, 4),), 2, 4, 8).learn(planned(), TEXT[None, :25], lambda text, share: None)


def test_an_estimate_refuses_what_a_compile_does() -> None:
    """A context of 64, less a passage, is no more than what a window of 40 and a passage take."""
    body = BODY.replace(", 1, 0.5, 5, 3.0)", ", 1, 0.5, 0, 3.0)")
    method = DuoAttention(recent=40, slack=4)
    for statistics in (None, Known([[1, 0, 0, 0], [1, 0, 0, 0]])):
        found = planned(body)
        found.statistics = statistics
        with pytest.raises(CalibrationError, match="of 1024 tokens 48 are read"):
            method.run(found)


def test_gates_see_that_heads_stand_in_for_each_other() -> None:
    """Neither of the first two is missed alone, so that with all gates open their gradients are 0."""

    def loss(step: int, gates: Tensor) -> Tensor:
        shut = 1 - gates
        return 5 * shut[0] * shut[1] + shut[2] + 0.5 * shut[3]

    slopes = torch.autograd.functional.jacobian(lambda gates: loss(0, gates), torch.ones(4))
    assert slopes.tolist() == [0, 0, -1, -0.5]  # the best two by these are 2 and 3
    chosen = descend(loss, 4, 2, 24).topk(2).indices.tolist()
    assert 2 in chosen and {0, 1} & {*chosen}


def test_gates_are_learned_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And found again under the model, its graph, the text and the options."""
    gates = HeadGates(((0, 4),), 2, 2, 7, steps=2)
    text = TEXT.repeat(2)[None]

    def ask(learner: HeadGates, tokens: Tensor = text) -> dict[str, Found]:
        statistics = Statistics(lambda: (tokens, "a text"), lambda: "model", tmp_path)
        return statistics.learned(planned(), learner)

    first = ask(gates)["layer-0"]["gate"]
    assert first.shape == (4,) and 1.9 < float(first.sum()) < 4
    with monkeypatch.context() as patched:
        patched.setattr(HeadGates, "learn", lambda *given: pytest.fail("learned again"))
        torch.testing.assert_close(ask(gates)["layer-0"]["gate"], first)
        for other in (replace(gates, steps=3), replace(gates, layers=((1, 4),))):
            with pytest.raises(pytest.fail.Exception):
                ask(other)
        with pytest.raises(pytest.fail.Exception):
            ask(gates, text.flip(1))


def whole(found: Program, asked: Tensor, given: int) -> Tensor:
    """The loss of passages where the program reads text and passages at once."""
    tokens = torch.cat((TEXT, asked.flatten()))
    place = len(TEXT) + torch.arange(asked.numel()).reshape(asked.shape)[:, given:].flatten()
    positions = torch.arange(len(tokens))[None]
    out = run(found, input_ids=tokens[None], position_ids=positions, logit_rows=place - 1)
    return functional.cross_entropy(out["logits"], tokens[place])


def test_open_gates_are_the_model_and_a_closed_one_a_window() -> None:
    found = planned()
    reading = GatedReading(found, {0: 4}, sinks=2, recent=7)
    past = reading.read(TEXT)
    for given in (1, 4):
        full = reading.loss(past, ASKED, torch.ones(4), given)
        torch.testing.assert_close(full, whole(found, ASKED, given))
    closed = reading.loss(past, ASKED, torch.zeros(4), 1)
    assert (closed - whole(found, ASKED, 1)).abs() > 1e-3


def test_a_closed_gate_is_the_window_that_a_model_may_have() -> None:
    """Of one layer, whose keys hang on no attention before it, so that reading with a window changes none."""
    lines = [line for line in BODY.splitlines() if "%k2 =" not in line and "%o2 =" not in line]
    body = "\n".join(lines).replace("(%o2, -2, -1)", "(%o, -2, -1)")
    own = planned(body.replace(", 0, 0.5, 0, 0.0)", ", 0, 0.5, 7, 0.0)"))
    reading = GatedReading(planned(body), {0: 4}, sinks=0, recent=7)
    past = reading.read(TEXT)
    torch.testing.assert_close(reading.loss(past, ASKED, torch.zeros(4), 1), whole(own, ASKED, 1))
    assert (reading.loss(past, ASKED, torch.ones(4), 1) - whole(own, ASKED, 1)).abs() > 1e-3


def test_gates_are_derived() -> None:
    """The gradient against differences of the loss."""
    reading = GatedReading(planned(), {0: 4}, sinks=2, recent=7)
    past = reading.read(TEXT)
    gates = torch.tensor([0.9, 0.2, 0.5, 0.7], requires_grad=True)
    (slope,) = torch.autograd.grad(reading.loss(past, ASKED, gates, 2), gates)
    for head in range(4):
        step = torch.zeros(4)
        step[head] = 0.002
        up, down = (reading.loss(past, ASKED, gates.detach() + way * step, 2) for way in (1, -1))
        torch.testing.assert_close(slope[head], (up - down) / 0.004, rtol=1e-3, atol=5e-3)
    assert slope.abs().min() > 0.1
