"""Hugging Face's generate() through the backend: the tokens of eager, every attention fused.

Most of it runs the rewritten graphs without a compiler for the rest, which is quick; `-m slow` has the same
through Inductor.

Of the graphs, one is made for the prompt and one for the first decoded token: they are compilations. Each
graph that a later token makes is a recompilation, and 64 decoded tokens may make two.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import StoppingCriteria

from einfold import backend

from .. import models
from ..greedy import check_tokens
from ..quick import quick
from .conftest import QUICK

PROMPT, ROWS = 5, 2
CACHES = ("dynamic", "static")


#: Architectures whose layers see a window, which fills up while these tests decode.
WINDOWED = [name for name, (_, options) in models.CONFIGS.items() if "sliding_window" in options]


class Graphs(StoppingCriteria):  # type: ignore[misc]
    """Notes behind every token how many graphs were compiled by then; never stops."""

    def __init__(self, count: Callable[[], int]) -> None:
        self.count = count
        self.behind: list[int] = []

    def __call__(self, ids: torch.Tensor, scores: Any, **more: Any) -> torch.Tensor:
        self.behind.append(self.count())
        return torch.zeros(ids.shape[0], dtype=torch.bool)

    @property
    def recompilations(self) -> int:
        """Graphs made by tokens after the first decoded one."""
        assert self.behind[:2] == [1, 2], "a graph for the prompt, one for the first decoded token"
        return self.behind[-1] - self.behind[1]


def generate(
    model: Any, ids: torch.Tensor, new: int, cache: str, graphs: Graphs | None = None
) -> list[list[int]]:
    out = model.generate(
        ids,
        max_new_tokens=new,
        do_sample=False,
        cache_implementation=None if cache == "dynamic" else cache,
        eos_token_id=None,
        pad_token_id=0,
        stopping_criteria=[graphs] if graphs else None,
    )
    return out[:, ids.shape[1] :].tolist()  # type: ignore[no-any-return]


def prompt_of(length: int) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randint(3, models.VOCABULARY, (ROWS, length))


def compare(
    name: str, cache: str, new: int, options: dict[str, Any], prompt: int = PROMPT
) -> tuple[list[backend.GraphReport], Graphs]:
    """The reports and when graphs were made, once the tokens are those of eager and all attention fused."""
    model = models.build(name)
    ids = prompt_of(prompt)
    expected = generate(model, ids, new, cache)
    model.compile(backend="einfold", options=options)
    graphs = Graphs(lambda: len(backend.reports()))
    found = generate(model, ids, new, cache, graphs)
    reports = backend.reports()
    assert reports, "the backend was never called"
    layers = model.config.num_hidden_layers
    for report in reports:
        assert report.fused == len(report.cascades) == layers, str(report)
    original = models.build(name)
    for row in range(ROWS):
        check_tokens(original, ids[row].tolist(), expected[row], found[row])
    return reports, graphs


def graphs_without_einfold(name: str, cache: str, new: int) -> Graphs:
    """When graphs are made by what stands in front of Inductor alone, with nothing rewritten."""
    counter = CompileCounterWithBackend("aot_eager")
    model = models.build(name)
    model.compile(backend=counter)
    graphs = Graphs(lambda: int(counter.frame_count))
    generate(model, prompt_of(PROMPT), new, cache, graphs)
    return graphs


@pytest.mark.parametrize(
    ("name", "cache"),
    # Windows under a dynamic cache take a second model each; full ones have a test of their own.
    quick(
        [(name, cache) for name in models.CONFIGS for cache in CACHES],
        ("llama", "dynamic"),
        ("mixtral", "dynamic"),
        ("gemma2", "static"),
    ),
)
def test_same_tokens_as_eager_and_few_graphs(name: str, cache: str) -> None:
    reports, graphs = compare(name, cache, 64, QUICK)
    assert all(c.passes_after == 1 for report in reports for c in report.cascades)
    if name in WINDOWED and cache == "dynamic":
        # Sizes on which Dynamo and AOTAutograd put guards differ before, at and behind a full window.
        torch._dynamo.reset()
        assert graphs.behind == graphs_without_einfold(name, cache, 64).behind
    else:
        assert graphs.recompilations <= 2


@pytest.mark.parametrize(
    "name",
    quick(WINDOWED, "gpt_oss"),
)
def test_few_graphs_behind_a_full_window(name: str) -> None:
    """A prompt longer than the window, as long texts have it: the dynamic cache too."""
    _, graphs = compare(name, "dynamic", 64, QUICK, prompt=models.WINDOW + 5)
    assert graphs.recompilations <= 2


@pytest.mark.slow
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("name", models.CONFIGS)
def test_same_tokens_as_eager_through_inductor(name: str, cache: str) -> None:
    compare(name, cache, 8, {"measure": "never"})


@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_no_graph_break(name: str) -> None:
    """The whole forward is one graph: fullgraph raises at a break."""
    model = models.build(name)
    model.compile(backend="einfold", fullgraph=True, options=QUICK)
    with torch.no_grad():
        model(prompt_of(PROMPT))
    assert len(backend.reports()) == 1


def test_through_inductor() -> None:
    """One model end to end, with what is left compiled."""
    reports, _ = compare("gpt_oss", "static", 4, {"measure": "never"})
    assert {c.lowering for report in reports for c in report.cascades} == {"sdpa"}
