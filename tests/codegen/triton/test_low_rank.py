"""Kernels over features: keys are made and rotated within a tile, and mean what the operator says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import pytest

from einfold.compiler.analysis.cascade.plans import fold
from einfold.compiler.codegen.triton.ahead import compile_ahead
from einfold.compiler.codegen.triton.attention.cubins import variants
from einfold.compiler.codegen.triton.attention.kernels import attention_kernel
from einfold.compiler.codegen.triton.attention.low_rank import (
    STREAM,
    SUMMED,
    LowRankKind,
    low_rank_cascade,
    low_rank_types,
)
from einfold.compiler.codegen.triton.generate import generate
from einfold.compiler.codegen.triton.limits import exceeded, limits_of
from einfold.compiler.codegen.triton.options import DEVICES
from einfold.compiler.codegen.triton.shipped import triton_version
from einfold.errors import UnsupportedError

from ...quick import rarely
from .conftest import Ask, needs_triton

#: Two steps of features a key and a half; half of the key's channels are rotated with the other half.
ROTARY = LowRankKind(2, 2, 16, 24, 40, 13, 8, 0.25, 0.0, "fp32", "fp32")
PLAIN = replace(ROTARY, half=0)
MANY = SUMMED + 4


@pytest.fixture(scope="module")
def interpreter(interpreting: Callable[[str], Ask]) -> Ask:
    return interpreting("low_rank_worker")


@needs_triton
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (ROTARY, {}),
        (replace(ROTARY, key_rank=5, softcap=3.0), {"sinks": True}),
        (replace(ROTARY, key_size=17, half=6, features="fp16"), {"interleaved": True}),
        (replace(ROTARY, kv_heads=1, group=3, value_rank=MANY), {}),
        (PLAIN, {"sinks": True}),
        (replace(PLAIN, value_rank=MANY, features="fp16"), {}),
    ],
    ids=["rotary", "sinks", "a part rotated", "values made", "no rotary", "values made, no rotary"],
)
def test_kernels_do_what_the_operator_does(
    interpreter: Ask, kind: LowRankKind, options: dict[str, Any]
) -> None:
    """Rows with some, none and most of their tokens in no slot; one token whole, several in parts."""
    for new, parts in ((1, 1), (4, 2)):
        found = interpreter(kind=asdict(kind), new=new, parts=parts, **options)
        assert found["error"] < 2e-5, (new, parts)
        assert found["same caches"]


def test_no_keys_are_made_ahead_of_a_kernel(plan_cache: Any) -> None:
    """With rotation a KV head is a program; without, all heads read the features once, and share them."""
    made = attention_kernel(ROTARY, "tested", (0,), 4096, cache=plan_cache)
    division = made.kernel.division
    assert not division.ahead and [item.name for item in division.after] == ["out"]
    assert division.roles.grid == ("b", "k") and division.roles.rows == ("s", "g")
    source = made.kernel.functions["whole"].text
    assert source.count("for from_r in range(0, 40, 16):") == 1
    made = attention_kernel(PLAIN, "tested", (0,), 4096, cache=plan_cache)
    assert [item.name for item in made.kernel.division.ahead] == ["absorbed"]
    assert made.kernel.division.roles.rows == ("s", "k", "g")


@needs_triton
@pytest.mark.parametrize(
    ("capability", "head", "rank", "half"),
    [(80, 128, 208, 64), rarely(90, 128, 816, 64), rarely(90, 128, 45, 0)],
    ids=["a fifth of 8 heads", "values made", "rows that begin anywhere"],
)
def test_kernels_fit_the_gpu_that_they_are_compiled_for(
    capability: int, head: int, rank: int, half: int, plan_cache: Any
) -> None:
    kind = LowRankKind(8, 4, head, head, rank, rank, half, 0.09, 0.0, "fp32", "fp32")
    made = attention_kernel(kind, "tested", (0,), 8192, DEVICES[capability], plan_cache)
    for variant in variants(made):
        if variant.name in ("prefill", "decode", "part8"):
            found = compile_ahead(made.kernel, capability, variant.kind, variant.tiles)
            limits = limits_of(triton_version(), capability)
            assert exceeded(made.kernel, found, limits) == []


def test_only_sums_are_walked() -> None:
    """What a step of a walked rank gives must be no more than a term of a sum."""
    kind = replace(ROTARY, value_rank=MANY)
    folding = fold(low_rank_cascade(kind), STREAM)
    assert folding.plan is not None
    sizes = {"b": 1, "s": 4, "t": 64, **kind.sizes}
    with pytest.raises(UnsupportedError, match="lower is no sum over one of h alone"):
        generate(folding.plan, low_rank_types(kind), sizes, walked=("h",))
