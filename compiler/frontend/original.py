"""Runs a model as transformers runs it, in float32, on the CPU: what everything else is compared with.

Weights in other types are widened where they are read, or a layer at a time, so that no second copy of the
model is held.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache

from ..ir.manifest import CROSS_MASK, MASK, cross_name
from ..ir.stored import numbers
from ..ir.weights import Weight
from .encoder_decoders import EncoderDecoder
from .encoders import Encoder
from .huggingface import ModelSource, quiet
from .narrow import Narrow, may_stay, stand_in
from .structure import structure

#: Attention functions that stand for the model's own, which is named eager; another one is the user's.
STAND_INS = ("sdpa", "flash", "flex", "paged", "einfold", "kernels")


def original_logits(
    source: ModelSource,
    config: Any,
    state: Mapping[str, Tensor | Weight],
    module: Any,
    ids_BS: Tensor,
    mask_BS: Tensor,
) -> Tensor:
    """Logits [B, S, V] of rows of tokens, of which `mask` tells the real ones from padding in front."""
    positions = (mask_BS.cumsum(-1) - 1).clamp(min=0)
    with running(structure(source, config, state, module), state) as model:
        logits: Tensor = model(
            input_ids=ids_BS, attention_mask=mask_BS, position_ids=positions, use_cache=False
        ).logits
    return logits.float()


def original_outputs(
    source: ModelSource,
    config: Any,
    encoder: Encoder,
    state: Mapping[str, Tensor],
    module: Any,
    inputs: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """What an encoder gives for its `Encoder.inputs`, by name."""
    with running(structure(source, config, state, module, encoder.auto), state) as model:
        found: dict[str, Tensor] = encoder.whole(model, state)(**inputs)
    return {
        name: value.float() if value.is_floating_point() else value for name, value in found.items()
    }


def original_answer(
    source: ModelSource,
    config: Any,
    kind: EncoderDecoder,
    state: Mapping[str, Tensor],
    module: Any,
    inputs: Mapping[str, Tensor],
    ids_BS: Tensor,
) -> tuple[dict[str, Tensor], Tensor]:
    """(what an encoder gives its decoder for its `EncoderDecoder.inputs`, by name; logits [B, S, V] behind
    tokens that were written)."""
    # One of the config's would have as many layers as the encoder has.
    caches = EncoderDecoderCache(DynamicCache(), DynamicCache())
    with running(structure(source, config, state, module, kind.auto), state) as model:
        found = model(**inputs, decoder_input_ids=ids_BS, past_key_values=caches, use_cache=True)
    layers = found.past_key_values.cross_attention_cache.layers
    given = {
        cross_name(layer, part): getattr(kept, f"{part}s").float()
        for layer, kept in enumerate(layers)
        for part in ("key", "value")
    }
    if MASK in inputs:
        given[CROSS_MASK] = inputs[MASK] != 0
    return given, found.logits.float()


@contextmanager
def running(
    model: Any, state: Mapping[str, Tensor | Weight], spelled: bool = True
) -> Iterator[Any]:
    """What `structure` gave, with its data; attention as the model spells it itself, or else by torch's
    function."""
    quiet()
    if spelled and str(model.config._attn_implementation).startswith(STAND_INS):
        model.set_attn_implementation("eager")
    with _filled(model, state), torch.no_grad():
        yield model


@contextmanager
def _filled(model: Any, state: Mapping[str, Tensor | Weight]) -> Iterator[None]:
    """Parameters have their data while what reads them runs: those of a layer, while it does, and linears and
    embeddings in two bytes a part of them at a time. Buffers that a checkpoint holds have theirs."""
    for name, buffer in model.named_buffers():
        if name in state:
            buffer.copy_(numbers(state[name]).detach())
    inside = _of_a_layer(model)
    later: dict[nn.Module, list[tuple[nn.Parameter, Tensor | Weight]]] = {}
    filled, narrow = set[int](), dict[int, Tensor]()
    owners = _owners(model)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        data = state.get(name)
        if data is None or id(parameter) in filled or _is_of(parameter, data):
            continue  # it is shared with the user's module, data and all, or with a parameter before
        filled.add(id(parameter))
        owner = inside.get(id(parameter))
        if isinstance(data, Tensor) and all(may_stay(m, data) for m in owners[id(parameter)]):
            narrow[id(parameter)] = data.detach()
            parameter.data = stand_in(data.shape)
        elif owner is None or _is_there(data):
            parameter.data = _widened(data)
        else:
            later.setdefault(owner, []).append((parameter, data))
    handles, spare = [], defaultdict[torch.Size, list[Tensor]](list)
    for layer, parameters in later.items():
        fill, empty = _turns(parameters, spare)
        handles += [layer.register_forward_pre_hook(fill), layer.register_forward_hook(empty)]
    try:
        with Narrow(narrow) if narrow else nullcontext():
            yield
    finally:
        for handle in handles:
            handle.remove()


def _owners(model: Any) -> Mapping[int, list[nn.Module]]:
    """The modules that have a parameter as their own, by its id."""
    found = defaultdict[int, list[nn.Module]](list)
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            found[id(parameter)].append(module)
    return found


def _of_a_layer(model: Any) -> dict[int, nn.Module | None]:
    """The outermost entry of a list of modules that each parameter is of, by its id; None where it is of
    several, which read it in turn."""
    found: dict[int, nn.Module | None] = {}
    parts: dict[nn.Module, set[int]] = {}
    for layers in model.modules():
        for layer in layers if isinstance(layers, nn.ModuleList) else ():
            for parameter in layer.parameters():
                owner = found.setdefault(id(parameter), layer)
                if owner is None or owner is layer:
                    continue
                if owner not in parts:
                    parts[owner] = {id(module) for module in owner.modules()}
                if id(layer) not in parts[owner]:
                    found[id(parameter)] = None
    return found


def _turns(
    parameters: list[tuple[nn.Parameter, Tensor | Weight]],
    spare: defaultdict[torch.Size, list[Tensor]],
) -> tuple[Callable[..., None], Callable[..., None]]:
    """Hooks that give a layer its data, and take them off again; layers hand on the memory that these lie in,
    which the system would clear for each of them else."""

    def fill(*_: Any) -> None:
        for parameter, data in parameters:
            if isinstance(data, Weight):
                parameter.data = _widened(data)
            else:
                unused = spare[data.shape]
                buffer = (
                    unused.pop()
                    if unused
                    else torch.empty(data.shape, dtype=torch.float32, device="cpu")
                )
                parameter.data = buffer.copy_(data.detach())

    def empty(*_: Any) -> None:
        for parameter, data in parameters:
            if not isinstance(data, Weight):
                spare[data.shape].append(parameter.data)
            parameter.data = stand_in(parameter.shape)

    return fill, empty


def _is_of(parameter: nn.Parameter, data: Tensor | Weight) -> bool:
    return isinstance(data, Tensor) and data.data_ptr() == parameter.data_ptr()


def _is_there(data: Tensor | Weight) -> bool:
    """Whether the data are such that a parameter can have them at no cost."""
    if isinstance(data, Weight):
        return False
    return data.dtype == torch.float32 and data.device.type == "cpu"


def _widened(data: Tensor | Weight) -> Tensor:
    return numbers(data).detach().to("cpu", torch.float32)
