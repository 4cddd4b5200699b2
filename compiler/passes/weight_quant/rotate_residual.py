"""rotate_residual: what layers add up is turned by an orthogonal matrix that is folded into the weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from ...ir.ops import einfold_ops
from ...ir.ops.channels import MixChannels
from ...ir.program import Editor, Program, call_arguments, reads_alone, remove_dead_nodes
from ...ir.quant.hadamard import signs
from ...ir.quant.orthogonal import factors, turned
from ...ir.weights import Weight, derive
from ..base import Pass, PassResult, place_of
from .turning import NotTurnedError, change_weight, check_alone, check_width, sound

aten = torch.ops.aten

_EMBEDDING = einfold_ops.embedding.default
_LINEAR = einfold_ops.linear.default
_EXPERTS = einfold_ops.experts.default
_NORM = einfold_ops.rms_norm.default
_ADD_NORM = einfold_ops.add_rms_norm.default

#: What reads and writes the stream: the arguments that are its weight, and the bias of what writes.
_READ: dict[Any, str] = {_LINEAR: "weight_NM", _EXPERTS: "gate_up_ENM"}
_WRITTEN: dict[Any, tuple[str, str]] = {
    _LINEAR: ("weight_NM", "bias"),
    _EXPERTS: ("down_EMI", "down_bias_EM"),
}


@dataclass(frozen=True)
class RotateResidual(Pass):
    """Turns the residual stream of a model with RMS norms, x -> x Q, which none of its results shows.

    Before: `%h = embedding(%ids, %e); %n = rms_norm(%h, %g); %q = linear(%n, %w); ..
             %s = add(%h, linear(%o, %u))`
    After:  the same calls; the rows of `%e` turned, `%w` = `(%w * %g) Q`, `%u` = `Qᵀ %u`, `%g` = 1

    What reads a norm takes its weights and turns its columns, what is added turns its rows. A table that the
    head reads too stays as it is: what it gives is turned then, and the last norm's result turned back, by
    two small matrices (`ir/quant/orthogonal.py`).

    Numbers that stand out in a few channels are spread over all, so that those that share a scale are alike,
    of weights and of what multiplies them.

    Source: QuaRot (Ashkboos et al. 2024, section 4, stage 1a), after SliceGPT (Ashkboos et al. 2024,
    section 3). Different from it: what a down projection and attention's output projection read is turned by
    passes of their own (`rotate_down`, `rotate_values`), and shared tables stay shared.
    """

    name = "rotate_residual"
    requires = frozenset({"linears raised", "norms raised"})

    def run(self, program: Program) -> PassResult:
        result = PassResult()
        try:
            found = _Residual.of(program)
        except NotTurnedError as reason:
            result.skipped("residual stream", str(reason))
            return result
        _Turn(program, found).run()
        remove_dead_nodes(program)
        result.applied(
            "residual stream",
            f"{found.width} channels turned; folded into {len(found.writers)} weights that write it and "
            f"{len(found.readers)} that read it"
            + ", and turned beside a table that is shared"
            * bool(found.shared),
        )
        return result


@dataclass
class _Residual:
    """The calls that read and write what is added up.

    `readers` has for each linear or layer of experts the norms whose weights it takes, at most one; `shared`
    are readers whose weight is read elsewhere too; `tables` the embeddings, and whether theirs is not.
    """

    program: Program
    width: int
    seen: set[fx.Node] = field(default_factory=set)
    writers: dict[fx.Node, None] = field(default_factory=dict)
    readers: dict[fx.Node, fx.Node | None] = field(default_factory=dict)
    shared: dict[fx.Node, fx.Node | None] = field(default_factory=dict)
    tables: dict[fx.Node, bool] = field(default_factory=dict)
    norms: dict[fx.Node, None] = field(default_factory=dict)

    @staticmethod
    def of(program: Program) -> _Residual:
        tables = list(program.nodes(_EMBEDDING))
        if not tables:
            raise NotTurnedError("no embedding begins it")
        width = int(tables[0].meta["val"].shape[-1])
        check_width(width)
        found = _Residual(program, width)
        found.written(tables[0])
        found.summed(tables[0])
        if not found.norms:
            raise NotTurnedError("no RMS norm reads it")
        return found

    def written(self, value: fx.Node) -> None:
        """A value that is added to what else is there: by what calls, and that nothing else reads it."""
        if value in self.seen:
            return
        if value.target is _EMBEDDING:
            self.tables[value] = reads_alone(call_arguments(value)["weight_VM"])
            if self.tables[value]:
                check_alone(self.program, value, "weight_VM")
        elif value.target in _WRITTEN:
            check_alone(self.program, value, *_WRITTEN[value.target])
            self.writers[value] = None
        elif value.target is aten.add.Tensor:
            for part in value.args[:2]:
                self._added(value, part)
        elif (carried := _carried(value)) is not None:
            self._added(value, carried)
        else:
            raise NotTurnedError(
                f"{place_of(value)} writes it, whose result cannot be turned in a weight"
            )
        self.seen.add(value)
        self.summed(value)

    def _added(self, total: fx.Node, part: Any) -> None:
        if _channels(part) != self.width:
            raise NotTurnedError(f"{place_of(total)} adds something that all channels share")
        if part not in self.seen:
            self.written(part)

    def summed(self, value: fx.Node) -> None:
        """Who reads a value of the stream."""
        self.seen.add(value)
        for user in value.users:
            if user in self.seen or user in self.norms:
                continue
            if user.target is aten.add.Tensor:
                self.seen.add(user)
                for part in user.args[:2]:
                    self._added(user, part)
                self.summed(user)
            elif user.target is _ADD_NORM:
                self.norms[user] = None
                for part in user.args[:2]:
                    self._added(user, part)
                for result in user.users:
                    if result.args[1] == 0:
                        self._normed(result, user)
                    else:
                        self.summed(result)
            elif user.target is _NORM:
                self.norms[user] = None
                self._normed(user, user)
            elif user.target is _LINEAR and user.args[0] is value:
                self._reads(user, None)
            elif _carried(user) is value:
                self.summed(user)
            else:
                raise NotTurnedError(
                    f"{place_of(user)} reads it otherwise than through an RMS norm or a linear"
                )

    def _normed(self, value: fx.Node, norm: fx.Node) -> None:
        for user in value.users:
            if user.target in _READ and user.args[0] is value:
                self._reads(user, norm)
            elif _carried(user) is value:
                self._normed(user, norm)
            else:
                raise NotTurnedError(f"{place_of(user)} reads a norm, and is no linear")

    def _reads(self, call: fx.Node, norm: fx.Node | None) -> None:
        name = _READ[call.target]
        if call.target is _LINEAR and not reads_alone(call_arguments(call)[name]):
            self.shared[call] = norm
            return
        check_alone(self.program, call, name, *(["bias"] if call.target is _LINEAR else []))
        self.readers[call] = norm


def _carried(node: fx.Node) -> fx.Node | None:
    """The argument of a call that does the same to all of its channels: picks, regroups or scales rows."""
    if node.target is einfold_ops.select_rows.default:
        return node.args[0]  # type: ignore[return-value]
    if node.target is aten.reshape.default:
        kept = _channels(node.args[0]) == _channels(node)
        return node.args[0] if kept else None  # type: ignore[return-value]
    if node.target is aten.mul.Tensor:
        one, other = node.args[:2]
        for value, by in ((one, other), (other, one)):
            if (
                isinstance(value, fx.Node)
                and _channels(value) == _channels(node)
                and _channels(by) == 1
            ):
                return value
    return None


def _channels(value: Any) -> int:
    """The last size of a value, 1 of a number."""
    shape = value.meta["val"].shape if isinstance(value, fx.Node) else ()
    return int(shape[-1]) if shape else 1


class _Turn:
    """Changes the weights and calls of a residual stream."""

    def __init__(self, program: Program, found: _Residual) -> None:
        self._program, self._found = program, found
        self._editor = Editor(program)

    def run(self) -> None:
        found = self._found
        for table, alone in found.tables.items():
            if alone:
                change_weight(self._editor, table, "weight_VM", turned)
            else:
                self._turn_behind(table)
        gains = {norm: self._gain(norm) for norm in found.norms}
        for call, norm in found.readers.items():
            gain = None if norm is None else gains[norm]
            change_weight(self._editor, call, _READ[call.target], _read_by(gain))
        for call in found.writers:
            weight, bias = _WRITTEN[call.target]
            change_weight(self._editor, call, weight, _written_by)
            change_weight(self._editor, call, bias, turned)
        for call, norm in found.shared.items():
            self._turn_back(call, None if norm is None else gains[norm])
        for norm in found.norms:
            change_weight(self._editor, norm, "weight", torch.ones_like)

    def _gain(self, norm: fx.Node) -> Callable[[], Tensor]:
        return sound(self._program, str(call_arguments(norm)["weight"].target))

    def _turn_behind(self, table: fx.Node) -> None:
        later = [*table.users]
        with self._editor.after(table):
            sign = self._editor.weight("turn.signs", Weight.of(signs(self._found.width)))
        with self._editor.after(sign):
            signed = self._editor.call(aten.mul.Tensor, table, sign)
        new = self._mixed(signed)
        for user in later:
            user.replace_input_with(table, new)

    def _turn_back(self, call: fx.Node, gain: Callable[[], Tensor] | None) -> None:
        """Has a call whose weight stays read what is no more turned, times a norm's weights."""
        value = call.args[0]
        assert isinstance(value, fx.Node)
        sign = signs(self._found.width)
        (factor,) = derive(
            [((self._found.width,), torch.float32)],
            lambda: [sign if gain is None else sign * gain()],
        )
        back = self._mixed(value)
        with self._editor.before(call):
            scale = self._editor.weight("turn.back", factor)
            call.replace_input_with(value, self._editor.call(aten.mul.Tensor, back, scale))

    def _mixed(self, value: fx.Node) -> fx.Node:
        """A value's rows, mixed by two matrices."""
        editor, last = self._editor, value
        reads = {}
        for name, matrix in zip(("outer", "inner"), factors(self._found.width), strict=True):
            with editor.after(last):
                last = reads[name] = editor.weight(f"turn.{name}", Weight.of(matrix.float()))
        with editor.after(last):
            return editor.make(MixChannels, x=value, **reads)


def _read_by(gain: Callable[[], Tensor] | None) -> Callable[[Tensor], Tensor]:
    """The weight [.., N, M] of a call that reads turned rows, and rows without a norm's weights."""
    return lambda weight: turned(weight if gain is None else weight * gain())


def _written_by(weight: Tensor) -> Tensor:
    """The weight [.., M, K] of a call whose results are turned."""
    return turned(weight.transpose(-1, -2)).transpose(-1, -2).contiguous()
