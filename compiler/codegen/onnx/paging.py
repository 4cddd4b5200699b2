"""Runs an ONNX artifact whose weights do not all stay in memory, from a copy in which they are packed.

A session of each super-op is made once, over the copy (packed_copy.py), which onnxruntime maps. What is
streamed is brought into the system's page cache ahead of the step and let go behind it (page_ahead.py in
runtime/memory); what is pinned, or the first part of a super-op that stays, is not let go. So nothing is
packed in a step, and the numbers do not depend on what is where (docs/adr/0022, 0034).
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from typing import Any, ClassVar

from ....errors import ArtifactError, DiskError
from ....runtime.cache import Cache
from ....runtime.memory.experts import Frequent, Hits, Recent, Routed
from ....runtime.memory.page_ahead import PageAhead
from ....runtime.memory.pages import UNIT, PagedFile
from ....runtime.memory.read_ahead import Span
from ....runtime.runner import Floats, Ints
from ...ir.heap import give_back
from ...memory.tiers import TierPlan
from .cut import SuperOp
from .cut_model import CutModel
from .packed_copy import DamagedCopyError, NoCopyError, PackedCopy, PackedOp, find, make, units_of
from .routing import Routing
from .runner import session_of
from .streaming import StreamingRunner

#: Bytes of memory that a session takes beside weights, and buffers of what is hashed meanwhile; what is more
#: are weights that were packed anew.
_OF_A_SESSION, _BESIDE = 3 << 20, 20 << 20

#: Units of experts that tokens asked for, from which on it says something how many were held.
_ENOUGH = 1000

#: What is mapped of a copy while this is held is of the runner that holds it.
_LOADING = threading.Lock()


class PagedRunner(StreamingRunner):
    """Sessions of every super-op, and threads that bring the pages of streamed ones."""

    policy: ClassVar[type[Frequent] | type[Recent]] = Frequent
    """What says which experts stay from token to token."""

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
        if isinstance(self._reader, PageAhead):
            # onnxruntime reads all that it packed for several rows, and for one it leaves sums out.
            # Of the head none is read behind a prompt's first chunks, and all for rows of a batch.
            self._reader.step((input_ids.size > 1, min(len(logit_rows), 2)), input_ids.size)
        return super().step(cache, input_ids, position_ids, logit_rows)

    @property
    def experts(self) -> Hits | None:
        """What of experts was found in memory; None where none are streamed."""
        if self._reader is None or not self.plan.routed:
            return None
        counts = self._reader.counts
        return Hits(counts.asked, counts.held, counts.held / max(counts.asked, 1))

    def close(self) -> None:
        hits = None if self._closed else self.experts
        if hits is not None and hits.asked >= _ENOUGH:
            self._copy.tell_of_experts(self.plan.cached / self.plan.experts, hits.rate)
        super().close()
        if self._pages is not None:
            self._pages.close()

    def _check_files(self) -> None:
        super()._check_files()
        if self._pages is not None:
            self._pages.check()

    def _made(self) -> dict[str, Any]:
        with _LOADING:
            found = find(self._artifact, self._ops)
            if found is not None:
                with suppress(DamagedCopyError):
                    return self._over_pages(found)
                # Behind the clause: within it the error would keep the sessions that were made.
                found.discard()
            made = make(self._artifact, self._ops, self._models, lambda: self._options(1))
            return self._over_pages(made)

    def _over_pages(self, copy: PackedCopy) -> dict[str, Any]:
        """Sessions of all super-ops over a copy, which is checked beside. Raises DamagedCopyError where it is
        not as it was written."""
        self._copy = copy
        if self._pages is not None:  # of a copy that is damaged
            self._pages.close()
        pages = self._pages = PagedFile(copy.file)
        stays = {piece.name: self.plan.stays(piece) for piece in self.plan.pieces if piece.nbytes}
        streamed = [] if copy.written else [name for name in self._turn if not stays[name]]
        stop = threading.Event()
        with ThreadPoolExecutor(1, "einfold-check") as pool, ExitStack() as ending:
            ending.callback(stop.set)  # what fails or is interrupted does not wait for the rest
            checked = pool.submit(copy.check_packed, streamed, stop)
            sessions = self._packed_sessions(copy, pages)
            for name, held in stays.items():
                if held:
                    place = copy.ops[name]
                    _bring(copy, pages, place.start, place.loaded, place.hashes[0])
                    # Behind what stays is what the threads bring, or padding that nobody reads.
                    pages.let_go(min(place.start + held, place.end), place.end)
            checked.result()
        pages.look([(place.start, place.end) for place in copy.ops.values()])
        return sessions

    def _packed_sessions(self, copy: PackedCopy, pages: PagedFile) -> dict[str, Any]:
        """One session after the other. onnxruntime packs each once more, to look up what it saved; what the
        next is packed from is read meanwhile, where there is room."""
        sessions, packed, before = dict[str, Any](), 0, anonymous_bytes()
        ops = [op for op in self._ops if op.weights]
        places = [copy.ops[op.name] for op in ops]
        with ThreadPoolExecutor(1, "einfold-originals") as pool:

            def ask(place: PackedOp) -> Future[None]:
                return pool.submit(_bring, copy, pages, place.loaded, place.last, place.hashes[1])

            coming = [ask(place) for place in places[:1]]
            for index, (op, place) in enumerate(zip(ops, places, strict=True)):
                coming.pop().result()
                after = index + 1
                if after < len(ops) and self._has_room_beside(op, ops[after]):
                    coming.append(ask(places[after]))
                sessions[op.name] = self._over_copy(op)
                pages.look()
                pages.let_go(place.start, -(-place.last // UNIT) * UNIT)
                give_back()
                packed += sum(length for _, length in place.packed)
                usual = len(sessions) * _OF_A_SESSION + _BESIDE
                anew = anonymous_bytes() - before > max(packed // 2, usual)
                if anew or not all(pages.is_mapped(*part) for part in place.packed):
                    raise NoCopyError(
                        f"onnxruntime packed {op.name} anew, by the memory that this process took, and does "
                        f"not read the packed copy in {copy.folder}"
                    )
                if after < len(ops) and not coming:
                    coming.append(ask(places[after]))
        for op in self._ops:
            if not op.weights:
                sessions[op.name] = self._session(op, [], [], self._threads)
        return sessions

    def _has_room_beside(self, op: SuperOp, after: SuperOp) -> bool:
        """Whether what a super-op is packed from may be there while another is packed. Neither cache nor
        activations are there yet."""
        held = {piece.name: piece.in_artifact + piece.held for piece in self.plan.pieces}
        return self.plan.fixed.process + held[op.name] + after.nbytes <= self.plan.budget

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
        spans = [
            Span(first, place.end - first)
            for op, place in zip(streamed, places, strict=True)
            for first in [min(place.start + self.plan.parts.get(op.name, 0), place.end)]
        ]
        layers = sorted({op.routing.index for op in streamed if op.routing is not None})
        routed = {
            index: _routed(op.routing, place, layers.index(op.routing.index))
            for index, (op, place) in enumerate(zip(streamed, places, strict=True))
            if op.routing is not None
        }
        plan, policy = self.plan, self.policy
        # Scales and others that lie behind what was packed are seldom read in a step, and padding never.
        comes = {piece.name: plan.comes(piece) for piece in plan.streamed}
        packed = [
            min(place.loaded - span.offset, comes[op.name])
            for op, place, span in zip(streamed, places, spans, strict=True)
        ]
        window = plan.buffers, plan.ahead
        return PageAhead(self._pages, spans, window, routed, plan.room, packed, policy=policy)

    def _streamed(
        self, op: SuperOp, arrays: Mapping[str, Any], threads: int, stack: ExitStack
    ) -> Any:
        assert isinstance(self._reader, PageAhead)
        chosen = None
        if op.routing is not None:
            index = arrays[op.routing.index]
            chosen = index.reshape(-1, index.shape[-1])
        stack.enter_context(self._reader.item(self._turn[op.name], chosen))
        return self._sessions[op.name]


def _routed(routing: Routing, place: PackedOp, layer: int) -> Routed:
    """The units of a super-op's experts."""
    units = [units_of((at, at + size) for at, size in each) for each in place.experts]
    every = units_of([(place.start, place.end)])
    always = {*every}.difference(*units)
    experts = dict(zip(routing.experts, units, strict=True))
    return Routed(tuple(sorted(always)), experts, routing.most, layer)


def anonymous_bytes() -> int:
    """Bytes of this process in memory that are of no file; 0 where the system does not say."""
    with suppress(OSError), open("/proc/self/status", encoding="ascii", errors="replace") as stream:
        for line in stream:
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) << 10
    return 0


def _bring(copy: PackedCopy, pages: PagedFile, start: int, end: int, wanted: str) -> None:
    """Brings a stretch of a copy; raises DamagedCopyError where it is not as it was written."""
    try:
        found = pages.bring_hashed(start, end)
    except (ArtifactError, DiskError) as error:
        raise DamagedCopyError(str(error)) from error
    if found != wanted:
        raise copy.damaged()
