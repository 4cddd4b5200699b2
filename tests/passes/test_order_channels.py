"""Channels that are put in order around attention: the graph, the orders, and the same numbers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from einfold.compiler.calibrate.observers.channel_orders import order_of
from einfold.compiler.ir.kv.layout import CacheLayout
from einfold.compiler.ir.ops.rotary import rotary_reference
from einfold.compiler.ir.program import Program
from einfold.compiler.ir.verifier import verify
from einfold.compiler.layer_program import layer_programs
from einfold.compiler.passes.cache.attach_cache import AttachCache
from einfold.compiler.passes.cache.plan_cache import PlanCache

from ..methods import chosen
from ..programs import calls, program
from .test_rotate_heads import outputs, planned

#: A layer behind an embedding, whose keys turn by position, and one that reads what it cached.
READERS = """
    weight @e : f32[11, 16]
    weight @cos : f32[64, 4]
    weight @sin : f32[64, 4]
    input %ids "input_ids" : i64[B, S]
    input %pos "position_ids" : i64[B, S]
    read %e "e" : f32[11, 16]
    read %cos "cos" : f32[64, 4]
    read %sin "sin" : f32[64, 4]
    call %x = einfold.embedding(%ids, %e) : f32[B, S, 16]
    call %h = aten.unflatten.int(%x, 2, [2, 8]) : f32[B, S, 2, 8]
    call %t = einfold.rotary(%h, %pos, %cos, %sin, false) : f32[B, S, 2, 8]
    call %a = einfold.attention(%t, %t, %h, none, 0, 0.25, 0, 0.0) : f32[B, S, 2, 8]
    call %o = einfold.attention(%t, %t, %h, none, 1, 0.25, 0, 0.0) : f32[B, S, 2, 8]
    output "a" = %a
    output "o" = %o
"""
TEXT = {"block": 8, "slack": 4, "tokens": 4}


def ordering(order: str, **options: Any) -> Program:
    """A layer before its cache is attached, with orders at random in the place of those of a text."""
    found = planned("abq", TEXT | {"order": order}, **options)
    generator = torch.Generator().manual_seed(3)
    for name, weight in found.cache_weights.items():
        heads, size = weight.shape
        order_KD = torch.stack([torch.randperm(size, generator=generator) for _ in range(heads)])
        found.cache_weights[name] = replace(weight, load=lambda order_KD=order_KD: order_KD)
    return found


def attached(order: str, **options: Any) -> tuple[Program, dict[str, Tensor]]:
    """With the orders that it was given, [heads, size] by their names."""
    found = ordering(order, **options)
    orders = {name: weight.load() for name, weight in found.cache_weights.items()}
    AttachCache().run(found)
    assert not found.cache_weights
    verify(found, deep=True)
    return found, orders


def test_the_order_stands_around_attention() -> None:
    found, _ = attached("both")
    got = [call.partition(", [%")[0] for call in calls(found) if "getitem" not in call]
    assert got == [
        "einfold.rotary(%q, %position_ids, %cos, %sin, false)",
        "aten.flatten.using_ints(%1, 2, 3)",
        "aten.index_select.default(%2, 2, %cache.3.0.query_order)",
        "aten.unflatten.int(%3, 2, [4, 8])",
        "einfold.rotary(%k, %position_ids, %cos, %sin, false)",
        "aten.flatten.using_ints(%5, 2, 3)",
        "aten.index_select.default(%6, 2, %cache.3.0.key_order)",
        "aten.unflatten.int(%7, 2, [2, 8])",
        "aten.flatten.using_ints(%v, 2, 3)",
        "aten.index_select.default(%9, 2, %cache.3.0.value_order)",
        "aten.unflatten.int(%10, 2, [2, 8])",
        "einfold.packed_attention(%4, %8, %11, %cache.3.0.key, %cache.3.0.value, %slots.0, %packed.0",
        "aten.flatten.using_ints(%13, 2, 3)",
        "aten.index_select.default(%16, 2, %cache.3.0.output_order)",
        "aten.unflatten.int(%17, 2, [4, 8])",
    ]
    of_values = [call for call in calls(attached("values")[0]) if "rotary" in call]
    assert not of_values  # the operator turns queries and keys, as it does without an order


@pytest.mark.parametrize("order", ["keys", "values", "both"])
@pytest.mark.parametrize(
    ("sizes", "mixed"), [({"key": 8, "value": 8}, False), ({"key": 24, "value": 40}, True)]
)
def test_nothing_changes_but_what_the_slots_hold(
    order: str, sizes: dict[str, int], mixed: bool
) -> None:
    torch.manual_seed(0)
    q, k = torch.randn(1, 7, 4, sizes["key"]), torch.randn(1, 7, 2, sizes["key"])
    v = torch.randn(1, 7, 2, sizes["value"])
    want = outputs(attached("none", mixed=mixed, **sizes)[0], q, k, v)
    found, orders = attached(order, mixed=mixed, **sizes)
    assert len(orders) == (2 if order == "both" else 1)
    got = outputs(found, q, k, v)
    torch.testing.assert_close(got["o"], want["o"], rtol=0, atol=1e-5)
    for name in want.keys() - {"o"}:
        # A head that keeps a window is not packed, so it stays as it was.
        order_KD = orders.get(f"{name}_order")
        expected = want[name]
        if order_KD is not None:
            expected = want[name].gather(3, order_KD[None, :, None].expand_as(want[name]))
        torch.testing.assert_close(got[name], expected, rtol=0, atol=1e-5)


def test_orders_are_those_of_the_text() -> None:
    """Of keys as they are turned, and by the queries of each KV head; the first tokens do not count."""
    angles = torch.outer(torch.arange(64.0), torch.tensor([1.0, 0.3, 0.1, 0.01]))
    table = torch.randn(11, 16, generator=torch.Generator().manual_seed(0))
    cos, sin = angles.cos(), angles.sin()
    found = program(READERS, e=table, cos=cos, sin=sin)
    PlanCache().run(found)
    chosen("abq", order="both", **(TEXT | {"block": 4, "sinks": 1})).run(found)
    (calibration,) = found.calibrations
    AttachCache().run(found)
    verify(found, deep=True)
    tokens = torch.tensor([[3, 5, 5, 9], [1, 3, 2, 0]])
    calibration.run(tokens)
    values = table[tokens].unflatten(2, (2, 8))
    keys = rotary_reference(values, torch.arange(4).expand(2, -1), cos, sin, False)
    for part, x in (("key", keys[:, 1:]), ("value", values[:, 1:])):
        index = found.weights[f"cache.0.0.{part}_order"].load().reshape(2, 8)
        for head in range(2):
            squares = x[:, :, head].square().flatten(0, 1).T
            weight = squares.mean(1) if part == "key" else torch.ones(8)
            assert torch.equal(index[head] - 8 * head, order_of(squares, weight, 4))


def test_a_layer_that_reads_brings_its_queries_in_the_order_of_the_owner() -> None:
    found = program(READERS)
    PlanCache().run(found)
    chosen("abq", order="both", **TEXT).run(found)
    assert found.layout is not None
    owner, reader = found.layout.layers
    group = replace(
        reader.groups[0], owner=0, storage=type(found.layout[1].groups[0])((0,)).storage
    )
    found.layout = CacheLayout((owner, replace(reader, groups=(group,))))
    AttachCache().run(found)
    verify(found, deep=True)
    text = "\n".join(calls(found))
    assert text.count("%cache.0.0.query_order") == text.count("%cache.0.0.output_order") == 2
    assert text.count("%cache.0.0.key_order") == text.count("%cache.0.0.value_order") == 1
    assert "cache.1" not in text


def test_a_layer_by_itself_is_put_in_order_too() -> None:
    """What `cache_for` runs in transformers, whose q and k come behind their rotary embedding."""
    (made,) = layer_programs(ordering("both")).values()
    found = [call.partition("(")[0] for call in calls(made) if "getitem" not in call]
    assert found.count("aten.index_select.default") == 4 and "einfold.rotary" not in found


def test_without_an_order_no_text_is_read() -> None:
    found = ordering("none")
    assert not found.calibrations and not found.cache_weights
    assert not [call for call in calls(attached("none")[0]) if "index_select" in call]
