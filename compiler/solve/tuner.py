"""What solvers have in common that go on from what another one gave."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ...errors import IRError
from ..ir.quant.scheme import Scheme
from ..ir.quant.schemes.grouped import Grouped
from .solver import SOLVERS, Solved, Solver


@dataclass(frozen=True)
class Tuner(Solver):
    """Base of solvers that tune what the solver `start` gives, of integers in groups."""

    start: str = "decoupleq"

    def __post_init__(self) -> None:
        """Raises IRError where it cannot begin so."""
        if self.start not in SOLVERS or SOLVERS[self.start].tunes:
            known = ", ".join(name for name, kind in SOLVERS.items() if not kind.tunes)
            raise IRError(f"{self.name} starts from one of {known}, not from {self.start[:40]!r}")

    @property
    def begun(self) -> Solver:
        return SOLVERS[self.start]()

    @property
    def reads(self) -> bool:
        return True

    @property
    def scales_channels(self) -> bool:
        return self.begun.scales_channels

    def refuses(self, scheme: Scheme) -> str:
        if not isinstance(scheme, Grouped):
            return f"{self.name} tunes integers under scales of groups, and {scheme.name} stores others"
        return self.begun.refuses(scheme)

    def solve(self, weight: Tensor, scheme: Scheme, statistics: Mapping[str, Tensor]) -> Solved:
        return self.begun.solve(weight, scheme, statistics)
