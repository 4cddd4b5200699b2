"""How large keys and values get, by layer, KV head and channel."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ....errors import CalibrationError, IRError
from ...ir.interpreter import Interpreter
from ...ir.ops import einfold_ops
from ...ir.program import Program, attention_nodes, call_arguments, remove_dead_nodes
from ..snapshot import snapshot, text_inputs

#: Smallest scale: a channel that is zero throughout is stored as zeros.
_SMALLEST = 1e-8


class KVRanges:
    """Largest magnitudes of keys and values on a text; scales that follow from them.

    Holds the graph as it is when this is made, cut behind the last keys and values: later passes may
    round the weights, and the ranges are of the model as it was. Weights are loaded one at a time.
    """

    def __init__(self, program: Program) -> None:
        self._program: Program | None = _ranges_of(program)
        self._found: dict[str, Tensor] = {}

    def run(self, tokens_BS: Tensor) -> None:
        """Reads the text once. Raises CalibrationError where keys or values are not finite."""
        assert self._program is not None
        self._found = Interpreter(self._program, keep_weights=False).run(text_inputs(tokens_BS))
        self._program = None  # lets go of the weights
        for name, range_KD in self._found.items():
            if not bool(torch.isfinite(range_KD).all()):
                layer, part = name.split(".")
                raise CalibrationError(
                    f"the {part}s of layer {layer} are not finite on the calibration text: "
                    "the model's weights are damaged, or overflow in float32"
                )

    def scale(self, layer: int, part: str, heads: Sequence[int]) -> Callable[[], Tensor]:
        """Gives the int8 scales [heads, size] of one cache once the text was read."""

        def load() -> Tensor:
            if not self._found:
                raise IRError("the scales of the cache were asked for before calibration")
            range_KD = self._found[f"{layer}.{part}"][list(heads)]
            return (range_KD / 127).clamp(min=_SMALLEST)

        return load


def _ranges_of(program: Program) -> Program:
    """A program that gives `LAYER.key` and `LAYER.value`, each [K, D], for every attention layer."""
    cut, copies = snapshot(program)
    values, names = [], []
    for node in attention_nodes(program):
        found = call_arguments(node)
        key, value = copies[found["k_BSKD"]], copies[found["v_BSKD"]]
        turned = key.target is einfold_ops.rotary.default
        arguments = (key.args[0], *key.args[2:]) if turned else (key, None, None, False)
        values += [
            cut.graph.call_function(key_range, arguments),
            cut.graph.call_function(value_range, (value,)),
        ]
        names += [f"{found['layer']}.key", f"{found['layer']}.value"]
    cut.graph.output(tuple(values)).meta["names"] = names
    remove_dead_nodes(cut)
    return cut


def value_range(v_BSKD: Tensor) -> Tensor:
    """Largest magnitude of each channel of each head, [K, D]."""
    return v_BSKD.abs().amax(dim=(0, 1))


def key_range(
    k_BSKD: Tensor, cos_PR: Tensor | None, sin_PR: Tensor | None, interleaved: bool
) -> Tensor:
    """Largest magnitude that each channel takes when these keys are turned to any position, [K, D].

    A rotation keeps the length of a pair of channels, so the pair's length bounds both at every position;
    tables that also stretch (YaRN) are counted in.
    """
    if cos_PR is None or sin_PR is None:
        return value_range(k_BSKD)
    width = 2 * cos_PR.shape[1]
    turned, rest = k_BSKD[..., :width], k_BSKD[..., width:]
    shape = (-1, 2) if interleaved else (2, -1)
    axis = -1 if interleaved else -2
    stretch = (cos_PR.square() + sin_PR.square()).amax(0).sqrt()
    pairs = turned.unflatten(-1, shape).norm(dim=axis).amax(dim=(0, 1)) * stretch
    both = pairs.repeat_interleave(2, -1) if interleaved else torch.cat((pairs, pairs), -1)
    return torch.cat((both, value_range(rest)), dim=-1)
