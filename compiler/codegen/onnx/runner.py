"""Runs an ONNX artifact on onnxruntime, with the cache bound in place."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime as ort

from ....errors import ArtifactError, first_line, pass_on
from ....runtime.artifact import Artifact
from ....runtime.buffers import Array
from ....runtime.cache import Cache
from ....runtime.runner import Floats, Ints, running
from ...ir.heap import give_back
from ...ir.kv.layout import TOKENS
from ...ir.manifest import BLOCKS, MODEL, WEIGHTS, WHOLE, Part
from .check import check_onnx
from .process import PAIRS

#: How onnxruntime calls the types of a cache's buffers, and of what encoders take and give.
_KINDS = {
    "f32": "tensor(float)",
    "i64": "tensor(int64)",
    "bool": "tensor(bool)",
    "f16": "tensor(float16)",
    "i8": "tensor(int8)",
    "u8": "tensor(uint8)",
    "i32": "tensor(int32)",
}


@dataclass
class _Binding:
    """A binding of fixed shapes, and the arrays that it reads and writes."""

    cache: Cache
    io: Any
    inputs: dict[str, Ints]
    """Token ids, positions, rows of logits, and the cache's counters."""
    outputs: dict[str, Array]
    """The logits, and the queries of scored groups."""

    def fits(self, cache: Cache, input_ids: Ints, logit_rows: Ints) -> bool:
        same = all(
            mine.keys() == other.keys() and all(mine[name] is other[name] for name in other)
            for mine, other in (
                (self.cache.buffers, cache.buffers),
                (self.cache.given, cache.given),
            )
        )
        return (
            same
            and self.inputs["input_ids"].shape == input_ids.shape
            and self.inputs["logit_rows"].shape == logit_rows.shape
        )


def open_session(
    artifact: Artifact, threads: int | None, prepack: bool, part: Part = WHOLE
) -> ort.InferenceSession:
    """A session of the model of an artifact or a part of it, which is read and checked first."""
    options = session_options(threads or available_cores())
    if not prepack:
        options.add_session_config_entry("session.disable_prepacking", "1")
    checked_model(artifact, part)
    path = str(artifact.file(part.model))
    session = session_of(path, options, path)
    give_back()
    return session


def session_options(threads: int) -> ort.SessionOptions:
    """What sessions of artifacts have in common."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # errors come as exceptions
    # A plan, made in the first step of each shape, lays buffers side by side. Without they are used again
    # while the processor's caches hold them, and attention in integers takes half the memory.
    options.enable_mem_pattern = False
    return options


def checked_model(artifact: Artifact, part: Part = WHOLE) -> bytes:
    """The model of an artifact or a part of it; raises ArtifactError for one that is not to be run."""
    raw = artifact.read(part.model)
    try:
        check_onnx(raw, WEIGHTS, artifact.file(WEIGHTS).stat().st_size)
    except ArtifactError as error:
        raise ArtifactError(f"{artifact.file(part.model)} is not used: {error}") from error
    return raw


def session_of(model: str | bytes, options: ort.SessionOptions, name: str) -> ort.InferenceSession:
    """A session of a model, by its path or its bytes; raises ArtifactError, with its name, for one that
    onnxruntime does not take."""
    try:
        return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises several unrelated classes
        pass_on(error)
        raise ArtifactError(
            f"onnxruntime {ort.__version__} cannot load {name}: {first_line(error)}"
        ) from error


class OnnxRunner:
    """One onnxruntime session; a decode step binds nothing anew and copies no cache."""

    most_pairs = PAIRS

    def __init__(
        self, artifact: Artifact, threads: int | None = None, prepack: bool = True
    ) -> None:
        """Loads the model. Without `prepack` weights stay as in the file: slower, half the memory."""
        self.session = open_session(artifact, threads, prepack)
        self._vocabulary = artifact.manifest.model.vocabulary
        self._weight_bytes = artifact.weight_bytes()
        self._binding: _Binding | None = None
        self._inputs = {node.name for node in self.session.get_inputs()}
        self._outputs = {node.name: node.shape for node in self.session.get_outputs()}
        self.observed: dict[str, Array] = {}
        self._name = str(artifact.folder)
        check_names(artifact, self.session)
        self.blocks = two_numbers(self.session.get_modelmeta().custom_metadata_map.get(BLOCKS, ""))
        """Slots that are stepped over at a time, and the capacity from which on it counts."""

    @property
    def weight_bytes(self) -> int:
        return self._weight_bytes

    def step(self, cache: Cache, input_ids: Ints, position_ids: Ints, logit_rows: Ints) -> Floats:
        binding = self._binding
        if binding is None or not binding.fits(cache, input_ids, logit_rows):
            binding = self._bind(cache, input_ids, logit_rows)
            # Bindings of a decode step are kept. Those of a prompt are not: `settle` replaces buffers, and
            # one that is bound would stay in memory, and be written to.
            self._binding = binding if input_ids.shape[1] == 1 and cache.prompt is None else None
        given = {"input_ids": input_ids, "position_ids": position_ids, "logit_rows": logit_rows}
        for name, array in (given | cache.counters).items():
            binding.inputs[name][:] = array
        with running(self._name):
            self.session.run_with_iobinding(binding.io)
        self.observed = {name: a for name, a in binding.outputs.items() if name != "logits"}
        logits: Floats = binding.outputs["logits"]  # type: ignore[assignment]
        return logits

    def _bind(self, cache: Cache, input_ids: Ints, logit_rows: Ints) -> _Binding:
        io = self.session.io_binding()
        given = {"input_ids": input_ids, "position_ids": input_ids, "logit_rows": logit_rows}
        inputs = {name: np.empty_like(array) for name, array in (given | cache.counters).items()}
        outputs: dict[str, Array] = {
            name: np.empty((*input_ids.shape, *shape[2:]), np.float32)
            for name, shape in self._outputs.items()
            if name != "logits" and not name.startswith("present.")
        }
        outputs["logits"] = np.empty((len(logit_rows), self._vocabulary), np.float32)
        for name, array in (inputs | cache.buffers | dict(cache.given)).items():
            if name in self._inputs:
                bind_array(io.bind_input, name, array)
        for name, array in outputs.items():
            bind_array(io.bind_output, name, array)
        for name in self._outputs:
            # Past and present are one buffer: the new tokens are written where they stay. A layer that reads
            # another's int8 cache gives it again, as NAME@LAYER.
            if name.startswith("present."):
                cached = name.removeprefix("present.").partition("@")[0]
                bind_array(io.bind_output, name, cache.buffers[cached])
        return _Binding(cache, io, inputs, outputs)


class OnnxCaller:
    """One onnxruntime session of an encoder."""

    def __init__(
        self,
        artifact: Artifact,
        threads: int | None = None,
        prepack: bool = True,
        part: Part = WHOLE,
    ) -> None:
        """Loads the model. Without `prepack` weights stay as in the file: slower, half the memory."""
        self.session = open_session(artifact, threads, prepack, part)
        self._weight_bytes = artifact.weight_bytes()
        self._name = str(artifact.folder)
        manifest = artifact.manifest
        for entries, nodes in (
            (manifest.inputs, self.session.get_inputs()),
            (manifest.outputs, self.session.get_outputs()),
        ):
            known = {entry.name: entry for entry in entries}
            if known.keys() != {node.name for node in nodes} or len(known) != len(nodes):
                raise ArtifactError(
                    f"{self._name}/{part.model} takes or gives {sorted(node.name for node in nodes)}, and "
                    f"the manifest lists {sorted(known)}"
                )
            for node in nodes:
                entry = known[node.name]
                check_kind(self._name, node, _KINDS.get(entry.dtype, entry.dtype), entry.sizes)
        self._outputs = [entry.name for entry in manifest.outputs]

    @property
    def weight_bytes(self) -> int:
        return self._weight_bytes

    def call(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        with running(self._name):
            found = self.session.run(self._outputs, dict(inputs))
        return dict(zip(self._outputs, found, strict=True))


def check_names(artifact: Artifact, session: Any, beside: Sequence[str] = ()) -> None:
    """Inputs and results are those of the manifest's cache and vocabulary; raises ArtifactError else.

    `beside` are results that were asked for beside the model's own.
    """
    layout, width = artifact.manifest.layout(), artifact.manifest.model.vocabulary
    known: dict[str, tuple[str, tuple[int | None, ...]]] = dict.fromkeys(
        ("input_ids", "position_ids"), ("tensor(int64)", (None, None))
    )
    folder, inputs = str(artifact.folder), {node.name for node in session.get_inputs()}
    counters = ("logit_rows", TOKENS, *layout.clocks(), *layout.packs())
    known |= dict.fromkeys(counters, ("tensor(int64)", (None,)))
    for spec in layout.buffers(batch=1, capacity=1):
        heads = (None, int(spec.shape[1]), *(None for _ in spec.shape[2:-1]))
        known[spec.name] = (
            _KINDS[spec.dtype],
            heads if len(spec.shape) == 2 else (*heads, None),
        )
    for entry in artifact.manifest.beside:
        known[entry.name] = (_KINDS.get(entry.dtype, entry.dtype), entry.sizes)
    results = {node.name: node for node in session.get_outputs() if node.name not in beside}
    if "logits" not in results:
        raise ArtifactError(f"{folder}/{MODEL} gives no logits")
    needed = {spec.name for spec in layout.buffers(1, 1) if spec.role != "host"}
    for name in sorted((needed | layout.clocks().keys()) - inputs):
        raise ArtifactError(f"{folder}/{MODEL} does not ask for {name!r} of the manifest's cache")
    for node in session.get_inputs():
        if node.name not in known:
            raise ArtifactError(f"{folder}/{MODEL} asks for {node.name!r}, which nobody gives")
        check_kind(folder, node, *known[node.name])
    check_kind(folder, results.pop("logits"), "tensor(float)", (None, width))
    for name, node in results.items():
        buffer = name.removeprefix("present.").partition("@")[0]
        if name.startswith("present.") and buffer in known:
            check_kind(folder, node, *known[buffer])
        elif not name.startswith("query.") or len(node.shape) < 2:
            raise ArtifactError(f"{folder}/{MODEL} gives {name!r}, which nobody takes")


def check_kind(name: str, node: Any, kind: str, sizes: tuple[int | None, ...]) -> None:
    """An input or a result is what the manifest says; raises ArtifactError else."""
    same = len(node.shape) == len(sizes) and all(
        wanted is None or not isinstance(size, int) or size == wanted
        for size, wanted in zip(node.shape, sizes, strict=True)
    )
    if node.type != kind or not same:
        shown = [size if size is not None else "any" for size in sizes]
        raise ArtifactError(
            f"{name}/{MODEL} has {node.name!r} as {node.type}{node.shape}, where the manifest says "
            f"{kind}{shown}"
        )


def bind_array(bind: Any, name: str, array: Any) -> None:
    bind(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)


def two_numbers(text: str) -> tuple[int, int]:
    """What a model says of its blocks; (1, 0) where it says nothing, or nonsense."""
    words = text.split()
    if len(words) != 2 or not all(word.isdecimal() and len(word) < 10 for word in words):
        return 1, 0
    return max(1, int(words[0])), int(words[1])


def available_cores() -> int:
    """Processors that this process may run on."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        return os.cpu_count() or 1
