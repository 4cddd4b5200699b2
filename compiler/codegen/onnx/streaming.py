"""Runs an ONNX artifact whose weights do not all stay in memory.

The model is cut into super-ops (cut.py), each a model of its own. Pinned ones are sessions of onnxruntime
that are made once. Of a streamed one a session is made in every step, over weights that a thread has read
meanwhile, and let go behind its run: onnxruntime multiplies by int4 weights only as it has packed them, and
packs them about as fast as a disk reads (docs/adr/0018). What rows are looked up in, embeddings and tables of
rotary positions, lies in the file that onnxruntime maps; of it only those rows are read.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from ....errors import ArtifactError, DiskError
from ....runtime.buffers import Array, Make, empty
from ....runtime.cache import Cache
from ....runtime.memory.direct import Bytes, DirectFile, aligned
from ....runtime.memory.page_ahead import PageAhead
from ....runtime.memory.read_ahead import ReadAhead, Span, item_room, located, merged, read_spans
from ....runtime.memory.slots_ahead import Spilled
from ....runtime.memory.spilled_cache import SpilledCache
from ....runtime.runner import Floats, Ints, running
from ...ir.heap import give_back, leave_from, one_heap
from ...ir.kept import cache_home
from ...ir.kv.spill import resident_bytes as resident_cache
from ...ir.manifest import BLOCKS, WEIGHTS, WHOLE
from ...memory.leveling import AHEAD
from ...memory.spill import Spill
from ...memory.tiers import TierPlan
from .cut import Extent, SuperOp, buffer_of, handed_on, model_of
from .cut_model import CutModel
from .process import PAIRS
from .runner import (
    available_cores,
    bind_array,
    check_names,
    session_of,
    session_options,
    two_numbers,
)

#: Tokens of a step that one thread computes.
_FEW = 8

#: Blocks from which on memory goes back to the system as it is let go of: values of many tokens, and in steps
#: of few none but what is larger than most packed weights, which come and go in every one.
_BLOCK, _OF_WEIGHTS = 1 << 20, 32 << 20


class StreamingRunner:
    """Sessions of pinned super-ops, and a thread that reads the weights of the others ahead."""

    most_pairs = PAIRS

    def __init__(self, model: CutModel, plan: TierPlan, threads: int | None = None) -> None:
        """Loads what is pinned. Raises ArtifactError where the model is none that onnxruntime takes."""
        one_heap()
        # Before anything is loaded: what large blocks leave in the heap is filled with values later.
        leave_from(_BLOCK)
        self.plan = plan
        self.observed: dict[str, Array] = {}
        self._artifact = model.artifact
        self._name = str(model.artifact.folder)
        self._vocabulary = model.artifact.manifest.model.vocabulary
        self._weight_bytes = model.artifact.weight_bytes()
        self._threads = threads or available_cores()
        self._ops = model.ops
        whole = self._weightless(model)
        check_names(self._artifact, whole, handed_on(model.proto, self._ops))
        self.blocks = two_numbers(whole.get_modelmeta().custom_metadata_map.get(BLOCKS, ""))
        self._turns = _turns(self._ops, plan.spill)
        with running(self._name):
            kinds = _kinds(whole)
            self._models = {op.name: model_of(model.proto, op, kinds, WEIGHTS) for op in self._ops}
        del whole
        self._reader: ReadAhead | PageAhead | None = None
        self._closed = False
        self._layout = model.artifact.manifest.layout()
        spilled = plan.spill.layers if plan.spill is not None else ()
        self._spilled = SpilledCache(cache_home(), self._layout, spilled) if spilled else None
        self.make: Make = empty if self._spilled is None else self._spilled.make
        self._file = DirectFile(self._artifact.file(WEIGHTS))
        names = {piece.name for piece in plan.streamed}
        streamed = [op for op in self._ops if op.name in names]
        self._turn = {op.name: index for index, op in enumerate(streamed)}
        self._sessions = self._made()
        self._reader = self._reading(streamed) if streamed else None
        self._before = self._reader.file.bytes_read if self._reader is not None else 0
        give_back()

    @property
    def weight_bytes(self) -> int:
        return self._weight_bytes

    @property
    def fetched(self) -> int:
        """Bytes that were read from the disk since the runner was made."""
        return self._reader.file.bytes_read - self._before if self._reader is not None else 0

    @property
    def reader(self) -> ReadAhead | PageAhead | None:
        return self._reader

    @property
    def most_logits(self) -> int:
        """Rows of logits that a step may give; they are there as parts and joined."""
        return self.plan.most_logits(self._vocabulary)

    @property
    def spilled(self) -> Spilled | None:
        """What of the cache went to the disk and came from it; None where none is spilled."""
        return None if self._spilled is None else self._spilled.ahead.counts

    def check_room(self, rows: int, capacity: int, prompt: int | None = None) -> None:
        """Raises OutOfMemoryError where the plan has no room for a cache of so many rows and tokens, or for
        the logits of so many rows; ArtifactError where the runner was closed."""
        layers = self.plan.spill.layers if self.plan.spill is not None else ()
        self._check_cache(resident_cache(self._layout, layers, rows, capacity, prompt))
        self.plan.check_rows(rows, self._vocabulary)

    def _check_cache(self, nbytes: int) -> None:
        if self._closed:
            raise ArtifactError(f"{self._name} was closed, and with it its weights: load it again")
        self.plan.check_cache(nbytes)

    def step(self, cache: Cache, input_ids: Ints, position_ids: Ints, logit_rows: Ints) -> Floats:
        stages = self._spilled.stage_bytes(cache) if self._spilled is not None else 0
        self._check_cache(cache.nbytes + stages)
        self._check_files()
        try:
            return self._step(cache, input_ids, position_ids, logit_rows)
        except DiskError as error:
            raise DiskError(
                f"{error}; the step gave nothing, and the model can go on: ask for the same again"
            ) from error

    def _check_files(self) -> None:
        """Raises ArtifactError where a file was changed; one that is shorter than what is mapped of it would
        end the process."""
        self._file.check()

    def _step(self, cache: Cache, input_ids: Ints, position_ids: Ints, logit_rows: Ints) -> Floats:
        asked = {"input_ids": input_ids, "position_ids": position_ids, "logit_rows": logit_rows}
        counters = {name: np.ascontiguousarray(a) for name, a in (asked | cache.counters).items()}
        given: dict[str, Any] = counters | dict(cache.given)
        if self._spilled is not None:
            self._spilled.step(cache)
        self._settle_heap(input_ids.size)
        logits = np.empty((len(logit_rows), self._vocabulary), np.float32)
        # Products of few rows are short, and threads of their own would be made for every session.
        threads = 1 if input_ids.size <= _FEW else self._threads
        given["logits"] = logits
        handed: dict[str, Array] = {}
        with running(self._name):
            for spilled, turn in self._turns:
                with self._buffers(cache, spilled, input_ids.shape[1]) as buffers:
                    for op, last in turn:
                        handed |= self._run(op, given | buffers | handed, buffers, threads)
                        for name in last:
                            del handed[name]
        self.observed = handed
        return logits

    def _settle_heap(self, tokens: int) -> None:
        """Has values of many tokens go back to the system as the next are made; of few tokens they are small,
        and packed weights are best taken from the heap, step after step."""
        leave_from(_OF_WEIGHTS if tokens <= _FEW and not self.plan.paged else _BLOCK)

    def close(self) -> None:
        """Ends the thread that reads. No step is taken from then on."""
        self._closed = True
        leave_from(_OF_WEIGHTS)  # what others in this process do is slower with less
        if self._reader is not None:
            self._reader.close()
        if self._spilled is not None:
            self._spilled.close()
        self._file.close()

    def __del__(self) -> None:
        with suppress(Exception):  # half made, or the interpreter ends
            self.close()

    @contextmanager
    def _buffers(self, cache: Cache, spilled: bool, size: int) -> Iterator[dict[str, Any]]:
        """The cache's buffers, of a spilled layer as they are in memory until the `with` ends."""
        if not spilled or self._spilled is None:
            yield cache.buffers
            return
        with self._spilled.ahead.turn(cache.lengths, size) as slots:
            yield cache.buffers | slots

    def _run(
        self, op: SuperOp, arrays: Mapping[str, Any], buffers: Mapping[str, Any], threads: int
    ) -> dict[str, Array]:
        """Runs a super-op; gives the values that others read, and what scored groups learn from.

        They are copied: as onnxruntime has them they would keep the session, and with it the weights.
        """
        with ExitStack() as stack:
            session = (
                self._streamed(op, arrays, threads, stack)
                if op.name in self._turn
                else self._sessions[op.name]
            )
            io = session.io_binding()
            for name in op.inputs:
                bind_array(io.bind_input, name, arrays[buffer_of(name)])
            free = []
            for name in op.outputs:
                if name == "logits" or buffer_of(name) in buffers:
                    bind_array(io.bind_output, name, arrays[buffer_of(name)])
                else:
                    io.bind_output(name, "cpu")
                    free.append(name)
            session.run_with_iobinding(io)
            made = zip(op.outputs, io.get_outputs(), strict=True)
            return {name: np.array(value.numpy()) for name, value in made if name in free}

    def _streamed(
        self, op: SuperOp, arrays: Mapping[str, Any], threads: int, stack: ExitStack
    ) -> Any:
        """A session over the weights that were read for it; the stack keeps the buffer while it runs."""
        assert isinstance(self._reader, ReadAhead)
        if resident_bytes() + op.held + self.plan.fixed.activations > self.plan.peak:
            give_back()
        index = self._turn[op.name]
        views = stack.enter_context(self._reader.item(index))
        return self._session(op, views, self._reader.spans(index), threads, alias=True)

    def _reading(self, streamed: Sequence[SuperOp]) -> ReadAhead | PageAhead:
        """What reads ahead of the step."""
        spans = [[Span(w.offset, w.length) for w in op.weights] for op in streamed]
        path = self._artifact.file(WEIGHTS)
        return ReadAhead(DirectFile(path), spans, min(AHEAD, len(spans)))

    def _made(self) -> dict[str, Any]:
        """Sessions of super-ops that stay: the largest first, when memory is emptiest."""
        kept = [op for op in self._ops if op.name not in self._turn]
        sessions = {}
        for op in sorted(kept, key=lambda op: -op.nbytes):
            spans = merged([Span(w.offset, w.length) for w in op.weights])
            views = read_spans(self._file, spans, aligned(item_room(spans)))
            sessions[op.name] = self._session(op, views, spans, self._threads)
        return sessions

    def _session(
        self,
        op: SuperOp,
        views: Sequence[Bytes],
        spans: Sequence[Span],
        threads: int,
        alias: bool = False,
    ) -> Any:
        """A session over weights in memory; what it does not pack it copies, or reads where it is."""
        options = self._options(threads)
        names = [weight.name for weight in op.weights]
        values = [
            ort.OrtValue.ortvalue_from_numpy(_typed(located(views, spans, w.offset, w.length), w))
            for w in op.weights
        ]
        if alias:
            for name, value in zip(names, values, strict=True):
                options.add_initializer(name, value)
        elif names:
            options.add_external_initializers(names, values)
        return session_of(self._models[op.name], options, f"{op.name} of {self._name}")

    def _weightless(self, model: CutModel) -> Any:
        """The whole model over the mapped file, nothing of which is read, with what super-ops hand on among
        its results: onnxruntime says the types of these."""
        from onnx import ModelProto, ValueInfoProto

        proto = ModelProto()
        proto.CopyFrom(model.proto)
        names = handed_on(proto, self._ops)
        proto.graph.output.extend(ValueInfoProto(name=name) for name in names)
        options = self._options(1)
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.add_session_config_entry("session.disable_prepacking", "1")
        whole = f"{WHOLE.model} of {self._name}"
        return session_of(proto.SerializeToString(), options, whole)

    def _options(self, threads: int, folder: Path | None = None) -> Any:
        """Of a session whose weights lie in files of a folder, without one the artifact's."""
        options = session_options(threads)
        # There are as many arenas as sessions, and each would keep what a prompt needed.
        options.enable_cpu_mem_arena = False
        # Threads of one session that wait for work would take the processor from the next.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path",
            str(folder or self._artifact.folder.resolve()),
        )
        return options


def resident_bytes() -> int:
    """Bytes of this process in memory; a large number where the system does not say."""
    try:
        with open("/proc/self/statm", encoding="ascii") as stream:
            return int(stream.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 1 << 62


def _turns(
    ops: Sequence[SuperOp], spill: Spill | None
) -> list[tuple[bool, list[tuple[SuperOp, list[str]]]]]:
    """Super-ops in order, those together that a spilled layer of the cache has its turn in, and whether it
    has; each with the values of others that nobody reads behind it."""
    found = list[tuple[bool, list[tuple[SuperOp, list[str]]]]]([(False, [])])
    slots = None
    for op, last in zip(ops, _last_uses(ops), strict=True):
        if spill is not None and slots is None and (slots := spill.before(op.name)) is not None:
            found.append((True, []))
        found[-1][1].append((op, last))
        if slots is not None and slots.last == op.name:
            found.append((False, []))
            slots = None
    return found


def _last_uses(ops: Sequence[SuperOp]) -> list[list[str]]:
    """For each super-op the values of others that nobody reads behind it."""
    made = {name for op in ops for name in op.outputs if name == buffer_of(name)}
    seen, found = set[str](), list[list[str]]()
    for op in reversed(ops):
        found.append([name for name in op.inputs if name in made and name not in seen])
        seen.update(found[-1])
    return found[::-1]


def _kinds(session: Any) -> dict[str, tuple[int, Sequence[Any]]]:
    """Types, as ONNX numbers them, and ranks of a session's results."""
    numbers = {
        "tensor(float)": 1,
        "tensor(uint8)": 2,
        "tensor(int8)": 3,
        "tensor(uint16)": 4,
        "tensor(int16)": 5,
        "tensor(int32)": 6,
        "tensor(int64)": 7,
        "tensor(bool)": 9,
        "tensor(float16)": 10,
        "tensor(double)": 11,
        "tensor(uint32)": 12,
        "tensor(uint64)": 13,
    }
    return {node.name: (numbers[node.type], None) for node in session.get_outputs()}  # type: ignore[misc]


def _typed(view: Bytes, extent: Extent) -> Array:
    from onnx import helper

    kind = helper.tensor_dtype_to_np_dtype(extent.dtype)
    whole = view if view.ctypes.data % kind.itemsize == 0 else view.copy()
    return whole.view(kind).reshape(extent.dims)
