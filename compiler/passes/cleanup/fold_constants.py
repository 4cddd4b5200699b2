"""fold_constants: calls whose inputs are all weights become weights themselves."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from ...ir.interpreter import evaluate_cone
from ...ir.program import Editor, Program, remove_dead_nodes
from ...ir.stored import moved
from ...ir.weights import Weight, derive
from ..base import Pass, PassResult


@dataclass(frozen=True)
class FoldConstants(Pass):
    """Folds what depends on weights alone, or on nothing; computed when it is written, not before.

    Before: `%s = aten.add.Tensor(%w, 1.0)`     (Gemma's norm scale, 1 + w)
    After:  `%s = read "w.folded"`
    """

    name = "fold_constants"

    def run(self, program: Program) -> PassResult:
        result, editor = PassResult(), Editor(program)
        for node in list(program.graph.nodes):
            if node.op != "call_function" or not _is_fixed(node.meta["val"]):
                continue
            weights = {source: program.weight_of(source) for source in node.all_input_nodes}
            if any(weight is None for weight in weights.values()):
                continue
            sources = [program.weights[str(source.target)] for source in node.all_input_nodes]
            weight = (moved(node, sources) if sources else None) or _folded(program, node)
            name = next((str(source.target) for source in weights), node.name)
            with editor.before(node):
                new = editor.weight(f"{name}.folded", weight)
            editor.replace(node, new)
            result.applied(name, f"{node.name} folded into a weight of {list(weight.shape)}")
        remove_dead_nodes(program)
        return result


def _is_fixed(value: object) -> bool:
    """Whether a value is a tensor whose every size is known."""
    return isinstance(value, torch.Tensor) and all(isinstance(size, int) for size in value.shape)


def _folded(program: Program, node: fx.Node) -> Weight:
    value = node.meta["val"]
    sources = {source: program.weights[str(source.target)] for source in node.all_input_nodes}

    def compute() -> tuple[torch.Tensor]:
        known = {source: weight.load() for source, weight in sources.items()}
        return (evaluate_cone([detached], {copies[s]: t for s, t in known.items()}, program)[0],)

    # The node leaves its graph, so the computation keeps a copy of it in a graph of its own.
    graph = fx.Graph()
    copies = {source: graph.placeholder(source.name) for source in sources}
    detached = graph.node_copy(node, lambda source: copies[source])
    return derive([(tuple(value.shape), value.dtype)], compute)[0]
