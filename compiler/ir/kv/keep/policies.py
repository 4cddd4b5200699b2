"""Policies: which tokens a group of KV heads keeps.

A step of the graph writes new tokens behind those that a group holds, in *slots*, and attends over the
slots by their index. A policy that keeps less than everything says how many slots there are and what stays
when they are full; the runtime moves tokens out between steps (`runtime/maintenance`). So a window never
wraps in front of a chunk of several tokens, and no step pays for a move that only every `slack`-th needs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from .....errors import IRError
from ..sizes import Size, least

#: What happens while a prompt is read: `exact` attends over all of it and then compresses, as the papers
#: do; `streaming` compresses after every chunk, so that memory does not grow with the prompt.
PREFILLS = ("exact", "streaming")


@dataclass(frozen=True)
class Policy:
    """What the layout asks of a policy; here with the answers of one that keeps everything."""

    name: ClassVar[str]

    @property
    def lead(self) -> int:
        """Slots that stay beside the newest: compensation token and sinks in front, or chosen tokens."""
        return 0

    @property
    def newest(self) -> int:
        """The newest tokens, which stay when others leave."""
        return 0

    @property
    def compensated(self) -> bool:
        """Whether slot 0 stands for the mean of what left."""
        return False

    @property
    def scored(self) -> bool:
        """Whether the attention that each token got is added up and goes along with it."""
        return False

    @property
    def exact(self) -> bool:
        """Whether everything is kept until the prompt has been read."""
        return False

    @property
    def once(self) -> bool:
        """Whether the tokens that stay are chosen once, when the prompt has been read."""
        return False

    def books(
        self, batch: Size, heads: int, key_size: int, slots: Size, reading: bool
    ) -> Iterator[tuple[str, tuple[Size, ...]]]:
        """(name, shape) of the float32 buffers that choosing needs beside the score; `reading` a prompt."""
        return iter(())

    def slots(self, capacity: Size) -> Size:
        """Slots a row and head once the prompt has been read, in a context of `capacity` tokens."""
        return capacity


@dataclass(frozen=True)
class Full(Policy):
    """Every token of the context is kept."""

    name = "full"


@dataclass(frozen=True)
class Window(Policy):
    """The first `sinks` tokens, the newest `recent` (up to `slack` more between moves), and, with
    `compensation`, one token that stands for all that left.

    StreamingLLM (Xiao et al. 2023, section 3.2) without compensation; RazorAttention (Tang et al. 2024,
    section 3.3) with it: the mean of the keys and of the values that left, as they were rotated at their
    absolute positions, enters the softmax with the logarithm of their number added to its logit.
    """

    sinks: int
    recent: int
    slack: int = 64
    compensation: bool = False
    prefill: str = "exact"

    name = "window"

    def __post_init__(self) -> None:
        if self.sinks < 0 or self.recent < 1 or self.slack < 1:
            raise IRError(
                f"a window keeps 0 or more sinks, 1 or more recent tokens and 1 or more of slack, "
                f"not {self.sinks}, {self.recent} and {self.slack}"
            )
        check_prefill(self.prefill)

    @property
    def lead(self) -> int:
        return self.sinks + int(self.compensation)

    @property
    def newest(self) -> int:
        return self.recent

    @property
    def compensated(self) -> bool:
        return self.compensation

    @property
    def exact(self) -> bool:
        return self.prefill == "exact"

    def slots(self, capacity: Size) -> Size:
        return least(capacity + int(self.compensation), self.lead + self.recent + self.slack)


@dataclass(frozen=True)
class HeavyHitters(Policy):
    """The newest `recent` tokens and, of the older ones, the `heavy` that got the most attention so far.

    H2O (Zhang et al. 2023, section 4). Every head chooses for itself, each time that `slack` more tokens
    have gathered; a token that was let go does not come back.
    """

    heavy: int
    recent: int
    slack: int = 64
    prefill: str = "exact"

    name = "heavy_hitters"

    def __post_init__(self) -> None:
        if self.heavy < 1 or self.recent < 1 or self.slack < 1:
            raise IRError(
                f"{self.name} keeps 1 or more of heavy and recent tokens and of slack, "
                f"not {self.heavy}, {self.recent} and {self.slack}"
            )
        check_prefill(self.prefill)

    @property
    def lead(self) -> int:
        return self.heavy

    @property
    def newest(self) -> int:
        return self.recent

    @property
    def scored(self) -> bool:
        return True

    @property
    def exact(self) -> bool:
        return self.prefill == "exact"

    def slots(self, capacity: Size) -> Size:
        return least(capacity, self.heavy + self.recent + self.slack)


@dataclass(frozen=True)
class Merged(HeavyHitters):
    """Heavy hitters that take in what leaves: a token is averaged into the kept one whose key it resembles
    most, or dropped where no cosine reaches `similarity`.

    EMS (Li et al. 2024). Tokens are weighed by all attention that they got and by that of about the last
    `local` queries, in equal parts.
    """

    local: int = 32
    similarity: float = 0.6

    name = "merged"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.local < 1 or not -1 <= self.similarity <= 1:
            raise IRError(
                f"{self.name} looks at 1 or more local queries and asks for a cosine between -1 and 1, "
                f"not {self.local} and {self.similarity}"
            )

    def books(
        self, batch: Size, heads: int, key_size: int, slots: Size, reading: bool
    ) -> Iterator[tuple[str, tuple[Size, ...]]]:
        yield "local", (batch, heads, slots)


@dataclass(frozen=True)
class Voted(Policy):
    """Of a prompt the last `observe` tokens, and of the others the `chosen` that these attend to most, after
    a max-pool over `kernel` neighbours.

    SnapKV (Li et al. 2024, section 4). Generated tokens gather behind them; when `slack` more are there, the
    oldest of them leave, and `observe` stay. `queries` heads share a KV head; their votes are added.
    """

    chosen: int
    observe: int
    kernel: int = 7
    slack: int = 64
    queries: int = 1

    name = "voted"

    def __post_init__(self) -> None:
        if self.chosen < 1 or self.observe < 1 or self.slack < 1:
            raise IRError(
                "voting takes 1 or more chosen tokens, voters and tokens of slack, "
                f"not {self.chosen}, {self.observe} and {self.slack}"
            )
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise IRError(f"votes are pooled over an odd number of tokens, not {self.kernel}")

    @property
    def lead(self) -> int:
        return self.chosen

    @property
    def newest(self) -> int:
        return self.observe

    @property
    def exact(self) -> bool:
        return True

    @property
    def once(self) -> bool:
        return True

    def slots(self, capacity: Size) -> Size:
        return least(capacity, self.chosen + self.observe + self.slack)

    def books(
        self, batch: Size, heads: int, key_size: int, slots: Size, reading: bool
    ) -> Iterator[tuple[str, tuple[Size, ...]]]:
        if reading:
            yield "voters", (batch, heads * self.queries, self.observe, key_size)


def check_prefill(prefill: str) -> None:
    """Raises IRError for a way of prefilling that there is not."""
    if prefill not in PREFILLS:
        raise IRError(f"prefill is {' or '.join(PREFILLS)}, not {prefill!r}")


#: Every policy by its name in the textual form.
POLICIES: dict[str, type[Policy]] = {
    kind.name: kind for kind in (Full, Window, HeavyHitters, Merged, Voted)
}
