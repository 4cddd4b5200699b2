"""Runs kernels in Triton's interpreter, one request a line, in a process of its own.

`TRITON_INTERPRET` must stand before Triton is first imported, and would change what other tests compile;
so `python -m tests.codegen.triton.worker` is started with it, reads a JSON request a line, and answers each.
"""

from __future__ import annotations

import json
import math
import sys
import traceback
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from importlib import util
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from einfold.compiler.codegen.reference.plan import run_plan
from einfold.compiler.codegen.triton.dtypes import DTYPES, TYPES
from einfold.compiler.codegen.triton.generate import generate
from einfold.compiler.codegen.triton.launch import launch
from einfold.compiler.codegen.triton.options import Options, Tiles
from einfold.compiler.fuse.explain import CascadeReport, explain_function
from einfold.compiler.ir.cascade.plan import Plan, State
from einfold.compiler.ir.ops.record import Operator

DOCS = Path(__file__).parents[3] / "docs"


@cache
def forms() -> ModuleType:
    """The catalogue of forms."""
    spec = util.spec_from_file_location("attention_forms", DOCS / "attention_forms.py")
    assert spec is not None and spec.loader is not None
    module = util.module_from_spec(spec)
    sys.modules["attention_forms"] = module
    spec.loader.exec_module(module)
    return module


_REPORTS: dict[tuple[Any, ...], CascadeReport] = {}


def report_of(
    name: str, sizes: dict[str, int]
) -> tuple[Any, tuple[torch.Tensor, ...], CascadeReport]:
    """A form at given sizes, example inputs, and its folding."""
    module = forms()
    for key, size in {"B": 1, "H": 2, "K": 1, "S": 5, "T": 13, "D": 8, **sizes}.items():
        setattr(module, key, size)
    form = next(form for form in module.FORMS if form.name == name)
    torch.manual_seed(0)
    inputs = form.inputs()
    key = (name, *sorted(sizes.items()))
    if key not in _REPORTS:
        _REPORTS[key] = explain_function(form.function, inputs)
    return form, inputs, _REPORTS[key]


def mutated(plan: Plan, how: str) -> Plan:
    """The plan with a mistake in it: a correction dropped, or a sum turned into a max."""
    steps = list(plan.steps)
    for at, step in enumerate(steps):
        if not isinstance(step, State):
            continue
        if how == "drop" and step.correct is not None:
            steps[at] = replace(step, correct=None)
            break
        if how == "swap" and step.op == "sum":
            # (A max turned into a min would go unseen: the reference is free.)
            steps[at] = replace(step, op="max")
            break
    return replace(plan, steps=tuple(steps))


def prepared(tensor: torch.Tensor, request: dict[str, Any]) -> torch.Tensor:
    """A tensor in the type and with the strides that are asked for."""
    if tensor.is_floating_point():
        tensor = tensor.to(DTYPES[request.get("dtype", "fp32")])
        if tensor.ndim == 4:
            tensor = tensor * request.get("scale", 1.0)
    if request.get("strided") and tensor.ndim > 1:
        wide = torch.empty([*tensor.shape[:-1], tensor.shape[-1] * 2], dtype=tensor.dtype)
        wide[..., ::2] = tensor
        turned = wide.transpose(0, 1).contiguous().transpose(0, 1)
        return turned[..., ::2]
    return tensor


def overridden(name: str, tensor: torch.Tensor, request: dict[str, Any]) -> torch.Tensor:
    """Inputs with what a test is about put in: dead rows of masks, the least float, -inf."""
    fill = request.get("fill", {}).get(name)
    if fill is not None:
        tensor = tensor.clone()
        value = float(fill["value"]) if tensor.is_floating_point() else bool(float(fill["value"]))
        if "column" in fill:
            tensor[..., fill["column"]] = value
        else:
            tensor[..., fill["row"], :] = value
    return tensor


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """The largest error of each way to run a form, relative to the largest value."""
    form, inputs, report = report_of(request["form"], request.get("sizes", {}))
    names = form.function.__code__.co_varnames[: len(inputs)]
    arrays = report.imported.arrays(dict(zip(names, (x.numpy() for x in inputs), strict=True)))
    given = {
        name: prepared(overridden(name, torch.from_numpy(np.array(array)), request), request)
        for name, array in arrays.items()
    }
    exact = {n: x.double() if x.is_floating_point() else x for n, x in given.items()}
    sizes = report.imported.sizes
    rows, stream = request.get("tiles", [8, 8])
    options = Options(
        lazy=request.get("lazy"),
        static=request.get("static", False),
        base_two=request.get("base_two", True),
        tiles=Tiles(rows, stream),
    )
    errors: dict[str, float] = {}
    for plan in report.folding.plans:
        expected = run_plan(plan, {name: exact[name] for name in plan.inputs}, sizes)
        wrong = mutated(plan, request["mutate"]) if "mutate" in request else plan
        types = {name: TYPES[given[name].dtype] for name in plan.inputs}
        kernel = generate(wrong, types, sizes, options)
        for parts in request.get("parts", [1, 3]):
            found = launch(
                kernel, {name: given[name] for name in plan.inputs}, parts=parts, sizes=sizes
            )
            for name in plan.outputs:
                error = difference(found[name].double(), expected[name])
                key = f"parts {parts}"
                errors[key] = max(errors.get(key, 0.0), error)
        exact.update(expected)
        given.update({name: value.float() for name, value in expected.items()})
    return {"errors": errors}


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference over the largest value; infinite where one is NaN and the other is not."""
    if found.shape != expected.shape or not torch.equal(found.isnan(), expected.isnan()):
        return math.inf
    found, expected = found.nan_to_num(0.0), expected.nan_to_num(0.0)
    if found.numel() == 0:
        return 0.0
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-9))


def compared(
    kind: type[Operator],
    attend: Callable[[Any], Any],
    given: dict[str, Any],
    same: Callable[[torch.Tensor, torch.Tensor], bool] = torch.equal,
) -> tuple[float, bool]:
    """The error of `attend` against an operator's own meaning, and whether both wrote the same caches."""
    # The caches of a device are views of larger ones at times: no stride may be taken for granted.
    mine = {n: x.clone() if isinstance(x, torch.Tensor) else x for n, x in given.items()}
    found, expected = (
        kind.standing_in(meaning)(**arguments)
        for meaning, arguments in ((attend, mine), (kind.run, given))
    )
    if not kind.writes:
        return difference(found, expected), True
    caches = zip(found[1:], expected[1:], strict=True)
    return difference(found[0], expected[0]), all(same(*pair) for pair in caches)


def serve(answer: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Answers requests until there are no more."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for line in sys.stdin:
        try:
            result = answer(json.loads(line))
        except Exception as error:
            trace = traceback.format_exc()
            result = {"failed": f"{type(error).__name__}: {error}", "trace": trace[-2000:]}
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    serve(answer)
