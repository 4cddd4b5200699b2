"""order_heads: heads that are cached alike stand side by side, by the order of the weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from ...analysis.head_rows import HeadRows, LostHeadsError, head_rows, output_projection
from ...ir.kv.layout import CacheLayout, LayerCache
from ...ir.ops import einfold_ops
from ...ir.program import Editor, Program, attention_nodes, call_arguments, remove_dead_nodes
from ...ir.stored import picked
from ...ir.weights import derive
from ..base import Pass, PassResult
from .retaining import reorder

aten = torch.ops.aten


@dataclass(frozen=True)
class OrderHeads(Pass):
    """Permutes weights so that the heads of each group of the cache are contiguous: no gather runs a step.

    Before: `cache 0.0 heads=1 ..`, `cache 0.1 heads=0 ..`; q, k, v = parts of `linear(%x, %w)` in order
    After:  `cache 0.0 heads=0 ..`, `cache 0.1 heads=1 ..`; the rows of %w in the order [q, k, v of the first
    group, q, k, v of the second ..], split into one packed part a group; the columns of the output
    projection, and sinks, in the order of the heads.

    Attention then reads each group's q, k and v as one packed part, as GroupQueryAttention takes it. Where
    something between projection and attention works on heads (norms of q and k), rows are permuted
    and q, k and v stay apart; where a head's numbers cannot be followed to the rows of a weight,
    the layer keeps its order, and `attach_cache` selects heads by index.
    """

    name = "order_heads"
    requires = frozenset({"cache planned", "linears raised"})

    def run(self, program: Program) -> PassResult:
        result = PassResult()
        if program.layout is None:
            result.skipped("graph", "no attention in the graph")
            return result
        nodes = {int(call_arguments(node)["layer"]): node for node in attention_nodes(program)}
        layers = []
        for cache in program.layout.layers:
            where = f"layer {cache.layer}"
            shared = bool(program.layout.readers(cache.layer)) or cache.groups[0].owner is not None
            if len(cache.groups) > 1 and shared:
                result.skipped(where, "shares its cache with another layer, which fixes its order")
            elif len(cache.groups) > 1:
                try:
                    node = nodes[cache.layer]
                    packed = _order(program, node, cache)
                except LostHeadsError as reason:
                    result.skipped(where, f"heads keep their order: {reason}")
                else:
                    order = ",".join(map(str, _order_of(cache)))
                    form = "one packed part a group" if packed else "contiguous, q, k and v apart"
                    result.applied(where, f"KV heads in the order {order}; {form}")
                    reorder(program, cache.layer, _order_of(cache), _channels(node, cache))
                    cache = _renumbered(cache)
            layers.append(cache)
        program.layout = CacheLayout(tuple(layers))
        remove_dead_nodes(program)
        return result


def _order_of(cache: LayerCache) -> list[int]:
    return [head for group in cache.groups for head in group.heads]


def _channels(node: fx.Node, cache: LayerCache) -> list[int]:
    """Channels of q, k and v that belong to a KV head."""
    found = call_arguments(node)
    shapes = [found[name].meta["val"].shape for name in ("q_BSHD", "k_BSKD", "v_BSKD")]
    return [int(shape[2]) * int(shape[3]) // cache.kv_heads for shape in shapes]


def _renumbered(cache: LayerCache) -> LayerCache:
    groups, first = [], 0
    for group in cache.groups:
        last = first + len(group.heads)
        groups.append(replace(group, heads=tuple(range(first, last))))
        first = last
    return replace(cache, groups=tuple(groups))


def _order(program: Program, node: fx.Node, cache: LayerCache) -> bool:
    """Orders the heads of one layer; gives whether each group has a packed part. Raises LostHeadsError."""
    found = call_arguments(node)
    parts = [head_rows(program, found[name]) for name in ("q_BSHD", "k_BSKD", "v_BSKD")]
    _check_users(node, parts)
    each = parts[0].rows_HD.shape[0] // cache.kv_heads
    new = _order_of(cache)
    heads = [[head * each + i for head in new for i in range(each)], new, new]
    output, size = output_projection(node), parts[2].rows_HD.shape[1]
    columns = torch.arange(len(heads[0]) * size).reshape(-1, size)[heads[0]].flatten()
    linears = {part.linear: None for part in parts}
    _check_weights(program, [*linears, output], found["sinks_H"])
    # Nothing was changed so far, and nothing can go wrong from here on.
    editor = Editor(program)
    _permute(program, editor, output, "weight_NM", columns, axis=1)
    if found["sinks_H"] is not None:
        _permute(program, editor, node, "sinks_H", torch.tensor(heads[0]), axis=0)
    if _packable(parts):
        _pack(program, editor, node, parts, cache, each)
        return True
    for linear in linears:
        source = torch.arange(linear.meta["val"].shape[-1])
        for part, order in zip(parts, heads, strict=True):
            if part.linear is linear:
                source[part.rows_HD] = part.rows_HD[order]
        _permute_rows(program, editor, linear, source)
    return False


def _check_users(node: fx.Node, parts: Sequence[HeadRows]) -> None:
    path = frozenset[fx.Node]().union(*(part.path for part in parts))
    for step in path:
        for user in step.users:
            if user is not node and user not in path:
                raise LostHeadsError(f"%{user.name} reads heads of %{step.name} too")


def _check_weights(program: Program, linears: Sequence[fx.Node], sinks: fx.Node | None) -> None:
    arguments = [call_arguments(linear) for linear in linears]
    reads = [a["weight_NM"] for a in arguments] + [a["bias"] for a in arguments] + [sinks]
    for read in reads:
        if read is not None and program.weight_of(read) is None:
            raise LostHeadsError(f"%{read.name} is computed, not a weight")


def _packable(parts: Sequence[HeadRows]) -> bool:
    """Whether q, k and v are all of one linear, as they come out of it."""
    linear = parts[0].linear
    rows = sum(part.rows_HD.numel() for part in parts)
    return (
        all(part.linear is linear and part.direct for part in parts)
        and rows == linear.meta["val"].shape[-1]
        and linear.meta["val"].dim() == 3
    )


def _pack(
    program: Program,
    editor: Editor,
    node: fx.Node,
    parts: Sequence[HeadRows],
    cache: LayerCache,
    each: int,
) -> None:
    """Orders the rows by group, and rebuilds q, k and v from one part a group."""
    blocks = []
    for group in cache.groups:
        queries = [head * each + i for head in group.heads for i in range(each)]
        orders = (queries, group.heads, group.heads)
        blocks.append([p.rows_HD[list(o)] for p, o in zip(parts, orders, strict=True)])
    linear = parts[0].linear
    source = torch.cat([rows.flatten() for block in blocks for rows in block])
    _permute_rows(program, editor, linear, source)
    found = call_arguments(node)
    with editor.after(linear):
        batch = editor.call(aten.sym_size.int, linear, 0)
    with editor.after(batch):
        length = editor.call(aten.sym_size.int, linear, 1)
    with editor.after(length):
        sizes = [sum(rows.numel() for rows in block) for block in blocks]
        split = editor.call(aten.split_with_sizes.default, linear, sizes, -1)
    heads: list[list[fx.Node]] = [[], [], []]
    with editor.before(node):
        for packed, block in zip(editor.results(split), blocks, strict=True):
            inner = editor.call(
                aten.split_with_sizes.default, packed, [rows.numel() for rows in block], -1
            )
            for found_heads, flat, rows in zip(heads, editor.results(inner), block, strict=True):
                shape = [batch, length, *rows.shape]
                found_heads.append(editor.call(aten.reshape.default, flat, shape))
        for index, (name, joined) in enumerate(
            zip(("q_BSHD", "k_BSKD", "v_BSKD"), heads, strict=True)
        ):
            whole = editor.call(aten.cat.default, joined, 2)
            old = found[name]
            if old.target is einfold_ops.rotary.default:
                whole = editor.call(old.target, whole, *old.args[1:])
            node.update_arg(index, whole)


def _permute_rows(program: Program, editor: Editor, linear: fx.Node, order: Tensor) -> None:
    for name in ("weight_NM", "bias"):
        if call_arguments(linear)[name] is not None:
            _permute(program, editor, linear, name, order, axis=0)


def _permute(
    program: Program, editor: Editor, node: fx.Node, name: str, order: Tensor, axis: int
) -> None:
    """Gives a node a weight that it reads with its rows or columns in another order."""
    arguments = call_arguments(node)
    *stem, kind = str(arguments[name].target).split(".")
    weight = program.weights[str(arguments[name].target)]

    def compute() -> tuple[Tensor]:
        return (weight.load().index_select(axis, order),)

    if axis == 0:
        ordered = picked(weight, order)
    else:  # codes share scales along this axis
        (ordered,) = derive([(weight.shape, weight.dtype)], compute)
    with editor.before(node):
        read = editor.weight(".".join([*stem, "by_group", kind]), ordered)
    node.update_arg(list(arguments).index(name), read)
