"""Attention written out by hand: fused, however it is spelled, and equal to what eager gives."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from einfold import backend
from einfold.compiler.codegen.cpu.tanh import quick_tanh

B, H, K, S, T, D = 2, 4, 2, 6, 11, 16


def expanded(x: Tensor) -> Tensor:
    """Grouped heads, each repeated as transformers does."""
    b, h, t, d = x.shape
    return x[:, :, None].expand(b, h, H // K, t, d).reshape(b, H, t, d)


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ expanded(k).transpose(2, 3) * D**-0.5


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(scores(q, k), dim=-1) @ expanded(v)


def by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = scores(q, k)
    e = torch.exp(s - s.amax(-1, keepdim=True))
    return (e @ expanded(v)) / e.sum(-1, keepdim=True)


def softcap(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = torch.tanh(scores(q, k) / 20) * 20
    return torch.softmax(s, dim=-1, dtype=torch.float32).to(q.dtype) @ expanded(v)


def alibi(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    slopes = torch.exp2(-torch.arange(1, H + 1) * 8 / H)
    away = torch.arange(T)[None, :] - torch.arange(S)[:, None]
    return torch.softmax(scores(q, k) + slopes[:, None, None] * away, dim=-1) @ expanded(v)


def sinks(q: Tensor, k: Tensor, v: Tensor, sink: Tensor) -> Tensor:
    s = torch.cat([scores(q, k), sink.reshape(1, -1, 1, 1).expand(B, -1, S, -1)], dim=-1)
    s = s - s.max(dim=-1, keepdim=True).values
    return torch.softmax(s, dim=-1)[..., :-1] @ expanded(v)


def additive(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return torch.softmax(scores(q, k) + mask, dim=-1) @ expanded(v)


def boolean(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return torch.softmax(scores(q, k).masked_fill(~mask, -math.inf), dim=-1) @ expanded(v)


def window(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    row, column = torch.arange(S)[:, None], torch.arange(T)[None, :]
    live = (column <= row) & (column > row - 3)
    return torch.softmax(torch.where(live, scores(q, k), -1e30), dim=-1) @ expanded(v)


def from_the_last_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A window from a place that the graph has as a number, as in decoding, and a test that is always so."""
    column = torch.arange(T)[None, :]
    live = torch.ones(S, 1, dtype=torch.bool) & (column <= T - 2) & (column > T - 2 - 5)
    return torch.softmax(torch.where(live, scores(q, k), -math.inf), dim=-1) @ expanded(v)


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q, expanded(k), expanded(v))


def differential(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    a, b = torch.softmax(scores(q, k), dim=-1), torch.softmax(scores(q.flip(-1), k), dim=-1)
    return (a - 0.3 * b) @ expanded(v)


FORMS: dict[Callable[..., Tensor], str] = {
    plain: "sdpa",
    by_hand: "sdpa",
    softcap: "one tile",
    alibi: "sdpa",
    sinks: "sdpa",
    additive: "sdpa",
    boolean: "sdpa",
    window: "sdpa",
    from_the_last_place: "sdpa",
    sdpa: "sdpa",
    differential: "sdpa",
}


def inputs_of(form: Callable[..., Tensor]) -> list[Tensor]:
    torch.manual_seed(0)
    q, k, v = torch.randn(B, H, S, D), torch.randn(B, K, T, D), torch.randn(B, K, T, D)
    mask = torch.rand(B, 1, S, T) < 0.7
    mask[..., 0] = True
    extra = {
        sinks: [torch.randn(H)],
        boolean: [mask],
        additive: [torch.where(mask, 0.0, torch.finfo(torch.float32).min)],
    }
    return [q, k, v, *extra.get(form, [])]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_it_is_fused_and_equal(form: Callable[..., Tensor], run: Callable[..., Any]) -> None:
    inputs = inputs_of(form)
    found = run(form, *inputs)
    (report,) = backend.reports()
    assert [(c.status, c.passes_after, c.lowering) for c in report.cascades] == [
        ("fused", 1, FORMS[form])
    ]
    torch.testing.assert_close(found, form(*inputs), rtol=1e-4, atol=1e-5)


def test_tanh_by_an_exponential_is_tanh(run: Callable[..., Any]) -> None:
    """Relative to float64: near 0, on both sides of the series' end, far from 0, and at what is no number."""
    near = torch.cat([torch.linspace(-1, 1, 100001), torch.logspace(-30, 1.5, 10001)])
    exact = torch.tanh(near.double())
    errors = ((quick_tanh(near).double() - exact) / exact)[exact != 0]
    assert errors.abs().max() < 4e-7
    ends = torch.tensor([math.inf, -math.inf, 1e38, -1e38, 0.0, math.nan])
    torch.testing.assert_close(quick_tanh(ends), torch.tanh(ends), rtol=0, atol=0, equal_nan=True)
    inputs = inputs_of(softcap)
    run(softcap, *inputs)
    (cascade,) = backend.reports()[0].cascades
    assert "aten.exp" in cascade.source
    assert "aten.tanh" not in cascade.source


@pytest.mark.parametrize("form", [plain, softcap, sinks], ids=lambda form: form.__name__)
def test_half_precision_stays_close(form: Callable[..., Tensor], run: Callable[..., Any]) -> None:
    inputs = inputs_of(form)
    expected = form(*inputs)
    found = run(form, *(x.to(torch.bfloat16) for x in inputs))
    assert backend.reports()[0].fused == 1
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("form", [boolean, additive], ids=lambda form: form.__name__)
def test_rows_without_a_live_key_give_what_eager_gives(
    form: Callable[..., Tensor], run: Callable[..., Any]
) -> None:
    q, k, v, mask = inputs_of(form)
    mask[0, 0, 2] = False if mask.dtype == torch.bool else -math.inf
    expected = form(q, k, v, mask)
    assert expected[0, 0, 2].isnan().all()
    found = run(form, q, k, v, mask)
    assert backend.reports()[0].fused == 1
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5, equal_nan=True)


def test_a_dead_row_beside_a_sink_is_zero(run: Callable[..., Any]) -> None:
    def masked(q: Tensor, k: Tensor, v: Tensor, sink: Tensor, mask: Tensor) -> Tensor:
        s = scores(q, k).masked_fill(~mask, -math.inf)
        s = torch.cat([s, sink.reshape(1, -1, 1, 1).expand(B, -1, S, -1)], dim=-1)
        return torch.softmax(s, dim=-1)[..., :-1] @ expanded(v)

    q, k, v, mask = inputs_of(boolean)
    mask[:, :, 3] = False
    sink = torch.randn(H) * 40
    expected = masked(q, k, v, sink, mask)
    assert not expected[:, :, 3].any()
    found = run(masked, q, k, v, sink, mask)
    assert backend.reports()[0].fused == 1
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_refused_form_stays_as_written(run: Callable[..., Any]) -> None:
    def rounded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        p = torch.softmax(scores(q, k), dim=-1)
        scale = p.amax(-1, keepdim=True) / 127
        return (torch.round(p / scale) @ expanded(v)) * scale

    inputs = inputs_of(plain)
    found = run(rounded, *inputs)
    (cascade,) = backend.reports()[0].cascades
    assert cascade.status == "refused"
    assert cascade.passes_after == 2
    assert "round(" in cascade.reason
    assert not cascade.source
    torch.testing.assert_close(found, rounded(*inputs))


def test_sizes_may_vary(run: Callable[..., Any]) -> None:
    compiled = torch.compile(
        sinks_of_any_size,
        backend="einfold",
        dynamic=True,
        options={"measure": "never", "rest": "eager"},
    )
    with torch.no_grad():
        for keys in (7, 12, 33):
            q, k, v = (
                torch.randn(B, H, S, D),
                torch.randn(B, K, keys, D),
                torch.randn(B, K, keys, D),
            )
            sink = torch.randn(H)
            torch.testing.assert_close(
                compiled(q, k, v, sink), sinks_of_any_size(q, k, v, sink), rtol=1e-4, atol=1e-5
            )
    (report,) = backend.reports()
    assert report.fused == 1


def softcap_by(q: Tensor, k: Tensor, v: Tensor, cap: float) -> Tensor:
    return torch.softmax(torch.tanh(scores(q, k) / cap) * cap, dim=-1) @ expanded(v)


def scaled_by(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return torch.softmax(scores(q, k) * scale, dim=-1) @ expanded(v)


@pytest.mark.parametrize("form", [softcap_by, scaled_by], ids=lambda form: form.__name__)
def test_a_number_that_varies_is_an_input(form: Callable[..., Tensor]) -> None:
    """With dynamic=True numbers are symbols; another value compiles nothing anew, through Inductor either."""
    compiled = torch.compile(form, backend="einfold", dynamic=True, options={"measure": "never"})
    inputs = inputs_of(plain)
    with torch.no_grad():
        for number in (20.0, 3.0, 7.0):
            found = compiled(*inputs, number)
            torch.testing.assert_close(found, form(*inputs, number), rtol=1e-4, atol=1e-5)
    (report,) = backend.reports()
    assert report.fused == 1


def sinks_of_any_size(q: Tensor, k: Tensor, v: Tensor, sink: Tensor) -> Tensor:
    k, v = k.repeat_interleave(H // K, dim=1), v.repeat_interleave(H // K, dim=1)
    s = q @ k.transpose(2, 3) * D**-0.5
    s = torch.cat([s, sink.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[2], -1)], dim=-1)
    return torch.softmax(s, dim=-1)[..., :-1] @ v
