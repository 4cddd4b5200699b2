"""A generated kernel: its source, its signature, how it is launched and compiled ahead of time."""

from __future__ import annotations

import functools
import hashlib
import linecache
import types as python_types
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ....errors import UnsupportedError
from ...ir.cascade.plan import Plan
from .emit import Generated
from .options import Options, Tiles, merge_tiles
from .pressure import Demand
from .roles import Division

if TYPE_CHECKING:
    from torch import Tensor

    from .ahead import Compiled


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

    def __call__(
        self,
        inputs: Mapping[str, Tensor],
        *,
        parts: int | None = None,
        dtypes: Mapping[str, Any] | None = None,
        tiles: Tiles | None = None,
        sizes: Mapping[str, int] | None = None,
    ) -> dict[str, Tensor]:
        """The plan's outputs by name for inputs over its ranks, strided in any way.

        `parts` splits the stream (None: as many as fill the device); `dtypes` gives the outputs' types
        where they are not the inputs' (float32 for those without lanes); `sizes` those of ranks that no
        input has. Raises UnsupportedError for sizes or types that the kernel was not made for.
        """
        from .launch import launch

        return launch(
            self, inputs, parts=parts, dtypes=dtypes or {}, tiles=tiles, sizes=sizes or {}
        )

    def compile_ahead(
        self, capability: int, kind: str = "whole", tiles: Tiles | None = None
    ) -> Compiled:
        """One of the functions compiled for a GPU of this compute capability (80, 90, 100), with no GPU."""
        from .ahead import compile_ahead

        usual = self.tiles if kind != "merge" else merge_tiles(self.tiles)
        return compile_ahead(self, capability, kind, tiles or usual)

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
