"""What a reader is: which of the tokens that a group keeps a query attends over.

A policy and a storage say what is held; a reader loses nothing of it, and the next query may read something
else. It chooses by the queries of a step and by the keys in the slots, for each KV head and each new token.

A reader stands in a module of this folder. Its fields are the options of the method that recipes know it by
(`method`), and, but for those that are marked otherwise, its text in graphs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ...options import Options
from ...record_text import read, show
from ...registry import Registry


@dataclass(frozen=True)
class Reader(Options):
    """What the layout and the operators ask of a reader; with the answers of one that reads everything."""

    name: ClassVar[str]
    """In the text of a layout."""
    method: ClassVar[str] = ""
    """The method of `[cache.read]` that gives it to every group; none where it is empty."""

    @property
    def text(self) -> str:
        """The textual form, `name(field=value,..)`; "" where everything is read, as operators take it."""
        return show(self)

    @property
    def whole(self) -> bool:
        """Whether every token that is visible is read."""
        return False

    def says(self) -> str:
        """What a query reads, for reports: `4 pages of 16 tokens`."""
        return "every token"

    @property
    def choosing(self) -> Any:
        """What chooses, in torch; imported by this, for the layout is read without torch.

        `choosing.chosen(reader, q_BKGSD, keys_BKCD, visible_BSC)` gives which slots each new token reads,
        bool [B, K, S, C], among the visible ones. Queries are rotated as the keys are; G of them share a KV
        head and what they read. A query must read its own token.
        """
        raise NotImplementedError


#: Every reader by its name in the text of a layout.
READERS: Registry[type[Reader]] = Registry("cache reader", __package__)


def parse_reader(text: str) -> Reader:
    """Reads a reader's `text`. Raises IRError for an unknown one."""
    return read(text or "everything", READERS, "cache reader")
