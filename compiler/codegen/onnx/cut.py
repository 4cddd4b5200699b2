"""Cuts a `model.onnx` into super-ops: the embedding, each layer, the head; a model each, run one by one.

    nodes, in order   Gather    | norm, MatMulNBits, GroupQueryAttention, .. | norm, .. | Gather, MatMulNBits
    super-op          embedding | layer 0                                    | layer 1  | head

A layer with experts is two: `layer 0`, at the end of which its tokens have chosen, and `layer 0 experts`,
which is taken apart where it is a large part of all. A node belongs to the layer whose number stands in the
names of its weights, and never to one before that of the node in front of it: whatever the names say, the
super-ops are runs of the order and compute what the whole does. What a later super-op reads is a result of
the one that makes it. Needs onnx and no torch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from .routing import Routing, beginnings, choices_of, routing_of

#: The number of a layer in a weight's name, such as `model.layers.7.mlp.gate_up.packed`.
_LAYER = re.compile(r"\.(\d{1,5})\.")

#: What only looks rows up: which of its inputs are tables. They are read where they lie, in the mapped file.
_TABLES = {
    "Gather": (0,),
    "GatherBlockQuantized": (0, 2, 3),
    "GroupQueryAttention": (7, 8),
    "RotaryEmbedding": (1, 2),
}

#: Which input of an operator says which rows.
_ROWS = {"Gather": 1, "GatherBlockQuantized": 1, "GroupQueryAttention": 5, "RotaryEmbedding": 3}

#: What onnxruntime 1.31 packs: codes once, scales as they are, in its order, and as sums.
_PACKED = "MatMulNBits"

#: Products whose weight, their second input, it packs as it is.
_PRODUCTS = ("MatMul", "Gemm", "FusedMatMul")

#: The input of GroupQueryAttention that sinks are.
_SINKS = 11

#: Bytes that it adds to what it packed of one weight, so that codes, sums and scales begin at 64 each.
PADDING = 2 * 63

#: Bytes below which a tensor that was not packed lies in the saved model, and in memory.
SMALL = 64 << 10

#: Operators that hold a weight once. What goes through others first is charged as unpacked to float32.
_PLAIN = (
    *(*_PRODUCTS, "Add", "Sub", "Mul", "Div", "Conv", "BiasGelu", "FastGelu"),
    *(
        "LayerNormalization",
        "RMSNormalization",
        "SimplifiedLayerNormalization",
        "SkipLayerNormalization",
    ),
    *(
        "SkipSimplifiedLayerNormalization",
        "GroupQueryAttention",
        "Attention",
        "Gather",
        "GatherBlockQuantized",
        "Reshape",
        "Expand",
    ),
)


#: How super-ops of layers are called, what stands behind where they are its experts, and what stands before
#: the number of a part of a product.
_OF_LAYER, _EXPERTS, _PART = "layer ", " experts", " part "

_REST, _WHOLE = " rest", re.compile(f"{_OF_LAYER}[0-9]+")

#: Layers with more than this part of all weights, and so many bytes, are taken apart in two. There is room
#: for the largest super-op and for what is read beside it, which so is less than a twentieth of all.
HALVED, LEAST_HALVED = 25, 4 << 20

#: Experts that run together are at most this part of all weights, or so many bytes: what a prompt reads ahead
#: and what is loaded at once are multiples of that.
_PARTS, _LEAST = 32, 16 << 20

#: Rows of a part are a multiple of this: kernels take so many at once.
_ROWS_OF_A_PART = 64


@dataclass(frozen=True)
class Extent:
    """Where a weight lies: bytes from the start of the file, its sizes and ONNX's number of its type."""

    name: str
    offset: int
    length: int
    dims: tuple[int, ...]
    dtype: int


@dataclass(frozen=True)
class PackedWeight:
    """A weight as onnxruntime saves it packed: codes, sums of blocks and scales, or as it is."""

    nbytes: int
    sums: tuple[int, int] = (0, 0)
    """Where in it they begin and end."""


@dataclass(frozen=True)
class SuperOp:
    """Nodes that run together, and what they read and give."""

    name: str
    nodes: tuple[Any, ...]
    inputs: tuple[str, ...]
    """Inputs of the model, and results of super-ops before."""
    outputs: tuple[str, ...]
    """Results of the model, and what super-ops behind it read."""
    weights: tuple[Extent, ...]
    """What must be in memory while it runs."""
    tables: tuple[Extent, ...]
    """What it looks rows up in: it lies in the mapped file, and of it only those rows are read."""
    constants: tuple[Any, ...]
    """Tensors that lie in the model itself."""
    held: int
    """Bytes that onnxruntime holds of the weights once they are packed."""
    packed: tuple[tuple[PackedWeight, ...], ...]
    """Its weights as onnxruntime saves them packed: those that every token reads, then those of each expert;
    nothing where it would widen one."""
    widest: int
    """Floats that its nodes make of a token at once."""
    routing: Routing | None = None
    """Whose weights are whose, where its tokens have chosen experts."""

    @property
    def nbytes(self) -> int:
        """Bytes of the weights in the file."""
        return sum(extent.length for extent in self.weights)

    @property
    def chosen(self) -> int:
        """Bytes in the file of what one token reads, on average where it chooses experts."""
        if self.routing is None:
            return self.nbytes
        names = {name for each in self.routing.experts.values() for name in each}
        experts = sum(extent.length for extent in self.weights if extent.name in names)
        return self.nbytes - experts + experts * self.routing.choices // self.routing.of


def cut(model: Any) -> list[SuperOp]:
    """The super-ops of a ModelProto, in order."""
    graph = model.graph
    extents = {t.name: _extent(t) for t in graph.initializer if t.external_data}
    constants = {t.name: t for t in graph.initializer if not t.external_data}
    runs = list(_halved(_runs(graph.node, extents, constants), extents, constants))
    choices = choices_of(graph.node, constants)
    read_by = [_reads(nodes) for _, nodes in runs]
    made: dict[str, int] = {}
    for index, (_, nodes) in enumerate(runs):
        made.update(dict.fromkeys((o for node in nodes for o in node.output if o), index))
    results = {output.name for output in graph.output}
    given = {value.name for value in graph.input}
    found = []
    for index, (name, nodes) in enumerate(runs):
        own = [o for node in nodes for o in node.output if o]
        later = set().union(*read_by[index + 1 :]) | results
        reads = sorted(read_by[index])
        tables = _tables(nodes, extents, constants)
        weights = [extents[n] for n in reads if n in extents and n not in tables]
        stored = [extent.name for extent in weights]
        routing = routing_of(nodes, choices, stored, constants)
        found.append(
            SuperOp(
                name,
                tuple(nodes),
                tuple(n for n in reads if n in given or made.get(n, index) < index),
                tuple(o for o in own if o in later),
                tuple(sorted(weights, key=lambda extent: extent.offset)),
                tuple(extents[n] for n in reads if n in tables),
                tuple(constants[n] for n in reads if n in constants),
                sum(_held(extent, nodes) for extent in weights),
                _packed(weights, nodes, routing),
                _widest(nodes, extents),
                routing,
            )
        )
    return found


def divide(model: Any) -> None:
    """Takes products with more weights than the largest layer apart by rows of the weight, each a super-op.

        MatMulNBits(x, W) [.., N]   ->   Concat(MatMulNBits(x, W[:n]), MatMulNBits(x, W[n:]), ..)

    A head of many tokens would else need buffers of its size. Every result is computed as before.
    """
    from onnx import GraphProto

    graph = model.graph
    extents = {t.name: _extent(t) for t in graph.initializer if t.external_data}
    layers = [op.nbytes for op in cut(model) if op.name.startswith(_OF_LAYER)]
    largest = max(layers, default=0)
    divided = GraphProto()
    for node in graph.node:
        parts = _parts(node, extents, largest) if largest else 1
        if parts == 1:
            divided.node.append(node)
            continue
        operands = list(_rows_of(node, extents, parts))
        for index, part in enumerate(operands):
            name = f"{node.output[0]}{_PART}{index + 1}/{len(operands)}"
            made = divided.node.add()
            made.CopyFrom(node)
            made.name = made.output[0] = name
            for place, extent in part.items():
                made.input[place] = extent.name
                graph.initializer.append(external(extent, _location(graph, node)))
            next(a for a in made.attribute if a.name == "N").i = part[1].dims[0]
        joined = divided.node.add(op_type="Concat", output=node.output)
        joined.input.extend(
            made.name for made in divided.node if made.name.startswith(f"{node.output[0]}{_PART}")
        )
        joined.attribute.add(name="axis", type=2, i=-1)
    del graph.node[:]
    graph.node.extend(divided.node)


def _parts(node: Any, extents: dict[str, Extent], largest: int) -> int:
    """Into how many products one is taken apart."""
    operands = [name for place, name in enumerate(node.input) if place and name]
    if node.op_type != _PACKED or (len(node.input) > 4 and node.input[4]):
        return 1
    if any(name not in extents for name in operands):
        return 1
    rows = extents[node.input[1]].dims[0]
    if any(extents[name].length % rows for name in operands):
        return 1
    total = sum(extents[name].length for name in operands)
    return min(-(-total // largest), -(-rows // _ROWS_OF_A_PART))


def _rows_of(node: Any, extents: dict[str, Extent], parts: int) -> Iterator[dict[int, Extent]]:
    """For each part the operands of its rows, by their places among the inputs."""
    rows = extents[node.input[1]].dims[0]
    each = -(-rows // parts // _ROWS_OF_A_PART) * _ROWS_OF_A_PART
    for first in range(0, rows, each):
        count = min(each, rows - first)
        found = {}
        for place, name in enumerate(node.input):
            if place and name:
                whole = extents[name]
                row = whole.length // rows
                dims = (whole.dims[0] // rows * count, *whole.dims[1:])
                found[place] = Extent(
                    f"{name}[{first}:{first + count}]",
                    whole.offset + first * row,
                    count * row,
                    dims,
                    whole.dtype,
                )
        yield found


def _location(graph: Any, node: Any) -> str:
    tensor = next(t for t in graph.initializer if t.name == node.input[1])
    return str(next(entry.value for entry in tensor.external_data if entry.key == "location"))


def model_of(
    model: Any, op: SuperOp, kinds: dict[str, tuple[int, Sequence[Any]]], location: str
) -> bytes:
    """The bytes of a super-op's own model. `kinds` are types and sizes of values that super-ops hand on."""
    from onnx import GraphProto, ModelProto, helper

    declared = {value.name: value for value in (*model.graph.input, *model.graph.output)}

    def value(name: str) -> Any:
        return (
            declared[name]
            if name in declared
            else helper.make_tensor_value_info(name, *kinds[name])
        )

    initializers = [external(extent, location) for extent in (*op.weights, *op.tables)]
    graph = GraphProto(
        name=op.name,
        node=op.nodes,
        input=[value(name) for name in op.inputs],
        output=[value(name) for name in op.outputs],
        initializer=[*initializers, *op.constants],
    )
    made = ModelProto(ir_version=model.ir_version, opset_import=model.opset_import, graph=graph)
    return bytes(made.SerializeToString())


def buffer_of(name: str) -> str:
    """The cache's buffer that a value of the graph lies in, `cache.3.0.key` of `present.cache.3.0.key@5`; of
    any other value its own name."""
    return name.removeprefix("present.").partition("@")[0] if name.startswith("present.") else name


def handed_on(model: Any, ops: Iterable[SuperOp]) -> list[str]:
    """Values that one super-op makes and another reads."""
    results = {output.name for output in model.graph.output}
    return [name for op in ops for name in op.outputs if name not in results]


def _runs(
    nodes: Iterable[Any], extents: dict[str, Extent], constants: dict[str, Any]
) -> list[tuple[str, list[Any]]]:
    """Names of super-ops and their nodes, in order."""
    ordered = list(nodes)
    layers = [_layer_of(node, extents) for node in ordered]
    last = max((layer for layer in layers if layer is not None), default=-1)
    sizes = {extent.name: extent.length for extent in extents.values()}
    most = max(_LEAST, sum(sizes.values()) // _PARTS)
    experts = beginnings(ordered, sizes, most, constants)
    at, runs = -1, [("embedding", list[Any]())]
    for node, layer in zip(ordered, layers, strict=True):
        if layer is not None and layer > at:
            at = layer
            runs.append((f"{_OF_LAYER}{layer}", []))
        elif (first := experts.get(node.output[0])) is not None:
            name = f"{_OF_LAYER}{at}{_EXPERTS}"
            runs.append((f"{name} from {first}" if runs[-1][0].startswith(name) else name, []))
        elif (
            layer is None
            and at == last
            and not runs[-1][0].startswith("head")
            and _unnumbered(node, extents)
        ):
            runs.append(("head", []))
        if _PART in node.name:
            runs.append(
                (f"{runs[-1][0].partition(_PART)[0]}{_PART}{node.name.rpartition(_PART)[2]}", [])
            )
        runs[-1][1].append(node)
    return [(name, found) for name, found in runs if found]


def _halved(
    runs: Sequence[tuple[str, list[Any]]], extents: dict[str, Extent], constants: dict[str, Any]
) -> Iterator[tuple[str, list[Any]]]:
    """The same with large layers in two, before the node that leaves the larger part smallest."""
    tables = [_tables(nodes, extents, constants) for _, nodes in runs]
    found = [
        {n: extents[n].length for n in _reads(nodes) if n in extents and n not in rows}
        for (_, nodes), rows in zip(runs, tables, strict=True)
    ]
    total = sum({name: size for sizes in found for name, size in sizes.items()}.values())
    for (name, nodes), sizes in zip(runs, found, strict=True):
        best, whole = 0, sum(sizes.values())
        if _WHOLE.fullmatch(name) and whole > max(total // HALVED, LEAST_HALVED):
            each = [sum(sizes.get(n, 0) for n in node.input) for node in nodes]
            before = list(accumulate(each, initial=0))
            places = [n for n, size in enumerate(each) if size]
            best = min(places, key=lambda n: max(before[n], whole - before[n]))
        if best:
            yield name, nodes[:best]
        yield f"{name}{_REST}" if best else name, nodes[best:]


def _layer_of(node: Any, extents: dict[str, Extent]) -> int | None:
    numbers = [
        int(found.group(1))
        for name in node.input
        if name in extents and not name.startswith("rotary.") and (found := _LAYER.search(name))
    ]
    return max(numbers, default=None)


def _unnumbered(node: Any, extents: dict[str, Extent]) -> bool:
    return any(n in extents and not n.startswith("rotary.") for n in node.input)


def _reads(nodes: Iterable[Any]) -> set[str]:
    """Names that nodes read, those of their branches too, and do not make themselves."""
    every = list(_all(nodes))
    made = {name for node in every for name in node.output}
    inner = {
        tensor.name
        for node in every
        for attribute in node.attribute
        if attribute.HasField("g")
        for tensor in attribute.g.initializer
    }
    read = {name for node in every for name in node.input}
    read |= {
        output.name
        for node in every
        for attribute in node.attribute
        if attribute.HasField("g")
        for output in attribute.g.output
    }
    return read - made - inner - {""}


def _all(nodes: Iterable[Any]) -> Iterator[Any]:
    for node in nodes:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _all(attribute.g.node)


def _tables(
    nodes: Sequence[Any], extents: dict[str, Extent], constants: dict[str, Any]
) -> set[str]:
    """Weights of which every reader looks up rows that are known when it runs."""
    asked, other = set[str](), set[str]()
    for node in _all(nodes):
        places = _TABLES.get(node.op_type, ())
        row = _ROWS.get(node.op_type, len(node.input))
        rows = node.input[row] if row < len(node.input) else ""
        looked = places if rows and rows not in extents and rows not in constants else ()
        for place, name in enumerate(node.input):
            if name in extents:
                (asked if place in looked else other).add(name)
    return asked - other


def largest_group(nodes: Iterable[Any]) -> int:
    """Query heads that share a KV head, at most."""
    sizes = [
        {attribute.name: attribute.i for attribute in node.attribute}
        for node in _all(nodes)
        if node.op_type == "GroupQueryAttention"
    ]
    return max((each["num_heads"] // max(1, each["kv_num_heads"]) for each in sizes), default=1)


def holds_logits(nodes: Iterable[Any]) -> bool:
    """Whether some attention caps its logits, or has sinks: GroupQueryAttention then holds all of a step."""
    return any(
        node.op_type == "GroupQueryAttention"
        and (
            any(attribute.name == "softcap" and attribute.f for attribute in node.attribute)
            or bool(node.input[_SINKS : _SINKS + 1] and node.input[_SINKS])
        )
        for node in _all(nodes)
    )


def _held(extent: Extent, nodes: Sequence[Any]) -> int:
    """Bytes that onnxruntime holds of a weight, by its readers."""
    from onnx import TensorProto

    total = 0
    readers = [node for node in _all(nodes) if extent.name in node.input]
    if any(node.op_type not in (*_PLAIN, _PACKED) for node in readers):
        widened = extent.dtype in (TensorProto.FLOAT16, TensorProto.UINT8, TensorProto.INT8)
        total = extent.length + 4 * math.prod(extent.dims) if widened else 2 * extent.length
    elif all(node.op_type == _PACKED for node in readers):
        scales = any(node.input[2] == extent.name for node in readers)
        total = (3 if scales else 1) * extent.length
    else:
        total = extent.length
    return total


def _packed(
    weights: Sequence[Extent], nodes: Sequence[Any], routing: Routing | None = None
) -> tuple[tuple[PackedWeight, ...], ...]:
    """Weights that lie in a packed copy: codes with scales and as many sums, and others unless they are so
    small that the saved model holds them."""
    every = list(_all(nodes))
    found = {extent.name: PackedWeight(extent.length) for extent in weights}
    if any(
        node.op_type not in (*_PLAIN, _PACKED) and found.keys() & set(node.input) for node in every
    ):
        return ()
    for node in every:
        if node.op_type == _PACKED and {*node.input[1:3]} <= found.keys():
            codes, scales = found[node.input[1]].nbytes, found.pop(node.input[2]).nbytes
            sums = codes, codes + scales
            found[node.input[1]] = PackedWeight(codes + 2 * scales + PADDING, sums)
    packed = {node.input[1] for node in every if node.op_type in (_PACKED, *_PRODUCTS)}
    found = {name: each for name, each in found.items() if name in packed or each.nbytes >= SMALL}
    experts = routing.experts.values() if routing is not None else ()
    of_experts = [tuple(found.pop(name) for name in names if name in found) for names in experts]
    return (tuple(found.values()), *of_experts)


def _widest(nodes: Sequence[Any], extents: dict[str, Extent]) -> int:
    """Floats of a token that live at once: the widest product two and a half times (a gate and its up, their
    halves, what becomes of one), beside four of the narrowest."""
    inner = (n for n in _all(nodes) if not any(o.startswith("logits") for o in n.output))
    wide = [n for node in inner for n in _widths(node, extents)]
    return int(2.5 * max(wide, default=0) + 4 * min(wide, default=0))


def _widths(node: Any, extents: dict[str, Extent]) -> list[int]:
    if node.op_type == _PACKED:
        sizes = {attribute.name: attribute.i for attribute in node.attribute}
        return [sizes.get("N", 0), sizes.get("K", 0)]
    if node.op_type in _PRODUCTS:
        return [d for name in node.input if name in extents for d in extents[name].dims[:2]]
    return []


def _extent(tensor: Any) -> Extent:
    found = {entry.key: entry.value for entry in tensor.external_data}
    return Extent(
        tensor.name,
        int(found.get("offset", "0")),
        int(found.get("length", "0")),
        tuple(tensor.dims),
        tensor.data_type,
    )


def external(extent: Extent, location: str) -> Any:
    """An initializer that lies in a file."""
    from onnx import StringStringEntryProto, TensorProto

    place = {"location": location, "offset": str(extent.offset), "length": str(extent.length)}
    return TensorProto(
        name=extent.name,
        dims=extent.dims,
        data_type=extent.dtype,
        data_location=TensorProto.EXTERNAL,
        external_data=[StringStringEntryProto(key=key, value=text) for key, text in place.items()],
    )
