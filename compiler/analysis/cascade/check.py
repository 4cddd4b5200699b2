"""Checks that a plan means what its cascade means; a wrong fold does not get past them.

By algebra, state by state: a correction turns the state under old references into the state under new
ones, is linear in what it corrects, and correcting twice is correcting once (the cocycle that makes
`merge` associative). By numbers, as a whole: random inputs, random tiles in sequence and as a tree,
lazy and static references, against the cascade itself in float64.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import sympy as sp

from ....errors import IRError
from ...ir.cascade.cascade import Cascade
from ...ir.cascade.evaluate import Array, evaluate, frame_of
from ...ir.cascade.expr import Apply, Const, Expr, Ref, walk
from ...ir.cascade.plan import OLD, Plan, State
from ...ir.cascade.run_plan import Runner, random_tiles
from .symbolic import Translator, is_zero

#: Float64 against float64, through tilings and a tree: what a correct plan may differ by.
TOLERANCE = 1e-8


class WrongFoldError(IRError):
    """A derived plan does not mean what its cascade means: a fault of the derivation."""


def check_corrections(plan: Plan) -> None:
    """Raises WrongFoldError, naming the state, where a correction is missing or wrong."""
    states = {state.name: state for state in plan.states}
    for state in plan.states:
        moving = [name for name in state.references if _reads(state.body, name)]
        if state.correct is None:
            if moving:
                raise WrongFoldError(
                    f"state {state.name} moves with {', '.join(moving)}, uncorrected"
                )
            continue
        if state.op != "sum":
            raise WrongFoldError(f"state {state.name}: a correction of a {state.op} is not known")
        _check_correction(state, states)


def _check_correction(state: State, states: Mapping[str, State]) -> None:
    assert state.correct is not None
    translator = Translator()
    times = {moment: _at(translator, states, moment) for moment in ("", "'", "''")}
    first = _corrected(translator, state, states, times[""], "", "'")
    if not is_zero(first - times["'"][state.name]):
        raise WrongFoldError(
            f"state {state.name}: the correction does not carry it to new references"
        )
    family = _family(state)
    free = {name: sp.Symbol(f"s_{k}") for k, name in enumerate(sorted(family))}
    once = _corrected(translator, state, states, free, "", "''")
    if not _is_linear(once, list(free.values())):
        raise WrongFoldError(
            f"state {state.name}: the correction is not linear in what it corrects"
        )
    # A state without a correction of its own is the same under every reference.
    halfway = {
        name: _corrected(translator, states[name], states, free, "", "'")
        if states[name].correct is not None
        else free[name]
        for name in family
    }
    twice = _corrected(translator, state, states, halfway, "'", "''")
    if not is_zero(once - twice):
        raise WrongFoldError(f"state {state.name}: correcting twice differs from correcting once")


def _family(state: State) -> set[str]:
    """The states that a correction reads."""
    assert state.correct is not None
    reads = {p.tensor for p in walk(state.correct) if isinstance(p, Ref)}
    references = {name + OLD for name in state.references}
    return {n.removesuffix(OLD) for n in reads - references if n.endswith(OLD)} | {state.name}


def _at(translator: Translator, states: Mapping[str, State], moment: str) -> dict[str, Any]:
    """Every body at one streamed point, with the references of a moment."""
    found = {}
    for name, state in states.items():
        names = {ref: translator.atom(ref + moment) for ref in state.references}
        translator.values = dict(names)
        found[name] = translator.expr(state.body)
    translator.values = {}
    return found


def _corrected(
    translator: Translator,
    state: State,
    states: Mapping[str, State],
    old: Mapping[str, Any],
    before: str,
    after: str,
) -> Any:
    assert state.correct is not None
    values = {name + OLD: value for name, value in old.items() if name not in state.references}
    references = {ref for s in states.values() for ref in s.references}
    values |= {ref + OLD: translator.atom(ref + before) for ref in references}
    values |= {ref: translator.atom(ref + after) for ref in references}
    translator.values = values
    found = translator.expr(state.correct)
    translator.values = {}
    return found


def _is_linear(value: Any, symbols: list[sp.Symbol]) -> bool:
    expanded = sp.expand(value)
    rest = expanded
    for symbol in symbols:
        rest = rest - symbol * sp.diff(expanded, symbol)
        if any(not is_zero(sp.diff(expanded, symbol, other)) for other in symbols):
            return False
    return is_zero(rest)


def _reads(expr: Expr, name: str) -> bool:
    return any(isinstance(part, Ref) and part.tensor == name for part in walk(expr))


def check_numbers(cascade: Cascade, plans: tuple[Plan, ...], seed: int = 0) -> None:
    """Raises WrongFoldError where plans, run one after the other, differ from their cascade."""
    random = np.random.default_rng(seed)
    arrays = random_inputs(cascade, random)
    expected = evaluate(cascade, arrays)
    for way in ("sequence", "tree", "lazy", "static"):
        found = run_plans(plans, arrays, random, way, frame_of(cascade, arrays).sizes)
        for name in cascade.outputs:
            _compare(name, expected[name], found[name], way)
    if not dead_rows_agree(cascade, plans, seed):
        raise WrongFoldError("rows without a live key differ from the cascade")


def dead_rows_agree(cascade: Cascade, plans: tuple[Plan, ...], seed: int = 0) -> bool:
    """Whether plans give what the cascade gives when all that stands under a stabilised exp is -inf."""
    names = set().union(*(_under_exp(plan) for plan in plans))
    statements = tuple(
        replace(s, expr=Const(float("-inf")), op=None, over=()) if s.name in names else s
        for s in cascade.statements
    )
    dead = replace(cascade, statements=statements)
    random = np.random.default_rng(seed)
    arrays = random_inputs(cascade, random)
    expected = evaluate(dead, arrays)
    killed = tuple(
        replace(plan, stream=tuple(dead.of(item.name) or item for item in plan.stream))
        for plan in plans
    )
    found = run_plans(killed, arrays, random, "sequence", frame_of(cascade, arrays).sizes)
    try:
        for name in cascade.outputs:
            _compare(name, expected[name], found[name], "dead rows")
    except WrongFoldError:
        return False
    return True


def _compare(name: str, expected: Array, found: Array, how: str) -> None:
    scale = 1 + np.max(np.abs(expected), where=np.isfinite(expected), initial=0)
    if not np.allclose(found, expected, rtol=TOLERANCE, atol=TOLERANCE * scale, equal_nan=True):
        raise WrongFoldError(f"output {name} differs from the cascade ({how})")


def run_plans(
    plans: tuple[Plan, ...],
    arrays: Mapping[str, Array],
    random: np.random.Generator,
    way: str = "sequence",
    sizes: Mapping[str, int] | None = None,
) -> dict[str, Array]:
    """The outputs of plans run in order, each over random tiles. `way`: sequence, tree, lazy or static."""
    values = dict(arrays)
    for plan in plans:
        inputs = {name: values[name] for name in plan.inputs}
        runner = Runner.of(plan, inputs, 1.0 if way == "lazy" else None, way == "static", sizes)
        tiles = random_tiles(runner.length, random)
        found = (
            runner.as_tree(tiles, random) if way in ("tree", "lazy") else runner.in_sequence(tiles)
        )
        values |= found
    return values


def random_inputs(cascade: Cascade, random: np.random.Generator, most: int = 5) -> dict[str, Array]:
    """Small inputs of the right kinds: 2 to `most` coordinates a rank."""
    sizes = {
        rank.extent: int(rank.extent)
        if rank.extent.isdigit()
        else int(random.integers(2, most + 1))
        for rank in cascade.ranks.values()
    }
    found: dict[str, Array] = {}
    for tensor in cascade.inputs.values():
        shape = [sizes[cascade.ranks[rank].extent] for rank in tensor.ranks]
        if tensor.kind == "bool":
            found[tensor.name] = random.random(shape) < 0.7
        elif tensor.kind == "integer":
            found[tensor.name] = random.integers(0, 4, shape)
        else:
            found[tensor.name] = random.normal(size=shape)
    return found


def _under_exp(plan: Plan) -> set[str]:
    """The streamed tensors that stand under exp with a reference."""
    found: set[str] = set()
    for state in plan.states:
        for part in walk(state.body):
            if isinstance(part, Apply) and part.op == "exp" and _reads_any(part, state.references):
                found |= {p.tensor for p in walk(part) if isinstance(p, Ref)}
    return found & {item.name for item in plan.stream}


def _reads_any(expr: Expr, names: tuple[str, ...]) -> bool:
    return any(_reads(expr, name) for name in names)
