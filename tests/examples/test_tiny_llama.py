"""The shipped trained model: its tokens, its quality under quantization, what it was trained to do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import einfold
from einfold.compiler.codegen.onnx import integer_attention, one_token
from einfold.evaluate.quality import Quality, evaluate
from einfold.evaluate.texts import read_documents

from ..greedy import all_logits, check_tokens, greedy_batch

MODEL = Path(__file__).parents[2] / "examples" / "tiny_llama"
NEW = 64
CHUNK = 64
#: Characters of a code text that becomes a prompt: short, and past several chunks.
PROMPTS = (40, 300, 1500)


def load_original(dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=dtype).eval()
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture(scope="module")
def original() -> Any:
    return load_original(torch.float32)


@pytest.fixture(scope="module")
def exact() -> Any:
    return load_original(torch.float64)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    made: dict[tuple[tuple[str, Any], ...], Path] = {}

    def get(**options: Any) -> Path:
        key = tuple(sorted(options.items()))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("tiny") / "artifact"
            recipe = {
                "weights": {k: v for k, v in options.items() if k in ("format", "block")},
                "onnx": {k: v for k, v in options.items() if k not in ("format", "block")},
            }
            einfold.compile(MODEL, made[key], recipe=recipe)
        return made[key]

    return get


@pytest.fixture(scope="module")
def short_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few documents of the evaluation text: code first, then some with pass keys."""
    documents = read_documents(MODEL / "eval.txt")
    chosen = [doc.text for doc in documents if not doc.keys][:1]
    chosen += [doc.text for doc in documents if doc.keys][:6]
    path = tmp_path_factory.mktemp("text") / "eval.txt"
    path.write_text("\n\f\n".join(chosen), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def quality(compiled: Callable[..., Path], short_text: Path) -> Callable[..., Quality]:
    measured: dict[Path, Quality] = {}

    def get(**options: Any) -> Quality:
        artifact = compiled(**options)
        if artifact not in measured:
            measured[artifact] = evaluate(einfold.load(artifact, threads=1), MODEL, short_text)
        return measured[artifact]

    return get


@pytest.mark.parametrize("portable", [False, True], ids=["ort", "portable"])
def test_greedy_tokens_and_logits(
    portable: bool, original: Any, exact: Any, compiled: Callable[..., Path]
) -> None:
    model = einfold.load(compiled(portable=portable), chunk=CHUNK, threads=1)
    code = next(doc.text for doc in read_documents(MODEL / "eval.txt") if not doc.keys)
    prompts = [model.encode(code[:length]) for length in PROMPTS]
    expected = greedy_batch(original, prompts, NEW)
    together = model.generate_batch(prompts, max_new_tokens=NEW, ignore_eos=True)
    for prompt, want, got in zip(prompts, expected, together, strict=True):
        check_tokens(original, prompt, want, got.tokens)
    alone = model.generate(prompts[2], max_new_tokens=NEW, ignore_eos=True)
    check_tokens(original, prompts[2], expected[2], alone.tokens)

    # The exact logits: of this trained model two float32 runs each err by up to 7e-5, Hugging Face's too.
    text = prompts[2] + expected[2]
    with torch.no_grad():
        want_logits = exact(torch.tensor([text])).logits[0].numpy()
    got_logits = all_logits(model, text)
    assert np.abs(got_logits - want_logits).max() < 1e-4


def step_by_step(artifact: Path, tokens: list[int]) -> np.ndarray[Any, Any]:
    """Log-probabilities behind each token, of steps of one token each."""
    engine = einfold.load(artifact, threads=1).engine
    cache = engine.allocate(1, 1024)
    found = []
    for index, token in enumerate(tokens):
        cache.make_room(1)
        at = np.array([[index]])
        found.append(engine.runner.step(cache, np.array([[token]]), at, np.zeros(1, int))[0].copy())
        cache.advance(1)
    return torch.tensor(np.stack(found)).double().log_softmax(-1).numpy()


@pytest.mark.slow
def test_decoding_in_integers_costs_far_less_than_int8(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Queries and probabilities in two planes, beside what rounding the cache to int8 costs."""
    text = next(doc.text for doc in read_documents(MODEL / "eval.txt") if not doc.keys)

    def decoded(name: str, **options: Any) -> np.ndarray[Any, Any]:
        einfold.compile(MODEL, tmp_path / name, weights="fp32", check=False, **options)
        tokens = einfold.load(tmp_path / name, threads=1).encode(text)[:800]
        assert len(tokens) > integer_attention.BLOCK
        return step_by_step(tmp_path / name, tokens)

    exact = decoded("exact")
    int8 = decoded("int8", cache="int8")
    monkeypatch.setattr(integer_attention, "FEWEST_TOKENS", 1)
    monkeypatch.setattr(one_token, "_USED_THIRDS", 0)
    monkeypatch.setattr(integer_attention, "SMALLEST_GROUP", 1)
    integers = decoded("integers", cache="int8")

    def kl(p: np.ndarray[Any, Any], q: np.ndarray[Any, Any]) -> float:
        return float((np.exp(p) * (p - q)).sum(-1).mean())

    assert 0 < kl(int8, integers) < kl(exact, int8) / 10
    assert kl(exact, integers) == pytest.approx(kl(exact, int8), rel=0.05)


def test_fp32_loses_nothing(quality: Callable[..., Quality]) -> None:
    found = quality()
    assert found.perplexity == pytest.approx(found.reference_perplexity, rel=1e-5)
    assert found.kl < 1e-7
    assert found.recall == found.reference_recall
    assert found.recall is not None and found.recall >= 0.8  # of 6 keys at most one is lost
    assert found.bytes["predicted"] == found.bytes["measured"]


@pytest.mark.slow
def test_int8_weights_cost_half_a_percent_at_most(quality: Callable[..., Quality]) -> None:
    for level in (0, 4):
        found = quality(format="int8", block=32, accuracy_level=level)
        assert found.perplexity == pytest.approx(found.reference_perplexity, rel=0.005)


@pytest.mark.slow
@pytest.mark.parametrize("block", [32, 128])
def test_int4_weights(block: int, quality: Callable[..., Quality]) -> None:
    """Rounding costs quality, larger blocks more; int8 products (level 4) add little to that."""
    exact, fast = (quality(format="int4", block=block, accuracy_level=level) for level in (0, 4))
    for found in (exact, fast):
        assert 1e-4 < found.kl < 0.2
        assert found.recall is not None
        assert found.bytes["predicted"] == found.bytes["measured"]
        assert found.bytes["weights"] < 0.3 * quality().bytes["weights"]
    assert fast.kl == pytest.approx(exact.kl, rel=0.25)
    assert quality(format="int8").kl < quality(format="int4").kl


@pytest.mark.slow
def test_flavours_differ_by_the_int8_products_alone(
    compiled: Callable[..., Path], short_text: Path
) -> None:
    """Between the flavours of one set of rounded weights, in float32 products there is no difference."""
    portable = einfold.load(compiled(format="int4", portable=True), threads=1)
    exact = evaluate(portable, compiled(format="int4", accuracy_level=0), short_text)
    assert exact.kl < 1e-6
    fast = evaluate(portable, compiled(format="int4", accuracy_level=4), short_text)
    assert exact.kl < fast.kl < 0.02


@pytest.mark.slow
def test_a_pass_key_is_recalled(compiled: Callable[..., Path]) -> None:
    prompt = (MODEL.parent / "pass_key.txt").read_text(encoding="utf-8").rstrip("\n")
    model = einfold.load(compiled(format="int4"), threads=1)
    key = prompt.partition("The pass key is ")[2][:5]
    assert key.isdigit()
    assert model.generate(prompt, max_new_tokens=5).text.strip() == key
