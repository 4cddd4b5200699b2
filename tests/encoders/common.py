"""Tiny random encoders, made on the spot, and a tokenizer of words for those that read text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor

CONTEXT, VOCABULARY = 64, 128

_SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
_TEXT = _SIZES | {"vocab_size": VOCABULARY, "max_position_embeddings": CONTEXT}

#: name -> (class of the model, arguments of its config)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertModel", _TEXT),
    "classifier": ("BertForSequenceClassification", _TEXT | {"num_labels": 3}),
    "roberta": ("RobertaForTokenClassification", _TEXT | {"pad_token_id": 1}),
    "deberta": (
        "DebertaV2ForMaskedLM",
        _TEXT
        | {
            "num_hidden_layers": 1,
            "relative_attention": True,
            "position_buckets": 8,
            "pos_att_type": ["p2c", "c2p"],
            "norm_rel_ebd": "layer_norm",
            "share_att_key": True,
            "position_biased_input": False,
        },
    ),
    "vit": ("ViTForImageClassification", _SIZES | {"image_size": 32, "patch_size": 8}),
}

WORDS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "a", "cat", "sat", "on", "the", "mat", "here"]


def build(name: str) -> Any:
    """The model of a name, random and always the same."""
    kind, options = MODELS[name]
    model_class = getattr(transformers, kind)
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**options)).eval()
    with torch.no_grad():  # heads begin at almost nothing, where every difference is small
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    return model


def save(name: str, folder: Path, tokenizer: bool = True) -> Path:
    build(name).save_pretrained(folder)
    if tokenizer and MODELS[name][0].startswith(("Bert", "Deberta", "Roberta")):
        save_tokenizer(folder)
    return folder


def save_tokenizer(folder: Path) -> None:
    cut = Tokenizer(
        models.WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token="[UNK]")
    )
    cut.pre_tokenizer = pre_tokenizers.Whitespace()
    special = [("[CLS]", 1), ("[SEP]", 2)]
    cut.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=special
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=cut, **names).save_pretrained(folder)


def save_embedder(folder: Path, poolings: tuple[str, ...] = ("mean_tokens",)) -> Path:
    """A folder as sentence-transformers writes it: a model, pooling, a dense layer, normalisation."""
    save("bert", folder)
    parts = [
        ("", "Transformer"),
        ("1_Pooling", "Pooling"),
        ("2_Dense", "Dense"),
        ("3_N", "Normalize"),
    ]
    listed = [
        {"idx": at, "name": str(at), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for at, (path, kind) in enumerate(parts)
    ]
    (folder / "modules.json").write_text(json.dumps(listed))
    for path, _ in parts[1:]:
        (folder / path).mkdir()
    modes = {
        f"pooling_mode_{name}": name in poolings
        for name in ("cls_token", "max_tokens", "mean_tokens")
    }
    (folder / "1_Pooling" / "config.json").write_text(
        json.dumps({"word_embedding_dimension": 64, **modes})
    )
    sizes = {"in_features": 64 * len(poolings), "out_features": 32, "bias": True}
    activation = "torch.nn.modules.activation.Tanh"
    (folder / "2_Dense" / "config.json").write_text(
        json.dumps(sizes | {"activation_function": activation})
    )
    save_file(dense(64 * len(poolings)), folder / "2_Dense" / "model.safetensors")
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 48}))
    return folder


def dense(width: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(1)
    shapes = {"linear.weight": (32, width), "linear.bias": (32,)}
    return {name: 0.2 * torch.randn(shape, generator=draw) for name, shape in shapes.items()}


def embeddings(
    inputs: Mapping[str, Tensor], poolings: tuple[str, ...] = ("mean_tokens",)
) -> Tensor:
    """What the embedder gives, [B, 32], spelled out row by row."""
    with torch.no_grad():
        tokens = build("bert")(**inputs).last_hidden_state
    rows = []
    for row, mask in zip(tokens, inputs["attention_mask"], strict=True):
        seen = row[mask > 0]
        ways = {"cls_token": row[0], "max_tokens": seen.amax(0), "mean_tokens": seen.mean(0)}
        x = torch.cat(
            [ways[name] for name in ("cls_token", "max_tokens", "mean_tokens") if name in poolings]
        )
        layer = dense(len(x))
        rows.append(torch.tanh(layer["linear.weight"] @ x + layer["linear.bias"]))
    return torch.nn.functional.normalize(torch.stack(rows), dim=-1)


def texts(rows: int, tokens: int) -> dict[str, Tensor]:
    """Random inputs of a text model, every row a token shorter than the one before it."""
    draw = torch.Generator().manual_seed(rows)
    lengths = tokens - torch.arange(rows)
    mask = (torch.arange(tokens) < lengths[:, None]).long()
    ids = torch.randint(4, VOCABULARY, (rows, tokens), generator=draw)
    return {"input_ids": ids * mask, "attention_mask": mask}


def share(found: Any, expected: Any, mask: Any = None) -> float:
    """The largest difference as a share of the largest number, padding left out."""
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape
    if mask is not None and expected.shape[:2] == tuple(mask.shape):
        found, expected = found[np.asarray(mask) > 0], expected[np.asarray(mask) > 0]
    return float(np.abs(found - expected).max() / np.abs(expected).max())
