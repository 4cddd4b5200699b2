"""simplify: reshapes of reshapes, no-op reshapes and transposes, equal subexpressions, dead nodes."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ...ir.ops import einfold_ops
from ...ir.program import Editor, Program, call_arguments, remove_dead_nodes
from ..base import Pass, PassResult

aten = torch.ops.aten

#: Operators that work along the last axis alone, so that a transpose of earlier axes passes through.
_LAST_AXIS = {einfold_ops.rms_norm.default, aten.split_with_sizes.default, aten.slice.Tensor}


@dataclass(frozen=True)
class Simplify(Pass):
    """Rewrites until nothing changes.

    Before: `%t = transpose(%x, 1, 2); %n = rms_norm(%t, %w); %u = transpose(%n, 1, 2)`
    After:  `%n = rms_norm(%x, %w)`
    """

    name = "simplify"

    def run(self, program: Program) -> PassResult:
        result = PassResult()
        before = len(program.graph.nodes)
        remove_dead_nodes(program)
        while any(rewrite(program) for rewrite in _REWRITES):
            remove_dead_nodes(program)
        gone = before - len(program.graph.nodes)
        if gone:
            result.applied("graph", f"{gone} nodes removed, {len(program.graph.nodes)} left")
        return result


def _reshapes(program: Program) -> bool:
    changed, editor = False, Editor(program)
    for node in program.nodes(aten.reshape.default):
        source = node.args[0]
        assert isinstance(source, fx.Node)
        if _type(program, node) == _type(program, source):
            editor.replace(node, source)
            changed = True
        elif source.target is aten.reshape.default:
            node.replace_input_with(source, source.args[0])  # type: ignore[arg-type]
            changed = True
    return changed


def _transposes(program: Program) -> bool:
    changed, editor = False, Editor(program)
    for node in program.nodes(aten.transpose.int):
        source: fx.Node = call_arguments(node)["self"]
        axes = _axes(node)
        if source.target is aten.transpose.int and _axes(source) == axes:
            editor.replace(node, call_arguments(source)["self"])
            changed = True
        elif len(axes) == 1:
            editor.replace(node, source)
            changed = True
    for node in program.nodes(*_LAST_AXIS):
        source = next(iter(call_arguments(node).values()))
        last = source.meta["val"].dim() - 1
        if (
            source.target is aten.transpose.int
            and last not in _axes(source)
            and _on_last_axis(node)
        ):
            _sink_transpose(editor, source, node)
            changed = True
    return changed


def _axes(transpose: fx.Node) -> set[int]:
    """The two axes that a transpose swaps, counted from the front."""
    found, rank = call_arguments(transpose), transpose.meta["val"].dim()
    return {found["dim0"] % rank, found["dim1"] % rank}


def _sink_transpose(editor: Editor, transpose: fx.Node, node: fx.Node) -> None:
    """f(transpose(x)) becomes transpose(f(x)), for each result of f."""
    with editor.before(node):
        inner = editor.call(node.target, transpose.args[0], *node.args[1:])  # type: ignore[arg-type]
    if not isinstance(inner.meta["val"], (list, tuple)):
        with editor.after(inner):
            editor.replace(node, editor.call(aten.transpose.int, inner, *transpose.args[1:]))
        return
    results = editor.results(inner)
    for user in list(node.users):
        with editor.before(user):
            part = results[int(user.args[1])]  # type: ignore[arg-type]
            turned = editor.call(aten.transpose.int, part, *transpose.args[1:])
        editor.replace(user, turned)


def _on_last_axis(node: fx.Node) -> bool:
    found = call_arguments(node)
    if "dim" not in found:
        return True  # norms have no choice of axis
    rank: int = found["self"].meta["val"].dim()
    return bool(found["dim"] % rank == rank - 1)


def _slices(program: Program) -> bool:
    """Slices that together cut a last axis into pieces become one split (Phi-3's fused projections)."""
    changed, editor = False, Editor(program)
    for source in list(program.graph.nodes):
        cuts = {user: _span(user) for user in source.users}
        if len(cuts) < 2 or not all(cuts.values()):
            continue
        ordered = sorted(cuts, key=lambda cut: cuts[cut] or (0, 0))
        spans = [cuts[cut] or (0, 0) for cut in ordered]
        starts, ends = [start for start, _ in spans], [end for _, end in spans]
        if [0, *ends] != [*starts, source.meta["val"].shape[-1]]:
            continue
        with editor.after(source):
            sizes = [end - start for start, end in spans]
            split = editor.call(aten.split_with_sizes.default, source, sizes, -1)
        for cut, part in zip(ordered, editor.results(split), strict=True):
            editor.replace(cut, part)
        changed = True
    return changed


def _slices_of_cats(program: Program) -> bool:
    """A slice that is just one part of a concatenation is that part."""
    changed, editor = False, Editor(program)
    for node in program.nodes(aten.slice.Tensor):
        found = call_arguments(node)
        source, rank = found["self"], node.meta["val"].dim()
        if source.target is not aten.cat.default or found["step"] != 1:
            continue
        joined = call_arguments(source)
        axis = joined["dim"] % rank
        sizes = [part.meta["val"].shape[axis] for part in joined["tensors"]]
        if found["dim"] % rank != axis or not all(isinstance(size, int) for size in sizes):
            continue
        ends = list(itertools.accumulate(sizes))
        for part, size, end in zip(joined["tensors"], sizes, ends, strict=True):
            if (found["start"] or 0, found["end"]) == (end - size, end):
                editor.replace(node, part)
                changed = True
                break
    return changed


def _span(node: fx.Node) -> tuple[int, int] | None:
    """(start, end) of a slice along the last axis with fixed bounds; None for anything else."""
    if node.target is not aten.slice.Tensor or not _on_last_axis(node):
        return None
    found = call_arguments(node)
    size = found["self"].meta["val"].shape[-1]
    start, end = found["start"] or 0, size if found["end"] is None else found["end"]
    if found["step"] != 1 or not all(isinstance(value, int) for value in (size, start, end)):
        return None
    return start % size if start < 0 else start, end % size if end < 0 else min(end, size)


def _merge_equal(program: Program) -> bool:
    """Common subexpressions: every operator is pure, so equal calls give equal values."""
    changed, editor = False, Editor(program)
    first: dict[Any, fx.Node] = {}
    for node in list(program.graph.nodes):
        if node.op not in ("call_function", "get_attr"):
            continue
        key = (node.op, node.target, _frozen(node.args), _frozen(sorted(node.kwargs.items())))
        kept = first.setdefault(key, node)
        if kept is not node:
            editor.replace(node, kept)
            changed = True
    return changed


def _frozen(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(_frozen(item) for item in value)
    return (type(value).__name__, value)


def _type(program: Program, node: fx.Node) -> str:
    return program.shapes.describe(node.meta["val"])


_REWRITES = (_reshapes, _transposes, _slices_of_cats, _slices, _merge_equal)
