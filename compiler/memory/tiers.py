"""Which weights stay in memory and which come from the disk in every step, under a budget.

    super-ops with bytes, a budget, a device
      -> place     which are pinned, which streamed, the bytes of both and of the buffers between (placing.py)
      -> step      seconds of a step: the disk reads ahead while super-ops are packed and computed

Where weights lie packed in a file that the engine reads where it is mapped, those that are streamed are pages
of it (`paged`): nothing is packed in a step, what is read ahead are the packed bytes, and of a super-op that
is streamed some pages may stay (`parts`).

Every weight is read once in a step, so that nothing learned from the past helps. Where all but C bytes of W
are fetched, no step is faster than (W - C) / bandwidth of the disk, where the cost model of "LLM in a flash"
(Alizadeh et al., 2023) starts. Its windowing needs sparse activations and is not here. Compute is a
roofline as LLM-Viewer's (Yuan et al., 2024): a step of one token reads every weight and the cache once.

Of experts a token reads those alone that it chose, and which others chose before tells something of what
comes: of these, units stay from token to token in what room there is. It competes with pinning, by the bytes
that a token is expected to read: `TierPlan.hits`.

On a GPU the same is decided of its memory: there streamed weights lie in the machine's, ready to be read, and
are copied in every step (`home`), so that what is said here of the disk is true of the link between the two.

Where the cache itself is larger than what is left of the budget, slots of some layers are read in every step
too (spill.py).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from ...errors import OutOfMemoryError
from ..ir.device import Device
from .leveling import AHEAD
from .pinning import PACKING, READY, Kind, Window, needed
from .spill import Slots, Spill

#: Exponents that a run may say; what lies outside is chance.
_EVEN = (0.05, 2.0)


@dataclass(frozen=True)
class Choice:
    """What one token reads of a super-op whose tokens choose experts."""

    nbytes: int
    """Bytes in the file, on average."""
    held: int
    """Bytes in memory at most."""


@dataclass(frozen=True)
class Piece:
    """The weights of a super-op: bytes of the file that a step reads, and bytes in memory once the engine has
    packed them."""

    name: str
    nbytes: int
    held: int
    choice: Choice | None = None
    """None where a token reads all."""
    original: int = 0
    """Bytes in the artifact, where a step reads a packed copy; 0 where it reads these."""

    @property
    def in_artifact(self) -> int:
        return self.original or self.nbytes

    @property
    def most(self) -> int:
        """Bytes in memory of what one token reads at most."""
        return self.held if self.choice is None else self.choice.held

    @property
    def computed(self) -> int:
        """Bytes of what one token computes with."""
        return self.held if self.choice is None else self.choice.nbytes


@dataclass(frozen=True)
class Skew:
    """How unevenly experts are chosen: where a part of them is held, it is chosen `part ** exponent` of the
    times. At random the exponent is 1, below it the same are chosen often."""

    exponent: float = 0.5
    measured: bool = False
    """By runs; else it is assumed, and more than the models gave that were measured (docs/memory.md)."""

    @classmethod
    def of(cls, part: float, hits: float) -> Skew:
        """What a run with a part of the experts held says that found so much of what tokens asked for."""
        if not (0 < part < 1 and 0 < hits < 1):
            return cls()
        exponent = math.log(hits) / math.log(part)
        return cls(min(max(exponent, _EVEN[0]), _EVEN[1]), measured=True)

    def hits(self, part: float) -> float:
        """The part of what tokens ask for that is held."""
        return min(part, 1.0) ** self.exponent if part > 0 else 0.0


@dataclass(frozen=True)
class Fixed:
    """Bytes that are held whatever lies where."""

    process: int
    cache: int
    """Of the cache what is in memory."""
    activations: int
    shared: int = 0
    """Weights of no super-op alone, where such stay."""

    @property
    def total(self) -> int:
        return self.process + self.cache + self.activations + self.shared


@dataclass(frozen=True)
class Load:
    """What an artifact takes of memory."""

    pieces: tuple[Piece, ...]
    """Super-ops in the order in which they run."""
    fixed: Fixed
    paged: tuple[Piece, ...] = ()
    """The same where weights are pages of a file that holds them packed; none where that cannot be."""
    unit: int = 1
    """Bytes of such a file that are brought and let go at once."""
    remark: str = ""
    """Why it cannot be."""
    skew: Skew = Skew()
    slots: tuple[Slots, ...] = ()
    """Layers whose slots of the cache may be spilled, in order."""
    unspilled: str = ""
    """Why none may be."""
    disk: int = field(default=1 << 62, compare=False)
    """Free bytes of the disk that the file of spilled slots would lie on, which others change meanwhile."""
    spill: Spill | None = None
    """Those that are; `fixed` is without them."""
    home: str = "disk"
    """Where streamed weights come from: the `disk`, or of a GPU the `host`'s memory."""


@dataclass(frozen=True)
class TierPlan:
    """What lies where."""

    pieces: tuple[Piece, ...]
    """Every super-op, in the order in which they run."""
    pinned: frozenset[str]
    """Those that stay whole."""
    fixed: Fixed
    budget: int
    paged: bool = False
    """Streamed weights are pages of a file that holds them packed; else they are packed in every step."""
    remark: str = ""
    """Why they are not."""
    room: int = 0
    """Bytes for experts that stay from token to token, beside what is read ahead."""
    parts: Mapping[str, int] = field(default_factory=dict)
    """Of super-ops whose other pages are streamed the bytes that stay, by name."""
    skew: Skew = Skew()
    beside: int | None = None
    """Of pages the bytes that are read ahead beside the super-op of which most comes, where that is less than
    as much again."""
    spill: Spill | None = None
    """Layers whose slots of the cache lie in a file between their turns; None where all are in memory."""
    home: str = "disk"
    """Where streamed weights come from, as of the load."""
    load: Load | None = None
    """What was placed, with nothing spilled yet; None of a plan that was laid out by hand."""

    @cached_property
    def streamed(self) -> tuple[Piece, ...]:
        """Those that are read in every step; without weights there is nothing to read."""
        return tuple(p for p in self.pieces if p.nbytes and p.name not in self.pinned)

    @cached_property
    def kept(self) -> tuple[Piece, ...]:
        return tuple(p for p in self.pieces if p.nbytes and p.name in self.pinned)

    @property
    def packs(self) -> bool:
        """Whether what is streamed is packed in every step."""
        return not self.paged and self.home == "disk"

    @property
    def window(self) -> Window:
        """What whole super-ops take beside their buffers."""
        return PACKING if self.packs else READY

    def tier_of(self, piece: Piece) -> str:
        """`pinned`, `streamed`, or `mapped` where it only looks rows up in the file."""
        return (
            "mapped" if not piece.nbytes else "pinned" if piece.name in self.pinned else "streamed"
        )

    @cached_property
    def routed(self) -> tuple[Piece, ...]:
        """Streamed ones whose tokens choose experts."""
        return tuple(piece for piece in self.streamed if piece.choice is not None)

    def stays(self, piece: Piece) -> int:
        """Bytes of a super-op that are held from step to step, beside experts in the room for them."""
        return piece.held if piece.name in self.pinned else self.parts.get(piece.name, 0)

    def comes(self, piece: Piece) -> int:
        """Bytes of memory that come and go with a super-op."""
        return piece.held - self.stays(piece)

    def most(self, piece: Piece) -> int:
        """Those of them that a step of one token takes at most."""
        return piece.most - self.stays(piece) if piece.choice is None else piece.most

    def reads(self, piece: Piece) -> int:
        """Bytes of a streamed super-op that a step of one token reads from the disk; of experts those that
        are not expected to be held."""
        if piece.choice is None:
            return self._of_many(piece)
        return round(piece.choice.nbytes * (1 - self.hits))

    def _of_many(self, piece: Piece) -> int:
        """Bytes that a step reads whose tokens choose every expert: of one of whose pages some stay as much
        less."""
        return round(piece.nbytes * self.comes(piece) / max(piece.held, 1))

    @property
    def fetched(self) -> int:
        """Bytes of weights that a step of one token reads from the disk."""
        return sum(self.reads(piece) for piece in self.streamed)

    @property
    def cache(self) -> int:
        """Bytes of the whole cache."""
        return self.fixed.cache + (self.spill.freed() if self.spill is not None else 0)

    @property
    def moved(self) -> int:
        """Bytes that a step of one token reads from the disk and writes there: weights, and slots of the
        cache where the context is full."""
        return self.fetched + (self.spill.moved if self.spill is not None else 0)

    @property
    def prompt(self) -> int:
        """Bytes of weights that a step of many tokens reads from the disk at most: they choose every
        expert."""
        return sum(self._of_many(piece) for piece in self.streamed)

    @cached_property
    def buffers(self) -> int:
        """Bytes of the buffers that are read into, or of the pages that are read ahead."""
        return self._ahead(self.comes(p) if self.paged else p.nbytes for p in self.streamed)

    @cached_property
    def ahead(self) -> int:
        """Bytes of the pages that are read ahead in a step of one token, beside what it chose of a layer's
        experts; they leave room for a prompt's."""
        most = max((self.most(piece) for piece in self.streamed), default=0)
        grows = max((self.comes(piece) - self.most(piece) for piece in self.streamed), default=0)
        experts = max((self.most(piece) for piece in self.routed), default=0)
        ahead = self._ahead(self.comes(piece) for piece in self.streamed if piece.choice is None)
        return max(min(ahead + experts, self.buffers - grows), most)

    def _ahead(self, sizes: Iterable[int]) -> int:
        """Bytes of what runs and what is read meanwhile."""
        every = list(sizes)
        whole = ahead_bytes(every)
        if self.beside is None:
            return whole
        return min(whole, max(every, default=0) + self.beside)

    @property
    def by_units(self) -> bool:
        """Whether a super-op begins to be read as soon as there is room for a unit of it: with experts, which
        are read when they are chosen, each is read where there is room for all."""
        return self.paged and not self.routed

    @property
    def experts(self) -> int:
        """Bytes of streamed experts in memory."""
        return sum(piece.held for piece in self.routed)

    @property
    def cached(self) -> int:
        """Bytes of experts that are held from token to token: their room, and what of the pages that are read
        ahead a step of one token does not need."""
        return min(self.room + self.buffers - self.ahead, self.experts) if self.routed else 0

    @cached_property
    def hits(self) -> float:
        """The part of the experts that a token asks for which is expected to be held."""
        return self.skew.hits(self.cached / self.experts) if self.routed else 0.0

    def most_logits(self, vocabulary: int) -> int:
        """Rows of logits that a step may give: they are there twice, and may take half of the activations'
        room."""
        return max(1, self.fixed.activations // (16 * vocabulary))

    def check_cache(self, nbytes: int) -> None:
        """Raises OutOfMemoryError where there is no room for a cache of so many bytes in memory."""
        if nbytes > self.fixed.cache:
            raise OutOfMemoryError(
                f"the cache takes {nbytes:,} bytes, and the plan for {self.budget:,} left "
                f"{self.fixed.cache:,} for it; load for a larger context, and with more memory if need be"
            )

    def check_rows(self, rows: int, vocabulary: int) -> None:
        """Raises OutOfMemoryError where there is no room for the logits of so many rows at once."""
        most = self.most_logits(vocabulary)
        if rows > most:
            raise OutOfMemoryError(
                f"the plan for {self.budget:,} bytes has room for the logits of {most} rows at once, not of "
                f"{rows}; continue fewer prompts together, or load with a larger chunk"
            )

    @property
    def peak(self) -> int:
        """Bytes of the process at its largest: while it runs, or while it is loaded. With pages nothing is
        resident then but the super-op whose session is made, as it lies in the file and packed."""
        if not self.paged:
            kept = Counter(Kind(piece.nbytes, piece.held) for piece in self.kept)
            every = kept + Counter(Kind(piece.nbytes, piece.held) for piece in self.streamed)
            return self.fixed.total + needed(every, kept, self.window)
        held = sum(self.stays(piece) for piece in self.pieces if piece.nbytes)
        loading = max((piece.in_artifact + piece.held for piece in self.pieces), default=0)
        return self.fixed.total + max(held + self.buffers + self.room, loading)


@dataclass(frozen=True)
class Step:
    """Seconds that a step of one token takes, by the device's numbers."""

    disk: float
    packing: float
    compute: float
    chosen: float = 0.0
    """Of the disk's seconds those for experts, which are read when they are chosen and not ahead."""

    @property
    def seconds(self) -> float:
        """One thread reads ahead while the others pack and compute, and wait for experts."""
        return self.chosen + max(self.disk - self.chosen, self.packing + self.compute)

    @property
    def bound(self) -> str:
        """`disk`, `packing` or `compute`: what would have to be faster."""
        if self.disk >= self.packing + self.compute:
            return "disk"
        return "packing" if self.packing > self.compute else "compute"


def ahead_bytes(sizes: Iterable[int]) -> int:
    """Bytes of as many of the largest as are read ahead."""
    every = list(sizes)
    return min(AHEAD, len(every)) * max(every, default=0)


def step_of(plan: TierPlan, device: Device) -> Step:
    """What a step of one token costs."""
    computed = sum(piece.computed for piece in plan.pieces)
    chosen = sum(plan.reads(piece) for piece in plan.routed)
    return Step(
        plan.moved / device.disk_bandwidth,
        plan.fetched / device.pack_bandwidth if plan.packs else 0.0,
        (computed + plan.cache) / device.ram_bandwidth,
        chosen / device.disk_bandwidth,
    )
