"""Tiny random encoder-decoders, made on the spot, and what transformers makes of an input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import DynamicCache, EncoderDecoderCache

CONTEXT, VOCABULARY = 64, 96

#: Of random models, which else repeat themselves.
PENALTY = 3.0

_T5: dict[str, Any] = {
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 96,
    "num_layers": 1,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "vocab_size": VOCABULARY,
    "n_positions": CONTEXT,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12,
    "decoder_start_token_id": 0,
}
_BART: dict[str, Any] = {
    "d_model": 64,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "vocab_size": VOCABULARY,
    "forced_eos_token_id": None,
}

#: name -> (class of the model, arguments of its config)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": (
        "T5ForConditionalGeneration",
        _T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    ),
    "t5-tied": ("T5ForConditionalGeneration", _T5 | {"feed_forward_proj": "relu"}),
    "bart": ("BartForConditionalGeneration", _BART | {"max_position_embeddings": CONTEXT}),
    "mbart": ("MBartForConditionalGeneration", _BART | {"max_position_embeddings": CONTEXT}),
    "whisper": (
        "WhisperForConditionalGeneration",
        _BART
        | {
            "num_mel_bins": 8,
            "max_source_positions": 20,
            "max_target_positions": CONTEXT,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 1,
            "begin_suppress_tokens": [5, 6],
            "suppress_tokens": [58, 48, 64],
        },
    ),
}

WORDS = ["<pad>", "</s>", "<unk>", "a", "cat", "sat", "on", "the", "mat", "here"]


def build(name: str, noise: float = 0.2) -> Any:
    """The model of a name, random and always the same. With much noise its attention is sharp."""
    kind, options = MODELS[name]
    model_class = getattr(transformers, kind)
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(noise * torch.randn(parameter.shape))
    return model


def save(name: str, folder: Path, tokenizer: bool = False, noise: float = 0.2) -> Path:
    build(name, noise).save_pretrained(folder)
    if tokenizer:
        words = {word: place for place, word in enumerate(WORDS)}
        cut = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
        cut.pre_tokenizer = pre_tokenizers.Whitespace()
        cut.post_processor = processors.TemplateProcessing(
            single="$A </s>", special_tokens=[("</s>", 1)]
        )
        special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
        made = transformers.PreTrainedTokenizerFast(tokenizer_object=cut, **special)
        made.save_pretrained(folder)
    return folder


def inputs(name: str, rows: int = 2, tokens: int = 11) -> dict[str, Any]:
    """Random inputs as tensors; each text but the first has padding behind it."""
    draw = torch.Generator().manual_seed(rows)
    if name == "whisper":
        return {"input_features": torch.randn(rows, 8, 40, generator=draw)}
    mask = (torch.arange(tokens) < (tokens - 4 * torch.arange(rows))[:, None]).long()
    ids = torch.randint(4, VOCABULARY, (rows, tokens), generator=draw)
    return {"input_ids": ids * mask, "attention_mask": mask}


def arrays(given: dict[str, Any]) -> dict[str, Any]:
    return {key: value.numpy() for key, value in given.items()}


def greedy(model: Any, given: dict[str, Any], new: int) -> list[list[int]]:
    """What transformers' plain `generate` writes, no early end, and not one token again and again."""
    options: dict[str, Any] = {"max_new_tokens": new, "do_sample": False, "eos_token_id": None}
    options["repetition_penalty"] = PENALTY
    options["past_key_values"] = no_cache()
    with torch.no_grad():
        written = transformers.GenerationMixin.generate(model, **given, **options)
    return [row[1:] for row in written.tolist()]


def no_cache() -> Any:
    """An empty cache for transformers; one of the config's would have as many layers as the encoder has."""
    return EncoderDecoderCache(DynamicCache(), DynamicCache())


def logits(model: Any, given: dict[str, Any], answers: Any) -> Any:
    with torch.no_grad():
        return model(**given, decoder_input_ids=torch.tensor(answers)).logits.numpy()


def share(found: Any, expected: Any) -> float:
    """The largest difference as a share of the largest number."""
    return float(np.abs(found - expected).max() / np.abs(expected).max())
