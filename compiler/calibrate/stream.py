"""Reads a sample through a model once, layer by layer, and shows its attention to observers.

Weights are loaded one at a time and let go, the sample's activations are kept, and attention is
computed in blocks of rows, so that memory is bounded by the sample and one layer. What was found of
each layer can be kept in a folder; a run that was interrupted goes on behind the last layer that is
there.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from ...errors import CalibrationError, IRError, pass_on
from ..ir.interpreter import Interpreter
from ..ir.kept import read, write
from ..ir.locks import lock
from ..ir.ops import einfold_ops
from ..ir.program import Program, attention_nodes, call_arguments, remove_dead_nodes
from .snapshot import snapshot, text_inputs

#: Numbers of attention weights in a block of rows: 64 MB.
_BLOCK = 1 << 24

#: What is found of a layer, by name.
Found = Mapping[str, Tensor]

#: Told of progress: what is being done, and the share of it that is done (0 to 1).
Tell = Callable[[str, float], None]

_PROGRESS = "progress.pt"
_LOCK = "lock"

#: Bytes of the largest file that is read back.
_LARGEST = 1 << 34


class Observer(Protocol):
    """Looks at one layer after the other."""

    def begin(self, q_BSHD: Tensor, k_BSKD: Tensor, v_BSKD: Tensor) -> None:
        """A layer's queries, keys (both rotated) and values."""

    def block(self, start: int, weights_BHST: Tensor) -> None:
        """Attention weights of the queries from `start` on over all tokens."""

    def end(self) -> Found:
        """What was found of the layer."""


def stream(
    program: Program,
    tokens_BS: Tensor,
    observers: Sequence[Observer],
    folder: Path | None = None,
    tell: Tell | None = None,
) -> dict[int, dict[str, Tensor]]:
    """What the observers find of each attention layer on the sample.

    `program` has no cache yet and is left as it is. With `folder`, finished layers are kept there, and those
    that are there already are not read again. Raises CalibrationError where activations are not finite.
    """
    run = _Run(cut_behind_attention(program), observers, folder, tell or (lambda text, share: None))
    return run.over(tokens_BS)


def cut_behind_attention(program: Program) -> Program:
    """A copy that ends with the last attention; it shares the weights and holds none of its own."""
    cut, copies = snapshot(program)
    last = [node for node in program.graph.nodes if node.target is einfold_ops.attention.default]
    if not last:
        raise IRError("the program has no attention to observe")
    cut.graph.output((copies[last[-1]],)).meta["names"] = ["last"]
    remove_dead_nodes(cut)
    return cut


class _Run:
    """One reading of a sample."""

    def __init__(
        self, program: Program, observers: Sequence[Observer], folder: Path | None, tell: Tell
    ) -> None:
        self.program, self.observers, self.folder, self.tell = program, observers, folder, tell
        self.layers = len(attention_nodes(program))
        self.found: dict[int, dict[str, Tensor]] = {}
        self.keeps = False

    def over(self, tokens_BS: Tensor) -> dict[int, dict[str, Tensor]]:
        with self._alone():
            return self._over(tokens_BS)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Keeps the folder to one reader; another one, at the same time, keeps nothing."""
        with ExitStack() as stack:
            if self.folder is not None:
                try:
                    self.folder.mkdir(parents=True, exist_ok=True)
                    self.keeps = stack.enter_context(lock(self.folder / _LOCK))
                except OSError:  # no room, or no right to write: measuring goes on without
                    self.keeps = False
            yield

    def _over(self, tokens_BS: Tensor) -> dict[int, dict[str, Tensor]]:
        resume = self._resumed()
        if len(self.found) < self.layers:
            instead = {einfold_ops.attention.default: self._attention}
            interpreter = Interpreter(self.program, False, instead)
            interpreter.run(text_inputs(tokens_BS), self._after, resume)
            if self.keeps and self.folder is not None:
                with suppress(OSError):
                    (self.folder / _PROGRESS).unlink(missing_ok=True)
        return self.found

    def _attention(
        self,
        q_BSHD: Tensor,
        k_BSKD: Tensor,
        v_BSKD: Tensor,
        sinks_H: Tensor | None,
        layer: int,
        scale: float,
        window: int,
        softcap: float,
    ) -> Tensor:
        self.tell("measuring the model", len(self.found) / self.layers)
        for part, x in (("queries", q_BSHD), ("keys", k_BSKD), ("values", v_BSKD)):
            if not bool(torch.isfinite(x).all()):
                raise CalibrationError(
                    f"the {part} of layer {layer} are not finite on the calibration sample: "
                    "the model's weights are damaged, or overflow in float32"
                )
        for observer in self.observers:
            observer.begin(q_BSHD, k_BSKD, v_BSKD)
        parts = []
        for start, weights_BHST in attention_weights(
            q_BSHD, k_BSKD, sinks_H, scale, window, softcap
        ):
            for observer in self.observers:
                observer.block(start, weights_BHST)
            parts.append(_weighted(weights_BHST, v_BSKD))
        self.found[layer] = {n: t for o in self.observers for n, t in o.end().items()}
        return torch.cat(parts, dim=1)

    def _after(self, node: fx.Node, values: Mapping[fx.Node, Any]) -> None:
        """Keeps what was found of a layer, and what is needed to go on behind it."""
        attention = node.target is einfold_ops.attention.default
        if self.folder is None or not self.keeps or not attention:
            return
        layer = int(call_arguments(node)["layer"])
        known = {other.name: value for other, value in values.items()}
        # Without room, or the right to write, measuring goes on and keeps nothing.
        self.keeps = _write(self.found[layer], self.folder / f"layer-{layer}.pt") and _write(
            {"behind": node.name, "values": known}, self.folder / _PROGRESS
        )

    def _resumed(self) -> tuple[str, Mapping[str, Any]] | None:
        if self.folder is None:
            return None
        nodes = attention_nodes(self.program)
        for node in nodes:
            layer = int(call_arguments(node)["layer"])
            found = _read(self.folder / f"layer-{layer}.pt")
            if found is not None:
                self.found[layer] = found
        if len(self.found) == self.layers:
            return None
        state = _read(self.folder / _PROGRESS) or {"behind": ""}
        names = [node.name for node in nodes]
        done = names.index(state["behind"]) + 1 if state["behind"] in names else 0
        before = [int(call_arguments(node)["layer"]) for node in nodes[:done]]
        if not done or not all(layer in self.found for layer in before):
            self.found.clear()  # what is behind a gap cannot be measured without it
            return None
        self.found = {layer: self.found[layer] for layer in before}
        return state["behind"], state["values"]


def attention_weights(
    q_BSHD: Tensor,
    k_BSKD: Tensor,
    sinks_H: Tensor | None,
    scale: float,
    window: int,
    softcap: float,
) -> Iterator[tuple[int, Tensor]]:
    """(first row, weights [B, H, rows, T]) of causal attention in blocks of rows; `einfold::attention`
    says what each argument means."""
    batch, total, heads, _ = q_BSHD.shape
    keys_BHDT = k_BSKD.repeat_interleave(heads // k_BSKD.shape[2], dim=2).permute(0, 2, 3, 1)
    rows = max(1, _BLOCK // (batch * heads * total))
    column = torch.arange(total)
    for start in range(0, total, rows):
        q_BHSD = q_BSHD[:, start : start + rows].transpose(1, 2)
        logits = q_BHSD @ keys_BHDT * scale
        if softcap:
            logits = softcap * torch.tanh(logits / softcap)
        distance = torch.arange(start, start + q_BHSD.shape[2])[:, None] - column
        hidden = (distance < 0) | (distance >= window) if window else distance < 0
        logits = logits.masked_fill(hidden, float("-inf"))
        if sinks_H is not None:
            sink = sinks_H[None, :, None, None].expand(batch, -1, logits.shape[2], 1)
            logits = torch.cat((logits, sink), dim=-1)
        yield start, torch.softmax(logits, dim=-1)[..., :total]


def _weighted(weights_BHST: Tensor, v_BSKD: Tensor) -> Tensor:
    """The values by their weights, [B, rows, H, D]."""
    each = weights_BHST.shape[1] // v_BSKD.shape[2]
    values_BHTD = v_BSKD.repeat_interleave(each, dim=2).transpose(1, 2)
    return (weights_BHST @ values_BHTD).transpose(1, 2).contiguous()


def _write(value: Any, path: Path) -> bool:
    """Whether a value could be kept. A file says what it is of by the name of its folder, which tells model,
    graph and sample apart."""
    return write(path, lambda file: torch.save({"of": path.parent.name, "value": value}, file))


def _read(path: Path) -> dict[str, Any] | None:
    """The table that was kept; None where there is none, or it is damaged, or of something else."""
    raw = read(path, _LARGEST)
    if raw is None:
        return None
    try:
        data = torch.load(io.BytesIO(raw), weights_only=True)
        of, value = data["of"], data["value"]
    except Exception as error:  # of another version of torch, which raises many unrelated classes
        pass_on(error)
        return None
    return value if of == path.parent.name and isinstance(value, dict) else None
