"""What a program allocates while it runs: torch's own answer, from a run on the meta device at given sizes.

A view shares the storage of what it looks at, and a reshape that must copy does not: who shares memory with
whom, and how many bytes there are, is read off the storages of a run that computes nothing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ...errors import pass_on
from ..ir.interpreter import Interpreter
from ..ir.ops.record import OPERATORS
from ..ir.program import Program

META = torch.device("meta")

#: For a call and one of its results, the argument in whose memory that is written.
InPlace = Mapping[tuple[fx.Node, int], fx.Node]


@dataclass(frozen=True)
class Joining:
    """Calls of `cat` that copy nothing, since their parts are written where they lie in the whole."""

    parts: Mapping[tuple[fx.Node, int], tuple[fx.Node, int]] = field(default_factory=dict)
    """For a call and one of its results, the `cat` in whose memory it lies, and its first element there."""
    whole: Mapping[fx.Node, Tensor] = field(default_factory=dict)
    """Each such `cat`, and a tensor like its result."""


@dataclass
class Made:
    """A storage that a call allocates."""

    node: fx.Node
    at: int
    """Which of the call's results brought it."""
    tensor: Tensor
    """That result. It keeps the storage alive, and so its number."""
    readers: set[fx.Node] = field(default_factory=set)
    """What reads it, through views or not; the program's output among them."""

    @property
    def result(self) -> tuple[fx.Node, int]:
        """The call, and which of its results."""
        return self.node, self.at

    @property
    def size(self) -> int:
        return self.tensor.untyped_storage().nbytes()


@dataclass
class Survey:
    """One run: what was allocated, and what every node gave."""

    made: dict[int, Made] = field(default_factory=dict)
    """By the numbers of storages, in the order of the calls."""
    values: dict[fx.Node, Any] = field(default_factory=dict)

    def of(self, tensor: Tensor) -> Made | None:
        """What holds a tensor; None where it is an input's or a weight's."""
        return self.made.get(number(tensor))

    def results(self, node: fx.Node) -> list[Tensor]:
        """The tensors among what a node gave."""
        return [*tensors(self.values[node])]

    def reads(self, node: fx.Node) -> set[int]:
        """The storages, of those that were allocated, that a node reads."""
        given = [each for source in node.all_input_nodes for each in self.results(source)]
        return {number(each) for each in given} & self.made.keys()

    def looks(self, node: fx.Node) -> bool:
        """Whether a call reads no element of what it is given: its results are views of that."""
        schema = getattr(node.target, "_schema", None)
        if node.op != "call_function" or (schema is not None and schema.is_mutable):
            return False
        given = {number(e) for source in node.all_input_nodes for e in self.results(source)}
        results = {number(each) for each in self.results(node)}
        if schema is None:  # one of several results is taken
            return bool(results) and results <= given
        return (
            bool(results) and results == given
        )  # a view of one argument by another's numbers reads these

    def wrote(self, node: fx.Node) -> set[int]:
        """The storages that a node allocated."""
        given = {number(each) for each in self.results(node)} & self.made.keys()
        return {each for each in given if self.made[each].node is node}


#: What calls gave for arguments of some shapes: a tensor or several, and their shapes, strides and types.
_SEEN: dict[tuple[Any, ...], tuple[bool, list[tuple[Any, ...]]]] = {}
_MOST_SEEN = 4096


def _described(given: Any) -> Any:
    if isinstance(given, Tensor):
        return given.dtype, given.shape, given.stride(), given.device.type
    return type(given), given


def _new_memory(results: Any, given: list[Any]) -> bool:
    """Whether results are tensors that each fill a storage of their own."""
    if not isinstance(results, (tuple, list)) or not all(isinstance(r, Tensor) for r in results):
        return False
    known = {number(each) for each in given if isinstance(each, Tensor)}
    storages = {number(each) for each in results}
    filled = all(each.nbytes == each.untyped_storage().nbytes() for each in results)
    return filled and len(storages) == len(results) and not storages & known


def _shaped(stands: Callable[..., Any], shapes: Callable[..., Any]) -> Callable[..., Any]:
    """What gives the shapes of a call: what stands for it, or where that asks for numbers the operator."""

    def give(*args: Any, **kwargs: Any) -> Any:
        try:
            return stands(*args, **kwargs)
        except Exception as error:
            pass_on(error)
            return shapes(*args, **kwargs)

    return give


class _Shapes(Interpreter):
    """Runs a program on the meta device, where an operator of einfold's gives what its shapes say."""

    def __init__(
        self,
        program: Program,
        in_place: InPlace,
        joining: Joining,
        stands: Mapping[fx.Node, Callable[..., Any]],
    ) -> None:
        shapes: dict[Any, Callable[..., Any]] = {
            kind.overload(): kind.standing_in(kind.shapes) for kind in OPERATORS.values()
        }
        theirs = {node: _shaped(stands[node], shapes[node.target]) for node in stands}
        super().__init__(program, instead=shapes | theirs, device=META)
        self.found = Survey()
        self._in_place, self._joining = in_place, joining
        self._joined: dict[fx.Node, Tensor] = {}
        self._given: set[int] = set()
        self._weights: dict[str, Tensor] = {}

    def weight(self, name: str) -> Tensor:
        if name not in self._weights:  # a view is known by the storage that it looks at
            weight = self.program.weights[name]
            self._weights[name] = torch.empty(weight.shape, dtype=weight.dtype, device=META)
        return self._weights[name]

    def evaluate(
        self, node: fx.Node, values: dict[fx.Node, Any], inputs: Mapping[str, Tensor]
    ) -> Any:
        value = self._of_shapes(node, values, inputs)
        found = self.found
        if node.op == "call_function":
            value = self._put_in_place(node, value)
            for at, each in enumerate(tensors(value)):
                if number(each) not in self._given:
                    found.made.setdefault(number(each), Made(node, at, each))
        else:
            self._given |= {number(each) for each in tensors(value)}
        found.values[node] = value
        for read in found.reads(node):
            found.made[read].readers.add(node)
        return value

    def _of_shapes(
        self, node: fx.Node, values: dict[fx.Node, Any], inputs: Mapping[str, Tensor]
    ) -> Any:
        """What a call gives; as it gave for arguments of the same shapes before, where that was new memory.

        Torch finds shapes in Python, in up to milliseconds a call, and layers and tiles are alike.
        """
        schema = getattr(node.target, "_schema", None)
        if schema is None or schema.is_mutable:
            return super().evaluate(node, values, inputs)
        given, form = pytree.tree_flatten(
            fx.map_arg((node.args, dict(node.kwargs)), lambda read: values[read])
        )
        key = (node.target, str(form), *map(_described, given))
        if key not in _SEEN:
            value = super().evaluate(node, values, inputs)
            results = [value] if isinstance(value, Tensor) else value
            if not _new_memory(results, given):
                return value
            if len(_SEEN) >= _MOST_SEEN:
                _SEEN.clear()
            _SEEN[key] = (
                isinstance(value, Tensor),
                [(each.shape, each.stride(), each.dtype) for each in results],
            )
        alone, described = _SEEN[key]
        made = [torch.empty_strided(s, t, dtype=d, device=META) for s, t, d in described]
        return made[0] if alone else tuple(made)

    def _put_in_place(self, node: fx.Node, value: Any) -> Any:
        if node in self._joining.whole:
            first, whole = self.found.values[node.all_input_nodes[0]], value
            return first.as_strided(whole.shape, whole.stride(), first.storage_offset())
        several = isinstance(value, (tuple, list))
        results = list(value) if several else [value]
        for at in range(len(results)):
            if (node, at) in self._in_place:
                results[at] = self.found.values[self._in_place[node, at]]
            elif (node, at) in self._joining.parts:
                whole, first = self._joining.parts[node, at]
                results[at] = self._memory_of(whole).as_strided(
                    results[at].shape, results[at].stride(), first
                )
        return tuple(results) if several else results[0]

    def _memory_of(self, whole: fx.Node) -> Tensor:
        """What a `cat` gives, made for the first of its parts."""
        if whole not in self._joined:
            self._joined[whole] = torch.empty_like(self._joining.whole[whole]).flatten()
        return self._joined[whole]


def survey(
    program: Program,
    inputs: Mapping[str, Tensor],
    in_place: InPlace | None = None,
    joining: Joining | None = None,
    stands: Mapping[fx.Node, Callable[..., Any]] | None = None,
) -> Survey:
    """Runs a program on inputs of these shapes, results written in place and in their part of a whole where
    these say so. What `stands` for a call says what that gives, since it may read weights in an order of its
    own."""
    shapes = _Shapes(program, in_place or {}, joining or Joining(), stands or {})
    shapes.run({name: each.to(META) for name, each in inputs.items()})
    found = shapes.found
    for read in found.reads(program.output):
        found.made[read].readers.add(program.output)
    return found


def inputs_at(program: Program, dims: Mapping[str, int]) -> dict[str, Tensor]:
    """Inputs of a program, of no more than shapes, with dims such as B, S, C, N given as numbers."""
    return {
        str(node.target): torch.empty(
            [program.shapes.evaluate(size, dims) for size in node.meta["val"].shape],
            dtype=node.meta["val"].dtype,
            device=META,
        )
        for node in program.placeholders()
    }


def step_dims(program: Program, rows: int, new: int) -> Mapping[str, int]:
    """The named sizes of a step of `new` tokens a row that ends at the end of the context, logits behind each
    row. Where there is no cache, rows of the model's input."""
    context = program.model.context or new
    slots = {} if program.layout is None else program.layout.slot_dims(context, context)
    return defaultdict(lambda: context, {"B": rows, "S": new, "N": rows} | slots)


def number(tensor: Tensor) -> int:
    """What a tensor's storage is known by, as long as it is alive."""
    return int(tensor.untyped_storage()._cdata)


def tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in what a node gave."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from tensors(each)
