"""Capture of any module by `torch.export`, with example inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor, nn
from torch.export.graph_signature import InputKind
from torch.utils import _pytree as pytree

from ...errors import ModelError, UnsupportedError
from ..ir.program import ModelInfo, Program
from ..ir.weights import Weight
from .example import Example, dim_names, inferring
from .export import export, import_or_refuse, name_dims, tied_names

#: Types that an exported module computes in another, as a language model does: onnxruntime's CPU has no
#: kernels for bfloat16, and 1.31 crashes over an encoder in float16. Inputs and outputs keep theirs.
WIDENED = {torch.bfloat16: torch.float32, torch.float16: torch.float32}


@dataclass(frozen=True)
class Captured:
    """A module as a program, and the calls on which the two can be compared."""

    module: nn.Module
    program: Program
    examples: tuple[Example, ...]
    """The inputs that were given, and where there are dynamic sizes, inputs of other sizes."""

    def inputs(self, example: Example) -> dict[str, Tensor]:
        """The tensors of a call by the names of the program's inputs."""
        tensors = [leaf.detach() for leaf in example.leaves() if isinstance(leaf, Tensor)]
        names = [str(node.target) for node in self.program.placeholders()]
        return dict(zip(names, tensors, strict=True))

    def outputs(self, example: Example) -> dict[str, Tensor]:
        """What the module gives, by the names of the program's outputs."""
        leaves = pytree.tree_leaves(example.run(self.module))
        tensors = [leaf.detach() for leaf in leaves if isinstance(leaf, Tensor)]
        return dict(zip(self.program.output_names(), tensors, strict=True))


def _refuse_devices(module: nn.Module, example: Example, name: str) -> None:
    """Raises UnsupportedError where there are no numbers, or where they are not all on one device."""
    parts: dict[str, Tensor] = {}
    parts |= {f"the weight {key}": tensor for key, tensor in module.named_parameters()}
    parts |= {f"the buffer {key}": tensor for key, tensor in module.named_buffers()}
    leaves = [leaf for leaf in example.leaves() if isinstance(leaf, Tensor)]
    parts |= {f"example input {at}": tensor for at, tensor in enumerate(leaves)}
    places: dict[str, str] = {}
    for part, tensor in parts.items():
        places.setdefault(str(tensor.device), part)
    if "meta" in places:
        raise UnsupportedError(
            f"{name}: {places['meta']} is on the device meta, which holds no numbers; load the weights "
            "and give inputs that have numbers"
        )
    if len(places) > 1:
        (one, first), (other, second) = sorted(places.items())[:2]
        raise UnsupportedError(
            f"{name}: {first} is on {one} and {second} on {other}; move them to one device"
        )


def capture_module(
    module: nn.Module,
    example: Example | tuple[Any, ...],
    dynamic_shapes: Any = None,
    outputs: Sequence[str] | None = None,
) -> Captured:
    """Any module as a program over its tensor inputs; weights are shared with the module, not copied.

    `dynamic_shapes` is as torch.export takes it; its names become those of the axes. Raises ModelError for
    what is no module, UnsupportedError where it cannot be traced, or keeps a state between calls.
    """
    example = example if isinstance(example, Example) else Example(example)
    name = type(module).__name__
    if not isinstance(module, nn.Module):
        raise ModelError(
            f"example inputs are for a torch.nn.Module in memory, and {name} is none; "
            "without them a folder or a hub id of a model is exported"
        )
    _refuse_devices(module, example, name)
    names = dim_names(module, example, dynamic_shapes)
    with inferring(module):
        exported = export(module, example.args, dynamic_shapes, name, example.kwargs)
    _refuse_state(exported, name)
    state = dict(module.state_dict(keep_vars=True)) | dict(module.named_parameters())
    state |= dict(module.named_buffers(remove_duplicate=False)) | dict(exported.constants)

    def weight(key: str, shape: tuple[int, ...], dtype: torch.dtype) -> Weight:
        return Weight.of(state[key], WIDENED.get(dtype, dtype))

    first_name = tied_names(module)
    specs = exported.graph_signature.input_specs
    given = {spec.arg.name for spec in specs if spec.kind is InputKind.USER_INPUT}
    inputs = [n for n in exported.graph.nodes if n.op == "placeholder" and n.name in given]
    # torch.export may hold keyword arguments in another order than they were given.
    example = Example(*exported.example_inputs)
    dims: dict[str, str] = {}
    shapes = {
        node.name: name_dims(node.meta["val"], dims, names.get(id(leaf), {}))
        for node, leaf in zip(inputs, example.leaves(), strict=True)
        if isinstance(leaf, Tensor)
    }
    program = import_or_refuse(
        name,
        exported,
        ModelInfo(architecture=name, vocabulary=0, context=0),
        lambda key: first_name.get(key, key),
        weight,
        shapes,
        output_names(exported, name, set(shapes), outputs),
        WIDENED,
    )
    _refuse_fixed(program, shapes, name)
    other = _other_sizes(exported, inputs, example)
    return Captured(module, program, (example,) if other is None else (example, other))


def _refuse_state(exported: Any, name: str) -> None:
    """A graph without state gives the first call's answer again and again."""
    signature = exported.graph_signature
    kept = [*signature.buffers_to_mutate.values()]
    kept += [*getattr(signature, "parameters_to_mutate", {}).values()]
    if kept:
        raise UnsupportedError(
            f"{name}: the module writes to {kept[0]!r} while it runs, and an exported model keeps no state "
            "between calls; let forward take it as an argument and give the new one back"
        )
    if signature.user_inputs_to_mutate:
        written = next(iter(signature.user_inputs_to_mutate.values()))
        raise UnsupportedError(
            f"{name}: the module writes into its input {written!r}, which an exported model cannot; "
            "let forward give the new value back"
        )


def _refuse_fixed(program: Program, shapes: Mapping[str, tuple[int | str, ...]], name: str) -> None:
    """A size that an operator fixed while types were inferred would be right for itself alone."""
    for node in program.placeholders():
        sizes = program.shapes.describe(node.meta["val"]).split("[")[1].rstrip("]").split(", ")
        for wanted, found in zip(shapes[str(node.target)], sizes, strict=False):
            if isinstance(wanted, str) and found.isdigit():
                raise UnsupportedError(
                    f"{name}: the size {wanted} of the input {str(node.target)!r} cannot vary, for "
                    "an operator asks how large it is; leave it out of dynamic_shapes"
                )


def output_names(
    exported: Any, name: str, inputs: set[str], wanted: Sequence[str] | None
) -> list[str]:
    """A name for each tensor that the module gives: its keys where it gives a table, else its place."""
    output = next(node for node in exported.graph.nodes if node.op == "output")
    paths = list(_paths(exported.call_spec.out_spec, ()))
    names: list[str] = []
    for value, path in zip(output.args[0], paths, strict=True):
        if not isinstance(value, torch.fx.Node):
            continue  # None and numbers are the same for every call
        if not isinstance(value.meta["val"], Tensor):
            raise UnsupportedError(
                f"{name}: output {'.'.join(map(str, path)) or 0} is a size, not a tensor; "
                "leave it out, the caller can read it from the inputs"
            )
        keyed = bool(path) and isinstance(path[0], str)
        label = "_".join(map(str, path)) if keyed else f"output_{len(names)}"
        names.append(label if label not in inputs | set(names) else f"{label}_out")
    if wanted is None:
        return names
    if len(wanted) != len(names) or len(set(wanted)) != len(wanted) or set(wanted) & inputs:
        raise UnsupportedError(
            f"{name} gives {len(names)} tensors, which need as many names that differ from each other "
            f"and from those of the inputs, not {list(wanted)}"
        )
    return list(wanted)


def _paths(spec: Any, path: tuple[str | int, ...]) -> Any:
    """The way to each leaf of a result: keys of tables (transformers' outputs too), places in lists."""
    if spec.type is None:
        yield path
        return
    children, keys = spec.children(), spec.context
    named = isinstance(keys, list) and len(keys) == len(children)
    for place, child in enumerate(children):
        step = keys[place] if named and isinstance(keys[place], str) else place
        yield from _paths(child, (*path, step))


def _other_sizes(exported: Any, inputs: list[Any], example: Example) -> Example | None:
    """The example with every dynamic size changed, inside the range that torch.export found; None without."""
    hints: dict[sympy.Symbol, int] = {}
    for node in inputs:
        value = node.meta["val"]
        sizes: Any = value.shape if isinstance(value, Tensor) else ()
        for size in sizes:
            if isinstance(size, torch.SymInt) and isinstance(size.node.expr, sympy.Symbol):
                hints[size.node.expr] = int(size.node.hint)
    new = {symbol: _other(hint, exported, symbol) for symbol, hint in hints.items()}
    if not hints or new == hints:
        return None

    def shape(leaf: Any, node: Any) -> list[int] | None:
        if not isinstance(leaf, Tensor):
            return None
        return [
            int(size.node.expr.subs(new)) if isinstance(size, torch.SymInt) else int(size)
            for size in node.meta["val"].shape
        ]

    leaves = example.leaves()
    return example.resized([shape(leaf, node) for leaf, node in zip(leaves, inputs, strict=True)])


def _other(hint: int, exported: Any, symbol: Any) -> int:
    allowed = exported.range_constraints.get(symbol)
    for size in (hint + 3, hint + 1, hint - 1):
        if size > 0 and (allowed is None or (allowed.lower <= size and size <= allowed.upper)):
            return size
    return hint
