"""The backend `einfold` of torch.compile. torch finds it by its entry point; nothing need be imported.

    model.compile(backend="einfold")

Dynamo's graph is read at ATen level, attention is fused where that is faster, and the rest, with what was
fused in it, is compiled by Inductor.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from .compiler.fuse.replace import fuse
from .compiler.fuse.report import FusedCascade
from .errors import RecipeError

if TYPE_CHECKING:
    from .compiler.frozen_weights import Frozen

#: What happens to each graph in turn; the last ones are kept.
_reports: deque[GraphReport] = deque(maxlen=256)

CACHE_REASON = "the caller owns the cache, so passes over its layout are skipped"
#: einfold's own options and their values, the default first. All others are Inductor's.
OPTIONS = {"measure": ("auto", "never"), "rest": ("inductor", "eager")}


@dataclass(frozen=True)
class GraphReport:
    """What became of one graph that Dynamo handed over.

    `skipped` maps what was not done to the reason.
    """

    nodes: int
    cascades: tuple[FusedCascade, ...]
    skipped: Mapping[str, str]
    stored: int = 0
    """Weights that were stored in the scheme that was asked for."""

    @property
    def fused(self) -> int:
        """How many regions run fused."""
        return sum(cascade.status == "fused" for cascade in self.cascades)

    def __str__(self) -> str:
        lines = [f"graph of {self.nodes} nodes, {self.fused} of {len(self.cascades)} fused"]
        for item in self.cascades:
            passes = f"{item.passes_before} -> {item.passes_after} passes"
            lines.append(f"  {item.where}: {item.status}, {passes}, {item.lowering}")
            if item.reason:
                lines.append(f"    {item.reason}")
        lines += [f"  {self.stored} weights stored"] if self.stored else []
        lines += [f"  skipped {what}: {why}" for what, why in self.skipped.items()]
        return "\n".join(lines)


def reports() -> list[GraphReport]:
    """The reports on the graphs that were compiled, oldest first."""
    return list(_reports)


def clear_reports() -> None:
    """Forgets all reports."""
    _reports.clear()


def einfold(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """Compiles one graph of Dynamo's.

    Four of `options` are einfold's. "measure": "auto" times each kind of region once and keeps what is
    fastest, "never" takes the first lowering that expresses it. "rest": who compiles what is left,
    "inductor", or "eager" for nobody, to look for faults. "weights": a format ("int4") that the weights of
    linears are stored in, rounded to nearest, where the caller has frozen them; the report says so where
    not. "activations": with such weights, "int8" for products of integers, or "f32". The others, and `mode`,
    go to Inductor.
    """
    options = dict(options or {})
    weights, activations = options.pop("weights", None), options.pop("activations", None)
    own = {name: options.pop(name, values[0]) for name, values in OPTIONS.items()}
    for name, value in own.items():
        if value not in OPTIONS[name]:
            raise RecipeError(f"option {name} is {value!r}; it can be {' or '.join(OPTIONS[name])}")
    fused, report = rewritten(gm, own["measure"])
    frozen = _frozen(fused, weights, activations)
    if frozen is not None:
        more = {"weights": frozen.reason} if frozen.reason else {}
        report = replace(report, stored=frozen.stored, skipped={**report.skipped, **more})
    _reports.append(report)
    if own["rest"] == "eager":
        forward: Callable[..., Any] = fused.forward
        return forward
    return _inductor(fused, example_inputs, options, mode)


def _frozen(gm: fx.GraphModule, weights: object, activations: str | None) -> Frozen | None:
    """The graph's weights stored as `weights` says, in place; None where it says nothing."""
    if weights is None:
        if activations is not None:
            raise RecipeError(
                "option activations goes with weights that are integers; give weights too"
            )
        return None
    from .compiler.frozen_weights import activations_for, scheme_named, store_frozen_weights

    scheme = scheme_named(str(weights))
    return store_frozen_weights(gm, scheme, activations_for(scheme, activations))


def rewritten(gm: fx.GraphModule, measure: str = "auto") -> tuple[fx.GraphModule, GraphReport]:
    """The graph with attention fused, or the graph itself where nothing was, and the report."""
    from .compiler.frontend.dynamo import example_values, fake_mode_of, to_aten

    skipped = {"cache passes": CACHE_REASON}
    values = example_values(gm)
    mode = fake_mode_of(values)
    nodes = len(gm.graph.nodes)
    if _needs_gradients(values):
        skipped["fusion"] = "the graph needs gradients; it goes to Inductor untouched"
        return gm, GraphReport(nodes, (), skipped)
    if mode is None:
        skipped["fusion"] = "the graph has no tensor inputs"
        return gm, GraphReport(nodes, (), skipped)
    why = _no_lowering(values)
    if why:
        skipped["fusion"] = f"{why}; the graph goes to Inductor untouched"
        return gm, GraphReport(nodes, (), skipped)
    traced = to_aten(gm, values, mode)
    cascades = tuple(fuse(traced, mode, measure))
    report = GraphReport(nodes, cascades, skipped)
    changed = any(item.status == "fused" and item.source for item in cascades)
    return (traced if changed else gm), report


def _no_lowering(values: Sequence[Any]) -> str:
    """Why there is no lowering on the device of these tensors, or "". One number may be on a CPU."""
    from .compiler.codegen.triton.device import without_kernels

    devices = {v.device for v in values if isinstance(v, torch.Tensor) and v.ndim}
    if len(devices) > 1:
        return f"its tensors are on several devices, {', '.join(sorted(map(str, devices)))}"
    kinds = {device.type for device in devices} - {"cpu"}
    return without_kernels(kinds.pop()) if kinds else ""


def _needs_gradients(values: Sequence[Any]) -> bool:
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _inductor(
    gm: fx.GraphModule, inputs: Sequence[Any], options: dict[str, Any], mode: str | None
) -> Callable[..., Any]:
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    patches = {**(list_mode_options(mode) if mode else {}), **options}
    compiled: Any = compile_fx(gm, list(inputs), config_patches=patches or None)
    return compiled  # type: ignore[no-any-return]
