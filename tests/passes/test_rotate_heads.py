"""Heads that are rotated around attention: the graph, and the same numbers where nothing is rounded."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from einfold.compiler.ir.kv.keep.window import Window
from einfold.compiler.ir.kv.layout import CacheLayout
from einfold.compiler.ir.parser import parse
from einfold.compiler.ir.printer import print_program
from einfold.compiler.ir.program import Program
from einfold.compiler.ir.quant.hadamard import hadamard
from einfold.compiler.ir.verifier import verify
from einfold.compiler.layer_program import layer_programs
from einfold.compiler.passes.cache.attach_cache import AttachCache
from einfold.compiler.passes.cache.plan_cache import PlanCache

from ..methods import chosen
from ..programs import calls, program, run

#: Keys of KEY numbers behind a rotary embedding, values of VALUE.
BODY = """
    weight @cos : f32[64, 4]
    weight @sin : f32[64, 4]
    input %ids "input_ids" : i64[B, S]
    input %pos "position_ids" : i64[B, S]
    input %q "q" : f32[B, S, 4, KEY]
    input %k "k" : f32[B, S, 2, KEY]
    input %v "v" : f32[B, S, 2, VALUE]
    read %cos "cos" : f32[64, 4]
    read %sin "sin" : f32[64, 4]
    call %rq = einfold.rotary(%q, %pos, %cos, %sin, false) : f32[B, S, 4, KEY]
    call %rk = einfold.rotary(%k, %pos, %cos, %sin, false) : f32[B, S, 2, KEY]
    call %o = einfold.attention(%rq, %rk, %v, none, 3, 0.25, 0, 0.0) : f32[B, S, 4, VALUE]
    output "o" = %o
"""
TEXT = {"group": 8, "residual": 8, "slack": 4}


def planned(
    method: str, options: dict[str, Any], key: int = 8, value: int = 8, *, mixed: bool = False
) -> Program:
    """A layer before its cache is attached; where `mixed`, its first head keeps a plain window."""
    found = program(BODY.replace("KEY", str(key)).replace("VALUE", str(value)))
    PlanCache().run(found)
    if mixed:
        assert found.layout is not None
        layer = found.layout[3]
        whole = layer.groups[0]
        groups = (replace(whole, heads=(0,), policy=Window(4, 32)), replace(whole, heads=(1,)))
        found.layout = CacheLayout((replace(layer, groups=groups),))
    chosen(method, **options).run(found)
    return found


def rotating(rotate: str, **options: Any) -> Program:
    return planned("kivi", TEXT | {"rotate": rotate}, **options)


def attached(rotate: str, **options: Any) -> Program:
    found = rotating(rotate, **options)
    AttachCache().run(found)
    verify(found, deep=True)
    return found


def outputs(found: Program, q: Tensor, k: Tensor, v: Tensor) -> dict[str, Tensor]:
    """Of a step whose tokens all stay in the slots."""
    assert found.layout is not None
    buffers = {
        b.name: torch.zeros(b.shape) for b in found.layout.buffers(1, 40) if len(b.shape) == 4
    }  # type: ignore[arg-type]
    bulk = {
        b.name: torch.zeros(b.shape, dtype=torch.uint8 if b.dtype == "u8" else torch.float16)  # type: ignore[arg-type]
        for b in found.layout.buffers(1, 40)
        if len(b.shape) == 5
    }
    counters = {
        node.target: torch.zeros(1, dtype=torch.int64)
        for node in found.placeholders()
        if str(node.target).startswith(("lengths", "slots", "packed"))
    }
    ids, positions = torch.zeros(1, 7, dtype=torch.int64), torch.arange(7)[None]
    given = {"input_ids": ids, "position_ids": positions, "q": q, "k": k, "v": v}
    return run(found, **given, **buffers, **bulk, **counters)  # type: ignore[arg-type]


def test_the_rotation_stands_around_attention() -> None:
    found = attached("both")
    got = [call.partition(", [")[0] for call in calls(found) if "getitem" not in call]
    assert got == [
        "einfold.rotary(%q, %position_ids, %cos, %sin, false)",
        "einfold.linear(%1, %hadamard.8, none)",
        "einfold.rotary(%k, %position_ids, %cos, %sin, false)",
        "einfold.linear(%3, %hadamard.8, none)",
        "einfold.linear(%v, %hadamard.8, none)",
        "einfold.packed_attention(%2, %4, %5, %cache.3.0.key, %cache.3.0.value, %slots.0, %packed.0",
        "einfold.linear(%7, %hadamard.8, none)",
    ]
    assert "keys=channel,rotate=both" in print_program(found)
    of_values = [call for call in calls(attached("values")) if "rotary" in call]
    assert not of_values  # the operator turns queries and keys, as it does without rotation


@pytest.mark.parametrize("rotate", ["keys", "values", "both"])
@pytest.mark.parametrize(
    ("sizes", "mixed"), [({"key": 8, "value": 8}, False), ({"key": 24, "value": 40}, True)]
)
def test_nothing_changes_but_what_the_slots_hold(
    rotate: str, sizes: dict[str, int], mixed: bool
) -> None:
    torch.manual_seed(0)
    q, k = torch.randn(1, 7, 4, sizes["key"]), torch.randn(1, 7, 2, sizes["key"])
    v = torch.randn(1, 7, 2, sizes["value"])
    want = outputs(attached("none", mixed=mixed, **sizes), q, k, v)
    got = outputs(attached(rotate, mixed=mixed, **sizes), q, k, v)
    torch.testing.assert_close(got["o"], want["o"], rtol=0, atol=1e-5)
    for name in want.keys() - {"o"}:
        turned = rotate == "both" or rotate.startswith(name.rpartition(".")[2])
        # A head that keeps a window is not packed, so it stays as it was.
        turned &= not mixed or ".1." in name
        expected = hadamard(want[name]) if turned else want[name]
        torch.testing.assert_close(got[name], expected, rtol=0, atol=1e-5)


def test_a_layer_by_itself_rotates_too() -> None:
    """What `cache_for` runs in transformers, whose q and k come behind their rotary embedding."""
    (made,) = layer_programs(rotating("both")).values()
    assert [call.partition("(")[0] for call in calls(made) if "getitem" not in call] == [
        *["einfold.linear"] * 3,
        "einfold.packed_attention",
        "einfold.linear",
    ]


def test_a_text_from_before_there_was_a_rotation_is_read() -> None:
    text = print_program(attached("none")).replace(",rotate=none", "")
    verify(parse(text))
