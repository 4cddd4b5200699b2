"""The parts that encoder-decoders brought: positions by distance, weights of two programs, how one begins."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, T5Config
from transformers.models.t5.modeling_t5 import T5Attention

from einfold.compiler.codegen.onnx.account import scratch
from einfold.compiler.frontend import tokens
from einfold.compiler.frontend.huggingface import ModelSource
from einfold.compiler.frontend.relative import by_distance, by_pair
from einfold.compiler.ir.kv.keep.window import Window
from einfold.compiler.ir.ops.attention import Attention, CachedAttention
from einfold.compiler.ir.program import call_arguments
from einfold.compiler.ir.together import together
from einfold.compiler.ir.weights import Weight
from einfold.compiler.passes.cache.attach_cache import AttachCache
from einfold.compiler.passes.cache.plan_cache import PlanCache
from einfold.compiler.passes.kv_prune.keep import KeepByPolicy
from einfold.errors import ModelError, RecipeError

from ..programs import calls, program, run

BIASED = """
    weight @t : f32[4, 6]
    input %q "q" : f32[B, S, 4, 8]
    input %k "k" : f32[B, S, 2, 8]
    read %t "t" : f32[4, 6]
    call %o = einfold.attention(%q, %k, %k, none, 0, 0.5, 0, 0.0, %t) : f32[B, S, 4, 8]
    output "o" = %o
"""


def draw(*sizes: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(sizes, generator=torch.Generator().manual_seed(seed))


def spelled_out(q: torch.Tensor, k: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Attention of queries at the end of k, its bias looked up pair by pair."""
    batch, new, heads, _ = q.shape
    out = torch.zeros_like(q)
    for b in range(batch):
        for h in range(heads):
            keys = k[b, :, h * k.shape[2] // heads]
            for s in range(new):
                seen = k.shape[1] - new + s + 1
                far = [min(seen - 1 - t, table.shape[1] - 1) for t in range(seen)]
                logits = 0.5 * keys[:seen] @ q[b, s, h] + table[h, far]
                out[b, s, h] = torch.softmax(logits, 0) @ keys[:seen]
    return out


def test_attention_adds_what_distances_say() -> None:
    """Farther away than the table reaches too; in two steps over a cache as at once."""
    q, k, table = draw(2, 9, 4, 8), draw(2, 9, 2, 8, seed=1), draw(4, 6, seed=2)
    want = spelled_out(q, k, table)
    torch.testing.assert_close(Attention(q, k, k, None, 0, 0.5, 0, 0.0, table).run(), want)
    keys, values = torch.zeros(2, 2, 12, 8), torch.zeros(2, 2, 12, 8)
    rest = (None, None, None, None, None, None, None, 0, 0.5, 0, 0.0, False, "", table)
    parts = [
        CachedAttention(q[:, at], k[:, at], k[:, at], keys, values, used, *rest).run()
        for at, used in ((slice(0, 5), torch.tensor([0, 0])), (slice(5, 9), torch.tensor([5, 5])))
    ]
    torch.testing.assert_close(torch.cat(parts, 1), want)


def test_the_cache_takes_the_table_along() -> None:
    found = program(BIASED)
    q, k = draw(1, 7, 4, 8), draw(1, 7, 2, 8, seed=1)
    want = run(found, q=q, k=k)["o"]
    PlanCache().run(found)
    AttachCache().run(found)
    (call,) = calls(found)[:1]
    assert call.startswith("einfold.cached_attention(%q, %k, %k, %cache.0.0.key") and call.endswith(
        '"", %t)'
    )
    node = next(node for node in found.graph.nodes if "cached_attention" in node.name)
    assert call_arguments(node)["by_distance_HR"] is not None
    plain = scratch(found, node, {"B": 1, "S": 3, "C": 5}, portable=False)
    assert plain == 2 * 4 * 4 * 3 * 5
    cache = {f"cache.0.0.{part}": torch.zeros(1, 2, 7, 8) for part in ("key", "value")}
    got = run(found, q=q, k=k, lengths=torch.tensor([0]), **cache)["o"]
    torch.testing.assert_close(got, want)


def test_a_cache_that_lets_tokens_go_is_refused() -> None:
    found = program(BIASED)
    PlanCache().run(found)
    KeepByPolicy(policy=Window(1, 8, 4)).run(found)
    with pytest.raises(RecipeError, match=r"layer 0 adds relative .* leave out cache\.prune"):
        AttachCache().run(found)


def relative_attention(causal: bool) -> Any:
    config = T5Config(relative_attention_num_buckets=8, relative_attention_max_distance=12)
    config.is_decoder, config.num_heads, config.d_kv, config.d_model = causal, 4, 8, 32
    torch.manual_seed(0)
    module = T5Attention(config, has_relative_attention_bias=True, layer_idx=0)
    torch.nn.init.normal_(module.relative_attention_bias.weight)
    return module


def test_tables_are_what_buckets_say() -> None:
    """Of a decoder by distance, of an encoder in both directions; and the module is as it was afterwards."""
    module = relative_attention(causal=True)
    want = module.compute_bias(20, 20)[0]
    with by_distance(module, 20) as given:
        table = module.compute_bias(3, 3)
        assert len(given) == 1 and given[0] is table
    for query in range(20):
        torch.testing.assert_close(table[:, : query + 1].flip(1), want[:, query, : query + 1])
    torch.testing.assert_close(module.compute_bias(20, 20)[0], want)

    module = relative_attention(causal=False)
    want = module.compute_bias(20, 15)
    with by_pair(module, 20):
        torch.testing.assert_close(module.compute_bias(20, 15), want)
        torch.testing.assert_close(module.compute_bias(7, 9, device=None), want[:, :, :7, :9])


READS = """
    weight @shared : f32[3]
    input %x "x" : f32[B, 3]
    read %w "shared" : f32[3]
    call %y = aten.add.Tensor(%x, %w) : f32[B, 3]
    output "y" = %y
"""


@pytest.mark.parametrize("same", [True, False])
def test_weights_of_two_programs(same: bool) -> None:
    """What is equal is stored once; what only has the same name gets another, in its graph too."""
    one, other = torch.arange(3.0), torch.arange(3.0) + (0 if same else 1)
    programs = [program(READS, shared=one), program(READS, shared=other)]
    store = together(programs)
    assert list(store) == (["shared"] if same else ["shared", "shared.1"])
    for found, weight in zip(programs, (one, other), strict=True):
        (name,) = list(found.weights)
        assert torch.equal(store[name].load(), weight)
        (read,) = (str(node.target) for node in found.graph.nodes if node.op == "get_attr")
        assert read == name


def test_weights_known_by_their_shapes_are_one() -> None:
    programs = [program(READS), program(READS)]
    for found in programs:
        found.weights.restore({"shared": Weight.absent((3,), torch.float32, "shared")})
    assert together(programs).nbytes == 12


SOURCE = ModelSource("m", None, in_memory=True)


def settings(**values: Any) -> Any:
    return SimpleNamespace(vocab_size=50, **values)


def test_how_an_answer_begins() -> None:
    config = settings(decoder_start_token_id=3, bos_token_id=1)
    assert tokens.begin(SOURCE, config).tokens == (3,)
    generation = GenerationConfig(
        decoder_start_token_id=4,
        forced_bos_token_id=7,
        suppress_tokens=[8, 99],
        begin_suppress_tokens=[9],
    )
    found = tokens.begin(SOURCE, config, generation)
    assert (found.tokens, found.never, found.never_first) == ((4, 7), (8,), (9,))
    assert tokens.begin(SOURCE, settings(bos_token_id=1)).tokens == (1,)
    for wrong, said in (
        (settings(), "neither generation_config.json nor config.json names"),
        (settings(decoder_start_token_id=[1, 2]), "names one decoder_start_token_id"),
        (settings(decoder_start_token_id="<s>"), "should be a token id"),
    ):
        with pytest.raises(ModelError, match=said):
            tokens.begin(SOURCE, wrong)


def test_what_a_search_would_do_is_noted() -> None:
    assert tokens.ignored_in_generation(None) == []
    assert tokens.ignored_in_generation(GenerationConfig(num_beams=1)) == []
    asked = GenerationConfig(num_beams=4, no_repeat_ngram_size=3, min_length=5)
    (note,) = tokens.ignored_in_generation(asked)
    assert "num_beams 4, no_repeat_ngram_size 3, min_length 5" in note
    assert "no beam search" in note
