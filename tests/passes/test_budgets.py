"""Budgets of tokens by layer and head: PyramidKV, D2O, ZipVL, AdaKV, KVzip."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from einfold.compiler.calibrate.observer import Found, Observer
from einfold.compiler.calibrate.observers.reconstruction import Reconstruction
from einfold.compiler.calibrate.observers.token_scores import TokenScores
from einfold.compiler.calibrate.sites import Site
from einfold.compiler.calibrate.statistics import Statistics
from einfold.compiler.calibrate.stream import stream
from einfold.compiler.ir.kv.attention_sums import attention_sums
from einfold.compiler.ir.kv.keep.expected import Expected
from einfold.compiler.ir.kv.keep.heavy_hitters import HeavyHitters
from einfold.compiler.ir.kv.keep.matched import Matched
from einfold.compiler.ir.program import Program
from einfold.compiler.ir.verifier import verify
from einfold.compiler.passes.base import Pass
from einfold.compiler.passes.cache.attach_cache import AttachCache
from einfold.compiler.passes.cache.plan_cache import PlanCache
from einfold.compiler.passes.kv_prune.ada_kv import AdaKV
from einfold.compiler.passes.kv_prune.budgets import Sizes, by_weights, shared_out
from einfold.compiler.passes.kv_prune.d2o import D2O
from einfold.compiler.passes.kv_prune.kvzip import KVzip
from einfold.compiler.passes.kv_prune.pyramid_kv import PyramidKV
from einfold.compiler.passes.kv_prune.zipvl import ZipVL, important
from einfold.errors import CalibrationError, IRError, RecipeError
from einfold.runtime.cache import Cache

from ..calibrate.common import BODY
from ..programs import program

#: Two layers of four KV heads; the second without the window and the softcap that it has elsewhere.
OPEN = BODY.replace(", 1, 0.5, 5, 3.0)", ", 1, 0.5, 0, 0.0)")
TEXT = torch.randint(11, (2, 12), generator=torch.Generator().manual_seed(5))


def planned() -> Program:
    found = program(OPEN)
    PlanCache().run(found)
    return found


class Known(Statistics):
    """Statistics with given scores of tokens in place of measured ones."""

    def __init__(self, scores: list[Tensor]) -> None:
        self.scores = scores

    def of(self, program: Program, *observers: Observer) -> dict[str, Found]:
        return {f"layer-{layer}": {"score": each} for layer, each in enumerate(self.scores)}


def budgets(found: Program) -> list[dict[int, int]]:
    """Tokens by head, of each layer."""
    assert found.layout is not None
    return [
        {head: group.policy.lead + group.newest for group in x.groups for head in group.heads}
        for x in found.layout.layers
    ]


def test_early_layers_keep_more() -> None:
    """An arithmetic sequence of the mean `tokens` that ends at `tokens` over `steepness`."""
    method = PyramidKV(tokens=60, steepness=6, sizes=11, by="snapkv:observe=4")
    assert method.budgets(11, 5, 1000) == [110 - 10 * layer for layer in range(11)]
    few = PyramidKV(tokens=60, steepness=6, sizes=3, by="snapkv:observe=4")
    assert few.budgets(6, 5, 1000) == [110, 110, 60, 60, 10, 10]
    assert few.budgets(6, 5, 91) == [90, 90, 60, 60, 30, 30]  # what the context has room for
    assert few.budgets(6, 20, 1000) == [100, 100, 60, 60, 20, 20]
    assert PyramidKV(tokens=60, sizes=1).budgets(2, 33, 1000) == [60, 60]

    found = planned()
    result = PyramidKV(tokens=20, steepness=2, slack=4, by="h2o:recent=3").run(found)
    assert budgets(found) == [dict.fromkeys(range(4), 30), dict.fromkeys(range(4), 10)]
    assert [note.what for note in result.notes] == [
        "4 KV heads by h2o: 4 of 30 tokens",
        "4 KV heads by h2o: 4 of 10 tokens",
    ]
    AttachCache().run(found)
    verify(found, deep=True)


def test_flatter_layers_keep_more() -> None:
    """D2O: in proportion to exp(-variance), which is 0 in the flattest layer and 1 in the sharpest; half of
    them are recent."""
    flat, sharp = torch.full((4, 16), 1 / 16), torch.eye(16)[:4]
    for scores, spread, first in (
        ([flat, sharp], 1.0, 1 / (1 + np.exp(-1))),
        ([sharp, flat], 0.5, 1 / (1 + np.exp(0.5))),
    ):
        found = planned()
        found.statistics = Known(scores)
        result = D2O(Matched(tokens=24, slack=4), spread).run(found)
        (of_first, *others), (of_second, *_) = (list(x.values()) for x in budgets(found))
        assert others == [of_first] * 3 and of_first + of_second == 48
        assert abs(of_first - 48 * first) <= 22 / 8 / 2
        policy = found.layout.layers[0].groups[0].policy
        assert abs(policy.newest - of_first / 2) <= 0.5
        assert result.notes[0].what == f"4 KV heads by matched: 4 of {of_first} tokens"
        AttachCache().run(found)
        verify(found, deep=True)


def test_layers_are_alike_without_spread_and_at_will_without_weights() -> None:
    found = planned()
    D2O(Matched(tokens=24, slack=4), spread=0).run(found)
    assert budgets(found) == [dict.fromkeys(range(4), 24)] * 2
    found = planned()
    result = D2O(Matched(tokens=24, slack=4)).run(found)
    assert sum(tokens for layer in budgets(found) for tokens in layer.values()) == 8 * 24
    assert result.notes[0].what.startswith("without weights they are shared out at will")


def test_weights_of_any_size_share_out_all_steps() -> None:
    """No layer is given more than there is room for, and the mean stays."""
    layers = planned().layout.layers
    sizes = Sizes.of(24, 8, 36)
    for weights, first in (({0: 1.0, 1: 0.0}, 34), ({0: 1.0, 1: 1.0}, 24), ({0: 1.0, 1: 3.0}, 14)):
        found = by_weights(layers, weights, sizes)
        assert (found[0, 0], found[1, 3]) == (first, 48 - first)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"spread": -1}, "spread is 0 or more, not -1"),
        ({"spread": float("inf")}, "spread is 0 or more, not inf"),
        ({"read": 15}, "layers are compared on 16 tokens or more, not 15"),
        (
            {"policy": Matched(tokens=9)},
            "a mean budget of 9 tokens leaves less than 8 to share out",
        ),
    ],
)
def test_layers_that_cannot_be_compared(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        D2O(**options)


@settings(max_examples=30)
@given(st.integers(0, 1000), st.sampled_from([0.3, 0.9, 0.975]))
def test_important_tokens_are_the_fewest_of_so_much_attention(seed: int, threshold: float) -> None:
    """ZipVL: over the heads of a layer together."""
    scores_KT = torch.rand(3, 20, generator=torch.Generator().manual_seed(seed)) ** 4
    scores_KT /= scores_KT.sum(1, keepdim=True)
    count, total = important(scores_KT, threshold), scores_KT.double().sum(0)
    best = sorted(total.tolist(), reverse=True)
    assert sum(best[:count]) >= threshold * sum(best) - 1e-9 > sum(best[: count - 1]) - 2e-9


def test_layers_that_look_at_more_tokens_keep_more() -> None:
    """ZipVL: in proportion to their important tokens, by any method that has a budget."""
    few, many = torch.zeros(4, 16), torch.full((4, 16), 1 / 16)
    few[:, :4] = 0.25
    for scores, wide in (([few, many], 1), ([many, few], 0)):
        found = planned()
        found.statistics = Known(scores)
        result = ZipVL(tokens=20, by="h2o:recent=1", threshold=0.99, slack=4).run(found)
        given_to = budgets(found)
        assert given_to[wide] == dict.fromkeys(range(4), 32)  # 16 of 20 important tokens
        assert given_to[1 - wide] == dict.fromkeys(range(4), 8)
        assert result.notes[wide].what == "4 KV heads by h2o: 4 of 32 tokens"
        AttachCache().run(found)
        verify(found, deep=True)
    found = planned()
    result = ZipVL(tokens=20, by="h2o:recent=1", slack=4).run(found)
    assert sum(tokens for layer in budgets(found) for tokens in layer.values()) == 8 * 20
    assert result.notes[0].what.startswith("without weights they are shared out at will")


def by_tokens(scores_KT: Tensor, tokens: int, base: int) -> list[int]:
    """AdaKV's algorithm 1: `base` tokens for each head, the others to the best of all that are left."""
    heads, total = scores_KT.shape
    kept = [sorted(range(total), key=lambda t: -scores_KT[h, t])[:base] for h in range(heads)]
    left = [
        (float(scores_KT[h, t]), h) for h in range(heads) for t in range(total) if t not in kept[h]
    ]
    best = sorted(left, reverse=True)[: heads * (tokens - base)]
    return [base + sum(1 for _, head in best if head == h) for h in range(heads)]


@settings(max_examples=20)
@given(st.integers(0, 1000), st.integers(2, 5))
def test_heads_share_by_the_best_scores(seed: int, heads: int) -> None:
    """As the paper's, to half a step; in steps of one token the same."""
    scores_KT = torch.rand(heads, 60, generator=torch.Generator().manual_seed(seed))
    scores_KT *= torch.linspace(0.5, 3, heads)[:, None]
    tokens, base = 12, 4
    sizes = Sizes.of(tokens, base, 100)
    assert (sizes.base, sizes.step) == (base, 1)
    shared = shared_out(scores_KT, sizes, float)
    assert [sizes.tokens(int(n)) for n in shared] == by_tokens(scores_KT, tokens, base)
    rough = Sizes.of(36, base, 100)
    found = [rough.tokens(int(n)) for n in shared_out(scores_KT, rough, float)]
    assert sum(found) == 36 * heads
    exact = by_tokens(scores_KT, 36, base)
    assert all(abs(a - b) <= heads * rough.step for a, b in zip(found, exact, strict=True))


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 1000))
def test_newest_tokens_are_in_budgets_and_not_in_what_is_compared(seed: int) -> None:
    """A text as long as the one that is compared on: the newest 3 and the paper's choice of the others."""
    random = torch.Generator().manual_seed(seed)
    scores = [torch.rand(4, 40, generator=random) * torch.tensor([[0.5], [1], [2], [3]])] * 2
    found = planned()
    found.statistics = Known(scores)
    AdaKV(tokens=20, slack=4, by="snapkv:observe=3", floor=0.6, share=0.5).run(found)
    older_KT = scores[0][:, :-3]
    want = [3 + tokens for tokens in by_tokens(older_KT, 20 - 3, 12 - 3)]
    assert budgets(found) == [dict(enumerate(want))] * 2


@pytest.mark.parametrize(("share", "mean"), [(None, 16), (0.5, 32)])
def test_without_tokens_a_budget_is_a_share_of_the_context(share: float | None, mean: int) -> None:
    given = {} if share is None else {"share": share}
    for method in (
        AdaKV(slack=4, by="snapkv:observe=3", **given),
        KVzip(slack=4, by="expected_attention:recent=3,sinks=1", **given),
    ):
        found, told = planned(), planned()
        method.run(found)
        replace(method, tokens=mean).run(told)
        assert found.layout == told.layout and found.model.context == 64
        assert sum(sum(layer.values()) for layer in budgets(found)) == 2 * 4 * mean
    with pytest.raises(RecipeError, match="leaves less than 8 to share out"):
        AdaKV(slack=4, by="snapkv:observe=9").run(planned())


def test_newest_tokens_that_grow_with_a_budget_leave_less_to_choose() -> None:
    """Of h2o's budgets half are the newest tokens; a text twice as long has twice as many of each."""
    method = AdaKV(tokens=20, slack=4, by="h2o", share=0.25)
    make = method.make()
    assert [make(tokens).newest for tokens in (20, 40)] == [10, 20]
    chosen = method.chosen(make, 1000, 35)  # of a text of 80 tokens a head of 20 chooses 10 of 70
    assert [chosen(tokens) for tokens in (20, 40)] == [5, 10]
    assert method.compared(make, 1000).newest == 125  # a text of 1,000 has a budget of 250
    assert method.compared(make, 40).newest == 5
    blind = AdaKV(tokens=20, slack=4, by="h2o")
    assert blind.chosen(blind.make(), 45, 35)(20) == 10  # the context is the text
    whole = KVzip(tokens=20, slack=4, share=0.25, by="h2o")
    assert whole.chosen(make, 1000, 40)(20) == 10  # a quarter of what is compared


def test_a_head_has_no_more_than_the_context() -> None:
    scores_KT = torch.tensor([[9.0] * 40, [1.0] * 40, [0.5] * 40])
    sizes = Sizes.of(12, 4, 18)
    assert sizes.tokens(sizes.most) == 17
    assert shared_out(scores_KT, sizes, float).tolist() == [13, 11, 0]
    with pytest.raises(IRError, match="leaves less than 8 to share out beside the 5"):
        Sizes.of(12, 5, 100)


@pytest.mark.parametrize(
    "method",
    [
        AdaKV(tokens=20, slack=4, by="h2o:recent=3", floor=0.2, share=0.5),
        AdaKV(tokens=20, slack=4, by="snapkv:observe=3", floor=0.2, share=0.5, over="model"),
        KVzip(tokens=20, slack=4, by="expected_attention:recent=3,sinks=1", share=0.5),
    ],
    ids=lambda method: f"{method.name}-{method.over}",
)
def test_memory_is_what_equal_budgets_take(method: AdaKV) -> None:
    """With weights and without: and the peak of an estimate is no lower."""
    scores = [torch.rand(4, 24, generator=torch.Generator().manual_seed(n)) for n in range(2)]
    scores[1] *= 3
    scores[0][2] *= 5
    layouts = []
    for statistics in (None, Known(scores)):
        found = planned()
        found.statistics = statistics
        result = method.run(found)
        assert found.layout is not None
        layouts.append(found.layout)
        given_to = [sum(layer.values()) for layer in budgets(found)]
        assert sum(given_to) == 2 * 4 * 20
        if statistics is not None:
            assert (given_to[0] == given_to[1]) == (method.over == "layer")
            assert len(set(budgets(found)[0].values())) > 1
            assert all(note.action == "applied" for note in result.notes)
    flat = planned()
    assert flat.layout is not None
    context = flat.model.context
    blind, seeing = layouts
    assert blind.bytes(1, context) == seeing.bytes(1, context)
    assert blind.peak_bytes(1, context, context) >= seeing.peak_bytes(1, context, context)
    cache = Cache.allocate(seeing, 2, context, 30)
    assert cache.nbytes == seeing.bytes(2, context, 30)


def attention(found: Program, tokens: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Of each layer its queries [S, H, D], scaled, and keys [S, K, D], as they go into attention."""
    seen = {}

    class Look(Observer):
        name = "look"

        def see(self, site: Site, *values: Tensor) -> Found:
            seen[site.name] = values[0][0] * 0.5, values[1][0]
            return {}

    stream(found, tokens, [Look()])
    return seen


def test_reconstruction_is_the_most_attention_of_a_second_reading() -> None:
    found = planned()
    observer = Reconstruction(tokens=10)
    twice = observer.reading(TEXT, found.model.context)
    assert twice.tolist() == [TEXT.flatten()[:10].tolist() * 2]
    assert observer.reading(TEXT, 9).shape == (1, 8)
    scores = stream(found, twice, [observer])
    for layer, (q_SHD, k_SKD) in attention(found, twice).items():
        logits_HST = torch.einsum("shd,thd->hst", q_SHD, k_SKD)
        logits_HST = logits_HST.masked_fill(~torch.ones(20, 20).tril().bool(), -torch.inf)
        want = logits_HST.softmax(-1)[:, 10:, :10].amax(1)
        torch.testing.assert_close(scores[layer]["score"], want, rtol=1e-4, atol=1e-5)


def test_token_scores_are_what_the_runtime_would_choose_by() -> None:
    found = planned()
    policy = HeavyHitters(4, 4)
    observer = TokenScores(policy, tokens=14)
    assert observer.key != TokenScores(HeavyHitters(4, 5), tokens=14).key
    text = observer.reading(TEXT, found.model.context)
    assert text.shape == (1, 14)
    scores = stream(found, text, [observer])
    for layer, (q_SHD, k_SKD) in attention(found, text).items():
        keys_KTD = k_SKD.transpose(0, 1).numpy()
        got = attention_sums(q_SHD.numpy(), keys_KTD, 0, np.ones((1, 14), np.float32))[:, 0]
        want = got / got.sum(1, keepdims=True)
        np.testing.assert_allclose(scores[layer]["score"].numpy(), want, rtol=1e-4)


def test_a_text_of_sinks_alone_has_scores() -> None:
    found, observer = planned(), TokenScores(Expected(9, 2, sinks=8), tokens=6)
    scores = stream(found, observer.reading(TEXT, found.model.context), [observer])
    assert [each["score"].tolist() for each in scores.values()] == 2 * [[[np.inf] * 6] * 4]


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: KVzip(tokens=9), "leaves less than 8 to share out"),
        (lambda: AdaKV(by="streaming_llm"), "one of snapkv|is one of"),
        (lambda: AdaKV(by="snapkv:tokens=9"), "tokens is an option of the method itself"),
        (lambda: AdaKV(by="snapkv:voters=9"), "unknown key 'voters'; snapkv takes"),
        (lambda: AdaKV(by="snapkv:observe"), "is written NAME:key=value"),
        (lambda: AdaKV(tokens=32), "a budget of 32 tokens leaves none to choose"),
        (lambda: AdaKV(tokens=35), "leaves less than 8 to share out beside the 33"),
        (lambda: AdaKV(floor=1), "floor is a share of tokens, 0 to 1, not 1"),
        (lambda: AdaKV(share=0), "more than 0 to 1, not 0"),
        (lambda: KVzip(over="heads"), "over a layer or the model, not 'heads'"),
        (lambda: AdaKV(read=8), "16 tokens or more, not 8"),
        (lambda: PyramidKV(steepness=0.5), "steepness is 1 or more"),
        (lambda: ZipVL(threshold=1), "more than 0 and less than 1, not 1"),
        (lambda: ZipVL(threshold=float("nan")), "less than 1, not nan"),
        (lambda: ZipVL(read=15), "layers are compared on 16 tokens or more, not 15"),
        (lambda: ZipVL(tokens=35), "leaves less than 8 to share out beside the 33"),
        (lambda: ZipVL(by="streaming_llm"), "is one of"),
        (lambda: PyramidKV(steepness=float("nan")), "steepness is 1 or more"),
        (lambda: PyramidKV(tokens=30), "a budget of 30 tokens leaves none"),
    ],
)
def test_what_cannot_be_is_refused(make: Callable[[], Pass], match: str) -> None:
    with pytest.raises(RecipeError, match=match):
        make()


def test_a_text_that_is_too_short_is_refused() -> None:
    found = planned()
    found.statistics = Known([torch.rand(4, 6)] * 2)
    with pytest.raises(CalibrationError, match="of which snapkv:observe=6 keeps the newest 6"):
        AdaKV(tokens=20, slack=4, by="snapkv:observe=6").run(found)


def test_layers_that_attend_otherwise_are_left_alone() -> None:
    found = program(BODY)
    PlanCache().run(found)
    result = KVzip(tokens=20, slack=4, by="expected_attention:recent=3").run(found)
    assert ("layer 1", "has a sliding window of 5 tokens of its own") in [
        (note.where, note.what) for note in result.notes if note.action == "skipped"
    ]
    assert sum(budgets(found)[0].values()) == 80
    assert found.layout is not None
    assert found.layout[1].groups[0].policy.whole
