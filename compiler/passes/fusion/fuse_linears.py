"""fuse_linears: linears that read the same input become one (QKV, gate and up)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from ...analysis.routers import routers
from ...ir.ops import einfold_ops
from ...ir.program import Editor, Program, call_arguments, remove_dead_nodes
from ...ir.stored import scheme_of, stacked
from ...ir.weights import Weight
from ..base import Pass, PassResult, common_stem

aten = torch.ops.aten


@dataclass(frozen=True)
class FuseLinears(Pass):
    """Stacks the weights of sibling linears along N, and splits the result.

    Before: `%q = linear(%x, %wq, %bq); %k = linear(%x, %wk, %bk); %v = linear(%x, %wv, %bv)`
    After:  `%y = linear(%x, %wqkv, %bqkv); %q, %k, %v = split_with_sizes(%y, [..], -1)`
    A sibling without a bias gets zeros where another has one. Routers stay by themselves: their weights are
    not rounded, those beside them are.
    """

    name = "fuse_linears"
    requires = frozenset({"linears raised"})

    def run(self, program: Program) -> PassResult:
        result, editor = PassResult(), Editor(program)
        siblings: dict[fx.Node, list[fx.Node]] = {}
        alone = routers(program)
        for node in program.nodes(einfold_ops.linear.default):
            if node in alone:
                continue
            source = node.args[0]
            assert isinstance(source, fx.Node)
            siblings.setdefault(source, []).append(node)
        for group in siblings.values():
            if len(group) > 1 and _may_fuse(program, group, result):
                _fuse(program, editor, group, result)
        remove_dead_nodes(program)
        return result


def _may_fuse(program: Program, group: Sequence[fx.Node], result: PassResult) -> bool:
    names = [str(node.args[1]) for node in group]
    if len(set(names)) < len(names):
        result.skipped(names[0], "siblings that share one weight")
        return False
    weights = [program.weight_of(node.args[1]) for node in group]
    if len({None if weight is None else scheme_of(weight) for weight in weights}) > 1:
        result.skipped(
            names[0], "siblings that come in codes of different schemes, or only some do"
        )
        return False
    return True


def _fuse(program: Program, editor: Editor, group: list[fx.Node], result: PassResult) -> None:
    arguments = [call_arguments(node) for node in group]
    reads = [argument["weight_NM"] for argument in arguments]
    weights = [program.weights[str(read.target)] for read in reads]
    names = [str(read.target) for read in reads]
    stem = common_stem(names)
    label = "_".join(
        name.removeprefix(stem + ".").removesuffix(".weight").removesuffix("_proj")
        for name in names
    )
    sizes = [weight.shape[0] for weight in weights]
    biases = [argument["bias"] for argument in arguments]
    with editor.before(group[0]):
        weight = editor.weight(f"{stem}.{label}.weight", stacked(weights))
        bias = None
        if any(biases):
            bias = editor.weight(
                f"{stem}.{label}.bias", stacked(_bias_weights(program, biases, weights))
            )
        whole = editor.call(einfold_ops.linear.default, arguments[0]["x"], weight, bias)
        parts = editor.call(aten.split_with_sizes.default, whole, sizes, -1)
    for node, part in zip(group, editor.results(parts), strict=True):
        editor.replace(node, part)
    result.applied(stem, f"{len(group)} linears in one: {label}")


def _bias_weights(
    program: Program, biases: Sequence[fx.Node | None], weights: Sequence[Weight]
) -> list[Weight]:
    return [
        program.weights[str(bias.target)]
        if bias is not None
        else Weight.of(torch.zeros(weight.shape[0]))
        for bias, weight in zip(biases, weights, strict=True)
    ]
