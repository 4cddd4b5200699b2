"""compare_original: the graph beside the model as transformers runs it, before anything may be lost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..ir.program import Program
from .base import Note, Pass, PassResult


@dataclass(frozen=True)
class CompareOriginal(Pass):
    """Changes nothing; stands in front of the first pass that may lose something.

    `compare` runs both on a few tokens, raises where they differ, and gives the sentence for the report.
    """

    name = "compare_original"

    compare: Callable[[Program], str] = field(repr=False)

    def run(self, program: Program) -> PassResult:
        return PassResult(notes=[Note("applied", "the whole graph", self.compare(program))])

    def options(self) -> dict[str, Any]:
        return {}
