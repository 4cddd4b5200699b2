"""What lies where when an artifact runs in less memory than it takes, before anything is loaded."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from .compiler.codegen.target import TARGETS, InParts, Target
from .compiler.ir.device import ASSUMED, Device, read_device
from .compiler.ir.manifest import CAUSAL
from .compiler.memory.placing import place
from .compiler.memory.tiers import Step, TierPlan, step_of
from .compiler.memory.timeline import seconds_of, timeline_of
from .errors import ArtifactError, RecipeError, UnsupportedError
from .runtime.artifact import Artifact
from .runtime.engine import CHUNK
from .runtime.memory.filesystem import held_in_memory
from .runtime.memory.probe import ram_size

#: Tokens of prompt and answer together that room is left for, where the caller says nothing.
TOKENS = 4096

#: Slots that the engine may add, to end at a whole block.
_BLOCK = 256


@dataclass(frozen=True)
class Words:
    """How a plan speaks of where streamed weights come from."""

    name: str
    """What they come by, as `bound` has it for machines."""
    brings: str
    source: str
    ready: str
    """What those are that nothing is done with in a step."""


_WORDS = {
    "disk": Words("disk", "reading", "from the disk", "pages of a packed copy"),
    "host": Words(
        "link",
        "copying",
        "from the machine's memory to the GPU",
        "copied ahead of the calls that read them",
    ),
}


@dataclass(frozen=True)
class Plan:
    """The tiers of an artifact's weights and cache, and what a step over them takes on a device."""

    artifact: str
    tokens: int
    chunk: int
    device: Device
    tiers: TierPlan
    step: Step

    @property
    def words(self) -> Words:
        """How it is told where streamed weights come from."""
        return _WORDS[self.tiers.home]

    @property
    def seen(self) -> Device:
        """The device as the plan has it: of a GPU its memory in the place of the machine's."""
        return seen_as(self.device, self.tiers.home)

    @cached_property
    def seconds(self) -> float:
        """Of a token among many: those of the step, or more where with the room that there is to read ahead
        one side waits for the other."""
        return max(self.step.seconds, seconds_of(self.tiers, self.seen))

    def data(self) -> dict[str, Any]:
        """For machines; the keys stay as they are. Bytes, and seconds of a step of one token."""
        tiers, step = self.tiers, self.step
        return {
            "artifact": self.artifact,
            "budget": tiers.budget,
            "tokens": self.tokens,
            "chunk": self.chunk,
            "peak": tiers.peak,
            "process": tiers.fixed.process,
            "cache": tiers.fixed.cache,
            "activations": tiers.fixed.activations,
            "buffers": tiers.buffers,
            "pinned": sum(map(tiers.stays, tiers.pieces)),
            "fetched": tiers.fetched,
            "prompt_fetched": tiers.prompt,
            "experts": self._experts(),
            "spilled": self._spilled(),
            "home": tiers.home,
            "shared": tiers.fixed.shared,
            "paged": tiers.paged,
            "remark": tiers.remark,
            "seconds": self.seconds,
            "tokens_a_second": 1 / self.seconds,
            "bound": self.words.name if step.bound == "disk" else step.bound,
            "disk_seconds": step.disk,
            "packing_seconds": step.packing,
            "compute_seconds": step.compute,
            "super_ops": [
                {
                    "name": piece.name,
                    "bytes": piece.in_artifact,
                    "held": piece.held,
                    "stays": tiers.stays(piece),
                    "tier": tiers.tier_of(piece),
                }
                for piece in tiers.pieces
            ],
            "device": asdict(self.device),
        }

    def _experts(self) -> dict[str, Any] | None:
        """Of streamed experts what stays from token to token; None where there are none."""
        tiers = self.tiers
        if not tiers.routed:
            return None
        return {
            "bytes": tiers.experts,
            "held": tiers.cached,
            "hit_rate": tiers.hits,
            "measured": tiers.skew.measured,
        }

    def _spilled(self) -> dict[str, Any] | None:
        """Of the cache what lies in a file; None where all is in memory."""
        spill = self.tiers.spill
        if spill is None:
            return None
        return {
            "layers": list(spill.layers),
            "bytes": spill.nbytes,
            "held": spill.tails + spill.stages,
            "fetched": spill.nbytes,
            "written": spill.written,
        }

    def spilled(self) -> str:
        """What of the cache lies in a file, and what a token moves of it; "" where all is in memory."""
        from .compiler.report import human_bytes

        tiers, spill = self.tiers, self.tiers.spill
        if spill is None:
            return ""
        layers = f"{len(spill.layers)} layers" if len(spill.layers) > 1 else "1 layer"
        return (
            f"{layers} of the cache, {human_bytes(spill.nbytes)} of {human_bytes(tiers.cache)}: a token "
            f"reads as much at the end of {self.tokens:,} tokens, and writes {human_bytes(spill.written)}"
        )

    def held(self) -> str:
        """What of experts stays from token to token, and how much of what a token asks for that is expected
        to be; "" where none are streamed."""
        from .compiler.report import human_bytes

        tiers = self.tiers
        if not tiers.routed:
            return ""
        known = "by the last run here" if tiers.skew.measured else "assumed"
        return (
            f"{human_bytes(tiers.cached)} of {human_bytes(tiers.experts)} of experts, "
            f"{100 * tiers.hits:.0f} % of those that a token asks for ({known})"
        )

    def as_run(self, tiers: TierPlan) -> Plan:
        """The same by what a runner does, which may find that pages cannot be had as planned."""
        return replace(self, tiers=tiers, step=step_of(tiers, self.seen))

    def way(self) -> str:
        """How streamed weights come, and why not as pages; "" where there are none."""
        tiers = self.tiers
        if not tiers.streamed:
            return ""
        if tiers.paged:
            return self.words.ready
        how = "packed in every step" if tiers.packs else self.words.ready
        return how + (f": {tiers.remark}" if tiers.remark else "")

    def warning(self) -> str:
        """What is wrong with a peak that the device has no memory for, or with weights that are streamed from
        memory; "" where nothing is."""
        from .compiler.report import human_bytes

        if self.tiers.home == "host":
            return self._warning_of_gpu()
        if self.tiers.peak > self.device.ram:
            return (
                f"the device has {human_bytes(self.device.ram)} of memory, less than the peak of "
                f"{human_bytes(self.tiers.peak)}: it would swap or end the process; give a smaller budget"
            )
        memory = held_in_memory(Path(self.artifact)) if self.tiers.streamed else ""
        if memory:
            return (
                f"{self.artifact} is on {memory}, which is held in memory: its weights take theirs there "
                "beside the budget; bring the artifact to a disk"
            )
        return ""

    def _warning_of_gpu(self) -> str:
        from .compiler.report import human_bytes

        gpu, machine = self.device.gpu_memory, self.device.ram
        if self.tiers.peak > gpu and self.device.gpu_source != ASSUMED.gpu_source:
            return (
                f"the GPU has {human_bytes(gpu)} of memory, less than the peak of "
                f"{human_bytes(self.tiers.peak)}: give a smaller budget"
            )
        if self.tiers.prompt > machine:
            return (
                f"the machine has {human_bytes(machine)} of memory, less than the "
                f"{human_bytes(self.tiers.prompt)} of weights that are kept in it for the GPU: give a larger "
                "budget, or compile into fewer bits"
            )
        return ""

    def bound(self) -> str:
        """What a token takes most of its time for, and what the other side takes meanwhile."""
        from .compiler.report import human_bytes

        step, spill, by = self.step, self.tiers.spill, self.words
        if not self.tiers.streamed and spill is None:
            return f"computing: it takes {step.compute:.3f} s, and the {by.name} is not asked"
        read = self.tiers.fetched + (spill.nbytes if spill is not None else 0)
        packs = f"packing {step.packing:.3f} s, " if step.packing else ""
        times = {
            "disk": f"{by.brings} {human_bytes(read)} takes {step.disk:.3f} s, {packs}computing "
            f"{step.compute:.3f} s",
            "packing": f"it takes {step.packing:.3f} s, computing {step.compute:.3f} s, the {by.name} "
            f"{step.disk:.3f} s",
            "compute": f"it takes {step.compute:.3f} s, {packs}the {by.name} {step.disk:.3f} s",
        }
        names = {"disk": f"the {by.name}", "packing": "packing", "compute": "computing"}
        told = f"{names[step.bound]}: {times[step.bound]}"
        if self.seconds > 1.01 * step.seconds:
            told += (
                f"; with the room that there is to read ahead one waits for the other, {self.seconds:.3f} s "
                "in all"
            )
        return told

    def page(self) -> str:
        """The plan as a page of HTML, with what is read, packed and computed when in a step of one token."""
        from .compiler.report import human_bytes, plan_page

        device = self.seen
        rates = (device.disk_bandwidth, device.pack_bandwidth, device.ram_bandwidth)
        disk, packing, memory = (f"{rate / 1e9:.2f} GB/s" for rate in rates)
        packs = f"packing {packing}, " if self.tiers.home == "disk" else ""
        facts = {
            "weights": self.sentence(),
            "room": f"a KV cache of {self.tokens:,} tokens, steps of {self.chunk:,}",
            "a token": f"{self.seconds:.3f} s ({1 / self.seconds:.2f} a second)",
            "bound by": self.bound(),
            "device": f"{self.words.name} {disk}, {packs}memory {memory} ({device.source})",
        }
        title = f"{Path(self.artifact).name} within {human_bytes(self.tiers.budget)}"
        return plan_page(title, facts, timeline_of(self.tiers, device), self.words.name)

    def sentence(self) -> str:
        """What is pinned, what is streamed, and the bytes of a token."""
        from .compiler.report import human_bytes

        tiers = self.tiers
        peak = f"peak {human_bytes(tiers.peak)} of {human_bytes(tiers.budget)}"
        if tiers.spill is not None:
            peak = f"spilled {self.spilled()}, {peak}"
        if not tiers.streamed:
            return f"all weights are pinned, {peak}"
        pinned = human_bytes(sum(piece.nbytes for piece in tiers.pieces) - tiers.prompt)
        kept = [f"{len(tiers.kept)} super-ops"] if tiers.kept or not tiers.parts else []
        kept += [f"parts of {len(tiers.parts)}"] if tiers.parts else []
        step = "for every token" if tiers.routed else "in every step"
        held = f"held between tokens {self.held()}, " if tiers.routed else ""
        return (
            f"pinned {' and '.join(kept)} ({pinned}), streamed {len(tiers.streamed)}: "
            f"{human_bytes(tiers.fetched)} {self.words.source} {step}, {held}{self.way()}, {peak}"
        )


def plan(
    folder: str | Path,
    *,
    memory: int,
    context: int | None = None,
    chunk: int = CHUNK,
    device: str | Path | None = None,
) -> Plan:
    """What of an artifact's weights stays in `memory` bytes, what is read from the disk in every step, and
    how fast that is. Of an artifact of the target triton `memory` is a GPU's, and what does not stay there is
    copied from the machine's.

    `memory` is all that the process holds there, with room for a cache of `context` tokens (4,096, or the
    artifact's context where that is less) and steps of `chunk` tokens. Where that cache does not fit beside
    the rest, or steps are shorter by a twentieth so, slots of some layers are spilled: they lie in a file,
    and are read in every step too. `device` is a description that `einfold device probe` wrote; without it
    that of this machine is used, or where it was not measured what is assumed. No hash is checked, no weight
    read, and no GPU needed. Raises RecipeError for a budget that cannot do, UnsupportedError for a target
    that holds all weights.
    """
    artifact = Artifact.open(folder, verify=False)
    target = artifact.manifest.target
    if target not in TARGETS:
        raise ArtifactError(f"{artifact.folder} was compiled for the unknown target {target!r}")
    return plan_of(artifact, in_parts(artifact, TARGETS[target]()), memory, context, chunk, device)


def in_parts(artifact: Artifact, target: Target) -> InParts:
    """An artifact, taken apart by its target. Raises UnsupportedError where all weights must be resident."""
    if artifact.manifest.kind != CAUSAL:
        kind = artifact.manifest.kind.replace("_", "-")
        raise UnsupportedError(
            f"{artifact.folder} is an {kind}: a memory budget is for models that continue a text"
        )
    return target.in_parts(artifact)


def plan_of(
    artifact: Artifact,
    parts: InParts,
    memory: int,
    context: int | None = None,
    chunk: int = CHUNK,
    device: str | Path | None = None,
) -> Plan:
    """`plan` of an artifact that is open and taken apart."""
    if memory < 1 or chunk < 1 or (context is not None and context < 2):
        raise RecipeError(
            "a memory budget is above 0 bytes, a chunk above 0 tokens, a context above 1"
        )
    limit = artifact.manifest.model.context
    tokens = min(context or TOKENS, limit)
    capacity = min(-(-tokens // _BLOCK) * _BLOCK, limit)
    load = parts.load(chunk, _cache_bytes(artifact, capacity), capacity)
    known = read_device(None if device is None else Path(device)) or replace(
        ASSUMED, ram=ram_size()
    )
    seen = seen_as(known, load.home)
    found = place(parts.spilling(load, capacity), memory, seen)
    return Plan(str(artifact.folder), tokens, chunk, known, found, step_of(found, seen))


def seen_as(device: Device, home: str) -> Device:
    """The numbers that a plan is made with whose streamed weights come from there."""
    return device.gpu() if home == "host" else device


def _cache_bytes(artifact: Artifact, tokens: int) -> int:
    """Bytes of the cache of one row at its largest: while a prompt is read, or behind it."""
    return int(artifact.manifest.layout().peak_bytes(1, tokens, tokens))
