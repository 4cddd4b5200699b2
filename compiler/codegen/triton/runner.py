"""A Triton artifact, loaded: kernels are made anew from its graph, and what it brings is compared."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from ....errors import ArtifactError, ArtifactWarning
from ....runtime.artifact import Artifact
from ....runtime.cache import Cache
from ....runtime.program import read_program
from ....runtime.runner import Floats, Ints, running
from ...ir.interpreter import Interpreter
from ...ir.kv.layout import Buffer
from ...ir.ops.record import in_place
from ...ir.program import Program
from ...ir.types import DTYPES
from ...memory.arena import InArena, shapes_of
from .attention import (
    AttentionKernel,
    ChoosingKernel,
    attention_kernels,
    bind,
    choosing_kernels,
    differences,
    kernel_files,
)
from .cuda_graphs import CudaGraphs
from .device import described, find_device
from .linear.bound import bind as bind_products
from .linear.bound import linear_kernels, reorder
from .linear.files import kernel_files as linear_files
from .linear.kernels import LinearKernel
from .shipped import FOLDER

#: Shapes of steps that are remembered.
_MET = 64


def triton_runner(artifact: Artifact, trust: bool = False) -> KernelRunner:
    """What runs the artifact on this machine's GPU, or in Triton's interpreter where that is asked for.

    Sources and plans that differ from what this einfold generates are told of by an ArtifactWarning and
    not used. Compiled kernels are used with `trust` alone. Raises UnsupportedError without a device.
    """
    device = find_device()
    program = read_program(artifact, str(device))
    stored = program.weights.nbytes
    reorder(program)
    # The order that kernels load fills the ends of rows.
    weight_bytes = artifact.weight_bytes() + program.weights.nbytes - stored
    instead = kernels_for(artifact, program, device, trust)
    return KernelRunner(program, instead, device, weight_bytes, str(artifact.folder))


def kernels_for(
    artifact: Artifact, program: Program, device: torch.device, trust: bool
) -> dict[fx.Node, Callable[..., Any]]:
    """The function for each call of an artifact's program that a kernel stands for; see `triton_runner`."""
    kernels, choosing, products = _kernels(program, device)
    expected = {**kernel_files(kernels, choosing), **linear_files(products)}
    for difference in differences(expected, _texts(artifact)):
        _warn(artifact, f"{difference}; it is not used")
    if trust:
        kernels, choosing, products = _with_compiled(artifact, kernels, choosing, products, device)
    return _bound(program, kernels, choosing, products)


def arena_bytes(program: Program, inputs: Mapping[str, Tensor], device: torch.device) -> int:
    """Bytes of the arena of a step by kernels with inputs of these shapes. Raises UnsupportedError where
    Triton is not installed."""
    instead = _bound(program, *_kernels(program, device))
    return InArena(program, device, instead).bytes_for(inputs)


#: Kernels of attention, of what chooses its pages, and of products.
_Kernels = tuple[list[AttentionKernel], list[ChoosingKernel], list[LinearKernel]]


def _kernels(program: Program, device: torch.device) -> _Kernels:
    attention = attention_kernels(program, described(device))
    return attention, choosing_kernels(program), linear_kernels(program)


def _bound(
    program: Program,
    kernels: list[AttentionKernel],
    choosing: list[ChoosingKernel],
    products: list[LinearKernel],
) -> dict[fx.Node, Callable[..., Any]]:
    return {**bind(program, kernels, choosing), **bind_products(program, products)}


def _with_compiled(
    artifact: Artifact,
    kernels: list[AttentionKernel],
    choosing: list[ChoosingKernel],
    products: list[LinearKernel],
    device: torch.device,
) -> _Kernels:
    if device.type != "cuda":
        _warn(artifact, "compiled kernels need a GPU, so none is used")
        return kernels, choosing, products
    from .attention.choosing_cubins import CHOICES
    from .attention.trusted import with_compiled
    from .linear.cubins import PRODUCTS

    architecture = f"sm_{described(device).capability}"
    files = {name: artifact.file(name) for name in artifact.manifest.files}
    kernels, missing = with_compiled(kernels, architecture, files)
    choosing, others = CHOICES.given(choosing, architecture, files)
    missing += others
    products, others = PRODUCTS.given(products, architecture, files)
    missing += others
    if missing:
        _warn(
            artifact,
            f"{len(missing)} compiled kernels for {architecture} and this Triton are missing, "
            f"such as {missing[0]}; these are compiled when they are first needed",
        )
    return kernels, choosing, products


def _warn(artifact: Artifact, text: str) -> None:
    warnings.warn(ArtifactWarning(f"{artifact.folder}: {text}"), stacklevel=3)


def _texts(artifact: Artifact) -> dict[str, str]:
    """The sources and plans of an artifact by name."""
    found = {}
    for name in artifact.manifest.files:
        if name.startswith(f"{FOLDER}/") and name.endswith((".py", ".plan")):
            try:
                found[name] = artifact.read(name).decode("utf-8")
            except UnicodeDecodeError as error:
                raise ArtifactError(f"{artifact.folder}/{name} is no text: {error}") from error
    return found


class KernelRunner:
    """Runs an artifact's graph in torch on one device; the cache stays on the device.

    `instead` has the function for each call that a kernel stands for: attention, which writes the cache's
    buffers in place, and products with stored weights.

    All other operators run by their reference meaning. Weights go to the device when they are first
    read, and stay. Steps of shapes that were met before run in an arena on the device: single tokens do, and
    chunks of a prompt. A prompt's last chunk is mostly of a length that is never met again, and a plan takes
    as long as some steps. On a GPU steps in the arena that come again are captured, and launched by one call.
    """

    def __init__(
        self,
        program: Program,
        instead: Mapping[fx.Node, Callable[..., Any]],
        device: torch.device,
        weight_bytes: int,
        name: str = "in memory",
        placed: dict[str, Tensor] | None = None,
        moving: Collection[str] = (),
    ) -> None:
        """Weights that are `placed` are read there, those that are `moving` elsewhere from run to run."""
        self._name = name
        self.device = device
        weights = {} if placed is None else placed
        meanings = {**in_place(), **instead}
        self.interpreter = Interpreter(program, instead=meanings, device=device, kept=weights)
        capture = CudaGraphs(device) if device.type == "cuda" else None
        self._arena = InArena(program, device, instead, weights, moving, capture)
        self._met: dict[Any, None] = {}
        self.observed: Mapping[str, Any] = {}
        self._weight_bytes = weight_bytes
        self._given: tuple[Mapping[str, Any], dict[str, Tensor]] = {}, {}
        self._held: dict[str, Tensor] = {}

    @property
    def weight_bytes(self) -> int:
        return self._weight_bytes

    def make(self, spec: Buffer) -> Tensor:
        """The zeroed tensor that a buffer of the cache asks for, on the device."""
        return torch.zeros(spec.shape, dtype=DTYPES[spec.dtype], device=self.device)

    def step(self, cache: Cache, input_ids: Ints, position_ids: Ints, logit_rows: Ints) -> Floats:
        arrays = {
            "input_ids": input_ids,
            "position_ids": position_ids,
            "logit_rows": logit_rows,
            **cache.counters,
        }
        with running(self._name):
            outputs = self._run(arrays, self._beside(cache.given) | cache.buffers)
            # out of the arena, on the CPU too: a caller may keep them
            logits: Floats = outputs.pop("logits").to("cpu", copy=True).numpy()
        self.observed = {name: v for name, v in outputs.items() if name not in cache.buffers}
        return logits

    def _run(self, arrays: Mapping[str, Any], others: dict[str, Tensor]) -> dict[str, Tensor]:
        """The program's outputs, of the inputs that a step brings and of `others` on the device."""
        inputs = {name: self._on_device(name, array) for name, array in arrays.items()} | others
        runs = self._arena if self._worth_a_plan(inputs) else self.interpreter
        return runs.run(inputs)

    def _worth_a_plan(self, inputs: dict[str, Tensor]) -> bool:
        """Whether a step runs in the arena: inputs of these shapes were met before."""
        key = shapes_of(inputs)
        met = key in self._met
        self._met.pop(key, None)
        self._met[key] = None  # last: the shapes that were met longest ago go first
        if len(self._met) > _MET:
            del self._met[next(iter(self._met))]
        return met

    def _on_device(self, name: str, array: Any) -> Tensor:
        """What a step brings, in memory that stays: as much as the largest of its name takes."""
        source = array
        if not isinstance(array, Tensor):
            source = torch.from_numpy(np.require(array, None, ("C", "W")))
        held = self._held.get(name)
        if held is None or held.dtype != source.dtype or held.numel() < source.numel():
            self._held[name] = held = source.new_empty(source.numel(), device=self.device)
        return held[: source.numel()].view(source.shape).copy_(source)

    def _beside(self, given: Mapping[str, Any]) -> dict[str, Tensor]:
        """What every step of a run reads and none writes, on the device: it goes there once."""
        if self._given[0] is not given:
            on_device = {name: torch.tensor(a, device=self.device) for name, a in given.items()}
            self._given = given, on_device
        return self._given[1]
