"""Capture of an encoder-decoder as two programs, in one trace each."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from transformers import DynamicCache, EncoderDecoderCache
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import BaseModelOutput

from ...errors import UnsupportedError
from ..ir.manifest import CROSS_MASK, cross_name
from ..ir.program import ModelInfo, Program, attention_nodes
from . import hooks
from .encoder_decoders import EncoderDecoder
from .encoders import capture_reader, first_names, result_entries, without_what_is_dead
from .export import export, import_or_refuse, named_weights, vocabulary_of
from .huggingface import ModelSource
from .relative import by_distance, by_pair
from .structure import structure

#: The name of the tokens of the encoder's input in the decoder's types.
READ = "T"


class _Passing(DynamicCache):  # type: ignore[misc]
    """A cache that keeps nothing: keys and values go through, and are told of by layer."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, tuple[Tensor, Tensor]] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        self.seen[layer_idx] = key_states, value_states
        return key_states, value_states


class _Reads(nn.Module):
    """The encoder, and behind it the projections of each cross-attention: its results are the decoder's."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        input_features: Tensor | None = None,
    ) -> dict[str, Tensor]:
        given = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "input_features": input_features,
        }
        inputs = {name: value for name, value in given.items() if value is not None}
        read = self.model.get_encoder()(**inputs, return_dict=True).last_hidden_state
        cross = _Passing()
        caches = EncoderDecoderCache(_Passing(), cross)
        for module in _cross_attention(self.model.get_decoder()).values():
            module(read[:, :1], key_value_states=read, past_key_values=caches)
        results = {} if attention_mask is None else {CROSS_MASK: attention_mask != 0}
        for layer, pair in sorted(cross.seen.items()):
            for part, value in zip(("key", "value"), pair, strict=True):
                results[cross_name(layer, part)] = value
        return results


def _cross_attention(decoder: nn.Module) -> dict[int, nn.Module]:
    """Of each layer the attention that stands behind that to itself: whether it is the one that reads what an
    encoder made shows when the decoder is traced."""
    found: dict[int, nn.Module] = {}
    for module in decoder.modules():
        takes = inspect.signature(module.forward).parameters
        layer = getattr(module, "layer_idx", None)
        if isinstance(layer, int) and {"key_value_states", "past_key_values"} <= takes.keys():
            found[layer] = module
    return found


class _Writes(nn.Module):
    """The decoder as a function of tokens and positions, and of what the encoder gave."""

    def __init__(self, model: Any, tables: Sequence[Tensor]) -> None:
        super().__init__()
        self.model = model
        self.crossing = hooks.Crossing(tables)

    def forward(self, input_ids: Tensor, position_ids: Tensor, given: dict[str, Tensor]) -> Tensor:
        pairs: dict[int, tuple[Tensor, Tensor]] = {}
        while cross_name(len(pairs), "key") in given:
            layer = len(pairs)
            pairs[layer] = given[cross_name(layer, "key")], given[cross_name(layer, "value")]
        cross = DynamicCache()
        for key, value in pairs.values():
            layer_cache = DynamicLayer()
            layer_cache.keys, layer_cache.values, layer_cache.is_initialized = key, value, True
            cross.layers.append(layer_cache)
        caches = EncoderDecoderCache(_Passing(), cross)
        caches.is_updated = dict.fromkeys(pairs, True)
        first = pairs[0][0]
        nothing = first.new_zeros(first.shape[0], first.shape[2], 1)  # read for its sizes alone
        decoder = self.model.get_decoder()
        keys = {layer: key for layer, (key, _) in pairs.items()}
        with self.crossing.on(keys, given.get(CROSS_MASK)), _placed(decoder, position_ids):
            logits: Tensor = self.model(
                encoder_outputs=BaseModelOutput(last_hidden_state=nothing),
                decoder_input_ids=input_ids,
                past_key_values=caches,
                use_cache=True,  # Whisper hands its cache on only then
            ).logits
        return logits


class _placed:
    """Learned or sinusoidal positions of a decoder are read at these places, and not counted from 0."""

    def __init__(self, decoder: nn.Module, position_ids: Tensor) -> None:
        table = getattr(decoder, "embed_positions", None)
        takes = table is not None and "position_ids" in inspect.signature(table.forward).parameters
        self._table = table if takes else None
        self._positions = position_ids

    def __enter__(self) -> None:
        if self._table is None:
            return
        plain = self._table.forward

        def forward(ids: Any, *args: Any, **keywords: Any) -> Any:
            # Models number the tokens of one row, for all rows alike.
            flat = plain(ids, *args, **(keywords | {"position_ids": self._positions.reshape(-1)}))
            return flat.reshape(*self._positions.shape, flat.shape[-1])

        self._table.forward = forward

    def __exit__(self, *_: object) -> None:
        if self._table is not None:
            del self._table.forward


def capture_encoder_decoder(
    source: ModelSource,
    config: Any,
    kind: EncoderDecoder,
    context: int,
    state: Mapping[str, Tensor] | None = None,
    module: Any = None,
) -> Program:
    """The decoder as a program of (input_ids [B, S], position_ids [B, S], what the encoder gives) -> logits
    [B, S, V], with the encoder as its `encoder`, both in float32. `state` and `module` are as for language
    models.

    Raises UnsupportedError, naming the layer, for what the hooks or the trace cannot express.
    """
    skeleton = structure(source, config, state, module, kind.auto)
    encoder = _capture_encoder(source, config, kind, context, skeleton, state)
    hooks.install(skeleton)
    program = _capture_decoder(source, config, context, skeleton, state, encoder)
    program.encoder = encoder
    return program


def _capture_encoder(
    source: ModelSource,
    config: Any,
    kind: EncoderDecoder,
    context: int,
    skeleton: Any,
    state: Mapping[str, Tensor] | None,
) -> Program:
    if not _cross_attention(skeleton.get_decoder()):
        raise UnsupportedError(_no_hook(source, config, "decoder's attention to its encoder"))
    limit = context if kind.reads_text else 0
    with by_pair(skeleton.get_encoder(), context):
        return capture_reader(
            source, config, _Reads(skeleton).eval(), skeleton, kind.inputs(config), limit, state
        )


def _capture_decoder(
    source: ModelSource,
    config: Any,
    context: int,
    skeleton: Any,
    state: Mapping[str, Tensor] | None,
    encoder: Program,
) -> Program:
    shapes = cross_shapes(encoder)
    sizes = {"B": torch.export.Dim("B")}
    sizes |= {size: torch.export.Dim(size, max=context) for size in ("S", READ)}
    batch, length, read = 2, 7, 9
    known = {"B": batch, READ: read}
    given = {
        name: torch.zeros([known.get(size, size) for size in shape], dtype=dtype)  # type: ignore[arg-type]
        for name, (dtype, shape) in shapes.items()
    }
    ids = torch.zeros(batch, length, dtype=torch.long)
    positions = torch.arange(length).expand(batch, length).contiguous()
    by_token = {0: sizes["B"], 1: sizes["S"]}
    beside = {
        name: {axis: sizes[size] for axis, size in enumerate(shape) if isinstance(size, str)}
        for name, (_, shape) in shapes.items()
    }
    with by_distance(skeleton.get_decoder(), context) as tables:
        whole = _Writes(skeleton, tables).eval()
        exported = export(
            whole, (ids, positions, given), (by_token, by_token, beside), source.location
        )
    without_what_is_dead(exported.graph)
    _name_inputs(exported.graph)
    info = ModelInfo(
        architecture=str(config.model_type),
        vocabulary=vocabulary_of(exported, source),
        context=context,
        hidden=int(skeleton.get_input_embeddings().weight.shape[1]),
    )
    inputs: dict[str, tuple[int | str, ...]] = dict.fromkeys(
        ("input_ids", "position_ids"), ("B", "S")
    )
    program = import_or_refuse(
        source.location,
        exported,
        info,
        first_names(whole),
        named_weights(source, skeleton, exported, state),
        inputs | {name: shape for name, (_, shape) in shapes.items()},
        ["logits"],
    )
    crossing = whole.crossing.modules
    _check_layers(program, crossing, _cross_attention(skeleton.get_decoder()), source, config)
    return program


def cross_shapes(encoder: Program) -> dict[str, tuple[torch.dtype, tuple[int | str, ...]]]:
    """(type, sizes) of what an encoder gives its decoder, by name; B rows of T tokens that were read."""
    found: dict[str, tuple[torch.dtype, tuple[int | str, ...]]] = {}
    values: Any = encoder.output.args[0]
    for entry, node in zip(result_entries(encoder), values, strict=True):
        sizes = tuple(
            int(size) if size.isdecimal() else {"S": READ}.get(size, size) for size in entry.shape
        )
        found[entry.name] = node.meta["val"].dtype, sizes
    return found


def _name_inputs(graph: fx.Graph) -> None:
    """The tensors of the table `given` are inputs by the names that they have in it."""
    for node in graph.find_nodes(op="placeholder"):
        node.name = node.name.removeprefix("given_")


def _check_layers(
    program: Program,
    crossed: Mapping[int, nn.Module],
    projected: Mapping[int, nn.Module],
    source: ModelSource,
    config: Any,
) -> None:
    """Every layer's attention, to itself and to the encoder, must have come through the hook, and positions
    are those that are given."""
    own = {int(node.args[4]) for node in attention_nodes(program)}  # type: ignore[arg-type]
    missing = [
        layer
        for layer, module in projected.items()
        if layer not in own or crossed.get(layer) is not module
    ]
    if missing or not own:
        place = f"attention in layer {missing[0] if missing else 0}"
        raise UnsupportedError(_no_hook(source, config, f"decoder's {place}"))
    relative = all(call.args[8:] for call in attention_nodes(program))
    if not relative and not program.placeholder("position_ids").users:
        raise UnsupportedError(
            f"{source.location}: architecture {program.model.architecture!r} numbers the tokens that it "
            "writes itself, from their place in the call; steps behind a cache would begin at 0 again"
        )


def _no_hook(source: ModelSource, config: Any, what: str) -> str:
    return (
        f"{source.location}: architecture {config.model_type!r} cannot be compiled: its {what} does not run "
        "through transformers' attention interface and caches, so it cannot be given a cache"
    )


__all__ = ["READ", "capture_encoder_decoder", "cross_shapes"]
