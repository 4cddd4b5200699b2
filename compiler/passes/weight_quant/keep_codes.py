"""keep_codes: weights that a checkpoint brings in codes are stored as they come."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...ir.ops import einfold_ops
from ...ir.program import Program, call_arguments, remove_dead_nodes
from ...ir.stored import StoredWeight, scheme_of
from ...solve.round_to_nearest import RoundToNearest
from ..base import Pass, PassResult
from .quantize_weights import WEIGHTS, Store


@dataclass(frozen=True)
class KeepCodes(Pass):
    """Has readers of a weight in codes read its pieces; nothing is rounded.

    Before: `%y = linear(%x, %w, %b)`, where %w comes in the scheme grouped(bits=4, block=128)
    After:  `%y = quantized_linear(%x, %w.packed, %w.scales, none, %b, 4, 128)`

    Weights that come as they are, or in codes that a pass before took apart, stay as they are.
    """

    name = "keep_codes"
    requires = frozenset({"linears raised"})

    def run(self, program: Program) -> PassResult:
        result = PassResult()
        store = Store(RoundToNearest(), None, program, result)
        for name in WEIGHTS:
            for node in program.nodes(getattr(einfold_ops, name).default):
                found = call_arguments(node)
                weights = [program.weight_of(found[argument]) for argument in WEIGHTS[name]]
                schemes = {None if weight is None else scheme_of(weight) for weight in weights}
                scheme = next(iter(schemes))
                if len(schemes) == 1 and scheme is not None:
                    store.replace(node, scheme)
        for node in list(
            program.graph.nodes
        ):  # read by something else, such as a product of its own
            weight = program.weight_of(node)
            if isinstance(weight, StoredWeight) and node.users and weight.dtype == torch.float32:
                node.replace_all_uses_with(store.widened(node, weight.scheme), propagate_meta=False)
        remove_dead_nodes(program)
        return result
