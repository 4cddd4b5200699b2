"""A generated kernel: its source, its signature and its functions. `launch` runs it, `ahead` compiles it."""

from __future__ import annotations

import functools
import hashlib
import linecache
import types as python_types
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ....errors import UnsupportedError
from ...ir.cascade.plan import Plan
from .emit import Generated
from .options import Options, Tiles
from .pressure import Demand
from .roles import Division


@dataclass(frozen=True)
class Kernel:
    """A plan as Triton source, with all that is needed to run it.

    `plan` is the plan as it was generated from, `division` what of it the kernel computes; `functions`
    has "whole", "part" and "merge". `types` and `sizes` are those of `generate`, `dot` the type of matrix
    products, `demand` what is in registers beside states and scores; `shared` is as there.
    """

    plan: Plan
    division: Division
    source: str
    functions: Mapping[str, Generated]
    types: Mapping[str, str]
    sizes: Mapping[str, int]
    options: Options
    tiles: Tiles
    dot: str
    demand: Demand = field(default_factory=Demand)
    shared: Mapping[tuple[str, str], int] = field(default_factory=dict)
    _loaded: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def signature(self) -> dict[str, str]:
        """The arguments of the single pass by name: pointers, extents and strides."""
        return {argument.name: argument.kind for argument in self.functions["whole"].arguments}

    def function(self, kind: str) -> Any:
        """The Triton function. Its source is this module's own text, made from the plan."""
        if not self._loaded:
            self._loaded.update(vars(load_source(self.source)))
        return self._loaded[self.functions[kind].name]


def triton_module() -> Any:
    """Triton itself. Raises UnsupportedError where it is not installed."""
    try:
        import triton
    except ImportError as error:
        raise UnsupportedError("Triton is not installed: pip install 'einfold[triton]'") from error
    return triton


@functools.lru_cache(maxsize=256)
def load_source(source: str) -> python_types.ModuleType:
    """The source as a module. Its lines are kept where `inspect` finds them: Triton reads them there."""
    triton_module()  # the source imports it; without it the reason should be plain
    name = f"einfold_kernel_{hashlib.blake2b(source.encode(), digest_size=8).hexdigest()}"
    path = f"<{name}>"
    module = python_types.ModuleType(name)
    module.__file__ = path
    linecache.cache[path] = (len(source), None, source.splitlines(keepends=True), path)
    exec(compile(source, path, "exec"), vars(module))
    return module
