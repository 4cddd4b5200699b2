"""Cuts a program into super-ops, runs of its calls that are computed with weights of their own.

    calls, in order   norm, linear, attention, linear | norm, linear, gate, linear | .. | norm, linear
    super-op          layer 0                         | layer 0 part 2             | .. | head

Neighbouring calls of a layer are one super-op as long as their weights take no more than those of the largest
call of any layer: there must be room for the largest, however small the others are. A weight that calls of
several super-ops read, by views of it too, is of none. What a call only looks rows up in, by numbers that the
caller gives, is none either: those rows are found on the host, and given to the program (`take_lookups`).
"""

from __future__ import annotations

import operator
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_map

from ....runtime.memory.device_ahead import Block
from ...ir.ops.linear import Embedding
from ...ir.ops.quantized import QuantizedEmbedding, StoredEmbedding
from ...ir.program import Program, call_arguments, remove_dead_nodes
from ...ir.weights import Weight
from .linear.bound import reorder

#: The number of a layer in a weight's name, such as `model.layers.7.mlp.gate_up.packed`.
_LAYER = re.compile(r"\.(\d{1,5})\.")

#: How names of weights begin that say which heads are of a group: their numbers are of heads.
_OF_HEADS = "heads."

#: Inputs of a program that the host has.
_GIVEN = ("input_ids", "position_ids")

#: Operators that look rows up, and which of their arguments says which rows.
_ROWS: dict[Any, str] = {
    torch.ops.aten.embedding.default: "indices",
    Embedding.overload(): "ids",
    QuantizedEmbedding.overload(): "ids",
    StoredEmbedding.overload(): "ids",
}


@dataclass(frozen=True)
class SuperOp:
    """Calls that follow each other, from `first` to the one before `end`, and the weights that they alone
    read."""

    name: str
    first: fx.Node
    end: fx.Node
    weights: tuple[str, ...]


@dataclass(frozen=True)
class Lookup:
    """A call that was taken out of a program, which is given its rows as the input `name`."""

    name: str
    ids: str
    """The input of the caller's that says which rows."""
    target: Callable[..., Tensor]
    arguments: tuple[Any, ...]
    """Those of the call, with weights as they are stored, not loaded, and a node for the rows."""
    dtype: torch.dtype
    """Of the rows, where the table is stored in another."""

    def rows(self, ids: Tensor) -> Tensor:
        """The rows of these numbers, where the weights are: of a file that is mapped no more is read."""
        given = tree_map(lambda one: ids if isinstance(one, fx.Node) else one, self._loaded)
        return self.target(*given).to(self.dtype)

    @cached_property
    def _loaded(self) -> Any:
        return tree_map(lambda one: one.load() if isinstance(one, Weight) else one, self.arguments)


@dataclass(frozen=True)
class CutProgram:
    """A program in super-ops, its weights in the order that kernels load."""

    program: Program
    lookups: tuple[Lookup, ...]
    ops: tuple[SuperOp, ...]
    shared: tuple[str, ...]
    """Weights of no super-op."""
    stored: Mapping[str, int]
    """Bytes of weights as they were stored, by name."""

    @classmethod
    def of(cls, program: Program) -> Self:
        """Takes a program apart, which is another then."""
        lookups = take_lookups(program)
        stored = {name: program.weights[name].nbytes for name in program.weights}
        reorder(program)
        ops, shared = cut(program)
        return cls(program, tuple(lookups), tuple(ops), tuple(shared), stored)

    def block(self, names: Sequence[str]) -> Block:
        """Weights as they lie together."""
        return Block({name: self.program.weights[name] for name in names})


def take_lookups(program: Program) -> list[Lookup]:
    """Takes out the calls that look rows up by tokens or positions as they are given; their rows are inputs
    instead."""
    found, graph = list[Lookup](), program.graph
    for node in program.nodes(*_ROWS):
        given = call_arguments(node)
        ids = given[_ROWS[node.target]]
        tables = [_stored(program, read) for read in node.all_input_nodes if read is not ids]
        if ids.target not in _GIVEN or None in tables:
            continue
        arguments = tree_map(lambda one: _stored(program, one) or one, (*given.values(),))
        target: Any = node.target
        name, dtype = f"rows of {node.name}", node.meta["val"].dtype
        found.append(Lookup(name, str(ids.target), target, arguments, dtype))
        with graph.inserting_after(program.placeholders()[-1]):
            rows = graph.create_node("placeholder", name, name=f"rows_of_{node.name}")
        rows.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(rows, propagate_meta=False)
        graph.erase_node(node)
    remove_dead_nodes(program)
    return found


def _stored(program: Program, one: object) -> Weight | None:
    """The weight that a node reads, or widens."""
    if isinstance(one, fx.Node) and one.target is torch.ops.aten._to_copy.default:
        one = one.args[0]
    return program.weight_of(one)


def cut(program: Program) -> tuple[list[SuperOp], list[str]]:
    """The super-ops in order, and the names of the weights that are of none."""
    reads = _reads(program)
    readers = Counter(name for names in reads.values() for name in names)
    alone = {name for name, count in readers.items() if count == 1}
    sizes = {
        node: sum(program.weights[name].nbytes for name in names if name in alone)
        for node, names in reads.items()
    }
    layers = {node: _layer_of([n for n in names if n in alone]) for node, names in reads.items()}
    in_layers = [sizes[node] for node, layer in layers.items() if layer is not None]
    runs = list(_runs(sizes, layers, max(in_layers, default=0)))
    of = {node: at for at, (_, nodes) in enumerate(runs) for node in nodes}
    homes = dict[str, set[int]]()
    for node, names in reads.items():
        for name in names:
            homes.setdefault(name, set()).add(of.get(node, -1))
    ends = [nodes[0] for _, nodes in runs[1:]] + [program.output]
    ops = [
        SuperOp(name, nodes[0], end, tuple(n for n, home in homes.items() if home == {at}))
        for at, ((name, nodes), end) in enumerate(zip(runs, ends, strict=True))
    ]
    owned = {name for op in ops for name in op.weights}
    return [op for op in ops if op.weights], [name for name in homes if name not in owned]


def _reads(program: Program) -> dict[fx.Node, list[str]]:
    """The weights that calls read, by views of them too; what the program gives is read by its output."""
    found, seen = dict[fx.Node, list[str]](), dict[fx.Node, list[str]]()
    for node in program.graph.nodes:
        if node.op == "get_attr":
            seen[node] = [str(node.target)]
            continue
        names = [name for read in node.all_input_nodes for name in seen.get(read, ())]
        if names:
            found[node] = list(dict.fromkeys(names))
            if _looks(node):
                seen[node] = found[node]
    return found


def _looks(node: fx.Node) -> bool:
    """Whether what a call gives may lie where an argument does."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return node.target is operator.getitem
    return any(given.alias_info is not None for given in schema.returns)


def _layer_of(names: Sequence[str]) -> int | None:
    numbers = [
        int(found.group(1))
        for name in names
        if not name.startswith(_OF_HEADS) and (found := _LAYER.search(name))
    ]
    return max(numbers, default=None)


def _runs(
    sizes: dict[fx.Node, int], layers: dict[fx.Node, int | None], most: int
) -> Iterator[tuple[str, list[fx.Node]]]:
    """Names of super-ops and the calls of each that read weights, in order; none belongs to a layer before
    that of the one ahead of it."""
    last = max((layer for layer in layers.values() if layer is not None), default=-1)
    at, name, part, run, total = -1, "embedding", 1, list[fx.Node](), 0
    for node, size in sizes.items():
        if node.op == "output":
            continue
        layer, before = layers[node], name
        if layer is not None and layer > at:
            at, name = layer, f"layer {layer}"
        elif layer is None and at == last and size:
            name = "head"
        if run and (name != before or total + size > most):
            yield before if part == 1 else f"{before} part {part}", run
            part, run, total = (part + 1 if name == before else 1), [], 0
        run.append(node)
        total += size
    if run:
        yield name if part == 1 else f"{name} part {part}", run
