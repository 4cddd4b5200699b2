"""One spelling for each thing, while a trace is imported.

The IR has no devices, memory formats or aliasing: a value is its numbers. So copies, no-op casts,
dropout in inference and the many spellings of reshape and cast leave no trace behind this file.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten

#: Arguments that speak of memory, not of numbers.
_MEMORY_KEYWORDS = (
    "device",
    "layout",
    "memory_format",
    "pin_memory",
    "non_blocking",
    "copy",
    "implicit",
)

_SAME_VALUE = {
    aten.clone.default,
    aten.contiguous.default,
    aten.alias.default,
    aten.detach.default,
    aten.detach_.default,
    aten.lift_fresh_copy.default,
    aten.lift_fresh.default,
}
#: Operators beside a number, and the number that changes nothing.
_NEUTRAL: dict[object, int] = {
    aten.add.Tensor: 0,
    aten.sub.Tensor: 0,
    aten.mul.Tensor: 1,
    aten.div.Tensor: 1,
}
_NEUTRAL |= {aten.pow.Tensor_Scalar: 1}
_CASTS = {aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten._to_copy.default}
_CASTS_LIKE = {aten.to.other, aten.type_as.default}
_RESHAPES = {aten.view.default, aten._unsafe_view.default, aten.reshape.default}
_DROPOUTS = {aten.dropout.default, aten.native_dropout.default, aten.feature_dropout.default}

#: What gives a tensor the shape of another.
_AS_ANOTHER = {
    aten.view_as.default: aten.reshape_as.default,
    aten.reshape_as.default: aten.reshape_as.default,
    aten.expand_as.default: aten.expand_as.default,
}

#: Turns of the last two axes, of numbers without an imaginary part.
_TURNS = {aten.mT.default, aten.mH.default, aten.adjoint.default}

#: Other names of one operator.
_OTHER_NAMES = {
    aten.concat.default: aten.cat.default,
    aten.__and__.Tensor: aten.bitwise_and.Tensor,
    aten.__or__.Tensor: aten.bitwise_or.Tensor,
    aten.min.other: aten.minimum.default,
    aten.max.other: aten.maximum.default,
}

Call = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]


def normalise_call(
    target: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> fx.Node | Call:
    """The call in its one spelling, or the argument that it is equal to."""
    kwargs = {key: value for key, value in kwargs.items() if key not in _MEMORY_KEYWORDS}
    if target in _SAME_VALUE:
        return _first(args)
    if target in _DROPOUTS and not args[2]:
        return _first(args)
    if target in _RESHAPES:
        return aten.reshape.default, (args[0], list(args[1])), {}
    dtype = _cast_dtype(target, args, kwargs)
    if dtype is not None:
        return cast(args[0], dtype)
    if target is aten.slice.Tensor and _takes_all(args):
        return _first(args)
    if target is aten.expand.default and _same_sizes(args):
        return _first(args)
    if len(args) > 1 and _NEUTRAL.get(target) == args[1] and _keeps_its_type(args) and not kwargs:
        return _first(args)
    if target in _AS_ANOTHER:
        same = str(list(args[0].meta["val"].shape)) == str(list(args[1].meta["val"].shape))
        return _first(args) if same else (_AS_ANOTHER[target], args, {})
    if target in _TURNS:
        return aten.transpose.int, (args[0], -2, -1), {}
    if target in _OTHER_NAMES:
        return _OTHER_NAMES[target], args, kwargs
    if target is aten.pad.default and (*args, "constant")[2] == "constant":
        return (
            aten.constant_pad_nd.default,
            (*args[:2], *(v for v in args[3:] if v is not None)),
            {},
        )
    if target in (aten.chunk.default, aten.split.Tensor):
        return _split(target, args)
    return target, args, kwargs


def is_cast(target: object) -> bool:
    """Whether an operator gives the numbers of its first argument in another type."""
    return target in _CASTS | _CASTS_LIKE


def _keeps_its_type(args: tuple[Any, ...]) -> bool:
    """Whether a number beside a tensor leaves its type: where that is one of fractions, it does."""
    if not isinstance(args[0], fx.Node) or not isinstance(args[1], (int, float)):
        return False
    value = args[0].meta["val"]
    return isinstance(value, torch.Tensor) and value.dtype.is_floating_point


def _first(args: tuple[Any, ...]) -> fx.Node:
    node = args[0]
    assert isinstance(node, fx.Node)
    return node


def _cast_dtype(
    target: object, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> torch.dtype | None:
    """The dtype that a cast in any of its spellings gives; None where the call is no cast."""
    if target in _CASTS_LIKE:
        other: torch.dtype = args[1].meta["val"].dtype
        return other
    if target not in _CASTS:
        return None
    found = [value for value in (*args[1:], kwargs.get("dtype")) if isinstance(value, torch.dtype)]
    same: torch.dtype = args[0].meta["val"].dtype
    return found[0] if found else same


def cast(value: fx.Node, dtype: torch.dtype) -> fx.Node | Call:
    """A cast, or the value itself where it has the type."""
    if value.meta["val"].dtype == dtype:
        return value
    return aten._to_copy.default, (value,), {"dtype": dtype}


def _takes_all(args: tuple[Any, ...]) -> bool:
    node, dim, start, end, step = (*args, *(0, 0, None, 1)[len(args) - 1 :])[:5]
    size = node.meta["val"].shape[dim]
    if step != 1 or start not in (0, None):
        return False
    if end is None or (isinstance(end, int) and end >= 2**62):
        return True
    return isinstance(end, int) and isinstance(size, int) and end >= size


def _same_sizes(args: tuple[Any, ...]) -> bool:
    have = args[0].meta["val"].shape
    want = [size.meta["val"] if isinstance(size, fx.Node) else size for size in args[1]]
    if len(have) != len(want):
        return False
    return all(
        (isinstance(w, int) and w == -1) or str(w) == str(h)
        for h, w in zip(have, want, strict=True)
    )


def _split(target: Callable[..., Any], args: tuple[Any, ...]) -> Call:
    """`chunk` and `split` of a fixed size, as split_with_sizes."""
    node, count, dim = (*args, 0)[:3]
    size = node.meta["val"].shape[dim]
    if not isinstance(size, int):
        return target, args, {}
    part = -(-size // count) if target is aten.chunk.default else count
    sizes = [min(part, size - start) for start in range(0, size, part)]
    return aten.split_with_sizes.default, (node, sizes, dim), {}
