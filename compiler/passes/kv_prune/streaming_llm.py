"""StreamingLLM: the first tokens and a recent window, for every head."""

from __future__ import annotations

from dataclasses import dataclass

from ...ir.kv.keep.policies import Window
from ...ir.program import Program
from ..base import Pass, PassResult, check_options
from .layers import prunable, with_policy


@dataclass(frozen=True)
class StreamingLLM(Pass):
    """Keeps `sinks` first tokens and the newest `recent` of every head (Xiao et al. 2023, section 3.2).

    Before: `cache 0.0 heads=0,1 .. policy=full`
    After:  `cache 0.0 heads=0,1 .. policy=window(sinks=4,recent=252,slack=64,..)`

    Options: `slack`, tokens that may gather before the window is moved; `prefill`, `exact` (the prompt is
    attended to whole, then cut) or `streaming` (cut after every chunk, memory constant in the context).

    Differs from the paper: positions stay absolute, where the paper numbers the kept tokens anew. So texts
    are bounded by the model's positions, and what is kept is what a full cache would hold of it. Layers with
    a sliding window of their own keep theirs.
    """

    sinks: int = 4
    recent: int = 252
    slack: int = 64
    prefill: str = "exact"

    name = "streaming_llm"
    requires = frozenset({"cache planned"})

    def __post_init__(self) -> None:
        check_options("cache.prune", self.policy)

    def policy(self) -> Window:
        """The policy that these options ask for. Raises IRError for one that cannot be."""
        return Window(self.sinks, self.recent, self.slack, prefill=self.prefill)

    def run(self, program: Program) -> PassResult:
        result, window = PassResult(), self.policy()
        for layer in prunable(program, result, window):
            with_policy(program, layer, window)
            result.applied(
                f"layer {layer.layer}",
                f"{layer.kv_heads} KV heads keep {self.sinks} sinks and {self.recent} recent tokens",
            )
        return result
