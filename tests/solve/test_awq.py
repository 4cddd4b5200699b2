"""AWQ: channels that meet large inputs are stored larger, and the norm in front makes up for it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from einfold.compiler.ir.ops import einfold_ops
from einfold.compiler.ir.program import Program
from einfold.compiler.ir.quant.scheme import Scheme
from einfold.compiler.ir.quant.schemes.grouped import Grouped
from einfold.compiler.passes.weight_quant.quantize_weights import QuantizeWeights, norm_in_front
from einfold.compiler.solve.awq import AWQ
from einfold.compiler.solve.channels import channel_scales
from einfold.compiler.solve.gptq import GPTQ
from einfold.compiler.solve.round_to_nearest import RoundToNearest
from einfold.compiler.solve.solver import Solver

from ..calibrate.common import BODY, TEXT
from ..programs import program, run
from ..quant.test_schemes import OWN
from . import common

#: A norm in front of the first linear, as it may stand there.
NORMS = {
    "rms_norm": ("einfold.rms_norm(%h, %n, 1e-05)", "[16]"),
    "layer_norm": ("einfold.layer_norm(%h, %n, %b, 1e-05)", "[16]"),
}


def normed(call: str = NORMS["rms_norm"][0], more: str = "", read: str = "%m") -> str:
    """BODY with a norm of the embedded tokens, which the first linear reads."""
    body = BODY.replace(
        "    weight @cos", "    weight @n : f32[16]\n    weight @b : f32[16]\n    weight @cos"
    )
    body = body.replace(
        '    read %c "cos"',
        '    read %n "n" : f32[16]\n    read %b "b" : f32[16]\n    read %c "cos"',
    )
    return body.replace(
        "    call %x = einfold.linear(%h, %w, none)",
        f"    call %m = {call} : f32[B, S, 16]\n{more}    call %x = einfold.linear({read}, %w, none)",
    )


def planted(text: str) -> Program:
    """The program, with a few channels that are much larger than the others behind the norm."""
    found = program(text)
    if "n" in found.weights:
        large = found.weights["n"].load().clone()
        large[:3] *= 12
        found = program(text, n=large)
    return found


def solved(text: str, scheme: Scheme, solver: Solver) -> Program:
    found = planted(text)
    QuantizeWeights(scheme, solver=solver, embedding=False).run(found)
    for calibration in found.calibrations:
        calibration.run(TEXT)
    return found


def inputs() -> dict[str, Tensor]:
    return {
        "input_ids": TEXT,
        "position_ids": torch.arange(TEXT.shape[1]).expand_as(TEXT).contiguous(),
        "logit_rows": torch.arange(TEXT.numel()),
    }


def far(found: Program, text: str) -> float:
    """How far its logits are from those of the program as it was."""
    want, got = (run(each, **inputs())["logits"] for each in (planted(text), found))
    return float((got - want).norm() / want.norm())


@pytest.mark.parametrize("scheme", OWN, ids=str)
def test_what_holds_for_every_solver(scheme: Scheme) -> None:
    common.check_pieces(AWQ(), scheme, {"moment": torch.eye(40)})
    common.check_graph(AWQ(), scheme)


def test_large_inputs_get_large_channels() -> None:
    weight = torch.randn(64, 48, generator=torch.Generator().manual_seed(0))
    size = torch.ones(48)
    size[5], size[7] = 30.0, 0.0
    scales = channel_scales(weight, Grouped(4, 16), torch.diag(size.square()))
    assert scales is not None and scales.shape == (48,) and bool((scales > 0).all())
    assert int(scales.argmax()) == 5 and int(scales.argmin()) == 7


def test_inputs_of_one_size_are_left_alone() -> None:
    weight = torch.randn(64, 48, generator=torch.Generator().manual_seed(0))
    assert channel_scales(weight, Grouped(4, 16), torch.eye(48)) is None
    assert channel_scales(weight, Grouped(4, 16), torch.zeros(48, 48)) is None


@pytest.mark.parametrize("call", [call for call, _ in NORMS.values()], ids=list(NORMS))
@pytest.mark.parametrize("solver", [AWQ(), GPTQ()], ids=str)
def test_the_norm_in_front_divides(call: str, solver: Solver) -> None:
    """The function stays what it was, though the norm's weights are others; and nearer than by rounding."""
    found = solved(normed(call), Grouped(8, 16), solver)
    names = {"n.divided", "b.divided"} if "layer" in call else {"n.divided"}
    assert {name for name in found.weights if name.endswith(".divided")} == names
    before = planted(normed(call)).weights["n"].load()
    assert not torch.equal(found.weights["n.divided"].load(), before)
    nearest = solved(normed(call), Grouped(8, 16), RoundToNearest())
    assert far(found, normed(call)) < 0.6 * far(nearest, normed(call)) < 0.04


@pytest.mark.parametrize(
    "text",
    [
        BODY,
        normed(more="    call %a = aten.add.Tensor(%m, %h) : f32[B, S, 16]\n", read="%a"),
        normed(more="    call %m2 = einfold.rms_norm(%m, %n, 1e-05) : f32[B, S, 16]\n", read="%m2"),
    ],
    ids=["no norm", "something between", "a weight of two norms"],
)
def test_where_no_norm_can_divide_weights_are_rounded_as_they_are(text: str) -> None:
    found = planted(text)
    first = next(iter(found.nodes(einfold_ops.linear.default)))
    assert norm_in_front(first) is None
    found = solved(text, Grouped(8, 16), AWQ(fit=False))
    assert not [name for name in found.weights if name.endswith(".divided")]
    want = RoundToNearest().solve(planted(text).weights["w.weight"].load(), Grouped(8, 16), {})
    assert torch.equal(found.weights["w.packed"].load(), want.pieces["packed"])


#: A norm behind the layers, of which the head is shown some rows.
LAST = BODY.replace(
    "    weight @cos", "    weight @n : f32[16]\n    weight @o : f32[11, 16]\n    weight @cos"
).replace(
    "    call %r = einfold.select_rows(%f, %rows)",
    '    read %n "n" : f32[16]\n'
    '    read %own "o" : f32[11, 16]\n'
    "    call %m = einfold.rms_norm(%f, %n, 1e-05) : f32[B, S, 16]\n"
    "    call %r = einfold.select_rows(%m, %rows)",
)


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_is_scaled_where_its_table_is_its_own(tied: bool) -> None:
    text = LAST if tied else LAST.replace("linear(%r, %e, none)", "linear(%r, %own, none)")
    *_, head = planted(text).nodes(einfold_ops.linear.default)
    assert (norm_in_front(head) is None) is tied
    found = solved(text, Grouped(8, 16), GPTQ())
    assert bool([name for name in found.weights if name.endswith(".divided")]) is not tied
    assert far(found, text) < 0.05


def test_a_norm_that_something_else_reads_too_is_left() -> None:
    text = normed().replace(
        "call %f = aten.flatten.using_ints(%o2, -2, -1) : f32[B, S, 16]",
        "call %f0 = aten.flatten.using_ints(%o2, -2, -1) : f32[B, S, 16]\n"
        "    call %f = aten.add.Tensor(%f0, %m) : f32[B, S, 16]",
    )
    found = solved(text, Grouped(8, 16), AWQ())
    assert not [name for name in found.weights if name.endswith(".divided")]
