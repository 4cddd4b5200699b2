"""Six kernels compiled for three GPUs with no GPU: what they use, and the matrix instructions in them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib import util
from pathlib import Path
from types import ModuleType

import pytest
import torch

from einfold.compiler.codegen.triton.ahead import compile_ahead
from einfold.compiler.codegen.triton.generate import generate
from einfold.compiler.codegen.triton.kernel import Kernel
from einfold.compiler.codegen.triton.limits import Limits, exceeded, limits_of
from einfold.compiler.codegen.triton.options import DEVICES, Options, Tiles
from einfold.compiler.fuse.explain import explain_function

from ...quick import rarely
from .conftest import needs_triton

pytestmark = needs_triton

#: A single pass of each kind of form, and the part of a split for one query.
KERNELS = [
    ("softmax", "whole"),
    ("causal by tril", "whole"),
    ("softcap", "whole"),
    ("sinks by concatenation", "whole"),
    ("K/V dequantized, per token", "whole"),
    ("GQA by reshaped queries", "part"),
]
KINDS = {"real": "fp16", "integer": "i8", "bool": "i1"}
LENGTH, HEAD = 64, 64


@pytest.fixture(scope="module")
def forms() -> Iterator[ModuleType]:
    """The catalogue at a head size that matrix instructions like, in a module of its own."""
    path = Path(__file__).parents[3] / "docs" / "attention_forms.py"
    spec = util.spec_from_file_location("attention_forms_wide", path)
    assert spec is not None and spec.loader is not None
    module = util.module_from_spec(spec)
    sys.modules["attention_forms_wide"] = module
    spec.loader.exec_module(module)
    for name, size in {"B": 1, "H": 4, "K": 2, "S": LENGTH, "T": LENGTH, "D": HEAD}.items():
        setattr(module, name, size)
    yield module
    del sys.modules["attention_forms_wide"]


def kernel_of(forms: ModuleType, name: str, kind: str, capability: int, cache: Path) -> Kernel:
    form = next(form for form in forms.FORMS if form.name == name)
    torch.manual_seed(0)
    report = explain_function(form.function, form.inputs(), cache)
    (plan,) = report.folding.plans
    types = {tensor: KINDS[declared.kind] for tensor, declared in plan.inputs.items()}
    sizes = dict(report.imported.sizes)
    carried = {r for t in plan.inputs.values() if plan.rank in t.ranks for r in t.ranks}
    for rank in plan.ranks:
        # Sizes only guide the choice of tiles: one query for a part, a usual prefill otherwise.
        if rank not in carried and sizes[rank] == LENGTH:
            sizes[rank] = 1 if kind == "part" else 4096
    sizes[plan.rank] = 4096
    return generate(plan, types, sizes, Options(device=DEVICES[capability]))


@pytest.mark.parametrize("capability", [rarely(80), rarely(90), 100])
@pytest.mark.parametrize(("name", "kind"), KERNELS, ids=[name for name, _ in KERNELS])
def test_a_kernel_compiles_within_its_limits(
    forms: ModuleType, name: str, kind: str, capability: int, plan_cache: Path
) -> None:
    import triton

    kernel = kernel_of(forms, name, kind, capability, plan_cache)
    made = compile_ahead(kernel, capability, kind)
    assert exceeded(kernel, made, limits_of(triton.__version__, capability)) == []
    assert 0 < made.registers <= DEVICES[capability].registers_a_thread
    assert made.shared > 0 and made.cubin


def test_a_kernel_outside_its_limits_is_told(forms: ModuleType, plan_cache: Path) -> None:
    kernel = kernel_of(forms, "mean and variance under the attention", "whole", 80, plan_cache)
    # More than any registers hold: each of 128 threads has the states of a whole row.
    made = compile_ahead(kernel, 80, "whole", Tiles(128, 64, 4, 2))
    limits = Limits(64, 1024, "wgmma.mma_async")
    assert made.spills > 64 and made.stack > 0
    assert exceeded(kernel, made, limits) == [
        f"{made.spills} spilled bytes, 64 allowed",
        f"{made.shared} bytes of shared memory, 1024 allowed",
        "no wgmma.mma_async",
    ]
    few = replace(made, spills=0, shared=0)
    assert exceeded(kernel, few, replace(limits, rows=256)) == []
    assert exceeded(kernel, replace(few, matrix={}), replace(limits, rows=256)) == [
        "no matrix instruction"
    ]


def test_limits_of_a_version_that_is_not_listed_are_the_newest() -> None:
    assert limits_of("3.9.1", 90) == limits_of("3.9.0", 90)
    assert limits_of("99.0", 100) == limits_of("3.9.0", 100)
