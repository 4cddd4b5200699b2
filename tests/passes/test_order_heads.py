from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

import einfold
from einfold.compiler.ir.kv.keep.window import Window
from einfold.compiler.ir.printer import print_program
from einfold.compiler.ir.program import Program
from einfold.compiler.ir.verifier import verify
from einfold.compiler.passes.cache.attach_cache import AttachCache
from einfold.compiler.passes.cache.order_heads import OrderHeads
from einfold.compiler.passes.cache.plan_cache import PlanCache
from einfold.compiler.passes.cleanup.simplify import Simplify

from .. import head_groups, models
from ..greedy import all_logits
from ..programs import calls, program, run
from ..quick import rarely

BODY = """
    weight @cos : f32[64, 4]
    weight @sin : f32[64, 4]
    weight @qkv.weight : f32[64, 16]
    weight @qkv.bias : f32[64]
    weight @sinks : f32[4]
    weight @o.weight : f32[16, 32]
    input %ids "input_ids" : i64[B, S]
    input %pos "position_ids" : i64[B, S]
    input %x "x" : f32[B, S, 16]
    read %cos "cos" : f32[64, 4]
    read %sin "sin" : f32[64, 4]
    read %w "qkv.weight" : f32[64, 16]
    read %b "qkv.bias" : f32[64]
    read %sinks "sinks" : f32[4]
    read %ow "o.weight" : f32[16, 32]
    call %n = aten.sym_size.int(%x, 0) : sym(B)
    call %s = aten.sym_size.int(%x, 1) : sym(S)
    call %y = einfold.linear(%x, %w, %b) : f32[B, S, 64]
    call %parts = aten.split_with_sizes.default(%y, [32, 16, 16], -1) : {parts}
    call %q0 = builtin.getitem(%parts, 0) : f32[B, S, 32]
    call %k0 = builtin.getitem(%parts, 1) : f32[B, S, 16]
    call %v0 = builtin.getitem(%parts, 2) : f32[B, S, 16]
    call %q = aten.reshape.default(%q0, [%n, %s, 4, 8]) : f32[B, S, 4, 8]
    call %k = aten.reshape.default(%k0, [%n, %s, 2, 8]) : f32[B, S, 2, 8]
    call %v = aten.reshape.default(%v0, [%n, %s, 2, 8]) : f32[B, S, 2, 8]
    {between}
    call %rq = einfold.rotary({q}, %pos, %cos, %sin, false) : f32[B, S, 4, 8]
    call %rk = einfold.rotary(%k, %pos, %cos, %sin, false) : f32[B, S, 2, 8]
    call %a = einfold.attention(%rq, %rk, %v, %sinks, 3, 0.25, 0, 0.0) : f32[B, S, 4, 8]
    call %f = aten.reshape.default(%a, [%n, %s, 32]) : f32[B, S, 32]
    call %o = einfold.linear(%f, %ow, none) : f32[B, S, 16]
    output "o" = %o
    {more}
"""

PARTS = "(f32[B, S, 32], f32[B, S, 16], f32[B, S, 16])"
SCALED = "call %mq = aten.mul.Tensor(%q, 0.5) : f32[B, S, 4, 8]"


def grouped(between: str = "", q: str = "%q", more: str = "") -> Program:
    found = program(BODY.format(between=between, q=q, more=more, parts=PARTS))
    PlanCache().run(found)
    head_groups.KeepLast(Window(1, 9, 9)).run(found)
    return found


def inputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "input_ids": torch.zeros(2, 5, dtype=torch.long),
        "position_ids": torch.arange(5).expand(2, 5),
        "x": torch.randn(2, 5, 16, generator=generator),
    }


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def layout(found: Program) -> list[str]:
    assert found.layout is not None
    return [line.split(" of=")[0] for line in found.layout.lines()]


def attached(found: Program) -> dict[str, torch.Tensor]:
    """The program's results over an empty cache."""
    AttachCache().run(found)
    Simplify().run(found)
    verify(found, deep=True)
    assert found.layout is not None
    caches = {b.name: torch.zeros(b.shape) for b in found.layout.buffers(2, 12)}  # type: ignore[arg-type]
    counters = {name: torch.zeros(2).long() for name in ("lengths", *found.layout.clocks())}
    return run(found, **inputs(), **counters, **caches)


def test_each_group_reads_one_packed_part() -> None:
    found = grouped()
    want = run(found, **inputs())["o"]
    result = OrderHeads().run(found)
    verify(found, deep=True)
    assert layout(found) == ["cache 3.0 heads=0", "cache 3.1 heads=1"]
    assert "order 1,0; one packed part a group" in result.notes[0].what
    close(run(found, **inputs())["o"], want)
    close(attached(found)["o"], want)
    lines = [line for line in calls(found) if "sym_size" not in line and "getitem" not in line]
    kinds = [line.split("(")[0].removeprefix("aten.").removeprefix("einfold.") for line in lines]
    split = "split_with_sizes.default"
    assert kinds == [
        "linear",
        split,
        split,  # the sinks, which are a constant
        *([split, *["reshape.default"] * 3] * 2),
        *(["cached_attention"] * 2),
        "cat.default",
        "reshape.default",
        "linear",
    ]
    assert "[32, 32], -1" in lines[1] and "[16, 8, 8], -1" in lines[3]
    assert "index_select" not in print_program(found)


def test_what_works_on_heads_keeps_q_k_and_v_apart() -> None:
    found = grouped(SCALED, "%mq")
    want = run(found, **inputs())["o"]
    result = OrderHeads().run(found)
    assert layout(found) == ["cache 3.0 heads=0", "cache 3.1 heads=1"]
    assert "contiguous, q, k and v apart" in result.notes[0].what
    assert calls(found)[3].startswith("aten.split_with_sizes.default(%3, [32, 16, 16]")
    close(run(found, **inputs())["o"], want)
    close(attached(found)["o"], want)
    assert "index_select" not in print_program(found)


@pytest.mark.parametrize(
    ("between", "q", "more", "reason"),
    [
        ("call %mq = aten.neg.default(%q) : f32[B, S, 4, 8]", "%mq", "", "%mq stands between"),
        ("", "%q", 'output "k" = %k', "%output reads heads of %k too"),
    ],
)
def test_heads_that_cannot_be_followed_keep_their_order(
    between: str, q: str, more: str, reason: str
) -> None:
    found = grouped(between, q, more)
    before, want = print_program(found), run(found, **inputs())["o"]
    result = OrderHeads().run(found)
    assert not result.changed and reason in result.notes[0].what
    assert print_program(found) == before
    close(attached(found)["o"], want)
    assert "index_select" in print_program(found)


def test_equal_heads_stay_as_they_are() -> None:
    found = program(BODY.format(between="", q="%q", more="", parts=PARTS))
    PlanCache().run(found)
    before = print_program(found)
    assert not OrderHeads().run(found).changed
    assert print_program(found) == before


WINDOW = Window(sinks=2, recent=10, slack=6, compensation=True)


def graphs_in(graph: Any) -> Iterator[Any]:
    """A graph and the branches in it."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from graphs_in(attribute.g)


@pytest.mark.parametrize(
    ("name", "portable", "int8", "prefill"),
    [
        ("llama", False, False, "exact"),
        rarely("llama", False, True, "streaming"),
        ("llama", True, False, "streaming"),
        rarely("qwen2", False, False, "streaming"),
        rarely("qwen3", False, False, "exact"),
        ("gpt_oss", False, False, "streaming"),
        rarely("gpt2", False, False, "exact"),
        rarely("gpt2", True, False, "exact"),
        ("gpt_neox", False, True, "exact"),
    ],
)
def test_onnxruntime_agrees_with_the_reference(
    name: str,
    portable: bool,
    int8: bool,
    prefill: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Logits over chunk borders, and what rows of unequal length continue with."""
    folder = models.save(name, tmp_path / "model")
    head_groups.use(monkeypatch, replace(WINDOW, prefill=prefill), int8)
    out = tmp_path / "out"
    einfold.compile(folder, out, portable=portable)
    assert "index_select" not in (out / "graph.eir").read_text()
    if not portable:
        graph = onnx.load(str(out / "model.onnx"), load_external_data=False).graph
        # Those that write a cache: int8 slots are also widened for others, which are given none.
        every = [node for each in graphs_in(graph) for node in each.node]
        writing = [n for n in every if n.op_type == "GroupQueryAttention" and len(n.output) == 3]
        keys = [node.input[1] for node in writing]
        assert len(keys) == 4
        # Packed parts, but where a norm is in between, or a rotary that the operator does not do.
        assert any(keys) == (name in ("qwen3", "gpt_neox"))
    fast = einfold.load(out, chunk=8, threads=1)
    slow = einfold.load(out, chunk=8, engine="reference")
    tokens = np.random.default_rng(0).integers(3, models.VOCABULARY, 61).tolist()
    np.testing.assert_allclose(all_logits(fast, tokens), all_logits(slow, tokens), atol=2e-3)
    prompts = [tokens[:40], tokens[:9]]
    got = fast.generate_batch(prompts, max_new_tokens=24, ignore_eos=True)
    want = slow.generate_batch(prompts, max_new_tokens=24, ignore_eos=True)
    assert [row.tokens for row in got] == [row.tokens for row in want]
