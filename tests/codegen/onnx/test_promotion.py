"""Operator by dtype by dtype, lowered to ONNX, beside torch: the type of the result and its numbers."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import einfold

#: Fractions, negative numbers, zero, infinity and no number at all, where a type has them.
VALUES: dict[torch.dtype, Tensor] = {
    torch.float32: torch.tensor([-2.5, -0.0, 0.5, 2.0, 2.5, math.inf, math.nan, 1.0]),
    torch.float64: torch.tensor([2.5, 0.0, -1.5, 7.0, 3.0, -math.inf, 1.0, math.nan]).double(),
    torch.int64: torch.tensor([-3, 0, 1, 2, 3, 5, 2, 2**40]),
    torch.int32: torch.tensor([2, 0, -1, 2, 1, 7, 3, 1], dtype=torch.int32),
    torch.int16: torch.tensor([2, 0, -1, 2, 1, 7, 3, 300], dtype=torch.int16),
    torch.uint8: torch.tensor([2, 0, 255, 3, 1, 7, 200, 1], dtype=torch.uint8),
    torch.bool: torch.tensor([True, False, False, True, True, False, True, True]),
}

BINARY: dict[str, Callable[[Any, Any], Tensor]] = {
    "add": operator.add,
    "add alpha": lambda x, y: torch.add(x, y, alpha=2),
    "sub": operator.sub,
    "sub alpha": lambda x, y: torch.sub(x, y, alpha=3),
    "mul": operator.mul,
    "div": operator.truediv,
    # Integers of double precision: onnxruntime's power of two tensors is right up to 2 ** 53.
    "pow": lambda x, y: torch.pow(
        x if x.dtype == torch.bool else x.clamp(-9, 300),
        y if y.dtype == torch.bool else y.abs() % 4,
    ),
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
    "eq": operator.eq,
    "ne": operator.ne,
    "logical and": torch.logical_and,
    "logical or": torch.logical_or,
    "logical xor": torch.logical_xor,
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
    "cat": lambda x, y: torch.cat([x, y]),
    "where": lambda x, y: torch.where(x > 1, x, y),
    "of no axes": lambda x, y: x + y[0],
    "compared with no axes": lambda x, y: x < y[2],
}

UNARY: dict[str, Callable[[Any], Tensor]] = {
    **{
        name: getattr(torch, name)
        for name in (
            *("exp", "log", "sqrt", "rsqrt", "reciprocal", "tanh", "sigmoid", "cos", "sin", "erf"),
            *("floor", "ceil", "round", "neg", "abs", "sign", "relu", "square", "logical_not"),
            *("bitwise_not", "amax", "trunc"),
        )
    },
    "sum": lambda x: x[:6].sum(0),
    "mean": lambda x: x[1:4].mean(0),
    "clamp": lambda x: x.clamp(0, 2),
    "clamp by a fraction": lambda x: x.clamp(min=0.5),
    "clamp to a fraction": lambda x: x.clamp(max=1.5),
    "filled": lambda x: x.masked_fill(x > 1, 1),
    "where": lambda x: torch.where(x > 1, x, 0.5),
    "softmax": lambda x: x[:5].softmax(0, dtype=torch.float32),
    "squeezed in vain": lambda x: x.reshape(2, 1, 4).squeeze(0) == x.reshape(2, 1, 4),
    **{
        f"{name} {number}": lambda x, f=function, n=number: f(x, n)
        for name, function in (
            *(("lt", operator.lt), ("ge", operator.ge), ("eq", operator.eq), ("ne", operator.ne)),
            *(("add", operator.add), ("mul", operator.mul), ("div", operator.truediv)),
        )
        for number in (2, 2.5, -0.5, True)
    },
    **{f"pow {n}": lambda x, n=n: x**n for n in (2, 3, 0, 0.5, -0.5, 2.5, -1.0)},
    "number to a power": lambda x: 2.0 ** x[:6],
    "number less": lambda x: 3 - x,
}


def possible(function: Callable[..., Tensor], *arguments: Tensor) -> bool:
    """Whether torch itself has the operator for these types."""
    try:
        function(*arguments)
    except (RuntimeError, TypeError):
        return False
    return True


class Table(nn.Module):
    """Every operator of a table that torch has for the types of the arguments, by name."""

    def __init__(self, table: dict[str, Callable[..., Tensor]], *arguments: Tensor) -> None:
        super().__init__()
        self.table = {n: f for n, f in table.items() if possible(f, *arguments)}

    def forward(self, *arguments: Tensor) -> dict[str, Tensor]:
        return {name: function(*arguments) for name, function in self.table.items()}


def wrong(module: nn.Module, arguments: tuple[Tensor, ...], path: Path) -> list[str]:
    """The operators whose exported result differs in type or in any number."""
    session = onnxruntime.InferenceSession(
        str(einfold.export_onnx(module, path, arguments, check=False))
    )
    feeds = {node.name: a.numpy() for node, a in zip(session.get_inputs(), arguments, strict=True)}
    names = [node.name for node in session.get_outputs()]
    found = dict(zip(names, session.run(None, feeds), strict=True))
    bad = []
    for name, expected in module(*arguments).items():
        want, got = expected.numpy(), found[name]
        exact = expected.dtype == torch.bool or not expected.dtype.is_floating_point
        tolerance = 0 if exact else 2e-6
        if got.dtype != want.dtype or not np.allclose(
            got, want, rtol=tolerance, atol=tolerance / 10, equal_nan=True
        ):
            bad.append(f"{name}: {got.tolist()} ({got.dtype}) for {want.tolist()} ({want.dtype})")
    return bad


F32, F64, I64, I32, I16, U8, B = VALUES

#: Of each two kinds of types one pair, in both orders where they differ.
PAIRS = [(F32, F32), (I64, F32), (F32, I32), (I32, I64), (I64, I64), (U8, U8), (U8, I16), (B, B)]
PAIRS += [(B, F32), (I64, B), (F64, F32), (F64, U8), (I16, F64)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("left", "right"), PAIRS)
def test_two_types(left: torch.dtype, right: torch.dtype, tmp_path: Path) -> None:
    arguments = VALUES[left], VALUES[right].roll(1)
    module = Table(BINARY, *arguments)
    assert len(module.table) > 10
    assert not wrong(module, arguments, tmp_path / "a")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", VALUES)
def test_one_type_and_numbers(dtype: torch.dtype, tmp_path: Path) -> None:
    module = Table(UNARY, VALUES[dtype])
    assert len(module.table) > 20
    if dtype == torch.float64:
        del module.table["erf"]  # onnxruntime has none; the export's check refuses it
    assert not wrong(module, (VALUES[dtype],), tmp_path / "a")
