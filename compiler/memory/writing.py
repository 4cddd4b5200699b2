"""What stands for a program's calls and writes their results where a plan has them in the arena."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ..ir.ops.record import operator_of
from ..ir.program import Program
from .expand import INSTEAD
from .planning import MemoryPlan
from .survey import number, tensors

aten = torch.ops.aten

#: What stands for each call, and writes its results where the plan has them.
Writers = dict[Any, Callable[..., Any]]


def writers(program: Program, plan: MemoryPlan, arena: Tensor) -> Writers:
    """What stands for the calls that allocate, over an arena of the plan's size or more."""
    found: Writers = {}
    for node in program.graph.nodes:
        if node.op == "call_function":
            results = plan.survey.results(node)
            places = [at for at, each in enumerate(results) if _writes(node, at, each, plan)]
            written = [results[at] for at in places]
            if node in plan.joining.whole:
                found[node] = _there(_placed(results[0], plan, arena))
            elif INSTEAD in node.meta:
                here = {at: _placed(results[at], plan, arena) for at in places}
                found[node] = _whole(node.meta[INSTEAD], here)
            elif written:
                out = tuple(_placed(each, plan, arena) for each in written)
                found[node] = _writer(node, out, plan)
            elif isinstance(node.target, torch._ops.OpOverload):
                numbers = _numbers(node, node.target, plan)
                if numbers:  # it writes over an argument
                    found[node] = _with(numbers, node.target)
    return found


def _writes(node: fx.Node, at: int, result: Tensor, plan: MemoryPlan) -> bool:
    """Whether a call writes a result where the plan says: it is new, lies over an argument, or is a part."""
    made = plan.survey.of(result)
    if made is not None and made.node is node:
        return True
    return (node, at) in plan.sharing.in_place or (node, at) in plan.joining.parts


def _there(whole: Tensor) -> Callable[..., Tensor]:
    """For a `cat` whose parts lie where they should."""
    return lambda *_, **__: whole


def _placed(tensor: Tensor, plan: MemoryPlan, arena: Tensor) -> Tensor:
    """The part of the arena that holds a value."""
    first = plan.offsets[number(tensor)] // tensor.dtype.itemsize + tensor.storage_offset()
    return arena.view(tensor.dtype).as_strided(tensor.shape, tensor.stride(), first)


def _copy(out: Tensor, source: Tensor, *_: Any, **__: Any) -> None:
    if out.data_ptr() != source.data_ptr():  # in place there is nothing to do
        out.view(source.shape).copy_(source)


def _masked_fill(out: Tensor, source: Tensor, mask: Tensor, value: float) -> None:
    _copy(out, source)
    out.masked_fill_(mask, value)


def _slice_scatter(
    out: Tensor,
    source: Tensor,
    part: Tensor,
    dim: int = 0,
    start: int | None = None,
    end: int | None = None,
    step: int = 1,
) -> None:
    _copy(out, source)
    aten.slice.Tensor(out, dim, start, end, step).copy_(part)


def _pad(out: Tensor, source: Tensor, pad: Sequence[int], value: float = 0) -> None:
    """Ends of axes, the last one's first; below 0 they are cut off."""
    inner = out
    for axis, (low, high) in enumerate(zip(pad[::2], pad[1::2], strict=True), start=1):
        size = source.shape[-axis]
        source = source.narrow(-axis, max(-low, 0), size + min(low, 0) + min(high, 0))
        inner = inner.narrow(-axis, max(low, 0), source.shape[-axis])
    if inner.shape != out.shape:
        out.fill_(value)
    _copy(inner, source)


#: Operators whose own forms with `out` allocate, as they are written into a tensor.
INTO: dict[Any, Callable[..., Any]] = {
    aten.clone.default: _copy,
    aten._to_copy.default: _copy,
    aten.reshape.default: _copy,
    aten.masked_fill.Scalar: _masked_fill,
    aten.constant_pad_nd.default: _pad,
    aten.empty.memory_format: lambda *_, **__: None,
    aten.new_empty.default: lambda *_, **__: None,
    aten.copy.default: lambda out, _, source, *__: out.copy_(source),
    aten.relu.default: lambda out, source: torch.clamp_min(source, 0, out=out),
    aten.slice_scatter.default: _slice_scatter,
    aten.zeros_like.default: lambda out, *_, **__: out.zero_(),
}


#: Operators that make a tensor of a number they are given, and what asks for that tensor.
OF_TENSORS: dict[Any, Any] = {
    aten.bitwise_and.Scalar: aten.bitwise_and.Tensor,
    aten.__rshift__.Scalar: aten.bitwise_right_shift.Tensor,
} | {
    packet.Scalar: packet.Tensor
    for packet in (aten.eq, aten.ne, aten.lt, aten.le, aten.gt, aten.ge)
}


def _writer(node: fx.Node, out: tuple[Tensor, ...], plan: MemoryPlan) -> Callable[..., Any]:
    target: Any = node.target
    if target in INTO:
        return _given(INTO[target], out[0])
    kind = operator_of(target)
    if kind is not None:  # it asked what its tensors hold; caches are not among what it allocates
        return kind.standing_in(lambda call: _moved(call.run(), out))
    if target is aten.mean.dim:
        return _mean(node, out[0], plan)
    variant = out_variant(target) if isinstance(target, torch._ops.OpOverload) else None
    if variant is None or len(variant[1]) != len(out):
        return _copied(target, out)
    call, names = variant
    allowed = {argument.name for argument in call._schema.arguments}
    given = dict(zip(names, out, strict=True))

    def write(*args: Any, **kwargs: Any) -> Any:
        return call(*args, **{k: v for k, v in kwargs.items() if k in allowed}, **given)

    return _with(_numbers(node, call, plan), write)


def _with(numbers: Mapping[int, Tensor], call: Callable[..., Any]) -> Callable[..., Any]:
    """The call with these tensors in the place of its numbers."""
    if not numbers:
        return call
    return lambda *args, **kwargs: call(
        *(numbers.get(at, each) for at, each in enumerate(args)), **kwargs
    )


def _mean(node: fx.Node, out: Tensor, plan: MemoryPlan) -> Callable[..., Tensor]:
    """A sum that is divided, as torch's own is, by a number that is a tensor already."""
    [source] = node.all_input_nodes
    count = torch.tensor(plan.survey.values[source].numel() // out.numel(), dtype=out.dtype)

    def write(*args: Any) -> Tensor:
        torch.sum(*args, out=out)
        return torch.div(out, count, out=out)

    return write


def _numbers(node: fx.Node, call: torch._ops.OpOverload, plan: MemoryPlan) -> dict[int, Tensor]:
    """Python's numbers among a call's arguments where torch asks for a tensor, by their places, in the type
    that it computes in: given the number itself, it would make such a tensor in every call."""
    values = [
        plan.survey.values.get(each) if isinstance(each, fx.Node) else each for each in node.args
    ]
    beside = next((each for each in values if isinstance(each, Tensor)), None)
    return {
        at: torch.tensor(value, dtype=torch.result_type(beside, value))
        for at, (value, asked) in enumerate(zip(values, call._schema.arguments, strict=False))
        if beside is not None
        and isinstance(value, (bool, int, float))
        and str(asked.type) == "Tensor"
    }


def _given(into: Callable[..., Any], out: Tensor) -> Callable[..., Tensor]:
    def write(*args: Any, **kwargs: Any) -> Tensor:
        into(out, *args, **kwargs)
        return out

    return write


def _copied(target: Callable[..., Any], out: tuple[Tensor, ...]) -> Callable[..., Any]:
    """For an operator that allocates its results itself: they are moved to where they are to lie."""
    return lambda *args, **kwargs: _moved(target(*args, **kwargs), out)


def _moved(given: Any, out: tuple[Tensor, ...]) -> Any:
    for place, value in zip(out, tensors(given), strict=True):
        place.copy_(value)
    return out[0] if isinstance(given, Tensor) else out


def _whole(call: Callable[..., Any], out: Mapping[int, Tensor]) -> Callable[..., Any]:
    """For a call that was left whole: of its results, those of a place are moved there."""

    def write(*args: Any, **kwargs: Any) -> Any:
        given = call(*args, **kwargs)
        results = [*tensors(given)]
        for at, place in out.items():
            place.copy_(results[at])
            results[at] = place
        return results[0] if isinstance(given, Tensor) else tuple(results)

    return write


def out_variant(target: torch._ops.OpOverload) -> tuple[torch._ops.OpOverload, list[str]] | None:
    """The overload of an operator that writes into given tensors, and their names; None without one."""
    target = OF_TENSORS.get(target, target)
    packet, asked = target.overloadpacket, _positional(target)
    for name in packet.overloads():
        overload = getattr(packet, name)
        names = [argument.name for argument in overload._schema.arguments if argument.is_out]
        if names and _positional(overload) == asked:
            return overload, names
    return None


def _positional(overload: torch._ops.OpOverload) -> list[tuple[str, str]]:
    return [
        (argument.name, str(argument.type))
        for argument in overload._schema.arguments
        if not argument.kwarg_only
    ]
