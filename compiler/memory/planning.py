"""The memory plan of a program at given sizes: what is written in place, and where in one arena all lies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

from torch import Tensor, fx

from ..ir.program import Program
from .buffers import Buffer, peak_bytes
from .joining import join
from .packing import Plan, pack
from .sharing import Sharing, given_back, share
from .survey import Joining, Survey, survey

#: Seconds of the processor that a plan's packing may take. First fit has mostly reached the bound by then.
SECONDS = 0.2

#: Bytes that each buffer's place and size are a multiple of: a cache line, and a vector of any processor.
LINE = 64


@dataclass(frozen=True)
class MemoryPlan:
    """Where a program's intermediate values lie, in the order of its graph."""

    survey: Survey
    """The run with results in place and in their part of a whole: their shapes, strides and storages."""
    sharing: Sharing
    joining: Joining
    buffers: tuple[Buffer, ...]
    """One for each storage; steps are the places of the calls."""
    packed: Plan
    offsets: Mapping[int, int]
    """Where each storage lies in the arena, by its number."""

    @cached_property
    def steps(self) -> dict[fx.Node, int]:
        """The place of each call."""
        nodes = [node for node in self.survey.values if node.op == "call_function"]
        return {node: at for at, node in enumerate(nodes)}

    @cached_property
    def live(self) -> list[int]:
        """The bytes that are live while each call runs."""
        changes = [0] * (len(self.steps) + 2)
        for each in self.buffers:
            changes[each.start] += each.size
            changes[each.end] -= each.size
        return list(accumulate(changes))[: len(self.steps)]

    @property
    def arena(self) -> int:
        """Bytes of the arena."""
        return self.packed.arena

    @property
    def bound(self) -> int:
        """The most live bytes of any step."""
        return self.packed.bound

    def data(self, step: str) -> dict[str, Any]:
        """The plan of a step as plain data: of each buffer its name, when it lives, its place, its size."""
        rows = zip(self.survey.made.values(), self.buffers, self.packed.offsets, strict=True)
        return {
            "step": step,
            "arena": self.arena,
            "bound": self.bound,
            "calls": max((buffer.end for buffer in self.buffers), default=1),
            "buffers": [
                [made.node.name, buffer.start, buffer.end, offset, buffer.size]
                for made, buffer, offset in rows
            ],
        }


def plan_memory(
    program: Program, inputs: Mapping[str, Tensor], in_place: bool = True
) -> MemoryPlan:
    """Plans for inputs of these shapes, calls in the graph's order. Without `in_place` every result that is
    no view is a new buffer."""
    calls = [node for node in program.graph.nodes if node.op == "call_function"]
    found, sharing, joining = survey(program, inputs), Sharing(), Joining()
    buffers = buffers_of(calls, found)
    if in_place:
        most = share(calls, found)
        ways = [most, given_back(most, calls, found)]
        tried = [
            _joined(program, inputs, calls, each)
            for at, each in enumerate(ways)
            if each not in ways[:at]
        ]
        found, sharing, joining, buffers = min(tried, key=lambda way: peak_bytes(way[-1]))
    packed = pack(buffers, seconds=SECONDS)
    offsets = dict(zip(found.made, packed.offsets, strict=True))
    return MemoryPlan(found, sharing, joining, tuple(buffers), packed, offsets)


def _joined(
    program: Program, inputs: Mapping[str, Tensor], calls: list[fx.Node], sharing: Sharing
) -> tuple[Survey, Sharing, Joining, list[Buffer]]:
    """The run with results in place, and in their part of a whole, and its buffers."""
    found = survey(program, inputs, sharing.in_place)
    joining = join(calls, found)
    if joining.whole:
        found = survey(program, inputs, sharing.in_place, joining)
    return found, sharing, joining, buffers_of(calls, found)


def buffers_of(calls: Sequence[fx.Node], found: Survey) -> list[Buffer]:
    """The buffers of a survey: each lives from the call that makes it through the last that reads it.

    What the output reads lives to the end.
    """
    step = {node: index for index, node in enumerate(calls)}
    return [
        Buffer(
            step[made.node],
            1 + max([step[made.node], *(step.get(reader, len(calls)) for reader in made.readers)]),
            -(-made.size // LINE) * LINE,
        )
        for made in found.made.values()
    ]
