"""Six kernels compiled for three GPUs with no GPU: what they use, and the matrix instructions in them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from einfold.compiler.codegen.triton import Kernel, Options, generate
from einfold.compiler.codegen.triton.options import DEVICES
from einfold.compiler.explain import explain_function

from .conftest import needs_triton

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

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
    path = Path(__file__).parent.parent.parent / "docs" / "attention_forms.py"
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


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize(("name", "kind"), KERNELS, ids=[name for name, _ in KERNELS])
def test_a_kernel_compiles_within_its_limits(
    forms: ModuleType, name: str, kind: str, capability: int, plan_cache: Path
) -> None:
    import triton

    with (Path(__file__).parent / "thresholds.toml").open("rb") as file:
        table: dict[str, Any] = tomllib.load(file)
    limits = table.get(".".join(triton.__version__.split(".")[:2]), table["default"])
    made = kernel_of(forms, name, kind, capability, plan_cache).compile_ahead(capability, kind)
    assert made.registers <= limits["registers"]
    assert made.shared <= limits["shared"] * 1024
    assert made.spills <= limits["spills"]
    # One query fills a matrix instruction of the oldest kind only.
    expected = table["matrix"][str(capability)] if kind == "whole" else "m"
    assert any(found.startswith(expected) for found in made.matrix), made.matrix
