"""What is compiled is the model that was given, not what its config would make of its weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from transformers import AutoModelForCausalLM

import einfold
from einfold.compiler.driver import wrap_model
from einfold.errors import EinfoldError, ModelError, UnsupportedError

from .. import models
from ..greedy import all_logits
from ..quick import quick

IDS = [3 + (place * 37) % 120 for place in range(30)]


class LoRALinear(nn.Linear):
    """Keeps the name of the weight that it adds to."""

    def __init__(self, old: nn.Linear) -> None:
        super().__init__(old.in_features, old.out_features, bias=False)
        self.weight = old.weight
        self.lora_A = nn.Parameter(torch.randn(4, old.in_features) * 0.2)
        self.lora_B = nn.Parameter(torch.randn(old.out_features, 4) * 0.2)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x @ self.lora_A.T @ self.lora_B.T


class Wrapped(nn.Module):
    """A layer around the one that was there."""

    def __init__(self, old: nn.Linear) -> None:
        super().__init__()
        self.base_layer, self.more = old, nn.Linear(old.in_features, old.out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.more(x)  # type: ignore[no-any-return]


def lora(model: Any) -> None:
    attention = model.model.layers[0].self_attn
    attention.q_proj = LoRALinear(attention.q_proj)


def wrapped(model: Any) -> None:
    attention = model.model.layers[1].self_attn
    attention.v_proj = Wrapped(attention.v_proj)


def head_with_bias(model: Any) -> None:
    head = nn.Linear(64, models.VOCABULARY)
    nn.init.normal_(head.bias, std=2)
    model.lm_head = head


def head_of_its_own(model: Any) -> None:
    model.config.tie_word_embeddings = True  # and yet it is not tied


def head_tied(model: Any) -> None:
    model.lm_head.weight = model.model.embed_tokens.weight  # and the config does not say so


def activation(model: Any) -> None:
    model.model.layers[0].mlp.act_fn = nn.GELU()


def rotary(model: Any) -> None:
    model.model.rotary_emb.inv_freq.mul_(0.5)


def scaling(model: Any) -> None:
    model.model.layers[1].self_attn.scaling = 0.5


def epsilon(model: Any) -> None:
    model.model.norm.variance_epsilon = 0.3


def hook(model: Any) -> None:
    vector = torch.linspace(-2, 2, 64)
    model.model.layers[0].register_forward_hook(lambda module, given, out: out + vector)


def pre_hook(model: Any) -> None:
    model.lm_head.register_forward_pre_hook(lambda module, given: (given[0] * 1.5,))


def bound_method(model: Any) -> None:
    layer = model.model.layers[0].mlp
    former = layer.forward
    layer.forward = lambda x: former(x) * 0.5


def computed_weight(model: Any) -> None:
    weight_norm(model.model.layers[0].mlp.up_proj)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.parametrizations.weight.original0.mul_(2)


def plain_tensor(model: Any) -> None:
    norm = model.model.norm
    norm.shift = torch.linspace(-1, 1, 64)  # neither parameter nor buffer
    norm.register_forward_hook(lambda module, given, out: out + module.shift)


def subclass(model: Any) -> None:
    class Capped(type(model)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            out = super().forward(*args, **kwargs)
            out.logits = torch.tanh(out.logits / 3) * 3
            return out

    model.__class__ = Capped


def half(model: Any) -> None:
    model.bfloat16()


CHANGES = [
    lora,
    wrapped,
    head_with_bias,
    head_of_its_own,
    head_tied,
    activation,
    rotary,
    scaling,
    epsilon,
    hook,
    pre_hook,
    bound_method,
    computed_weight,
    plain_tensor,
    subclass,
    half,
]


def compiled_logits(model: Any, out: Path) -> Any:
    einfold.compile(model, out, target="reference")
    return all_logits(einfold.load(out), IDS)


def in_float32(model: Any) -> Any:
    with torch.no_grad():
        return model.float()(torch.tensor([IDS]), use_cache=False).logits[0].numpy()


@pytest.mark.parametrize(
    "change", quick(CHANGES, *CHANGES[::4]), ids=lambda change: change.__name__
)
def test_a_model_in_memory_is_compiled_as_it_is(
    change: Callable[[Any], None], tmp_path: Path
) -> None:
    model = models.build("llama")
    change(model)
    parts, attention = list(model.modules()), model.config._attn_implementation
    got = compiled_logits(model, tmp_path / "out")
    assert list(model.modules()) == parts
    assert model.config._attn_implementation == attention
    assert np.abs(got - in_float32(model)).max() < 1e-4


def test_lora_layers_in_memory_are_said() -> None:
    model = models.build("llama")
    assert wrap_model(model).notes == []
    lora(model)
    assert wrap_model(model).notes == [
        "LoRA is compiled beside the weights that it changes, 1 of them"
    ]


@pytest.mark.parametrize("change", [scaling, lora, head_of_its_own, rotary])
def test_a_cache_for_the_model_follows_it(change: Callable[[Any], None]) -> None:
    model = models.build("llama")
    change(model)
    want = in_float32(model)
    with einfold.cache_for(model) as cache, torch.no_grad():
        got = model(torch.tensor([IDS]), past_key_values=cache).logits[0].numpy()
    assert np.abs(got - want).max() < 1e-4


def counts_calls(model: Any) -> None:
    model.model.norm.register_buffer("calls", torch.zeros(()))

    def count(module: Any, given: Any, out: Any) -> None:
        module.calls.add_(1)

    model.model.norm.register_forward_hook(count)


def sums_up(model: Any) -> None:
    model.lm_head.register_forward_hook(lambda module, given, out: out.sum(-1))


@pytest.mark.parametrize(
    ("change", "reason"),
    [(counts_calls, "writes to its buffer"), (sums_up, "no causal language model")],
)
def test_what_cannot_be_compiled_is_refused(
    change: Callable[[Any], None], reason: str, tmp_path: Path
) -> None:
    model = models.build("llama")
    change(model)
    with pytest.raises(UnsupportedError, match=reason):
        einfold.compile(model, tmp_path / "out")


def test_a_model_that_cannot_be_copied_is_refused(tmp_path: Path) -> None:
    model = models.build("llama")
    model.stream = (number for number in range(3))
    with pytest.raises(ModelError, match="cannot be copied"):
        einfold.compile(model, tmp_path / "out")


def edit(folder: Path, weights: dict[str, Tensor | None], config: dict[str, Any]) -> Path:
    """Adds weights to a folder, or takes them off, and sets keys of its config."""
    state = {**load_file(folder / "model.safetensors"), **weights}
    state = {name: tensor for name, tensor in state.items() if tensor is not None}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    written = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(written | config))
    return folder


def test_a_head_of_its_own_in_a_folder_that_says_tied(tmp_path: Path) -> None:
    folder = edit(models.save("llama", tmp_path / "m"), {}, {"tie_word_embeddings": True})
    original = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert original.lm_head.weight is not original.model.embed_tokens.weight
    got = compiled_logits(folder, tmp_path / "out")
    assert np.abs(got - in_float32(original)).max() < 1e-4
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    expected = sum(parameter.numel() for parameter in original.parameters())
    assert report["manifest"]["model"]["parameters"] == expected


@pytest.mark.parametrize(
    ("weights", "config", "named"),
    [
        ({"score.weight": torch.zeros(2, 64)}, {}, "score.weight"),
        ({"model.layers.0.self_attn.q_proj.bias": torch.ones(64)}, {}, "q_proj.bias"),
        ({"model.layers.0.self_attn.q_proj.lora_A": torch.ones(4, 64)}, {}, "lora_A"),
        ({}, {"num_hidden_layers": 1}, "layers.1."),
        ({"model.norm.weight": None}, {}, "model.norm.weight"),
        ({"lm_head.weight": None}, {}, "lm_head.weight"),
        ({}, {"num_hidden_layers": 3}, "layers.2."),
        ({}, {"attention_bias": True}, "bias"),
    ],
)
def test_weights_that_are_not_read_or_not_there(
    weights: dict[str, Tensor | None], config: dict[str, Any], named: str, tmp_path: Path
) -> None:
    folder = edit(models.save("llama", tmp_path / "m"), weights, config)
    with pytest.raises(EinfoldError, match=named):
        einfold.compile(folder, tmp_path / "out", check=False)
    assert not (tmp_path / "out").exists()


class _Peft(nn.Module):
    """What a model looks like that PEFT has wrapped."""

    def __init__(self, base: Any) -> None:
        super().__init__()
        self.base_model, self.config = base, base.config
        self.merges = True
        lora(base)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_model"), name)

    def merge_and_unload(self) -> Any:
        attention = self.base_model.model.layers[0].self_attn
        layer = attention.q_proj
        plain = nn.Linear(layer.in_features, layer.out_features, bias=False)
        delta = layer.lora_B @ layer.lora_A if self.merges else 0
        plain.weight = nn.Parameter(layer.weight + delta)
        attention.q_proj = plain
        return self.base_model


def test_adapters_that_peft_wrapped_around_a_model_are_merged_and_said(tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain = einfold.compile(models.build("llama"), tmp_path / "plain", check=False)
    model = _Peft(models.build("llama")).eval()
    with torch.no_grad():
        expected = model(torch.tensor([IDS])).logits[0].numpy()
    report = einfold.compile(model, tmp_path / "a")
    assert report.notes == ["LoRA was merged into the weights that it changes, 1 of them"]
    assert report.manifest.weight_bytes == plain.manifest.weight_bytes
    assert isinstance(model.base_model.model.layers[0].self_attn.q_proj, LoRALinear)
    np.testing.assert_allclose(all_logits(einfold.load(tmp_path / "a"), IDS), expected, atol=1e-4)


def test_a_merge_that_changes_the_model_is_refused(tmp_path: Path) -> None:
    model = _Peft(models.build("llama")).eval()
    model.merges = False
    with pytest.raises(EinfoldError, match="not the model as transformers runs it"):
        einfold.compile(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()
