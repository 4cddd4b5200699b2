"""What a policy that thinks of later queries is shown, and what it makes of that."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from einfold.compiler.ir.kv.keep.expected import Expected
from einfold.compiler.ir.ops.rotary import rotary_reference
from einfold.compiler.ir.verifier import verify
from einfold.compiler.ir.weights import Weight
from einfold.compiler.passes.cache.attach_cache import AttachCache
from einfold.compiler.passes.cache.look_ahead import partners
from einfold.compiler.passes.cache.plan_cache import PlanCache
from einfold.compiler.passes.kv_prune.keep import KeepByPolicy

from ..programs import program, run

#: Heads of 8 channels, of which 6 are turned.
BODY = """
    weight @cos : f32[64, 3]
    weight @sin : f32[64, 3]
    input %ids "input_ids" : i64[B, S]
    input %pos "position_ids" : i64[B, S]
    input %q "q" : f32[B, S, 4, 8]
    input %k "k" : f32[B, S, 2, 8]
    read %cos "cos" : f32[64, 3]
    read %sin "sin" : f32[64, 3]
    call %rq = einfold.rotary(%q, %pos, %cos, %sin, {interleaved}) : f32[B, S, 4, 8]
    call %rk = einfold.rotary(%k, %pos, %cos, %sin, {interleaved}) : f32[B, S, 2, 8]
    call %o = einfold.attention(%rq, %rk, %k, none, 0, 0.25, 0, 0.0) : f32[B, S, 4, 8]
    output "o" = %o
"""
AHEAD = 5


def tables(factor: float) -> tuple[Tensor, Tensor]:
    angles = torch.arange(64)[:, None] * torch.tensor([1.0, 0.2, 0.03])
    return angles.cos() * factor, angles.sin() * factor


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("factor", [1.0, 1.3])
def test_later_queries_are_those_of_the_mean_turn(interleaved: bool, factor: float) -> None:
    """Their mean and covariance, by hand: each query of the prompt put at each of the next positions."""
    cos, sin = tables(factor)
    found = program(BODY.format(interleaved=str(interleaved).lower()), cos=cos, sin=sin)
    PlanCache().run(found)
    policy = Expected(4, 2, sinks=1, future=AHEAD, slack=2)
    KeepByPolicy(policy).run(found)
    AttachCache().run(found)
    verify(found, deep=True)
    assert found.layout is not None
    ids, positions = torch.zeros(1, 7, dtype=torch.long), torch.arange(3, 10)[None]
    q_BSHD, k_BSKD = torch.randn(1, 7, 4, 8), torch.randn(1, 7, 2, 8)
    caches = {
        b.name: torch.zeros(b.shape) for b in found.layout.buffers(1, 12, 12) if b.role != "host"
    }  # type: ignore[arg-type]
    zero = torch.tensor([0])
    counters = {"lengths": zero, "slots.0": zero}
    shown = run(
        found, input_ids=ids, position_ids=positions, q=q_BSHD, k=k_BSKD, **counters, **caches
    )["query.0.0"]
    assert shown.shape == (1, 7, 4 + 2 * 2 + 1, 8)

    fitted = policy.fitted(2)
    row = {
        name: np.zeros([int(n) for n in shape[1:]], np.float32)
        for name, shape in fitted.buffers(1, 2, 8, True)
    }
    fitted.watch(row, shown[0, :4].numpy())
    fitted.watch(row, shown[0, 4:].numpy())
    assert row["moments"][0, 0, 0] == 6  # without the sink

    plain_HSD = (q_BSHD[0, 1:] * 0.25).transpose(0, 1).double()
    mean_turn_DD = (
        sum(
            rotary_reference(
                torch.eye(8).double()[None, None],
                torch.tensor([[9 + ahead]]),
                cos.double(),
                sin.double(),
                interleaved,
            )[0, 0]
            for ahead in range(1, AHEAD + 1)
        )
        / AHEAD
    )  # of rows: row d is what becomes of channel d
    later_HSD = plain_HSD @ mean_turn_DD
    keys_KTD = torch.randn(2, 7, 8)
    scores_KT = np.zeros((2, 6))
    for head in range(4):
        mean_D = later_HSD[head].mean(0)
        spread_DD = torch.cov(later_HSD[head].T, correction=0)
        keys_TD = keys_KTD[head // 2, 1:].double()
        logits_T = keys_TD @ mean_D + (keys_TD @ spread_DD * keys_TD).sum(1) / 2
        scores_KT[head // 2] += logits_T.softmax(0).numpy() / 2
    values_KTD = np.random.default_rng(0).standard_normal((2, 7, 8)).astype(np.float32)
    scores_KT *= np.linalg.norm(values_KTD[:, 1:], axis=-1)
    got = fitted.token_scores(row | {"key": keys_KTD.numpy(), "value": values_KTD}, 7)
    assert got is not None
    np.testing.assert_allclose(got[:, 1:], scores_KT, rtol=2e-4)
    assert np.isinf(got[:, 0]).all()


def test_the_scales_of_keys_are_in_the_turn() -> None:
    """Over int8 codes later queries have the scales of the channels."""
    cos, sin = tables(1.0)
    by = []
    for scale in (False, True):
        found = program(BODY.format(interleaved="false"), cos=cos, sin=sin)
        PlanCache().run(found)
        KeepByPolicy(Expected(4, 2, sinks=1, future=AHEAD, slack=2)).run(found)
        if scale:
            scales = torch.rand(2, 8, generator=torch.Generator().manual_seed(0))
            found.cache_weights["cache.0.0.key_scale"] = Weight.of(scales)
        AttachCache().run(found)
        assert found.layout is not None
        caches = {
            b.name: torch.zeros(b.shape)
            for b in found.layout.buffers(1, 12, 12)
            if b.role != "host"
        }  # type: ignore[arg-type]
        zero, generator = torch.tensor([0]), torch.Generator().manual_seed(1)
        given = {
            "input_ids": torch.zeros(1, 3, dtype=torch.long),
            "position_ids": torch.arange(3)[None],
            "q": torch.randn(1, 3, 4, 8, generator=generator),
            "k": torch.randn(1, 3, 2, 8, generator=generator),
        }
        by.append(run(found, **given, lengths=zero, **{"slots.0": zero}, **caches)["query.0.0"])
    plain, scaled = by
    torch.testing.assert_close(scaled[:, :, :4], plain[:, :, :4])
    torch.testing.assert_close(scaled[:, :, 4:8], plain[:, :, 4:8] * scales.repeat(2, 1))
    torch.testing.assert_close(scaled[:, :, 8:], plain[:, :, 8:])


def test_channels_are_turned_in_pairs() -> None:
    assert partners(2, False, 5).tolist() == [2, 3, 0, 1, 4]
    assert partners(2, True, 5).tolist() == [1, 0, 3, 2, 4]


def test_without_a_rotary_queries_are_as_they_are() -> None:
    found = program(BODY.format(interleaved="false").replace("(%rq, %rk,", "(%q, %k,"))
    PlanCache().run(found)
    KeepByPolicy(Expected(4, 2, sinks=1, slack=2)).run(found)
    AttachCache().run(found)
    by_name = dict(zip(found.output_names(), found.output.args[0], strict=True))  # type: ignore[arg-type]
    assert by_name["query.0.0"].meta["val"].shape[2:] == (4, 8)
