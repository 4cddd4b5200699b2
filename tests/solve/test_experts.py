"""Experts that are solved on the tokens that are routed to them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from einfold.compiler import driver
from einfold.compiler.calibrate.sites import expert_weights
from einfold.compiler.calibrate.snapshot import copied, text_inputs
from einfold.compiler.ir.interpreter import Interpreter
from einfold.compiler.ir.ops import einfold_ops
from einfold.compiler.ir.quant.scheme import Scheme
from einfold.compiler.ir.quant.schemes.grouped import Grouped
from einfold.compiler.ir.quant.schemes.microscaling import NVFP4
from einfold.compiler.ir.stored import StoredWeight
from einfold.compiler.ir.weights import Weight
from einfold.compiler.passes.weight_quant.quantize_weights import QuantizeWeights
from einfold.compiler.recipe import Recipe
from einfold.compiler.solve import experts, solving
from einfold.compiler.solve.gptq import GPTQ
from einfold.compiler.solve.round_to_nearest import RoundToNearest
from einfold.compiler.solve.solving import Solving

from .. import models
from ..programs import program
from ..quick import quick
from .common import Seen, check_resumed

#: A linear whose rounding moves what the experts read, their router, and three of four experts.
BODY = """
    weight @e : f32[40, 16]
    weight @w.weight : f32[16, 16]
    weight @r.weight : f32[4, 16]
    weight @b : f32[4]
    weight @gu : f32[4, 24, 16]
    weight @gb : f32[4, 24]
    weight @dn : f32[4, 16, 12]
    weight @o : f32[40, 16]
    input %ids "input_ids" : i64[B, S]
    input %rows "logit_rows" : i64[N]
    read %e "e" : f32[40, 16]
    read %w "w.weight" : f32[16, 16]
    read %r "r.weight" : f32[4, 16]
    read %b "b" : f32[4]
    read %gu "gu" : f32[4, 24, 16]
    read %gb "gb" : f32[4, 24]
    read %dn "dn" : f32[4, 16, 12]
    read %o "o" : f32[40, 16]
    call %h = einfold.embedding(%ids, %e) : f32[B, S, 16]
    call %z = einfold.linear(%h, %w, none) : f32[B, S, 16]
    call %x = aten.reshape.default(%z, [-1, 16]) : f32[B*S, 16]
    call %s = einfold.linear(%x, %r, %b) : f32[B*S, 4]
    call %t = aten.topk.default(%s, 2) : (f32[B*S, 2], i64[B*S, 2])
    call %v = builtin.getitem(%t, 0) : f32[B*S, 2]
    call %p = aten.softmax.int(%v, -1) : f32[B*S, 2]
    call %i = builtin.getitem(%t, 1) : i64[B*S, 2]
    call %y = einfold.experts(%x, %i, %p, %gu, %gb, %dn, none, "silu", 1.0, 0.0) : f32[B*S, 16]
    call %batch = aten.sym_size.int(%ids, 0) : sym(B)
    call %length = aten.sym_size.int(%ids, 1) : sym(S)
    call %m = aten.reshape.default(%y, [%batch, %length, 16]) : f32[B, S, 16]
    call %n = einfold.select_rows(%m, %rows) : f32[N, 16]
    call %l = einfold.linear(%n, %o, none) : f32[N, 40]
    output "logits" = %l
"""
TEXT = torch.randint(40, (2, 24), generator=torch.Generator().manual_seed(5))
SCHEME = Grouped(2, 16)
EXPERTS = 4


@dataclass(frozen=True)
class Alone(Seen):
    """The same, on the original's inputs alone."""

    name = "alone"
    follows = False


def solved(
    solver: GPTQ | None = None, scheme: Scheme = SCHEME, **values: Tensor
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """(errors by weight, all weights as they are stored)"""
    found = program(BODY, **values)
    result = QuantizeWeights(scheme, solver=solver or Seen()).run(found)
    found.calibrations[0].run(TEXT)
    pieces = {name: found.weights[name].load() for name in found.weights}
    return result.measured, pieces


def weight(name: str, **values: Tensor) -> Tensor:
    """A weight of the original."""
    return program(BODY, **values).weights[name].load()


def check_near(found: Tensor, want: Tensor) -> None:
    assert float((found - want).norm() / want.norm()) < 1e-5


def inputs(first: Tensor) -> tuple[Tensor, Tensor]:
    """What the experts read, and by which each token goes, where the first linear has this weight."""
    x = (weight("e")[TEXT] @ first.T).flatten(0, 1)
    return x, (x @ weight("r.weight").T + weight("b")).topk(2).indices


def restored(name: str, pieces: dict[str, Tensor]) -> Tensor:
    """A weight as it is stored."""
    stem = name.removesuffix(".weight")
    found = {label: pieces[f"{stem}.{label}"] for label in SCHEME.pieces((1, 1))}
    return SCHEME.dequantize(found, weight(name).shape[-1])


def moment(x: Tensor) -> Tensor:
    return x.T @ x / len(x)


def hidden(x: Tensor, gate_up: Tensor, bias: Tensor) -> Tensor:
    gate, up = functional.linear(x, gate_up, bias).chunk(2, -1)
    return functional.silu(gate) * up


@pytest.mark.parametrize("prior", [0.0, 0.5])
def test_each_expert_is_solved_on_the_tokens_that_reach_it(
    prior: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Routes and tokens are those of the model as it comes to be stored, and so is what the down projection
    reads; the drift is that to the original's, through the original expert. All tokens count as many as are
    said beside."""
    monkeypatch.setattr(experts, "_PRIOR", prior)
    _, pieces = solved()
    own, index = inputs(restored("w.weight", pieces))
    x, others = inputs(weight("w.weight"))
    assert not torch.equal(index, others)  # the rounding moves some tokens to other experts
    stored = restored("gu", pieces)
    assert len(Seen.shown) == 1 + 2 * EXPERTS + 1
    for expert in range(EXPERTS):
        tokens = (index == expert).any(1)
        assert 0 < int(tokens.sum()) < len(tokens)
        up, down = Seen.shown[1 + 2 * expert : 3 + 2 * expert]
        mine = hidden(own, stored[expert], weight("gb")[expert])
        meant = hidden(x, weight("gu")[expert], weight("gb")[expert])
        for found, reads, wanted in ((up, own, x), (down, mine, meant)):
            share = int(tokens.sum()) / (int(tokens.sum()) + prior * reads.shape[1])
            for name, each in (("moment", reads), ("drift", wanted - reads)):
                among = each[tokens].T @ reads[tokens] / int(tokens.sum())
                want = share * among + (1 - share) * each.T @ reads / len(reads)
                check_near(found[name], want)


def test_an_expert_that_no_token_reaches_is_solved_on_all() -> None:
    never, bias = 2, torch.zeros(EXPERTS)
    bias[never] = -1e4
    errors, pieces = solved(b=bias)
    own, _ = inputs(restored("w.weight", pieces))
    up, down = Seen.shown[1 + 2 * never : 3 + 2 * never]
    check_near(up["moment"], moment(own))
    mine = hidden(own, restored("gu", pieces)[never], weight("gb", b=bias)[never])
    check_near(down["moment"], moment(mine))
    assert all(bool(piece.isfinite().all()) for piece in pieces.values())
    assert set(errors) >= {"gu", "dn"} and all(0 < error < 1 for error in errors.values())


def test_the_layer_goes_on_with_what_is_stored() -> None:
    """The head behind it reads the stored experts' results, weighed by their own routes."""
    _, pieces = solved()
    whole = program(BODY)
    names = ("w.weight", "gu", "dn")
    whole.weights.restore({name: Weight.of(restored(name, pieces)) for name in names})
    whole.weights.restore({"o": Weight.of(torch.eye(16))})
    rows = torch.arange(TEXT.numel())
    reads = Interpreter(whole).run(text_inputs(TEXT, rows))["logits"]
    check_near(Seen.shown[-1]["moment"], moment(reads))


def test_a_solver_that_does_not_follow_is_shown_the_original(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(experts, "_PRIOR", 0.0)
    solved(Alone())
    x, index = inputs(weight("w.weight"))
    reads = x[(index == 0).any(1)]
    check_near(Seen.shown[1]["moment"], moment(reads))
    gate_up, bias = weight("gu")[0], weight("gb")[0]
    check_near(Seen.shown[2]["moment"], moment(hidden(reads, gate_up, bias)))
    assert not any("drift" in found for found in Seen.shown)


@pytest.mark.parametrize(
    ("stop", "again"), [(1, 0), (4, 3), (9, 0)]
)  # a layer is solved from its first
def test_an_interrupted_run_ends_as_one_that_was_not(
    stop: int, again: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def all_of_it() -> dict[str, Tensor]:
        errors, pieces = solved()
        return pieces | {f"{name}.error": torch.tensor(error) for name, error in errors.items()}

    check_resumed(all_of_it, stop, monkeypatch)
    assert len(Seen.shown) == 2 * EXPERTS + 2 + again


def test_a_text_in_parts_is_read_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    solved()
    whole = [*Seen.shown]
    monkeypatch.setattr(solving, "_TOKENS", TEXT.shape[1])
    monkeypatch.setattr(solving, "_VERSION", "in parts")
    Seen.shown.clear()
    solved()
    for one, several in zip(whole, Seen.shown, strict=True):
        assert one.keys() == several.keys()
        for name, value in one.items():
            torch.testing.assert_close(several[name], value, rtol=1e-3, atol=1e-3)


def test_what_the_experts_of_a_stack_share_has_no_expert_to_be_solved_for() -> None:
    _, pieces = solved(scheme=NVFP4())
    nearest = RoundToNearest().solve(weight("gu"), NVFP4(), {}).pieces
    assert all(torch.equal(pieces[f"gu.{label}"], piece) for label, piece in nearest.items())
    assert [bool(found) for found in Seen.shown] == [True, True, False, False]


def test_experts_that_come_in_codes_keep_them() -> None:
    found = program(BODY)
    whole = weight("dn")
    codes = RoundToNearest().solve(whole, SCHEME, {}).pieces
    pieces = {label: Weight.of(piece) for label, piece in codes.items()}
    kept = StoredWeight.holding(SCHEME, tuple(whole.shape), pieces)
    found.weights.restore({"dn": kept})
    QuantizeWeights(SCHEME, solver=Seen()).run(found)
    found.calibrations[0].run(TEXT)
    assert all(torch.equal(found.weights[f"dn.{n}"].load(), piece) for n, piece in codes.items())
    assert len(Seen.shown) == 1 + EXPERTS + 1
    assert found.weights["gu.packed"].load().shape[0] == EXPERTS


@pytest.mark.parametrize(
    "name",
    quick(["mixtral", "gpt_oss", "qwen2_moe", "qwen3_moe", "deepseek_v3"], "gpt_oss", "qwen2_moe"),
)
def test_models_with_solved_experts_are_nearer(name: str) -> None:
    """On the text that they were solved on, and on another."""
    plain = driver.plan_cache(driver.wrap_model(models.build(name)), Recipe())
    names = [n for node in plain.nodes(einfold_ops.experts.default) for n in expert_weights(node)]
    generator = torch.Generator().manual_seed(1)
    text, other = (torch.randint(models.VOCABULARY, (8, 96), generator=generator) for _ in range(2))
    scheme = Grouped(3, 32)
    solving = Solving(plain, GPTQ())
    assert names and all(solving.take(each, scheme) for each in names)
    solving.run(text)

    def off(pieces: Callable[[str], Mapping[str, Tensor]], tokens: Tensor) -> float:
        """The relative error of the logits."""
        trial = copied(plain)
        for each in names:
            wide = scheme.dequantize(pieces(each), plain.weights[each].shape[-1])
            trial.weights.restore({each: Weight.of(wide)})
        inputs = text_inputs(tokens, torch.arange(tokens.numel()))
        got, want = (Interpreter(each).run(inputs)["logits"] for each in (trial, plain))
        return float((got - want).norm() / want.norm())

    def nearest(each: str) -> Mapping[str, Tensor]:
        return RoundToNearest().solve(plain.weights[each].load(), scheme, {}).pieces

    for tokens, share in ((text, 0.8), (other, 0.92)):
        assert off(lambda each: solving.at(each).pieces, tokens) < share * off(nearest, tokens)
