"""What happens to a plan on its way to source: each step gives a plan or a decision that can be checked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from einfold.compiler.codegen.reference.plan import run_plan
from einfold.compiler.codegen.triton.base_two import in_base_two
from einfold.compiler.codegen.triton.gates import bounds
from einfold.compiler.codegen.triton.generate import generate
from einfold.compiler.codegen.triton.options import DEVICES, Options, Tiles
from einfold.compiler.codegen.triton.pressure import Demand
from einfold.compiler.codegen.triton.roles import divide
from einfold.compiler.codegen.triton.simplify import simplified
from einfold.compiler.codegen.triton.tiles import candidates, fits
from einfold.compiler.fuse.explain import CascadeReport, explain_function
from einfold.compiler.ir.cascade.plan import Plan
from einfold.compiler.ir.cascade.plan_text import parse_plan, print_plan
from einfold.compiler.ir.cascade.printer import print_expr
from einfold.compiler.ir.cascade.run_plan import Runner, random_tiles

from ...cascade.conftest import load

FORMS: list[Any] = load("attention_forms").FORMS
KINDS = {"real": "fp16", "integer": "i8", "bool": "i1"}


def report_of(name: str, cache: Path) -> CascadeReport:
    torch.manual_seed(0)
    form = next(form for form in FORMS if form.name == name)
    return explain_function(form.function, form.inputs(), cache)


def plan_of(name: str, cache: Path) -> Plan:
    return report_of(name, cache).folding.plans[0]


def arrays_of(plan: Plan, sizes: dict[str, int]) -> dict[str, Any]:
    random = np.random.default_rng(0)
    made = {}
    for name, tensor in plan.inputs.items():
        shape = [sizes[rank] for rank in tensor.ranks]
        value: Any = random.standard_normal(shape)
        if tensor.kind != "real":
            value = random.integers(0, 2, shape)
        made[name] = value.astype(bool) if tensor.kind == "bool" else value
    return made


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_plans_mean_the_same_in_torch_and_in_base_two(form: Any, plan_cache: Path) -> None:
    report = report_of(form.name, plan_cache)
    sizes = dict(report.imported.sizes)
    plan = report.folding.plans[0]
    arrays = arrays_of(plan, sizes)
    random = np.random.default_rng(1)
    runner = Runner.of(plan, arrays, sizes=sizes)
    expected = runner.in_sequence(random_tiles(runner.length, random))
    tensors = {name: torch.from_numpy(np.asarray(array)) for name, array in arrays.items()}
    found = run_plan(plan, tensors, sizes)
    turned = Runner.of(in_base_two(simplified(plan)), arrays, sizes=sizes)
    tree = turned.as_tree(random_tiles(turned.length, random), random)
    for name in plan.outputs:
        np.testing.assert_allclose(found[name].numpy(), expected[name], rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(tree[name], expected[name], rtol=1e-9, atol=1e-9)


def test_exponentials_are_of_base_two(plan_cache: Path) -> None:
    text = print_plan(in_base_two(simplified(plan_of("scale by division", plan_cache))))
    assert "exp(" not in text
    assert "matmul[b, h, s, t] * 0.51006" in text, "log2(e) goes into the scale"
    # A mask that is added may hold the least float, which the factor would turn into -inf.
    assert "exp(" in print_plan(in_base_two(plan_of("additive mask", plan_cache)))


def test_a_second_reference_to_one_maximum_is_the_first(plan_cache: Path) -> None:
    plan = plan_of("log-sum-exp as an output", plan_cache)
    assert len(plan.references) == 2
    found = simplified(plan)
    assert len(found.references) == 1 and len(found.states) == 3


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ("causal by tril", {("<=", "pos(s)")}),
        ("causal by positions", {("<=", "pos(s) + 7")}),
        ("sliding window", {("<=", "pos(s)"), (">=", "pos(s) + -4 + 1")}),
        ("document mask", {("<=", "pos(s)")}),
        ("softcap", {("<=", "pos(s)")}),
        ("boolean mask, -inf", set()),
        ("linear attention, causal", {("<=", "pos(s)")}),
        ("softmax", set()),
    ],
)
def test_bounds_on_live_keys(form: str, expected: set[tuple[str, str]], plan_cache: Path) -> None:
    plan = in_base_two(plan_of(form, plan_cache))
    sizes = dict.fromkeys(plan.ranks, 12)
    sizes |= {"b": 1, "h": 1, "d": 1, "f": 1}
    found = {(b.upper, _value(b.value, s)) for b in bounds(plan) for s in range(12)}
    wanted = {(side == "<=", _solve(text, s)) for side, text in expected for s in range(12)}
    assert found == wanted, [print_expr(b.value) for b in bounds(plan)]
    assert all(b.finite == (form == "sliding window") for b in bounds(plan))


def _value(expr: Any, s: int) -> float:
    return float(eval_plain(print_expr(expr), s))


def _solve(text: str, s: int) -> float:
    return float(eval_plain(text, s))


def eval_plain(text: str, s: int) -> float:
    """A bound of this test as a number: sums, differences and signs of numbers and pos(s)."""
    from einfold.compiler.ir.cascade.evaluate import Frame, evaluate_expr
    from einfold.compiler.ir.cascade.parser import parse_expr

    frame = Frame({}, {}, {"s": np.array([s])}, {})
    return float(evaluate_expr(parse_expr(text), ["s"], frame, {}).reshape(-1)[0])


def test_query_heads_share_the_keys_of_their_head(plan_cache: Path) -> None:
    report = report_of("GQA by expand and reshape", plan_cache)
    roles = divide(report.folding.plans[0], report.imported.sizes).roles
    assert set(roles.rows) == {"s", "d"} and set(roles.grid) == {"b", "h"}
    latent = report_of("MLA, latent form", plan_cache)
    division = divide(latent.folding.plans[0], latent.imported.sizes)
    assert set(division.roles.rows) == {"h", "s"}, "all heads share the latent"
    assert [item.name for item in division.ahead] == ["einsum"]
    assert [item.name for item in division.after] == ["einsum_4"]


def test_source_says_what_it_is_made_from_and_breaks_out_of_no_comment(plan_cache: Path) -> None:
    plan = plan_of("softmax", plan_cache)
    text = print_plan(plan).replace("matmul_1", "match").replace("softmax_max", "import")
    sizes = report_of("softmax", plan_cache).imported.sizes
    kernel = generate(parse_plan(text), dict.fromkeys(plan.inputs, "fp16"), sizes)
    head = kernel.source.split("import triton")[0]
    assert all(line.startswith("#") or not line for line in head.splitlines())
    assert "# state import[b, h, s]" in head
    compile(kernel.source, "generated", "exec")


def test_tiles_fit_the_device(plan_cache: Path) -> None:
    report = report_of("softmax", plan_cache)
    sizes = {**report.imported.sizes, "d": 128, "f": 128, "s": 4096, "t": 4096}
    division = divide(report.folding.plans[0], sizes)
    types = dict.fromkeys(division.plan.inputs, "fp16")
    for capability, device in DEVICES.items():
        kernel = generate(report.folding.plans[0], types, sizes, Options(device=device))
        assert fits(division, types, sizes, kernel.demand, device, kernel.tiles), capability
        assert kernel.tiles.rows >= 64, "a prefill has many rows a tile"
        decode = generate(report.folding.plans[0], types, {**sizes, "s": 1}, Options(device=device))
        assert decode.tiles.rows == 16, "one query needs the smallest tile"
    assert not fits(
        division, types, {**sizes, "f": 512}, Demand(), DEVICES[80], Tiles(128, 128, 8, 3)
    )
    assert len(candidates()) == len(set(candidates()))
