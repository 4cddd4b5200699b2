"""What einfold makes of a function's attention: passes before and after, and why not fewer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import UnsupportedError
from .analysis.cascade.choose import choose_rank
from .analysis.cascade.fold import Folding
from .analysis.cascade.plans import fold
from .analysis.cascade.regions import regions
from .frontend.cascade.imported import Imported
from .frontend.cascade.trace import import_function
from .ir.cascade.cascade import Cascade


@dataclass(frozen=True)
class CascadeReport:
    """One cascade, all of an import or a region of it: the rank that is streamed, and its folding."""

    imported: Imported
    cascade: Cascade
    rank: str
    folding: Folding

    @property
    def status(self) -> str:
        """ "fused", or "refused" where a reduction does not fold."""
        return "refused" if self.folding.refusals else "fused"

    @property
    def passes_before(self) -> int:
        """Passes over the rank as it is written."""
        return self.folding.passes_before

    @property
    def passes_after(self) -> int:
        """Passes over the rank as it is folded."""
        return self.folding.passes_after

    @property
    def reason(self) -> str:
        """Why it takes more than one pass; empty where it takes one."""
        return self.folding.reason


def explain_function(
    function: Callable[..., Any], inputs: Sequence[torch.Tensor], cache: Path | None = None
) -> CascadeReport:
    """The report on a function of tensors, traced on example inputs; `cache` is where plans are kept.

    Raises UnsupportedError where the function cannot be traced or has nothing to fold.
    """
    imported = import_function(function, inputs)
    rank = choose_rank(imported.cascade, imported.sizes)
    if not rank:
        raise UnsupportedError("nothing is reduced here, so there is nothing to fold")
    cascade = imported.cascade
    return CascadeReport(imported, cascade, rank, fold(cascade, rank, cache))


def explain_regions(imported: Imported, cache: Path | None = None) -> list[CascadeReport]:
    """The reports on the regions of a whole model's import: each attention, each norm before a product."""
    found = regions(imported.cascade, imported.weights)
    return [
        CascadeReport(imported, part.cascade, part.rank, fold(part.cascade, part.rank, cache))
        for part in found
    ]
