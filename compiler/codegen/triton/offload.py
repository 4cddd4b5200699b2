"""Runs a Triton artifact whose weights do not all lie on the device.

What a plan pins lies there, and so does what several super-ops read. The weights of the others lie in
page-locked memory of the host, in the order that kernels load, and are copied to the device ahead of the
calls that read them (device_ahead.py in runtime/memory). Rows of tables are looked up on the host, in the
file that is mapped. The calls and their order are those of a runner that holds everything.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from ....errors import ArtifactError, ArtifactWarning, OutOfMemoryError, UnsupportedError
from ....runtime.artifact import Artifact
from ....runtime.cache import Cache
from ....runtime.memory.cuda_copies import CudaCopies
from ....runtime.memory.device_ahead import Block, Copies, DeviceAhead
from ....runtime.memory.probe import ram_size
from ....runtime.runner import Floats, Ints
from ...memory.leveling import AHEAD
from ...memory.tiers import TierPlan
from .cut import CutProgram
from .runner import KernelRunner


def copies_of(device: torch.device) -> Copies:
    """What copies to the device. Raises UnsupportedError where that is none of its own."""
    if device.type != "cuda":
        raise UnsupportedError(
            "a memory budget is for the memory of a GPU, and Triton's interpreter runs without one; leave "
            "the budget out"
        )
    return CudaCopies(device)


def _check_room(name: str, nbytes: int) -> None:
    """Raises OutOfMemoryError before so many bytes of the machine's memory are locked that are not there."""
    machine = ram_size()
    if nbytes > machine:
        raise OutOfMemoryError(
            f"{name}: {nbytes:,} bytes of weights are to be kept in this machine's memory for the GPU, which "
            f"has {machine:,}: give a larger budget, or compile into fewer bits"
        )


class OffloadedRunner(KernelRunner):
    """The same where weights lie as a plan says."""

    def __init__(
        self,
        artifact: Artifact,
        cut: CutProgram,
        plan: TierPlan,
        instead: Mapping[fx.Node, Callable[..., Any]],
        copies: Copies,
        device: torch.device,
    ) -> None:
        """Loads all weights, those that are streamed first. Raises OutOfMemoryError where the device has no
        room for what is to lie there, or the machine none for what is streamed."""
        program, placed = cut.program, dict[str, Tensor]()
        name = str(artifact.folder)
        streamed = {piece.name for piece in plan.streamed}
        self._streamed = [op for op in cut.ops if op.name in streamed]
        moving = {weight for op in self._streamed for weight in op.weights}
        super().__init__(program, instead, device, program.weights.nbytes, name, placed, moving)
        self.plan = plan
        self._placed, self._copies, self._lookups = placed, copies, cut.lookups
        self._layout = artifact.manifest.layout()
        self._vocabulary = artifact.manifest.model.vocabulary
        self._closed = False
        blocks = [cut.block(op.weights) for op in self._streamed]
        _check_room(name, sum(block.nbytes for block in blocks))
        self._ahead = DeviceAhead(blocks, copies, AHEAD) if blocks else None
        kept = [op.weights for op in cut.ops if op.name not in streamed]
        for names in (*kept, cut.shared):
            self._keep(cut.block(names))
        for (
            weight
        ) in program.weights:  # what is not placed when it is read is none that may be loaded
            program.weights.release(weight)
        if self._ahead is not None and self._ahead.unlocked:
            self._tell_of_slow_copies(self._ahead.unlocked)

    @property
    def fetched(self) -> int:
        """Bytes that were copied to the device since the runner was made, or are about to be."""
        return self._ahead.copied if self._ahead is not None else 0

    @property
    def most_logits(self) -> int:
        """Rows of logits that a step may give; they are on the device and as they are copied from there."""
        return self.plan.most_logits(self._vocabulary)

    def check_room(self, rows: int, capacity: int, prompt: int | None = None) -> None:
        """Raises OutOfMemoryError where the plan has no room for a cache of so many rows and tokens, or for
        the logits of so many rows; ArtifactError where the runner was closed."""
        self._check_open()
        prompt = capacity if prompt is None else prompt
        self.plan.check_cache(int(self._layout.peak_bytes(rows, capacity, prompt)))
        self.plan.check_rows(rows, self._vocabulary)

    def step(self, cache: Cache, input_ids: Ints, position_ids: Ints, logit_rows: Ints) -> Floats:
        self.plan.check_cache(cache.nbytes)  # whoever made it
        return super().step(cache, input_ids, position_ids, logit_rows)

    def close(self) -> None:
        """Lets the weights go. No step is taken from then on."""
        self._closed = True
        self._placed.clear()
        self._arena.let_go()
        if self._ahead is not None:
            self._ahead.close()

    def __del__(self) -> None:
        with suppress(Exception):  # half made, or the interpreter ends
            self.close()

    def _run(self, arrays: Mapping[str, Any], others: dict[str, Tensor]) -> dict[str, Tensor]:
        self._check_open()
        inputs = {name: self._on_device(name, array) for name, array in arrays.items()}
        for lookup in self._lookups:
            rows = lookup.rows(torch.tensor(arrays[lookup.ids]))
            inputs[lookup.name] = self._on_device(lookup.name, rows)
        # In the arena each time: the budget has room for it, and none for a step that allocates beside it.
        if not self._streamed:
            return self._arena.run(inputs | others)
        run = self._arena.begin(inputs | others)
        for index, op in enumerate(self._streamed):
            assert self._ahead is not None
            run.until(op.first)
            with self._ahead.item(index) as weights:
                self._placed |= weights
                try:
                    run.until(op.end)
                finally:
                    for name in weights:
                        del self._placed[name]
        return run.results()

    def _keep(self, block: Block) -> None:
        """Weights that lie on the device for good."""
        try:
            memory = self._copies.on_device(block.nbytes)
        except OutOfMemoryError as error:
            raise OutOfMemoryError(
                f"the device has no room for the weights that the plan for {self.plan.budget:,} bytes keeps "
                "there: give a smaller memory budget, or end what else runs on the device"
            ) from error
        block.fill(memory)
        self._placed |= block.views(memory)

    def _check_open(self) -> None:
        if self._closed:
            raise ArtifactError(f"{self._name} was closed, and with it its weights: load it again")

    def _tell_of_slow_copies(self, reason: str) -> None:
        """Says that some memory is not page-locked: now, and in the plan."""
        told = f"the system does not page-lock all of the weights ({reason})"
        self.plan = replace(self.plan, remark=told)
        warnings.warn(
            ArtifactWarning(
                f"{self._name}: {told}, so that they are copied to the device more slowly than planned; free "
                "memory of this machine, or give the device's budget more"
            ),
            stacklevel=2,
        )
