"""Capture of a language model without a cache by `torch.export`, and what capture of any module shares."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from ...errors import EinfoldError, IRError, ModelError, UnsupportedError, pass_on
from ..ir.interrupts import Later
from ..ir.manifest import EMBEDDINGS
from ..ir.program import (
    Editor,
    ModelInfo,
    Program,
    attention_nodes,
    find_op,
    op_name,
    remove_dead_nodes,
)
from ..ir.stored import cast as cast_weight
from ..ir.types import DTYPE_NAMES
from ..ir.verifier import verify
from ..ir.weights import Weight
from . import hooks, huggingface
from .huggingface import ModelSource
from .normalise import cast, is_cast, normalise_call
from .structure import structure
from .torch_says import quietly, reason_of
from .vision import Embedded, no_embeddings

#: Gives the data of the weight called (name, shape in the graph, dtype in the graph).
WeightSource = Callable[[str, tuple[int, ...], torch.dtype], Weight]


class _Logits(nn.Module):
    """A causal LM as a function of token ids and positions, without a cache."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        logits: Tensor = self.model(
            input_ids=input_ids, position_ids=position_ids, use_cache=False
        ).logits
        return logits


def capture_language_model(
    source: ModelSource,
    config: Any,
    context: int,
    state: Mapping[str, Tensor | Weight] | None = None,
    module: Any = None,
    embeds: bool = False,
    skeleton: Any = None,
) -> Program:
    """The model as a program of (input_ids [B, S], position_ids [B, S]) -> logits [B, S, V], in float32.

    With `embeds` it takes a table of embeddings too, [B, T, hidden] (`vision.Embedded`).
    What is traced is a copy of `module`, or else what the config describes; a `skeleton` that `structure`
    made of these is used up. `state` gives the weights' data, and without it the weights are known by shape
    only. Raises UnsupportedError, naming the layer, for what the hooks or the trace cannot express.
    """
    try:
        if skeleton is None:
            skeleton = structure(source, config, state, module)
        program = _capture(source, config, context, state, skeleton, embeds)
    except UnsupportedError as error:
        if huggingface.routes_attention(config):
            raise
        raise UnsupportedError(_no_hook(source, config, "it")) from error
    _check_layers(program, config, source)
    _check_positions(program, config, source)
    return program


def _capture(
    source: ModelSource,
    config: Any,
    context: int,
    state: Mapping[str, Tensor | Weight] | None,
    skeleton: Any,
    embeds: bool,
) -> Program:
    hooks.install(skeleton)
    batch, length = torch.export.Dim("B"), torch.export.Dim("S")
    ids = torch.zeros(2, 7, dtype=torch.long)
    positions = torch.arange(7).expand(2, 7).contiguous()
    dims = {0: batch, 1: length}
    width = int(skeleton.get_input_embeddings().weight.shape[1])
    inputs: dict[str, tuple[int | str, ...]] = dict.fromkeys(
        ("input_ids", "position_ids"), ("B", "S")
    )
    if embeds:
        table = torch.zeros(2, 5, width)
        beside = {0: batch, 1: torch.export.Dim("T")}
        given, shapes = (ids, positions, table), (dims, dims, beside)
        exported = export(Embedded(skeleton).eval(), given, shapes, source.location)
        inputs[EMBEDDINGS] = ("B", "T", width)
    else:
        exported = export(_Logits(skeleton), (ids, positions), (dims, dims), source.location)
    first_name = tied_names(skeleton)
    info = ModelInfo(
        architecture=str(config.model_type),
        vocabulary=vocabulary_of(exported, source),
        context=context,
        hidden=width,
    )

    program = import_or_refuse(
        source.location,
        exported,
        info,
        lambda name: first_name.get(name.removeprefix("model."), name.removeprefix("model.")),
        named_weights(source, skeleton, exported, state),
        inputs,
        ["logits"],
    )
    if embeds:
        program.beside = no_embeddings(width)
    return program


def named_weights(
    source: ModelSource,
    skeleton: nn.Module,
    exported: Any,
    state: Mapping[str, Tensor | Weight] | None,
) -> WeightSource:
    """The data of weights from `state`, else from the skeleton's buffers and the trace's own constants.

    Without a state weights have shapes alone."""
    traced = {name: x for name, x in exported.constants.items() if isinstance(x, Tensor)}
    # What the model reads and has not registered, and its buffers, such as frequencies.
    own = {name.removeprefix("model."): x for name, x in traced.items()} | traced
    return weights_from(source, state, own | dict(skeleton.named_buffers()))


def weights_from(
    source: ModelSource,
    state: Mapping[str, Tensor | Weight] | None,
    own: Mapping[str, Tensor],
) -> WeightSource:
    """The data of weights from `state`, else those of the module's `own` numbers by name."""

    def weight(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Weight:
        if state is not None and name in state:
            found = state[name]
            return (
                cast_weight(found, dtype) if isinstance(found, Weight) else Weight.of(found, dtype)
            )
        if name in own:
            return Weight.of(own[name], dtype)
        if state is not None:
            raise ModelError(
                f"{source.location}: nothing gives the numbers of weight {name}, which the model reads"
            )
        return Weight.absent(shape, dtype, name)

    return weight


def vocabulary_of(exported: Any, source: ModelSource) -> int:
    """Numbers that the model gives for each token; raises UnsupportedError for what are no logits."""
    mutated = [*exported.graph_signature.buffers_to_mutate.values()]
    if mutated:
        raise UnsupportedError(
            f"{source.location}: the model writes to its buffer {mutated[0]} while it runs; a compiled "
            "model has no state but its cache"
        )
    (logits,) = exported.graph.output_node().args[0]
    shape: Any = getattr(logits.meta.get("val"), "shape", ()) if isinstance(logits, fx.Node) else ()
    if len(shape) != 3 or not isinstance(shape[2], int):
        raise UnsupportedError(
            f"{source.location}: the model gives {[str(size) for size in shape]} numbers where logits "
            "[rows, tokens, vocabulary] were expected: it is no causal language model"
        )
    return int(shape[2])


def export(
    module: nn.Module,
    inputs: tuple[Any, ...],
    shapes: Any,
    where: str,
    keywords: Mapping[str, Any] | None = None,
) -> Any:
    """The exported program, its operators functional; UnsupportedError with torch's reason and its advice."""
    try:
        with Later(), torch.no_grad(), quietly(FutureWarning):
            exported = torch.export.export(
                module, inputs, dict(keywords or {}), dynamic_shapes=shapes, strict=False
            )
    except EinfoldError:
        raise
    except Exception as error:
        pass_on(error)
        raise UnsupportedError(
            f"{where}: torch.export cannot trace the model: {reason_of(error)}"
        ) from error
    mutating = any(
        isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
        for node in exported.graph.nodes
    )
    if not mutating:
        return exported
    with Later(), quietly(FutureWarning):
        # An empty table functionalizes operators in place and decomposes nothing else.
        return exported.run_decompositions({})


def tied_names(module: nn.Module) -> dict[str, str]:
    """Every parameter and buffer name, mapped to the first name of the same tensor."""
    first: dict[int, str] = {}
    names: list[tuple[str, Tensor]] = list(module.named_parameters(remove_duplicate=False))
    names += list(module.named_buffers(remove_duplicate=False))
    return {name: first.setdefault(id(tensor), name) for name, tensor in names}


def import_or_refuse(where: str, *args: Any) -> Program:
    try:
        program = _import(*args)
        verify(program)
    except IRError as error:
        raise UnsupportedError(
            f"{where}: the traced model is outside einfold's IR: {error}"
        ) from error
    return program


def _import(
    exported: Any,
    info: ModelInfo,
    rename: Callable[[str], str],
    weight: WeightSource,
    input_shapes: Mapping[str, tuple[int | str, ...]],
    output_names: list[str],
    widened: Mapping[torch.dtype, torch.dtype] | None = None,
) -> Program:
    """Rebuilds an exported graph as a program; every type is inferred again.

    `widened` names types that the program computes in others; its inputs and outputs keep theirs.
    """
    wide = dict(widened or {})
    program = Program(info)
    editor = Editor(program)
    signature = exported.graph_signature
    lifted = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    lifted |= signature.inputs_to_lifted_tensor_constants
    mapped: dict[fx.Node, Any] = {}
    reads: dict[str, fx.Node] = {}
    for node in exported.graph.nodes:
        if node.op == "placeholder" and node.name in lifted:
            if not node.users:
                continue
            name = rename(lifted[node.name])
            if name not in reads:
                value = node.meta["val"]
                program.weights.add(name, weight(name, tuple(value.shape), value.dtype))
                reads[name] = editor.read(name)
            mapped[node] = reads[name]
        elif node.op == "placeholder":
            value = node.meta["val"]
            if not isinstance(value, Tensor):
                mapped[node] = value
                continue
            given = editor.input(node.name, input_shapes[node.name], value.dtype)
            mapped[node] = _cast(editor, given, wide.get(value.dtype, value.dtype))
        elif node.op == "call_function":
            if node.target is torch.ops.aten._assert_tensor_metadata.default:
                continue
            args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda n: mapped[n])
            args, kwargs = _widen((args, kwargs), wide)
            if _rounds(node, wide):  # a cast that the module asks for rounds as it does there
                args = (_cast(editor, args[0], node.meta["val"].dtype), *args[1:])
            call = normalise_call(_known(node), args, kwargs)
            mapped[node] = (
                call if isinstance(call, fx.Node) else editor.call(call[0], *call[1], **call[2])
            )
            _check_type(node, mapped[node].meta["val"])
        elif node.op == "output":
            values = [value for value in node.args[0] if isinstance(value, fx.Node)]
            flat = [_cast(editor, mapped[v], v.meta["val"].dtype) for v in values]
            editor.set_output(flat, output_names)
        else:
            raise UnsupportedError(
                f"the trace holds a {node.op} ({node.target}), which einfold does not import"
            )
    remove_dead_nodes(program)
    return program


def _known(node: fx.Node) -> Callable[..., Any]:
    try:
        return find_op(op_name(node.target))
    except IRError:
        raise UnsupportedError(
            f"the trace calls {node.target}{_where(node)}, which einfold does not know"
        ) from None


def _check_type(node: fx.Node, value: Any) -> None:
    """Refuses values that the IR has no type for: complex numbers, and numbers computed from data."""
    for item in value if isinstance(value, (tuple, list)) else (value,):
        if isinstance(item, Tensor) and item.dtype not in DTYPE_NAMES:
            kind = str(item.dtype).removeprefix("torch.")
        elif isinstance(item, (torch.SymFloat, torch.SymBool)):
            kind = "a number that is computed from data"
        else:
            continue
        raise UnsupportedError(
            f"{node.target}{_where(node)} gives {kind}, which einfold has no type for"
        )


def _where(node: fx.Node) -> str:
    """In which part of the module a node was traced."""
    place = str(node.meta.get("nn_module_stack", "")).split("'")[-2:-1]
    return f" in {place[0]}" if place else ""


def name_dims(
    value: Tensor, dims: dict[str, str], given: Mapping[int, str]
) -> tuple[int | str, ...]:
    """The shape of an input; equal dynamic sizes have one name, that of the first axis that was given one."""
    sizes: tuple[Any, ...] = tuple(value.shape)
    names: list[int | str] = []
    for axis, size in enumerate(sizes):
        if not isinstance(size, torch.SymInt):
            names.append(size)
            continue
        own = given.get(axis)
        if str(size) not in dims:
            free = own is not None and own not in dims.values()
            dims[str(size)] = str(own) if free else f"D{len(dims)}"
        names.append(dims[str(size)])
    return tuple(names)


def _widen(arguments: Any, wide: Mapping[torch.dtype, torch.dtype]) -> Any:
    def widened(argument: Any) -> Any:
        return wide.get(argument, argument) if isinstance(argument, torch.dtype) else argument

    return fx.node.map_aggregate(arguments, widened)


def _rounds(node: fx.Node, wide: Mapping[torch.dtype, torch.dtype]) -> bool:
    """Whether a node casts from another type to one that is widened."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or value.dtype not in wide or not is_cast(node.target):
        return False
    source: torch.dtype = node.args[0].meta["val"].dtype  # type: ignore[union-attr]
    return source != value.dtype


def _cast(editor: Editor, value: fx.Node, dtype: torch.dtype) -> fx.Node:
    call = cast(value, dtype)
    return call if isinstance(call, fx.Node) else editor.call(call[0], *call[1], **call[2])


def _check_layers(program: Program, config: Any, source: ModelSource) -> None:
    """Every layer of the model must have come through the attention hook."""
    expected = getattr(config, "num_hidden_layers", None) or getattr(config, "n_layer", None)
    found = [int(node.args[4]) for node in attention_nodes(program)]  # type: ignore[arg-type]
    missing = [layer for layer in range(int(expected or 0)) if layer not in found]
    if not found or missing:
        place = f"layer {missing[0]}" if missing else "the model"
        raise UnsupportedError(_no_hook(source, config, place))


def _check_positions(program: Program, config: Any, source: ModelSource) -> None:
    """Refuses a model that numbers its tokens by itself: each step of a decode would begin at 0 again."""
    positions = program.graph.find_nodes(op="placeholder", target="position_ids")
    counted = list(program.nodes(torch.ops.aten.arange.default, torch.ops.aten.arange.start))
    counted += program.nodes(torch.ops.aten.arange.start_step, torch.ops.aten.cumsum.default)
    size = torch.ops.aten.sym_size.int  # which is the batch's, and tells nothing of places
    if counted and all(user.target is size for node in positions for user in node.users):
        raise UnsupportedError(
            f"{source.location}: architecture {config.model_type!r} numbers its tokens itself, from their "
            "place in the call, and reads no position_ids; steps behind a cache would begin at 0 again"
        )


def _no_hook(source: ModelSource, config: Any, place: str) -> str:
    return (
        f"{source.location}: architecture {config.model_type!r} cannot be compiled: {place} does not run "
        "its attention through transformers' attention interface (a state-space or recurrent layer, or "
        "attention with a bias of its own such as ALiBi), so it cannot be given a cache"
    )
