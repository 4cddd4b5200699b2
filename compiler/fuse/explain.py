"""What einfold makes of a function's attention: passes before and after, and why not fewer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ...errors import UnsupportedError
from ..analysis.cascade.choose import choose_rank
from ..analysis.cascade.fold import Folding
from ..analysis.cascade.plans import fold
from ..analysis.cascade.regions import regions
from ..analysis.cascade.scope import Scope
from ..frontend.cascade.imported import Imported
from ..frontend.cascade.trace import import_function
from ..ir.cascade.cascade import Cascade
from ..ir.cascade.expr import reads


@dataclass(frozen=True)
class CascadeReport:
    """One cascade, all of an import or a region of it: the rank that is streamed, and its folding."""

    imported: Imported
    cascade: Cascade
    rank: str
    folding: Folding

    @cached_property
    def waits(self) -> tuple[str, ...]:
        """Operators outside that read completed reductions over the rank, and feed others over it."""
        scope = Scope(self.cascade, self.rank)
        late: set[str] = set()
        for node, sources in self.imported.feeds.items():
            done = {b.name for b in self.imported.outputs if b.node in sources}
            if set(sources) & late or any(scope.needs(name) for name in done):
                late.add(node)
        given = {b.name: b.node for b in self.imported.inputs if b.node in late}
        read: dict[str, set[str]] = {name: {node} for name, node in given.items()}
        found: set[str] = set()
        for item in self.cascade.statements:
            read[item.name] = set().union(*(read.get(r.tensor, set()) for r in reads(item.expr)))
            found |= read[item.name] if self.rank in item.over else set()
        return tuple(node for node in late if node in found)

    @property
    def status(self) -> str:
        """ "fused", or "refused" where a reduction does not fold."""
        return "refused" if self.folding.refusals or self.waits else "fused"

    @property
    def passes_before(self) -> int:
        """Passes over the rank as it is written."""
        return self.folding.passes_before

    @property
    def passes_after(self) -> int:
        """Passes over the rank as it is folded."""
        return self.folding.passes_after + bool(self.waits)

    @property
    def reason(self) -> str:
        """Why it takes more than one pass; empty where it takes one."""
        outside = [
            f"{node} reads completed reductions over {self.rank} and is read along it: "
            f"{self.imported.opaque[node]}"
            for node in self.waits
        ]
        return "; ".join([reason for reason in (self.folding.reason, *outside) if reason])


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
