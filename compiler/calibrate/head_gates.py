"""Which KV heads need their whole cache: gates between it and a window (DuoAttention, section 2.2)."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from blake3 import blake3
from torch import Tensor, fx
from torch.nn import functional

from ...errors import CalibrationError
from ..ir.interpreter import Interpreter
from ..ir.ops.attention import Attention, distance_bias, masked_attention
from ..ir.ops.record import seen_through
from ..ir.program import Program, attention_nodes, call_arguments
from .observer import Found
from .sites import layer as site_of
from .snapshot import copied, text_inputs
from .stream import Tell

#: Tokens of a passage that is asked for again, and how many of them are given.
PASSAGE, GIVEN = 16, 4

#: Passages that are asked for at once, at most.
_ASKED = 8

#: How far a gate goes towards where its gradient points, and how much of older gradients counts in this.
_RATE, _MOMENTUM = 0.1, 0.8


@dataclass(frozen=True)
class HeadGates:
    """Chooses `full` KV heads of `layers`, {layer: KV heads}, that keep all where the others see `sinks` and
    the newest `recent` tokens.

    A text of at most `tokens` is read whole. Then passages of it come again, out of order, and each layer's
    attention gives g * (over everything) + (1 - g) * (over what a window keeps), with a gate g a KV head. All
    gates begin at 1; in each of `steps` they go a tenth of the way to the corner of {0 <= g <= 1, sum = full}
    where the gradient of the passages' loss points (Frank and Wolfe 1956), and so end in a choice of heads.
    """

    layers: tuple[tuple[int, int], ...]
    full: int
    sinks: int
    recent: int
    tokens: int = 1024
    steps: int = 24

    @property
    def key(self) -> str:
        """Under which the gates are kept: all options count."""
        return f"head-gates-{blake3(repr(self).encode()).hexdigest()[:16]}"

    def places(self, tokens: int, context: int) -> range:
        """Where passages begin in a text of so many tokens; a context has room for those asked behind it.

        Raises CalibrationError where none stands between the sinks and the window.
        """
        read = self._read(tokens, context)
        found = range(self.sinks, read - self.recent - PASSAGE, PASSAGE)
        if not found:
            raise CalibrationError(
                f"heads are chosen by what they find again of passages of {PASSAGE} tokens that stand behind "
                f"{self.sinks} sinks and before a window of {self.recent}, but of a calibration text of "
                f"{tokens} tokens {read} are read: give a longer text, more tokens or a shorter window"
            )
        return found

    def _read(self, tokens: int, context: int) -> int:
        return max(0, min(tokens, self.tokens, context - _most(context) * PASSAGE))

    def learn(self, program: Program, tokens_BS: Tensor, tell: Tell) -> dict[str, Found]:
        """The gates of each layer, `layer-N`: `gate` [K].

        Raises CalibrationError where the text is too short for a passage to leave the window, or the loss is
        not finite.
        """
        flat, context = tokens_BS.flatten(), program.model.context
        places = self.places(len(flat), context)
        text = flat[: self._read(len(flat), context)]
        asked = min(_most(context), len(places))
        reading = GatedReading(program, dict(self.layers), self.sinks, self.recent)
        past, drawn = reading.read(text), random.Random(0)

        def loss(step: int, gates: Tensor) -> Tensor:
            tell("choosing heads", step / self.steps)
            passages = [text[at : at + PASSAGE] for at in drawn.sample(places, asked)]
            return reading.loss(past, torch.stack(passages), gates)

        gates = descend(loss, reading.heads, self.full, self.steps)
        return {site_of(layer): {"gate": gates[at]} for layer, at in reading.gates.items()}


def _most(context: int) -> int:
    """Passages that are asked for at once, in a quarter of the context."""
    return max(1, min(_ASKED, context // (4 * PASSAGE)))


def descend(loss: Callable[[int, Tensor], Tensor], heads: int, full: int, steps: int) -> Tensor:
    """Gates [heads] after so many steps, from all open to `full` of them; `loss` is of a step and gates."""
    gates, slope = torch.ones(heads), torch.zeros(heads)
    for step in range(steps):
        leaf = gates.clone().requires_grad_()
        (now,) = torch.autograd.grad(loss(step, leaf), leaf)
        # Texts differ in how much there is to lose.
        slope = _MOMENTUM * slope + (1 - _MOMENTUM) * now / now.abs().sum().clamp(min=1e-12)
        corner = torch.zeros(heads)
        corner[slope.topk(full, largest=False).indices] = 1
        gates = gates + _RATE * (corner - gates)
    return gates


@dataclass
class Past:
    """A text that was read: its tokens, and each attention's keys and values [1, T, K, D]."""

    tokens: int
    kept: dict[fx.Node, tuple[Tensor, Tensor]]


class GatedReading:
    """A program over texts that were read whole, whose KV heads are gated for what comes behind them.

    `layers` are those with gates, and their KV heads. A gate of 1 is a head that sees everything, of 0 one
    that sees `sinks` and the newest `recent` tokens; layers that read another one's cache go by its gates.
    `gates` says where among all the gates those of a layer are.
    """

    def __init__(
        self, program: Program, layers: Mapping[int, int], sinks: int, recent: int
    ) -> None:
        self._program, self._sinks, self._recent = copied(program), sinks, recent
        self.gates: dict[int, slice] = {}
        self.heads = 0
        for layer, heads in layers.items():
            self.gates[layer] = slice(self.heads, self.heads + heads)
            self.heads += heads
        nodes = attention_nodes(self._program)
        reads = [node for node in self._program.graph.nodes if node.op == "get_attr"]
        names = {str(node.target) for node in reads}
        self._kept = {name: self._program.weights[name].load().detach() for name in names}
        self._past, self._now = Past(0, {}), torch.ones(self.heads)
        owners = _owners(program)
        reading: dict[Any, Any] = {node: partial(self._read, node) for node in nodes}
        asking: dict[Any, Any] = {
            node: partial(self._gated, node, self.gates.get(owners[layer]))
            for node in nodes
            for layer in (int(call_arguments(node)["layer"]),)
        }
        self._reader = Interpreter(self._program, instead=reading, kept=self._kept)
        self._asker = Interpreter(
            self._program, instead=seen_through() | asking, kept=self._kept, gradients=True
        )

    def read(self, text: Tensor) -> Past:
        """Reads a text [T] whole."""
        self._past = Past(len(text), {})
        self._reader.run(text_inputs(text[None]) | self._program.beside(text[None]))
        return self._past

    def logits(self, past: Past, tokens: Tensor, rows: Tensor, gates: Tensor) -> Tensor:
        """The logits [N, V] at `rows` [N] of tokens [S] that stand behind a text. They can be derived by the
        gates [heads]."""
        self._past, self._now = past, gates
        inputs = text_inputs(tokens[None], rows) | self._program.beside(tokens[None])
        inputs["position_ids"] = inputs["position_ids"] + past.tokens
        (found,) = self._asker.run(inputs).values()
        return found.float()

    def loss(self, past: Past, asked: Tensor, gates: Tensor, given: int = GIVEN) -> Tensor:
        """The mean loss, in nats a token, of passages [n, P] behind a text, but for what is `given` of each.

        Raises CalibrationError where it is not finite.
        """
        place = torch.arange(asked.numel()).reshape(asked.shape)[:, given:].flatten()
        tokens = asked.flatten()
        logits = self.logits(past, tokens, place - 1, gates)
        loss = functional.cross_entropy(logits, tokens[place])
        if not bool(torch.isfinite(loss)):
            raise CalibrationError(
                "the loss is not finite on the calibration text: the model's weights are damaged, or "
                "overflow in float32"
            )
        return loss

    def _read(self, node: fx.Node, *arguments: Any) -> Tensor:
        call = Attention(*arguments)
        self._past.kept[node] = call.k_BSKD, call.v_BSKD
        return call.run()

    def _gated(self, node: fx.Node, gates: slice | None, *arguments: Any) -> Tensor:
        call, (past_k, past_v) = Attention(*arguments), self._past.kept[node]
        k_BKTD = torch.cat((past_k, call.k_BSKD), 1).transpose(1, 2)
        v_BKTD = torch.cat((past_v, call.v_BSKD), 1).transpose(1, 2)
        kv_heads, total = k_BKTD.shape[1:3]
        column = torch.arange(total)
        row = column[past_k.shape[1] :, None]
        bias_BHST = distance_bias(call.by_distance_HR, row.T, total)

        def attended(visible: Tensor) -> Tensor:
            return masked_attention(
                call.q_BSHD,
                k_BKTD,
                v_BKTD,
                visible[None],
                call.sinks_H,
                call.scale,
                call.softcap,
                bias_BHST=bias_BHST,
            )

        seen = column <= row
        if call.window:
            seen = seen & (row - column < call.window)
        everything = attended(seen)
        if gates is None:
            return everything
        windowed = attended(seen & ((row - column < self._recent) | (column < self._sinks)))
        each = call.q_BSHD.shape[2] // kv_heads
        gate_H1 = self._now[gates].repeat_interleave(each)[:, None]
        return windowed + gate_H1 * (everything - windowed)


def _owners(program: Program) -> dict[int, int]:
    """The layer whose tokens each layer reads."""
    assert program.layout is not None
    owners = {layer.layer: layer.groups[0].owner for layer in program.layout.layers}
    return {layer: layer if owner is None else owner for layer, owner in owners.items()}
