from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import head_ablation
from benchmarks.head_ablation import Asked, OfHeads, page, recipes
from benchmarks.quality.subjects import Questions
from einfold.compiler.calibrate import stream as streaming
from einfold.compiler.calibrate.head_gates import GatedReading
from einfold.compiler.calibrate.observer import Found, Observer
from einfold.compiler.calibrate.sites import Site
from einfold.compiler.passes.cache.plan_cache import PlanCache
from einfold.compiler.passes.cache_methods import method_pass

from ..calibrate.common import BODY
from ..programs import program, run

TEXT = torch.randint(11, (9,), generator=torch.Generator().manual_seed(2))


class Whole(Observer):
    """All weights of each layer."""

    name = "whole"

    def begin(self, site: Site, *values: Any) -> None:
        self._blocks: list[Tensor] = []

    def block(self, start: int, weights_BHST: Tensor) -> None:
        self._blocks.append(weights_BHST)

    def end(self) -> Found:
        return {"weights": torch.cat(self._blocks, 2)[0]}


@pytest.mark.parametrize("block", [1 << 24, 4 * 18 * 4])
def test_reconstruction_is_the_most_attention_when_a_text_is_read_again(
    block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "_BLOCK", block)  # blocks of 4 rows end within the first reading
    twice, found = TEXT.repeat(2)[None], program(BODY)
    whole = streaming.stream(found, twice, [Whole()])
    scores = streaming.stream(found, twice, [OfHeads()])
    for layer in ("layer-0", "layer-1"):
        best_HT = whole[layer]["weights"][:, 9:, :9].amax(1)
        torch.testing.assert_close(scores[layer]["most"], best_HT.amax(1))
        torch.testing.assert_close(scores[layer]["mean"], best_HT.mean(1))


def test_an_answer_is_right_where_all_of_it_is_the_likeliest() -> None:
    found = program(BODY)
    PlanCache().run(found)
    reading = GatedReading(found, {0: 4}, sinks=2, recent=3)
    tokens = [*TEXT.tolist(), 3, 4]
    for _ in range(2):  # what the model would say, in place of what stands there
        out = run(
            found,
            input_ids=torch.tensor([tokens]),
            position_ids=torch.arange(len(tokens))[None],
            logit_rows=torch.arange(len(tokens)),
        )["logits"]
        tokens = [*tokens, int(out[-1].argmax())]
    answers = (range(11, 13), range(10, 12))
    asked = Asked(Questions(tokens, 8, answers, 1000), reading.read(torch.tensor(tokens[:7])))
    loss, right = asked.answers(reading, torch.ones(4))
    assert right.tolist() == [True, int(out[9].argmax()) == 4]
    wanted = -torch.log_softmax(out, -1)[torch.tensor([10, 11]), torch.tensor(tokens[11:13])].sum()
    torch.testing.assert_close(loss[0], wanted)


def test_the_page_says_how_many_heads_are_common() -> None:
    def row(*heads: int) -> dict[str, Any]:
        each = {"recall": 0.5, "loss": 1.25}
        return {"heads": [*heads], "1000": each, "4000": each}

    rows = {"every head": row(0, 1, 2), "asked, 2": row(0, 2), "echo, 2": row(1, 2)}
    lines = page({"choices": rows}).splitlines()
    assert lines[-3:] == [
        "| every head | 0.500 | 1.250 | 0.500 | 1.250 |  |",
        "| asked, 2 | 0.500 | 1.250 | 0.500 | 1.250 | 2 |",
        "| echo, 2 | 0.500 | 1.250 | 0.500 | 1.250 | 1 |",
    ]


def test_recipes_that_are_compared_keep_as_many_heads() -> None:
    known = dict(recipes())
    for count in head_ablation.COUNTS:
        razor, duo = (known[f"{name}, {count}"] for name in ("razor_attention", "duo_attention"))
        assert razor is not None and duo is not None
        made = method_pass("prune", razor), method_pass("prune", duo)
        induction, echo, full = made[0].induction, made[0].echo, made[1].full  # type: ignore[attr-defined]
        assert math.ceil(90 * induction) + math.ceil(90 * echo) == math.ceil(90 * full) == count
