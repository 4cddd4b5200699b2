"""raise_linears: linear layers, `addmm` and `matmul` by a weight, and embeddings."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from ...ir.ops import einfold_ops
from ...ir.program import Editor, Program, call_arguments, remove_dead_nodes
from ...ir.weights import Weight, derive
from ..base import Pass, PassResult, place_of
from ..facts import PRODUCTS, weight_factor

aten = torch.ops.aten


@dataclass(frozen=True)
class RaiseLinears(Pass):
    """One spelling for every product with a weight: weight [N, M], input of any rank.

    Before: `%r = reshape(%x, [-1, M]); %y = addmm(%b, %r, %w)`      (GPT-2's Conv1D, w [M, N])
    After:  `%y = reshape(einfold.linear(%x, %w.transposed, %b), [-1, N])`
    """

    name = "raise_linears"
    ensures = frozenset({"linears raised"})

    def run(self, program: Program) -> PassResult:
        result, editor = PassResult(), Editor(program)
        for node in program.nodes(aten.linear.default):
            found = call_arguments(node)
            if program.weight_of(found["weight"]) is None:
                result.skipped(place_of(node), "linear by a computed matrix")
                continue
            _replace(editor, node, found["input"], found["weight"], found["bias"], result)
        for node in program.nodes(*PRODUCTS):
            self._raise_product(program, editor, node, result)
        for node in program.nodes(aten.embedding.default):
            found = call_arguments(node)
            with editor.before(node):
                new = editor.call(einfold_ops.embedding.default, found["indices"], found["weight"])
            result.applied(place_of(new), "embedding")
            editor.replace(node, new)
        remove_dead_nodes(program)
        return result

    def _raise_product(
        self, program: Program, editor: Editor, node: fx.Node, result: PassResult
    ) -> None:
        matrix = weight_factor(program, node)
        if matrix is None:
            result.skipped(place_of(node), "matrix product by a computed matrix")
            return
        bias, x = node.args[:2] if node.target is aten.addmm.default else (None, node.args[0])
        with editor.before(node):
            turned = editor.weight(
                f"{matrix.target}.transposed", _transposed(program.weights[str(matrix.target)])
            )
        _replace(editor, node, x, turned, bias, result)


def _transposed(weight: Weight) -> Weight:
    shape = (weight.shape[1], weight.shape[0])
    return derive([(shape, weight.dtype)], lambda: (weight.load().t(),))[0]


def _replace(
    editor: Editor, node: fx.Node, x: object, weight: fx.Node, bias: object, result: PassResult
) -> None:
    """Puts a linear in place of `node`, on the unflattened input where there is one."""
    with editor.before(node):
        source = _unflattened(x)
        new = editor.call(einfold_ops.linear.default, source, weight, bias)
        if source is not x:
            new = editor.call(aten.reshape.default, new, [-1, node.meta["val"].shape[-1]])
    result.applied(place_of(new), "linear")
    editor.replace(node, new)


def _unflattened(x: object) -> object:
    """The tensor whose leading axes `x` flattens into one, where it does only that."""
    if isinstance(x, fx.Node) and x.target is aten.reshape.default and x.meta["val"].dim() == 2:
        source = x.args[0]
        assert isinstance(source, fx.Node)
        if source.meta["val"].shape[-1] == x.meta["val"].shape[-1]:
            return source
    return x
