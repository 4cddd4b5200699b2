"""The architecture of the model: a small Llama with grouped-query attention."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

#: Trained up to this many tokens at once.
CONTEXT = 2048

#: `<|endoftext|>`: begins, ends and pads.
END_OF_TEXT = 0


def configuration(vocabulary: int) -> LlamaConfig:
    """Four layers, eight query heads over four key/value heads, tied embeddings."""
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=END_OF_TEXT,
        eos_token_id=END_OF_TEXT,
        # Not the same id while training: a padding row of an embedding gets no gradient.
        pad_token_id=None,
    )


def new_model(vocabulary: int, seed: int) -> LlamaForCausalLM:
    """The model with fresh weights in float32."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(configuration(vocabulary))
    model.config.use_cache = False
    return model.float()
