"""The target `reference`: graph and weights alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from ...ir.manifest import WHOLE, Part
from ..target import TARGETS, Target

if TYPE_CHECKING:
    from torch import Tensor

    from ....runtime.artifact import Artifact
    from ....runtime.runner import Caller, Runner
    from ...ir.program import Program
    from ...memory.planning import MemoryPlan


@TARGETS.register
class Reference(Target):
    """The reference: the graph, run in torch by the operators' meaning. It runs every artifact, slowly."""

    name: ClassVar[str] = "reference"
    title: ClassVar[str] = "nothing: torch runs the graph by its operators' meaning, slowly"

    def runs(self, target: str) -> bool:
        return True

    def plan(self, program: Program, inputs: Mapping[str, Tensor]) -> MemoryPlan:
        from ...memory.tiling import planned

        return planned(program, inputs)[1]

    def runner(
        self,
        artifact: Artifact,
        threads: int | None = None,
        trust: bool = False,
        lean: bool = False,
    ) -> Runner:
        from .runner import ReferenceRunner

        return ReferenceRunner(artifact, keep_weights=not lean)

    def caller(
        self,
        artifact: Artifact,
        threads: int | None = None,
        lean: bool = False,
        part: Part = WHOLE,
    ) -> Caller:
        from .runner import ReferenceCaller

        return ReferenceCaller(artifact, not lean, part)
