"""The KV cache in memory, between the steps that fill it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ..compiler.ir.kv.layout import packed_of
from . import alike, maintenance, scores
from .buffers import Array, CacheBuffers, Counts


@dataclass
class Cache(CacheBuffers):
    """Buffers and counters that steps fill.

    Around every step: `make_room` before it, `advance` after it; `settle` once the prompt has been read.
    """

    def step_limit(self) -> int:
        """The most tokens that one step may bring, however full the cache is."""
        rooms = [
            self.slots_of(name)
            - group.lead
            - group.newest
            - (group.storage.granule - 1)  # what is left of a granule stays
            for name, group in self.groups.items()
            if self.slots_of(name) < self.capacity + group.policy.compensated
            and not (self.prompt is not None and group.exact)
        ]
        return min([self.capacity, *rooms])

    def most_packed(self) -> int:
        """Packed tokens of the row that has most."""
        return max((int(counts.max()) for counts in self.packed.values()), default=0)

    def make_room(self, size: int) -> None:
        """Sees to it that each row has slots for `size` more tokens."""
        maintenance.make_room(self, size)

    def advance(self, sizes: int | Counts, observed: Mapping[str, Array] | None = None) -> None:
        """Counts the tokens that a step wrote, `sizes` of each row.

        `observed` are the step's results beside logits and cache, which scored groups learn from.
        """
        scores.observe(self, np.broadcast_to(sizes, self.lengths.shape), observed or {})
        before = self.lengths.copy()
        self.lengths += sizes
        for used in self.clocks.values():
            used += sizes
        if self.layout.reordered:
            alike.regroup(self, before)

    def settle(self) -> None:
        """Ends the reading of prompts: groups that kept all of them are compressed, one by one."""
        if self.prompt is not None:
            maintenance.settle(self)
            self.prompt = None

    def assume(self, tokens: int) -> None:
        """Counts as if each row had read a prompt of so many tokens and settled, whatever the buffers hold.

        Right behind a prompt a group that lets tokens go holds the fewest that it ever will: as decoding
        goes on, up to `slack` more gather between moves. One that streams its prompt may hold some of them
        already, by the steps that it was read in; it is counted without.
        """
        self.lengths[:] = tokens
        for name, used in self.clocks.items():
            group, slots = self.groups[name], self.slots_of(name)
            used[:], left = maintenance.settled(group, tokens, slots)
            if group.packed:
                self.packed[packed_of(name)][:] = left
        self.prompt = None
