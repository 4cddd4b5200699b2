"""Tiny random models of every architecture that einfold is tested on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM

VOCABULARY = 128
CONTEXT = 256
WINDOW = 16

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GPT_NEOX = {k: v for k, v in _COMMON.items() if k != "num_key_value_heads"}

#: name -> (configuration class, arguments)
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _COMMON),
    "qwen2": ("Qwen2Config", _COMMON),
    "qwen3": ("Qwen3Config", _COMMON | {"head_dim": 16}),
    "mistral": ("MistralConfig", _COMMON | {"sliding_window": WINDOW}),
    "gemma2": ("Gemma2Config", _COMMON | {"head_dim": 16, "sliding_window": WINDOW}),
    "gemma3": (
        "Gemma3TextConfig",
        _COMMON
        | {
            "head_dim": 16,
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "phi3": ("Phi3Config", _COMMON),
    "gpt2": (
        "GPT2Config",
        {
            "vocab_size": VOCABULARY,
            "n_embd": 64,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": CONTEXT,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "gpt_neox": ("GPTNeoXConfig", _GPT_NEOX),
    "opt": (
        "OPTConfig",
        {k: v for k, v in _GPT_NEOX.items() if k != "intermediate_size"}
        | {"ffn_dim": 96, "word_embed_proj_dim": 64},
    ),
    "mixtral": ("MixtralConfig", _COMMON | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "gpt_oss": (
        "GptOssConfig",
        _COMMON
        | {
            "head_dim": 16,
            "sliding_window": WINDOW,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
        },
    ),
}

#: The last two layers attend over the keys and values of the first two, each over those of its own kind.
SHARING: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma4": (
        "Gemma4TextConfig",
        _COMMON
        | {
            "num_hidden_layers": 4,
            "num_kv_shared_layers": 2,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "head_dim": 16,
            "global_head_dim": 32,
            "sliding_window": WINDOW,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": VOCABULARY,
        },
    ),
}

_MOE = _COMMON | {"moe_intermediate_size": 48, "num_experts": 4, "num_experts_per_tok": 2}
#: More models with experts, for what looks at these alone.
EXPERTS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2_moe": ("Qwen2MoeConfig", _MOE | {"shared_expert_intermediate_size": 48}),
    "qwen3_moe": ("Qwen3MoeConfig", _MOE | {"head_dim": 16}),
    "deepseek_v3": (
        "DeepseekV3Config",
        {k: v for k, v in _MOE.items() if k != "num_experts"}
        | {
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "q_lora_rank": 32,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 8,
            "v_head_dim": 16,
        },
    ),
}


def build(name: str, seed: int = 0, **changes: Any) -> Any:
    """A random model, spread widely enough that its logits tell tokens apart."""
    kind, arguments = (CONFIGS | SHARING | EXPERTS)[name]
    torch.manual_seed(seed)
    config = getattr(transformers, kind)(**(arguments | changes))
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.15)
            elif "norm" not in parameter_name or "bias" in parameter_name:
                parameter.normal_(std=0.5)  # biases, sinks
    return model


def save(name: str, folder: Path, **changes: Any) -> Path:
    """The model as a Hugging Face folder."""
    transformers.utils.logging.disable_progress_bar()
    build(name, **changes).save_pretrained(folder)
    return folder


def save_tokenizer(folder: Path, size: int = 300) -> None:
    """A byte-level BPE tokenizer of that many tokens; 0, 1, 2 are <pad>, <bos>, <eos>."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from tokenizers.processors import TemplateProcessing
    from tokenizers.trainers import BpeTrainer
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=size,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the pass key is hidden in the text of the model"] * 4, trainer)
    tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    )
    fast.chat_template = (
        "{% for message in messages %}<{{ message.role }}> {{ message.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant> {% endif %}"
    )
    fast.save_pretrained(folder)
