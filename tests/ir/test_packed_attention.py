"""Attention over packed tokens and slots, against plain attention over what the bytes stand for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from einfold.compiler.ir.kv.codes.codec import Seen, decode, encode
from einfold.compiler.ir.kv.store.abq.storage import Abq
from einfold.compiler.ir.kv.store.gear.storage import Gear
from einfold.compiler.ir.kv.store.kivi.storage import Kivi
from einfold.compiler.ir.kv.store.mikv.storage import MiKV
from einfold.compiler.ir.kv.store.mustafar.storage import Mustafar
from einfold.compiler.ir.kv.store.packed import Packed
from einfold.compiler.ir.kv.store.turboquant.storage import TurboQuant
from einfold.compiler.ir.kv.store.zipcache.storage import ZipCache
from einfold.compiler.ir.ops import einfold_ops
from einfold.compiler.ir.ops.attention import masked_attention
from einfold.compiler.ir.ops.packed import PackedAttention, Partial, partial_attention

STORAGES = [
    Kivi(key_bits=2, value_bits=3, group=8, residual=8),
    Kivi(key_bits=4, value_bits=8, group=8, residual=8, keys="token"),
    TurboQuant(group=8, residual=8, bits=3),
    Gear(group=8, residual=8, tokens=16),
    ZipCache(residual=128, salient=8, tokens=16),
    MiKV(residual=128, salient=8, tokens=16, group=8),
    Abq(key_bits=4, value_bits=6, block=8, tokens=3),
    Mustafar(sparsity=0.4, tokens=3),
    Mustafar(sparsity=0.4, tokens=3, dtype="i8"),
]


def stacked(rows: list[dict[str, Tensor]], granules: int) -> dict[str, Tensor]:
    """Bulk buffers [B, K, granules, R, W] of rows with fewer granules; the rest is noise."""
    found = {}
    for name, example in rows[0].items():
        whole = torch.full((len(rows), example.shape[0], granules, *example.shape[2:]), 1)
        found[name] = whole.to(example.dtype)
        for b, row in enumerate(rows):
            found[name][b, :, : row[name].shape[1]] = row[name]
    return found


@pytest.mark.parametrize("storage", STORAGES, ids=str)
@pytest.mark.parametrize(("softcap", "sinks"), [(0.0, False), (8.0, True)])
def test_it_is_attention_over_both(
    storage: Packed, softcap: float, sinks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(Packed, "tile", 2)  # several tiles of few granules
    heads, size, new, granules = 2, 16, 3, 5
    packed, used = [5, 0, 2], [4, 0, 7]
    rows, plain = [], []
    for count in packed:
        tokens = count * storage.granule
        keys, values = torch.randn(heads, tokens, size), torch.randn(heads, tokens, 8)
        rows.append(encode(storage, keys, values, Seen()))
        plain.append([x.flatten(1, 2) for x in decode(storage, rows[-1])])
    bulk = stacked(rows, granules)
    key_slots, value_slots = torch.randn(3, heads, 12, size), torch.randn(3, heads, 12, 8)
    q, k, v = (
        torch.randn(3, new, 4, size),
        torch.randn(3, new, heads, size),
        torch.randn(3, new, heads, 8),
    )
    sink = torch.randn(4) if sinks else None
    arguments: tuple[Any, ...] = (
        torch.tensor(used),
        torch.tensor(packed) * storage.granule,
        list(bulk.values()),
        sink,
        None,
        None,
        None,
        0,
        0.25,
        softcap,
        False,
        storage.text,
    )
    out, keys_after, values_after = einfold_ops.packed_attention(
        q, k, v, key_slots, value_slots, *arguments
    )
    for b in range(3):
        total = torch.cat((plain[b][0], key_slots[b, :, : used[b]], k[b].transpose(0, 1)), 1)
        words = torch.cat((plain[b][1], value_slots[b, :, : used[b]], v[b].transpose(0, 1)), 1)
        seen = torch.arange(total.shape[1]) <= (total.shape[1] - new + torch.arange(new))[:, None]
        want = masked_attention(
            q[b : b + 1], total[None], words[None], seen[None], sink, 0.25, softcap
        )
        torch.testing.assert_close(out[b : b + 1], want, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(keys_after[b, :, used[b] : used[b] + new], k[b].transpose(0, 1))
    in_place = PackedAttention.standing_in(PackedAttention.run)(
        q, k, v, key_slots, value_slots, *arguments
    )
    torch.testing.assert_close(in_place[0], out)
    assert in_place[1] is key_slots and torch.equal(key_slots, keys_after)
    assert in_place[2] is value_slots and torch.equal(value_slots, values_after)


def test_states_merge_in_any_order_and_dead_ones_change_nothing() -> None:
    torch.manual_seed(1)
    q, k, v = torch.randn(1, 1, 2, 3, 8), torch.randn(1, 1, 12, 8), torch.randn(1, 1, 12, 4)
    k[:, :, 4:8] *= 40  # one part outweighs the others by far
    alive = torch.ones(1, 3, 4, dtype=torch.bool)
    parts = [
        partial_attention(q, k[:, :, i : i + 4], v[:, :, i : i + 4], alive, 1.0, 0.0)
        for i in (0, 4, 8)
    ]
    dead = partial_attention(q, k[:, :, :4], v[:, :, :4], ~alive, 1.0, 0.0)
    want = torch.softmax(q @ k[:, :, None].mT, -1) @ v[:, :, None]
    a, b, c = parts
    for state in (a.merged(b).merged(c), c.merged(a.merged(b)), dead.merged(a).merged(b).merged(c)):
        torch.testing.assert_close(state.finished(), want)
    nothing = dead.merged(dead)
    assert isinstance(nothing, Partial) and not nothing.finished().any()
