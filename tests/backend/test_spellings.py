"""Attention as others spell it: every one is found, folds to one pass, and gives what eager gives."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from einfold import backend, explain

B, H, S, T, D = 2, 4, 5, 12, 16
CASES: list[tuple[Callable[..., Any], Callable[[], tuple[Tensor, ...]]]] = []


def qkv() -> tuple[Tensor, ...]:
    return torch.randn(B, H, S, D), torch.randn(B, H, T, D), torch.randn(B, H, T, D)


def square() -> tuple[Tensor, ...]:
    return torch.randn(B, H, T, D), torch.randn(B, H, T, D), torch.randn(B, H, T, D)


def case(inputs: Callable[[], tuple[Tensor, ...]], *extra: Callable[[], Tensor]) -> Any:
    """Adds a function to the list, called on these inputs and what `extra` makes."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        CASES.append((function, lambda: (*inputs(), *(make() for make in extra))))
        return function

    return register


def mask() -> Tensor:
    live = torch.rand(B, 1, S, T) < 0.7
    live[..., 0] = True
    return live


@case(qkv)
def power_of_e(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q @ k.mT
    e = math.e ** (s - s.amax(-1, keepdim=True))
    return (e @ v) / e.sum(-1, keepdim=True)


@case(qkv)
def power_of_two(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = (q @ k.mT) * math.log2(math.e)
    e = torch.pow(2.0, s - s.amax(-1, keepdim=True))
    return (e @ v) / e.sum(-1, keepdim=True)


@case(qkv)
def einsum_of_any_batch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = torch.einsum("...id,...jd->...ij", q, k)
    return torch.einsum("...ij,...jd->...id", s.softmax(-1), v)


@case(qkv)
def normalised_by_the_one_norm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q @ k.mT
    return functional.normalize(torch.exp(s - s.amax(-1, keepdim=True)), p=1, dim=-1) @ v


@case(qkv)
def denominator_by_a_product(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q @ k.mT
    e = torch.exp(s - s.amax(-1, keepdim=True))
    return (e @ v) / (e @ torch.ones(T, 1))


@case(qkv, mask)
def scores_changed_in_place(q: Tensor, k: Tensor, v: Tensor, live: Tensor) -> Tensor:
    s = torch.matmul(q, k.transpose(-2, -1))
    s /= math.sqrt(D)
    s.masked_fill_(live == 0, -1e9)
    return s.softmax(-1) @ v


@case(qkv, mask)
def masked_by_index(q: Tensor, k: Tensor, v: Tensor, live: Tensor) -> Tensor:
    s = q @ k.mT
    s[~live.expand_as(s)] = -1e9
    return s.softmax(-1) @ v


@case(qkv)
def softcap_in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q @ k.mT
    s.div_(20).tanh_().mul_(20)
    return s.softmax(-1) @ v


@case(square)
def window_by_exclusive_or(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    one = torch.ones(T, T, dtype=torch.bool)
    live = torch.tril(one) ^ torch.tril(one, -4)
    return ((q @ k.mT).masked_fill(~live, -math.inf)).softmax(-1) @ v


@case(square)
def causal_by_long_name(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    at = torch.arange(T)
    return ((q @ k.mT).masked_fill(torch.less(at[:, None], at), -math.inf)).softmax(-1) @ v


@case(square, lambda: (torch.rand(B, T) < 0.8).long())
def alibi_as_bloom_has_it(q: Tensor, k: Tensor, v: Tensor, live: Tensor) -> Tensor:
    place = ((live.cumsum(-1) - 1) * live)[:, None, :]
    slopes = torch.pow(2.0, -torch.arange(1, H + 1) * 2.0)
    bias = (slopes[..., None] * place).reshape(B * H, 1, T)
    q, k, v = (x.reshape(B * H, T, D) for x in (q, k, v))
    return torch.bmm(torch.softmax(bias.baddbmm(q, k.mT, beta=1.0, alpha=D**-0.5), -1), v)


@case(qkv, lambda: torch.randn(H, 2))
def two_sinks_in_one_tensor(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
    s = torch.cat((q @ k.mT, sinks[None, :, None].expand(B, H, S, 2)), -1)
    return s.softmax(-1)[..., :-2] @ v


@case(qkv)
def softmax_plus_one_by_padding(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return functional.pad(q @ k.mT, (0, 1)).softmax(-1)[..., :-1] @ v


@case(square, lambda: torch.randn(T + 1, D))
def shifted_as_transformer_xl_has_it(q: Tensor, k: Tensor, v: Tensor, place: Tensor) -> Tensor:
    """The padding joins a column, and the view that follows needs it whole: the bias is an input."""
    bias = functional.pad(q @ place[:T].mT, (1, 0)).view(B, H, -1, T)[:, :, 1:].reshape(B, H, T, T)
    return ((q @ k.mT) + bias).softmax(-1) @ v


@case(qkv, lambda: torch.randn(H))
def sink_split_off(q: Tensor, k: Tensor, v: Tensor, sink: Tensor) -> Tensor:
    s = torch.cat((q @ k.mT, sink.view(1, -1, 1, 1).expand(B, H, S, 1)), -1)
    weights, _ = s.softmax(-1).split([T, 1], -1)
    return weights @ v


def two_heads() -> tuple[Tensor, ...]:
    lam = torch.randn(4, D) / 4
    return (
        torch.randn(B, 2 * H, S, D),
        torch.randn(B, 2 * H, T, D),
        torch.randn(B, H, T, 2 * D),
        lam,
    )


@case(two_heads)
def differential_by_select(q: Tensor, k: Tensor, v: Tensor, lam: Tensor) -> Tensor:
    """As the authors of the Differential Transformer write it."""
    weight = torch.exp((lam[0] * lam[1]).sum()) - torch.exp((lam[2] * lam[3]).sum()) + 0.8
    p = (q @ k.mT).softmax(-1).view(B, H, 2, S, T)
    return (p[:, :, 0] - weight * p[:, :, 1]) @ v


@case(two_heads)
def differential_by_chunk(q: Tensor, k: Tensor, v: Tensor, lam: Tensor) -> Tensor:
    one, two = (q @ k.mT).softmax(-1).chunk(2, dim=1)
    return (one - 0.3 * two) @ v


@case(two_heads)
def differential_by_slices(q: Tensor, k: Tensor, v: Tensor, lam: Tensor) -> Tensor:
    p = (q @ k.mT).softmax(-1)
    return (p[:, :H] - 0.3 * p[:, H:]) @ v


@case(two_heads)
def differential_by_unbind(q: Tensor, k: Tensor, v: Tensor, lam: Tensor) -> Tensor:
    one, two = (q @ k.mT).softmax(-1).view(B, H, 2, S, T).unbind(2)
    return (one - 0.3 * two) @ v


@case(qkv)
def variance_by_two_moments(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    p = (q @ k.mT).softmax(-1)
    mean = p @ v
    return mean, p @ v**2 - mean**2


@case(qkv)
def variance_around_the_mean(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    p = (q @ k.mT).softmax(-1)
    mean = p @ v
    return mean, torch.einsum("bhst,bhstd->bhsd", p, (v[:, :, None] - mean[:, :, :, None]) ** 2)


@pytest.mark.parametrize(("function", "inputs"), CASES, ids=[f.__name__ for f, _ in CASES])
def test_it_is_one_pass_and_equal(
    function: Callable[..., Any], inputs: Callable[[], Any], run: Callable[..., Any]
) -> None:
    torch.manual_seed(0)
    given = inputs()
    expected = function(*(x.clone() for x in given))
    found = run(function, *given)
    (report,) = backend.reports()
    assert [(c.status, c.passes_after) for c in report.cascades] == [("fused", 1)], report
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_attention_of_attention(run: Callable[..., Any]) -> None:
    """A region that reads what another gave reads what stands in that one's place."""

    def twice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        first = (q @ k.mT).softmax(-1) @ k
        return (first @ k.mT).softmax(-1) @ v

    inputs = qkv()
    found = run(twice, *inputs)
    (report,) = backend.reports()
    assert report.fused == 2
    torch.testing.assert_close(found, twice(*inputs), rtol=1e-4, atol=1e-5)


def test_what_is_computed_outside_of_completed_sums_costs_a_pass() -> None:
    """The weights need the cumulated log-sum-exp, which needs all the keys."""

    def cumulated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s = q @ k.mT
        total = torch.cumsum(s.logsumexp(-1, keepdim=True), dim=2)
        return torch.exp(s - total) * v.mT.sum(-2, keepdim=True)

    def summed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return cumulated(q, k, v).sum(-1)

    (cascade,) = explain(summed, *qkv()).cascades
    assert (cascade.status, cascade.passes_after) == ("refused", 2)
    assert "cumsum" in cascade.reason
