"""Every form of the catalogue: imported, folded as expected, and equal to torch, however it is tiled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from einfold.compiler.analysis.cascade.check import run_plans
from einfold.compiler.fuse.explain import CascadeReport, explain_function
from einfold.compiler.ir.cascade.evaluate import evaluate
from einfold.compiler.ir.cascade.parser import parse
from einfold.compiler.ir.cascade.plan_text import parse_plan, print_plan
from einfold.compiler.ir.cascade.printer import print_cascade

from .conftest import load

FORMS: list[Any] = load("attention_forms").FORMS
#: Forms that narrow to float32 are computed in float64 here.
LOOSE = {"softmax in float32, weights narrowed": 1e-5}


@pytest.fixture(scope="module")
def report(request: pytest.FixtureRequest, plan_cache: Path) -> CascadeReport:
    torch.manual_seed(0)
    form = request.param
    return explain_function(form.function, form.inputs(), plan_cache)


BOTH = pytest.mark.parametrize(
    ("report", "form"), [(form, form) for form in FORMS], ids=lambda f: f.name, indirect=["report"]
)


@BOTH
def test_it_folds_as_expected(report: CascadeReport, form: Any) -> None:
    if form.folds == "refused":
        assert report.status == "refused"
        assert 1 < report.passes_after <= report.passes_before
        assert any(
            form.factor in r.factor or form.factor in r.reason for r in report.folding.refusals
        )
        return
    assert report.status == "fused"
    assert not report.imported.opaque
    assert report.passes_after == (2 if form.folds == "two" else 1)
    assert (report.passes_before == 1) == (form.folds == "one already")


@BOTH
def test_it_computes_what_torch_computes(report: CascadeReport, form: Any) -> None:
    torch.manual_seed(1)
    inputs = form.inputs()
    expected = form.function(*inputs)
    expected = expected if isinstance(expected, tuple) else (expected,)
    imported = report.imported
    given = dict(zip(_names(form), (x.numpy() for x in inputs), strict=True))
    arrays = imported.arrays(given)
    tolerance = LOOSE.get(form.name, 1e-9)
    results = [evaluate(imported.cascade, arrays)]
    random = np.random.default_rng(0)
    for way in ("sequence", "tree", "lazy", "static"):
        results.append(run_plans(report.folding.plans, arrays, random, way, imported.sizes))
    for found in results:
        for mine, theirs in zip(imported.restored(found), expected, strict=True):
            np.testing.assert_allclose(mine, theirs.numpy(), rtol=tolerance, atol=tolerance)


@BOTH
def test_its_text_reads_back(report: CascadeReport, form: Any) -> None:
    cascade = report.imported.cascade
    assert print_cascade(parse(print_cascade(cascade))) == print_cascade(cascade)
    for plan in report.folding.plans:
        assert parse_plan(print_plan(plan)) == plan


def _names(form: Any) -> list[str]:
    code = form.function.__code__
    return list(code.co_varnames[: code.co_argcount])


@pytest.mark.slow
def test_the_committed_table_is_current() -> None:
    table = load("attention_table")
    assert table.TARGET.read_text() == table.render(), "run `make docs`"
