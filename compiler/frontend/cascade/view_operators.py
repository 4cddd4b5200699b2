"""ATen operators that move dimensions or make tensors."""

from __future__ import annotations

from ...ir.cascade.expr import Const
from . import views
from .context import Value
from .ranks import NotExpressedError
from .registry import Call, handles, listed
from .views import permute


@handles("alias", "detach", "contiguous", "clone", "lift_fresh_copy", "lift", "_conj", "dropout")
def _same(call: Call) -> Value:
    if call.operator == "dropout" and call.train:
        raise NotExpressedError("dropout in training")
    found: Value = call.self if call.self is not None else call.input
    return found


@handles("view", "reshape", "_unsafe_view", "flatten", "unflatten", "_reshape_alias", "view_as")
def _reshape(call: Call) -> Value:
    return views.reshape(call.context, call.self, call.sizes)


@handles("permute")
def _permute(call: Call) -> Value:
    return permute(call.self, [dim % len(call.self.dims) for dim in call.dims])


@handles("transpose", "swapaxes", "swapdims")
def _transpose(call: Call) -> Value:
    width = len(call.self.dims)
    a, b = (dim % width for dim in (list(call.arguments.values()))[1:3])
    order = list(range(width))
    order[a], order[b] = b, a
    return permute(call.self, order)


@handles("t", "numpy_T")
def _t(call: Call) -> Value:
    return permute(call.self, list(range(len(call.self.dims)))[::-1])


@handles("mT", "adjoint", "mH")
def _mt(call: Call) -> Value:
    width = len(call.self.dims)
    return permute(call.self, [*range(width - 2), width - 1, width - 2])


@handles("movedim")
def _movedim(call: Call) -> Value:
    width = len(call.self.dims)
    source, target = ([d % width for d in listed(x)] for x in (call.source, call.destination))
    order: list[int] = [-1] * width
    for a, b in zip(source, target, strict=True):
        order[b] = a
    rest = iter(d for d in range(width) if d not in source)
    return permute(call.self, [next(rest) if d < 0 else d for d in order])


@handles("unsqueeze")
def _unsqueeze(call: Call) -> Value:
    return views.unsqueeze(call.self, call.dim)


@handles("squeeze")
def _squeeze(call: Call) -> Value:
    return views.squeeze(call.self, None if call.dim is None else listed(call.dim))


@handles("expand", "expand_as", "broadcast_to")
def _expand(call: Call) -> Value:
    return views.expand(call.context, call.self, call.sizes, call.extents)


@handles("repeat")
def _repeat(call: Call) -> Value:
    return views.repeat(call.context, call.self, call.repeats)


@handles("repeat_interleave")
def _repeat_interleave(call: Call) -> Value:
    if not isinstance(call.repeats, int) or call.dim is None:
        raise NotExpressedError("repeat_interleave by a tensor")
    return views.repeat_interleave(call.context, call.self, call.repeats, call.dim)


@handles("cat", "concat", "concatenate")
def _cat(call: Call) -> Value:
    return views.concatenate(call.context, call.name, call.tensors, call.dim or 0)


@handles("pad", "constant_pad_nd")
def _pad(call: Call) -> Value:
    """Logits with constants before or behind them, such as the 0 of a softmax plus one."""
    widths = [(call.pad[at], call.pad[at + 1]) for at in range(0, len(call.pad), 2)]
    padded = [at for at, width in enumerate(widths) if width != (0, 0)]
    if (call.mode or "constant") != "constant" or len(padded) != 1 or min(widths[padded[0]]) < 0:
        raise NotExpressedError("padding of several dimensions, or by what is there")
    whole: Value = call.self
    if not call.context.is_computed(whole):
        raise NotExpressedError("padding of what is not computed here")
    number = 0.0 if call.value is None else float(call.value)
    constant = Value(((),) * len(whole.dims), Const(number))
    before, behind = widths[padded[0]]
    parts = [constant] * before + [whole] + [constant] * behind
    return views.concatenate(call.context, call.name, parts, -1 - padded[0])


@handles("slice", "narrow")
def _slice(call: Call) -> Value:
    start = call.start or 0
    end = start + call.length if call.length is not None else call.end
    end = 2**62 if end is None else end
    return views.cut(call.context, call.name, call.self, call.dim or 0, start, end, call.step or 1)


@handles("select")
def _select(call: Call) -> Value:
    if not call.self.dims[call.dim]:
        return views.squeeze(call.self, [call.dim])
    if not call.context.is_normalised(call.self):
        raise NotExpressedError("one coordinate of a rank")
    size = call.context.ranks.size(call.context.now(call.self).dims[call.dim][0])
    return views.pick(call.context, call.name, call.self, call.dim, call.index % size)


@handles("unbind")
def _unbind(call: Call) -> tuple[Value | None, ...]:
    dim = call.dim or 0
    sizes = [1] * len(call.results)
    found = views.pieces(call.context, call.name, call.self, dim, sizes)
    return tuple(None if one is None else views.squeeze(one, [dim]) for one in found)


@handles("split", "split_with_sizes", "chunk", "tensor_split")
def _split(call: Call) -> tuple[Value | None, ...]:
    dim = call.dim or 0
    return views.pieces(call.context, call.name, call.self, dim, [s[dim] for s in call.results])


@handles("arange")
def _arange(call: Call) -> Value:
    return views.arange(
        call.context, call.start or 0, call.step or 1, call.sizes[0], call.extents[0]
    )


@handles(
    "full",
    "full_like",
    "zeros",
    "ones",
    "zeros_like",
    "ones_like",
    "new_full",
    "new_zeros",
    "new_ones",
)
@handles("scalar_tensor")
def _filled(call: Call) -> Value:
    fill = call.fill_value if call.fill_value is not None else call.s
    if fill is None:
        fill = 1.0 if "ones" in call.operator else 0.0
    return views.filled(call.context, call.sizes, call.extents, fill, call.kind)


@handles("tril", "triu")
def _triangle(call: Call) -> Value:
    return views.triangle(call.context, call.self, call.diagonal or 0, call.operator == "tril")
