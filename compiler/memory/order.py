"""The order of a program's calls that holds the fewest bytes at once."""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field
from itertools import count

from torch import fx

from ..ir.program import Program
from .sharing import whole
from .survey import Survey

#: States that the exact search may look at, and those that the beam behind it keeps of each length.
STATES, BEAM = 2000, 4


@dataclass
class _Call:
    """One call, its neighbours by their numbers."""

    before: int = 0
    """The calls that must run before it, a bit each."""
    after: list[int] = field(default_factory=list)
    reads: list[int] = field(default_factory=list)
    """Storages."""
    writes: list[int] = field(default_factory=list)
    over: list[list[int]] = field(default_factory=list)
    """For each result, storages of its size that it may be written over where this is their last reader."""


@dataclass(frozen=True)
class State:
    """Some calls that have run."""

    ran: int
    ready: tuple[int, ...]
    live: int
    peak: int
    last: int = -1
    came: State | None = None

    def order(self) -> list[int]:
        """The calls as they ran, by their numbers."""
        found, at = [], self
        while at.came is not None:
            found.append(at.last)
            at = at.came
        return found[::-1]


@dataclass(frozen=True)
class Order:
    """The calls in the order found."""

    nodes: tuple[fx.Node, ...]
    proved: bool
    """Whether no order holds fewer bytes, as the search counts them."""


def best_order(program: Program, found: Survey) -> Order:
    """An order with the smallest peak, by a survey of the program with nothing written in place.

    Storages count from the call that makes them to the last that reads them. States are the sets of calls
    that have run, and the one of the lowest peak goes on: the first that has run all is of the smallest peak.
    A call that asks for no memory and leaves no more than there was runs at once, which spoils no order.
    Where that takes too many states, a beam goes on from the start.
    """
    nodes = [node for node in program.graph.nodes if node.op == "call_function"]
    search = Search(nodes, program.output, found)
    state = search.exact(STATES)
    proved = state is not None
    if state is None:
        state = search.beam(BEAM)
    return Order(tuple(nodes[at] for at in state.order()), proved)


class Search:
    """The calls of a program, and states of them."""

    def __init__(self, nodes: list[fx.Node], output: fx.Node, found: Survey) -> None:
        at = {node: index for index, node in enumerate(nodes)}
        names = {storage: index for index, storage in enumerate(found.made)}
        made = [*found.made.values()]
        self.sizes = [each.size for each in made]
        #: The readers of each storage, a bit each; one that the output reads has a reader that never runs.
        never = 1 << len(nodes)
        self.readers = [
            sum(never if node is output else 1 << at[node] for node in each.readers)
            for each in made
        ]
        self.calls = [_Call() for _ in nodes]
        for node, call in zip(nodes, self.calls, strict=True):
            for source in node.all_input_nodes:
                if source in at:
                    call.before |= 1 << at[source]
                    self.calls[at[source]].after.append(at[node])
            call.reads = [names[each] for each in found.reads(node)]
            call.writes = [names[each] for each in found.wrote(node)]
            call.over = [[names[old] for old in olds] for olds in whole(node, found)]
        self.all = (1 << len(nodes)) - 1

    def first(self) -> State:
        """Nothing has run."""
        return State(0, tuple(at for at, call in enumerate(self.calls) if not call.before), 0, 0)

    def exact(self, states: int) -> State | None:
        """The state in which all has run, of the smallest peak; None where that takes more states."""
        number = count()
        start = self._settle(self.first())
        heap = [(start.peak, -start.ran.bit_count(), next(number), start)]
        lowest = {start.ran: start.peak}
        while heap:
            state = heapq.heappop(heap)[-1]
            if state.ran == self.all:
                return state
            for after in self._after(state):
                if after.peak >= lowest.get(after.ran, after.peak + 1):
                    continue
                if len(lowest) > states:
                    return None
                lowest[after.ran] = after.peak
                heapq.heappush(heap, (after.peak, -after.ran.bit_count(), next(number), after))
        raise AssertionError("a program's calls can be run in some order")

    def beam(self, width: int) -> State:
        """The same, where only a few states of each length go on."""
        states = [self._settle(self.first())]
        while any(state.ran != self.all for state in states):
            found: dict[int, State] = {}
            for state in states:
                for after in self._after(state) if state.ran != self.all else [state]:
                    other = found.get(after.ran)
                    if other is None or after.peak < other.peak:
                        found[after.ran] = after
            states = sorted(found.values(), key=lambda s: (s.peak, s.live))[:width]
        return states[0]

    def _after(self, state: State) -> list[State]:
        return [self._settle(self.run(state, at)) for at in state.ready]

    def _settle(self, state: State) -> State:
        """Runs what asks for no memory and leaves no more than there was."""
        going = True
        while going:
            going = False
            for at in state.ready:
                after = self.run(state, at)
                if after.peak == state.peak and after.live <= state.live:
                    state, going = after, True
                    break
        return state

    def run(self, state: State, at: int) -> State:
        """Runs one call that is ready."""
        call, sizes = self.calls[at], self.sizes
        ran = state.ran | 1 << at
        new = sum(sizes[each] for each in call.writes)
        dead = [each for each in call.reads if not self.readers[each] & ~ran]
        over: set[int] = set()
        for olds in call.over:
            over.update([each for each in olds if each in dead and each not in over][:1])
        unread = sum(sizes[each] for each in call.writes if not self.readers[each])
        live = state.live + new
        ready = [each for each in state.ready if each != at]
        ready += [each for each in dict.fromkeys(call.after) if not self.calls[each].before & ~ran]
        return State(
            ran,
            tuple(ready),
            live - unread - sum(sizes[each] for each in dead),
            max(state.peak, live - sum(sizes[each] for each in over)),
            at,
            state,
        )
