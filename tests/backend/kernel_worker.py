"""Runs functions through the backend in Triton's interpreter, as `codegen/triton/worker.py` runs kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from einfold import backend

from .. import models
from ..cascade.conftest import load
from ..codegen.triton.worker import serve
from . import test_backend, test_forms, test_generate

FORMS = {form.name: form for form in load("attention_forms").FORMS}


def compiled(function: Callable[..., Any], inputs: tuple[torch.Tensor, ...], rest: str) -> Any:
    run = torch.compile(function, backend="einfold", options={"rest": rest})
    with torch.no_grad():
        return run(*inputs)


def of_form(name: str, rest: str = "eager") -> float:
    """The largest difference from eager of a form of the catalogue, relative to the largest value."""
    forms, form = load("attention_forms"), FORMS[name]
    torch.manual_seed(0)
    inputs = forms.in_float32(form.inputs())
    return difference(compiled(form.function, inputs, rest), form.function(*inputs))


def of_spelling(name: str, **options: Any) -> float:
    """The same of a function of `test_forms`: in a type, where a row sees no key, or of sizes that vary."""
    function = getattr(test_forms, name)
    varied = function is test_forms.sinks_of_any_size
    inputs = test_forms.inputs_of(test_forms.sinks if varied else function)
    real = getattr(torch, options.get("dtype", "float32"))
    inputs = [x.to(real) if x.is_floating_point() else x for x in inputs]
    if options.get("dead"):
        inputs[-1][0, 0, 2] = False
    run = torch.compile(
        function, backend="einfold", dynamic=options.get("dynamic"), options={"rest": "eager"}
    )
    worst = 0.0
    with torch.no_grad():
        for keys in options.get("keys", [test_forms.T]):
            given = [
                x[:, :, :keys].contiguous() if at in (1, 2) else x for at, x in enumerate(inputs)
            ]
            worst = max(worst, difference(run(*given), function(*given)))
    return worst


def of_updates() -> float:
    """A cache that is written in place between two attentions."""
    torch.manual_seed(0)
    mine, theirs = test_backend.Cache(2, 12, 8), test_backend.Cache(2, 12, 8)
    run = torch.compile(mine, backend="einfold", options={"rest": "eager"})
    worst = 0.0
    with torch.no_grad():
        for _ in range(3):
            given = [torch.randn(1, 2, 3, 8) for _ in range(3)]
            worst = max(worst, difference(run(*given), theirs(*given)))
    return worst


def of_model(name: str, cache: str, new: int) -> float:
    """How many of a generation's rows differ from eager's."""
    model, ids = models.build(name), test_generate.prompt_of(9)
    expected = test_generate.generate(model, ids, new, cache)
    model.compile(backend="einfold", options={"rest": "eager"})
    found = test_generate.generate(model, ids, new, cache)
    return float(sum(mine != row for mine, row in zip(found, expected, strict=True)))


def difference(found: Any, expected: Any) -> float:
    """The largest difference over the largest value; infinite where one is NaN and the other is not."""
    pairs = zip(*(x if isinstance(x, tuple) else (x,) for x in (found, expected)), strict=True)
    worst = 0.0
    for mine, theirs in pairs:
        if mine.shape != theirs.shape or not torch.equal(mine.isnan(), theirs.isnan()):
            return float("inf")
        mine, theirs = mine.nan_to_num(0.0), theirs.nan_to_num(0.0)
        worst = max(worst, float((mine - theirs).abs().max() / theirs.abs().max()))
    return worst


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """The error, and the lowering and reason of each cascade."""
    torch._dynamo.reset()
    backend.clear_reports()
    ways = {"form": of_form, "spelling": of_spelling, "updates": of_updates, "model": of_model}
    error = ways[request.pop("what")](**request)
    found = [(c.lowering, c.reason) for report in backend.reports() for c in report.cascades]
    return {"error": error, "lowerings": found}


if __name__ == "__main__":
    serve(answer)
