"""What a model brings beside its weights: its tokenizer, and the tokens that begin and end a text."""

from __future__ import annotations

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tokenizers import Tokenizer as FastTokenizer
from transformers import AutoTokenizer, GenerationConfig

from ...errors import ModelError, first_line, pass_on
from ..ir.manifest import Begin
from .huggingface import ModelSource

#: Any of these says that a folder holds a tokenizer.
_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "tokenizer_config.json",
)

#: What an artifact keeps of a tokenizer; the first is the tokenizer itself.
_SAVED = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def read_generation_config(source: ModelSource) -> Any:
    """The model's generation_config.json; None where it has none."""
    if source.file is not None:
        return None
    if source.folder is not None and not (source.folder / "generation_config.json").is_file():
        return None
    try:
        return GenerationConfig.from_pretrained(source.location, local_files_only=source.local_only)
    except Exception as error:
        pass_on(error)
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


#: What a generation config asks for that only a search, or rules beside the likeliest token, would do.
_SEARCHES = {
    "num_beams": 1,
    "num_return_sequences": 1,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "min_length": 0,
    "min_new_tokens": 0,
    "bad_words_ids": None,
    "forced_eos_token_id": None,
    "do_sample": False,
}


def ignored_in_generation(generation: Any) -> list[str]:
    """A note where an encoder-decoder's generation config asks for more than greedy decoding."""
    asked = {name: getattr(generation, name, None) for name in _SEARCHES}
    ignored = [
        f"{name} {value}"
        for name, value in asked.items()
        if value is not None and value is not False and value != _SEARCHES[name]
    ]
    if not ignored:
        return []
    return [
        f"generation_config.json asks for {', '.join(ignored)}: einfold takes the likeliest token, or draws "
        "one where it is told to, and has no beam search"
    ]


def begin(source: ModelSource, config: Any, generation: Any = None) -> Begin:
    """How an encoder-decoder begins to write: its start token, then one that is forced; and what it never
    writes. Raises ModelError where nothing says how."""

    def asked(key: str) -> Any:
        value = getattr(generation, key, None)
        return getattr(config, key, None) if value is None else value

    def listed(key: str) -> tuple[int, ...]:
        value = asked(key)
        found = value if isinstance(value, (list, tuple)) else [] if value is None else [value]
        if any(not isinstance(token, int) or token < 0 for token in found):
            raise ModelError(f"the model's {key} is {value!r}; it should be a token id, or a list")
        return tuple(found)

    start = listed("decoder_start_token_id") or listed("bos_token_id")
    if len(start) != 1:
        raise ModelError(
            f"{source.location}: neither generation_config.json nor config.json names one "
            "decoder_start_token_id, which an answer begins with"
        )
    size = int(config.vocab_size)
    suppressed, first = (
        tuple(token for token in listed(key) if token < size)
        for key in ("suppress_tokens", "begin_suppress_tokens")
    )
    tokens = (*start, *listed("forced_bos_token_id")[:1])
    return Begin(tokens=tokens, never=suppressed, never_first=first)


def load_tokenizer(source: ModelSource) -> tuple[Any, str]:
    """(the model's tokenizer, "") or (None, why there is none); one in memory is given its own."""
    if source.in_memory:
        return None, "none was given with the model"
    found = [name for name in _FILES if source.folder is None or (source.folder / name).is_file()]
    if not found:
        return None, "the model has none"  # transformers would make an empty one up
    try:
        if source.file is not None:
            return _tokenizer_of(source.file), ""
        return AutoTokenizer.from_pretrained(
            source.location, trust_remote_code=False, local_files_only=source.local_only
        ), ""
    except Exception as error:  # of an unknown kind, or it needs a package
        pass_on(error)
        return None, f"transformers cannot load it: {first_line(error)}"


def _tokenizer_of(gguf: Path) -> Any:
    """The tokenizer in a GGUF. It is linked into a folder of its own: what lies beside it is of others."""
    with TemporaryDirectory() as alone:
        (Path(alone) / gguf.name).symlink_to(gguf.resolve())
        return AutoTokenizer.from_pretrained(alone, gguf_file=gguf.name, local_files_only=True)


def save_tokenizer(source: ModelSource, tokenizer: Any, folder: Path) -> str:
    """Has transformers write the fast tokenizer as it runs it, which its files alone may not tell.

    A model may have none: its artifact then takes token ids. Files that transformers cannot read are
    copied. Raises ModelError for one that is damaged.
    """
    reason = ""
    if tokenizer is None:
        tokenizer, reason = load_tokenizer(source)
    if tokenizer is None:
        if source.folder is None or not (source.folder / _SAVED[0]).is_file():
            return f"none: {reason}"
        return _copy_tokenizer(source.folder, folder)
    with TemporaryDirectory(dir=folder) as staging:
        tokenizer.save_pretrained(staging)
        for name in _SAVED:
            if (Path(staging) / name).is_file():
                (Path(staging) / name).rename(folder / name)
    if not (folder / _SAVED[0]).is_file():
        return f"none: {type(tokenizer).__name__} has no fast form that could be written"
    return "written by transformers"


def _copy_tokenizer(source: Path, folder: Path) -> str:
    for name in _SAVED:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    try:
        FastTokenizer.from_file(str(folder / _SAVED[0]))
    except Exception as error:  # the library raises a bare Exception
        pass_on(error)
        raise ModelError(f"{source}/{_SAVED[0]} is damaged: {error}") from error
    return "copied from the model"
