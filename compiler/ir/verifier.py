"""The rules that every program keeps, checked before and after each pass."""

from __future__ import annotations

import operator

import torch
from torch import fx

from ...errors import IRError
from .kv.layout import CacheLayout, cache_name
from .kv.store.storage import read_storage
from .ops import einfold_ops
from .program import Program, cache_writers, call_arguments, infer, op_name, writes_cache
from .types import DTYPES


def verify(program: Program, deep: bool = False) -> None:
    """Raises IRError, naming the node, where a rule is broken.

    Order, known operators, weights that exist with the type that the graph reads, one attention call
    a layer, caches that agree with the layout. `deep` also infers every type again and compares.
    """
    seen: set[fx.Node] = set()
    for node in program.graph.nodes:
        _check_node(program, node, seen)
        if deep and node.op == "call_function":
            _check_type(program, node)
        seen.add(node)
    _check_output(program)
    _check_attention(program)


def _check_node(program: Program, node: fx.Node, seen: set[fx.Node]) -> None:
    for source in node.all_input_nodes:
        if source not in seen:
            raise IRError(f"%{node.name} uses %{source.name} before it is defined")
    if node.op not in ("placeholder", "get_attr", "call_function", "output"):
        raise IRError(f"%{node.name} is a {node.op}, which the IR does not have")
    if "val" not in node.meta:
        raise IRError(f"%{node.name} has no type")
    if node.op == "call_function":
        op_name(node.target)
    if node.op == "get_attr":
        weight, value = program.weights[str(node.target)], node.meta["val"]
        if tuple(value.shape) != weight.shape or value.dtype != weight.dtype:
            raise IRError(
                f"%{node.name} reads {node.target!r} as {program.shapes.describe(value)}, "
                f"but the weight is {weight.dtype}{list(weight.shape)}"
            )


def _check_type(program: Program, node: fx.Node) -> None:
    before = program.shapes.describe(node.meta["val"])
    infer(program, node)
    after = program.shapes.describe(node.meta["val"])
    if before != after:
        raise IRError(f"%{node.name} carries the type {before}, but its arguments give {after}")


def _check_output(program: Program) -> None:
    outputs = [node for node in program.graph.nodes if node.op == "output"]
    if len(outputs) != 1:
        raise IRError(f"a program has one output node, this one has {len(outputs)}")
    if len(outputs[0].meta["names"]) != len(outputs[0].args[0]):
        raise IRError("the output has not as many names as values")


def _check_attention(program: Program) -> None:
    layers = [
        int(call_arguments(node)["layer"]) for node in program.nodes(einfold_ops.attention.default)
    ]
    if len(set(layers)) != len(layers):
        twice = next(layer for layer in layers if layers.count(layer) > 1)
        raise IRError(f"layer {twice} calls attention more than once, and a layer has one cache")
    if program.layout is None:
        return
    specs = {spec.name: spec for spec in program.layout.buffers(batch=1, capacity=1)}
    attached: set[str] = set()
    for node in cache_writers(program):
        if call_arguments(node)["k_BSKD"] is None:
            continue  # reads what another layer has written
        for name in ("key_cache_BKCD", "value_cache_BKCD"):
            cache = call_arguments(node)[name]
            spec = specs.get(str(cache.target))
            if cache.op != "placeholder" or spec is None:
                raise IRError(f"%{node.name}: {name} is not an input that the cache layout names")
            value: torch.Tensor = cache.meta["val"]
            fixed = [spec.shape[1], spec.shape[3]]
            if value.dtype != DTYPES[spec.dtype] or [value.shape[1], value.shape[3]] != fixed:
                raise IRError(f"%{node.name}: {cache.target} disagrees with the cache layout")
            if cache.target in attached:
                raise IRError(f"%{node.name}: {cache.target} is written by another attention too")
            attached.add(str(cache.target))
    _check_packed(program, program.layout)
    for node in program.nodes(einfold_ops.shared_attention.default):
        _check_reader(program.layout, node)


def _check_packed(program: Program, layout: CacheLayout) -> None:
    """Attention over packed tokens reads the bulk of the group whose slots it writes, in its storage."""
    groups = {cache_name(layer.layer, index): group for layer, index, group in layout.groups()}
    for node in program.nodes(einfold_ops.packed_attention.default):
        found = call_arguments(node)
        if found["k_BSKD"] is None:
            _check_reader(layout, node)
            continue
        prefix = str(found["key_cache_BKCD"].target).removesuffix(".key")
        partner, index = groups[prefix].partner, int(prefix.rpartition(".")[2])
        own = [prefix] if partner is None else [prefix, cache_name(partner, index)]
        stored = groups[prefix].storage
        if read_storage(found["storage"]) != stored:  # a text may leave out what is a default
            raise IRError(
                f"%{node.name} reads {found['storage']}, but the cache layout says {stored.text}"
            )
        for piece in found["bulk"]:
            if piece.op != "placeholder" or str(piece.target).rpartition(".")[0] not in own:
                raise IRError(f"%{node.name} reads packed tokens that are not of {prefix}")


def _check_reader(layout: CacheLayout, node: fx.Node) -> None:
    """A layer without a cache reads what its owner's attention gives in this step."""
    found = call_arguments(node)
    owner = layout[int(found["layer"])].groups[0].owner
    for name in ("key_cache_BKCD", "value_cache_BKCD"):
        call = found[name].args[0] if found[name].target is operator.getitem else None
        if (
            not isinstance(call, fx.Node)
            or not writes_cache(call)
            or int(call_arguments(call)["layer"]) != owner
        ):
            raise IRError(f"%{node.name}: {name} is not what layer {owner} caches in this step")
