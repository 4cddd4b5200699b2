"""Plans as text, one part a line: what a kernel's comment shows and what the plan cache keeps.

einfold.plan 1 over t, passes 3 -> 1
rank t : T
input K[t, d]
stream QK[s, t] = Q[s, d] * K[t, d] :: sum(d)
state M[s] = QK[s, t] :: max(t)
reference M.ref[s] follows M scale free
state D[s] = exp(QK[s, t] - M.ref[s]) :: sum(t) under M.ref
correct D[s] = D.old[s] * exp(M.ref.old[s] - M.ref[s])
finish O[s, f] = O.0[s, f] / D[s]
output O
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

from ....errors import IRError
from .cascade import Statement, statement
from .parser import parse, parse_expr, parse_statement
from .plan import Plan, Reference, State, Step
from .printer import FORMAT as CASCADE
from .printer import print_expr, print_input, print_number, print_rank, print_statement

FORMAT = "einfold.plan 1"

_HEAD = re.compile(rf"{re.escape(FORMAT)} over (\w+), passes (\d+) -> (\d+)(, dead rows zero)?$")
_REFERENCE = re.compile(
    r"([\w.]+)\[([^\]]*)\] follows ([\w.]*) (scale|centre)"
    r"( free)?(?: static (\S+))?$"
)
_PARTS = ("before", "stream", "finish", "emit")


def print_plan(plan: Plan) -> str:
    """The plan as text."""
    return "\n".join(_lines(plan)) + "\n"


def _lines(plan: Plan) -> Iterator[str]:
    zero = ", dead rows zero" if plan.dead == "zero" else ""
    yield f"{FORMAT} over {plan.rank}, passes {plan.passes_before} -> {plan.passes}{zero}"
    yield from (print_rank(rank) for rank in plan.ranks.values())
    yield from (print_input(tensor) for tensor in plan.inputs.values())
    for item in plan.before:
        yield f"before {print_statement(item)}"
    for item in plan.stream:
        yield f"stream {print_statement(item)}"
    for step in plan.steps:
        yield from _step_lines(step)
    for item in plan.finish:
        yield f"finish {print_statement(item)}"
    for item in plan.emit:
        yield f"emit {print_statement(item)}"
    yield from (f"output {name}" for name in plan.outputs)


def _step_lines(step: Step) -> Iterator[str]:
    if isinstance(step, Statement):
        yield f"row {print_statement(step)}"
    elif isinstance(step, Reference):
        free = " free" if step.free else ""
        static = "" if step.static is None else f" static {print_number(step.static)}"
        ranks = ", ".join(step.ranks)
        yield f"reference {step.name}[{ranks}] follows {step.source} {step.kind}{free}{static}"
    else:
        under = f" under {', '.join(step.references)}" if step.references else ""
        body = statement(step.name, step.ranks, step.body, step.op, step.over)
        yield f"state {print_statement(body)}{under}"
        if step.correct is not None:
            yield f"correct {step.name} = {print_expr(step.correct)}"


def parse_plan(text: str) -> Plan:
    """The plan that `text` prints. Raises IRError with the line for anything that does not read."""
    lines = text.splitlines()
    head = _HEAD.match(lines[0]) if lines else None
    if head is None:
        raise IRError(f"not a plan in the form {FORMAT!r}: the first line is {lines[:1]}")
    declared = [line for line in lines[1:] if line.split(" ", 1)[0] in ("rank", "input", "output")]
    cascade = parse("\n".join([CASCADE, *declared]))
    parts: dict[str, list[Statement]] = {name: [] for name in _PARTS}
    steps: list[Step] = []
    for number, line in enumerate(lines[1:], start=2):
        word, _, rest = line.partition(" ")
        try:
            if word in parts:
                parts[word].append(parse_statement(rest))
            elif word == "correct":
                _add_correction(steps, rest)
            elif word in ("state", "row", "reference"):
                steps.append(_parse_step(word, rest))
            elif word not in ("rank", "input", "output"):
                raise IRError(f"expected a part of a plan, found {line!r}")
        except IRError as error:
            raise IRError(f"line {number}: {error}") from error
    before, stream, finish, emit = (tuple(parts[name]) for name in _PARTS)
    return Plan(
        head[1],
        cascade.ranks,
        cascade.inputs,
        before,
        stream,
        tuple(steps),
        finish,
        emit,
        cascade.outputs,
        int(head[2]),
        int(head[3]),
        "zero" if head[4] else "as written",
    )


def _parse_step(word: str, rest: str) -> Step:
    if word == "row":
        return parse_statement(rest)
    if word == "state":
        written, _, under = rest.partition(" under ")
        item = parse_statement(written)
        if item.op is None:
            raise IRError("a state needs a reduction")
        references = tuple(name.strip() for name in under.split(",") if name.strip())
        return State(item.name, item.ranks, item.op, item.over, item.expr, None, references)
    found = _REFERENCE.match(rest)
    if found is None:
        raise IRError(f"{rest!r} is no reference")
    name, ranks, source, kind, free, static = found.groups()
    return Reference(
        name,
        _names(ranks),
        source,
        kind,
        bool(free),
        None if static is None else float(static),
    )


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _add_correction(steps: list[Step], rest: str) -> None:
    name, _, expr = rest.partition(" = ")
    last = steps[-1] if steps else None
    if not isinstance(last, State) or last.name != name:
        raise IRError(f"the correction of {name} must follow its state")
    steps[-1] = replace(last, correct=parse_expr(expr))
