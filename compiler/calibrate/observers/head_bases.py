"""Bases of each KV head's keys and values, of which any number of first directions serves.

Each layer's are trained while the text passes it (`orthogonal.py`), and what was found at a layer is kept
like any statistic: a run that was interrupted goes on behind the last layer that is there, to the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx

from ....errors import CalibrationError
from ...ir.program import Program, attention_nodes, call_arguments
from ..observer import OBSERVERS, Found, Observer
from ..orthogonal import DRAWN, JUDGED, Heads, trained
from ..sites import Site, attention, layer

#: Tokens of a row at most.
_ROW = 1024


def site_of(number: int) -> str:
    """The name of an attention layer's site."""
    return f"{layer(number)}.bases"


@OBSERVERS.register
@dataclass
class HeadBases(Observer):
    """What `orthogonal.trained` finds of each layer. `outputs` are the layers, each with the name of the
    weight [M, H * E] that reads its heads, where that is known: what is lacking is then counted behind it."""

    outputs: Mapping[int, str | None] = field(default_factory=dict)
    steps: int = 150
    tokens: int = 4096
    drawn: tuple[int, ...] = DRAWN

    name = "head_bases"

    @property
    def key(self) -> str:
        """Layers are told by their sites, and so by the graph."""
        parts = "" if self.drawn == DRAWN else "-" + "".join(map(str, self.drawn))
        return f"{self.name}-{self.steps}-{self.tokens}{parts}"

    def reading(self, tokens_BS: Tensor, context: int) -> Tensor:
        flat = tokens_BS.flatten()[: self.tokens]
        length = min(_ROW, context, len(flat))
        if length < 2 * JUDGED:
            raise CalibrationError(
                f"bases of heads are trained on rows of {2 * JUDGED} tokens or more, but the calibration "
                f"text has {len(flat)} and the context is {context}: give a longer text, or compile for a "
                "longer context"
            )
        rows = len(flat) // length
        return flat[: rows * length].reshape(rows, length)

    def sites(self, program: Program) -> list[Site]:
        found = []
        for node, shown in zip(attention_nodes(program), attention(program), strict=True):
            given = call_arguments(node)
            number = int(given["layer"])
            if number in self.outputs:
                read = _read(program, self.outputs[number])
                form = (float(given["scale"]), int(given["window"]), float(given["softcap"]))
                more = (number, given["sinks_H"], read, *form)
                found.append(Site(site_of(number), shown.values, more))
        return found

    def see(self, site: Site, *values: Any) -> Found:
        q_BSHD, k_BSKD, v_BSKE, number, sinks_H, output_MN, scale, window, softcap = values
        q_BSHD, k_BSKD, v_BSKE = (x.float() for x in (q_BSHD, k_BSKD, v_BSKE))
        sinks_H, output_MN = (x if x is None else x.float() for x in (sinks_H, output_MN))
        heads = Heads(q_BSHD, k_BSKD, v_BSKE, scale, window, softcap, sinks_H, output_MN)
        return trained(heads, self.steps, number, self.drawn)


def _read(program: Program, name: str | None) -> fx.Node | None:
    """The first call that reads a weight."""
    reads = program.graph.find_nodes(op="get_attr")
    return next((node for node in reads if node.target == name), None)
