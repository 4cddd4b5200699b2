"""What holds for every policy and every storage, the product's own and a test's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

import einfold
from einfold.compiler.ir.kv.keep.policy import Policy
from einfold.compiler.ir.kv.layout import CacheLayout, HeadGroup, LayerCache
from einfold.compiler.ir.kv.read.everything import Everything
from einfold.compiler.ir.kv.read.reader import Reader
from einfold.compiler.ir.kv.store.plain.storage import Plain
from einfold.compiler.ir.kv.store.storage import Storage
from einfold.compiler.passes.cache_methods import FAMILIES, resolved
from einfold.runtime.cache import Cache

HEADS, KEY, VALUE = 2, 16, 8


def layout_of(
    policy: Policy, storage: Storage | None = None, reader: Reader | None = None
) -> CacheLayout:
    """Two layers whose heads are all cached so; a storage that shares has the second read the first."""
    group = HeadGroup(
        tuple(range(HEADS)), policy, storage or Plain(), reader=reader or Everything()
    )
    other = replace(group, partner=0 if group.storage.shared else None)
    return CacheLayout(
        tuple(LayerCache(n, HEADS, KEY, VALUE, (g,)) for n, g in enumerate((group, other)))
    )


def check_text(layout: CacheLayout) -> None:
    """The text is read back as it was, and printed the same again."""
    lines = list(layout.lines())
    again = CacheLayout.parse(lines)
    assert again == layout
    assert list(again.lines()) == lines


def check_account(layout: CacheLayout) -> None:
    """What is allocated is what the layout says: while a prompt is read, when it settles, and behind it."""
    generator = np.random.default_rng(0)
    for prompt, capacity in ((40, 90), (7, 33)):
        cache = Cache.allocate(layout, 2, capacity, prompt)
        assert cache.nbytes == layout.bytes(2, capacity, prompt)
        at = 0
        while at < capacity - 1:
            size = min(cache.step_limit(), (prompt if at < prompt else capacity - 1) - at, 5)
            cache.make_room(size)
            step(cache, size, generator)
            at += size
            if at == prompt:
                cache.settle()
                assert cache.nbytes == layout.bytes(2, capacity)
        assert cache.nbytes == layout.bytes(2, capacity)
    account = layout.account()
    sizes = {str(symbol): symbol for symbol in account.free_symbols}
    assert account.subs(
        {sizes[n]: v for n, v in (("B", 2), ("C", 90)) if n in sizes}
    ) == layout.bytes(2, 90)


def step(cache: Cache, size: int, generator: np.random.Generator) -> None:
    """Writes random tokens, as a step of the graph does."""
    observed = {}
    for layer, index, group in cache.layout.groups():
        used = cache.counters[cache.layout.clock(group)]
        for part, width in (("key", KEY), ("value", VALUE)):
            slots = cache.buffers[f"cache.{layer.layer}.{index}.{part}"]
            for row, first in enumerate(used):
                new = generator.standard_normal((HEADS, size, width))
                slots[row][:, int(first) : int(first) + size] = new
        shown = (HEADS, 1) if group.policy.told else (2 * HEADS, KEY)
        queries = generator.standard_normal((cache.batch, size, *shown))
        observed[f"query.{layer.layer}.{index}"] = queries.astype(np.float32)
    cache.advance(size, observed)


def check_method(family: str, name: str, **options: Any) -> None:
    """Recipes know the method, with every option; its options spelled out are the same method."""
    method = FAMILIES[family][name]
    assert method.what
    table = resolved(family, {"method": name, **options})
    assert set(table) == {"method", *method.defaults()}
    assert resolved(family, table) == table


def logits_of(
    folder: Path, out: Path, target: str, cache: dict[str, Any], tokens: list[int]
) -> Any:
    """Logits behind the second half of a text, of which the first half was the prompt; by the target."""
    einfold.compile(folder, out, recipe={"target": target, "cache": cache})
    model = einfold.load(out, threads=1)
    return np.concatenate([rows for _, rows in model.logits(tokens, len(tokens) // 2)])
