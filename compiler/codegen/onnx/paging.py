"""Runs an ONNX artifact whose weights do not all stay in memory, from a copy in which they are packed.

A session of each super-op is made once, over the copy (packed_copy.py), which onnxruntime maps. What is
streamed is brought into the system's page cache ahead of the step and let go behind it (page_ahead.py in
runtime/memory); what is pinned is not let go. So nothing is packed in a step, and the numbers do not depend
on what is where (docs/adr/0022).
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from ....errors import ArtifactError
from ....runtime.cache import Cache
from ....runtime.memory.page_ahead import PageAhead
from ....runtime.memory.pages import PagedFile
from ....runtime.memory.read_ahead import Span
from ....runtime.runner import Floats, Ints
from ...ir.heap import give_back
from ...memory.tiers import TierPlan
from .cut import SuperOp
from .cut_model import CutModel
from .packed_copy import NoCopyError, PackedCopy, find, make
from .runner import session_of
from .streaming import StreamingRunner

#: What is mapped of a copy while this is held is of the runner that holds it.
_LOADING = threading.Lock()


class PagedRunner(StreamingRunner):
    """Sessions of every super-op, and threads that bring the pages of streamed ones."""

    def __init__(self, model: CutModel, plan: TierPlan, threads: int | None = None) -> None:
        """Raises NoCopyError where there is no copy and none can be made, or onnxruntime does not read it,
        UnsupportedError where the system does not bring pages."""
        self._pages: PagedFile | None = None
        super().__init__(model, plan, threads)

    @property
    def copy(self) -> PackedCopy:
        """The copy that it runs from."""
        return self._copy

    def step(self, cache: Cache, input_ids: Ints, position_ids: Ints, logit_rows: Ints) -> Floats:
        if self._pages is not None:
            self._pages.check()
        if isinstance(self._reader, PageAhead):
            # onnxruntime reads all that it packed for several rows, and for one it leaves sums out.
            # Of the head none is read behind a prompt's first chunks, and all for rows of a batch.
            self._reader.kind = input_ids.size > 1, min(len(logit_rows), 2)
        return super().step(cache, input_ids, position_ids, logit_rows)

    def close(self) -> None:
        super().close()
        if self._pages is not None:
            self._pages.close()

    def _made(self) -> dict[str, Any]:
        with _LOADING:
            return self._over_pages()

    def _over_pages(self) -> dict[str, Any]:
        self._copy = find(self._artifact, self._ops) or make(
            self._artifact, self._ops, self._models, lambda: self._options(1)
        )
        pages = self._pages = PagedFile(self._copy.file)
        sessions = {}
        for op in self._ops:
            if not op.weights:
                sessions[op.name] = self._session(op, [], [], self._threads)
                continue
            sessions[op.name] = self._over_copy(op)
            # What was read to pack it once more, which onnxruntime does to look it up.
            place = self._copy.ops[op.name]
            pages.look()
            pages.let_go(place.start, place.last)
            give_back()
            if not all(pages.is_mapped(*part) for part in place.packed):
                raise NoCopyError(
                    f"onnxruntime packed {op.name} anew, and does not read the packed copy in "
                    f"{self._copy.folder}"
                )
        pages.look([(place.start, place.end) for place in self._copy.ops.values()])
        return sessions

    def _over_copy(self, op: SuperOp) -> Any:
        import onnxruntime as ort

        options = self._options(self._threads, self._copy.folder)
        options.graph_optimization_level = (
            ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        )  # it was saved behind
        try:
            return session_of(
                self._copy.model(op.name), options, f"{op.name} of {self._copy.folder}"
            )
        except (OSError, ArtifactError) as error:  # of a copy that is gone, or another made of it
            raise NoCopyError(f"the packed copy could not be loaded: {error}") from error

    def _reading(self, streamed: Sequence[SuperOp]) -> PageAhead:
        assert self._pages is not None
        places = [self._copy.ops[op.name] for op in streamed]
        spans = [Span(place.start, place.end - place.start) for place in places]
        return PageAhead(self._pages, spans, self.plan.buffers)

    def _streamed(self, op: SuperOp, threads: int, stack: ExitStack) -> Any:
        assert isinstance(self._reader, PageAhead)
        stack.enter_context(self._reader.item(self._turn[op.name]))
        return self._sessions[op.name]
