"""The reference meaning of the operators against plain torch, over odd shapes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.nn import functional

from einfold.compiler.ir.ops import einfold_ops as ops
from einfold.compiler.ir.ops.attention import CachedAttention
from einfold.compiler.ir.ops.experts import FEW, Experts, in_order, route


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("heads", "kv"), [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("window", [0, 1, 3])
@pytest.mark.parametrize("size", [5, 16])
def test_attention_is_sdpa_with_a_mask(heads: int, kv: int, window: int, size: int) -> None:
    q, k, v = randn(2, 7, heads, size), randn(2, 7, kv, size, seed=1), randn(2, 7, kv, size, seed=2)
    got = ops.attention(q, k, v, None, 0, 0.3, window, 0.0)
    i, j = torch.arange(7)[:, None], torch.arange(7)[None]
    mask = (j <= i) & ((i - j < window) if window else torch.tensor(True))
    group = heads // kv
    want = functional.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2).repeat_interleave(group, 1),
        v.transpose(1, 2).repeat_interleave(group, 1),
        attn_mask=mask,
        scale=0.3,
    ).transpose(1, 2)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_softcap_and_sinks_spelled_out() -> None:
    q, k, v = randn(1, 4, 2, 8), randn(1, 4, 1, 8, seed=1), randn(1, 4, 1, 8, seed=2)
    sinks = torch.tensor([0.7, -1.2])
    got = ops.attention(q, k, v, sinks, 0, 0.5, 0, 2.0)
    for head in range(2):
        logits = 2.0 * torch.tanh(0.5 * q[0, :, head] @ k[0, :, 0].T / 2.0)
        logits = logits.masked_fill(torch.ones(4, 4).triu(1).bool(), -math.inf)
        powers = logits.exp()
        weights = powers / (powers.sum(-1, keepdim=True) + sinks[head].exp())
        torch.testing.assert_close(got[0, :, head], weights @ v[0, :, 0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("window", [0, 3])
@pytest.mark.parametrize("rotary", [False, True])
def test_cached_attention_in_steps_is_attention(window: int, rotary: bool) -> None:
    """Any cut of a text into steps, rows of unequal length: the same as all at once without a cache."""
    total, size = 9, 8
    q, k, v = (
        randn(2, total, 4, size),
        randn(2, total, 2, size, seed=1),
        randn(2, total, 2, size, seed=2),
    )
    angles = torch.outer(torch.arange(64.0), torch.tensor([1.0, 0.1, 0.01]))
    cos, sin = angles.cos(), angles.sin()
    positions = torch.arange(total).expand(2, -1)
    turn = (lambda x: ops.rotary(x, positions, cos, sin, False)) if rotary else (lambda x: x)
    want = ops.attention(turn(q), turn(k), v, None, 0, 0.35, window, 0.0)
    key_cache, value_cache = torch.zeros(2, 2, 12, size), torch.zeros(2, 2, 12, size)
    lengths = torch.zeros(2, dtype=torch.long)
    for start, end in [(0, 4), (4, 5), (5, 9)]:
        out, key_cache, value_cache = ops.cached_attention(
            q[:, start:end],
            k[:, start:end],
            v[:, start:end],
            key_cache,
            value_cache,
            lengths,
            None,
            None,
            positions[:, start:end] if rotary else None,
            cos if rotary else None,
            sin if rotary else None,
            None,
            None,
            0,
            0.35,
            window,
            0.0,
            False,
        )
        torch.testing.assert_close(out, want[:, start:end], rtol=1e-5, atol=1e-6)
        lengths = lengths + (end - start)


def test_rows_of_unequal_length_do_not_see_padding() -> None:
    q, k, v = randn(2, 6, 2, 4), randn(2, 6, 2, 4, seed=1), randn(2, 6, 2, 4, seed=2)
    caches = torch.zeros(2, 2, 8, 4), torch.zeros(2, 2, 8, 4)
    lengths = torch.tensor([6, 3])  # row 1 holds three tokens and three of padding
    none = (None, None, None)
    _, keys, values = ops.cached_attention(
        q,
        k,
        v,
        *caches,
        torch.zeros(2, dtype=torch.long),
        None,
        None,
        *none,
        None,
        None,
        0,
        0.5,
        0,
        0.0,
        False,
    )
    new = randn(2, 1, 2, 4, seed=3)
    out, keys, values = ops.cached_attention(
        new, new, new, keys, values, lengths, None, None, *none, None, None, 0, 0.5, 0, 0.0, False
    )
    text = torch.cat((k[1:, :3], new[1:]), 1)
    want = ops.attention(
        torch.cat((q[1:, :3], new[1:]), 1),
        text,
        torch.cat((v[1:, :3], new[1:]), 1),
        None,
        0,
        0.5,
        0,
        0.0,
    )
    torch.testing.assert_close(out[1, 0], want[0, -1], rtol=1e-5, atol=1e-6)


def test_slot_zero_stands_for_as_many_tokens_as_are_counted() -> None:
    """n equal keys and values are the same as one that counts n; a count of 0 hides the slot."""
    new = randn(1, 1, 2, 4)
    key, value = randn(1, 2, 1, 4, seed=1), randn(1, 2, 1, 4, seed=2)
    rest = randn(1, 2, 3, 4, seed=3)
    none = [None] * 6

    def attend(lead: int, count: torch.Tensor | None) -> torch.Tensor:
        slots = [
            torch.cat((part.expand(-1, -1, lead, -1), rest, torch.zeros(1, 2, 2, 4)), 2)
            for part in (key, value)
        ]
        used = torch.tensor([lead + 3])
        out, _, _ = ops.cached_attention(
            new, new, new, *slots, used, count, *none, 0, 0.5, 0, 0.0, False
        )
        return out

    counted = attend(1, torch.full((1, 2), 5.0))
    torch.testing.assert_close(counted, attend(5, None), rtol=1e-5, atol=1e-6)
    hidden = attend(1, torch.zeros(1, 2))
    torch.testing.assert_close(hidden, attend(0, None), rtol=1e-5, atol=1e-6)
    assert (counted - hidden).abs().max() > 1e-2


def test_an_int8_cache_is_attended_as_it_is_stored() -> None:
    """Codes round to nearest and stop at the ends; attention reads the codes times their scales."""
    q, k, v = randn(1, 5, 2, 4), randn(1, 5, 2, 4, seed=1), randn(1, 5, 2, 4, seed=2)
    scales = [torch.linspace(0.002, 0.02, 8).reshape(2, 4) for _ in range(2)]
    caches = [torch.zeros(1, 2, 8, 4, dtype=torch.int8) for _ in range(2)]
    lengths = torch.zeros(1, dtype=torch.long)
    none = [None] * 5
    out, keys, values = ops.cached_attention(
        q, k, v, *caches, lengths, *none, *scales, 0, 0.5, 0, 0.0, False
    )
    stored = []
    for new, codes, scale in ((k, keys, scales[0]), (v, values, scales[1])):
        assert codes.dtype == torch.int8
        want = torch.clamp(torch.round(new / scale), -128, 127)
        assert torch.equal(codes[:, :, :5].transpose(1, 2).float(), want)
        assert int((codes.int().abs() >= 127).sum()) > 0  # some were cut
        stored.append(want * scale)
    exact = ops.attention(q, *stored, None, 0, 0.5, 0, 0.0)
    torch.testing.assert_close(out, exact, rtol=1e-5, atol=1e-6)


def test_slots_of_two_codes_a_byte_are_attended_as_they_are_stored() -> None:
    """The even channel stands in the low bits; codes stop at -8 and 7."""
    q, k, v = randn(1, 5, 2, 4), randn(1, 5, 2, 4, seed=1), randn(1, 5, 2, 4, seed=2)
    scales = [torch.linspace(0.05, 0.4, 8).reshape(2, 4) for _ in range(2)]
    caches = [torch.zeros(1, 2, 8, 2, dtype=torch.uint8) for _ in range(2)]
    lengths = torch.zeros(1, dtype=torch.long)
    out, keys, values = ops.cached_attention(
        q, k, v, *caches, lengths, *[None] * 5, *scales, 0, 0.5, 0, 0.0, False
    )
    stored = []
    for new, pairs, scale in ((k, keys, scales[0]), (v, values, scales[1])):
        want = torch.clamp(torch.round(new / scale), -8, 7)
        assert {-8.0, 7.0} <= set(want.flatten().tolist())  # some were cut
        held = pairs[:, :, :5].transpose(1, 2)
        assert torch.equal((held & 15).float() - 8, want[..., 0::2])
        assert torch.equal((held >> 4).float() - 8, want[..., 1::2])
        stored.append(want * scale)
    exact = ops.attention(q, *stored, None, 0, 0.5, 0, 0.0)
    torch.testing.assert_close(out, exact, rtol=1e-5, atol=1e-6)


def test_slots_of_two_codes_a_byte_without_scales_are_refused() -> None:
    slots = [torch.zeros(1, 2, 8, 2, dtype=torch.uint8) for _ in range(2)]
    x, lengths = torch.zeros(1, 1, 2, 4), torch.zeros(1, dtype=torch.long)
    given = (x, x, x, *slots, lengths, *[None] * 5)
    call = CachedAttention(*given, None, None, 0, 0.5, 0, 0.0, False)
    with pytest.raises(ValueError, match="have scales"):
        call.shapes()
    scale = torch.ones(2, 4)
    assert CachedAttention(*given, scale, scale, 0, 0.5, 0, 0.0, False).shapes().shape == x.shape


@pytest.mark.parametrize("width", [8, 4])
def test_interleaved_rotary_is_the_other_pairing(width: int) -> None:
    x, positions = randn(1, 5, 2, 8), torch.tensor([[3, 0, 7, 7, 1]])
    angles = torch.outer(torch.arange(9.0), torch.rand(width // 2))
    plain = torch.cat((x[..., 0:width:2], x[..., 1:width:2], x[..., width:]), -1)
    got = ops.rotary(x, positions, angles.cos(), angles.sin(), True)
    want = ops.rotary(plain, positions, angles.cos(), angles.sin(), False)
    back = torch.stack((want[..., : width // 2], want[..., width // 2 : width]), -1).flatten(-2)
    torch.testing.assert_close(got, torch.cat((back, want[..., width:]), -1))


FAKES: list[tuple[Any, tuple[Any, ...]]] = [
    (ops.rms_norm, (randn(2, 3, 8), randn(8), 1e-6)),
    (ops.add_rms_norm, (randn(2, 3, 8), randn(2, 3, 8), randn(8), 1e-6)),
    (ops.layer_norm, (randn(2, 8), randn(8), randn(8), 1e-6)),
    (ops.add_layer_norm, (randn(2, 8), randn(2, 8), randn(8), randn(8), 1e-6)),
    (ops.linear, (randn(2, 3, 8), randn(5, 8), None)),
    (ops.embedding, (torch.tensor([[1, 2]]), randn(5, 8))),
    (ops.gated_activation, (randn(2, 8), randn(2, 8), "silu")),
    (ops.select_rows, (randn(2, 3, 8), torch.tensor([0, 5, 5]))),
    (ops.rotary, (randn(1, 3, 2, 8), torch.tensor([[0, 1, 2]]), randn(4, 2), randn(4, 2), True)),
    (
        ops.attention,
        (randn(1, 3, 4, 8), randn(1, 3, 2, 8), randn(1, 3, 2, 6), None, 0, 1.0, 2, 0.0),
    ),
    (
        ops.experts,
        (
            randn(5, 8),
            torch.tensor([[0, 2]] * 5),
            randn(5, 2),
            randn(3, 12, 8),
            None,
            randn(3, 8, 6),
            None,
            "silu",
            1.0,
            0.0,
        ),
    ),
]


@pytest.mark.parametrize(("op", "args"), FAKES, ids=[str(op) for op, _ in FAKES])
def test_fake_and_real_agree(op: Any, args: tuple[Any, ...]) -> None:
    """torch's own checks of a custom operator: schema, fake shapes and strides of results."""
    torch.library.opcheck(op.default, args, test_utils=("test_schema", "test_faketensor"))


def test_layer_norm_is_torchs_within_rounding() -> None:
    """Beside float64 it is off by as little as torch's own, also where the mean is far from 0."""
    for width, mean in ((8, 0.0), (64, 3.0), (1000, 100.0)):
        x, weight, bias = randn(7, width) + mean, randn(width), randn(width)
        exact = functional.layer_norm(x.double(), (width,), weight.double(), bias.double(), 1e-5)
        own = ops.layer_norm(x, weight, bias, 1e-5)
        torch.testing.assert_close(own.double(), exact, rtol=1e-5, atol=1e-6 * (1 + mean))
        theirs = functional.layer_norm(x, (width,), weight, bias, 1e-5)
        torch.testing.assert_close(own, theirs, rtol=1e-5, atol=2e-6 * (1 + mean))


def test_layer_norm_of_halves_is_computed_in_float32() -> None:
    x = (randn(3, 64) * 1000).half()  # whose squares are beyond float16
    own = ops.layer_norm(x, torch.ones(64).half(), torch.zeros(64).half(), 1e-5)
    assert own.dtype == torch.float16
    torch.testing.assert_close(
        own.float(), functional.layer_norm(x.float(), (64,)), rtol=1e-3, atol=1e-3
    )


def routed(tokens: int) -> list[Any]:
    """Arguments of `experts`, with biases: two of five for each token."""
    torch.manual_seed(0)
    index = torch.stack([torch.randperm(5)[:2] for _ in range(tokens)])
    weights = (randn(5, 12, 8), randn(5, 12), randn(5, 8, 6), randn(5, 8))
    return [randn(tokens, 8), index, torch.rand(tokens, 2), *weights, "silu", 1.0, 0.0]


@pytest.mark.parametrize("tokens", [1, 3, FEW])
def test_few_tokens_go_through_experts_in_one_order(tokens: int) -> None:
    """What is computed in buffers of known sizes is what one expert after the other gives, to rounding."""
    call = Experts(*routed(tokens))
    one_by_one = route(call.x_TM, call.index_TJ, call.weight_TJ, call._mlp)
    torch.testing.assert_close(call.run(), one_by_one, rtol=1e-5, atol=1e-5)


def test_no_token_goes_through_no_expert() -> None:
    given = [each[:0] if at < 3 else each for at, each in enumerate(routed(2))]
    assert Experts(*given).run().shape == (0, 8)


def test_derivatives_go_through_few_tokens_too() -> None:
    given = routed(3)
    given[3].requires_grad_()
    call = Experts(*given)
    call.run().sum().backward()
    (expected,) = torch.autograd.grad(
        route(call.x_TM, call.index_TJ, call.weight_TJ, call._mlp).sum(), [given[3]]
    )
    assert torch.equal(given[3].grad, expected)


def test_an_experts_part_of_a_weight_is_read_where_it_lies() -> None:
    stack, chosen = randn(5, 3, 4), torch.tensor([1, 1, 4])
    for at, expert in (
        (0, 1),
        (1, 4),
        (2, 4),
    ):  # behind the last there are none, and the last stands in
        part = torch.ops.einfold_routed.part(stack, chosen, at)
        assert part.data_ptr() == stack[expert].data_ptr() and part.shape == (3, 4)


def test_few_numbers_are_sorted_and_equal_ones_stay() -> None:
    for count in (1, 2, 9, 128):
        index = torch.randint(4, (count,))
        assert torch.equal(in_order(index), torch.sort(index, stable=True).indices)
