"""Masks through an einfold cache: as transformers' own cache takes them, or refused with the reason."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import einfold
from einfold.errors import PromptError, UnsupportedError

from .. import models

#: Of two rows: the longer has 20 tokens, more than the window of 16 that Gemma 3's layers have here.
LONG, SHORT = 20, 13

#: One step: token ids [B, S], mask, positions [B, S], and which logits count [B, S].
Step = tuple[Tensor, Tensor | None, Tensor, Tensor]
Run = Callable[[Any, Any], list[Tensor]]


def ids(rows: int, new: int, seed: int) -> Tensor:
    return torch.randint(3, 120, (rows, new), generator=torch.Generator().manual_seed(seed))


def positions(mask: Tensor, new: int) -> Tensor:
    return (mask.cumsum(1) - 1).clamp(min=0)[:, -new:]


def feed(model: Any, cached: Any, steps: list[Step]) -> list[Tensor]:
    found = []
    for tokens, mask, at, counts in steps:
        with torch.no_grad():
            given = {} if mask is None else {"attention_mask": mask}
            logits = model(tokens, position_ids=at, past_key_values=cached, **given).logits
        found.append(logits[counts.bool()])
    return found


def padded(left: bool) -> Tensor:
    mask = torch.ones(2, LONG, dtype=torch.long)
    if left:
        mask[1, : LONG - SHORT] = 0
    else:
        mask[1, SHORT:] = 0
    return mask


def going_on(mask: Tensor, sizes: tuple[int, ...], seed: int = 5) -> list[Step]:
    """More steps behind a mask, all of whose tokens are real."""
    steps = []
    for number, new in enumerate(sizes):
        mask = torch.cat((mask, mask.new_ones(len(mask), new)), 1)
        real = torch.ones(len(mask), new)
        steps.append((ids(len(mask), new, seed + number), mask, positions(mask, new), real))
    return steps


def prompt(mask: Tensor) -> Step:
    return ids(len(mask), mask.shape[1], 1), mask, positions(mask, mask.shape[1]), mask


def left_padding(model: Any, cached: Any) -> list[Tensor]:
    return feed(model, cached, [prompt(padded(True)), *going_on(padded(True), (1, 3, 1))])


def right_padding(model: Any, cached: Any) -> list[Tensor]:
    return feed(model, cached, [prompt(padded(False)), *going_on(padded(False), (1, 3, 1))])


def a_hole_in_the_prompt(model: Any, cached: Any) -> list[Tensor]:
    mask = torch.ones(2, LONG, dtype=torch.long)
    mask[0, 4:9] = 0
    return feed(model, cached, [prompt(mask), *going_on(mask, (1, 2))])


def right_padding_then_crop(model: Any, cached: Any) -> list[Tensor]:
    found = feed(model, cached, [prompt(padded(False))])
    cached.crop(-3)
    return found + feed(model, cached, going_on(padded(False)[:, :-3], (1, 2)))


def padding_alone_cropped(model: Any, cached: Any) -> list[Tensor]:
    mask = torch.ones(2, LONG, dtype=torch.long)
    mask[:, -2:] = 0
    found = feed(model, cached, [prompt(mask)])
    cached.crop(-2)
    return found + feed(model, cached, going_on(mask[:, :-2], (1, 2)))


def hidden_later(model: Any, cached: Any) -> list[Tensor]:
    whole = torch.ones(2, LONG, dtype=torch.long)
    hiding = whole.clone()
    hiding[1, 8:14] = 0
    hiding[0, 2] = 0
    steps = [prompt(whole), *going_on(hiding, (2, 1))]
    shown_again = torch.cat((whole, whole.new_ones(2, 3)), 1)
    return feed(model, cached, [*steps, *going_on(shown_again, (1,), 9)])


def four_dimensions(numbers: bool) -> Run:
    """A causal mask with padding on the left, spelled out."""

    def run(model: Any, cached: Any) -> list[Tensor]:
        flat, steps = padded(True), []
        for tokens, mask, at, counts in [prompt(flat), *going_on(flat, (1, 2))]:
            assert mask is not None
            new, total = tokens.shape[1], mask.shape[1]
            sees = torch.ones(new, total).tril(total - new).bool() & mask[:, None].bool()
            given = sees[:, None]
            if numbers:
                given = torch.zeros(given.shape).masked_fill(~given, torch.finfo(torch.float32).min)
            steps.append((tokens, given, at, counts))
        return feed(model, cached, steps)

    return run


def a_tree(model: Any, cached: Any) -> list[Tensor]:
    """Two candidates of the same place that do not see each other; the first is then rejected."""
    whole = torch.ones(1, 10, dtype=torch.long)
    sees = torch.ones(1, 1, 3, 13).tril(10).bool()
    sees[..., 2, 11] = False
    at = torch.tensor([[10, 11, 11]])
    candidates = (ids(1, 3, 7), sees, at, torch.ones(1, 3))
    rejected = torch.ones(1, 13, dtype=torch.long)
    rejected[0, 11] = 0
    return feed(model, cached, [prompt(whole), candidates, *going_on(rejected, (1, 1))])


def a_prefix_that_sees_itself_whole(model: Any, cached: Any) -> list[Tensor]:
    sees = torch.ones(1, 1, 12, 12).tril().bool()
    sees[..., :6, :6] = True
    whole = torch.ones(1, 12, dtype=torch.long)
    tokens, _, at, counts = prompt(whole)
    return feed(model, cached, [(tokens, sees, at, counts), *going_on(whole, (1,))])


PADDING: dict[str, Run] = {
    "left padding": left_padding,
    "right padding": right_padding,
    "a hole in the prompt": a_hole_in_the_prompt,
    "padding alone cropped": padding_alone_cropped,
    "four dimensions, booleans": four_dimensions(False),
    "four dimensions, numbers": four_dimensions(True),
}
HIDING: dict[str, Run] = {
    "right padding, then crop": right_padding_then_crop,
    "hidden later": hidden_later,
    "a tree": a_tree,
    "a prefix that sees itself whole": a_prefix_that_sees_itself_whole,
}

#: Methods that keep each token as it came: every mask is honoured.
EXACT: dict[str, tuple[str, dict[str, Any], float]] = {
    "full": ("llama", {}, 1e-4),
    "float16": ("llama", {"cache": "f16"}, 1e-2),
    "learned sinks": ("gpt_oss", {"recipe": {"cache": {"window_slack": 0}}}, 1e-4),
    "capped logits": ("gemma2", {"recipe": {"cache": {"window_slack": 0}}}, 1e-4),
    "own windows": ("gemma3", {"recipe": {"cache": {"window_slack": 0}}}, 1e-4),
    "own windows, let go": ("gemma3", {"recipe": {"cache": {"window_slack": 4}}}, 1e-4),
}

#: Methods that let go of tokens, with room for all of these: padding is honoured, more is refused.
COMPRESSED: dict[str, dict[str, Any]] = {
    "streaming_llm": {"prune": "streaming_llm:sinks=2,recent=60,slack=20", "cache": "f32"},
    "razor_attention": {"prune": "razor_attention:sinks=2,recent=60,slack=20", "cache": "f32"},
    "snapkv": {"prune": "snapkv:tokens=70,observe=30,slack=20", "cache": "f32"},
    "h2o": {"prune": "h2o:tokens=70,recent=30,slack=20", "cache": "f32"},
    "kivi": {"quant": "kivi:group=8,residual=60,slack=20"},
    "cskv": {"share": "cskv:recent=60,slack=20"},
}


@cache
def built(name: str) -> Any:
    return models.build(name)


@cache
def planned(name: str) -> Any:
    """The cache of a method, planned once; `attach` it, and `release` it afterwards."""
    architecture, options, _ = EXACT.get(name) or ("llama", COMPRESSED[name], 0)
    made = einfold.cache_for(built(architecture), **options)
    made.release()
    return made


@contextmanager
def installed(name: str) -> Iterator[tuple[Any, Any]]:
    """A model and the empty cache of a method on it."""
    model, found = built(EXACT[name][0] if name in EXACT else "llama"), planned(name)
    found.reset()
    found.attach(model)
    try:
        yield model, found
    finally:
        found.release()


def compare(name: str, run: Run, tolerance: float) -> None:
    model = built(EXACT[name][0] if name in EXACT else "llama")
    want = run(model, DynamicCache(config=model.config))
    with installed(name) as (model, found):
        got = run(model, found)
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=tolerance * theirs.abs().max().item())


#: transformers' own sliding layers forget what a crop would bring back, and take no mask over all columns.
_ONE_SIDED = ("crop", "four", "tree", "prefix")


@pytest.mark.parametrize("mask", PADDING | HIDING)
@pytest.mark.parametrize("name", EXACT)
def test_masks_are_transformers_own(name: str, mask: str) -> None:
    architecture, _, tolerance = EXACT[name]
    if architecture != "llama" and any(word in mask for word in _ONE_SIDED):
        return
    compare(name, (PADDING | HIDING)[mask], tolerance)


@pytest.mark.parametrize("mask", PADDING)
@pytest.mark.parametrize("name", COMPRESSED)
def test_padding_through_methods_that_let_tokens_go(name: str, mask: str) -> None:
    compare(name, PADDING[mask], 1e-4)


@pytest.mark.parametrize("mask", HIDING)
@pytest.mark.parametrize("name", COMPRESSED)
def test_what_a_method_cannot_hide_is_refused(name: str, mask: str) -> None:
    reason = "crop cannot bring back" if "crop" in mask else "does not tell tokens apart"
    with installed(name) as (model, found), pytest.raises(UnsupportedError, match=reason):
        HIDING[mask](model, found)


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        (None, "shows token 0 of row 0, which was hidden as padding"),
        (torch.ones(1, 7), "shows token 0 of row 0, which was hidden as padding"),
        (torch.ones(1, 1), "1 rows of 1 tokens, but the cache has seen 6"),
        (
            torch.ones(2, 7),
            "2 rows of 7 tokens, but the cache has seen 6 tokens and 1 are new, in 1 rows",
        ),
        (torch.ones(1, 1, 1, 7).bool(), "shows token 0 of row 0"),
        (torch.ones(1, 4, 1, 7).bool(), "one for all heads"),
        (-0.5 * torch.ones(1, 1, 1, 7), "adds numbers to scores"),
    ],
)
def test_masks_that_nothing_can_honour(mask: Tensor | None, reason: str) -> None:
    """Behind a prompt of 6 tokens whose first is padding."""
    given = {} if mask is None else {"attention_mask": mask}
    with installed("full") as (model, found), torch.no_grad():
        first = torch.tensor([[0, 1, 1, 1, 1, 1]])
        model(ids(1, 6, 1), attention_mask=first, past_key_values=found)
        with pytest.raises((PromptError, UnsupportedError), match=reason):
            model(ids(1, 1, 2), past_key_values=found, position_ids=torch.tensor([[5]]), **given)


def test_a_text_that_is_fed_again_is_refused() -> None:
    """`generate(use_cache=False)` feeds it so; transformers' own cache would attend to it twice."""
    reason = "from position 0 on came to a cache that has seen 9"
    with installed("full") as (model, found), pytest.raises(PromptError, match=reason):
        model.generate(
            ids(1, 9, 1), past_key_values=found, use_cache=False, max_new_tokens=3, pad_token_id=0
        )
