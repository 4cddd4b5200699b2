"""`einfold.explain` and `explain_export`: what becomes of attention, under the backend or in ONNX, and why
not more."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx

from .api import open_input, resolve_recipe
from .backend import GraphReport, rewritten
from .compiler.codegen.triton.dtypes import TYPES
from .compiler.codegen.triton.generate import generate
from .compiler.driver import captured
from .compiler.frontend.example import Example
from .compiler.frontend.modules import capture_module
from .compiler.frontend.torch_says import quietly
from .compiler.fuse.explain import CascadeReport, explain_function
from .compiler.fuse.operators import operator_entries
from .compiler.fuse.report import AS_WRITTEN, FusedCascade
from .compiler.ir.cascade.printer import print_cascade
from .compiler.ir.interrupts import tracing
from .compiler.passes.fusion.fuse_attention import FuseAttention
from .compiler.pipeline import PassManager, module_passes
from .errors import UnsupportedError, first_line, pass_on


@dataclass(frozen=True)
class Explanation:
    """The report: one entry a cascade, in the order of the graph, and the graphs they are of.

    Each of `cascades` has `status` ("fused" or "refused"), `passes_before`, `passes_after`, `reason` and
    `source`, the code that stands for it, empty where it stays as written. A function that has no attention
    is one cascade: it stays as written, and `source` is the Triton kernel that its plan gives.
    """

    cascades: tuple[FusedCascade, ...]
    graphs: tuple[GraphReport, ...]

    def data(self) -> dict[str, Any]:
        """The report as plain data."""
        return {
            "cascades": [asdict(item) for item in self.cascades],
            "graphs": [
                {"nodes": g.nodes, "fused": g.fused, "skipped": dict(g.skipped)}
                for g in self.graphs
            ],
        }

    def __str__(self) -> str:
        fused = sum(item.status == "fused" for item in self.cascades)
        lines = [f"{fused} of {len(self.cascades)} cascades fused"]
        for item in self.cascades:
            lines += ["", _heading(item)]
            if item.reason:
                lines.append(f"  {item.reason}")
            lines += [f"  {line}" for line in (item.source or item.cascade).splitlines()]
        skipped = {what: why for graph in self.graphs for what, why in graph.skipped.items()}
        lines += ["", *(f"skipped {what}: {why}" for what, why in skipped.items())]
        return "\n".join(lines).rstrip()


def _heading(item: FusedCascade) -> str:
    lowering = f", {item.lowering}" if item.lowering != AS_WRITTEN else ""
    passes = f"{item.passes_before} -> {item.passes_after} passes"
    return f"{item.where}: {item.status}, {passes}{lowering}"


@tracing()
def explain(target: Callable[..., Any], *inputs: Any, **options: Any) -> Explanation:
    """What the backend makes of a function or module, called once on `inputs` and keyword `options`.

    The call runs without gradients. Nothing is compiled and nothing is timed: of several lowerings the
    first that expresses a cascade is shown. A function without attention in it is read as one cascade.

    Raises UnsupportedError where the call fails, or where nothing in it is reduced.
    """
    if isinstance(target, type):
        raise UnsupportedError(
            f"{target.__name__} is a class; give a function, or a module made of it"
        )
    graphs: list[GraphReport] = []

    def note(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        graphs.append(rewritten(gm, "never")[1])
        forward: Callable[..., Any] = gm.forward
        return forward

    compiled = torch.compile(target, backend=note)
    # Each call is a compilation of its own, however often the function was explained before.
    unlimited = torch._dynamo.config.patch(recompile_limit=2**20, accumulated_recompile_limit=2**20)
    try:
        with torch.no_grad(), unlimited, quietly():
            compiled(*inputs, **options)
    except Exception as error:
        pass_on(error)
        cause = _cause(error, target, inputs, options)
        raise UnsupportedError(f"the function does not run on these inputs: {cause}") from error
    cascades = tuple(item for graph in graphs for item in graph.cascades)
    if not cascades:
        cascades = (_whole(target, inputs, options),)
    return Explanation(cascades, tuple(graphs))


@tracing()
def explain_export(
    model: str | Path | Any,
    example_inputs: Any = None,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    portable: bool = False,
) -> Explanation:
    """What `export_onnx` makes of the attention of a module or of a model's folder; the arguments are those.

    Nothing is written, and of a folder no weight is read. `source` is what stands for a cascade in the graph.
    A causal language model's attention is not searched for: it comes through transformers' interface, layer
    by layer, and is one operator over the cache, whose meaning is folded for the report.
    """
    recipe = resolve_recipe(None, portable=portable)
    if example_inputs is None and example_kwargs is None:
        found = open_input(model)
        roads = captured(found, recipe)
    else:
        example = Example.of(() if example_inputs is None else example_inputs, example_kwargs)
        if not isinstance(model, torch.nn.Module):
            raise UnsupportedError(f"{model!r} is no module, which is what is exported to ONNX")
        program = capture_module(model, example, dynamic_shapes).program
        roads = [(program, module_passes(recipe.target, recipe.made_for.attention()))]
    lowering = f"one operator over the cache, of the target {recipe.made_for.name}"
    entries: list[FusedCascade] = []
    for program, passes in roads:
        entries += operator_entries(program, lowering)
        for at, step in enumerate(passes):
            if isinstance(step, FuseAttention):
                PassManager(passes[:at]).run(program)
                entries += step.entries(program)
    return Explanation(tuple(entries), ())


def _cause(
    error: Exception, target: Callable[..., Any], inputs: tuple[Any, ...], options: dict[str, Any]
) -> str:
    """What is wrong in a line: what the plain function says of these inputs, or else what torch says."""
    try:
        with torch.no_grad(), quietly():
            target(*inputs, **options)
    except Exception as plain:
        pass_on(plain)
        error = plain
    error = getattr(error, "inner_exception", error)
    return first_line(error)


def _whole(
    target: Callable[..., Any], inputs: tuple[Any, ...], options: dict[str, Any]
) -> FusedCascade:
    """All of a function as one cascade."""
    if options or not inputs or not all(isinstance(item, torch.Tensor) for item in inputs):
        raise UnsupportedError(
            "no attention was found, and a function of tensors alone is needed to read it whole"
        )
    with quietly():
        report = explain_function(target, inputs)
    source = _kernels(report, inputs) if report.status == "fused" else ""
    return FusedCascade(
        "function",
        report.status,
        report.passes_before,
        report.passes_after,
        report.reason,
        AS_WRITTEN,
        source,
        print_cascade(report.imported.cascade),
    )


def _kernels(report: CascadeReport, inputs: tuple[torch.Tensor, ...]) -> str:
    """The Triton kernel of each pass; empty where a plan has no form as one."""
    real = next((TYPES.get(item.dtype) for item in inputs if item.is_floating_point()), None)
    kinds = {"real": real or "fp32", "integer": "i64", "bool": "i1"}
    try:
        return "\n".join(
            generate(
                plan,
                {name: kinds[tensor.kind] for name, tensor in plan.inputs.items()},
                report.imported.sizes,
            ).source
            for plan in report.folding.plans
        )
    except UnsupportedError:
        return ""
