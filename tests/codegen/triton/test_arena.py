"""What a step computes between its inputs and its logits lies in one arena, launches of kernels included."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import einfold
from einfold.compiler.codegen.triton.starting import start
from einfold.compiler.memory.recording import recorded, runs_on
from einfold.compiler.memory.survey import META
from einfold.errors import IRError

from ...quick import rarely
from .conftest import Ask, needs_triton
from .test_artifact import CROSS, CSKV, KIVI, LANDMARKS, QUEST

INT4 = {"weights": {"format": "int4", "head": "int8"}}


@pytest.fixture(scope="module")
def interpreter(interpreting: Callable[[str], Ask]) -> Ask:
    return interpreting("artifact_worker")


@needs_triton
@pytest.mark.parametrize(
    ("name", "recipe", "blocks"),
    [
        ("llama", {}, 0),
        rarely("gemma2", {}, 0),
        rarely("gpt_oss", {}, 0),
        # torch.topk, over the pages of each layer, takes memory of its own; outlier pages ask for another.
        ("llama", {"cache": {"storage": "int8", "read": QUEST}}, 4),
        rarely("llama", {"cache": {"read": LANDMARKS}}, 10),
        rarely("llama", {"cache": {"storage": "int4"}}, 0),
        rarely("llama", {"cache": {"storage": "int4", "share": CROSS}}, 0),
        ("llama", {"cache": {"quant": KIVI}}, 0),
        rarely("llama", {"cache": {"share": CSKV}}, 0),
        ("llama", INT4, 0),
    ],
)
def test_steps_give_the_same_bits_and_allocate_nothing(
    interpreter: Ask,
    model_folder: Callable[[str], Path],
    tmp_path: Path,
    name: str,
    recipe: dict[str, Any],
    blocks: int,
) -> None:
    out = tmp_path / "out"
    einfold.compile(model_folder(name), out, target="triton", recipe=recipe, check=False)
    prompts = [list(range(3, 23)), [7, 5, 90]]
    found = interpreter(what="arena", artifact=str(out), prompts=prompts, new=4)
    assert len(found["same"]) > 8 and all(found["same"])
    assert found["arena"] > 0 and found["kept"]
    assert found["replayed"] > 4, "steps of single tokens were captured"
    assert found["allocated"] and max(found["allocated"]) <= blocks


def test_a_launch_is_written_down_and_keeps_to_its_strides() -> None:
    started: list[Any] = []

    class Function:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *values, **constants: started.append((grid, values, constants))

    x = torch.empty(2, 3, device="meta")
    start(Function(), (4,), [x, 7, None], {"SIZE": 8})
    assert not started, "where nothing is written down, nothing happens without numbers"
    with recorded(torch.device("cpu")) as found:
        y = torch.empty_like(x)
        start(Function(), (4,), [x, 7, y, None], {"SIZE": 8})
        assert runs_on(x) == torch.device("cpu")
    assert runs_on(x) == META
    launch = found.calls[-1]
    assert launch.args == (x, y)
    here, there = torch.zeros(2, 3), torch.ones(2, 3)
    launch.target(here, there)
    assert started == [((4,), (here, 7, there, None), {"SIZE": 8})]
    with pytest.raises(IRError, match="other strides"):
        launch.target(x, torch.empty(3, 2, device="meta").mT)
