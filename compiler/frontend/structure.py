"""The module that is traced: a copy of the user's own where it is in memory, else built from the config.

Either is in float32, on the CPU, and in evaluation mode. A weight that is stored otherwise has no data here:
it takes no memory, and the weights' data come by name.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.initialization import no_init_weights

from ...errors import ModelError, UnsupportedError, first_line, pass_on
from ..ir.weights import Weight
from . import hooks
from .huggingface import ModelSource, quiet

#: The class of transformers that builds causal language models.
CAUSAL = "AutoModelForCausalLM"
_KINDS = {
    CAUSAL: "causal language model",
    "AutoModelForSeq2SeqLM": "encoder-decoder",
    "AutoModelForSpeechSeq2Seq": "encoder-decoder",
}


def structure(
    source: ModelSource,
    config: Any,
    state: Mapping[str, Tensor | Weight] | None = None,
    module: Any = None,
    auto: str = CAUSAL,
) -> Any:
    """A module that computes what the model does; `state` holds the weights of one that is loaded, `auto` is
    the class of transformers that builds it.

    Raises UnsupportedError for what cannot be built, and ModelError for a module that cannot be copied.
    """
    _check_rope(config, source)
    if module is not None:
        return _copy(module, source)
    built = _build(config, source, auto)
    if state is not None:
        _tie_like(built, state)
    return built


def parameter_count(model: Any) -> int:
    """Parameters of a structure, shared ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def _copy(module: Any, source: ModelSource) -> Any:
    """The user's module with all that it has grown: other heads, biases, activations, hooks, numbers.

    Weights in float32 on the CPU are shared with it.
    """
    known: dict[int, Any] = {}
    for part in module.modules():
        for tensor in vars(part).values():  # such as the weight that a norm of weights computes
            if isinstance(tensor, Tensor):
                known[id(tensor)] = _in_float32(tensor)
    known |= {id(buffer): _in_float32(buffer) for buffer in module.buffers()}
    known |= {id(parameter): _hollow(parameter) for parameter in module.parameters()}
    try:
        return copy.deepcopy(module, known).eval()
    except Exception as error:
        pass_on(error)
        raise ModelError(
            f"{source.name}: the module in memory cannot be copied to be traced ({first_line(error)}); "
            "take off what is no part of the model"
        ) from error


def _in_float32(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().to("cpu", copy=True)
    return tensor.float() if tensor.is_floating_point() else tensor


def _hollow(parameter: nn.Parameter) -> nn.Parameter:
    """The parameter in float32 on the CPU, without data unless that is what it is."""
    if parameter.dtype == torch.float32 and parameter.device.type == "cpu":
        return parameter
    return nn.Parameter(torch.zeros(()).expand(parameter.shape), requires_grad=False)


def _build(config: Any, source: ModelSource, auto: str) -> Any:
    quiet()
    config = copy.deepcopy(config)  # what is built writes to it
    try:
        with hooks.hollow_parameters(), no_init_weights():
            model = getattr(transformers, auto).from_config(config, dtype=torch.float32)
            model.tie_weights()  # left out under no_init_weights; a tied head would be stored twice
    except Exception as error:
        pass_on(error)
        if "written-to tensor" in str(error):  # torch's words for a tensor that takes no memory
            raise UnsupportedError(
                f"{source.location}: architecture {config.model_type!r} writes into its weights while it is "
                "built, so it cannot be built without them; load it with transformers and give einfold the "
                "model object"
            ) from error
        raise UnsupportedError(
            f"{source.location}: architecture {getattr(config, 'model_type', '?')!r} "
            f"is no {_KINDS.get(auto, 'encoder')} that can be built: {first_line(error)}"
        ) from error
    return model.eval()


def _tie_like(model: Any, state: Mapping[str, Tensor | Weight]) -> None:
    """Parameters are shared where the loaded ones are, whatever the config says: a checkpoint may bring a
    head of its own where the config ties it to the embedding."""
    first: dict[int, nn.Parameter] = {}
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if name not in state:
            continue
        taken = any(parameter is other for other in first.values())
        own = nn.Parameter(parameter.detach(), requires_grad=False) if taken else parameter
        shared = first.setdefault(id(state[name]), own)
        owner, _, last = name.rpartition(".")
        setattr(model.get_submodule(owner), last, shared)


def _check_rope(config: Any, source: ModelSource) -> None:
    """Refuses rotary forms whose tables change while a text grows."""
    for rope in _rope_settings(config):
        kind = rope.get("rope_type", "default")
        if kind in ("dynamic", "longrope"):
            raise UnsupportedError(
                f"{source.location}: rotary type {kind!r} changes its frequencies with the length of the "
                "text, which a table fixed at compile time cannot follow"
            )


def _rope_settings(config: Any) -> list[dict[str, Any]]:
    parameters = getattr(config, "rope_parameters", None) or {}
    if not isinstance(parameters, dict):
        return []
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    return nested or [parameters]
