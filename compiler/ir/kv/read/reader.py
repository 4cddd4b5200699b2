"""What a reader is: which of the tokens that a group keeps a query attends over.

A policy and a storage say what is held; a reader loses nothing of it, and the next query may read something
else. It chooses by the queries of a step and by the keys in the slots, for each KV head and each new token.

A reader stands in a module of this folder, or in `reader.py` of a folder of its own, which may hold what
chooses in torch. Its fields are the options of the method that recipes know it by
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

    @property
    def bounded(self) -> int:
        """Slots of a page, of whose keys a statistic is kept beside the slots; 0 where nothing is. Operators
        find it in `bounds` [B, K, P, E], for Quest's, which were the first, are bounds."""
        return 0

    def bound_numbers(self, key_size: int) -> int:
        """Numbers of a page's statistic, E, of keys of so many, in the type of the slots."""
        return 0

    def numbers_of(self, keys_KPND: Any) -> Any:
        """The statistic of whole pages of keys in NumPy, [K, P, E] in their type, as `choosing` finds it in
        torch: the runtime has tokens change their slots between steps (`runtime/page_statistics.py`)."""
        raise NotImplementedError

    @property
    def reorders(self) -> bool:
        """Whether tokens change their slots among themselves, once, so that pages hold like keys."""
        return False

    def chunks(self, used: int) -> range:
        """Where the chunks of slots begin, each as long as the range's step, that the runtime puts in another
        order (`runtime/alike.py`) of a row that uses so many slots; none where tokens stay as they came."""
        return range(0)

    def leaves(self, place: int) -> str:
        """Why the method leaves an attention layer alone, by its place among them; "" where it does not."""
        return ""

    def reads(self, tokens: int) -> int:
        """Slots that a query reads at most which sees so many tokens."""
        return tokens

    def says(self) -> str:
        """What a query reads, for reports: `4 pages of 16 tokens`."""
        return "every token"

    @property
    def choosing(self) -> Any:
        """What chooses, in torch; imported by this, for the layout is read without torch.

        `choosing.chosen(reader, q_BKGSD, keys_BKCD, visible_BSC)` gives which slots each new token
        reads, bool [B, K, S, C], among the visible ones. Queries are rotated as the keys are, and times the
        softmax's scale; G of them share a KV head and what they read. A query must read its own token.

        Where statistics are kept, `choosing.chosen_by(reader, q_BKGSD, bounds_BKPE, visible_BSC)` gives the
        same by them, `choosing.refresh(reader, bounds_BKPE, keys_BKCD, used_B, new)` brings them up to date,
        in place, when row b has got `new` tokens from slot used[b] on. Both are given what is stored: where
        that is codes, queries are times the keys' scales. `pages/` has all of that for readers that score
        pages.
        """
        raise NotImplementedError


#: Every reader by its name in the text of a layout.
READERS: Registry[type[Reader]] = Registry("cache reader", __package__, module="reader")


def parse_reader(text: str) -> Reader:
    """Reads a reader's `text`. Raises IRError for an unknown one."""
    return read(text or "everything", READERS, "cache reader")
