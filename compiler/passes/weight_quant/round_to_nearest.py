"""round_to_nearest: group-wise int8, int4 or int2 weights without calibration."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from ....errors import RecipeError
from ...ir.ops import einfold_ops
from ...ir.program import Editor, Program, call_arguments, remove_dead_nodes
from ...ir.quant.pack import BITS
from ...ir.weights import Weight, derive
from ...solve.round_to_nearest import quantize_rtn
from ..base import Pass, PassResult

Named = tuple[Weight, Weight, Weight | None]


@dataclass(frozen=True)
class RoundToNearest(Pass):
    """Stores the weights of linears, experts and, with `embedding`, of embeddings in groups of `block`.

    Before: `%y = linear(%x, %w, %b)`
    After:  `%y = quantized_linear(%x, %w.packed, %w.scales, none, %b, 4, 32)`
    A weight that a head and an embedding share stays one weight: both read the packed form. The head
    takes `head_bits` bits. Source: the round-to-nearest baseline of GPTQ (Frantar et al. 2022, section 4).
    """

    name = "round_to_nearest"
    requires = frozenset({"linears raised"})

    bits: int = 4
    block: int = 32
    symmetric: bool = True
    head_bits: int | None = None
    embedding: bool = True

    def __post_init__(self) -> None:
        for bits in (self.bits, self.head_bits or self.bits):
            if bits not in BITS:
                raise RecipeError(f"weights can have {', '.join(map(str, BITS))} bits, not {bits}")
        if self.block < 16 or self.block & (self.block - 1):
            raise RecipeError(f"the block must be a power of two, 16 or more, not {self.block}")

    def run(self, program: Program) -> PassResult:
        result = PassResult()
        run = _Run(self, program, result)
        head = _head(program)
        for node in program.nodes(einfold_ops.linear.default):
            if _routes(node):
                result.skipped(
                    str(node.args[1]), "a router: its rounding would change which experts run"
                )
            else:
                run.linear(node, (self.head_bits or self.bits) if node is head else self.bits)
        for node in program.nodes(einfold_ops.experts.default):
            run.experts(node)
        for node in program.nodes(einfold_ops.embedding.default):
            run.embedding(node, self.head_bits or self.bits)
        remove_dead_nodes(program)
        return result


class _Run:
    """One run of the pass: which weights are packed already, and the editor."""

    def __init__(self, config: RoundToNearest, program: Program, result: PassResult) -> None:
        self.config = config
        self.program = program
        self.result = result
        self.editor = Editor(program)
        self.done: dict[str, tuple[list[str | None], int]] = {}

    def pack(self, read: fx.Node, bits: int) -> tuple[list[fx.Node | None], int]:
        """Reads of the packed form of a weight, and its bits; the weight is packed on first use."""
        name = str(read.target)
        if name not in self.done:
            weight = self.program.weights[name]
            parts = self._quantized(name, weight, bits)
            stem = name.removesuffix(".weight")
            names: list[str | None] = []
            for label, part in zip(("packed", "scales", "zeros"), parts, strict=True):
                names.append(
                    None if part is None else self.program.weights.add(f"{stem}.{label}", part)
                )
            self.done[name] = (names, bits)
            saved = weight.nbytes - sum(part.nbytes for part in parts if part is not None)
            kind = "symmetric" if self.config.symmetric else "asymmetric"
            self.result.applied(name, f"{bits} bits, block {self.config.block}, {kind}", saved)
        names, bits = self.done[name]
        return [None if n is None else self.editor.read(n) for n in names], bits

    def _quantized(self, name: str, weight: Weight, bits: int) -> Named:
        config, lead = self.config, weight.shape[:-1]
        groups = -(-weight.shape[-1] // config.block)
        shapes: list[tuple[tuple[int, ...], torch.dtype]] = [
            ((*lead, groups, config.block * bits // 8), torch.uint8),
            ((*lead, groups), torch.float32),
        ]
        if not config.symmetric:
            shapes.append(((*lead, math.ceil(groups * bits / 8)), torch.uint8))

        def compute() -> list[Tensor]:
            found = quantize_rtn(weight.load(), bits, config.block, config.symmetric)
            self.result.measured[name] = found.error
            return [part for part in (found.packed, found.scales, found.zeros) if part is not None]

        parts = derive(shapes, compute)
        return parts[0], parts[1], None if config.symmetric else parts[2]

    def linear(self, node: fx.Node, bits: int) -> None:
        found = call_arguments(node)
        with self.editor.before(node):
            parts, bits = self.pack(found["weight_NM"], bits)
            new = self.editor.call(
                einfold_ops.quantized_linear.default,
                found["x"],
                *parts,
                found["bias"],
                bits,
                self.config.block,
            )
        self.editor.replace(node, new)

    def experts(self, node: fx.Node) -> None:
        found = call_arguments(node)
        with self.editor.before(node):
            gate_up, bits = self.pack(found["gate_up_ENM"], self.config.bits)
            down, bits = self.pack(found["down_EMI"], self.config.bits)
            new = self.editor.call(
                einfold_ops.quantized_experts.default,
                found["x_TM"],
                found["index_TJ"],
                found["weight_TJ"],
                *gate_up,
                found["gate_up_bias_EN"],
                *down,
                found["down_bias_EM"],
                found["kind"],
                found["alpha"],
                found["limit"],
                bits,
                self.config.block,
            )
        self.editor.replace(node, new)

    def embedding(self, node: fx.Node, bits: int) -> None:
        table = node.args[1]
        assert isinstance(table, fx.Node)
        name = str(table.target)
        if not self.config.embedding and name not in self.done:
            self.result.skipped(name, "embeddings are kept as they are (embedding = false)")
            return
        if table.meta["val"].shape[0] < 4 * self.config.block:
            self.result.skipped(name, "a small table: packing would save next to nothing")
            return
        width = int(table.meta["val"].shape[1])
        with self.editor.before(node):
            parts, bits = self.pack(table, bits)
            new = self.editor.call(
                einfold_ops.quantized_embedding.default,
                node.args[0],
                *parts,
                bits,
                self.config.block,
                width,
            )
        self.editor.replace(node, new)


def _routes(node: fx.Node) -> bool:
    """Whether a linear's result is only ranked, to choose experts."""
    reached, frontier = {node}, [node]
    for _ in range(3):
        frontier = [user for source in frontier for user in source.users if user not in reached]
        reached.update(frontier)
        if any(user.target is torch.ops.aten.topk.default for user in frontier):
            return True
    return False


def _head(program: Program) -> fx.Node | None:
    """The linear that makes the logits: the last one of the graph."""
    linears = list(program.nodes(einfold_ops.linear.default))
    return linears[-1] if linears and program.is_sequence_model() else None
