"""simplify: reshapes of reshapes, no-op reshapes and transposes, equal subexpressions, dead nodes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ...ir.ops import einfold_ops
from ...ir.program import Editor, Program, remove_dead_nodes
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
        while any(rewrite(program) for rewrite in (_reshapes, _transposes, _slices, _merge_equal)):
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
        source, *dims = node.args
        assert isinstance(source, fx.Node)
        rank = source.meta["val"].dim()
        axes = {int(dim) % rank for dim in dims}  # type: ignore[call-overload]
        if source.target is aten.transpose.int and {int(d) % rank for d in source.args[1:]} == axes:  # type: ignore[call-overload,arg-type]
            editor.replace(node, source.args[0])  # type: ignore[arg-type]
            changed = True
        elif len(axes) == 1:
            editor.replace(node, source)
            changed = True
    for node in program.nodes(*_LAST_AXIS):
        source = node.args[0]
        assert isinstance(source, fx.Node)
        if source.target is aten.transpose.int and _keeps_last(source) and _on_last_axis(node):
            _sink_transpose(editor, source, node)
            changed = True
    return changed


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
    if node.target is einfold_ops.rms_norm.default:
        return True
    place = 2 if node.target is aten.split_with_sizes.default else 1
    dim = int(node.args[place]) if len(node.args) > place else 0  # type: ignore[arg-type]
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return dim % source.meta["val"].dim() == source.meta["val"].dim() - 1


def _slices(program: Program) -> bool:
    """Slices that together cut a last axis into pieces become one split (Phi-3's fused projections)."""
    changed, editor = False, Editor(program)
    for source in list(program.graph.nodes):
        cuts = [user for user in source.users if user.target is aten.slice.Tensor and _on_last_axis(user)]
        if len(cuts) < 2 or len(cuts) != len(source.users):
            continue
        size = source.meta["val"].shape[-1]
        spans = sorted((_span(cut, size), cut) for cut in cuts if _span(cut, size) is not None)
        edges = [span[0] for span, _ in spans] + [size]
        if len(spans) != len(cuts) or edges[0] != 0 or any(s[1] != e for (s, _), e in zip(spans, edges[1:], strict=True)):
            continue
        with editor.before(min(cuts, key=list(program.graph.nodes).index)):
            sizes = [end - start for (start, end), _ in spans]
            split = editor.call(aten.split_with_sizes.default, source, sizes, -1)
        for (_, cut), part in zip(spans, editor.results(split), strict=True):
            editor.replace(cut, part)
        changed = True
    return changed


def _span(cut: fx.Node, size: int) -> tuple[int, int] | None:
    _, _, start, end, step = (*cut.args, 0, None, 1)[:5] if len(cut.args) == 2 else (*cut.args, *(None, 1)[len(cut.args) - 3 :])[:5]
    if step != 1 or not all(isinstance(v, (int, type(None))) for v in (start, end)):
        return None
    low = int(start or 0)  # type: ignore[call-overload]
    high = size if end is None else min(int(end), size)  # type: ignore[call-overload]
    return (low % size if low < 0 else low, high % size if high < 0 else high)


def _keeps_last(transpose: fx.Node) -> bool:
    rank = transpose.meta["val"].dim()
    return all(int(dim) % rank != rank - 1 for dim in transpose.args[1:])  # type: ignore[call-overload]


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
