"""`generate`: a plan, the types of its inputs and the sizes of its lanes to a kernel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from ....errors import UnsupportedError
from ...ir.cascade.cascade import Cascade
from ...ir.cascade.expr import reads
from ...ir.cascade.plan import Plan, State
from ...ir.cascade.plan_text import print_plan
from ...ir.cascade.printer import print_cascade
from .base_two import in_base_two
from .block import Function
from .emit import Emitter, Generated, helpers
from .kernel import Kernel
from .listed import Listed
from .memory import load
from .options import Options
from .pressure import Demand
from .reduce import reduce
from .roles import Division, divide
from .simplify import simplified
from .tiles import choose_tiles
from .values import REAL


def generate(
    plan: Plan,
    types: Mapping[str, str],
    sizes: Mapping[str, int],
    options: Options | None = None,
    cascade: Cascade | None = None,
    name: str = "fused",
    shared: Mapping[tuple[str, str], int] | None = None,
    walked: Sequence[str] = (),
    listed: Listed | None = None,
) -> Kernel:
    """The kernel of a plan.

    `types` gives the storage type of each input ("fp16", "bf16", "fp32", "i8", "i1", ..); `sizes` the
    size of each rank: those of lanes are built in, the others only guide the choice of tiles and may
    differ at a launch. `cascade`, where given, is printed beside the plan. `shared` says of an (input, rank)
    that so many neighbours along the rank share an element: the input's tensor is that much shorter there, as
    scales of groups and bytes of several codes are. `walked` names ranks that streamed sums run over: such a
    sum is made within each tile, a step of the rank at a time: the rank may be of any size, and what the sum
    gives is never in memory (keys that are products of features and a basis). `listed` says that only the
    coordinates of the stream which a table lists are walked (`listed.py`). Raises UnsupportedError where
    the plan has no form as a kernel, with the reason.
    """
    options = options or Options()
    shown = plan
    if options.static:
        plan = _uncorrected(plan.with_static_references())
    plan = simplified(plan)
    if options.base_two:
        plan = in_base_two(plan)
    if listed:
        plan = listed.added(plan)
    division = divide(plan, sizes, walked)
    if listed:
        listed.check(division.roles)
        types = {**types, listed.table: "i32", listed.count: "i32"}
    _check_shared(division, shared or {})
    types = {**types, **{item.name: _dot_type(division, types) for item in division.ahead}}
    for tensor in division.plan.inputs:
        if tensor not in types:
            raise UnsupportedError(f"the type of input {tensor} is not given")
    dot = _dot_type(division, types)
    functions: dict[str, Generated] = {}
    demand = Demand()
    for kind in ("whole", "part", "merge"):
        function = Function(
            division.plan,
            division.roles,
            types,
            sizes,
            dot,
            options.precision,
            load,
            reduce,
            dict(shared or {}),
            listed is not None,
        )
        emitter = Emitter(f"{name}_{kind}", division, function, options.lazy, listed)
        functions[kind] = getattr(emitter, kind)()
        if kind == "whole":
            demand = Demand(
                tuple(function.held.values()),
                frozenset(function.products),
                _scattered(division, sizes, shared or {}),
            )
    tiles = options.tiles or choose_tiles(division, types, sizes, demand, options.device)
    made = list(functions.values())
    text = "\n\n".join(
        part
        for part in [_header(shown, cascade, listed), helpers(made), *(item.text for item in made)]
        if part
    )
    return Kernel(
        plan,
        division,
        text,
        functions,
        dict(types),
        dict(sizes),
        options,
        tiles,
        dot,
        demand,
        dict(shared or {}),
    )


def _check_shared(division: Division, shared: Mapping[tuple[str, str], int]) -> None:
    """Neighbours share elements along the stream and lanes, of inputs that the kernel itself reads."""
    roles = division.roles
    ahead = {read.tensor for item in division.ahead for read in reads(item.expr)}
    for tensor, rank in shared:
        if (rank != roles.stream and rank not in roles.lanes) or tensor in ahead:
            raise UnsupportedError(f"{tensor} shares elements along {rank}, which has no form here")


def _scattered(
    division: Division, sizes: Mapping[str, int], shared: Mapping[tuple[str, str], int]
) -> frozenset[str]:
    """Inputs whose last rank is lanes of no multiple of 16, so that rows begin anywhere."""
    lanes = division.roles.lanes
    last = {n: t.ranks[-1] for n, t in division.plan.inputs.items() if t.ranks}
    return frozenset(
        name
        for name, rank in last.items()
        if rank in lanes and sizes[rank] % 16 and (name, rank) not in shared
    )


def _uncorrected(plan: Plan) -> Plan:
    """The plan without corrections under references that never move."""
    fixed = {r.name for r in plan.references if not r.source}
    steps = tuple(
        replace(step, correct=None)
        if isinstance(step, State) and step.references and set(step.references) <= fixed
        else step
        for step in plan.steps
    )
    return replace(plan, steps=steps)


def _header(plan: Plan, cascade: Cascade | None, listed: Listed | None) -> str:
    lines = ["Generated by einfold from the plan below; the plan is what to change."]
    if listed is not None:
        table, count = listed.table, listed.count
        lines.append(
            f"It walks pages of {listed.page} along {plan.rank}: the first {count} of {table}."
        )
    if cascade is not None:
        lines += ["", *print_cascade(cascade).split("\n")]
    lines += ["", *print_plan(plan).rstrip("\n").split("\n")]
    # Names come from artifacts: a line break of any kind must not end the comment.
    comment = "\n".join(f"# {' '.join(line.splitlines())}".rstrip() for line in lines)
    return f"{comment}\n\nimport triton\nimport triton.language as tl\n"


def _dot_type(division: Division, types: Mapping[str, str]) -> str:
    """The type of matrix products: that of the inputs that are matrices with lanes, the widest of them."""
    found = set()
    for name, tensor in division.plan.inputs.items():
        axes = division.roles.axes(tensor.ranks)
        if len(axes) > 1 and set(axes) & set(division.roles.lanes) and types.get(name) in REAL:
            found.add(types[name])
    if not found:
        wide = [n for n, t in division.plan.inputs.items() if len(t.ranks) > 1]
        found = {types[name] for name in wide if types.get(name) in REAL}
    return found.pop() if len(found) == 1 else "fp32"
