"""Weights that stay in two bytes while a model runs in float32.

Linears multiply with some rows of their weight at a time, widened in a buffer that the processor's cache
holds; embeddings widen the rows that they look up. Whatever else reads such a weight gets all of it, widened.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

#: Numbers that are widened together, 4 MB. 2^18 to 2^20 take as long within a fifth beside 32 rows; whole
#: weights a fifth to two thirds more, for they are written to memory and read again.
_TOGETHER = 1 << 20

#: Attributes of a parameter that are numbers; others are of its form, which the stand-in has too.
_OF_NUMBERS = {"T", "H", "mT", "mH", "data", "real", "imag"}

#: Methods that tell of the form.
_OF_FORM = {"size", "dim", "numel", "nelement", "is_floating_point", "__len__", "requires_grad_"}


def may_stay(owner: nn.Module, data: Any) -> bool:
    """Whether a module's parameter can stay as its data are: a linear's or an embedding's, in two bytes."""
    return (
        type(owner) in (nn.Linear, nn.Embedding)
        and type(data) in (Tensor, nn.Parameter)
        and data.is_floating_point()
        and data.itemsize == 2
        and data.device.type == "cpu"
    )


def stand_in(shape: torch.Size) -> Tensor:
    """What a parameter holds whose numbers are elsewhere: the form, in float32, and not a number anywhere, so
    that nothing goes on unseen which came by it in a way that is not followed here."""
    return torch.full((), torch.nan, dtype=torch.float32, device="cpu").expand(shape)


class Narrow(TorchFunctionMode):
    """Gives functions the numbers of parameters, by their ids, that hold a `stand_in`."""

    def __init__(self, data: Mapping[int, Tensor]) -> None:
        super().__init__()
        self._data = data

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if _of_form(func) or not self._holds((args, kwargs)):
            return func(*args, **kwargs)
        if func is functional.linear and len(args) >= 2:
            x, weight, *bias = args
            found = self._data.get(id(weight))
            if found is not None and x.dtype == torch.float32:
                return _linear(self._wide(x), found, *self._wide(bias), **self._wide(kwargs))
        elif func is functional.embedding and len(args) >= 2:
            found = self._data.get(id(args[1]))
            scales = any(args[3:4]) or kwargs.get("max_norm")  # rows of the table itself, in place
            if found is not None and not scales:
                return func(args[0], found, *args[2:], **kwargs).float()
        return func(*self._wide(args), **self._wide(kwargs))

    def _holds(self, value: Any) -> bool:
        if isinstance(value, list | tuple):
            return any(map(self._holds, value))
        if isinstance(value, dict):
            return any(map(self._holds, value.values()))
        return id(value) in self._data

    def _wide(self, value: Any) -> Any:
        if type(value) in (list, tuple):
            return type(value)(map(self._wide, value))
        if type(value) is dict:
            return {key: self._wide(part) for key, part in value.items()}
        found = self._data.get(id(value))
        return value if found is None else found.float()


def _of_form(func: Any) -> bool:
    """Whether a function asks for what a stand-in has too: `weight.dtype` is asked for by a descriptor."""
    name = getattr(func, "__name__", "")
    if name == "__get__":
        return getattr(func.__self__, "__name__", "") not in _OF_NUMBERS
    return name in _OF_FORM


def _linear(x: Tensor, weight_NM: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ and a bias, in float32."""
    rows, width = weight_NM.shape
    step = max(1, min(rows, _TOGETHER // max(1, width)))
    flat_TM = x.reshape(-1, width)
    found_TN = flat_TM.new_empty(len(flat_TM), rows)
    buffer = flat_TM.new_empty(step, width)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        part = buffer[: stop - start].copy_(weight_NM[start:stop])
        torch.mm(flat_TM, part.T, out=found_TN[:, start:stop])
    if bias is not None:
        found_TN += bias
    return found_TN.reshape(*x.shape[:-1], rows)
