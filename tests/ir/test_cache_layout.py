"""The byte account equals what is allocated, for any layout."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import sympy
from hypothesis import given
from hypothesis import strategies as st

from einfold.compiler.ir.cache.layout import CacheLayout, HeadGroup, LayerCache
from einfold.compiler.ir.cache.policies import Full, Policy, Window
from einfold.compiler.ir.cache.storages import read_storage
from einfold.errors import IRError
from einfold.runtime.cache import Cache


@st.composite
def policies(draw: st.DrawFn) -> Policy:
    if draw(st.booleans()):
        return Full()
    return Window(
        draw(st.integers(0, 4)),
        draw(st.integers(1, 20)),
        draw(st.integers(1, 8)),
        draw(st.booleans()),
        draw(st.sampled_from(["exact", "streaming"])),
    )


@st.composite
def layouts(draw: st.DrawFn) -> CacheLayout:
    layers = []
    for layer in range(draw(st.integers(1, 4))):
        owners = [entry for entry in layers if entry.groups[0].owner is None]
        if owners and draw(st.booleans()):
            owner = draw(st.sampled_from(owners))
            reader = HeadGroup(tuple(range(owner.kv_heads)), owner=owner.layer)
            layers.append(replace(owner, layer=layer, groups=(reader,)))
            continue
        heads = draw(st.integers(1, 6))
        order = draw(st.permutations(range(heads)))
        cuts = sorted(draw(st.sets(st.integers(1, heads - 1), max_size=2))) if heads > 1 else []
        edges = [0, *cuts, heads]
        groups = tuple(
            HeadGroup(
                tuple(order[a:b]),
                draw(policies()),
                read_storage(draw(st.sampled_from(["f32", "f16", "i8", "i8/channel"]))),
            )
            for a, b in itertools.pairwise(edges)
        )
        layers.append(
            LayerCache(layer, heads, draw(st.integers(1, 64)), draw(st.integers(1, 64)), groups)
        )
    return CacheLayout(tuple(layers))


@given(layouts(), st.integers(1, 3), st.integers(1, 40))
def test_account_equals_allocation(layout: CacheLayout, batch: int, capacity: int) -> None:
    cache = Cache.allocate(layout, batch, capacity)
    symbols = {symbol.name: symbol for symbol in layout.account().free_symbols}
    account = layout.account().subs({symbols["B"]: batch, symbols["C"]: capacity})
    assert cache.nbytes == layout.bytes(batch, capacity) == account
    assert cache.nbytes == sum(np.prod(b.shape) * b.itemsize for b in cache.buffers.values())


@given(layouts(), st.integers(1, 3), st.integers(1, 40), st.data())
def test_while_a_prompt_is_read_and_after(
    layout: CacheLayout, batch: int, capacity: int, data: st.DataObject
) -> None:
    prompt = data.draw(st.integers(1, capacity))
    cache = Cache.allocate(layout, batch, capacity, prompt)
    assert cache.nbytes == layout.bytes(batch, capacity, prompt)
    assert cache.nbytes <= layout.peak_bytes(batch, capacity, prompt)
    cache.advance(prompt)
    cache.settle()
    assert cache.nbytes == layout.bytes(batch, capacity)
    assert cache.nbytes <= layout.peak_bytes(batch, capacity, prompt)


@given(layouts())
def test_text_reads_back(layout: CacheLayout) -> None:
    assert CacheLayout.parse(list(layout.lines())) == layout


def test_the_account_is_an_expression_in_rows_and_tokens() -> None:
    layout = CacheLayout((LayerCache(0, 2, 16, 16, (HeadGroup((0, 1)),)),))
    b, c = sympy.symbols("B C", integer=True, positive=True)
    assert layout.account() == 2 * 2 * 16 * 4 * b * c


@pytest.mark.parametrize("groups", [((0,),), ((0, 1), (1,)), ((0, 2),)])
def test_each_head_stands_in_one_group(groups: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(IRError, match="exactly one group"):
        LayerCache(3, 2, 8, 8, tuple(HeadGroup(heads) for heads in groups))


@pytest.mark.parametrize(
    "line",
    [
        "cache 0.0 heads=0 of=1 key=8 value=8 policy=none storage=f32",
        "cache 0.0 heads=0 of=1 key=8 value=8 policy=full storage=f31",
        "cache 0.0 heads=0 of=1 key=8 value=8 policy=full storage=i8/token",
        "cache 0.0 heads=x of=1 key=8 value=8 policy=full storage=f32",
        "cache zero heads=0",
    ],
)
def test_damaged_lines_are_refused(line: str) -> None:
    with pytest.raises(IRError):
        CacheLayout.parse([line])


def test_a_row_shares_the_memory() -> None:
    layout = CacheLayout((LayerCache(0, 1, 4, 4, (HeadGroup((0,)),)),))
    cache = Cache.allocate(layout, 3, 5)
    row = cache.row(1)
    row.buffers["cache.0.0.key"][:] = 7
    row.lengths += 2
    assert cache.buffers["cache.0.0.key"][1].min() == 7
    assert cache.buffers["cache.0.0.key"][[0, 2]].max() == 0
    assert cache.lengths.tolist() == [0, 2, 0]
