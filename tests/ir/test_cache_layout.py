"""The byte account equals what is allocated, for any layout."""

from __future__ import annotations

import itertools
import weakref
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import sympy
from hypothesis import given
from hypothesis import strategies as st

from einfold.compiler.ir.kv.keep.anchored import Anchored
from einfold.compiler.ir.kv.keep.full import Full
from einfold.compiler.ir.kv.keep.heavy_hitters import HeavyHitters
from einfold.compiler.ir.kv.keep.matched import Matched
from einfold.compiler.ir.kv.keep.merged import Merged
from einfold.compiler.ir.kv.keep.policy import Policy
from einfold.compiler.ir.kv.keep.voted import Voted
from einfold.compiler.ir.kv.keep.window import Window
from einfold.compiler.ir.kv.layout import (
    PARTS,
    Buffer,
    CacheLayout,
    HeadGroup,
    LayerCache,
    packed_of,
    query_name,
)
from einfold.compiler.ir.kv.store.abq.storage import MANTISSAS, Abq
from einfold.compiler.ir.kv.store.gear.storage import Gear
from einfold.compiler.ir.kv.store.kivi.storage import Kivi
from einfold.compiler.ir.kv.store.low_rank.storage import LowRank
from einfold.compiler.ir.kv.store.mikv.storage import MiKV
from einfold.compiler.ir.kv.store.minicache.storage import MiniCache
from einfold.compiler.ir.kv.store.mustafar.storage import KEPT, Mustafar
from einfold.compiler.ir.kv.store.packed import BITS, CHOSEN, Packed
from einfold.compiler.ir.kv.store.storage import read_storage
from einfold.compiler.ir.kv.store.turboquant.storage import TurboQuant
from einfold.compiler.ir.kv.store.zipcache.storage import ZipCache
from einfold.errors import IRError
from einfold.runtime.buffers import empty
from einfold.runtime.cache import Cache


@st.composite
def policies(draw: st.DrawFn) -> Policy:
    kept, newest, slack = (draw(st.integers(1, most)) for most in (9, 20, 8))
    prefill = draw(st.sampled_from(["exact", "streaming"]))
    return draw(
        st.sampled_from(
            [
                Full(),
                Window(kept - 1, newest, slack, draw(st.booleans()), prefill),
                HeavyHitters(kept, newest, slack, prefill),
                Merged(kept, newest, slack, prefill, similarity=0.5),
                Matched(kept, newest, slack, prefill),
                Voted(kept, newest, 3, slack, queries=2),
                Anchored(kept, newest, kept - 1, slack=slack),
            ]
        )
    )


@st.composite
def packed(draw: st.DrawFn) -> Packed:
    """Any packed storage; heads have a multiple of 8 channels."""
    width = st.sampled_from(BITS)
    waiting: dict[str, Any] = {
        "slack": draw(st.integers(1, 9)),
        "prefill": draw(st.sampled_from(["exact", "streaming"])),
        "sinks": draw(st.integers(0, 5)),
    }
    kind = draw(st.sampled_from([Kivi, TurboQuant, Gear, ZipCache, MiKV, Abq, Mustafar]))
    if kind is TurboQuant:
        options = {
            "key_bits": draw(width),
            "value_bits": draw(width),
            "group": draw(st.integers(1, 12)),
            "residual": draw(st.integers(0, 20)),
        }
    elif kind is Abq:
        mantissa = st.sampled_from(MANTISSAS)
        options = {
            "key_bits": draw(mantissa),
            "value_bits": draw(mantissa),
            "block": draw(st.sampled_from([1, 2, 4, 8])),
            "order": draw(st.sampled_from([*CHOSEN])),
            "tokens": draw(st.integers(1, 12)),
            "residual": draw(st.integers(0, 20)),
        }
    elif kind is Mustafar:
        options = {
            "key_sparsity": draw(st.floats(0.01, 0.99)),
            "value_sparsity": draw(st.floats(0.01, 0.99)),
            "dtype": draw(st.sampled_from(KEPT)),
            "tokens": draw(st.integers(1, 12)),
            "residual": draw(st.integers(0, 20)),
        }
    elif kind in (Kivi, Gear):
        options = {
            "key_bits": draw(width),
            "value_bits": draw(width),
            "group": 8,
            "keys": draw(st.sampled_from(["channel", "token"])),
            "residual": draw(st.integers(8, 20)),
        }
        if kind is Gear:
            options |= {"tokens": draw(st.sampled_from([8, 16]))}
            options |= {"rank": draw(st.integers(0, 2)), "share": draw(st.floats(0, 0.9))}
    else:
        low, high = sorted((draw(width), draw(width)))
        options = {
            "high": high,
            "low": low,
            "residual": draw(st.integers(0, 9)),
            "tokens": draw(st.sampled_from([16, 24])),
            "salient": 8,
        }
        if kind is MiKV:
            options["group"] = 8
    return kind(**waiting, **options)


@st.composite
def groups_of(draw: st.DrawFn, heads: tuple[int, ...]) -> HeadGroup:
    if draw(st.booleans()):
        return HeadGroup(heads, Full(), draw(packed()))
    policy = draw(policies())
    kinds = ["f32", "f16", "i8", "i8/channel"]
    # What is merged is averaged: `attach_cache` refuses that over codes, and halves of bytes have no room.
    kinds += [] if policy.mixes else ["i4/channel"]
    return HeadGroup(heads, policy, read_storage(draw(st.sampled_from(kinds))))


@st.composite
def pairs(draw: st.DrawFn, layer: int) -> list[LayerCache]:
    """Two layers that share directions."""
    storage = MiniCache(
        draw(st.integers(0, 9)),
        draw(st.integers(1, 8)),
        draw(st.sampled_from(["exact", "streaming"])),
        draw(st.integers(0, 3)),
        draw(st.integers(2, 8)),
        draw(st.integers(0, 2)),
    )
    heads, key, value = (draw(st.integers(1, 9)) for _ in range(3))
    group = HeadGroup(tuple(range(heads)), storage=storage)
    first = LayerCache(layer, heads, key, value, (group,))
    return [first, replace(first, layer=layer + 1, groups=(replace(group, partner=layer),))]


@st.composite
def features(draw: st.DrawFn, layer: int) -> LayerCache:
    """A layer that stores features of every token, and a window."""
    window = Window(
        draw(st.integers(0, 4)),
        draw(st.integers(1, 20)),
        draw(st.integers(1, 8)),
        prefill=draw(st.sampled_from(["exact", "streaming"])),
    )
    heads, key, value = (draw(st.integers(1, 6)) for _ in range(3))
    ranks = [draw(st.integers(1, heads * size)) for size in (key, value)]
    storage = LowRank(*ranks, draw(st.sampled_from(["f32", "f16"])))
    return LayerCache(layer, heads, key, value, (HeadGroup(tuple(range(heads)), window, storage),))


@st.composite
def layouts(draw: st.DrawFn) -> CacheLayout:
    layers = []
    for _ in range(draw(st.integers(1, 4))):
        layer = len(layers)
        owners = [entry for entry in layers if entry.groups[0].owner is None]
        if owners and draw(st.booleans()):
            owner = draw(st.sampled_from(owners))
            reader = HeadGroup(tuple(range(owner.kv_heads)), owner=owner.layer)
            layers.append(replace(owner, layer=layer, groups=(reader,)))
            continue
        if draw(st.integers(0, 3)) == 0:
            layers += draw(pairs(len(layers)))
            continue
        if draw(st.integers(0, 3)) == 0:
            layers.append(draw(features(len(layers))))
            continue
        heads = draw(st.integers(1, 6))
        order = draw(st.permutations(range(heads)))
        cuts = sorted(draw(st.sets(st.integers(1, heads - 1), max_size=2))) if heads > 1 else []
        edges = [0, *cuts, heads]
        groups = tuple(draw(groups_of(tuple(order[a:b]))) for a, b in itertools.pairwise(edges))
        halved = any(group.storage.slot_width(2) == 1 for group in groups)
        unit = 8 if any(group.packed for group in groups) else 1 + halved
        sizes = [unit * draw(st.integers(1, 64 // unit)) for _ in PARTS]
        layers.append(LayerCache(layer, heads, sizes[0], sizes[1], groups))
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
    live, most = [0], [0]

    def gone(size: int) -> None:
        live[0] -= size

    def counted(spec: Buffer) -> Any:
        buffer = empty(spec)
        live[0] += buffer.nbytes
        most[0] = max(most[0], live[0])
        weakref.finalize(buffer, gone, buffer.nbytes)
        return buffer

    cache = Cache.allocate(layout, batch, capacity, prompt, counted)
    assert cache.nbytes == layout.bytes(batch, capacity, prompt) == live[0]
    queries = {
        query_name(layer.layer, index): np.zeros(
            (batch, prompt, 2 * len(group.heads), layer.key_size), np.float32
        )
        for layer, index, group in layout.groups()
    }
    cache.advance(prompt, queries)
    cache.settle()
    assert cache.nbytes == layout.bytes(batch, capacity) == live[0]
    assert most[0] == layout.peak_bytes(batch, capacity, prompt)
    # What a benchmark takes for granted is what reading the prompt comes to.
    assumed = Cache.allocate(layout, batch, capacity)
    assumed.assume(prompt)
    for name, group in layout.clocks().items():
        if group.exact:
            assert assumed.clocks[name].tolist() == cache.clocks[name].tolist()
            if group.packed:
                packed = packed_of(name)
                assert assumed.packed[packed].tolist() == cache.packed[packed].tolist()


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


@pytest.mark.parametrize(
    ("storage", "reason"),
    [
        ("kivi(key_bits=5)", "codes of 2, 3, 4, 8 bits, not 5"),
        ("kivi(group=12)", "multiple of 8, not 12"),
        ("kivi(group=64,residual=32)", "residual of 32 tokens is smaller than a group of 64"),
        ("kivi(keys=head)", "by channel or token, not 'head'"),
        ("kivi(slack=0)", "1 or more of slack"),
        ("kivi(sinks=-1)", "0 or more first and newest tokens as they are .* not -1, 128 and 64"),
        ("kivi(prefill=later)", "exact or streaming"),
        ("gear(tokens=48)", "a group of 32 does not divide the granule 48"),
        ("gear(tokens=512)", "up to 256 tokens"),
        ("gear(rank=-1)", "the rank is 0 or more"),
        ("gear(share=1.0)", "less than 1, not 2 and 1.0"),
        ("zipcache(salient=128)", "fewer salient than all"),
        ("mikv(low=1)", "not 1"),
        ("abq(key_bits=2)", "codes of 3, 4, 6, 8 bits, not 2"),
        ("mustafar(key_sparsity=1.0)", "a sparsity is between 0 and 1, not 1.0"),
        ("mustafar(dtype=i4)", "dtype is f16 or i8, not 'i4'"),
        ("mustafar(tokens=0)", "1 or more tokens are packed together, not 0"),
        ("abq(tokens=0)", "blocks of 1 or more channels, not 0 and 16"),
        ("abq(block=0)", "blocks of 1 or more channels, not 16 and 0"),
        ("abq(order=heads)", "order is one of none, keys, values, both, not 'heads'"),
        ("kivi(bits=4)", "unknown or repeated field"),
        ("turboquant(value_bits=1,levels=even)", "codes of 2, 3, 4, 8 bits, not 1"),
        ("turboquant(group=0,levels=even)", "1 or more tokens are packed together, not 0"),
        ("turboquant(levels=odd)", "levels are even or normal, not 'odd'"),
        (
            "turboquant(key_bits=4,value_bits=4,group=64)",
            "lacks levels, which was no choice when it was made; compile",
        ),
    ],
)
def test_nonsense_storages_are_refused(storage: str, reason: str) -> None:
    with pytest.raises(IRError, match=reason):
        read_storage(storage)


@pytest.mark.parametrize(
    ("storage", "sizes", "reason"),
    [
        ("kivi()", (64, 48), "group of 32 does not divide the value size"),
        ("kivi(keys=token)", (48, 64), "group of 32 does not divide the key size"),
        ("zipcache()", (20, 64), "8 codes together, which does not divide the key size 20"),
        ("gear(rank=40)", (32, 32), "rank 40"),
        ("mikv()", (48, 64), "does not divide the key size"),
        ("mustafar()", (20, 64), "8 codes together, which does not divide the key size 20"),
        ("abq(block=32)", (64, 48), "a block of 32 does not divide the value size of a head, 48"),
    ],
)
def test_heads_that_do_not_fit_are_refused(
    storage: str, sizes: tuple[int, int], reason: str
) -> None:
    layout = CacheLayout(
        (LayerCache(0, 1, *sizes, (HeadGroup((0,), Full(), read_storage(storage)),)),)
    )
    with pytest.raises(IRError, match=reason):
        layout.bytes(1, 100)


def test_only_groups_that_keep_every_token_are_packed() -> None:
    with pytest.raises(IRError, match="window keeps few tokens"):
        HeadGroup((0,), Window(4, 60), Kivi())
