"""Kernels over features: keys are made and rotated within a tile, and mean what the operator says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from typing import Any

import pytest

from einfold.compiler.attention_kernels.cubins import triton_version, variants
from einfold.compiler.attention_kernels.kernels import attention_kernel
from einfold.compiler.attention_kernels.low_rank import SUMMED, LowRankKind
from einfold.compiler.codegen.triton.limits import exceeded, limits_of
from einfold.compiler.codegen.triton.options import DEVICES

from .conftest import asking, needs_triton

Ask = Callable[..., dict[str, Any]]

#: Two steps of features a key and a half; half of the key's channels are rotated with the other half.
ROTARY = LowRankKind(2, 2, 16, 24, 40, 13, 8, 0.25, 0.0, "fp32", "fp32")
PLAIN = replace(ROTARY, half=0)
MANY = SUMMED + 4


@pytest.fixture(scope="module")
def interpreter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ask]:
    with asking("tests.triton.low_rank_worker", tmp_path_factory.mktemp("cache")) as ask:
        yield ask


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
@pytest.mark.parametrize(("capability", "many"), [(80, False), (90, True)])
def test_kernels_fit_the_gpu_that_they_are_compiled_for(
    capability: int, many: bool, plan_cache: Any
) -> None:
    """A fifth of the channels of 8 heads of 128; or more features than a tile sums."""
    rank = 816 if many else 208
    kind = LowRankKind(8, 4, 128, 128, rank, rank, 64, 0.09, 0.0, "fp32", "fp32")
    made = attention_kernel(kind, "tested", (0,), 8162, DEVICES[capability], plan_cache)
    for variant in variants(made):
        if variant.name in ("prefill", "decode"):
            found = made.kernel.compile_ahead(capability, variant.kind, variant.tiles)
            limits = limits_of(triton_version(), capability)
            assert exceeded(made.kernel, found, limits) == []
