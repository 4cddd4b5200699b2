"""Tokens that stay by the attention they got, against the papers' definitions over the whole text."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from einfold.compiler.ir.kv import attention_sums as sums
from einfold.compiler.ir.kv.codes.half_bytes import as_slots, numbers
from einfold.compiler.ir.kv.keep.anchored import Anchored
from einfold.compiler.ir.kv.keep.crushed import Crushed
from einfold.compiler.ir.kv.keep.expected import Expected
from einfold.compiler.ir.kv.keep.heavy_hitters import HeavyHitters
from einfold.compiler.ir.kv.keep.matched import Matched
from einfold.compiler.ir.kv.keep.merged import Merged
from einfold.compiler.ir.kv.keep.pivotal import Pivotal
from einfold.compiler.ir.kv.keep.policy import Policy
from einfold.compiler.ir.kv.keep.runs import Runs
from einfold.compiler.ir.kv.keep.voted import Voted
from einfold.compiler.ir.kv.keep.window import Window
from einfold.compiler.ir.kv.layout import CacheLayout, HeadGroup, LayerCache
from einfold.compiler.ir.kv.store.plain.storage import Plain
from einfold.compiler.ir.kv.store.storage import read_storage
from einfold.errors import EinfoldError, IRError
from einfold.runtime.cache import Cache

HEADS, EACH, SIZE = 2, 2, 4
Floats = npt.NDArray[np.float32]


def layout(policy: Policy, storage: str = "f32") -> CacheLayout:
    group = HeadGroup((0, 1), policy, read_storage(storage))
    return CacheLayout((LayerCache(0, HEADS, SIZE, SIZE, (group,)),))


def text(rows: int, tokens: int, seed: int = 0) -> tuple[Floats, Floats, Floats]:
    """Queries [rows, T, H, D], keys and values [rows, T, K, D]."""
    random = np.random.default_rng(seed)
    shapes = [(rows, tokens, heads, SIZE) for heads in (HEADS * EACH, HEADS, HEADS)]
    q, k, v = (random.standard_normal(shape).astype(np.float32) for shape in shapes)
    return q, k, v


def write(cache: Cache, words: tuple[Floats, ...], sizes: npt.NDArray[np.int64] | int) -> None:
    """What a step does with queries, keys and values [rows, new, heads, size], padded on the right."""
    queries, new = words[0], words[1].shape[1]
    for row, used in enumerate(cache.clocks["slots.0"]):
        for part, x in (("key", words[1]), ("value", words[2])):
            slots = cache.buffers[f"cache.0.0.{part}"][row]
            slots[:, used : used + new] = as_slots(x[row].transpose(1, 0, 2), slots)
    cache.advance(sizes, {"query.0.0": queries})


def attention(q_THD: Floats, k_TKD: Floats) -> Floats:
    """Causal attention weights [K, EACH, T, T] of a whole text."""
    q_KETD = q_THD.transpose(1, 0, 2).reshape(HEADS, EACH, len(q_THD), SIZE)
    logits = q_KETD.astype(np.float64) @ k_TKD.transpose(1, 2, 0)[:, None]
    logits[..., ~np.tri(len(q_THD), dtype=bool)] = -np.inf
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return (weights / weights.sum(-1, keepdims=True)).astype(np.float32)  # type: ignore[no-any-return]


def read(cache: Cache, words: tuple[Floats, ...], prompt: int, chunks: list[int]) -> None:
    """Reads a prompt in chunks and settles; then reads the rest token by token."""
    place = 0
    total = words[0].shape[1]
    for size in [*chunks, *[1] * (total - sum(chunks))]:
        cache.make_room(size)
        write(cache, tuple(x[:, place : place + size] for x in words), size)
        place += size
        if place == prompt:
            cache.settle()


@given(st.integers(1, 3), st.lists(st.integers(1, 7), min_size=1, max_size=4), st.data())
def test_scores_are_sums_of_attention(rows: int, chunks: list[int], data: st.DataObject) -> None:
    """In chunks as at once; padding neither pays nor gets attention."""
    total = sum(chunks)
    words = text(rows, total)
    cache = Cache.allocate(layout(HeavyHitters(8, 8, 30)), rows, total)
    lengths = np.array([data.draw(st.integers(1, total)) for _ in range(rows)])
    place = 0
    for size in chunks:
        sizes = np.clip(lengths - place, 0, size)
        write(cache, tuple(x[:, place : place + size] for x in words), sizes)
        place += size
    for row, length in enumerate(lengths):
        want = attention(words[0][row, :length], words[1][row, :length]).sum((1, 2))
        got = cache.buffers["cache.0.0.score"][row]
        np.testing.assert_allclose(got[:, :length], want, rtol=1e-4, atol=1e-6)
        assert not got[:, length:].any()


def test_blocks_of_queries_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, _ = text(1, 20)
    weights = np.random.default_rng(1).random((2, 20)).astype(np.float32)
    keys = k[0].transpose(1, 0, 2)
    whole = sums.attention_sums(q[0], keys, 0, weights)
    monkeypatch.setattr(sums, "_BLOCK", 20 * HEADS * EACH * 3)
    np.testing.assert_allclose(sums.attention_sums(q[0], keys, 0, weights), whole, rtol=1e-4)


#: What numbers are multiplied by where a storage rounds them to codes.
STEPS = {"f32": 0, "i8": 9, "i4/channel": 2}


def in_codes(storage: str, q: Floats, k: Floats, v: Floats) -> tuple[Floats, Floats, Floats]:
    """Keys and values that the storage holds exactly, and queries with as large products."""
    steps = STEPS[storage]
    if not steps:
        return q, k, v
    most = 7 if storage == "i4/channel" else 127
    k, v = (np.round(x * steps).clip(-most, most) for x in (k, v))
    return q / steps, k, v


@pytest.mark.parametrize("storage", STEPS)
def test_heavy_hitters_of_a_prompt_stay(storage: str) -> None:
    """H2O: of the tokens before the recent ones, each head keeps those with the most attention."""
    q, k, v = in_codes(storage, *text(2, 30))
    policy = HeavyHitters(6, 4, 2)
    cache = Cache.allocate(layout(policy, storage), 2, 40, 30)
    read(cache, (q, k, v), 30, [11, 19])
    assert cache.clocks["slots.0"].tolist() == [10, 10]
    for row in range(2):
        got = attention(q[row], k[row]).sum((1, 2))
        for head in range(HEADS):
            heavy = np.sort(np.argsort(-got[head, :26], kind="stable")[:6])
            stay = [*heavy, 26, 27, 28, 29]
            for part, x in (("key", k), ("value", v)):
                slots = cache.buffers[f"cache.0.0.{part}"][row, head, :10]
                np.testing.assert_array_equal(numbers(slots), x[row, stay, head])
            kept = cache.buffers["cache.0.0.score"][row, head]
            np.testing.assert_allclose(kept[:10], got[head, stay], rtol=1e-4)
            assert not kept[10:].any()


def by_definition(
    q_TD: Floats, k_TD: Floats, policy: HeavyHitters, prompt: int, total: int
) -> list[int]:
    """H2O for one head and one query head a token at a time, over token numbers: which ones are kept."""
    alive: list[int] = []
    score = np.zeros(total)
    kept = policy.heavy + policy.recent
    for t in range(total):
        if t >= prompt and len(alive) + 1 > kept + policy.slack:
            alive = evicted(alive, score, policy)
        alive.append(t)
        logits = k_TD[alive].astype(np.float64) @ q_TD[t]
        weights = np.exp(logits - logits.max())
        score[alive] += weights / weights.sum()
        if t + 1 == prompt and len(alive) > kept + policy.slack:
            alive = evicted(alive, score, policy)
    return alive


def evicted(alive: list[int], score: npt.NDArray[np.float64], policy: HeavyHitters) -> list[int]:
    older, newest = alive[: -policy.recent], alive[-policy.recent :]
    best = sorted(older, key=lambda t: -score[t])[: policy.heavy]
    return sorted(best) + newest


@pytest.mark.parametrize("prompt", [5, 20])
def test_heavy_hitters_are_chosen_anew_while_decoding(prompt: int) -> None:
    q, k, v = text(1, 48, seed=3)
    q[:, :, 1::EACH] = q[:, :, ::EACH]  # one query head would do
    policy = HeavyHitters(5, 3, 4)
    cache = Cache.allocate(layout(policy), 1, 48, prompt)
    read(cache, (q, k, v), prompt, [prompt])
    used = int(cache.clocks["slots.0"][0])
    for head in range(HEADS):
        stay = by_definition(q[0, :, head * EACH], k[0, :, head], policy, prompt, 48)
        np.testing.assert_array_equal(
            cache.buffers["cache.0.0.value"][0, head, :used], v[0, stay, head]
        )


def test_streaming_chooses_after_every_chunk() -> None:
    """Where nothing leaves before the end, streaming and exact prefill keep the same tokens."""
    words = text(1, 14, seed=5)
    found = []
    for prefill in ("exact", "streaming"):
        policy = HeavyHitters(4, 3, 7, prefill)
        cache = Cache.allocate(layout(policy), 1, 20, 14)
        assert cache.step_limit() == (20 if prefill == "exact" else 7)
        read(cache, words, 14, [7, 7])
        cache.make_room(7)
        found.append(cache.buffers["cache.0.0.key"][:, :, :7])
    np.testing.assert_array_equal(*found)


@given(st.integers(1, 3), st.integers(20, 30), st.sampled_from([1, 3, 7]), st.booleans())
def test_the_last_tokens_vote_for_the_rest_of_a_prompt(
    seed: int, length: int, kernel: int, small_chunks: bool
) -> None:
    """SnapKV: in chunks shorter than the voters too, and in rows of unequal lengths."""
    q, k, v = text(2, length, seed)
    policy = Voted(6, 4, kernel, 8, EACH)
    cache = Cache.allocate(layout(policy), 2, 40, length)
    assert cache.buffers["cache.0.0.voters"].shape == (2, HEADS * EACH, 4, SIZE)
    lengths = np.array([length, length - 3])
    for start in range(0, length, 3 if small_chunks else length):
        end = start + (3 if small_chunks else length)
        size = min(end, length) - start
        sizes = np.clip(lengths - start, 0, size)
        write(cache, tuple(x[:, start:end] for x in (q, k, v)), sizes)
    cache.settle()
    assert "cache.0.0.voters" not in cache.buffers
    assert cache.clocks["slots.0"].tolist() == [10, 10]
    for row, count in enumerate(lengths):
        weights = attention(q[row, :count], k[row, :count])[:, :, -4:, : count - 4].sum((1, 2))
        for head in range(HEADS):
            pooled = [
                weights[head, max(0, t - kernel // 2) : t + kernel // 2 + 1].max()
                for t in range(count - 4)
            ]
            chosen = np.sort(np.argsort(-np.array(pooled), kind="stable")[:6])
            stay = [*chosen, *range(count - 4, count)]
            np.testing.assert_array_equal(
                numbers(cache.buffers["cache.0.0.key"][row, head, :10]), k[row, stay, head]
            )


def crushed_by_definition(
    votes_HT: Floats, pooled_T: Floats, count: int, standing: int
) -> list[int]:
    """KVCrush for one KV head: which tokens stay, of those that the queries of all heads gave `votes`."""
    older = len(pooled_T)
    ordered = sorted(range(older), key=lambda t: -pooled_T[t])
    important, rest = ordered[: count - standing], sorted(ordered[count - standing :])
    signs = [[by_T[t] > np.median(by_T) for by_T in votes_HT] for t in range(older)]
    anchor = [sum(signs[t][h] for t in rest) > len(rest) / 2 for h in range(len(votes_HT))]
    apart = sorted(rest, key=lambda t: sum(a != b for a, b in zip(signs[t], anchor, strict=True)))
    edges = [n * len(rest) / standing for n in range(standing + 1)]
    return sorted(important + [apart[int((a + b) / 2)] for a, b in pairwise(edges)])


@given(st.integers(1, 5), st.integers(20, 30), st.sampled_from([0.25, 0.5, 1.0]))
def test_others_are_stood_for_by_those_that_as_many_heads_attend_to(
    seed: int, length: int, share: float
) -> None:
    """KVCrush: beside what SnapKV keeps, in rows of unequal lengths."""
    q, k, v = text(2, length, seed)
    policy = Crushed(8, 4, 3, 8, EACH, share=share)
    cache = Cache.allocate(layout(policy), 2, 40, length)
    lengths = np.array([length, length - 3])
    write(cache, (q, k, v), lengths)
    cache.settle()
    assert cache.clocks["slots.0"].tolist() == [12, 12]
    for row, count in enumerate(lengths):
        older = count - 4
        votes = attention(q[row, :count], k[row, :count])[:, :, -4:, :older].sum(2)
        for head in range(HEADS):
            got = votes[head].sum(0)
            pooled = np.array([got[max(0, t - 1) : t + 2].max() for t in range(older)])
            chosen = crushed_by_definition(votes.reshape(-1, older), pooled, 8, int(8 * share))
            np.testing.assert_array_equal(
                cache.buffers["cache.0.0.key"][row, head, :12],
                k[row, [*chosen, *range(older, count)], head],
            )


def test_without_representatives_it_is_its_parent() -> None:
    words = text(1, 30)
    kept = []
    for policy in (Voted(8, 4, 3, 8, EACH), Crushed(8, 4, 3, 8, EACH, share=0)):
        cache = Cache.allocate(layout(policy), 1, 40, 30)
        read(cache, words, 30, [30])
        kept.append(cache.buffers["cache.0.0.key"])
    np.testing.assert_array_equal(*kept)


def expected_shares(q_TD: Floats, k_TD: Floats) -> npt.NDArray[np.float64]:
    """Of one query head: the mean weight exp(k q) of each key over a normal distribution of queries, as a
    share; with the moments of the queries as they are defined."""
    mean, spread = q_TD.mean(0), np.cov(q_TD.T.astype(np.float64), bias=True)
    weights = np.array([np.exp(k @ mean + k @ spread @ k / 2) for k in k_TD.astype(np.float64)])
    return weights / weights.sum()  # type: ignore[no-any-return]


@pytest.mark.parametrize("storage", STEPS)
@pytest.mark.parametrize("options", [{}, {"norm": False}, {"epsilon": 0.1}, {"sinks": 0}])
@pytest.mark.parametrize("chunk", [1, 7, 30])
def test_what_later_queries_expect_stays(storage: str, options: dict[str, Any], chunk: int) -> None:
    """Expected Attention: in chunks shorter than the sinks too, and in rows of unequal lengths."""
    length = 30
    q, k, v = text(2, length, seed=4)
    v *= np.linspace(0.2, 3, length, dtype=np.float32)[
        np.random.default_rng(0).permutation(length), None, None
    ]
    q, k, v = in_codes(storage, q, k, v)
    policy = Expected(6, 4, slack=8, queries=EACH, **{"sinks": 2, **options})
    cache = Cache.allocate(layout(policy, storage), 2, 40, length)
    lengths = np.array([length, length - 3])
    for start in range(0, length, chunk):
        end = min(start + chunk, length)
        sizes = np.clip(lengths - start, 0, end - start)
        write(cache, tuple(x[:, start:end] for x in (q, k, v)), sizes)
    cache.settle()
    assert not {"cache.0.0.moments", "cache.0.0.seen"} & cache.buffers.keys()
    assert cache.clocks["slots.0"].tolist() == [10, 10]
    first = policy.sinks
    for row, count in enumerate(lengths):
        for head in range(HEADS):
            of_head = q[row, first:count, head * EACH : (head + 1) * EACH]
            shares = sum(
                expected_shares(of_head[:, each], k[row, first:count, head]) for each in range(EACH)
            )
            score = shares / EACH + policy.epsilon
            if policy.norm:
                score = score * np.linalg.norm(v[row, first:count, head], axis=-1)
            best = np.argsort(-score[: count - first - 4], kind="stable")[: 6 - first]
            stay = [*range(first), *np.sort(best + first), *range(count - 4, count)]
            np.testing.assert_array_equal(
                numbers(cache.buffers["cache.0.0.key"][row, head, :10]), k[row, stay, head]
            )


def test_what_was_chosen_stays_while_generated_tokens_pass() -> None:
    q, k, v = text(1, 50)
    cache = Cache.allocate(layout(Voted(6, 4, 1, 5, EACH)), 1, 50, 20)
    read(cache, tuple(x[:, :20] for x in (q, k, v)), 20, [20])
    chosen = cache.buffers["cache.0.0.key"][:, :, :6].copy()
    for t in range(20, 50):
        cache.make_room(1)
        write(cache, tuple(x[:, t : t + 1] for x in (q, k, v)), 1)
    used = int(cache.clocks["slots.0"][0])
    keys = cache.buffers["cache.0.0.key"]
    np.testing.assert_array_equal(keys[:, :, :6], chosen)
    np.testing.assert_array_equal(keys[0, :, 6:used], k[0, 56 - used :].transpose(1, 0, 2))


@pytest.mark.parametrize("similarity", [1.0, 0.3, -1.0])
def test_what_leaves_is_merged_into_what_it_resembles(similarity: float) -> None:
    """EMS: by the sum of global and local shares; none, some, or all of what leaves has a place."""
    q, k, v = text(1, 24, seed=2)
    policy = Merged(5, 4, 2, "exact", 8, similarity)
    cache = Cache.allocate(layout(policy), 1, 30, 24)
    read(cache, (q, k, v), 24, [10, 14])
    weights = attention(q[0], k[0]).sum(1)
    fading = (1 - 1 / 8) ** np.arange(23, -1, -1)
    for head in range(HEADS):
        every, late = weights[head].sum(0), fading @ weights[head]
        score = (every / every.sum() + late / late.sum())[:20]
        centres = sorted(np.argsort(-score, kind="stable")[:5])
        want_k, want_v = k[0, centres, head].astype(float), v[0, centres, head].astype(float)
        total, sums = score[centres].copy(), every[centres].copy()
        want_k, want_v = want_k * total[:, None], want_v * total[:, None]
        units = k[0, :, head] / np.linalg.norm(k[0, :, head], axis=1, keepdims=True)
        for t in sorted(set(range(20)) - set(centres)):
            cosine = units[centres] @ units[t]
            c = int(cosine.argmax())
            if cosine[c] >= similarity:
                want_k[c] += score[t] * k[0, t, head]
                want_v[c] += score[t] * v[0, t, head]
                total[c] += score[t]
                sums[c] += every[t]
        for part, want, x in (("key", want_k, k), ("value", want_v, v)):
            slots = cache.buffers[f"cache.0.0.{part}"][0, head]
            np.testing.assert_allclose(slots[:5], want / total[:, None], rtol=1e-3, atol=1e-5)
            np.testing.assert_array_equal(slots[5:9], x[0, 20:, head])
        np.testing.assert_allclose(cache.buffers["cache.0.0.score"][0, head, :5], sums, rtol=1e-3)


def test_tokens_leave_that_recent_queries_gave_little_most_often() -> None:
    """Scissorhands: by the queries that gave a token less than the mean of what they saw, in chunks too."""
    q, k, v = text(1, 30, seed=6)
    policy = Pivotal(6, 4, 2, history=8, queries=EACH)
    cache = Cache.allocate(layout(policy), 1, 40, 30)
    read(cache, (q, k, v), 30, [11, 19])
    weights = attention(q[0], k[0])
    below = weights < 1 / np.arange(1, 31)[:, None]
    for head in range(HEADS):
        counts = [
            sum((7 / 8) ** (29 - s) * below[head, :, s, t].sum() for s in range(t, 30))
            for t in range(30)
        ]
        stay = [*np.sort(np.argsort(counts[:26], kind="stable")[:6]), 26, 27, 28, 29]
        for part, x in (("key", k), ("value", v)):
            np.testing.assert_array_equal(
                cache.buffers[f"cache.0.0.{part}"][0, head, :10], x[0, stay, head]
            )
        kept = cache.buffers["cache.0.0.seldom"][0, head, :10]
        np.testing.assert_allclose(kept, np.array(counts)[stay], rtol=1e-4)


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("chunks", [[30], [11, 19]])
def test_what_leaves_is_merged_into_the_nearest_anchor(chunks: list[int], merge: bool) -> None:
    """Elastic Cache: behind the prompt, by all attention of its tokens; then the middle slides."""
    q, k, v = text(2, 44, seed=10)
    policy = Anchored(8, 5, 2, merge, 3)
    cache = Cache.allocate(layout(policy), 2, 44, 30)
    assert "cache.0.0.score" in cache.buffers
    place = 0
    for size in [*chunks, *[1] * 14]:
        cache.make_room(size)
        write(cache, tuple(x[:, place : place + size] for x in (q, k, v)), size)
        place += size
        if place == 30:
            cache.settle()
            assert "cache.0.0.score" not in cache.buffers
    used = int(cache.clocks["slots.0"][0])
    for row in range(2):
        got = attention(q[row, :30], k[row, :30]).sum((1, 2))
        for head in range(HEADS):
            best = np.argsort(-got[head, 2:25], kind="stable")[:6] + 2
            chosen = [0, 1, *np.sort(best)]
            for part, x in (("key", k), ("value", v)):
                taken = {c: [c] for c in chosen}
                for t in set(range(25)) - set(chosen) if merge else ():
                    taken[min(chosen[2:], key=lambda c, t=t: (abs(c - t), c))].append(t)
                want = [np.mean([x[row, t, head] for t in taken[c]], axis=0) for c in chosen]
                slots = cache.buffers[f"cache.0.0.{part}"][row, head]
                np.testing.assert_allclose(slots[:8], want, rtol=1e-4, atol=1e-6)
                np.testing.assert_array_equal(slots[8:used], x[row, 44 + 8 - used :, head])


def unit(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return x / np.linalg.norm(x)  # type: ignore[no-any-return]


def merged_by_definition(
    q_TD: Floats, k_TD: Floats, v_TD: Floats, policy: Matched, prompt: int
) -> tuple[list[int], npt.NDArray[np.float64]]:
    """D2O for one head and one query head a token at a time: which tokens are kept, and their keys and values
    [2, T, D]."""
    total = len(q_TD)
    kv = np.stack((k_TD, v_TD)).astype(np.float64)
    alive: list[int] = []
    score, threshold = np.zeros(total), None
    most = policy.heavy + policy.recent + policy.slack
    for t in range(total):
        alive.append(t)
        weights = np.exp(kv[0, alive] @ q_TD[t])
        score[alive] += weights / weights.sum()
        full = len(alive) > most if t + 1 == prompt else t >= prompt and len(alive) == most
        if not full or t + 1 == total:
            continue
        stay = evicted(alive, score, policy)
        likes = {
            gone: max((float(unit(kv[0, x]) @ unit(kv[0, gone])), x) for x in stay)
            for gone in alive
            if gone not in stay
        }
        mean = float(np.mean([cosine for cosine, _ in likes.values()]))
        threshold = (
            mean if threshold is None else policy.newer * mean + (1 - policy.newer) * threshold
        )
        before = kv.copy()
        for kept in stay:
            taken = {g: c for g, (c, x) in likes.items() if x == kept and c >= threshold}
            total_weight = np.e + sum(np.exp(c) for c in taken.values())
            mixed = np.e * before[:, kept] + sum(np.exp(c) * before[:, g] for g, c in taken.items())
            kv[:, kept] = mixed / total_weight
        alive = stay
    return alive, kv


@pytest.mark.parametrize("newer", [0.7, 1.0])
def test_what_leaves_is_merged_above_a_moving_threshold(newer: float) -> None:
    """D2O: behind the prompt and again as tokens are generated."""
    q, k, v = text(1, 44, seed=7)
    q[:, :, 1::EACH] = q[:, :, ::EACH]  # one query head would do
    policy = Matched(5, 3, 4, newer=newer)
    cache = Cache.allocate(layout(policy), 1, 44, 20)
    read(cache, (q, k, v), 20, [20])
    used = int(cache.clocks["slots.0"][0])
    for head in range(HEADS):
        stay, kv = merged_by_definition(
            q[0, :, head * EACH], k[0, :, head], v[0, :, head], policy, 20
        )
        assert len(stay) == used
        for part, x in zip(("key", "value"), kv, strict=True):
            slots = cache.buffers[f"cache.0.0.{part}"][0, head, :used]
            np.testing.assert_allclose(slots, x[stay], rtol=1e-4, atol=1e-5)
        assert np.abs(kv[0, stay] - k[0, stay, head]).max() > 0.1


@pytest.mark.parametrize(("similarity", "apart"), [(0.0, 0), (0.5, 2), (0.99, 0)])
def test_runs_of_similar_neighbours_become_one(similarity: float, apart: int) -> None:
    """KVMerger: the most similar neighbours until what is left fits; where too few are similar, the runs with
    the least attention leave."""
    q, k, v = text(1, 26, seed=8)
    k[0, 5], k[0, 6] = 2 * k[0, 4], k[0, 4]  # three in one direction
    policy = Runs(6, 4, 2, apart=apart, similarity=similarity)
    cache = Cache.allocate(layout(policy), 1, 30, 26)
    read(cache, (q, k, v), 26, [10, 16])
    score = attention(q[0], k[0]).sum((1, 2))
    for head in range(HEADS):
        x, by = k[0, :22, head].astype(float), score[head, :22]
        alone = set(np.argsort(-by, kind="stable")[:apart])
        pairs = sorted((-float(unit(x[t]) @ unit(x[t + 1])), t) for t in range(21))
        able = [t for c, t in pairs if -c >= similarity - 1e-6 and not {t, t + 1} & alone]
        runs: list[list[int]] = []
        for t in range(22):
            if t and t - 1 in able[:16]:
                runs[-1].append(t)
            else:
                runs.append([t])
        runs = sorted(sorted(runs, key=lambda run: -by[run].sum())[:6])
        for slot, run in enumerate(runs):
            pivot = max(run, key=lambda t: by[t])
            apart_by = {t: np.linalg.norm(x[t] - x[pivot]) for t in run if t != pivot}
            sigma = np.mean([*apart_by.values()]) / np.sqrt(2) if apart_by else 1
            shares = {t: np.exp(-(d**2) / (2 * sigma**2)) for t, d in apart_by.items()} | {pivot: 1}
            for part, whole in (("key", k), ("value", v)):
                mixed = sum(g * whole[0, t, head] for t, g in shares.items()) / sum(shares.values())
                got = cache.buffers[f"cache.0.0.{part}"][0, head, slot]
                np.testing.assert_allclose(got, mixed, rtol=1e-3, atol=1e-5)
            got = cache.buffers["cache.0.0.score"][0, head, slot]
            np.testing.assert_allclose(got, by[run].sum(), rtol=1e-3)
        assert max(map(len, runs)) > 1
        newest = cache.buffers["cache.0.0.key"][0, head, 6:10]
        np.testing.assert_array_equal(newest, k[0, 22:, head])


@pytest.mark.parametrize(
    "policy",
    [Pivotal(5, 3), Merged(5, 3), Matched(5, 3), Runs(5, 3, apart=1), Anchored(5, 3, sinks=1)],
)
def test_rows_of_torch_are_those_of_numpy(policy: Policy) -> None:
    """What stays, what is merged, and what is remembered."""
    random = np.random.default_rng(9)
    shapes = {"key": (2, 20, 4), "value": (2, 20, 4), "threshold": (2, 2)}
    shapes |= dict.fromkeys(policy.scores, (2, 20))
    row = {name: random.random(shape).astype(np.float32) for name, shape in shapes.items()}
    other = {name: torch.from_numpy(x.copy()) for name, x in row.items()}
    for used, leaving in ((20, 8), (12, 4)):
        stay = policy.staying(row, used, leaving)
        np.testing.assert_array_equal(policy.staying(other, used, leaving), stay)
    for name, x in row.items():
        np.testing.assert_allclose(other[name].numpy(), x, rtol=1e-6)


def test_a_window_moves_the_scores_of_its_tokens() -> None:
    """Scores of a storage go along with the tokens, whatever decides which stay."""

    class Scored(Plain):
        scored = True

    group = HeadGroup((0, 1), Window(2, 3, 4), Scored())
    cache = Cache.allocate(CacheLayout((LayerCache(0, HEADS, SIZE, SIZE, (group,)),)), 1, 40)
    words = text(1, 10)
    write(cache, tuple(x[:, :9] for x in words), 9)
    before = cache.buffers["cache.0.0.score"].copy()
    cache.make_room(1)
    after = cache.buffers["cache.0.0.score"]
    np.testing.assert_array_equal(after[:, :, :5], before[:, :, [0, 1, 6, 7, 8]])
    assert not after[:, :, 5:].any()


def test_bad_numbers_are_refused() -> None:
    with pytest.raises(IRError, match="heavy_hitters keeps 1 or more of heavy"):
        HeavyHitters(0, 4)
    with pytest.raises(IRError, match="a cosine between -1 and 1, not 32 and 2"):
        Merged(4, 4, similarity=2)
    with pytest.raises(IRError, match="pivotal counts over 1 or more queries, not 0"):
        Pivotal(4, 4, history=0)
    for newer in (0, 1.5, float("nan")):
        with pytest.raises(IRError, match="newer is a share of the threshold, more than 0 to 1"):
            Matched(4, 4, newer=newer)
    with pytest.raises(IRError, match="of the 4 tokens beside the newest 0 or more stay apart"):
        Runs(4, 4, apart=4)
    for similarity in (-0.1, 1.1, float("nan")):
        with pytest.raises(
            IRError, match="runs are of neighbours whose keys have a cosine of 0 to 1"
        ):
            Runs(4, 4, apart=1, similarity=similarity)
    with pytest.raises(IRError, match="an odd number of tokens, not 4"):
        Voted(4, 4, 4)
    with pytest.raises(
        IRError, match="voted keeps 1 or more chosen tokens, of observe and of slack, not 4, 0"
    ):
        Voted(4, 0)
    for share in (-0.1, 1.1, float("nan")):
        with pytest.raises(IRError, match="crushed: share is a part of the chosen tokens, 0 to 1"):
            Crushed(4, 4, share=share)
    with pytest.raises(IRError, match="0 or more of them and fewer than all, not 4; raise tokens"):
        Anchored(4, 4, sinks=4)
    with pytest.raises(IRError, match="include the sinks, 0 or more of them, not 5"):
        Expected(4, 4, sinks=5)
    with pytest.raises(IRError, match="epsilon is 0 or more and future 1 or more, not -1 and 512"):
        Expected(4, 4, epsilon=-1)
    for none in (float("nan"), float("inf")):
        with pytest.raises(IRError, match="epsilon is 0 or more"):
            Expected(4, 4, epsilon=none)
    cache = Cache.allocate(layout(HeavyHitters(4, 4)), 1, 8)
    with pytest.raises(EinfoldError, match=r"the step gave no query\.0\.0"):
        cache.advance(1)
    assert replace(HeavyHitters(4, 4), slack=2).slots(100) == 10
