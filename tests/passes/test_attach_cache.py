from __future__ import annotations

import torch

from einfold.compiler.ir.verifier import verify
from einfold.compiler.passes.cache.attach_cache import AttachCache
from einfold.compiler.passes.cache.plan_cache import PlanCache

from ..programs import calls, program, run

BODY = """
    weight @cos : f32[64, 4]
    weight @sin : f32[64, 4]
    input %ids "input_ids" : i64[B, S]
    input %pos "position_ids" : i64[B, S]
    input %q "q" : f32[B, S, 4, 8]
    input %k "k" : f32[B, S, 2, 8]
    read %cos "cos" : f32[64, 4]
    read %sin "sin" : f32[64, 4]
    call %rq = einfold.rotary(%q, %pos, %cos, %sin, false) : f32[B, S, 4, 8]
    call %rk = einfold.rotary(%k, %pos, %cos, %sin, false) : f32[B, S, 2, 8]
    call %o = einfold.attention(%rq, %rk, %k, none, 3, 0.25, 5, 0.0) : f32[B, S, 4, 8]
    output "o" = %o
"""


def test_attention_gets_a_cache_and_takes_the_rotary_in() -> None:
    found = program(BODY)
    q, k, positions = torch.randn(1, 7, 4, 8), torch.randn(1, 7, 2, 8), torch.arange(7)[None]
    ids = torch.zeros(1, 7, dtype=torch.long)
    want = run(found, input_ids=ids, position_ids=positions, q=q, k=k)["o"]
    PlanCache().run(found)
    result = AttachCache().run(found)
    verify(found, deep=True)
    assert calls(found)[0] == (
        "einfold.cached_attention(%q, %k, %k, %cache.3.0.key, %cache.3.0.value, %lengths, none, none, "
        "%position_ids, %cos, %sin, none, none, 3, 0.25, 5, 0.0, false)"
    )
    assert found.output_names() == ["o", "cache.3.0.key", "cache.3.0.value"]
    assert found.layout is not None
    assert found.layout.bytes(2, 10) == 2 * 2 * 10 * (8 + 8) * 4
    assert result.notes[0].what == "full cache in f32, window 5 by mask"
    caches = {b.name: torch.zeros(b.shape) for b in found.layout.buffers(1, 9)}  # type: ignore[arg-type]
    got = run(
        found, input_ids=ids, position_ids=positions, q=q, k=k, lengths=torch.tensor([0]), **caches
    )["o"]
    torch.testing.assert_close(got, want)


def test_without_attention_there_is_nothing_to_do() -> None:
    found = program("""
        input %x "x" : f32[B, 4]
        call %y = aten.neg.default(%x) : f32[B, 4]
        output "y" = %y
    """)
    PlanCache().run(found)
    result = AttachCache().run(found)
    assert not result.changed
    assert result.notes[0].action == "skipped"


def test_a_rotary_of_the_query_alone_stays_in_front() -> None:
    body = BODY.replace("%rq, %rk, %k, none", "%rq, %k, %k, none")
    found = program(body)
    PlanCache().run(found)
    AttachCache().run(found)
    assert calls(found)[0].startswith("einfold.rotary(%q")
    assert "none, none, none, none, none, none, none, 3" in calls(found)[1]
