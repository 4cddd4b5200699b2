"""Weights in two bytes while a model runs: what reads them gets numbers in float32, however it asks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from einfold.compiler.frontend import narrow
from einfold.compiler.frontend.narrow import Narrow, may_stay, stand_in

random = torch.Generator().manual_seed(0)
NUMBERS = torch.randn(7, 6, generator=random).bfloat16()
X = torch.randn(2, 3, 6, generator=random)


@pytest.fixture(params=[1 << 20, 20, 1], ids=["whole", "rows", "row"])
def weight(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A weight that is not there, however few rows of it are widened at a time."""
    monkeypatch.setattr(narrow, "_TOGETHER", request.param)
    found = nn.Parameter(stand_in(NUMBERS.shape), requires_grad=False)
    with Narrow({id(found): NUMBERS}):
        yield found


@pytest.mark.parametrize(
    "read",
    [
        lambda w: functional.linear(X, w),
        lambda w: functional.linear(X, w, torch.ones(7)),
        lambda w: functional.linear(X, w, bias=torch.ones(7)),
        lambda w: functional.linear(input=X, weight=w),
        lambda w: functional.linear(X[:0], w),
        lambda w: functional.linear(X[0, 0], w),
        lambda w: functional.linear(w, X[0]),
        lambda w: functional.linear(w, w),
        lambda w: functional.embedding(torch.tensor([[3, 0]]), w),
        lambda w: functional.embedding(torch.tensor([3]), w, 1),
        lambda w: functional.embedding(torch.tensor([3]), weight=w),
        lambda w: X @ w.T,
        lambda w: X @ w.mT,
        lambda w: w[2] * 2,
        lambda w: torch.cat([w, w]),
        lambda w: w.data + 1,
        lambda w: torch.einsum("abm,nm->abn", X, w),
        lambda w: w.to(torch.float64),
        lambda w: torch.stack(list(w)),
    ],
)
def test_every_way_to_read_a_weight(weight: Any, read: Callable[[Any], Tensor]) -> None:
    got = read(weight)
    assert torch.allclose(got, read(NUMBERS.float()), atol=1e-6)


@pytest.mark.parametrize("given", [(None, 0.5), ()])
def test_rows_that_are_scaled_as_they_are_looked_up(weight: Any, given: tuple[Any, ...]) -> None:
    """An embedding with a largest norm writes to its table: that of the checkpoint stays as it is."""
    before = NUMBERS.clone()
    more = {} if given else {"max_norm": 0.5}
    got = functional.embedding(torch.tensor([3]), weight, *given, **more)
    assert torch.allclose(got.norm(), torch.tensor(0.5), atol=1e-5)
    assert torch.equal(NUMBERS, before)


def test_what_a_weight_is_is_known_without_its_numbers(
    weight: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Models ask what type their weights are of."""
    monkeypatch.setattr(Narrow, "_wide", None)
    assert weight.dtype == torch.float32 and weight.device.type == "cpu"
    assert weight.shape == (7, 6) == weight.size() and weight.ndim == 2 and len(weight) == 7
    assert weight.numel() == 42 and weight.is_floating_point() and not weight.requires_grad


def test_a_bias_in_two_bytes() -> None:
    linear = nn.Linear(6, 7).requires_grad_(False)
    bias = torch.arange(7).bfloat16()
    wanted = functional.linear(X, NUMBERS.float(), bias.float())
    parts = (linear.weight, NUMBERS), (linear.bias, bias)
    for part, data in parts:
        part.data = stand_in(data.shape)
    with Narrow({id(part): data for part, data in parts}):
        assert torch.allclose(linear(X), wanted, atol=1e-6)
    assert linear(X).isnan().all()  # what is read otherwise is seen


class Own(nn.Linear):
    """Reads its weight as it likes."""


@pytest.mark.parametrize(
    ("owner", "data", "stays"),
    [
        (nn.Linear(6, 7), NUMBERS, True),
        (nn.Embedding(7, 6), NUMBERS.half(), True),
        (nn.Linear(6, 7), nn.Parameter(NUMBERS), True),
        (nn.Linear(6, 7), NUMBERS.float(), False),
        (nn.Linear(6, 7), NUMBERS.to(torch.int16), False),
        (nn.Linear(6, 7), NUMBERS.to("meta"), False),
        (Own(6, 7), NUMBERS, False),
        (nn.LayerNorm(6), NUMBERS[0], False),
        (nn.Linear(6, 7), object(), False),
    ],
)
def test_which_stay(owner: nn.Module, data: Any, stays: bool) -> None:
    assert may_stay(owner, data) is stays
