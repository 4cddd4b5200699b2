"""Numbers of directions that are given to heads and layers, and graphs that are cut to them."""

from __future__ import annotations

import pytest
import torch

from benchmarks import head_bases
from einfold.compiler.calibrate.orthogonal import PARTS
from einfold.compiler.calibrate.snapshot import all_inputs
from einfold.compiler.calibrate.statistics import Statistics
from einfold.compiler.ir.interpreter import Interpreter

from ..passes.test_cross_layer import planned
from ..passes.test_matryoshka_kv import TEXT


def found_of(*costs: tuple[float, float]) -> head_bases.Found:
    """Layers of two heads whose keys lose so much with each part less; values a tenth of it."""
    steps = torch.arange(PARTS - 1, 0, -1) / PARTS
    return {
        number: {
            "key": torch.eye(8).repeat(2, 1, 1),
            "value": torch.eye(8).repeat(2, 1, 1),
            "key_error": torch.tensor(each)[:, None] * steps,
            "value_error": torch.tensor(each)[:, None] * steps / 10,
        }
        for number, each in enumerate(costs)
    }


@pytest.mark.parametrize("by", ["layer", "head"])
@pytest.mark.parametrize("parts", [2, 4, 6])
def test_as_many_are_kept_in_all(by: str, parts: int) -> None:
    kept = head_bases.chosen(found_of((1.0, 3.0), (0.1, 0.2)), parts, by)
    assert sum(int(each.sum()) for each in kept.values()) == 8 * parts
    assert all(1 <= int(count) <= PARTS for each in kept.values() for count in each.flatten())
    assert int(kept[0][0].sum()) >= int(kept[1][0].sum())
    less, more = kept[0][0].tolist()
    assert less == more if by == "layer" else less < more or more == PARTS


def test_a_cut_graph_is_the_model_where_all_is_kept() -> None:
    found = planned(0, 3)
    found.statistics = Statistics(lambda: (TEXT, "a text"))
    known = head_bases.bases(found, 0)
    want, *rest = (
        Interpreter(each).run(all_inputs(found, TEXT))["logits"]
        for each in (
            found,
            *(head_bases.cut(found, known, head_bases.uniform(known, n)) for n in (PARTS, 4)),
        )
    )
    torch.testing.assert_close(rest[0], want, rtol=1e-3, atol=1e-3)
    assert float((rest[1] - want).norm() / want.norm()) > 0.1
