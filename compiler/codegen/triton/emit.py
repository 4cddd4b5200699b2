"""Source of kernels: one pass over the stream, the same for a part of it, and the merge of parts.

whole   start, tiles, finish, outputs
part    start, the tiles of one part, the states as they are then
merge   start, the parts' states one after another, finish, outputs
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from ...ir.cascade.cascade import Statement
from ...ir.cascade.plan import Reference, State, Step, step_reads
from .block import Block, Function
from .gates import Bound, bounds, hiding_place
from .listed import Listed
from .memory import masks, shape, store
from .places import places, stretch
from .reduce import reduce
from .roles import ROW, STREAM, Division
from .steps import Values, Walk, carried, starting
from .values import Value, number, operate

_HELPERS = {
    "floordiv": "@triton.jit\ndef _floor_div(a, b):\n"
    "    return a // b - tl.where((a % b != 0) & ((a < 0) != (b < 0)), 1, 0)\n",
    "mod": "@triton.jit\ndef _floor_mod(a, b):\n"
    "    return a % b + tl.where((a % b != 0) & ((a < 0) != (b < 0)), b, 0)\n",
}


@dataclass(frozen=True)
class Argument:
    """An argument of a generated function: what it stands for, and its name.

    `kind` is "input", "output", "part", "extent", "stride" or "skip"; `of` the tensor or rank, `rank`
    the rank of a stride.
    """

    name: str
    kind: str
    of: str
    rank: str = ""


@dataclass(frozen=True)
class Generated:
    """One function: its name, text and arguments. `parts` names the states that it leaves or reads."""

    name: str
    text: str
    arguments: tuple[Argument, ...]
    helpers: frozenset[str]
    bounds: tuple[Bound, ...] = ()


class Emitter:
    """Emits one function of a division."""

    def __init__(
        self,
        name: str,
        division: Division,
        kernel: Function,
        lazy: float | None,
        listed: Listed | None = None,
    ) -> None:
        self.name, self.division, self.kernel, self.lazy = name, division, kernel, lazy
        self.listed = listed
        self.plan, self.roles = division.plan, division.roles
        self.head = Block(kernel)
        self.loop = Block(kernel, self.head, self.roles.stream)
        self.tail = Block(kernel)
        self.carried = carried(self.plan, lazy is not None)
        for step in self.carried:
            if not isinstance(step, State):
                kernel.held[step.name] = (self.roles.axes(step.ranks), 1)
        self.hidden = hiding_place(self.plan)
        self.bounds = [] if listed else bounds(self.plan)
        self.outputs: list[str] = []
        self.parts: list[str] = []
        self.walked: list[str] = []
        self.asks = False

    def whole(self) -> Generated:
        """One pass: everything from inputs to outputs."""
        self._stretch(False)
        self._tiles()
        self._finish()
        return self._assembled("whole", ["ROWS", "STREAM"])

    def part(self) -> Generated:
        """The states of one part of the stream."""
        self._stretch(True)
        self._tiles()
        for step in self.carried:
            self._part_access(step, self.tail, self._variable(step))
        return self._assembled("part", ["PARTS", "ROWS", "STREAM"])

    def _stretch(self, split: bool) -> None:
        """What of the stream a program walks."""
        self.walked = self.listed.coordinates(self.head) if self.listed else []
        end = self.listed.end(self.head) if self.listed else ""
        self.asks = stretch(self.head, self.bounds, split, end)

    def merge(self) -> Generated:
        """The outputs, from the states of all parts."""
        old: Values = {}
        part: Values = {}
        for step in self.carried:
            part[step.name] = self._part_access(step, self.loop, None)
            old[step.name] = self._variable(step)
        new = Walk(self.loop, [old, part], False, self.lazy, frozenset()).run()
        self._advance(new)
        self._finish()
        return self._assembled("merge", ["PARTS", "ROWS"])

    def _variable(self, step: Step) -> Value:
        name = self.kernel.variable(step.name)
        return Value(name, self.roles.axes(step.ranks), "fp32", True)

    def _tiles(self) -> None:
        """The body of the loop: the streamed statements, the steps, and the new values for the old."""
        loop = self.loop
        for rank, items in itertools.groupby(self.plan.stream, self.roles.walk):
            for item, value in self._walk(rank, list(items)) if rank else self._streamed(items):
                if item.name == self.hidden:
                    live = Value("live_t", (STREAM,), "i1", True)
                    value = operate(
                        "where", [live, value, number(float("-inf"))], self.kernel.order
                    )
                if value.type != "i1":
                    value = value.cast("fp32")
                named = value.text.isidentifier() and bool(rank)
                loop.bound[item.name] = value if named else loop.keep(item.name, value)
        masked = frozenset() if self.hidden else frozenset(s.name for s in self.plan.states)
        old = {step.name: self._variable(step) for step in self.carried}
        self._advance(Walk(loop, [old], True, self.lazy, masked).run())

    def _streamed(self, items: Iterable[Statement]) -> Iterator[tuple[Statement, Value]]:
        """Streamed statements, computed on the tile at once."""
        for item in items:
            if item.op is None:
                yield item, self.loop.value(item.expr)
            else:
                yield item, reduce(self.loop, item.op, item.expr, self.roles.axes(item.over))

    def _walk(self, rank: str, items: Sequence[Statement]) -> Iterator[tuple[Statement, Value]]:
        """Sums over a walked rank, a step of it at a time, in one loop within the tile."""
        kernel, loop = self.kernel, self.loop
        walk = Block(kernel, loop, rank)
        totals = []
        for item in items:
            axes = self.roles.axes(item.ranks)
            zeros = f"tl.full({shape(kernel, axes)}, 0.0, tl.float32)"
            total = loop.keep(item.name, Value(zeros, axes, "fp32", 1))
            new = reduce(walk, "sum", item.expr, (rank,), onto=total)
            walk.put(f"{total.text} = {new.text}")
            totals.append(total)
        step, place = kernel.padded(rank), kernel.names.fresh(f"from_{rank}")
        loop.put(f"for {place} in range(0, {kernel.sizes[rank]}, {step}):")
        loop.put(f"    {kernel.index(rank).text} = {place} + tl.arange(0, {step})")
        for line in walk.lines:
            loop.put(f"    {line}")
        yield from zip(items, totals, strict=True)

    def _advance(self, new: Values) -> None:
        for step in self.carried:
            self.loop.put(f"{self.kernel.variable(step.name)} = {new[step.name].text}")

    def _finish(self) -> None:
        """Finals by name, the finishing statements that are needed, and the stores."""
        tail = self.tail
        tail.cache = {**self.head.cache}
        tail.bound = {**self.head.bound}
        needed = set(self.division.outputs)
        for item in reversed(self.plan.finish):
            if item.name in needed:
                needed |= step_reads(item)
        left = {step.name for step in self.carried}
        for step in reversed(self.plan.steps):
            if isinstance(step, Statement) and step.name in needed - left:
                needed |= step_reads(step)
        for step in self.plan.steps:
            if step.name in left:
                tail.bound[step.name] = self._variable(step)
            elif isinstance(step, Reference):
                source = tail.bound.get(step.source) if step.source else number(step.static or 0.0)
                if source is not None:
                    tail.bound[step.name] = source
            elif isinstance(step, Statement) and step.name in needed:
                tail.bound[step.name] = tail.keep(step.name, tail.value(step.expr))
        for item in self.plan.finish:
            if item.name in needed:
                if item.op is None:
                    value = tail.value(item.expr)
                else:
                    value = reduce(tail, item.op, item.expr, self.roles.axes(item.over))
                tail.bound[item.name] = tail.keep(item.name, value)
        for name in self.division.outputs:
            value = tail.bound[name]
            if self.plan.dead == "zero":
                value = tail.keep(
                    name,
                    Value(f"tl.where({value.text} == {value.text}, {value.text}, 0.0)", value.axes),
                )
            self.outputs.append(name)
            store(tail, name, self.plan.ranks_of(name), value)

    def _part_access(self, step: Step, block: Block, value: Value | None) -> Value:
        """Stores a state of this part, or loads one of another part."""
        kernel = self.kernel
        axes = self.roles.axes(step.ranks)
        pointer = kernel.names.of(("part", step.name), f"{kernel.variable(step.name)}_parts")
        self.parts.append(step.name)
        offset = "(part * tl.num_programs(1) + tl.program_id(1)).to(tl.int64)"
        if ROW in axes:
            total = " * ".join(kernel.extent(rank).text for rank in self.roles.rows)
            offset = f"({offset} * ({total}) + row)"
        else:
            offset = f"({offset} + tl.zeros((), tl.int64))"
        block.put(f"{pointer}_at = {pointer} + {offset} * {_lane_count(kernel, axes)}")
        base = Value(f"{pointer}_at", (ROW,) if ROW in axes else ())
        spread = [base.over(axes)]
        step_size = 1
        for axis in reversed([a for a in axes if a != ROW]):
            spread.append(f"{kernel.index(axis).over(axes)} * {step_size}")
            step_size *= kernel.sizes[axis]
        place = " + ".join(spread)
        mask = masks(kernel, axes)
        if value is not None:
            block.put(f"tl.store({place}, {value.text}{f', mask={mask}' if mask else ''})")
            return value
        text = f"tl.load({place}{f', mask={mask}, other=0' if mask else ''})"
        return block.keep(f"{kernel.variable(step.name)}_part", Value(text, axes, "fp32", True))

    def _assembled(self, kind: str, constants: list[str]) -> Generated:
        kernel = self.kernel
        where = places(kernel, any(bound.upper for bound in self.bounds))
        if "STREAM" in constants:
            where.append("off_t = tl.arange(0, STREAM)")
        inits = [f"{kernel.variable(s.name)} = {starting(self.head, s)}" for s in self.carried]
        body = [*where, *self.head.lines, *inits, *self._loop_lines(kind), *self.tail.lines]
        arguments = self._arguments()
        names = [a.name for a in arguments] + [f"{c}: tl.constexpr" for c in constants]
        signature = ",\n".join(f"    {name}" for name in names)
        text = (
            f"@triton.jit\ndef {self.name}(\n{signature},\n):\n"
            + "\n".join(f"    {x}" for x in body)
            + "\n"
        )
        return Generated(self.name, text, arguments, frozenset(kernel.helpers), tuple(self.bounds))

    def _loop_lines(self, kind: str) -> list[str]:
        if kind == "merge":
            return ["for part in range(0, PARTS):", *(f"    {line}" for line in self.loop.lines)]
        inside = [*self._coordinates(), *self.loop.lines]
        if not self.kernel.virtual:
            return ["for first in range(start, end, STREAM):", *(f"    {line}" for line in inside)]
        size = self.kernel.extent(self.roles.stream).text
        last = "(part == PARTS - 1).to(tl.int32)" if kind == "part" else "1"
        return [
            # One more tile, for the virtual coordinates past the last real one.
            "tiles = tl.cdiv(end - start, STREAM)",
            f"for tile in range(0, tiles + {last}):",
            "    virtual = tile == tiles",
            f"    first = tl.where(virtual, {size}, start + tile * STREAM)",
            *(f"    {line}" for line in inside),
        ]

    def _coordinates(self) -> list[str]:
        """Lines of the loop: the streamed coordinates of a tile, and which of them there are."""
        if self.walked:
            return self.walked
        kernel = self.kernel
        index, size = (found(self.roles.stream).text for found in (kernel.index, kernel.extent))
        where = f"{index} = first + off_t"
        if not kernel.virtual:
            return [where, f"live_t = {index} < {size}"]
        end = f"tl.where(virtual, {size} + {kernel.virtual}, {size})"
        return [where, f"real_t = {index} < {size}", f"live_t = {index} < {end}"]

    def _arguments(self) -> tuple[Argument, ...]:
        kernel = self.kernel
        found = [Argument(kernel.pointer(name), "input", name) for name in kernel.tensors]
        found += [Argument(kernel.pointer(name), "output", name) for name in self.outputs]
        found += [
            Argument(kernel.names.of(("part", name), name), "part", name) for name in self.parts
        ]
        found += [Argument(kernel.extent(rank).text, "extent", rank) for rank in kernel.extents]
        if self.asks:
            found.append(Argument("skip", "skip", ""))
        for name in [*kernel.tensors, *self.outputs]:
            ranks = (
                kernel.tensors[name].ranks if name in kernel.tensors else self.plan.ranks_of(name)
            )
            found += [Argument(kernel.stride(name, rank), "stride", name, rank) for rank in ranks]
        return tuple(found)


def _lane_count(kernel: Function, axes: tuple[str, ...]) -> int:
    count = 1
    for axis in axes:
        if axis not in (ROW, STREAM):
            count *= kernel.sizes[axis]
    return count


def helpers(functions: list[Generated]) -> str:
    """The small functions that the generated ones call."""
    used = sorted({name for function in functions for name in function.helpers})
    return "\n\n".join(_HELPERS[name] for name in used)
