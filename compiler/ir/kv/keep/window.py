"""StreamingLLM's sinks and window, and RazorAttention's compensation token."""

from __future__ import annotations

from dataclasses import dataclass

from .....errors import IRError
from ...options import derived
from ..sizes import Size, least
from .policy import POLICIES, Policy, check_prefill


@POLICIES.register
@dataclass(frozen=True)
class Window(Policy):
    """Keeps `sinks` first tokens and the newest `recent` of every head (Xiao et al. 2023, section 3.2).

    Before: `cache 0.0 heads=0,1 .. policy=full`
    After:  `cache 0.0 heads=0,1 .. policy=window(sinks=4,recent=252,slack=64,..)`

    Options: `slack`, tokens that may gather before the window is moved; `prefill`, `exact` (the prompt is
    attended to whole, then cut) or `streaming` (cut after every chunk, memory constant in the context).

    With `compensation`, as RazorAttention has it (Tang et al. 2024, section 3.3), one more token stands for
    all that left: the mean of their keys and of their values, as they were rotated at their absolute
    positions, enters the softmax with the logarithm of their number added to its logit.

    Measured on SmolLM2-135M-Instruct, recall behind 1,000 and 4,000 tokens: 0.05 and 0.00 by the defaults,
    against 0.70 and 0.65 with every token. It is for endless text whose past no one asks for.

    Differs from the paper: positions stay absolute, where the paper numbers the kept tokens anew. So texts
    are bounded by the model's positions, and what is kept is what a full cache would hold of it. Layers with
    a sliding window of their own keep theirs.
    """

    sinks: int = 4
    recent: int = 252
    slack: int = 64
    compensation: bool = derived(False)
    prefill: str = "exact"

    name = "window"
    method = "streaming_llm"

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
    def waiting(self) -> int:
        return self.slack

    @property
    def compensated(self) -> bool:
        return self.compensation

    @property
    def sliding(self) -> bool:
        return not self.compensation

    @property
    def exact(self) -> bool:
        return self.prefill == "exact"

    def slots(self, capacity: Size) -> Size:
        return least(capacity + int(self.compensation), self.lead + self.recent + self.slack)

    def says(self) -> str:
        if self.compensation:
            return f"{self.sinks} sinks, {self.recent} recent tokens and a compensation token"
        return f"{self.sinks} sinks and {self.recent} recent tokens"
