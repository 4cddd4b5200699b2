"""An ONNX artifact in less memory than its weights take: by paging where it can, else by packing in steps."""

from __future__ import annotations

from dataclasses import replace

from ....errors import UnsupportedError
from ...memory.placing import place
from ...memory.tiers import Load, TierPlan
from .cut_model import CutModel
from .packed_copy import NoCopyError
from .paging import PagedRunner
from .streaming import StreamingRunner


class OnnxInParts(CutModel):
    """A model in super-ops that runs as a plan says."""

    def runner(
        self, plan: TierPlan, threads: int | None = None, trust: bool = False
    ) -> StreamingRunner:
        """What runs it as planned; where pages were planned and cannot be had, it packs in every step."""
        if not plan.paged:
            return StreamingRunner(self, plan, threads)
        try:
            return PagedRunner(self, plan, threads)
        except (NoCopyError, UnsupportedError) as error:
            reason = str(error)
        # Behind the clause: within it the error would keep the sessions that were made.
        load = plan.load or Load(self.pieces, plan.fixed)
        load = replace(load, paged=(), remark=reason)
        return StreamingRunner(self, place(load, plan.budget), threads)
