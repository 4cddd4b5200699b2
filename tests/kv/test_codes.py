"""Packed codes: no bit wasted, none lost, and errors within half a step."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from einfold.compiler.ir.kv.codes.affine import LARGEST, dequantize, quantize
from einfold.compiler.ir.kv.codes.bits import pack, unpack
from einfold.compiler.ir.kv.codes.block_float import BIAS, LEAST, MOST
from einfold.compiler.ir.kv.codes.block_float import rounded as block_rounded
from einfold.compiler.ir.kv.codes.codec import Seen, decode, encode
from einfold.compiler.ir.kv.codes.even import SHARES, packed, rounded
from einfold.compiler.ir.kv.codes.half_bytes import OFFSET, as_slots, numbers
from einfold.compiler.ir.kv.codes.normal import levels, nearest
from einfold.compiler.ir.kv.codes.salient import chosen_first
from einfold.compiler.ir.kv.store.abq.storage import MANTISSAS, Abq
from einfold.compiler.ir.kv.store.gear.codec import low_rank
from einfold.compiler.ir.kv.store.gear.storage import Gear
from einfold.compiler.ir.kv.store.kivi.storage import Kivi
from einfold.compiler.ir.kv.store.mikv.codec import balancer
from einfold.compiler.ir.kv.store.mikv.storage import MiKV
from einfold.compiler.ir.kv.store.mustafar.storage import KEPT, Mustafar, kept_of
from einfold.compiler.ir.kv.store.packed import BITS, PLANES, Packed
from einfold.compiler.ir.kv.store.storage import GroupShape
from einfold.compiler.ir.kv.store.turboquant.storage import LEVELS, TurboQuant
from einfold.compiler.ir.kv.store.zipcache.storage import ZipCache

from ..quick import quick

bits, widths = st.sampled_from(BITS), st.sampled_from([*PLANES])

STORAGES = [
    *(Kivi(key_bits=b, value_bits=b, group=8, residual=8) for b in BITS),
    Kivi(group=8, residual=8, keys="token"),
    *(TurboQuant(bits=b, group=16, levels=spread) for b in BITS for spread in LEVELS),
    Gear(group=8, residual=8, tokens=16),
    Gear(group=8, residual=8, tokens=16, rank=0),
    Gear(group=8, residual=8, tokens=16, share=0.0, keys="token"),
    ZipCache(salient=8, tokens=24),
    MiKV(salient=16, tokens=24, group=8, low=3),
]
SPARSE = [
    Mustafar(tokens=5, sparsity=0.3),
    Mustafar(tokens=5, key_sparsity=0.7, value_sparsity=0.5, dtype="i8"),
]
BLOCKS = [Abq(bits=b, tokens=6, block=8) for b in MANTISSAS]


@given(widths, st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_codes_come_back_and_fill_every_bit(width: int, eights: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**width, (2, 3, 8 * eights), generator=generator).to(torch.uint8)
    packed = pack(codes, width)
    assert all(plane.dtype == torch.uint8 for plane in packed)
    assert sum(plane.shape[-1] for plane in packed) == eights * width
    assert torch.equal(unpack(packed, width), codes)


@pytest.mark.parametrize("convert", [lambda x: x, torch.from_numpy], ids=["NumPy", "torch"])
def test_slots_as_numbers_and_back(convert: Callable[[Any], Any]) -> None:
    """Of arrays as of tensors; codes of 4 bits as `pack` lays them out, numbers rounded and cut."""
    codes = torch.randint(-8, 8, (2, 3, 6), generator=torch.Generator().manual_seed(0))
    (pairs,) = pack(codes + OFFSET, 4)
    slots = convert(pairs.numpy())
    assert np.array_equal(np.asarray(numbers(slots)), codes)
    written = convert(np.zeros((2, 3, 3), np.uint8))
    written[:] = as_slots(convert(codes.numpy() + np.float32(0.4)), written)
    assert np.array_equal(np.asarray(written), np.asarray(slots))
    written[:] = as_slots(convert(np.full((2, 3, 6), 99.0, np.float32)), written)
    assert (np.asarray(written) == 0xFF).all()
    plain = convert(np.array([[-7, 3]], np.int8))
    assert np.asarray(numbers(plain)).tolist() == [[-7.0, 3.0]]
    plain[:] = as_slots(convert(np.array([[-300.0, 2.6]], np.float32)), plain)
    assert np.asarray(plain).tolist() == [[-128, 3]]


def test_eight_codes_of_three_bits_are_three_bytes() -> None:
    codes = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7])
    # The low two bits of each, then the high bits.
    low, high = pack(codes, 3)
    assert low.tolist() == [0b11100100, 0b11100100] and high.tolist() == [0b11110000]


@given(
    bits,
    st.lists(st.floats(-LARGEST, LARGEST, width=32), min_size=8, max_size=8),
    st.floats(1e-3, 1.0),
)
def test_the_error_is_at_most_half_a_step(width: int, numbers: list[float], factor: float) -> None:
    x = torch.tensor([numbers]) * factor
    codes, scale, zero = quantize(x, width)
    assert scale.dtype == zero.dtype == torch.float16 and int(codes.max()) < 2**width
    error = (dequantize(codes, scale, zero) - x).abs()
    assert bool((error <= scale.float() / 2 + 1e-6 * x.abs().max() + 1e-7).all())


@pytest.mark.parametrize(
    ("width", "most"), quick([(2, 1.001), (3, 1.001), (4, 1.003), (8, 60)], (3, 1.001), (4, 1.003))
)
def test_levels_lose_little_more_than_the_best_there_are(width: int, most: float) -> None:
    """What Lloyd-Max levels lose of a normal distribution, of which eight bits lose almost nothing."""
    x = torch.randn(1_000_000, generator=torch.Generator().manual_seed(0)).double().sort().values
    best = x[torch.linspace(0, len(x) - 1, 2**width + 2)[1:-1].long()]
    for _ in range(0 if width == 8 else 300):
        code = torch.bucketize(x, (best[1:] + best[:-1]) / 2)
        best = torch.zeros_like(best).scatter_add(0, code, x) / torch.bincount(code)
    lost = {2: 0.1175, 3: 0.03455, 4: 0.009501, 8: 4.1e-5}[width]
    if width < 8:
        code = torch.bucketize(x, (best[1:] + best[:-1]) / 2)
        assert float((x - best[code]).square().mean()) == pytest.approx(lost, rel=0.01)
    found = levels(width)[nearest(x.float(), width).long()]
    assert float((x - found).square().mean()) < lost * most * 1.01


@pytest.mark.parametrize(("size", "most"), [(64, 1.01), (128, 1.10)])
def test_even_levels_lose_little_more_than_those_of_the_normal_distribution(
    size: int, most: float
) -> None:
    """In 4 bits, each under the scale that loses the least for its codes."""
    x = np.random.default_rng(0).standard_normal((20_000, size)).astype(np.float32)
    codes, scale = rounded(x, 4)
    error = np.square(x - (codes - np.float32(7.5)) * scale).sum()
    table = levels(4)[nearest(torch.from_numpy(x), 4).long()].numpy()
    best = (x * table).sum(-1, keepdims=True) / np.square(table).sum(-1, keepdims=True)
    assert error < most * np.square(x - table * best).sum()


@given(bits, st.integers(0, 2**32 - 1))
def test_a_token_has_the_best_of_its_steps(width: int, seed: int) -> None:
    x = np.random.default_rng(seed).standard_normal((5, 16)).astype(np.float32) ** 3
    x[0] = 0
    codes, scale = rounded(x, width)
    assert codes.max() < 2**width and (scale >= 0).all() and scale[0] == 0
    half = 2 ** (width - 1)
    error = np.square(x - (codes - (half - 0.5)) * scale).sum(-1)
    for share in SHARES:
        step = np.abs(x).max(-1, keepdims=True) / half * share + 1e-30
        places = np.clip(np.floor(x / step), -half, half - 1) + 0.5
        best = (x * places).sum(-1, keepdims=True) / np.square(places).sum(-1, keepdims=True)
        assert (error <= np.square(x - places * best).sum(-1) * 1.001 + 1e-6).all()


@given(widths, st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_numpy_packs_as_torch_does(width: int, eights: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 2**width, (2, 3, 8 * eights), np.uint8)
    for mine, theirs in zip(
        packed(codes, width), pack(torch.from_numpy(codes), width), strict=True
    ):
        np.testing.assert_array_equal(mine, theirs.numpy())


@given(
    st.sampled_from(MANTISSAS),
    st.lists(st.floats(-(2.0**120), 2.0**120, width=32), min_size=8, max_size=8),
    st.integers(-100, 0),
)
def test_a_block_has_the_better_of_two_exponents(
    width: int, numbers: list[float], power: int
) -> None:
    """Beside a plain spelling: the exponent with room for the largest, or the one below it."""
    block = np.ldexp(np.array(numbers, np.float32), power)
    codes, stored = block_rounded(block, width)
    assert codes.dtype == stored.dtype == np.uint8 and codes.max() < 2**width
    half, largest = 2 ** (width - 1), float(np.abs(block).max())
    if largest == 0:
        assert (codes == half).all()
        return
    room = LEAST - BIAS
    while largest >= half * 2.0**room:
        room += 1
    errors = {}
    for exponent in {room, max(room - 1, LEAST - BIAS)}:
        step = 2.0**exponent
        whole = [min(max(round(float(x) / step), -half), half - 1) for x in block]
        errors[exponent] = sum(
            (w - float(x) / step) ** 2 for w, x in zip(whole, block, strict=True)
        ) * 4.0 ** (exponent - room)
    mine = int(stored[0]) - BIAS
    assert mine in errors and int(stored[0]) <= MOST
    assert errors[mine] <= min(errors.values()) * 1.0001 + 1e-6
    found = (codes.astype(float) - half) * 2.0**mine
    # Half a step, but for what stands beside the largest code: up to a step, and what the finer one cuts.
    least = np.abs(block) <= (half - 1) * 2.0**mine
    assert (np.abs(found - block)[least] <= 2.0**mine / 2).all()


@pytest.mark.parametrize("storage", [*STORAGES, *BLOCKS, *SPARSE], ids=str)
def test_pieces_have_the_sizes_of_the_account(storage: Packed) -> None:
    shape, granules = GroupShape(3, 24, 16), 2
    tokens = granules * storage.granule
    keys, values = torch.randn(3, tokens, 24), torch.randn(3, tokens, 16)
    pieces = encode(storage, keys, values, Seen())
    expected = {
        name: (tuple(size), dtype)
        for name, size, dtype in storage.bulk(shape, 1, tokens + storage.lead + storage.newest)
    }
    names = {torch.uint8: "u8", torch.float16: "f16"}
    found = {name: ((1, *piece.shape), names[piece.dtype]) for name, piece in pieces.items()}
    assert found == expected
    total = sum(piece.numel() * piece.itemsize for piece in pieces.values())
    assert total == granules * storage.granule_bytes(shape)


@pytest.mark.parametrize("storage", [*STORAGES, *BLOCKS], ids=str)
def test_granules_come_back_near_to_what_they_were(storage: Packed) -> None:
    tokens = 2 * storage.granule
    generator = torch.Generator().manual_seed(1)
    keys, values = (torch.randn(3, tokens, n, generator=generator) for n in (24, 16))
    order = torch.arange(tokens).expand(3, -1)
    if isinstance(storage, (ZipCache, MiKV)):
        order = chosen_first(storage, Seen(), keys)
    found = decode(storage, encode(storage, keys, values, Seen()))
    width = getattr(storage, "low", getattr(storage, "key_bits", 0))
    for x, y in zip((keys, values), found, strict=True):
        want = x.gather(1, order[:, :, None].expand_as(x))
        error = (y.flatten(1, 2) - want).norm() / want.norm()
        assert error < {2: 0.5, 3: 0.25, 4: 0.12, 6: 0.03, 8: 0.01}[width]


@pytest.mark.parametrize("storage", [*STORAGES, *SPARSE], ids=str)
def test_numbers_that_float16_has_no_room_for_are_cut(storage: Packed) -> None:
    generator = torch.Generator().manual_seed(1)
    keys, values = (1e6 * torch.randn(2, storage.granule, 16, generator=generator) for _ in (0, 1))
    for x, whole in zip(
        decode(storage, encode(storage, keys, values, Seen())), (keys, values), strict=True
    ):
        assert bool(torch.isfinite(x).all())
        assert float(x.abs().max()) <= 1.01 * float(whole.abs().max())


def test_kivi_is_the_plain_formula() -> None:
    """Keys by groups of 8 tokens of a channel, values by groups of 8 channels of a token."""
    storage = Kivi(key_bits=2, value_bits=3, group=8, residual=8)
    torch.manual_seed(0)
    keys, values = torch.randn(1, 8, 4 * 8), torch.randn(1, 8, 8)
    got_keys, got_values = decode(storage, encode(storage, keys, values, Seen()))

    def rounded(x: torch.Tensor, width: int) -> torch.Tensor:
        low, high = x.min(), x.max()
        step = (high - low) / (2**width - 1)
        return ((x - low) / step).round() * step + low

    want = torch.stack([rounded(keys[0, :, d], 2) for d in range(32)], dim=1)
    # The stored scale is a float16 that is no smaller: codes on an edge may fall to either side.
    assert ((got_keys[0, 0] - want).abs() < 4e-3).float().mean() > 0.98
    want = torch.stack([rounded(values[0, t], 3) for t in range(8)])
    assert ((got_values[0, 0] - want).abs() < 4e-3).float().mean() > 0.98


def test_abq_is_the_plain_formula() -> None:
    """Blocks of 8 channels of each token, in 4 bits for keys and 6 for values."""
    storage = Abq(key_bits=4, value_bits=6, block=8, tokens=3)
    torch.manual_seed(0)
    keys, values = (torch.randn(2, 3, 16) * torch.logspace(-3, 3, 16, 2) for _ in (0, 1))
    found = decode(storage, encode(storage, keys, values, Seen()))
    for x, got, width in zip((keys, values), found, (4, 6), strict=True):
        blocks = x.reshape(-1, 8)
        half = 2 ** (width - 1)
        tries = []
        for lower in (0, 1):
            above = torch.floor(torch.log2(blocks.abs().amax(1, keepdim=True))) + 1
            step = 2 ** (above - (width - 1) - lower)
            tries.append((blocks / step).round().clamp(-half, half - 1) * step)
        lost = [(each - blocks).square().sum(1, keepdim=True) for each in tries]
        want = torch.where(lost[1] < lost[0], tries[1], tries[0])
        assert torch.equal(got.reshape(-1, 8), want)


def test_a_large_channel_takes_the_bits_of_its_own_block_alone() -> None:
    """What an order is for: large channels side by side cost one block, spread out all of them."""
    torch.manual_seed(1)
    storage = Abq(bits=4, block=8, tokens=4)
    keys = torch.randn(1, 4, 32)
    large = torch.arange(0, 32, 4)  # two in each block
    keys[..., large] *= 50
    order = keys[0].abs().amax(0).argsort(descending=True)
    plain, _ = decode(storage, encode(storage, keys, keys, Seen()))
    sorted_, _ = decode(storage, encode(storage, keys[..., order], keys, Seen()))
    small = torch.ones(32, dtype=torch.bool).scatter(0, large, False)
    lost = (plain[0, 0] - keys[0])[:, small].square().sum()
    less = (sorted_[0, 0][:, order.argsort()] - keys[0])[:, small].square().sum()
    assert float(less) < 0.05 * float(lost)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_blocks_with_numbers_that_are_not_finite_say_so(wrong: float) -> None:
    storage = Abq(tokens=2, block=4, order="none")
    keys = torch.ones(1, 2, 8)
    keys[0, 1, 5] = wrong
    found, values = decode(storage, encode(storage, keys, torch.ones(1, 2, 8), Seen()))
    assert torch.equal(found.isfinite()[0, 0], torch.tensor([[True] * 8, [True] * 4 + [False] * 4]))
    assert torch.equal(values.flatten(1, 2), torch.ones(1, 2, 8))


@pytest.mark.parametrize("size", [1.0, 1e-3, 1e2])
@pytest.mark.parametrize("dtype", KEPT)
def test_mustafar_keeps_the_largest_numbers_of_each_token(dtype: str, size: float) -> None:
    """Beside a plain spelling: of 24 channels the largest 7 of a key, of 16 the largest 8 of a value."""
    storage = Mustafar(key_sparsity=0.7, value_sparsity=0.5, dtype=dtype, tokens=3)
    torch.manual_seed(0)
    keys, values = size * torch.randn(2, 6, 24), size * torch.randn(2, 6, 16)
    pieces = encode(storage, keys, values, Seen())
    for x_KTD, got, part, kept in zip(
        (keys, values), decode(storage, pieces), ("key", "value"), (7, 8), strict=True
    ):
        assert pieces[f"{part}_kept"].shape == (2, 2, 3, kept)
        for head, token in product(range(2), range(6)):
            x, y = x_KTD[head, token], got.flatten(1, 2)[head, token]
            largest = sorted(range(len(x)), key=lambda d, x=x: -abs(float(x[d])))[:kept]
            bitmap = pieces[f"{part}_bitmap"].flatten(1, 2)[head, token].tolist()
            assert sum(byte << 8 * place for place, byte in enumerate(bitmap)) == sum(
                1 << d for d in largest
            )
            assert not [d for d in range(len(x)) if d not in largest and y[d] != 0]
            most = float(x.abs().max())
            assert float((y - x)[largest].abs().max()) < most * (
                2**-11 if dtype == "f16" else 0.005
            )


@given(st.integers(1, 40), st.floats(0.01, 0.99))
def test_a_share_of_the_numbers_is_kept(eights: int, sparsity: float) -> None:
    kept = kept_of(8 * eights, sparsity)
    assert 1 <= kept <= 8 * eights
    assert kept == 1 or abs(kept / (8 * eights) - (1 - sparsity)) <= 0.5 / (8 * eights) + 1e-9


def test_a_token_of_zeros_stays_one() -> None:
    for dtype in KEPT:
        storage = Mustafar(dtype=dtype, tokens=2)
        zeros = torch.zeros(1, 2, 8)
        for found in decode(storage, encode(storage, zeros, zeros, Seen())):
            assert torch.equal(found.flatten(1, 2), zeros)


def test_gear_sets_outliers_aside_and_adds_what_the_codes_lost() -> None:
    torch.manual_seed(2)
    keys, values = torch.randn(2, 16, 16), torch.randn(2, 16, 16)
    keys[0, 3, 5], values[1, 7, 2] = 90.0, -70.0
    plain = Kivi(key_bits=2, value_bits=2, group=8, residual=8)
    gear = Gear(key_bits=2, value_bits=2, group=8, residual=8, tokens=16, rank=2, share=0.15)
    found = {s.name: decode(s, encode(s, keys, values, Seen())) for s in (plain, gear)}
    for part, x in enumerate((keys, values)):
        errors = {n: float((y[part].flatten(1, 2) - x).norm()) for n, y in found.items()}
        assert errors["gear"] < 0.5 * errors["kivi"]
    assert abs(float(found["gear"][0][0, 0, 3, 5]) - 90) < 0.05


def test_power_iteration_finds_the_best_low_rank() -> None:
    torch.manual_seed(3)
    x = torch.randn(4, 20, 3) @ torch.randn(4, 3, 12) + 0.01 * torch.randn(4, 20, 12)
    left, right = low_rank(x, 3)
    best = torch.linalg.svdvals(x)[:, 3:].square().sum(-1).sqrt()
    assert bool(((x - left @ right.mT).norm(dim=(1, 2)) < 1.05 * best).all())


def test_salient_tokens_get_more_bits() -> None:
    torch.manual_seed(4)
    storage = ZipCache(high=8, low=2, salient=8, tokens=16)
    keys, values = torch.randn(1, 32, 8), torch.randn(1, 32, 8)
    score = torch.rand(1, 32)
    normal = score / torch.arange(40, 8, -1)
    seen = Seen(score, torch.arange(40, 8, -1))
    order = chosen_first(storage, seen, keys)
    assert sorted(order[0].tolist()) == list(range(32))
    salient = sorted([*order[0, :8].tolist(), *order[0, 16:24].tolist()])
    assert salient == sorted(normal[0].topk(16).indices.tolist())
    got, _ = decode(storage, encode(storage, keys, values, seen))
    error = (got.flatten(1, 2) - keys[:, order[0]]).abs().amax(-1)[0].reshape(2, 16)
    assert float(error[:, :8].max()) < 0.02 < float(error[:, 8:].max())


def test_the_balancer_evens_out_a_channel_that_queries_are_large_in() -> None:
    torch.manual_seed(5)
    keys, query_max = torch.randn(1, 1, 24, 8), torch.ones(1, 8)
    query_max[0, 3] = 100.0
    balance = balancer(keys, query_max)
    channel = (keys * balance.float()).abs().amax((0, 1, 2))
    assert channel.argmax() == 3
    storage = MiKV(high=4, low=2, salient=8, tokens=24, group=8)
    queries = torch.randn(40, 8) * query_max[0]
    errors = []
    for largest in (query_max, None):
        seen = Seen(query_max_KD=largest)
        order = chosen_first(storage, seen, keys[0])
        got, _ = decode(storage, encode(storage, keys[0], keys[0], seen))
        errors.append(float((queries @ (got[0, 0] - keys[0, 0, order[0]]).T).norm()))
    assert errors[0] < 0.7 * errors[1]
