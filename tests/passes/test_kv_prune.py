"""Methods that keep fewer tokens: what they make of the layout, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import einfold
from einfold.compiler.calibrate.observer import Found, Observer
from einfold.compiler.calibrate.statistics import Statistics
from einfold.compiler.ir.program import Program
from einfold.compiler.ir.verifier import verify
from einfold.compiler.ir.weights import Weight
from einfold.compiler.passes.base import Pass
from einfold.compiler.passes.cache.attach_cache import AttachCache
from einfold.compiler.passes.cache.plan_cache import PlanCache
from einfold.compiler.passes.kv_prune.native_window import NativeWindow
from einfold.compiler.passes.kv_prune.razor_attention import RazorAttention, choose
from einfold.compiler.recipe import Recipe
from einfold.errors import RecipeError
from einfold.runtime.cache import Cache

from .. import models
from ..greedy import all_logits, check_tokens, greedy_batch
from ..methods import chosen
from ..programs import calls, program, run
from ..quick import quick, rarely

BODY = """
    input %ids "input_ids" : i64[B, S]
    input %pos "position_ids" : i64[B, S]
    input %q "q" : f32[B, S, 8, 8]
    input %k "k" : f32[B, S, 4, 8]
    input %v "v" : f32[B, S, 4, 8]
    call %o = einfold.attention(%q, %k, %k, none, 0, 0.25, 0, 0.0) : f32[B, S, 8, 8]
    call %p = einfold.attention(%o, %k, %v, none, 1, 0.25, {window}, 0.0) : f32[B, S, 8, 8]
    output "o" = %p
"""


def planned(window: int = 0) -> Program:
    """Two layers of four KV heads each, the second with a window of its own where one is given."""
    found = program(BODY.format(window=window))
    PlanCache().run(found)
    return found


def lines(found: Program) -> list[str]:
    assert found.layout is not None
    return [
        line.replace(" key=8 value=8 ", " ").replace(" of=4 ", " ") for line in found.layout.lines()
    ]


class Known(Statistics):
    """Statistics with given scores in place of measured ones."""

    def __init__(self, **scores: list[list[float]]) -> None:
        self.scores = scores

    def of(self, program: Program, *observers: Observer) -> dict[str, Found]:
        assert [observer.name for observer in observers] == ["retrieval_heads"]
        return {
            f"layer-{layer}": {name: torch.tensor(by[layer]) for name, by in self.scores.items()}
            for layer in range(len(self.scores["echo"]))
        }


def test_retrieval_heads_keep_all_and_the_others_a_window() -> None:
    found = planned()
    # Two query heads a KV head: the larger score counts.
    found.statistics = Known(
        induction=[[0, 0, 0.1, 0.9, 0, 0, 0.2, 0], [0] * 8],
        echo=[[0, 0, 0.9, 0.9, 0.5, 0, 0, 0], [0] * 8],
    )
    result = RazorAttention(induction=0.2, echo=0.1, sinks=2, recent=8, slack=4).run(found)
    window = "policy=window(sinks=2,recent=8,slack=4,compensation=1,prefill=exact) storage=f32"
    assert lines(found) == [
        "cache 0.0 heads=1,2,3 policy=full storage=f32",
        f"cache 0.1 heads=0 {window}",
        f"cache 1.0 heads=0,1,2,3 {window}",
    ]
    assert [note.what for note in result.notes] == [
        "3 of 4 KV heads keep all; 1 keep 2 sinks, 8 recent tokens and a compensation token",
        "0 of 4 KV heads keep all; 4 keep 2 sinks, 8 recent tokens and a compensation token",
    ]
    AttachCache().run(found)
    verify(found, deep=True)


def test_the_best_heads_are_chosen_once() -> None:
    induction = {(0, 0): 0.5, (0, 1): 0.9, (1, 0): 0.1}
    echo = {(0, 0): 0.2, (0, 1): 0.9, (1, 0): 0.3}
    assert choose(induction, echo, 1, 1) == {(0, 1), (1, 0)}
    assert choose(induction, echo, 0, 0) == set()


def test_without_weights_the_bytes_are_the_same() -> None:
    blind, seeing = planned(), planned()
    seeing.statistics = Known(induction=[[0] * 8, [1] * 8], echo=[[1] * 8, [0] * 8])
    for found in (blind, seeing):
        RazorAttention(induction=0.5, echo=0.125, recent=8, slack=4).run(found)
    assert blind.layout is not None and seeing.layout is not None
    assert lines(blind) != lines(seeing)
    assert blind.layout.account() == seeing.layout.account()
    notes = RazorAttention(recent=8, slack=4).run(planned()).notes
    assert [note.what for note in notes if note.action == "skipped"] == [
        "without weights they are chosen at will; only sizes count"
    ]


def test_without_weights_the_peak_is_the_highest() -> None:
    """How high it is hangs on which heads of the first layer keep all; an estimate tells no less."""

    def peak(scores: list[list[int]] | None) -> int:
        found = planned()
        if scores is not None:
            found.statistics = Known(induction=scores, echo=scores)
        RazorAttention(induction=0.25, echo=0, recent=8, slack=4).run(found)
        assert found.layout is not None
        return int(found.layout.peak_bytes(1, 60, 60))

    first, last = [[1] * 8, [0] * 8], [[0] * 8, [1] * 8]
    assert peak(first) < peak(last) == peak(None)


def test_what_cannot_be_pruned_is_refused_or_skipped() -> None:
    with pytest.raises(RecipeError, match=r"shares of retrieval heads, 0\.9 by induction and 0\.2"):
        RazorAttention(induction=0.9, echo=0.2)
    with pytest.raises(
        RecipeError, match="would leave 65 tokens and up to 64 that wait as they are, but"
    ):
        RazorAttention(recent=60).run(planned())
    found = planned(window=5)
    notes = RazorAttention(recent=8, slack=4).run(found).notes
    assert ("layer 1", "has a sliding window of 5 tokens of its own") in [
        (note.where, note.what) for note in notes if note.action == "skipped"
    ]


def test_a_window_of_the_models_own_is_freed() -> None:
    found = planned(window=5)
    result = NativeWindow(slack=4).run(found)
    assert lines(found) == [
        "cache 0.0 heads=0,1,2,3 policy=full storage=f32",
        "cache 1.0 heads=0,1,2,3 policy=window(sinks=0,recent=5,slack=4,compensation=0,"
        "prefill=streaming) storage=f32",
    ]
    assert [note.what for note in result.notes] == ["keeps its window of 5 tokens and a slack of 4"]
    AttachCache().run(found)
    verify(found, deep=True)


def test_a_window_as_long_as_the_context_stays() -> None:
    found = planned(window=40)
    (note,) = NativeWindow(slack=30).run(found).notes
    assert note.action == "skipped" and "no less than the context of 64" in note.what
    (note,) = NativeWindow(slack=0).run(found).notes
    assert note.what == "switched off"


@pytest.mark.parametrize(
    ("engine", "name"),
    quick(
        product(["onnx", "reference"], ["mistral", "gemma2", "gemma3", "gpt_oss"]),
        ("onnx", "gemma3"),
        ("reference", "gpt_oss"),
    ),
)
def test_freed_windows_write_the_same_tokens(
    name: str,
    engine: str,
    model_folder: Callable[[str], Path],
    artifact: Callable[..., Path],
    tmp_path: Path,
) -> None:
    """Past the window and past several moves, alone and in rows of unequal lengths."""
    recipe = Recipe.build({"cache": {"window_slack": 8}})
    einfold.compile(model_folder(name), tmp_path / "out", recipe=recipe)
    original, random = models.build(name), np.random.default_rng(3)
    prompts = [random.integers(3, models.VOCABULARY, length).tolist() for length in (5, 61, 30)]
    new = 40
    expected = greedy_batch(original, prompts, new)
    freed = einfold.load(tmp_path / "out", engine=engine, chunk=16, threads=1)  # type: ignore[arg-type]
    found = freed.generate_batch(prompts, max_new_tokens=new, ignore_eos=True)
    for prompt, want, got in zip(prompts, expected, found, strict=True):
        check_tokens(original, prompt, want, got.tokens)
    text = prompts[1] + expected[1]
    full = einfold.load(artifact(name), threads=1)
    assert np.abs(all_logits(freed, text) - all_logits(full, text)).max() < 1e-4
    layout = freed.artifact.manifest.layout()
    assert freed.engine.cache is not None
    assert freed.engine.cache.nbytes == layout.bytes(1, len(text))
    windows = sum(group.moves for _, _, group in layout.groups())
    assert windows == {"mistral": 2, "gemma2": 1, "gemma3": 1, "gpt_oss": 1}[name]


SCORED = {
    chosen(
        "snapkv", tokens=24, observe=8, kernel=5, slack=4
    ): "voted(chosen=16,observe=8,kernel=5,slack=4,queries=2)",
    chosen("h2o", tokens=24, slack=4): "heavy_hitters(heavy=12,recent=12,slack=4,prefill=exact)",
    chosen(
        "ems", tokens=24, recent=8, slack=4
    ): "merged(heavy=16,recent=8,slack=4,prefill=exact,local=32,similarity=0.6)",
    chosen("scissorhands", tokens=24, recent=8, slack=4): (
        "pivotal(heavy=16,recent=8,slack=4,prefill=exact,history=64,queries=2)"
    ),
    chosen("kvmerger", tokens=24, slack=4, apart=3): (
        "runs(heavy=12,recent=12,slack=4,prefill=exact,apart=3,similarity=0.9)"
    ),
    chosen("kvcrush", tokens=24, observe=8, kernel=5, slack=4): (
        "crushed(chosen=16,observe=8,kernel=5,slack=4,queries=2,share=0.25)"
    ),
    chosen("elastic_cache", tokens=24, offset=8, slack=4): (
        "anchored(chosen=16,offset=8,sinks=4,merge=1,slack=4)"
    ),
    chosen("expected_attention", tokens=24, slack=4): (
        "expected(chosen=12,recent=12,sinks=4,future=512,norm=1,epsilon=0.0,slack=4,queries=2)"
    ),
}


@pytest.mark.parametrize("method", SCORED, ids=lambda method: method.name)
def test_scored_methods_show_their_queries(method: Pass) -> None:
    found = planned()
    result = method.run(found)
    assert lines(found)[0] == f"cache 0.0 heads=0,1,2,3 policy={SCORED[method]} storage=f32"
    assert [note.action for note in result.notes] == ["applied", "applied"]
    AttachCache().run(found)
    verify(found, deep=True)
    assert calls(found)[0] == "aten.mul.Tensor(%q, 0.25)"
    assert [n for n in found.output_names() if n.startswith("query")] == ["query.0.0", "query.1.0"]


@pytest.mark.parametrize("method", SCORED, ids=lambda method: method.name)
def test_layers_whose_attention_cannot_be_followed_are_skipped(method: Pass) -> None:
    body = BODY.format(window=5).replace("none, 0, 0.25, 0, 0.0", "none, 0, 0.25, 0, 30.0")
    found = program(body)
    PlanCache().run(found)
    result = method.run(found)
    assert {(note.where, note.action, note.what) for note in result.notes} == {
        ("layer 0", "skipped", "its logits are capped, which scores leave out"),
        ("layer 1", "skipped", "has a sliding window of 5 tokens of its own"),
    }


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"method": "snapkv", "tokens": 32}, "snapkv: a budget of 32 tokens leaves none to choose"),
        ({"method": "h2o", "tokens": 64, "recent": 64}, "beside the 64 of recent; raise tokens"),
        ({"method": "ems", "tokens": 8}, "beside the 32 of recent"),
        (
            {"method": "scissorhands", "tokens": 32},
            "scissorhands: a budget of 32 tokens leaves none",
        ),
        (
            {"method": "kvmerger", "tokens": 32},
            "of the 16 tokens beside the newest 0 or more stay apart",
        ),
        (
            {"method": "kvmerger", "similarity": 1.5},
            "a cosine of 0 to 1, or more than that, not 1.5",
        ),
        (
            {"method": "kvcrush", "share": 1.5},
            "crushed: share is a part of the chosen tokens, 0 to 1, not 1.5",
        ),
        (
            {"method": "elastic_cache", "tokens": 25},
            "leaves none to choose beside the 25 of offset",
        ),
        (
            {"method": "elastic_cache", "tokens": 29},
            "anchored: the 4 tokens that are chosen beside the newest include the sinks",
        ),
        ({"method": "d2o", "recent": 300}, "cache.prune: matched: a budget of 256 tokens leaves"),
        (
            {"method": "d2o", "newer": 2},
            "newer is a share of the threshold, more than 0 to 1, not 2",
        ),
        ({"method": "razor_attention", "echo": -0.5}, "must each be 0 or more"),
        (
            {"method": "razor_attention", "recent": 0},
            "cache.prune: a window keeps 0 or more sinks, 1",
        ),
        ({"method": "snapkv", "kernel": 4}, "cache.prune: votes are pooled over an odd number"),
        ({"method": "ems", "similarity": 2}, "cache.prune: merged looks at"),
        (
            {"method": "streaming_llm", "prefill": "late"},
            "prefill is exact or streaming, not 'late'",
        ),
        (
            {"method": "h2o", "tokens": 9, "recent": -3},
            "cache.prune: heavy_hitters keeps 1 or more",
        ),
        ({"method": "h2o", "budget": 3}, "unknown key 'budget'; h2o takes tokens, recent, slack"),
    ],
)
def test_budgets_that_cannot_be(table: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Recipe.build({"cache": {"prune": table}})


def test_what_keeps_as_much_as_the_context_is_refused() -> None:
    slack_fills_it = chosen("streaming_llm", sinks=4, recent=40, slack=20)
    longer = (chosen("streaming_llm", recent=100, slack=4), RazorAttention(recent=100, slack=4))
    for method in (
        chosen("snapkv", tokens=64),
        chosen("h2o", tokens=80),
        chosen("ems", tokens=64),
        chosen("scissorhands", tokens=64),
        chosen("d2o", tokens=64),
        chosen("kvmerger", tokens=80),
        chosen("kvcrush", tokens=64),
        chosen("elastic_cache", tokens=64),
        chosen("expected_attention", tokens=64),
        chosen("locret", tokens=64),
        chosen("kvzip", tokens=64),
        chosen("pyramid_kv", tokens=64),
        chosen("zipvl", tokens=64),
        slack_fills_it,
        *longer,
    ):
        with pytest.raises(RecipeError, match="but the context has 64: nothing would be pruned"):
            method.run(planned())


@pytest.mark.parametrize("name", ["ems", "d2o", "kvmerger", "elastic_cache"])
def test_merging_is_refused_where_tokens_are_integers(name: str) -> None:
    from einfold.compiler.passes.kv_quant.static_int8 import StaticInt8

    found = planned()
    chosen(name, tokens=40, slack=4, **{"apart": 3} if name == "kvmerger" else {}).run(found)
    StaticInt8().run(found)
    with pytest.raises(RecipeError, match="layer 0: tokens that are merged are averaged"):
        AttachCache().run(found)


def test_shown_queries_times_stored_keys_are_the_logits() -> None:
    """With an int8 cache the scales of the keys go into the queries."""
    from einfold.compiler.passes.kv_quant.static_int8 import StaticInt8

    found = planned()
    chosen("h2o", tokens=40, slack=4).run(found)
    StaticInt8().run(found)
    scale = torch.rand(4, 8) + 0.5
    for name in list(found.cache_weights):
        found.cache_weights[name] = Weight.of(scale)
    AttachCache().run(found)
    assert found.layout is not None
    q, k = torch.randn(1, 5, 8, 8), torch.randn(1, 5, 4, 8)
    got = run(
        found,
        input_ids=torch.zeros(1, 5, dtype=torch.long),
        position_ids=torch.arange(5)[None],
        q=q,
        k=k,
        v=k,
        lengths=torch.tensor([0]),
        **{"slots.0": torch.tensor([0])},
        **{
            b.name: torch.zeros(b.shape, dtype=torch.int8)  # type: ignore[arg-type]
            for b in found.layout.buffers(1, 9)
            if b.role == "slots"
        },
    )
    stored = got["cache.0.0.key"][0, :, :5].float()
    logits = got["query.0.0"][0].reshape(5, 4, 2, 8).permute(1, 2, 0, 3) @ stored.mT[:, None]
    read = (stored * scale[:, None]).mT[:, None]
    want = 0.25 * q[0].reshape(5, 4, 2, 8).permute(1, 2, 0, 3) @ read
    torch.testing.assert_close(logits, want)


class Text:
    """One layer's attention over a cache, step by step, and its definition over the whole text."""

    def __init__(self, method: Pass, total: int, prompts: list[int], seed: int = 0) -> None:
        body = BODY.format(window=0).replace('output "o" = %p', 'output "o" = %o')
        self.program = program(
            body.replace(body[body.index("    call %p") :], '    output "o" = %o')
        )
        self.total, self.prompts = total, prompts
        PlanCache().run(self.program)
        self.program.statistics = Known(induction=[[0, 0, 1, 0, 0, 0, 0, 0]], echo=[[0] * 8])
        method.run(self.program)
        AttachCache().run(self.program)
        random = torch.Generator().manual_seed(seed)
        self.q = torch.randn(len(prompts), total, 8, 8, generator=random)
        self.k = torch.randn(len(prompts), total, 4, 8, generator=random)

    def outputs(self, chunk: int) -> torch.Tensor:
        """What each token attends to, [rows, total, 8, 8]: prompts row by row in chunks, then all together.

        Rows with a shorter prompt start behind it; their last outputs stay zero.
        """
        assert self.program.layout is not None
        rows = len(self.prompts)
        cache = Cache.allocate(self.program.layout, rows, self.total, max(self.prompts))
        found = torch.zeros(rows, self.total, 8, 8)
        for row, prompt in enumerate(self.prompts):
            alone, size = cache.row(row), min(chunk, cache.step_limit())
            for start in range(0, prompt, size):
                places = torch.arange(start, min(prompt, start + size))
                found[row, places] = self._step(alone, places[None], [row])[0]
        cache.settle()
        for step in range(self.total - max(self.prompts)):
            places = torch.tensor(self.prompts)[:, None] + step
            found[torch.arange(rows)[:, None], places] = self._step(
                cache, places, list(range(rows))
            )
        return found

    def _step(self, cache: Cache, places: torch.Tensor, rows: list[int]) -> torch.Tensor:
        new = places.shape[1]
        cache.make_room(new)
        where = torch.tensor(rows)[:, None], places
        arrays = {**cache.counters, **cache.buffers}
        inputs = {name: torch.from_numpy(array) for name, array in arrays.items()}
        out = run(
            self.program,
            input_ids=torch.zeros_like(places),
            position_ids=places,
            q=self.q[where],
            k=self.k[where],
            v=self.k[where],
            **inputs,
        )
        for name, array in cache.buffers.items():
            if name in out:
                array[:] = out[name].numpy()
        cache.advance(new, {name: x.numpy() for name, x in out.items() if name.startswith("query")})
        return out["o"]


def razor_by_definition(
    text: Text, row: int, head: int, window: tuple[int, int, int], exact: bool, chunk: int
) -> torch.Tensor:
    """Attention of one query head [total, 8] to the tokens that are kept and, with log(count), to the mean
    of those that left (RazorAttention, equations 4 and 5)."""
    sinks, recent, slack = window
    prompt, alive, gone = text.prompts[row], list[int](), list[int]()
    keys, found = text.k[row, :, head // 2].double(), torch.zeros(text.total, 8).double()

    def leave() -> None:
        gone.extend(alive[sinks : len(alive) - recent])
        del alive[sinks : len(alive) - recent]

    place, room = 0, sinks + recent + slack
    while place < text.total:
        reading = place < prompt
        size = min(prompt - place, chunk if exact else min(chunk, slack)) if reading else 1
        if not (reading and exact) and len(alive) + size > room:
            leave()
        for t in range(place, place + size):
            alive.append(t)
            entries = keys[alive]
            bias = torch.zeros(len(alive)).double()
            if gone:
                entries = torch.cat((keys[gone].mean(0, keepdim=True), entries))
                bias = torch.cat((torch.tensor([len(gone)]).double().log(), bias))
            logits = 0.25 * entries @ text.q[row, t, head].double() + bias
            found[t] = torch.softmax(logits, 0) @ entries
        place += size
        if exact and place == prompt and len(alive) > room:
            leave()
    return found


@pytest.mark.parametrize("prefill", ["exact", "streaming"])
@pytest.mark.parametrize("chunk", [3, 20])
def test_razor_attention_is_attention_to_what_the_paper_keeps(prefill: str, chunk: int) -> None:
    """Rows of unequal prompts trim by their own length; a head that retrieves attends to everything."""
    method = RazorAttention(0.25, 0, 2, 5, 4, prefill)
    text = Text(method, 40, [22, 9])
    got = text.outputs(chunk)
    for row, prompt in enumerate(text.prompts):
        end = prompt + 18
        for head in (0, 1, 4, 7):
            want = razor_by_definition(text, row, head, (2, 5, 4), prefill == "exact", chunk)
            torch.testing.assert_close(
                got[row, :end, head].double(), want[:end], rtol=1e-4, atol=1e-5
            )
        k, v = text.k[row : row + 1], text.k[row : row + 1]
        full = torch.ops.einfold.attention(text.q[row : row + 1], k, v, None, 0, 0.25, 0, 0.0)
        torch.testing.assert_close(got[row, :end, 2:4], full[0, :end, 2:4])
        assert (got[row, prompt + 1 : end, :2] - full[0, prompt + 1 : end, :2]).abs().max() > 1e-3


def test_with_room_for_everything_nothing_changes() -> None:
    """Every method is full attention as long as its budget holds the text."""
    for method in (
        chosen("snapkv", tokens=50, observe=8, slack=4),
        chosen("h2o", tokens=50, slack=4),
        chosen("ems", tokens=50, slack=4),
        chosen("scissorhands", tokens=50, slack=4),
        chosen("d2o", tokens=50, slack=4, spread=0),
        chosen("kvmerger", tokens=50, slack=4, apart=3),
        chosen("kvcrush", tokens=50, observe=8, slack=4),
        chosen("elastic_cache", tokens=50, offset=8, slack=4),
        chosen("expected_attention", tokens=50, slack=4),
        RazorAttention(0.25, 0, 4, 50, 4),
    ):
        text = Text(method, 40, [12, 30])
        got = text.outputs(7)
        for row, prompt in enumerate(text.prompts):
            q, k = text.q[row : row + 1], text.k[row : row + 1]
            want = torch.ops.einfold.attention(q, k, k, None, 0, 0.25, 0, 0.0)[0]
            torch.testing.assert_close(got[row, : prompt + 10], want[: prompt + 10])


@pytest.mark.parametrize(
    "method",
    [
        chosen("snapkv", tokens=12, observe=4, kernel=3, slack=4),
        chosen("h2o", tokens=12, recent=6, slack=4),
        chosen("ems", tokens=12, recent=4, slack=4, similarity=1),
        chosen("scissorhands", tokens=12, recent=4, slack=4),
        chosen("d2o", tokens=12, slack=4, spread=0),
        chosen("kvmerger", tokens=12, slack=4, apart=1, similarity=0.2),
        chosen("kvcrush", tokens=12, observe=4, kernel=3, slack=4, share=0.5),
        chosen("elastic_cache", tokens=12, offset=4, sinks=2, slack=4),
        chosen("expected_attention", tokens=12, slack=4),
        chosen("pyramid_kv", tokens=12, slack=4, by="expected_attention:sinks=2", sizes=2),
    ],
)
def test_scored_rows_trim_by_themselves(method: Pass) -> None:
    """A row of a batch attends to the same as it does alone, and to less than everything."""
    both = Text(method, 40, [25, 18])
    together = both.outputs(6)
    for row, prompt in enumerate(both.prompts):
        alone = Text(method, 40, [prompt])
        alone.q, alone.k = both.q[row : row + 1], both.k[row : row + 1]
        end = prompt + 15
        torch.testing.assert_close(together[row, :end], alone.outputs(25)[0, :end])
        full = torch.ops.einfold.attention(alone.q, alone.k, alone.k, None, 0, 0.25, 0, 0.0)
        torch.testing.assert_close(together[row, :prompt], full[0, :prompt])
        assert (together[row, prompt:end] - full[0, prompt:end]).abs().max() > 1e-3


DUO = {"method": "duo_attention", "sinks": 2, "recent": 8, "slack": 6, "steps": 2}
RAZOR = {"method": "razor_attention", "induction": 0.25, "sinks": 2, "recent": 8, "slack": 6}


@pytest.mark.parametrize(
    ("name", "table"),
    [
        ("llama", RAZOR),
        rarely("gpt2", RAZOR | {"prefill": "streaming"}),
        rarely("llama", DUO),
        ("llama", {"method": "snapkv", "tokens": 16, "observe": 4, "slack": 4}),
        rarely("gpt2", {"method": "h2o", "tokens": 16, "slack": 4}),
        rarely("gpt2", {"method": "scissorhands", "tokens": 16, "recent": 4, "slack": 4}),
        rarely(
            "qwen3", {"method": "ems", "tokens": 16, "recent": 4, "slack": 4, "similarity": 0.2}
        ),
        ("llama", {"method": "locret", "tokens": 16, "slack": 4, "read": 64, "steps": 20}),
        ("llama", {"method": "d2o", "tokens": 18, "slack": 4, "read": 24}),
        rarely(
            "qwen3",
            {"method": "kvmerger", "tokens": 16, "slack": 4, "apart": 2, "similarity": 0.2},
        ),
        rarely("llama", {"method": "kvcrush", "tokens": 16, "observe": 4, "slack": 4}),
        rarely("llama", {"method": "elastic_cache", "tokens": 16, "offset": 4, "slack": 4}),
        rarely(
            "llama",
            {"method": "zipvl", "tokens": 18, "slack": 4, "read": 24, "by": "snapkv:observe=4"},
        ),
        rarely("llama", {"method": "kvzip", "tokens": 18, "slack": 4, "read": 24, "share": 0.4}),
    ],
    ids=lambda given: given if isinstance(given, str) else given["method"],
)
def test_engines_agree(
    name: str, table: dict[str, Any], model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """Behind a settled prompt and in rows of unequal lengths; bytes are those that `estimate` tells."""
    recipe = Recipe.build({"cache": {"prune": table}})
    einfold.compile(model_folder(name), tmp_path / "out", recipe=recipe)
    random = np.random.default_rng(1)
    prompts = [random.integers(3, models.VOCABULARY, length).tolist() for length in (40, 7, 29)]
    logits, tokens = [], []
    for engine in ("onnx", "reference"):
        model = einfold.load(tmp_path / "out", engine=engine, chunk=16, threads=1)  # type: ignore[arg-type]
        parts = [part.copy() for _, part in model.logits(prompts[0] + prompts[2], prompt=40)]
        logits.append(np.concatenate(parts))
        assert model.engine.cache is not None
        layout = model.artifact.manifest.layout()
        assert model.engine.cache.nbytes == layout.bytes(1, 69)
        rows = model.generate_batch(prompts, max_new_tokens=24, ignore_eos=True)
        tokens.append([row.tokens for row in rows])
    assert len(logits[0]) == 29
    np.testing.assert_allclose(*logits, atol=2e-3)
    assert tokens[0] == tokens[1]
    told = einfold.estimate(model_folder(name), recipe=recipe)
    assert told.cache == layout.bytes(1, models.CONTEXT)
