"""A score that a mask hides never reaches a result, whatever stands there and whichever lowering runs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from einfold import backend
from einfold.compiler.codegen.cpu import hiding
from einfold.compiler.fuse import decide

B, H, S, T, D, USED = 2, 2, 5, 9, 8, 6
LOWEST = torch.finfo(torch.float32).min


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.mT / D**0.5


def dead() -> Tensor:
    return torch.arange(T) >= USED


def causal() -> Tensor:
    return torch.arange(T) > torch.arange(S)[:, None] + T - S


WAYS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "masked_fill -inf": lambda q, k, v: scores(q, k).masked_fill(dead(), -math.inf).softmax(-1) @ v,
    "masked_fill min": lambda q, k, v: scores(q, k).masked_fill(dead(), LOWEST).softmax(-1) @ v,
    "masked_fill -1e30": lambda q, k, v: scores(q, k).masked_fill(dead(), -1e30).softmax(-1) @ v,
    "where -inf": lambda q, k, v: torch.where(~dead(), scores(q, k), -math.inf).softmax(-1) @ v,
    "where min": lambda q, k, v: torch.where(~dead(), scores(q, k), LOWEST).softmax(-1) @ v,
    "in place": lambda q, k, v: scores(q, k).masked_fill_(dead(), -math.inf).softmax(-1) @ v,
    "with a bias": lambda q, k, v: (
        torch.where(dead(), -math.inf, scores(q, k) + torch.arange(T) / 7).softmax(-1) @ v
    ),
    "twice": lambda q, k, v: (
        torch.where(dead(), LOWEST, scores(q, k).masked_fill(causal(), LOWEST)).softmax(-1) @ v
    ),
    "with a sink": lambda q, k, v: (
        torch.cat(
            (scores(q, k).masked_fill(dead(), -math.inf), torch.ones(B, H, S, 1)), -1
        ).softmax(-1)[..., :-1]
        @ v
    ),
    "rows that see nothing are zero": lambda q, k, v: torch.nan_to_num(
        scores(q, k).masked_fill(dead() | (torch.arange(S) == 1)[:, None], -math.inf).softmax(-1)
        @ v,
        0.0,
    ),
    "by hand": lambda q, k, v: by_hand(scores(q, k).masked_fill(dead(), -math.inf), v),
}


def by_hand(s: Tensor, v: Tensor) -> Tensor:
    e = (s - s.amax(-1, keepdim=True)).exp()
    return (e @ v) / e.sum(-1, keepdim=True)


@pytest.mark.parametrize("lowering", list(decide.LOWERINGS))
@pytest.mark.parametrize("way", WAYS)
def test_what_is_hidden(
    way: str, lowering: str, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """NaN, infinities, sums that overflow and large finite scores in the keys of hidden slots."""
    monkeypatch.setattr(decide, "LOWERINGS", {lowering: decide.LOWERINGS[lowering]})
    decide.forget()
    q, k, v = (torch.randn(B, H, n, D) for n in (S, T, T))
    for number in (math.nan, math.inf, -math.inf, 3e38, 1e37):
        hidden = k.clone()
        hidden[:, :, USED:] = number
        found = run(WAYS[way], q, hidden, v)
        expected = WAYS[way](q, hidden, v)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5, equal_nan=True)
        assert found.isfinite().all()
    decide.forget()
    report = backend.reports()[0]
    assert report.fused or report.cascades[0].reason.startswith("no lowering"), report


@pytest.mark.parametrize("mask", [torch.where(dead(), -math.inf, 0.0), dead() * LOWEST])
def test_a_mask_that_is_added(mask: Tensor, run: Callable[..., Any]) -> None:
    """Eager gives NaN where the hidden score is none; a finite score too large to exist is hidden."""
    q, k, v = (torch.randn(B, H, n, D) for n in (S, T, T))
    hidden = k.clone()
    hidden[:, :, USED:] = 1e37

    def added(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (scores(q, k) + mask).softmax(-1) @ v

    torch.testing.assert_close(run(added, q, hidden, v), added(q, hidden, v), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("low", ["min", -1e30, -math.inf])
def test_rows_that_see_nothing(low: Any, dtype: torch.dtype, run: Callable[..., Any]) -> None:
    """The mean of all values under a number, NaN under -inf; the mask is known at run time alone."""
    number = torch.finfo(dtype).min if low == "min" else low

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return scores(q, k).masked_fill(mask, number).softmax(-1) @ v

    torch.manual_seed(0)
    q, k, v = (torch.randn(B, H, n, D).to(dtype) for n in (S, T, T))
    mask = torch.zeros(S, T, dtype=torch.bool)
    mask[1], mask[2, 3:] = True, True
    found, expected = run(attend, q, k, v, mask), attend(q, k, v, mask)
    step = 2e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(found, expected, rtol=step, atol=step, equal_nan=True)


def test_what_is_seen_stays_as_eager_has_it(run: Callable[..., Any]) -> None:
    """A key that one row sees and another does not: rows that do not see it are finite, the others NaN."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scores(q, k).masked_fill(causal(), -math.inf).softmax(-1) @ v

    q, k, v = (torch.randn(B, H, n, D) for n in (S, T, T))
    k[:, :, T - 2] = math.nan
    found, expected = run(attend, q, k, v), attend(q, k, v)
    assert expected.isnan().any() and expected.isfinite().any()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", ["test", "added", "causal"])
def test_the_operators_by_themselves(dtype: torch.dtype, kind: str) -> None:
    """The quick way and the one spelled out agree, in numbers, type and memory order."""
    torch.manual_seed(0)
    step = {"rtol": 1e-2, "atol": 4e-3} if dtype == torch.bfloat16 else {}
    q, k, v = (torch.randn(B, h, n, D).to(dtype) for h, n in ((4, S), (2, T), (2, T)))
    seen = torch.rand(B, 1, S, T) > 0.3
    mask = {"test": seen, "added": torch.where(seen, 0.5, -math.inf).to(dtype), "causal": None}[
        kind
    ]
    arguments = q, k, v, mask, kind == "causal", 0.3
    quick = hiding.attention(*arguments)
    slow = hiding._spelled_out(*arguments)[0]
    torch.testing.assert_close(quick, slow, **step)
    torch.library.opcheck(
        hiding.attention, arguments, test_utils=("test_schema", "test_faketensor")
    )
    full = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    added = mask if kind != "test" else torch.where(seen, 0.0, -math.inf).to(dtype)
    arguments = q, *full, added, kind == "causal", 0.3
    quick, total = hiding.attention_with_sum(*arguments)
    slow, slow_total = hiding._spelled_out(*arguments)
    torch.testing.assert_close(quick, slow, **step)
    torch.testing.assert_close(total, slow_total, rtol=1e-2, atol=1e-2)
    torch.library.opcheck(
        hiding.attention_with_sum, arguments, test_utils=("test_schema", "test_faketensor")
    )
