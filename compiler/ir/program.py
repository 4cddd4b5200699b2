"""A program: an FX graph over `aten` and `einfold` ops, its weights, and its cache layout.

The graph is a `torch.fx.Graph` without a module: weights are `get_attr` nodes that name an entry of
the `WeightStore`. Every node carries its type as a fake tensor in `meta["val"]`, kept up to date by
`Editor`, through which passes insert nodes.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Protocol

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher

from ...errors import IRError, pass_on
from .interrupts import Later
from .kv.layout import CacheLayout
from .ops import einfold_ops
from .ops.record import Operator, operator_of, over_caches
from .types import Shapes
from .weights import Weight, WeightStore

#: Python functions that may stand in a graph: picking one result of several, and arithmetic on sizes.
BUILTINS: dict[str, Callable[..., Any]] = {
    "getitem": operator.getitem,
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "floordiv": operator.floordiv,
    "mod": operator.mod,
}


@dataclass(frozen=True)
class ModelInfo:
    """What the runtime needs to know of a model beside its graph."""

    architecture: str
    vocabulary: int
    context: int
    """Tokens of context that the artifact is compiled for."""
    hidden: int = 0


class Calibration(Protocol):
    """Statistics that a pass asked for; the driver runs it once the pipeline is through."""

    def run(
        self, tokens_BS: torch.Tensor, tell: Callable[[str, float], None] | None = None
    ) -> None:
        """Reads the text, and tells of progress. Raises CalibrationError where it gives no usable numbers."""


def no_inputs(tokens_BS: torch.Tensor) -> dict[str, torch.Tensor]:
    """What goes with a text where there is nothing beside it."""
    return {}


@dataclass
class Program:
    """The unit that passes work on."""

    model: ModelInfo
    shapes: Shapes = field(default_factory=Shapes)
    graph: fx.Graph = field(default_factory=fx.Graph)
    weights: WeightStore = field(default_factory=WeightStore)
    layout: CacheLayout | None = None
    cache_weights: dict[str, Weight] = field(default_factory=dict)
    """Weights that the cache's storage needs, such as scales, until `attach_cache` puts them in the graph."""
    calibrations: list[Calibration] = field(default_factory=list)
    """What must read a calibration text before the weights that it decides can be loaded."""
    statistics: Any = None
    """What passes may ask of the model while they run (`calibrate.statistics.Statistics`); None where
    there are no weights to ask, as when only sizes are wanted."""
    encoder: Program | None = None
    """Of a decoder: what gives the inputs that stay the same from step to step."""
    beside: Callable[[torch.Tensor], dict[str, torch.Tensor]] = no_inputs
    """The inputs beside tokens and positions that go with rows of a calibration text."""

    def nodes(self, *targets: object) -> Iterator[fx.Node]:
        """The call nodes of these operators, in order, over a snapshot of the graph."""
        for node in list(self.graph.nodes):
            if node.op == "call_function" and node.target in targets:
                yield node

    def placeholders(self) -> list[fx.Node]:
        return [node for node in self.graph.nodes if node.op == "placeholder"]

    def placeholder(self, name: str) -> fx.Node:
        """The input called `name`; raises IRError where there is none."""
        for node in self.placeholders():
            if node.target == name:
                return node
        raise IRError(
            f"the program has no input {name!r}; it has {[str(n.target) for n in self.placeholders()]}"
        )

    @property
    def output(self) -> fx.Node:
        last: fx.Node = next(node for node in reversed(self.graph.nodes) if node.op == "output")
        return last

    def output_names(self) -> list[str]:
        names: list[str] = self.output.meta["names"]
        return names

    def weight_of(self, node: object) -> Weight | None:
        """The weight that a `get_attr` node names, else None."""
        if isinstance(node, fx.Node) and node.op == "get_attr":
            return self.weights[str(node.target)]
        return None

    def is_sequence_model(self) -> bool:
        """Whether this is a causal language model: an encoder is told of padding, and a plain module's inputs
        may be called as they like."""
        names = {node.target for node in self.placeholders()}
        return self.model.vocabulary > 0 and "input_ids" in names and "attention_mask" not in names


def own_windows(program: Program) -> dict[int, int]:
    """The sliding window that the model itself gives each attention layer, 0 where it gives none."""
    found = map(call_arguments, attention_nodes(program))
    return {int(call["layer"]): int(call["window"]) for call in found}


def attention_nodes(program: Program) -> list[fx.Node]:
    """The attention calls, with or without a cache, in the order of their layers."""
    found = [*program.nodes(einfold_ops.attention.default), *cache_writers(program)]
    return sorted(found, key=lambda node: int(call_arguments(node)["layer"]))


def cache_writers(program: Program) -> Iterator[fx.Node]:
    """The calls that attend over a cache which they write, in the order of the graph."""
    return program.nodes(*(kind.overload() for kind in over_caches()))


def writes_cache(node: fx.Node) -> bool:
    """Whether a node attends over a cache which it writes."""
    kind = operator_of(node.target)
    return kind is not None and bool(kind.writes)


def readers(graph: fx.Graph, name: str) -> list[fx.Node]:
    """The calls that take a weight of a name; a call is there as often as nodes read the weight for it."""
    reads = (node for node in graph.find_nodes(op="get_attr") if node.target == name)
    return [user for read in reads for user in read.users]


def reads_alone(read: fx.Node) -> bool:
    """Whether a node reads a weight that one call takes, and no other."""
    return read.op == "get_attr" and len(readers(read.graph, str(read.target))) == 1


def call_arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of an operator call by the names of its schema, defaults filled in."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        raise IRError(f"node {node.name} does not call an operator")
    bound: dict[str, Any] = {}
    for index, argument in enumerate(target._schema.arguments):
        if index < len(node.args):
            bound[argument.name] = node.args[index]
        elif argument.name in node.kwargs:
            bound[argument.name] = node.kwargs[argument.name]
        elif argument.has_default_value():
            bound[argument.name] = argument.default_value
        else:
            raise IRError(f"node {node.name} lacks the argument {argument.name!r} of {target}")
    return bound


def before_rotary(
    given: Mapping[str, Any], names: Sequence[str]
) -> tuple[dict[str, fx.Node], dict[str, Any]]:
    """Of an attention's arguments those of these names before their rotary embedding, and what that takes; as
    they are, and nothing, where they have not the same."""
    shown = {name: given[name] for name in names}
    turned = {(x.target, x.args[1:]) for x in shown.values()}
    if len(turned) > 1 or next(iter(turned))[0] is not einfold_ops.rotary.default:
        return shown, {}
    taken = call_arguments(shown[names[0]])
    return {name: x.args[0] for name, x in shown.items()}, taken


class Editor:
    """Inserts nodes and gives each its type by running the operator on fake tensors."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.graph = program.graph

    @contextmanager
    def before(self, node: fx.Node) -> Iterator[Editor]:
        with self.graph.inserting_before(node):
            yield self

    @contextmanager
    def after(self, node: fx.Node) -> Iterator[Editor]:
        with self.graph.inserting_after(node):
            yield self

    def call(
        self, target: Callable[..., Any], *args: Any, name: str | None = None, **kwargs: Any
    ) -> fx.Node:
        """A call of `target`; raises IRError, naming the call, where its shapes do not fit."""
        node = self.graph.create_node("call_function", target, args, kwargs, name=name)
        infer(self.program, node)
        return node

    def make(self, kind: type[Operator], **arguments: Any) -> fx.Node:
        """A call of an operator of einfold's, its arguments by name. Defaults at the end are left out."""
        call = kind(**arguments)
        given = [getattr(call, each.name) for each in fields(kind)]
        for each in reversed(fields(kind)):
            if each.default is MISSING or given[-1] != each.default:
                break
            given.pop()
        return self.call(kind.overload(), *given)

    def weight(self, name: str, weight: Weight) -> fx.Node:
        """Adds a weight to the store and a node that reads it."""
        return self.read(self.program.weights.add(name, weight))

    def read(self, name: str, node_name: str | None = None) -> fx.Node:
        """A node that reads a weight of the store."""
        node = self.graph.create_node("get_attr", name, name=node_name)
        infer(self.program, node)
        return node

    def input(
        self,
        name: str,
        shape: Sequence[int | str],
        dtype: torch.dtype,
        node_name: str | None = None,
    ) -> fx.Node:
        """A new input, placed behind those that there are."""
        present = self.program.placeholders()
        anchor = present[-1] if present else self.graph._root
        with self.graph.inserting_after(anchor):
            node = self.graph.create_node(
                "placeholder", name, name=node_name or name.replace(".", "_")
            )
        node.meta["val"] = self.program.shapes.tensor(shape, dtype)
        return node

    def results(self, node: fx.Node) -> list[fx.Node]:
        """A getitem node for each result of a call that gives several."""
        nodes, last = [], node
        for index in range(len(node.meta["val"])):
            with self.graph.inserting_after(last):
                last = self.call(operator.getitem, node, index)
            nodes.append(last)
        return nodes

    def replace(self, old: fx.Node, new: fx.Node) -> None:
        """Every use of `old` reads `new` instead, and `old` goes."""
        old.replace_all_uses_with(new, propagate_meta=False)
        self.graph.erase_node(old)

    def set_output(self, values: Sequence[fx.Node], names: Sequence[str]) -> None:
        """Sets the program's results and their names."""
        for node in list(self.graph.nodes):
            if node.op == "output":
                self.graph.erase_node(node)
        node = self.graph.output(tuple(values))
        node.meta["names"] = list(names)
        node.meta["val"] = tuple(value.meta["val"] for value in values)


def infer(program: Program, node: fx.Node) -> None:
    """Sets `meta["val"]` of a call or weight node from its arguments' types."""
    shapes = program.shapes
    if node.op == "get_attr":
        weight = program.weights[str(node.target)]
        shape, dtype = tuple(weight.shape), weight.dtype
        node.meta["val"] = shapes.once((shape, dtype), lambda: shapes.tensor(shape, dtype))
        return
    if node.op != "call_function" or not callable(node.target):
        raise IRError(f"node {node.name} ({node.op}) has no type of its own")
    target = node.target
    args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda n: n.meta["val"])

    def compute() -> Any:
        # The dispatcher in Python knows sizes that are symbols where C++ would fix or refuse them.
        with Later(), shapes.mode, enable_python_dispatcher(), torch.no_grad(), _no_log():
            return target(*args, **kwargs)

    try:
        node.meta["val"] = shapes.once((target, args, kwargs), compute)
    except Exception as error:
        pass_on(error)
        inputs = ", ".join(
            f"%{n.name}: {shapes.describe(n.meta['val'])}" for n in node.all_input_nodes
        )
        raise IRError(
            f"{op_name(node.target)} at %{node.name} does not accept ({inputs}): {error}"
        ) from error


@contextmanager
def _no_log() -> Iterator[None]:
    """Keeps torch from logging a traceback for a shape error that is raised as a sentence here."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before = logger.disabled
    logger.disabled = True
    try:
        yield
    finally:
        logger.disabled = before


def op_name(target: object) -> str:
    """The printed name of a call's target: `aten.add.Tensor`, `einfold.linear`, `builtin.mul`."""
    if isinstance(target, torch._ops.OpOverload):
        name = str(target)
        return name.removesuffix(".default") if name.startswith("einfold.") else name
    for name, function in BUILTINS.items():
        if target is function:
            return f"builtin.{name}"
    raise IRError(f"{target!r} is not an operator of the IR")


def find_op(name: str) -> Callable[..., Any]:
    """The inverse of `op_name`: finds operators of the two namespaces, and nothing else."""
    namespace, _, rest = name.partition(".")
    if namespace == "builtin" and rest in BUILTINS:
        return BUILTINS[rest]
    if namespace in ("aten", "einfold"):
        packet_name, _, overload = rest.partition(".")
        packet = getattr(getattr(torch.ops, namespace), packet_name, None)
        if packet is not None:
            operator_overload = getattr(packet, overload or "default", None)
            if isinstance(operator_overload, torch._ops.OpOverload):
                return operator_overload
    raise IRError(f"{name!r} is not an operator of the IR")


def remove_dead_nodes(program: Program) -> int:
    """Erases calls and reads that nothing uses, and weights that nothing reads; gives how many nodes went.

    Every operator of the IR is pure, so a node without users is dead. Inputs stay.
    """
    erased = 0
    for node in reversed(list(program.graph.nodes)):
        if node.op in ("call_function", "get_attr") and not node.users:
            program.graph.erase_node(node)
            erased += 1
    read = {str(node.target) for node in program.graph.nodes if node.op == "get_attr"}
    for name in [name for name in program.weights if name not in read]:
        program.weights.discard(name)
    return erased
