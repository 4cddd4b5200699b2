"""Windows are read off the model's masks, where transformers takes them from, and nothing else passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, masking_utils

import einfold
from einfold.compiler.driver import trace, wrap_model
from einfold.compiler.frontend.export import capture_language_model
from einfold.compiler.frontend.masks import Mask, read_mask
from einfold.compiler.ir.interpreter import Interpreter
from einfold.compiler.ir.program import attention_nodes, call_arguments
from einfold.compiler.recipe import Recipe
from einfold.errors import UnsupportedError

from .. import models
from ..quick import quick

CAUSAL = masking_utils.causal_mask_function
WINDOW = masking_utils.sliding_window_causal_mask_function
PACKED = masking_utils.packed_sequence_compatibility_function


@pytest.mark.parametrize(
    ("function", "window"),
    [
        (CAUSAL, 0),
        (WINDOW(16), 16),
        (masking_utils.and_masks(WINDOW(16), WINDOW(4)), 4),
        (PACKED(CAUSAL, torch.zeros(1, 3), torch.zeros(1, 3)), 0),
        (PACKED(WINDOW(5), torch.zeros(1, 3), torch.zeros(1, 3)), 5),
    ],
)
def test_window_of_a_mask(function: Callable[..., Any], window: int) -> None:
    mask = read_mask(mask_function=function)
    assert mask == Mask(window)
    assert mask.window_at("layer 0") == window
    assert mask[:, :, :, :3] == mask


@pytest.mark.parametrize(("chunk", "known"), [(models.CONTEXT, True), (models.CONTEXT - 1, False)])
def test_chunks_that_hold_the_context_hide_nothing(chunk: int, known: bool) -> None:
    function = masking_utils.chunked_causal_mask_function(chunk, torch.zeros(1))
    mask = read_mask(mask_function=function, config=models.build("llama").config)
    assert (not mask.unknown) == known


def test_a_model_that_computes_with_its_mask_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="builds an attention mask of its own"):
        _ = Mask().dtype


@pytest.mark.parametrize(
    ("function", "named"),
    [
        (masking_utils.bidirectional_mask_function, "bidirectional_mask_function"),
        (
            masking_utils.sliding_window_bidirectional_mask_function(3),
            "sliding_window_bidirectional",
        ),
        (masking_utils.sliding_window_overlay(3), "not causal"),
        (masking_utils.chunked_causal_mask_function(8, torch.zeros(1)), "chunked_overlay"),
        (masking_utils.or_masks(CAUSAL, WINDOW(3)), "or_masks"),
        (masking_utils.and_masks(CAUSAL, lambda b, h, q, k: k != 3), "test_masks"),
    ],
)
def test_other_masks_are_refused(function: Callable[..., Any], named: str) -> None:
    mask = read_mask(mask_function=function)
    with pytest.raises(UnsupportedError, match="layer 3: which keys a query sees") as caught:
        mask.window_at("layer 3")
    assert named in str(caught.value) or "lambda" in mask.unknown


#: Models that put their window into the mask alone, and one that gives it to the function too.
_MOE = {"num_experts_per_tok": 2, "sliding_window": 16}
_QWEN = {"use_sliding_window": True, "num_experts": 4, "moe_intermediate_size": 48}
IN_MASK: dict[str, tuple[str, dict[str, Any], list[int]]] = {
    "qwen3_moe": ("Qwen3MoeConfig", _QWEN | {"head_dim": 16, "max_window_layers": 0}, [16, 16]),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        _QWEN | {"shared_expert_intermediate_size": 48, "max_window_layers": 1},
        [16, 0],
    ),
    "phimoe": ("PhimoeConfig", {"num_local_experts": 4}, [16, 16]),
}


@pytest.fixture(scope="module", params=quick(IN_MASK, "qwen2_moe"))
def in_mask(request: pytest.FixtureRequest) -> tuple[Any, list[int]]:
    kind, changes, windows = IN_MASK[request.param]
    torch.manual_seed(0)
    arguments = models.CONFIGS["llama"][1] | _MOE | changes | {"initializer_range": 0.15}
    return AutoModelForCausalLM.from_config(
        getattr(transformers, kind)(**arguments)
    ).eval(), windows


def test_windows_in_the_mask_alone(in_mask: tuple[Any, list[int]]) -> None:
    """Each layer has the window of its mask, in the compiled graph and in a cache for transformers."""
    model, windows = in_mask
    found = wrap_model(model)
    program = capture_language_model(found.source, found.config, 256, found.state)
    assert [call_arguments(node)["window"] for node in attention_nodes(program)] == windows
    ids = torch.tensor([[3 + (place * 37) % 120 for place in range(60)]])
    with torch.no_grad():
        want = model(ids, use_cache=False).logits[0].numpy()
        inputs = {"input_ids": ids, "position_ids": torch.arange(60)[None]}
        got = Interpreter(program).run(inputs)["logits"][0].numpy()
        with einfold.cache_for(model) as cache:
            through = model(ids, past_key_values=cache).logits[0].numpy()
    assert np.abs(got - want).max() < 1e-4
    assert np.abs(through - want).max() < 1e-4


def test_a_model_that_sees_the_future_is_refused() -> None:
    model = models.build("llama")
    model.config.is_causal = False
    with pytest.raises(UnsupportedError, match="bidirectional_mask_function"):
        trace(wrap_model(model), Recipe())
