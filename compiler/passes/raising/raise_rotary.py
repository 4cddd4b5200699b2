"""raise_rotary: rotary position embedding, found by what it computes and not by how it is spelled.

Between an attention's query or key and the projection that feeds it, a rotary model turns pairs of
coordinates by angles that depend on the position alone. For a fixed position that is a linear map of
a known form, so two probes read its cosines and sines off, and a third, random, checks the form. Any
spelling is found in this way: halves by slice, chunk or roll, interleaved pairs, a partial rotary width,
cosines scaled by YaRN. Source: Su et al. 2021 (RoFormer), section 3.2.2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from ...ir.interpreter import evaluate_cone
from ...ir.ops import einfold_ops
from ...ir.ops.rotary import rotary_reference
from ...ir.program import (
    Editor,
    Program,
    attention_nodes,
    call_arguments,
    remove_dead_nodes,
)
from ...ir.weights import Weight
from ..base import Pass, PassResult

aten = torch.ops.aten

#: Operators that may stand between the projection and the attention of a rotary model.
_INSIDE = {
    aten.mul.Tensor,
    aten.add.Tensor,
    aten.sub.Tensor,
    aten.neg.default,
    aten.cat.default,
    aten.stack.default,
    aten.slice.Tensor,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.select.int,
    aten.roll.default,
    aten.transpose.int,
    aten.reshape.default,
    aten.unsqueeze.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.expand.default,
    aten.repeat_interleave.self_int,
}
_CHUNK = 1024
_CHECKED_POSITIONS = 32


@dataclass(frozen=True)
class _Cone:
    """The nodes between one data tensor and an attention input."""

    output: fx.Node
    data: fx.Node
    angles: frozenset[int]
    """The position-only values that it reads: cones with equal angles have equal tables."""

    @property
    def heads(self) -> int:
        return int(self.output.meta["val"].shape[2])

    @property
    def head_size(self) -> int:
        return int(self.output.meta["val"].shape[3])

    @property
    def heads_second(self) -> bool:
        """Whether the data tensor is [B, H, S, D]; the attention's input is always [B, S, H, D]."""
        return isinstance(self.data.meta["val"].shape[1], int)


@dataclass(frozen=True)
class _Tables:
    cos_PR: Tensor
    sin_PR: Tensor
    interleaved: bool

    def key(self) -> bytes:
        """Equal for equal tables (a quarter-million numbers are compared by a few hundred)."""
        rows = self.cos_PR[:: max(1, self.cos_PR.shape[0] // 64)]
        return rows.numpy().tobytes() + bytes([self.interleaved])


@dataclass(frozen=True)
class RaiseRotary(Pass):
    """Puts `einfold.rotary` with tables of cos and sin [context, R] in front of each attention.

    Before: `mul(%q, %cos), slice, neg, cat, mul(.., %sin), add`
    After:  `%q2 = einfold.rotary(%q, %position_ids, %cos, %sin, false)`
    Layers that use the same angles share one pair of tables.
    """

    name = "raise_rotary"

    def run(self, program: Program) -> PassResult:
        result = PassResult()
        if program.is_sequence_model():
            _Raiser(program, result).run()
            remove_dead_nodes(program)
        return result


class _Raiser:
    def __init__(self, program: Program, result: PassResult) -> None:
        self.program = program
        self.result = result
        self.editor = Editor(program)
        self.positions = program.placeholder("position_ids")
        self.order = {node: index for index, node in enumerate(program.graph.nodes)}
        self.pure = _position_only(program, self.positions)
        self.tables: dict[tuple[frozenset[int], int], _Tables | str] = {}
        self.nodes: dict[bytes, tuple[fx.Node, fx.Node]] = {}

    def run(self) -> None:
        for node in attention_nodes(self.program):
            for argument, label in ((0, "query"), (1, "key")):
                output = node.args[argument]
                assert isinstance(output, fx.Node)
                cone = self.find_cone(output)
                if cone is not None:
                    self.raise_cone(cone, node, argument, f"layer {node.args[4]} {label}")

    def find_cone(self, output: fx.Node) -> _Cone | None:
        """Walks back from `output` until one data tensor and position-only tensors are all that it reads."""
        leaves, angles = {output}, set[int]()
        for _ in range(64):
            if len(leaves) == 1 and angles:
                (data,) = leaves
                if isinstance(data.meta["val"], Tensor) and data.meta["val"].dim() == 4:
                    return _Cone(output, data, frozenset(angles))
            latest = max(leaves, key=lambda node: self.order[node])
            builtin = latest.op == "call_function" and not isinstance(
                latest.target, torch._ops.OpOverload
            )
            if latest.op != "call_function" or not (latest.target in _INSIDE or builtin):
                return None
            leaves.remove(latest)
            for source in latest.all_input_nodes:
                if source in self.pure:
                    if isinstance(source.meta["val"], Tensor):
                        angles.add(self.pure[source])
                elif source.op != "get_attr":
                    leaves.add(source)
        return None

    def raise_cone(self, cone: _Cone, node: fx.Node, argument: int, where: str) -> None:
        key = (cone.angles, cone.head_size)
        if key not in self.tables:
            self.tables[key] = self.read_tables(cone)
        tables = self.tables[key]
        problem = tables if isinstance(tables, str) else self.check(cone, tables)
        if isinstance(tables, str) or problem:
            self.result.skipped(where, str(problem))
            return
        cosine, sine = self.table_nodes(tables)
        with self.editor.before(node):
            data = cone.data
            if cone.heads_second:
                data = self.editor.call(aten.transpose.int, data, 1, 2)
            new = self.editor.call(
                einfold_ops.rotary.default, data, self.positions, cosine, sine, tables.interleaved
            )
        node.update_arg(argument, new)
        self.result.applied(
            where, f"rotary over {2 * tables.cos_PR.shape[1]} of {cone.head_size} coordinates"
        )

    def read_tables(self, cone: _Cone) -> _Tables | str:
        """The tables of a cone, or why it is no rotary embedding."""
        form = self.find_form(cone)
        if isinstance(form, str):
            return form
        width, interleaved = form
        first = slice(0, width, 2) if interleaved else slice(0, width // 2)
        second = slice(1, width, 2) if interleaved else slice(width // 2, width)
        context = self.program.model.context
        tables = _Tables(
            torch.empty(context, width // 2), torch.empty(context, width // 2), interleaved
        )
        for start in range(0, context, _CHUNK):
            rows = torch.arange(start, min(start + _CHUNK, context))
            probe = torch.zeros(1, len(rows), 1, cone.head_size)
            probe[..., first] = 1.0
            out = self.apply(cone, probe, rows)[0, :, 0]
            tables.cos_PR[start : start + len(rows)] = out[:, first]
            tables.sin_PR[start : start + len(rows)] = out[:, second]
        return tables

    def find_form(self, cone: _Cone) -> tuple[int, bool] | str:
        """(rotary width, interleaved), from which coordinates the first one is mixed with."""
        size = cone.head_size
        out = self.apply(cone, torch.eye(size).reshape(size, 1, 1, size), torch.tensor([1]))[
            :, 0, 0
        ]
        partner = [int(i) for i in out[0].nonzero().flatten() if int(i) != 0]
        if len(partner) != 1:
            return f"the first coordinate is mixed with {len(partner)} others, a rotation mixes it with one"
        if partner[0] == 1 and size > 2:
            return 2 * sum(bool(out[i, i + 1]) for i in range(0, size, 2)), True
        return 2 * partner[0], False

    def check(self, cone: _Cone, tables: _Tables) -> str:
        """Why the cone is not the rotation by these tables; empty where it is."""
        rows = torch.linspace(0, self.program.model.context - 1, _CHECKED_POSITIONS).long()
        probe = torch.randn(
            1, len(rows), 1, cone.head_size, generator=torch.Generator().manual_seed(0)
        )
        want = self.apply(cone, probe, rows)[:, :, :1]
        got = rotary_reference(probe, rows[None], tables.cos_PR, tables.sin_PR, tables.interleaved)
        error = float((got - want).abs().max())
        if error <= 1e-5:
            return ""
        return f"the map from the projection to the attention is no rotation by position (error {error:.1e})"

    def apply(self, cone: _Cone, x_BS1D: Tensor, rows: Tensor) -> Tensor:
        """What the cone makes of `x`, the same in every head, at these positions."""
        batch = x_BS1D.shape[0]
        data = x_BS1D.expand(-1, -1, cone.heads, -1)
        known: dict[fx.Node, object] = {
            cone.data: (data.transpose(1, 2) if cone.heads_second else data).contiguous(),
            self.positions: rows[None].expand(batch, -1).contiguous(),
        }
        for node in self.program.nodes(aten.sym_size.int):
            known[node] = (batch, len(rows))[call_arguments(node)["dim"]]
        out: Tensor = evaluate_cone([cone.output], known, self.program)[0]
        return out

    def table_nodes(self, tables: _Tables) -> tuple[fx.Node, fx.Node]:
        key = tables.key()
        if key not in self.nodes:
            number = len(self.nodes)
            with self.editor.after(self.program.placeholders()[-1]):
                sine = self.editor.weight(f"rotary.{number}.sin", Weight.of(tables.sin_PR))
                cosine = self.editor.weight(f"rotary.{number}.cos", Weight.of(tables.cos_PR))
            self.nodes[key] = (cosine, sine)
        return self.nodes[key]


def _position_only(program: Program, positions: fx.Node) -> dict[fx.Node, int]:
    """Nodes that depend on positions, sizes and weights, but on no token, with the number of their value.

    Equal expressions have one number: a model spells its angles anew in each layer.
    """
    numbers: dict[tuple[object, str], int] = {}
    pure: dict[fx.Node, int] = {}

    def add(node: fx.Node) -> None:
        spelled = fx.map_arg((node.args, dict(node.kwargs)), lambda n: f"%{pure.get(n, n.target)}")
        pure[node] = numbers.setdefault((node.target, repr(spelled)), len(numbers))

    for node in (positions, *program.nodes(aten.sym_size.int)):
        add(node)
    for node in program.graph.nodes:
        sources = [source for source in node.all_input_nodes if source.op != "get_attr"]
        if node.op == "call_function" and sources and all(source in pure for source in sources):
            add(node)
    return pure
