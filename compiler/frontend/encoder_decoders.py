"""Encoder-decoders of transformers (T5, BART and its kin, Whisper): what builds them and what they read.

Two programs are captured of one (`two_programs.py`): the encoder reads its input once and gives the keys and
values of every cross-attention of the decoder, whose projections run there; the decoder is a language model
like any other, beside which these stay the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import transformers
from transformers.models.auto import modeling_auto

from ...errors import RecipeError, UnsupportedError
from ..ir.manifest import MASK, TensorEntry
from .huggingface import ModelSource, context_limit

#: The classes of transformers that build encoder-decoders, with the input of each and the table of what it
#: builds for a type of model.
_TASKS = {
    "AutoModelForSeq2SeqLM": ("input_ids", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES"),
    "AutoModelForSpeechSeq2Seq": ("input_features", "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES"),
}

#: Tokens of an input, and of an answer, for a model whose config names no limit.
DEFAULT_CONTEXT = 2048


@dataclass(frozen=True)
class EncoderDecoder:
    """How transformers builds an encoder-decoder, and what it reads."""

    auto: str
    """The class that builds it, of those called Auto in transformers."""
    model_class: Any

    @property
    def reads_text(self) -> bool:
        return self.main == "input_ids"

    @property
    def main(self) -> str:
        """The input that every call gives."""
        return _TASKS[self.auto][0]

    def inputs(self, config: Any) -> tuple[TensorEntry, ...]:
        """What the encoder is given: tokens [B, S] and their mask, or a spectrogram [B, bins, frames]."""
        if self.reads_text:
            count = int(config.vocab_size)
            return (
                TensorEntry(name=self.main, dtype="i64", shape=("B", "S"), below=count),
                TensorEntry(name=MASK, dtype="i64", shape=("B", "S"), below=2),
            )
        # The second convolution takes every other frame.
        shape = ("B", str(int(config.num_mel_bins)), str(2 * int(config.max_source_positions)))
        return (TensorEntry(name=self.main, dtype="f32", shape=shape),)

    def context(self, source: ModelSource, config: Any, wanted: int | None) -> int:
        """Tokens that are written at most; of text also those that are read. Raises RecipeError where the
        model has fewer than are wanted."""
        names = ("max_target_positions", "max_position_embeddings")
        limits = [int(getattr(config, name, None) or 0) for name in names]
        limit = next(filter(None, limits), 0)
        if wanted is not None and limit and wanted > limit:
            raise RecipeError(
                f"context {wanted} is longer than the {limit} tokens that {source.location} was made for"
            )
        # T5 names the length that it was trained on, and its positions are relative: they have no end.
        return wanted or limit or context_limit(config) or DEFAULT_CONTEXT


def find_encoder_decoder(
    source: ModelSource, config: Any, architectures: list[str]
) -> EncoderDecoder | None:
    """The encoder-decoder that a config and its named architectures are of; None for another model.

    Raises UnsupportedError, with what is missing, for one that is not compiled.
    """
    named = [
        name for name in architectures if any(name in _names(table) for _, table in _TASKS.values())
    ]
    if not named and not getattr(config, "is_encoder_decoder", False):
        return None
    for auto, (main, table) in _TASKS.items():
        built = getattr(modeling_auto, table).get(config.model_type)
        if built not in architectures and (architectures or built is None):
            continue
        found = EncoderDecoder(auto, getattr(transformers, str(built)))
        reads = getattr(found.model_class, "main_input_name", "input_ids")
        if reads != main or (main == "input_features" and not _reads_spectrograms(config)):
            raise UnsupportedError(
                f"{source.location}: {built} is an encoder-decoder that reads {reads}; einfold compiles "
                "those of tokens (input_ids) and of spectrograms of one length, as Whisper's (input_features)"
            )
        if not isinstance(getattr(config, "vocab_size", None), int):
            raise UnsupportedError(
                f"{source.location}: {built} is put together of two models with a config each; einfold "
                "compiles encoder-decoders that are one model, such as T5, BART and Whisper"
            )
        return found
    name = (architectures or [config.model_type])[0]
    raise UnsupportedError(
        f"{source.location}: {name} is an encoder-decoder, of which einfold compiles those that write text "
        "behind an encoder of text or sound (T5ForConditionalGeneration and its like), and no other heads, "
        "and none whose encoder or decoder reads images"
    )


def _reads_spectrograms(config: Any) -> bool:
    return all(hasattr(config, name) for name in ("num_mel_bins", "max_source_positions"))


def _names(table: str) -> set[str]:
    return {name for name in getattr(modeling_auto, table).values() if isinstance(name, str)}


__all__ = ["EncoderDecoder", "find_encoder_decoder"]
