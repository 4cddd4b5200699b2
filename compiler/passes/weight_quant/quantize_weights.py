"""quantize_weights: weights are stored in a scheme, and read by the operators that the scheme names."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from ...analysis.routers import routers
from ...budget.mix import Mix
from ...ir.ops import einfold_ops
from ...ir.program import Editor, Program, call_arguments, reads_alone, remove_dead_nodes
from ...ir.quant.scheme import Scheme
from ...ir.quant.schemes.grouped import Grouped
from ...ir.stored import StoredWeight
from ...ir.types import DTYPES
from ...ir.weights import Weight, derive
from ...solve.solver import SOLVERS, Solver, finite
from ...solve.solving import Solving
from ..base import Pass, PassResult

#: The operators over plain weights, with the arguments that are weights.
WEIGHTS = {
    "linear": ("weight_NM",),
    "experts": ("gate_up_ENM", "down_EMI"),
    "embedding": ("weight_VM",),
}

_NORMS = {
    einfold_ops.rms_norm.default,
    einfold_ops.layer_norm.default,
    einfold_ops.add_rms_norm.default,
    einfold_ops.add_layer_norm.default,
}


@dataclass(frozen=True)
class QuantizeWeights(Pass):
    """Stores the weights of linears, experts and, with `embedding`, of embeddings as `scheme` says.

    Before: `%y = linear(%x, %w, %b)`
    After:  `%y = quantized_linear(%x, %w.packed, %w.scales, none, %b, 4, 32)`, with operators,
            `%h = read "w.half" : f16[..]; %w = aten._to_copy(%h, dtype=f32)`, with none.

    With a `mix` the weights of linears are in integers of the widths that it chooses.

    Where the solver scales input channels and the linear alone reads a norm, the norm's weights become
    those that are divided by the scales, unless `divide` is false.

    A weight that a head and an embedding share stays one weight: both read the packed form. The head is
    stored as `head` says. A scheme that is nearly exact takes every matrix, the head too, but not norm
    scales, biases and rotary tables (one-dimensional, or read as positions): they are few and their rounding
    is felt everywhere.
    """

    scheme: Scheme
    head: Scheme | None = None
    solver: Solver = field(default_factory=lambda: SOLVERS["round_to_nearest"]())
    embedding: bool = True
    divide: bool = True
    mix: Mix | None = None

    name = "quantize_weights"
    requires = frozenset({"linears raised"})

    def options(self) -> dict[str, Any]:
        return {
            "scheme": str(self.scheme),
            "head": str(self.head or self.scheme),
            "solver": str(self.solver),
            "embedding": self.embedding,
        } | ({} if self.mix is None else vars(self.mix))

    def schemes(self) -> list[Scheme]:
        """Those that weights may be stored in."""
        some: tuple[Scheme, ...] = (self.scheme,)
        if self.mix is not None and isinstance(self.scheme, Grouped):
            some = self.mix.schemes(self.scheme)
        return [*some, *([] if self.head is None else [self.head])]

    def run(self, program: Program) -> PassResult:
        result = PassResult()
        # The original is the model as it is here: no weight is rounded yet.
        solving = Solving(program, self.solver) if self.solver.reads else None
        if solving is not None:
            program.calibrations.append(solving)
        divide = self.divide and self.solver.scales_channels
        store = Store(self.solver, solving, program, result, divide)
        if self.scheme.nearly_exact:
            self._every_matrix(program, store)
        else:
            self._products(program, store, result)
        remove_dead_nodes(program)
        return result

    def _every_matrix(self, program: Program, store: Store) -> None:
        for node in list(program.graph.nodes):
            weight = program.weight_of(node)
            if weight is None or weight.dtype != torch.float32 or len(weight.shape) < 2:
                continue
            if not str(node.target).startswith("rotary."):
                node.replace_all_uses_with(store.widened(node, self.scheme), propagate_meta=False)

    def _mixed(
        self, program: Program, choosing: Collection[fx.Node], result: PassResult
    ) -> Mapping[str, Scheme]:
        """The schemes of weights that a mix chose."""
        if self.mix is None or not isinstance(self.scheme, Grouped):
            return {}
        left = {str(read.target) for node in choosing for read in node.all_input_nodes}
        mixed = self.mix.chosen(program, self.scheme, left)
        if not mixed:
            result.skipped("mix", "the head is the only linear, and its width is its own")
            return mixed
        counts = Counter(scheme.bits for scheme in mixed.values())
        told = ", ".join(f"{counts[bits]} in {bits} bits" for bits in sorted(counts))
        result.applied("mix", f"{self.mix.bpw:g} bits a weight on average: {told} of {len(mixed)}")
        return mixed

    def _products(self, program: Program, store: Store, result: PassResult) -> None:
        head, last = self.head or self.scheme, head_of(program, einfold_ops.linear.default)
        choosing = routers(program)
        mixed = self._mixed(program, choosing, result)
        for node in program.nodes(einfold_ops.linear.default):
            if node in choosing:
                result.skipped(
                    str(node.args[1]), "a router: its rounding would change which experts run"
                )
            else:
                own = mixed.get(str(call_arguments(node)["weight_NM"].target), self.scheme)
                store.replace(node, head if node is last else own)
        for node in program.nodes(einfold_ops.experts.default):
            if self.mix is not None:
                result.skipped(str(call_arguments(node)["gate_up_ENM"]), "experts have one width")
            store.replace(node, self.scheme)
        for node in program.nodes(einfold_ops.embedding.default):
            table = node.args[1]
            assert isinstance(table, fx.Node)
            if not self.embedding and not store.holds(table):
                reason = "embeddings are kept as they are (embedding = false)"
            elif table.meta["val"].shape[0] < head.fewest_rows:
                reason = "a small table: packing would save next to nothing"
            else:
                store.replace(node, head)
                continue
            result.skipped(str(table.target), reason)


class Store:
    """Stores weights on first use, and has their readers read what was stored."""

    def __init__(
        self,
        solver: Solver,
        solving: Solving | None,
        program: Program,
        result: PassResult,
        divide: bool = False,
    ) -> None:
        self.solver = solver
        self.divide = divide
        self.solving = solving
        self.program = program
        self.result = result
        self.editor = Editor(program)
        self.done: dict[str, tuple[Scheme, dict[str, str]]] = {}
        self.wide: dict[fx.Node, fx.Node] = {}

    def holds(self, read: fx.Node) -> bool:
        return str(read.target) in self.done

    def replace(self, node: fx.Node, scheme: Scheme) -> None:
        """Has a call read its weights as they are stored: in `scheme`, if they are not stored yet."""
        kind = node.target._opname  # type: ignore[union-attr]
        found = call_arguments(node)
        reads = {name: found[name] for name in WEIGHTS[kind]}
        norm = norm_in_front(node) if kind == "linear" and self.divide else None
        stored = {name: self._stored(read, scheme, norm) for name, read in reads.items()}
        (scheme,) = {scheme for scheme, _ in stored.values()}
        if kind not in scheme.operators:
            for read in reads.values():
                node.replace_input_with(read, self.widened(read, scheme))
            return
        with self.editor.before(node):
            pieces = {
                name: (
                    {label: self.editor.read(at) for label, at in names.items()},
                    tuple(reads[name].meta["val"].shape),
                )
                for name, (_, names) in stored.items()
            }
            new = scheme.call(self.editor, kind, found, pieces)
        self.editor.replace(node, new)

    def widened(self, read: fx.Node, scheme: Scheme) -> fx.Node:
        """The weight that a node reads, stored and widened again; once for all of its readers."""
        if read not in self.wide:
            scheme, names = self._stored(read, scheme)
            last, pieces = read, {}
            for label, name in names.items():
                with self.editor.after(last):
                    last = pieces[label] = self.editor.read(name)
            with self.editor.after(last):
                self.wide[read] = scheme.widened(self.editor, pieces, tuple(read.meta["val"].shape))
        return self.wide[read]

    def _stored(
        self, read: fx.Node, scheme: Scheme, norm: fx.Node | None = None
    ) -> tuple[Scheme, dict[str, str]]:
        name = str(read.target)
        if name not in self.done:
            weight = self.program.weights[name]
            stem = name.removesuffix(".weight")
            parts = self._solved(name, weight, scheme, norm)
            names = {
                label: self.program.weights.add(f"{stem}.{label}", part)
                for label, part in parts.items()
            }
            self.done[name] = scheme, names
            self.result.applied(
                name, scheme.describe(), weight.nbytes - scheme.nbytes(weight.shape)
            )
        return self.done[name]

    def _solved(
        self, name: str, weight: Weight, scheme: Scheme, norm: fx.Node | None
    ) -> Mapping[str, Weight]:
        if isinstance(weight, StoredWeight) and weight.scheme == scheme:
            return (
                weight.pieces
            )  # the codes that it came in: rounded again they could only get worse
        pieces = scheme.pieces(weight.shape)
        solving = self.solving
        # Where it takes none, too little is known of what reads the weight.
        divided = norm is not None
        taken = solving if solving is not None and solving.take(name, scheme, divided) else None
        if taken and norm is not None:
            self._divide(norm, taken, name)

        def compute() -> list[Tensor]:
            if taken:
                found = taken.at(name)
            else:
                found = self.solver.solve(finite(name, weight.load(), scheme), scheme, {})
            if found.error is not None:
                self.result.measured[name] = found.error
            return [found.pieces[label] for label in pieces]

        parts = derive([(shape, DTYPES[kind]) for shape, kind in pieces.values()], compute)
        return dict(zip(pieces, parts, strict=True))

    def _divide(self, norm: fx.Node, solving: Solving, name: str) -> None:
        """Has a norm divide by what the channels of a solved weight are multiplied by."""
        for read in _weights_of(norm):
            weight = self.program.weights[str(read.target)]

            def divided(weight: Weight = weight) -> list[Tensor]:
                channels = solving.at(name).channels
                return [weight.load() if channels is None else weight.load() / channels]

            (derived,) = derive([(weight.shape, weight.dtype)], divided)
            with self.editor.before(norm):
                norm.replace_input_with(read, self.editor.weight(f"{read.target}.divided", derived))


def norm_in_front(linear: fx.Node) -> fx.Node | None:
    """The norm whose result one linear alone reads, where the weights of both are read nowhere else."""
    value: Any = linear.args[0]
    while value.target is einfold_ops.select_rows.default and len(value.users) == 1:
        value = value.args[0]
    if len(value.users) != 1:
        return None
    if value.target is operator.getitem and value.args[1] == 0:  # the other result is the sum
        value = value.args[0]
    if value.target not in _NORMS:
        return None
    weight, scales = linear.args[1], _weights_of(value)
    assert isinstance(weight, fx.Node)
    fit = all(read.meta["val"].shape == weight.meta["val"].shape[1:] for read in scales)
    # A head whose table embeds tokens too is not alone, say.
    alone = all(map(reads_alone, (weight, *scales)))
    return value if fit and alone else None


def _weights_of(norm: fx.Node) -> list[fx.Node]:
    """The weight of a norm, and its bias where it has one."""
    found = call_arguments(norm)
    return [found[name] for name in ("weight", "bias") if name in found]


def head_of(program: Program, *kinds: Any) -> fx.Node | None:
    """The linear that makes the logits: the last one of the graph, of these operators."""
    linears = list(program.nodes(*kinds))
    return linears[-1] if linears and program.is_sequence_model() else None
