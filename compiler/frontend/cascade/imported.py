"""A cascade together with the tensors of the graph that it was read from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...ir.cascade.cascade import Cascade
from .context import Dim

Array = NDArray[Any]


@dataclass(frozen=True)
class Binding:
    """A tensor of the graph and one of the cascade: `dims` has the ranks of each dimension."""

    node: str
    name: str
    dims: tuple[Dim, ...]


@dataclass(frozen=True)
class Imported:
    """A cascade with the graph's tensors that it reads and writes.

    `opaque` has, for each operator that became an input, the reason; `weights` the inputs that are
    parameters; `nodes` the statements whose result is a tensor of the graph; `feeds` the nodes that each
    operator that became an input reads.
    """

    cascade: Cascade
    inputs: tuple[Binding, ...]
    outputs: tuple[Binding, ...]
    opaque: Mapping[str, str]
    sizes: Mapping[str, int]
    weights: frozenset[str] = frozenset()
    nodes: Mapping[str, Binding] = field(default_factory=dict)
    feeds: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def arrays(self, tensors: Mapping[str, Array]) -> dict[str, Array]:
        """The cascade's inputs from the graph's tensors, by node name: dimensions cut into ranks."""
        found = {}
        for binding in self.inputs:
            shape = [self.sizes[rank] for dim in binding.dims for rank in dim]
            found[binding.name] = np.asarray(tensors[binding.node]).reshape(shape)
        return found

    def restored(self, arrays: Mapping[str, Array]) -> list[Array]:
        """The graph's outputs from the cascade's: ranks merged to dimensions."""
        return [
            arrays[b.name].reshape([math.prod(self.sizes[r] for r in dim) for dim in b.dims])
            for b in self.outputs
        ]
