"""What a model brings beside its weights: its tokenizer, and the tokens that begin and end a text."""

from __future__ import annotations

from typing import Any

from transformers import AutoTokenizer, GenerationConfig

from ...errors import ModelError
from .huggingface import ModelSource, first_line


def read_generation_config(source: ModelSource) -> Any:
    """The model's generation_config.json; None where it has none."""
    if source.folder is not None and not (source.folder / "generation_config.json").is_file():
        return None
    try:
        return GenerationConfig.from_pretrained(source.location)
    except Exception as error:
        if source.folder is None:
            return None
        raise ModelError(
            f"{source.folder}/generation_config.json is damaged: {first_line(error)}"
        ) from error


def special_tokens(
    config: Any, generation: Any = None
) -> tuple[tuple[int, ...], int | None, int | None]:
    """(end-of-text ids, begin-of-text id, padding id), from the generation config before the config.

    Raises ModelError for what is no token id.
    """
    found = []
    for key in ("eos_token_id", "bos_token_id", "pad_token_id"):
        value = getattr(generation, key, None)
        value = getattr(config, key, None) if value is None else value
        ids = value if isinstance(value, (list, tuple)) else [] if value is None else [value]
        if any(not isinstance(token, int) or token < 0 for token in ids):
            raise ModelError(f"the model's {key} is {value!r}; it should be a token id, or a list")
        found.append(tuple(ids))
    ends, begins, pads = found
    return ends, begins[0] if begins else None, pads[0] if pads else None


def load_tokenizer(source: ModelSource) -> Any:
    """The model's tokenizer, or None where it has none; one in memory is given its own."""
    if source.in_memory:
        return None
    files = (
        "tokenizer.json",
        "tokenizer.model",
        "vocab.json",
        "spiece.model",
        "tokenizer_config.json",
    )
    if source.folder is not None and not any((source.folder / name).is_file() for name in files):
        return None  # transformers would make an empty one up
    try:
        return AutoTokenizer.from_pretrained(source.location, trust_remote_code=False)
    except Exception:  # absent or of an unknown kind: the artifact then takes token ids
        return None
