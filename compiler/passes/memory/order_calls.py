"""order_calls: fewer intermediate values live at once, and what is written in place told."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, fx

from ...ir.program import Program, op_name
from ...memory.order import best_order
from ...memory.planning import MemoryPlan, plan_memory
from ...memory.survey import Survey, inputs_at, step_dims
from ..base import Note, Pass, PassResult, place_of


@dataclass(frozen=True)
class OrderCalls(Pass):
    """Puts calls into the order that holds the fewest bytes at once, in a step of `tokens` new tokens.

    Before: `%a = wide(%x); %b = wide(%x); %c = narrow(%a); %d = narrow(%b)`
    After:  `%a = wide(%x); %c = narrow(%a); %b = wide(%x); %d = narrow(%b)`

    Where the graph's own order holds no more, it stays. The notes say which results can be written in the
    memory of an argument, and, by operator, why others cannot; whoever plans the target's memory does so.
    """

    name = "order_calls"

    tokens: int = 512

    def run(self, program: Program) -> PassResult:
        result = PassResult()
        new = min(self.tokens, program.model.context or self.tokens)
        inputs = inputs_at(program, step_dims(program, 1, new))
        apart = plan_memory(program, inputs, in_place=False)
        plan = _reorder(program, inputs, apart.survey, result)
        result.notes += _notes(plan, f"{new} new tokens", apart.arena)
        return result


def _reorder(
    program: Program, inputs: Mapping[str, Tensor], found: Survey, result: PassResult
) -> MemoryPlan:
    """Puts the calls into a better order, where there is one; gives the plan of the order that stays."""
    own = tuple(node for node in program.graph.nodes if node.op == "call_function")
    before, order = plan_memory(program, inputs), best_order(program, found)
    arrange(program, order.nodes)
    if order.nodes == own:
        return before
    after = plan_memory(program, inputs)
    if after.arena < before.arena:
        how = "no order holds less" if order.proved else "the best that a beam found"
        result.applied(
            "graph", f"calls reordered: {before.arena:,} to {after.arena:,} bytes, {how}"
        )
        return after
    arrange(program, own)
    return before


def arrange(program: Program, calls: Sequence[fx.Node]) -> None:
    """Puts the calls into this order; inputs and reads of weights stand before them, as they did."""
    for node in calls:
        program.output.prepend(node)


def _notes(plan: MemoryPlan, step: str, apart: int) -> list[Note]:
    """A note for the arena, for each result in place, and for each reason why others are not."""
    bound = "the peak of live bytes" if plan.arena == plan.bound else f"the peak is {plan.bound:,}"
    total = f"{plan.arena:,} bytes of intermediate values for {step}, {bound}"
    notes = [Note("applied", "arena", f"{total}; {apart:,} with nothing in place")]
    for (node, _), argument in plan.sharing.in_place.items():
        said = f"{op_name(node.target)} may write over %{argument.name}"
        notes.append(Note("applied", place_of(node), said))
    reasons = Counter(
        (op_name(node.target), *sorted(set(why))) for (node, _), why in plan.sharing.refused.items()
    )
    for (name, *why), count in reasons.items():
        results = (
            f"{count} result{'s' * (count > 1)} in memory of {'their' if count > 1 else 'its'} own"
        )
        notes.append(Note("skipped", name, f"{results}: an argument {' or '.join(why)}"))
    return notes
