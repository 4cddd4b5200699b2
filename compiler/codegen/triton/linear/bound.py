"""Kernels in the place of the operators over stored weights, and the weights in the order that these load."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from ....ir.ops.activation import gated_activation_reference
from ....ir.ops.experts import pick, route
from ....ir.ops.quantized import (
    QuantizedEmbedding,
    QuantizedExperts,
    QuantizedLinear,
    StoredEmbedding,
    StoredLinear,
)
from ....ir.ops.record import Operator, operator_of
from ....ir.ops.rounding import RoundToInt8
from ....ir.program import Program, call_arguments
from ....ir.quant.scheme import Scheme, read_scheme
from ....ir.quant.schemes.grouped import Grouped
from ....ir.weights import Weight
from ..dtypes import TYPES
from .decoder import decoder_of
from .kernels import LinearKernel, LinearWeight, linear_kernel, product, rows_of
from .kinds import INT8, LinearKind, type_of
from .layout import Layout


@dataclass(frozen=True)
class Stored:
    """A weight [.., N, M] that a call reads: its scheme, width, and the nodes of its pieces by name.

    `x` is what it multiplies; None for an embedding, of which rows are read.
    """

    scheme: Scheme
    width: int
    pieces: Mapping[str, fx.Node]
    x: fx.Node | None
    bias: fx.Node | None

    @property
    def names(self) -> dict[str, str]:
        """The names of the pieces in the program's weights."""
        return {label: str(node.target) for label, node in self.pieces.items()}

    @property
    def integers(self) -> bool:
        """Whether what it multiplies is rounded to 8 bits, and a kernel multiplies integers."""
        rounded = self.x is not None and operator_of(self.x.target) is RoundToInt8
        return rounded and decoder_of(self.scheme, integers=True) is not None

    @property
    def way(self) -> tuple[Scheme, int, bool]:
        """What the order of the pieces depends on."""
        return self.scheme, self.width, self.integers

    @property
    def kind(self) -> LinearKind:
        """The kind of the product; of an embedding only the order of its pieces is used."""
        x = "fp32" if self.x is None else type_of(self.x.meta["val"].dtype)
        bias = "" if self.bias is None else TYPES[self.bias.meta["val"].dtype]
        return LinearKind(self.scheme, x, bias, INT8 if self.integers else "")


Readers = dict[fx.Node, list[Stored]]

#: What a call reads that is none of these.
_NOTHING = Stored(Grouped(), 0, {}, None, None)


def readers(program: Program) -> Readers:
    """The calls that kernels stand for, in the order of the graph, with the weights that each reads.

    A weight is taken only where all that read it are among them, since it is stored in another order then.
    """
    found: Readers = {
        node: stored
        for node in program.nodes(*(operator.overload() for operator in _READ))
        if (operator := operator_of(node.target))
        and all(map(_readable, stored := _READ[operator](node)))
    }
    while True:
        as_read = {
            name: one.way for of in found.values() for one in of for name in one.names.values()
        }
        held = {
            str(read.target)
            for read in program.graph.find_nodes(op="get_attr")
            if not found.keys() >= set(read.users)
        }
        left = {
            node: of
            for node, of in found.items()
            if all(
                name not in held and as_read[name] == one.way
                for one in of
                for name in one.names.values()
            )
        }
        if len(left) == len(found):
            return found
        found = left


def _readable(stored: Stored) -> bool:
    return (
        decoder_of(stored.scheme, stored.integers) is not None
        and all(node.op == "get_attr" for node in stored.pieces.values())
        and (stored.x is None or bool(type_of(stored.x.meta["val"].dtype)))
    )


def linear_kernels(program: Program) -> list[LinearKernel]:
    """The kernels of a program's products, each once, in the order of the graph."""
    found = (one.kind for of in readers(program).values() for one in of if one.x is not None)
    return [linear_kernel(kind) for kind in dict.fromkeys(found)]


def reorder(program: Program) -> None:
    """Brings the weights that kernels read into their order: each when it is loaded, on the device that it is
    loaded to. Once for a program."""
    pieces = {
        name: (label, one)
        for of in readers(program).values()
        for one in of
        for label, name in one.names.items()
    }
    reordered = {
        name: _reordered(label, program.weights[name], one.kind.layout(one.width))
        for name, (label, one) in pieces.items()
    }
    program.weights.restore(reordered)


def bind(program: Program, kernels: Sequence[LinearKernel]) -> dict[fx.Node, Callable[..., Any]]:
    """For each call, the function to call with its arguments instead, and with weights in the order that
    `reorder` makes."""
    of_kind = {kernel.kind: kernel for kernel in kernels}
    for kernel in kernels:
        kernel.function("merge")  # an absent Triton is told of now, not at the first token
    found: dict[fx.Node, Callable[..., Any]] = {}
    reading = readers(program)
    for node in program.nodes(RoundToInt8.overload()):
        if all(of.integers for user in node.users for of in reading.get(user, [_NOTHING])):
            found[node] = RoundToInt8.standing_in(_as_it_is)  # products round what they read
    for node, of in reading.items():
        operator = operator_of(node.target)
        assert operator is not None
        made = [of_kind[one.kind] for one in of if one.x is not None]
        found[node] = operator.standing_in(_BOUND[operator](of, made))
    return found


def _as_it_is(call: RoundToInt8) -> Tensor:
    return call.x


def _reordered(label: str, weight: Weight, layout: Layout) -> Weight:
    axes = {"packed": 3, "units": 1}.get(label, 2)
    lead, rows = weight.shape[:-axes], weight.shape[-axes]
    dtype = layout.dtype if label == "packed" else weight.dtype
    shape = layout.shapes(lead, rows)[label]
    return Weight(shape, dtype, lambda: layout.repacked(label, weight.load()))


def _of_groups(node: fx.Node) -> list[Stored]:
    """What `quantized_linear` and `quantized_embedding` read."""
    found = call_arguments(node)
    x = found.get("x")
    width = found["width"] if x is None else x.meta["val"].shape[-1]
    return [_grouped(found, "", width, x)]


def _of_experts(node: fx.Node) -> list[Stored]:
    found = call_arguments(node)
    x, inner = found["x_TM"], found["gate_up_packed"].meta["val"].shape[1] // 2
    return [
        _grouped(found, "gate_up_", x.meta["val"].shape[-1], x),
        _grouped(found, "down_", inner, x),
    ]


def _grouped(found: Mapping[str, Any], prefix: str, width: int, x: fx.Node | None) -> Stored:
    given = {label: found[prefix + label] for label in ("packed", "scales", "zeros")}
    pieces = {label: node for label, node in given.items() if node is not None}
    scheme = Grouped(found["bits"], found["block"], symmetric="zeros" not in pieces)
    return Stored(scheme, int(width), pieces, x, found.get(f"{prefix}bias"))


def _of_scheme(node: fx.Node) -> list[Stored]:
    """What `stored_linear` and `stored_embedding` read."""
    found = call_arguments(node)
    scheme, shape = read_scheme(found["scheme"]), tuple(found["shape"])
    pieces = scheme.named(found["pieces"], shape)
    return [Stored(scheme, shape[-1], pieces, found.get("x"), found.get("bias"))]


def _linear(of: Sequence[Stored], made: Sequence[LinearKernel]) -> Callable[[Any], Tensor]:
    (kernel,), (stored,) = made, of

    def run(call: Any) -> Tensor:
        return product(kernel, _weight(call, stored), call.x, call.bias)

    return run


def _embedding(of: Sequence[Stored], made: Sequence[LinearKernel]) -> Callable[[Any], Tensor]:
    """Rows are few: they are put back into the scheme's order, and mean what it says."""
    (stored,) = of
    layout = stored.kind.layout(stored.width)
    return lambda call: rows_of(stored.scheme, layout, _weight(call, stored).at(call.ids))


def _experts(
    of: Sequence[Stored], made: Sequence[LinearKernel]
) -> Callable[[QuantizedExperts], Tensor]:
    """Each expert's products on its own tokens, by two launches."""
    first, second = made

    def run(call: QuantizedExperts) -> Tensor:
        gate_up = LinearWeight(call.gate_up_packed, call.gate_up_scales, call.gate_up_zeros)
        down = LinearWeight(call.down_packed, call.down_scales, call.down_zeros)

        def mlp(expert: int, rows: Tensor) -> Tensor:
            bias = pick(call.gate_up_bias, expert)
            gate, up = product(first, gate_up.of(expert), rows, bias).chunk(2, dim=-1)
            hidden = gated_activation_reference(gate, up, call.kind, call.alpha, call.limit)
            return product(second, down.of(expert), hidden, pick(call.down_bias, expert))

        return route(call.x_TM, call.index_TJ, call.weight_TJ, mlp)

    return run


def _weight(call: Any, stored: Stored) -> LinearWeight:
    """The pieces that a call is given."""
    if isinstance(call, (StoredLinear, StoredEmbedding)):
        return LinearWeight.of_pieces(dict(zip(stored.pieces, call.pieces, strict=True)))
    return LinearWeight(call.packed, call.scales, call.zeros)


#: What reads weights, and how a call of it says which; what makes its meaning of the kernels.
_READ: dict[type[Operator], Callable[[fx.Node], list[Stored]]] = {
    QuantizedLinear: _of_groups,
    QuantizedEmbedding: _of_groups,
    QuantizedExperts: _of_experts,
    StoredLinear: _of_scheme,
    StoredEmbedding: _of_scheme,
}
_BOUND: dict[type[Operator], Callable[..., Callable[[Any], Tensor]]] = {
    QuantizedLinear: _linear,
    QuantizedEmbedding: _embedding,
    QuantizedExperts: _experts,
    StoredLinear: _linear,
    StoredEmbedding: _embedding,
}
