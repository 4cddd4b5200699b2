"""What a model's config tells of it beside its sizes: whether einfold compiles it, and what is not read."""

from __future__ import annotations

import json
from typing import Any

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ...errors import UnsupportedError, pass_on
from .encoder_decoders import EncoderDecoder, find_encoder_decoder
from .encoders import Encoder, find_encoder
from .huggingface import ModelSource
from .sentence import MODULES, read_head
from .vision import TextPart, find_text_part

#: Keys of a config.json that say nothing about what the model computes.
_SAID = {"transformers_version", "torch_dtype", "dtype", "_name_or_path", "auto_map", "use_cache"}
_SAID |= {"quantization_config"}


def read_folder(
    source: ModelSource, config: Any
) -> tuple[Encoder | EncoderDecoder | TextPart | None, list[str]]:
    """(the encoder or encoder-decoder that a folder holds, or the text part of a model of images, None for a
    causal language model; what is to be noted of its config.json). Raises UnsupportedError where it is of
    another model."""
    raw = _raw_config(source)
    found = raw.get("architectures")
    architectures = [str(name) for name in found] if isinstance(found, list) else []
    pair = find_encoder_decoder(source, config, architectures)
    head = read_head(source.folder)
    part = None if pair is not None else find_text_part(source, config, architectures)
    encoder = None
    if pair is None and part is None:
        encoder = find_encoder(source, config, architectures, head)
    stock = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    if encoder is not None:
        stock = encoder.model_class.__name__
    if pair is not None:
        stock = pair.model_class.__name__
    if part is not None:
        stock = part.architecture
    notes = _own_code(source, raw.get("auto_map"), architectures, stock)
    if encoder is not None:
        notes += head.notes if head is not None else _of_hub(source)
    elif head is not None:
        notes.append(
            f"{MODULES} asks for one embedding of a text, and architectures in config.json for "
            f"{', '.join(architectures)}: the language model is compiled, and {MODULES} not read"
        )
    known = set(type(config)().to_dict()) | set(getattr(config, "attribute_map", {})) | _SAID
    unknown = sorted(set(raw) - known)
    if unknown:
        notes.append(
            f"config.json sets {', '.join(unknown)}, which transformers' {type(config).__name__} does not "
            "know and nothing reads"
        )
    if part is not None:
        notes.append(part.note)
    return pair or part or encoder, notes


def _of_hub(source: ModelSource) -> list[str]:
    if source.folder is not None or source.file is not None or source.in_memory:
        return []
    return [
        f"the model of {source.name} alone is compiled: the parts of an embedder of sentences, which "
        f"{MODULES} lists, are read from a folder, not from the hub"
    ]


def _raw_config(source: ModelSource) -> dict[str, Any]:
    if source.folder is None:
        return {}
    try:
        raw = json.loads((source.folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        pass_on(error)
        return {}
    return raw if isinstance(raw, dict) else {}


def _own_code(
    source: ModelSource, auto_map: Any, architectures: list[str], stock: str | None
) -> list[str]:
    """A note where the folder brings code for a class that transformers has; refused where it has it not."""
    if not isinstance(auto_map, dict):
        return []
    code = auto_map.get("AutoModelForCausalLM") or auto_map.get("AutoModel")
    if not isinstance(code, str):
        return []
    own = code.rpartition(".")[2]
    named = [*architectures, own] if "AutoModelForCausalLM" in auto_map else architectures
    other = next((name for name in named if name != stock), None)
    if other is not None:
        raise UnsupportedError(
            f"{source.location}: config.json names code of the folder's own ({code}), which einfold does not "
            f"run, and {other} is not transformers' {stock}; load the model with transformers, if you trust "
            "it (trust_remote_code=True), and give einfold the model object"
        )
    return [
        f"config.json names code of the folder's own ({code}), which was not run: transformers' {stock} was "
        "compiled in its place"
    ]
