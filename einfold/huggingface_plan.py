"""What `cache_for` decides of a model: how each layer is cached, and the layer's attention over it.

To decide it the model is captured, measured and compared, which takes long; so it is kept in the user's cache
folder, under a name of everything that it depends on.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blake3 import blake3

from .compiler.calibrate.text import encoded
from .compiler.driver import plan_cache, wrap_model
from .compiler.identity import identity, versions
from .compiler.ir.kept import cache_home, read_tensors, write_tensors
from .compiler.ir.kv.layout import CacheLayout
from .compiler.ir.program import Program
from .compiler.layer_program import layer_programs, packed, unpacked
from .compiler.passes.kv_share.matryoshka_kv import MatryoshkaKV
from .compiler.recipe import Recipe
from .errors import IRError, UnsupportedError, pass_on
from .evaluate.original import OriginalCheck

_ALONE = (
    "through transformers each layer must keep its own cache, so leave `share` out; models whose layers "
    "share keys and values of their own can only be compiled"
)

#: What of a recipe decides how a cache is laid out; the calibration text counts by its tokens.
_DECIDES: dict[str, Any] = {"cache": True, "context": True, "calibration": {"tokens"}}


@dataclass(frozen=True)
class CachePlan:
    """The layout of a model's cache, and a program a layer (`layer_programs`), in their order."""

    layout: CacheLayout
    layers: tuple[Program, ...]


def planned(model: Any, tokenizer: Any, recipe: Recipe, check: bool) -> CachePlan:
    """The plan for a model in memory, from the user's cache folder where it is there.

    With `check` it is one that was compared with the model, then or now. Raises the errors of compiling.
    """
    if any(isinstance(step, MatryoshkaKV) for step in recipe.cache_passes()):
        raise UnsupportedError(
            f"{MatryoshkaKV.name} turns queries and what attention gives, which transformers brings and "
            "reads as they are; choose another method, or compile the model into an artifact"
        )
    path = _place(model, tokenizer, recipe)
    found = None if path is None else _read(path, check)
    if found is not None:
        return found
    original = OriginalCheck() if check else None
    plan = _plan(plan_cache(wrap_model(model, tokenizer), recipe, original))
    if path is not None and (original is None or original.compared):
        _keep(plan, path, check)
    return plan


def _plan(program: Program) -> CachePlan:
    assert program.layout is not None
    for layer, _, group in program.layout.groups():
        if group.owner is not None:
            raise UnsupportedError(
                f"layer {layer.layer} reads the cache of layer {group.owner}; {_ALONE}"
            )
        if group.policy.told:
            raise UnsupportedError(
                f"layer {layer.layer}: {group.policy.method} reads queries and keys as they are before their "
                "rotary embedding, and transformers brings them behind it; choose another method, or compile "
                "the model into an artifact"
            )
        try:
            CacheLayout((layer,)).bytes(1, 1)
        except IRError as error:
            raise UnsupportedError(f"{error}; {_ALONE}") from error
    programs = layer_programs(program)
    if sorted(programs) != list(range(len(programs))):
        raise UnsupportedError(
            f"the model has attention in layers {sorted(programs)} only; "
            "through transformers every layer must have it"
        )
    return CachePlan(program.layout, tuple(programs[layer] for layer in sorted(programs)))


def _place(model: Any, tokenizer: Any, recipe: Recipe) -> Path | None:
    """The file of a plan, named by all that the plan depends on; None where that cannot be told."""
    named = identity(model)
    if named is None:
        return None
    try:
        tokens = None if tokenizer is None else encoded(tokenizer, recipe.calibration.text)
        chosen = recipe.model_dump(mode="json", include=_DECIDES)
        told = json.dumps([_versions(), named, tokens, chosen], sort_keys=True)
    except (
        Exception
    ) as error:  # a tokenizer may be anything; where it is needed, it is told of there
        pass_on(error)
        return None
    return cache_home() / "caches" / f"{blake3(told.encode()).hexdigest()}.pt"


def _versions() -> list[str]:
    here = Path(__file__).parent
    return versions(here, here / "compiler", here / "runtime")


def _keep(plan: CachePlan, path: Path, checked: bool) -> None:
    data = {
        "of": path.stem,
        "checked": checked,
        "layout": list(plan.layout.lines()),
        "layers": [packed(program) for program in plan.layers],
    }
    write_tensors(path, data)


def _read(path: Path, check: bool) -> CachePlan | None:
    """The plan that was kept; None where there is none, it is damaged, or not checked as it should be."""
    data = read_tensors(path)
    if data is None:
        return None
    try:
        layout = CacheLayout.parse(data["layout"])
        if data["of"] != path.stem or layout is None or (check and not data["checked"]):
            return None
        layers = tuple(map(unpacked, data["layers"]))
        return CachePlan(layout, layers) if len(layers) == len(layout.layers) else None
    except Exception as error:  # a table of another form: no class of errors is spared
        pass_on(error)
        return None
