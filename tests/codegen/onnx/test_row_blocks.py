"""Attention whose mask keeps keys from whole blocks of rows: as the module has it, at every size."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.export import Dim

from einfold.compiler.codegen.cpu.reach import Places, Reach
from einfold.compiler.ir.cascade.expr import Apply, Const, Expr, Pos, Ref

from .test_fused import FLAVOURS, compare, export, operators

H, S, D = 2, 150, 8


def qkv(rows: int = S, keys: int = S, batch: int = 1) -> tuple[Tensor, ...]:
    return (
        torch.randn(batch, H, rows, D),
        torch.randn(batch, H, keys, D),
        torch.randn(batch, H, keys, D),
    )


def places(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    return torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])


def softmax(scores: Tensor, seen: Tensor, v: Tensor, hidden: float = -math.inf) -> Tensor:
    return torch.softmax(torch.where(seen, scores, hidden), dim=-1) @ v


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    row, key = places(q, k)
    return softmax(q @ k.mT / 3, key <= row, v)


def window(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    row, key = places(q, k)
    return softmax(q @ k.mT / 3, (key <= row) & (row - key < 9), v)


def around(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    row, key = places(q, k)
    return softmax(q @ k.mT / 3, (row - key).abs() <= 5, v, -1e30)


def before(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Not even itself: the first row sees nothing, and is a mean of all values."""
    row, key = places(q, k)
    return softmax(q @ k.mT / 3, key < row, v, -1e30)


def blind(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The first row sees nothing, and is NaN."""
    row, key = places(q, k)
    return softmax(q @ k.mT / 3, key < row, v)


def slopes(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    row, key = places(q, k)
    bias = (key - row) * torch.tensor([0.5, 0.25])[:, None, None]
    return softmax(q @ k.mT / 3 + bias, key <= row, v)


def capped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    row, key = places(q, k)
    return softmax(torch.tanh(q @ k.mT / 3 / 2) * 2, key <= row, v)


def capped_window(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    row, key = places(q, k)
    return softmax(torch.tanh(q @ k.mT / 3 / 2) * 2, (key <= row) & (key > row - 9), v)


BOUNDED = [causal, window, around, before, blind, slopes, capped, capped_window]


@FLAVOURS
@pytest.mark.parametrize("function", BOUNDED)
def test_blocks(function: Callable[..., Tensor], portable: bool, tmp_path: Path) -> None:
    """Two blocks; and what a row does not see, NaN and infinity, leaves it alone."""
    q, k, v = qkv()
    path = export(function, (q, k, v), tmp_path, portable)
    assert operators(path)["Softmax" if function in (capped, capped_window) else "Attention"] == 2
    compare(path, function, (q, k, v))
    for value in (math.nan, math.inf):
        for changed in (k, v):
            hidden = changed.clone()
            hidden[:, :, -1] = value
            compare(path, function, (q, hidden, v) if changed is k else (q, k, hidden))
    compare(path, function, (q, k, torch.zeros_like(v)))


@FLAVOURS
@pytest.mark.parametrize("function", [causal, window, before, capped])
def test_rows_of_any_number(
    function: Callable[..., Tensor], portable: bool, tmp_path: Path
) -> None:
    """Four blocks from 128 rows on, told apart as the model runs."""
    sizes = {0: Dim("batch"), 2: Dim("rows")}
    path = export(
        function, qkv(20, 20, batch=2), tmp_path, portable, dynamic_shapes=((sizes,) * 3,)
    )
    for rows in (1, 2, 127, 128, 131):
        compare(path, function, qkv(rows, rows, batch=2))


@pytest.mark.parametrize(("rows", "keys"), [(160, 130), (130, 200), (130, 3)])
def test_more_rows_than_keys_or_fewer(rows: int, keys: int, tmp_path: Path) -> None:
    for function in (causal, window):
        inputs = qkv(rows, keys)
        path = export(function, inputs, tmp_path / function.__name__, False)
        compare(path, function, inputs)


def test_too_few_rows_stay_together(tmp_path: Path) -> None:
    path = export(causal, qkv(100, 100), tmp_path, False)
    assert operators(path)["Attention"] == 1


def wide(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    row, key = places(q, k)
    return softmax(q @ k.mT / 3, (row - key).abs() <= 140, v)


def test_a_mask_that_hides_little_makes_no_blocks(tmp_path: Path) -> None:
    path = export(wide, qkv(), tmp_path, False)
    assert operators(path)["Attention"] == 1


def far(test: Expr) -> Reach:
    return Places("s", "t").reach(test)


ROW, KEY = Pos("s"), Pos("t")
AWAY = Apply("sub", (ROW, KEY))


@pytest.mark.parametrize(
    ("test", "behind", "ahead"),
    [
        (Apply("le", (KEY, ROW)), None, 0),
        (Apply("gt", (ROW, KEY)), None, -1),
        (Apply("not", (Apply("gt", (KEY, ROW)),)), None, 0),
        (Apply("lt", (AWAY, Const(4.0))), 3, None),
        (Apply("le", (Apply("abs", (AWAY,)), Const(2.5))), 2, 2),
        (Apply("ge", (KEY, Apply("sub", (ROW, Const(7.0))))), 7, None),
        (Apply("and", (Apply("le", (KEY, ROW)), Apply("lt", (AWAY, Const(4.0))))), 3, 0),
        (Apply("or", (Apply("le", (KEY, ROW)), Apply("lt", (AWAY, Const(4.0))))), None, None),
        (
            Apply(
                "not", (Apply("or", (Apply("gt", (KEY, ROW)), Apply("gt", (AWAY, Const(4.0))))),)
            ),
            4,
            0,
        ),
        (Apply("or", (Apply("le", (KEY, ROW)), Apply("lt", (KEY, Const(4.0))))), None, None),
        (Apply("le", (Apply("add", (ROW, KEY)), Const(4.0))), None, None),
        (Ref("mask"), None, None),
    ],
)
def test_how_far_a_test_lets_rows_see(test: Expr, behind: int | None, ahead: int | None) -> None:
    assert far(test) == Reach(behind, ahead)
