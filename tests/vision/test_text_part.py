"""The text part of models of images and text, given embeddings: what transformers computes and writes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import einfold
from einfold.compiler.ir.manifest import Manifest
from einfold.errors import ModelError, PromptError, UnsupportedError

from ..quick import rarely

WIDTH, WORDS = 32, 99
TEXT = {
    "vocab_size": WORDS,
    "hidden_size": WIDTH,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": None,
}
IMAGES = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
#: A prompt with an image of five rows in it.
PROMPT = [3, 4, -1, -2, -3, -4, -5, 7, 8]


def llava(**text: Any) -> Any:
    config = transformers.LlavaConfig(
        text_config={"model_type": "llama", **TEXT, **text},
        vision_config={"model_type": "clip_vision_model", **IMAGES},
    )
    return transformers.LlavaForConditionalGeneration(config)


def smolvlm(**text: Any) -> Any:
    config = transformers.SmolVLMConfig(
        text_config={"model_type": "llama", **TEXT, **text}, vision_config=IMAGES, scale_factor=2
    )
    return transformers.SmolVLMForConditionalGeneration(config)


def internvl(**text: Any) -> Any:
    config = transformers.InternVLConfig(
        text_config={"model_type": "qwen2", **TEXT, **text}, vision_config=IMAGES
    )
    return transformers.InternVLForConditionalGeneration(config)


def built(make: Callable[..., Any], **text: Any) -> Any:
    torch.manual_seed(0)
    return make(**text).eval()


def table(rows: int = 5) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).normal(size=(rows, WIDTH)).astype(np.float32)


def embedded(model: Any, prompt: list[int], rows: np.ndarray[Any, Any]) -> torch.Tensor:
    """What transformers is given in the place of the prompt."""
    own = model.get_input_embeddings()(torch.tensor([max(token, 0) for token in prompt]))
    for at, token in enumerate(prompt):
        if token < 0:
            own[at] = torch.from_numpy(rows[-1 - token])
    found: torch.Tensor = own.detach()[None]
    return found


def compare(model: Any, loaded: Any, tolerance: float = 1e-4) -> None:
    rows, new = table(), 10
    inputs = embedded(model, PROMPT, rows)
    with torch.no_grad():
        expected = model(inputs_embeds=inputs).logits[0].numpy()
        written = model.generate(
            inputs_embeds=inputs, max_new_tokens=new, do_sample=False, eos_token_id=None
        )
    found = np.concatenate([part for _, part in loaded.logits(PROMPT, embeddings=rows)])
    assert np.abs(found - expected).max() < tolerance * np.abs(expected).max()
    answer = loaded.generate(PROMPT, embeddings=rows, max_new_tokens=new, ignore_eos=True)
    assert answer.tokens == written[0].tolist()


@pytest.mark.parametrize(
    ("make", "target"),
    [
        (llava, "onnx"),
        rarely(llava, "reference"),
        rarely(smolvlm, "reference"),
        rarely(internvl, "reference"),
    ],
)
def test_what_transformers_computes_and_writes(
    make: Callable[..., Any], target: str, tmp_path: Path
) -> None:
    model = built(make)
    model.save_pretrained(tmp_path / "model")
    report = einfold.compile(tmp_path / "model", tmp_path / "out", target=target)
    assert any("text part is compiled" in note for note in report.notes)
    compare(model, einfold.load(tmp_path / "out"))


@pytest.mark.slow
def test_an_export_in_standard_operators(tmp_path: Path) -> None:
    """From memory, with a tied head; what is exported is an artifact, as of any language model."""
    model = built(smolvlm, tie_word_embeddings=True)
    einfold.export_onnx(model, tmp_path / "out", portable=True)
    compare(model, einfold.load(tmp_path / "out"))


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Any:
    out = tmp_path_factory.mktemp("vision") / "out"
    recipe = {"cache": {"storage": "int8"}, "weights": {"format": "int8"}}
    einfold.compile(built(llava), out, target="reference", recipe=recipe)
    return einfold.load(out)


def test_rows_with_and_without_an_image(loaded: Any) -> None:
    """Beside int8 weights and an int8 cache; a batch gives what its rows give alone."""
    prompts, rows = [PROMPT, [5, 6], [-2, 9, -1]], [table(), None, table(2)]
    assert loaded.artifact.manifest.embeds == WIDTH
    together = loaded.generate_batch(prompts, embeddings=rows, max_new_tokens=5, ignore_eos=True)
    for prompt, given, found in zip(prompts, rows, together, strict=True):
        alone = loaded.generate(prompt, embeddings=given, max_new_tokens=5, ignore_eos=True)
        assert found.tokens == alone.tokens
    plain = loaded.generate([5, 6], max_new_tokens=5, ignore_eos=True)
    assert plain.tokens == together[1].tokens
    penalised = loaded.generate(
        PROMPT, embeddings=table(), max_new_tokens=5, ignore_eos=True, repetition_penalty=1e9
    )
    assert len({*penalised.tokens, 3, 4, 7, 8}) == 9, "rows of embeddings are no tokens"


@pytest.mark.parametrize(
    ("prompt", "rows", "sentence"),
    [
        ([3, -1], None, "token -1 at position 1 is out of range"),
        (
            [3, -6],
            table(),
            "token -6 of prompt 0 stands for row 5 of its embeddings, and there are 5",
        ),
        (
            [3, -1],
            table()[:, :7],
            r"embeddings of prompt 0 are \[5, 7\], and the model takes \[N, 32\]",
        ),
        ([3, -1], np.full((1, WIDTH), np.nan), "embeddings of prompt 0 hold NaN"),
        ([3, -1], "an image", "embeddings of prompt 0 are no numbers"),
    ],
)
def test_what_does_not_fit(loaded: Any, prompt: list[int], rows: Any, sentence: str) -> None:
    with pytest.raises(PromptError, match=sentence):
        loaded.generate(prompt, embeddings=rows, max_new_tokens=1)
    with pytest.raises(PromptError, match="there are 2 prompts, and embeddings for 1"):
        loaded.generate_batch([prompt, prompt], embeddings=[table()])


def test_models_that_are_not_compiled(tmp_path: Path) -> None:
    """Positions on several axes, images whose places see each other, and weights of another model."""
    from einfold.compiler.driver import open_model, wrap_model

    gemma = transformers.PaliGemmaConfig(text_config={**TEXT, "model_type": "gemma", "head_dim": 8})
    for config, name, sentence in (
        (transformers.Qwen2VLConfig(), "Qwen2VLForConditionalGeneration", "positions have several"),
        (gemma, "PaliGemmaForConditionalGeneration", "the places of an image see each other"),
    ):
        config.architectures = [name]
        config.save_pretrained(tmp_path / name)
        with pytest.raises(UnsupportedError, match=sentence):
            open_model(tmp_path / name)
    model = built(llava)
    part = wrap_model(model).part
    assert part is not None
    with pytest.raises(ModelError, match="weights of the text part of Llava"):
        part.state(wrap_model(model).source, {"model.norm.weight": torch.zeros(1)})


def test_a_language_model_takes_none(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT)).eval()
    einfold.compile(model, tmp_path / "out", target="reference")
    with pytest.raises(PromptError, match="takes no embeddings"):
        einfold.load(tmp_path / "out").generate([3], embeddings=table(), max_new_tokens=1)


@pytest.mark.parametrize(
    "change",
    [
        {"inputs": [{"name": "embeddings", "dtype": "f32", "shape": ["B", "S", "7"]}]},
        {"inputs": [{"name": "other", "dtype": "f32", "shape": ["B", "S", "32"]}]},
        {"outputs": [{"name": "embeddings", "dtype": "f32", "shape": ["B", "S", "32"]}]},
    ],
)
def test_a_manifest_that_lists_another_input(loaded: Any, change: dict[str, Any]) -> None:
    manifest = loaded.artifact.manifest.model_dump(mode="json")
    Manifest.model_validate(manifest)
    with pytest.raises(ValueError, match="not what a model of the kind causal_lm has"):
        Manifest.model_validate(manifest | change)
