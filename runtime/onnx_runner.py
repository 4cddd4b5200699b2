"""Runs an ONNX artifact on onnxruntime, with the cache bound in place."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime as ort

from ..compiler.ir.manifest import BLOCKS, MODEL
from ..errors import ArtifactError, first_line, pass_on
from .artifact import Artifact
from .cache import Array, Cache
from .runner import Floats, Ints


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
        same = self.cache.buffers.keys() == cache.buffers.keys() and all(
            self.cache.buffers[name] is cache.buffers[name] for name in cache.buffers
        )
        return (
            same
            and self.inputs["input_ids"].shape == input_ids.shape
            and self.inputs["logit_rows"].shape == logit_rows.shape
        )


class OnnxRunner:
    """One onnxruntime session; a decode step binds nothing anew and copies no cache."""

    def __init__(
        self, artifact: Artifact, threads: int | None = None, prepack: bool = True
    ) -> None:
        """Loads the model. Without `prepack` weights stay as in the file: slower, half the memory."""
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads or available_cores()
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        # A plan, made in the first step of each shape, lays buffers side by side. Without they are used again
        # while the processor's caches hold them, and attention in integers takes half the memory.
        options.enable_mem_pattern = False
        if not prepack:
            options.add_session_config_entry("session.disable_prepacking", "1")
        path = artifact.file(MODEL)
        try:
            self.session = ort.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime raises several unrelated classes
            pass_on(error)
            raise ArtifactError(
                f"onnxruntime {ort.__version__} cannot load {path}: {first_line(error)}"
            ) from error
        self._vocabulary = artifact.manifest.model.vocabulary
        self._weight_bytes = artifact.weight_bytes()
        self._binding: _Binding | None = None
        self._inputs = {node.name for node in self.session.get_inputs()}
        self._outputs = {node.name: node.shape for node in self.session.get_outputs()}
        self.observed: dict[str, Array] = {}
        self.blocks = _two_numbers(self.session.get_modelmeta().custom_metadata_map.get(BLOCKS, ""))
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
        for name, array in (inputs | cache.buffers).items():
            if name in self._inputs:
                _bind_array(io.bind_input, name, array)
        for name, array in outputs.items():
            _bind_array(io.bind_output, name, array)
        for name in self._outputs:
            # Past and present are one buffer: the new tokens are written where they stay. A layer that reads
            # another's int8 cache gives it again, as NAME@LAYER.
            if name.startswith("present."):
                cached = name.removeprefix("present.").partition("@")[0]
                _bind_array(io.bind_output, name, cache.buffers[cached])
        return _Binding(cache, io, inputs, outputs)


def _bind_array(bind: Any, name: str, array: Any) -> None:
    bind(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)


def _two_numbers(text: str) -> tuple[int, int]:
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
