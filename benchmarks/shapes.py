"""The models that are measured: real shapes, random weights, stored in bfloat16 as checkpoints are.

Speed does not depend on what the weights say, so nothing needs to be downloaded. Run as a script
this writes one folder: `python -m benchmarks.shapes NAME FOLDER`.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: Ids that the small tokenizer of these folders knows; the rest of the vocabulary has no text.
BYTES = 256


@dataclass(frozen=True)
class Shape:
    """A model by the fields of its Hugging Face config."""

    title: str
    model_type: str
    config: dict[str, Any]

    small: bool = True


SHAPES = {
    "qwen2.5-0.5b": Shape(
        "Qwen2.5-0.5B",
        "qwen2",
        {
            "vocab_size": 151936,
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "max_position_embeddings": 32768,
            "rope_theta": 1e6,
        },
    ),
    # Without the frequency scaling of the real model, which costs no time.
    "llama-3.2-1b": Shape(
        "Llama-3.2-1B",
        "llama",
        {
            "vocab_size": 128256,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "max_position_embeddings": 131072,
            "rope_theta": 5e5,
        },
        small=False,
    ),
    # For trying out the benchmark itself: its figures mean nothing.
    "tiny": Shape(
        "tiny",
        "qwen2",
        {
            "vocab_size": 512,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 1024,
            "rope_theta": 1e4,
        },
    ),
}


def config_of(name: str) -> Any:
    """The transformers config of a shape; head and embedding are one weight, as in the real models."""
    from transformers import AutoConfig

    shape = SHAPES[name]
    return AutoConfig.for_model(
        shape.model_type, tie_word_embeddings=True, bos_token_id=0, eos_token_id=1, **shape.config
    )


def write_model(name: str, folder: Path) -> None:
    """Writes a model folder: config, bfloat16 weights of scale 0.02, a tokenizer of single bytes."""
    import torch
    from transformers import AutoModelForCausalLM

    config = config_of(name)
    config.dtype = torch.bfloat16
    torch.manual_seed(0)
    # Straight into bfloat16: the usual way would first make the model in float32.
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for key, value in model.named_parameters():
            if key.endswith("norm.weight"):
                value.fill_(1.0)
            else:
                value.normal_(0.0, 0.02)
    model.tie_weights()
    model.save_pretrained(folder)
    _write_tokenizer(folder)


def _write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    assert len(letters) == BYTES
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save(str(folder / "tokenizer.json"))
    data = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 32768}
    (folder / "tokenizer_config.json").write_text(json.dumps(data), encoding="utf-8")


if __name__ == "__main__":
    write_model(sys.argv[1], Path(sys.argv[2]))
