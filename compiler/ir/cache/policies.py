"""Policies: which tokens a group of KV heads keeps.

A step of the graph writes new tokens behind those that a group holds, in *slots*, and attends over the
slots by their index. A policy that keeps less than everything says how many slots there are and what stays
when they are full; the runtime moves tokens out between steps (`runtime/maintenance`). So a window never
wraps in front of a chunk of several tokens, and no step pays for a move that only every `slack`-th needs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ....errors import IRError
from .sizes import Size, least

#: What happens while a prompt is read: `exact` attends over all of it and then compresses, as the papers
#: do; `streaming` compresses after every chunk, so that memory does not grow with the prompt.
PREFILLS = ("exact", "streaming")


@dataclass(frozen=True)
class Policy:
    """What the layout asks of a policy; here with the answers of one that keeps everything."""

    name: ClassVar[str]

    @property
    def lead(self) -> int:
        """Slots in front that never leave: the compensation token and the sinks."""
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
        """Whether tokens are kept by how much attention they got."""
        return False

    @property
    def exact(self) -> bool:
        """Whether everything is kept until the prompt has been read."""
        return False

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


def check_prefill(prefill: str) -> None:
    """Raises IRError for a way of prefilling that there is not."""
    if prefill not in PREFILLS:
        raise IRError(f"prefill is {' or '.join(PREFILLS)}, not {prefill!r}")


#: Every policy by its name in the textual form.
POLICIES: dict[str, type[Policy]] = {kind.name: kind for kind in (Full, Window)}
