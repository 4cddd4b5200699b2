"""What `estimate` promises holds: the memory of a process that runs the artifact, measured from outside."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import einfold
from einfold.errors import RecipeError

from .. import models
from ..quick import rarely

TOKENS = 500

#: Loads an artifact, fills the context, and tells the largest resident memory of the process, in bytes.
_RUN = """
import sys, einfold
model = einfold.load(sys.argv[1], threads=1)
model.generate(list(range(3, 3 + int(sys.argv[2]))), max_new_tokens=4, ignore_eos=True)
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(int(status["VmHWM"].split()[0]) * 1024)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose weights, 40 MB in float32, show beside the process."""
    return models.save(
        "llama",
        tmp_path_factory.mktemp("resident") / "model",
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        vocab_size=6000,
        max_position_embeddings=TOKENS + 4,
    )


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
@pytest.mark.parametrize(
    "options",
    [
        {"weights": "int4"},
        *(
            rarely(options)
            for options in (
                {},
                {"weights": "int8", "cache": "int8"},
                {"weights": "fp16"},
                {"weights": "int4", "portable": True},
                {"weights": "int4", "quant": "turboquant:residual=32,slack=32"},
                {"target": "reference"},
            )
        ),
    ],
    ids=["int4", "fp32", "int8", "fp16", "portable", "packed", "reference"],
)
def test_a_run_holds_no_more_than_was_promised(
    options: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    few = {"calibration": {"tokens": 256}}  # what weights are solved on is not looked at here
    einfold.compile(folder, tmp_path / "a", check=False, recipe=few, **options)
    told = einfold.estimate(folder, budget=1 << 40, **options)
    run = [sys.executable, "-c", _RUN, str(tmp_path / "a"), str(TOKENS)]
    done = subprocess.run(run, capture_output=True, text=True, check=True)
    held = int(done.stdout)
    assert 0.3 * told.resident < held <= told.resident
    exact = einfold.estimate(folder, budget=told.resident, **options)
    assert exact.largest_context == told.largest_context == TOKENS + 4
    less = einfold.estimate(folder, budget=told.weights + told.process, **options)
    assert less.largest_context == 0


#: The same within a budget: the largest resident memory, and the bytes that were read from the disk.
_RUN_WITHIN = (
    _RUN.replace("threads=1)", "threads=1, memory=int(sys.argv[3]), context=504)")
    + """
print(model.engine.runner.fetched)
"""
)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_a_run_within_a_budget_holds_no_more_than_its_plan(folder: Path, tmp_path: Path) -> None:
    einfold.compile(folder, tmp_path / "a", check=False, recipe="int4")
    with pytest.raises(RecipeError) as told:
        einfold.plan(tmp_path / "a", memory=1, context=TOKENS + 4)
    least = int(str(told.value).split("too small: ")[1].split(" are needed")[0].replace(",", ""))
    plan = einfold.plan(tmp_path / "a", memory=least, context=TOKENS + 4)
    run = [sys.executable, "-c", _RUN_WITHIN, str(tmp_path / "a"), str(TOKENS), str(least)]
    done = subprocess.run(run, capture_output=True, text=True, check=True)
    held, fetched = map(int, done.stdout.split())
    assert held <= plan.tiers.peak <= least
    # A prompt in one step, and three tokens. A unit that was let go of and is there still is not read again,
    # and the reader may have begun a step more.
    assert 2 * plan.tiers.fetched < fetched < 5 * plan.tiers.fetched
