"""fp32 artifacts write the tokens of Hugging Face's greedy `generate`, for every architecture."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import einfold
from einfold.compiler.driver import open_model, trace
from einfold.compiler.ir.ops import einfold_ops
from einfold.compiler.recipe import Recipe
from einfold.runtime.program import read_program

from .. import models
from ..greedy import all_logits, check_tokens, greedy_batch
from ..quick import quick

NEW = 64
#: Short, longer than a chunk, and past the sliding window; together past several chunks.
LENGTHS = (5, 23, 60)
CHUNK = 16

_references: dict[str, Any] = {}


def reference(name: str, folder: Path) -> tuple[Any, list[list[int]], list[list[int]]]:
    """The model, the prompts, and what `generate` continues them with."""
    if name not in _references:
        model = models.build(name)
        random = np.random.default_rng(7)
        prompts = [random.integers(3, models.VOCABULARY, length).tolist() for length in LENGTHS]
        _references[name] = model, prompts, greedy_batch(model, prompts, NEW)
    return _references[name]  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("name", "portable"),
    quick(
        product(models.CONFIGS, [False, True]),
        *((name, bool(at % 2)) for at, name in enumerate(models.CONFIGS)),
    ),
)
def test_greedy_tokens_and_logits(
    name: str, portable: bool, model_folder: Callable[[str], Path], artifact: Callable[..., Path]
) -> None:
    original, prompts, expected = reference(name, model_folder(name))
    compiled = einfold.load(artifact(name, portable=portable), chunk=CHUNK, threads=1)
    read_program(compiled.artifact)  # no operator but those that any artifact may call
    together = compiled.generate_batch(prompts, max_new_tokens=NEW, ignore_eos=True)
    for prompt, want, got in zip(prompts, expected, together, strict=True):
        check_tokens(original, prompt, want, got.tokens)
    alone = compiled.generate(prompts[1], max_new_tokens=NEW, ignore_eos=True)
    check_tokens(original, prompts[1], expected[1], alone.tokens)

    text = prompts[2] + expected[2]
    with torch.no_grad():
        want_logits = original(torch.tensor([text])).logits[0].numpy()
    got_logits = all_logits(compiled, text)
    assert np.abs(got_logits - want_logits).max() < 1e-4


def test_small_batch_prefills_together(
    model_folder: Callable[[str], Path], artifact: Callable[..., Path]
) -> None:
    """A batch that fits in one chunk takes the padded road; its tokens are the same."""
    original, prompts, expected = reference("llama", model_folder("llama"))
    compiled = einfold.load(artifact("llama"), chunk=512, threads=1)
    for prompt, want, got in zip(
        prompts,
        expected,
        compiled.generate_batch(prompts, max_new_tokens=NEW, ignore_eos=True),
        strict=True,
    ):
        check_tokens(original, prompt, want, got.tokens)


@pytest.mark.slow
def test_layers_that_the_model_shares_share_a_cache(
    model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """Gemma 4: readers have no buffers, in a layer with a window and in one without; the report says so."""
    folder, cache = model_folder("gemma4"), {"window_slack": 8}
    einfold.compile(folder, tmp_path / "a", recipe={"cache": cache}, check=False)
    compiled = einfold.load(tmp_path / "a", chunk=CHUNK, threads=1)
    layout = compiled.artifact.manifest.layout()
    assert [layer.groups[0].owner for layer in layout.layers] == [None, None, 0, 1]
    assert layout.bytes(1, 200) == 4 * 2 * 2 * ((models.WINDOW + 8) * 16 + 200 * 32)
    _, records = trace(open_model(folder), Recipe.model_validate({"cache": cache}))
    notes = {record.name: record.notes for record in records}
    reads = [note.where for note in notes["plan_cache"] if "as the model does" in note.what]
    assert reads == ["layer 2", "layer 3"]
    windows = [(note.where, note.action) for note in notes["native_window"]]
    assert windows == [("layer 0", "applied"), ("layer 2", "skipped")]

    original, prompts, expected = reference("gemma4", folder)
    together = compiled.generate_batch(prompts, max_new_tokens=NEW, ignore_eos=True)
    for prompt, want, got in zip(prompts, expected, together, strict=True):
        check_tokens(original, prompt, want, got.tokens)


#: Operators that a two-layer model must raise: (attention, norms, rotary, gates, expert blocks).
COUNTS = {
    "llama": (2, 5, 4, 2, 0),
    "qwen2": (2, 5, 4, 2, 0),
    "qwen3": (2, 9, 4, 2, 0),
    "mistral": (2, 5, 4, 2, 0),
    "gemma2": (2, 9, 4, 2, 0),
    "gemma3": (2, 13, 4, 2, 0),
    "phi3": (2, 5, 4, 2, 0),
    "gpt2": (2, 5, 0, 0, 0),
    "gpt_neox": (2, 5, 4, 0, 0),
    "opt": (2, 5, 0, 0, 0),
    "mixtral": (2, 5, 4, 0, 2),
    "gpt_oss": (2, 5, 4, 0, 2),
}


@pytest.mark.parametrize("name", models.CONFIGS)
def test_everything_is_raised(name: str, model_folder: Callable[[str], Path]) -> None:
    """Counts of raised operators, a layer at a time where notes name layers; nothing stays spelled out."""
    program, records = trace(open_model(model_folder(name)), Recipe())
    notes = {record.name: record.notes for record in records}
    attention, norms, rotary, gates, experts = COUNTS[name]
    assert sum(note.action == "applied" for note in notes["attach_cache"]) == attention
    assert sum(note.action == "applied" for note in notes["raise_norms"]) == norms
    assert sum(note.action == "applied" for note in notes["raise_rotary"]) == rotary
    assert (
        sum(note.what.startswith("gated_activation") for note in notes["raise_activations"])
        == gates
    )
    assert len(list(program.nodes(einfold_ops.experts.default))) == experts
    for layer in range(2):
        assert (
            sum(note.where.startswith(f"layer {layer} ") for note in notes["raise_rotary"])
            == rotary // 2
        )
    leftovers = [
        torch.ops.aten.rsqrt.default,
        torch.ops.aten.cos.default,
        torch.ops.aten.linear.default,
    ]
    assert not list(program.nodes(*leftovers))
    assert not [
        note
        for name in ("raise_norms", "raise_rotary", "raise_linears")
        for note in notes[name]
        if note.action == "skipped"
    ]


@pytest.mark.parametrize(
    ("head", "width"),
    quick([(24, None), (20, None), (12, None), (40, 16)], (20, None), (40, 16)),
    ids=["24", "20", "12", "partial 16 of 40"],
)
def test_odd_head_sizes(head: int, width: int | None, tmp_path: Path) -> None:
    """Head sizes that GroupQueryAttention or its rotary refuses are lowered around it."""
    changes: dict[str, Any] = {"head_dim": head}
    name = "llama"
    if width is not None:
        name = "phi3"
        changes = {
            "hidden_size": 4 * head,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": width / head,
            },
        }
    folder = models.save(name, tmp_path / "model", **changes)
    original = models.build(name, **changes)
    einfold.compile(folder, tmp_path / "out")
    compiled = einfold.load(tmp_path / "out", chunk=CHUNK, threads=1)
    prompt = np.random.default_rng(1).integers(3, models.VOCABULARY, 21).tolist()
    with torch.no_grad():
        out = original.generate(
            torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False, eos_token_id=None
        )
    got = compiled.generate_batch([prompt, prompt[:7]], max_new_tokens=NEW, ignore_eos=True)[0]
    check_tokens(original, prompt, out[0, len(prompt) :].tolist(), got.tokens)


def test_bf16_checkpoint_is_computed_in_float32(tmp_path: Path) -> None:
    """The reference of a bf16 checkpoint is that checkpoint widened to float32."""
    models.build("gemma3").bfloat16().save_pretrained(tmp_path / "model")
    einfold.compile(tmp_path / "model", tmp_path / "out")
    compiled = einfold.load(tmp_path / "out", threads=1)
    text = np.random.default_rng(1).integers(3, models.VOCABULARY, 50).tolist()
    with torch.no_grad():
        want = models_in_float32(tmp_path / "model")(torch.tensor([text])).logits[0].numpy()
    got = all_logits(compiled, text)
    assert np.abs(got - want).max() < 1e-4


def models_in_float32(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def test_model_in_memory_compiles_like_its_folder(
    model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    einfold.compile(models.build("qwen2"), tmp_path / "out")
    original, prompts, expected = reference("qwen2", model_folder("qwen2"))
    got = einfold.load(tmp_path / "out", threads=1).generate(
        prompts[0], max_new_tokens=NEW, ignore_eos=True
    )
    check_tokens(original, prompts[0], expected[0], got.tokens)


def test_reference_engine_agrees(
    model_folder: Callable[[str], Path], artifact: Callable[..., Path]
) -> None:
    """The graph in the artifact can always be run by the meaning of its operators."""
    original, prompts, expected = reference("mixtral", model_folder("mixtral"))
    compiled = einfold.load(artifact("mixtral", weights="fp32"), engine="reference", chunk=CHUNK)
    got = compiled.generate_batch(prompts[:2], max_new_tokens=NEW, ignore_eos=True)
    for row in range(2):
        check_tokens(original, prompts[row], expected[row], got[row].tokens)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("weights", ["fp32", "int8"])
def test_tied_embeddings_are_one_weight(name: str, weights: str, tmp_path: Path) -> None:
    """Embedding and head that share a weight read one weight of the program, however it is stored."""
    changes = {} if name == "gpt2" else {"tie_word_embeddings": True}
    folder = models.save(name, tmp_path / "model", **changes)
    program, _ = trace(open_model(folder), Recipe.build({"weights": {"format": weights}}))
    tables = [
        key for key in program.weights if "embed_tokens" in key or "wte" in key or "lm_head" in key
    ]
    assert len({key.rsplit(".", 1)[0] for key in tables}) == 1
