"""Plans as iterative cascades: the pass count that a plan claims is counted by the paper's rule."""

from __future__ import annotations

import numpy as np
import pytest

from einfold.compiler.analysis.cascade.passes import count_passes
from einfold.compiler.analysis.cascade.plans import derive_checked
from einfold.compiler.ir.cascade.evaluate import evaluate
from einfold.compiler.ir.cascade.parser import parse
from einfold.compiler.ir.cascade.printer import print_cascade, print_statement
from einfold.compiler.ir.cascade.tile_loop import INSIDE, LOOP, as_tile_loop
from einfold.compiler.ir.cascade.verifier import verify
from einfold.errors import IRError

from .test_check import MOMENTS, NORM
from .texts import NAIVE, scores

CAUSAL = NAIVE.replace("QK[s, t] = ", "RAW[s, t] = ").replace(
    "GM[s] =", "QK[s, t] = where(pos(t) <= pos(s) + 2, RAW[s, t], -inf)\nGM[s] ="
)
TEXTS = {
    "softmax": (NAIVE, 1),
    "causal": (CAUSAL, 1),
    "moments": (MOMENTS, 1),
    "norm": (NORM, 1),
    "probabilities": (NAIVE.replace("output AV", "output AV\noutput A\noutput SD"), 2),
}


@pytest.mark.parametrize("name", TEXTS)
def test_the_loop_takes_the_passes_that_the_plan_claims(name: str) -> None:
    text, passes = TEXTS[name]
    cascade = parse(text).pruned()
    plan = derive_checked(cascade, "t").plan
    assert plan is not None and plan.passes == passes
    loop = as_tile_loop(plan)
    verify(loop)
    assert parse(print_cascade(loop)) == loop
    assert count_passes(loop, LOOP) == passes
    random = np.random.default_rng(0)
    sizes = {"s": 5, "t": 12, "d": 3, "f": 4}
    arrays = {
        name: random.normal(size=[sizes[rank] for rank in tensor.ranks])
        for name, tensor in cascade.inputs.items()
    }
    tiled = {}
    for name, tensor in cascade.inputs.items():
        shape = [n for r in tensor.ranks for n in ((3, 4) if r == "t" else (sizes[r],))]
        tiled[name] = arrays[name].reshape(shape)
    expected, found = evaluate(cascade, arrays), evaluate(loop, tiled, {LOOP: 3, INSIDE: 4})
    for mine, theirs in zip(loop.outputs, cascade.outputs, strict=True):
        value = found[mine].reshape(expected[theirs].shape)
        np.testing.assert_allclose(value, expected[theirs], rtol=1e-9, atol=1e-12)


def test_it_reads_like_the_paper() -> None:
    plan = derive_checked(parse(NAIVE), "t").plan
    assert plan is not None
    lines = [print_statement(item) for item in as_tile_loop(plan).statements]
    assert "GM[tile+1, s] = max(GM[tile, s], GM_tile[tile, s])" in lines
    assert lines[-1] == "AV[s, f] = AV_0[#tile, s, f] / SD[#tile, s]"


def test_a_rank_with_virtual_coordinates_is_refused() -> None:
    text = scores("O[s, f] = where(virtual(t, 0), 0, QK[s, t] * V[t, f]) :: sum(t)\n")
    plan = derive_checked(parse(text.replace(" : T", " : T virtual 1")), "t").plan
    assert plan is not None
    with pytest.raises(IRError, match="virtual"):
        as_tile_loop(plan)
