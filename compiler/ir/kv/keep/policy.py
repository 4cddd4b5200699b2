"""What a policy is: which tokens a group of KV heads keeps.

A step of the graph writes new tokens behind those that a group holds, in *slots*, and attends over the
slots by their index. A policy that keeps less than everything says how many slots there are and what stays
when they are full; the runtime moves tokens out between steps (`runtime/maintenance`). So a window never
wraps in front of a chunk of several tokens, and no step pays for a move that only every `slack`-th needs.

A policy stands in a module of this folder. Its fields are the options of the method that recipes know it by
(`method`), and, but for those that are marked otherwise, its text in graphs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from .....errors import IRError
from ...options import Options
from ...registry import Registry
from ..attention_sums import Score
from ..sizes import Size

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

#: One row of a group's buffers by their names in the group, such as `key` [K, N, D]: NumPy's or torch's.
Row = Mapping[str, Any]

#: What happens while a prompt is read: `exact` attends over all of it and then compresses, as the papers
#: do; `streaming` compresses after every chunk, so that memory does not grow with the prompt.
PREFILLS = ("exact", "streaming")


@dataclass(frozen=True)
class Policy(Options):
    """What the layout and the runtime ask of a policy; with the answers of one that keeps everything."""

    name: ClassVar[str]
    """In the text of a layout."""
    method: ClassVar[str] = ""
    """The method of `[cache.prune]` that gives it to all heads alike; none where it is empty."""

    @property
    def whole(self) -> bool:
        """Whether every token stays."""
        return False

    @property
    def lead(self) -> int:
        """Slots that stay beside the newest: compensation token and sinks in front, or chosen tokens."""
        return 0

    @property
    def newest(self) -> int:
        """The newest tokens, which stay when others leave."""
        return 0

    @property
    def waiting(self) -> int:
        """Tokens that may gather beside those between moves."""
        return 0

    @property
    def compensated(self) -> bool:
        """Whether slot 0 stands for the mean of what left."""
        return False

    @property
    def sliding(self) -> bool:
        """Whether the slots hold sinks and the newest tokens, in order, and what leaves is gone."""
        return False

    @property
    def scores(self) -> Mapping[str, Score]:
        """Buffers [batch, heads, slots] in which what tokens got of queries is added up, and what it is."""
        return {}

    @property
    def told(self) -> bool:
        """Whether trained heads say a token's score when it is read (`passes/cache/retaining.py`): then a
        step shows what they said, in place of queries, and nothing is added to it."""
        return False

    @property
    def mixes(self) -> bool:
        """Whether tokens are averaged into others, which rounded numbers would not bear."""
        return False

    @property
    def exact(self) -> bool:
        """Whether everything is kept until the prompt has been read."""
        return False

    @property
    def once(self) -> bool:
        """Whether the tokens that stay are chosen once, when the prompt has been read."""
        return False

    @property
    def ahead(self) -> int:
        """How many positions ahead queries are thought of, where they are: then they are shown as they were
        before their rotary embedding, with what that does on the mean of so many positions."""
        return 0

    def buffers(
        self, batch: Size, heads: int, key_size: int, reading: bool
    ) -> Iterator[tuple[str, tuple[Size, ...]]]:
        """(name, shape) of the float32 buffers that choosing needs beside scores; `reading` a prompt."""
        return iter(())

    def slots(self, capacity: Size) -> Size:
        """Slots a row and head once the prompt has been read, in a context of `capacity` tokens."""
        return capacity

    def fitted(self, queries: int) -> Policy:
        """The policy of a layer where so many query heads share a KV head."""
        return self

    def says(self) -> str:
        """What a head keeps, for reports: `4 sinks and 252 recent tokens`."""
        return "every token"

    def watch(self, row: Row, q_SHD: Any) -> None:
        """Learns from the queries of a step, beside what scores add up."""

    def token_scores(self, row: Row, used: int) -> Floats | None:
        """What tokens are chosen by, [K, used]; None where their places decide, or no longer known."""
        return None

    def staying(self, row: Row, used: int, leaving: int) -> Ints | None:
        """The slots that stay for each head, [K, used - leaving], in order; None where their places decide.

        Called before tokens leave; tokens that are merged into others are merged here.
        """
        return None


#: Every policy by its name in the text of a layout.
POLICIES: Registry[type[Policy]] = Registry("cache policy", __package__)


def check_prefill(prefill: str) -> None:
    """Raises IRError for a way of prefilling that there is not."""
    if prefill not in PREFILLS:
        raise IRError(f"prefill is {' or '.join(PREFILLS)}, not {prefill!r}")


def check_budget(method: str, tokens: int, newest: int, named: str) -> None:
    """Raises IRError where a budget leaves nothing to choose beside the newest tokens."""
    if tokens <= newest:
        raise IRError(
            f"{method}: a budget of {tokens} tokens leaves none to choose beside the {newest} of {named}; "
            f"raise tokens or lower {named}"
        )


def best_slots(score_KT: Floats, count: int, used: int, newest: int) -> Ints:
    """The `count` slots of each head with the highest scores, in order, and then the newest."""
    best_KC = np.sort(np.argsort(-score_KT, axis=1, kind="stable")[:, :count], axis=1)
    newest_KN = np.broadcast_to(np.arange(used - newest, used), (len(best_KC), newest))
    return np.concatenate((best_KC, newest_KN), axis=1)
