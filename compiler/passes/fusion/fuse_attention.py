"""fuse_attention: attention that a module spells out becomes what the target does best with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...fuse.folded import Maker
from ...fuse.programs import fuse_program
from ...fuse.report import FusedCascade
from ...ir.program import Program, remove_dead_nodes
from ..base import Pass, PassResult


@dataclass(frozen=True)
class FuseAttention(Pass):
    """Finds attention by dataflow, folds it to one pass over the keys, and asks the target to lower that.

    Before: `%s = matmul(%q, %kt); %d = div(%s, 8.0); %p = softmax(%d, -1); %o = matmul(%p, %v)`
    After:  `%o = softmax_attention(%q, %k, %v, None, None, None, 0.125, -inf)`
    Regions, cascades and their folding are those of the backend of `torch.compile` (`compiler/fuse`; FuseMax,
    section 5). The backend measures its lowerings where the program runs. This pass cannot, for the program
    runs elsewhere: the target says which plans it takes. What stays as written is in the notes, with the
    reason.
    """

    name = "fuse_attention"

    target: str
    make: Maker | None
    """The target's lowering of plans, which raises NotLoweredError with the reason; None without one."""

    def run(self, program: Program) -> PassResult:
        result = PassResult()
        if self.make is None:
            result.skipped("all", f"the target {self.target} has no operator for attention")
            return result
        for item in self.entries(program):
            if item.status == "fused":
                passes = f"{item.passes_before} -> {item.passes_after} passes over the keys"
                result.applied(item.where, f"{passes}, {item.lowering}")
            else:
                result.skipped(item.where, item.reason)
        remove_dead_nodes(program)
        return result

    def entries(self, program: Program) -> list[FusedCascade]:
        """Fuses what the target has a lowering for; an entry a region, in order."""
        if self.make is None:
            return []
        return fuse_program(program, f"attention of the target {self.target}", self.make)

    def options(self) -> dict[str, Any]:
        return {"target": self.target}
