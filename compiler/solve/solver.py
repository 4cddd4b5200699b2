"""What a solver is: it decides the codes of a weight in a scheme."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..ir.quant.scheme import Scheme
from ..ir.record_text import show
from ..ir.registry import Registry


@dataclass(frozen=True)
class Solved:
    """The pieces of a weight in a scheme, and |w - restored|_F / |w|_F where it was measured."""

    pieces: dict[str, Tensor]
    error: float | None = None


class Solver:
    """Base of all solvers: frozen dataclasses whose fields are the options of the method."""

    name: ClassVar[str]

    observes: ClassVar[tuple[str, ...]] = ()
    """Observers of a weight's inputs, by name, whose findings it is given."""

    def __str__(self) -> str:
        return show(self)

    def solve(self, weight: Tensor, scheme: Scheme, statistics: Mapping[str, Tensor]) -> Solved:
        """Stores a weight [.., N, M]; `statistics` are what the observers found of its inputs."""
        raise NotImplementedError


SOLVERS: Registry[type[Solver]] = Registry("solver", "einfold.compiler.solve")
