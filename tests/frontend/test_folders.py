"""Folders that hold something else than their config seems to say: merged, noted or refused by its name."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import einfold
from einfold.compiler.driver import open_model, wrap_model
from einfold.compiler.frontend.export import capture_language_model
from einfold.errors import EinfoldError, ModelError, UnsupportedError

from .. import models
from ..greedy import all_logits
from ..quick import rarely

IDS = [3 + (place * 37) % 120 for place in range(20)]


def set_config(folder: Path, **changes: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def logits(model: Any) -> Any:
    with torch.no_grad():
        return model(torch.tensor([IDS]), use_cache=False).logits[0].numpy()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (
            {"auto_map": {"AutoModelForCausalLM": "modeling_mine.Mine"}, "architectures": ["Mine"]},
            "modeling_mine.Mine",
        ),
        ({"auto_map": {"AutoModelForCausalLM": "modeling_mine.Mine"}}, "modeling_mine.Mine"),
        ({"auto_map": {"AutoModel": "m.Base"}, "architectures": ["Other"]}, "Other is not"),
        ({"architectures": ["BartForConditionalGeneration"]}, "encoder-decoder"),
        ({"is_encoder_decoder": True}, "encoder-decoder"),
    ],
)
def test_folders_of_another_model_are_refused(
    changes: dict[str, Any], named: str, tmp_path: Path
) -> None:
    folder = set_config(models.save("llama", tmp_path / "m"), **changes)
    for work in (einfold.compile, lambda folder, out: einfold.estimate(folder)):
        with pytest.raises(UnsupportedError, match=named):
            work(folder, tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"auto_map": {"AutoModelForCausalLM": "modeling_x.LlamaForCausalLM"}}, "was not run"),
        ({"logit_boost": 3.0}, "sets logit_boost, which"),
        ({}, ""),
    ],
)
def test_what_is_not_read_is_noted(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    found = open_model(set_config(models.save("llama", tmp_path / "m"), **changes))
    assert len(found.notes) == bool(said)
    assert all(said in note for note in found.notes)


_SMALL = {"vocab_size": 100, "d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4}
_SMALL |= {"encoder_layers": 1, "encoder_attention_heads": 4, "pad_token_id": 0}


@pytest.mark.parametrize("kind", ["Bart", "MBart", "Marian", "Pegasus", "Blenderbot", "PLBart"])
def test_decoders_that_number_their_tokens_are_refused(kind: str) -> None:
    config = getattr(transformers, f"{kind}Config")(**_SMALL, max_position_embeddings=64)
    config.is_decoder = True
    found = wrap_model(getattr(transformers, f"{kind}ForCausalLM")(config).eval())
    with pytest.raises(UnsupportedError, match="numbers its tokens itself"):
        capture_language_model(found.source, found.config, 64, found.state, found.module)


def test_a_model_that_fills_its_weights_while_it_is_built_is_refused_by_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LFM2 with norms that are filled; in memory it is built already, and then its layers are refused, and
    its convolutions, which torch fills, are no hindrance."""
    small = {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = transformers.Lfm2Config(
        **small,
        num_attention_heads=4,
        num_key_value_heads=2,
        layer_types=["conv", "full_attention"],
    )
    model = transformers.Lfm2ForCausalLM(config)
    model.save_pretrained(tmp_path / "m")
    for given in (model, tmp_path / "m"):
        with pytest.raises(UnsupportedError, match="layer 0 does not run its attention"):
            einfold.compile(given, tmp_path / "out")
    norm = transformers.models.lfm2.modeling_lfm2.Lfm2RMSNorm
    built = norm.__init__

    def filled(self: Any, *args: Any, **keywords: Any) -> None:
        built(self, *args, **keywords)
        with torch.no_grad():
            self.weight.copy_(torch.ones_like(self.weight))

    monkeypatch.setattr(norm, "__init__", filled)
    with pytest.raises(UnsupportedError, match="writes into its weights while it is built"):
        einfold.estimate(tmp_path / "m")


@pytest.mark.parametrize("method", ["quanto", "bitsandbytes", "fp8"])
def test_quantized_checkpoints_get_a_true_sentence(method: str, tmp_path: Path) -> None:
    told = {"quant_method": method, "bits": 4, "load_in_4bit": True}
    folder = set_config(models.save("llama", tmp_path / "m"), quantization_config=told)
    with pytest.raises(EinfoldError, match=rf"quantized already \(by {method}\).*dequantize"):
        einfold.compile(folder, tmp_path / "out")


class Lora(nn.Module):
    """What an adapter makes of a layer, by its definition."""

    def __init__(self, layer: Any, a: Tensor, b: Tensor, scale: float) -> None:
        super().__init__()
        self.layer, self.a, self.b, self.scale = layer, a, b, scale

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.scale * (x @ self.a.T @ self.b.T)  # type: ignore[no-any-return]


_TARGETS = {"model.layers.0.self_attn.q_proj": (64, 64), "model.layers.1.mlp.down_proj": (64, 96)}


def save_adapter(
    folder: Path, base: Path | str, rank: int = 4, **options: Any
) -> dict[str, Tensor]:
    """An adapter as PEFT writes it, and its tensors."""
    torch.manual_seed(3)
    folder.mkdir(parents=True, exist_ok=True)
    parts = {}
    for name, (rows, columns) in _TARGETS.items():
        parts[f"base_model.model.{name}.lora_A.weight"] = torch.randn(rank, columns) * 0.2
        parts[f"base_model.model.{name}.lora_B.weight"] = torch.randn(rows, rank) * 0.2
    settings = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 16,
        "base_model_name_or_path": str(base),
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings | options))
    save_file(parts, folder / "adapter_model.safetensors")
    return parts


def with_adapter(model: Any, parts: dict[str, Tensor], scales: dict[str, float]) -> Any:
    for name in _TARGETS:
        owner, _, last = name.rpartition(".")
        a, b = (parts[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
        layer = Lora(model.get_submodule(name), a, b, scales[name])
        setattr(model.get_submodule(owner), last, layer)
    return model


@pytest.mark.parametrize(
    ("options", "scale"),
    [
        ({}, 4.0),
        ({"use_rslora": True}, 16 / math.sqrt(4)),
        ({"lora_alpha": 2, "alpha_pattern": {"q_proj": 8}}, None),
    ],
)
@pytest.mark.parametrize("beside", [rarely(False), True])
def test_adapters_are_merged(
    options: dict[str, Any], scale: float | None, beside: bool, tmp_path: Path
) -> None:
    """An adapter alone and one beside its base, in bfloat16, against the layers that it makes."""
    models.build("llama").bfloat16().save_pretrained(tmp_path / "base")
    # before the adapter lies beside it: transformers would load that too, where peft is installed
    original = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32).eval()
    folder = tmp_path / "base" if beside else tmp_path / "adapter"
    parts = save_adapter(folder, tmp_path / "base", **options)
    scales = dict(zip(_TARGETS, [scale, scale] if scale else [2.0, 0.5], strict=True))
    plain = logits(original)
    want = logits(with_adapter(original, parts, scales))  # type: ignore[arg-type]
    report = einfold.compile(folder, tmp_path / "out", target="reference")
    assert report.notes == [f"the LoRA adapter {folder.name} was merged into 2 weights"]
    got = all_logits(einfold.load(tmp_path / "out"), IDS)
    assert np.abs(got - want).max() < 1e-4 < np.abs(plain - want).max()


def test_a_head_that_an_adapter_brings_is_untied(tmp_path: Path) -> None:
    models.save("llama", tmp_path / "base", tie_word_embeddings=True)
    parts = save_adapter(tmp_path / "a", tmp_path / "base")
    head = torch.randn(models.VOCABULARY, 64)
    save_file(
        {"base_model.model.lm_head.weight": head} | parts,
        tmp_path / "a" / "adapter_model.safetensors",
    )
    original = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    original.lm_head.weight = nn.Parameter(head)
    want = logits(with_adapter(original, parts, dict.fromkeys(_TARGETS, 4.0)))
    einfold.compile(tmp_path / "a", tmp_path / "out", target="reference")
    got = all_logits(einfold.load(tmp_path / "out"), IDS)
    assert np.abs(got - want).max() < 1e-4


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"peft_type": "IA3"}, "IA3"),
        ({"use_dora": True}, "use_dora"),
        ({"base_model_name_or_path": None}, "names no model"),
        ({"base_model_name_or_path": "/nowhere/base"}, "/nowhere/base"),
    ],
)
def test_other_adapters_are_refused(options: dict[str, Any], named: str, tmp_path: Path) -> None:
    save_adapter(tmp_path / "a", models.save("llama", tmp_path / "base"), **options)
    with pytest.raises(EinfoldError, match=named):
        einfold.compile(tmp_path / "a", tmp_path / "out")


def test_adapters_of_another_model_are_refused(tmp_path: Path) -> None:
    save_adapter(tmp_path / "a", models.save("gpt2", tmp_path / "other"))
    with pytest.raises(ModelError, match="which the model does not have"):
        einfold.compile(tmp_path / "a", tmp_path / "out")
    save_adapter(tmp_path / "b", models.save("llama", tmp_path / "wide", intermediate_size=112))
    with pytest.raises(ModelError, match="it is for another model"):
        einfold.compile(tmp_path / "b", tmp_path / "out")
    path = tmp_path / "b" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ModelError, match="cannot be read"):
        einfold.compile(tmp_path / "b", tmp_path / "out")
