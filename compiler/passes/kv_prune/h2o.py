"""H2O: recent tokens and heavy hitters."""

from __future__ import annotations

from dataclasses import dataclass

from ...ir.kv.keep.policies import HeavyHitters
from ...ir.program import Program
from ..base import Pass, PassResult, check_options
from .layers import check_budget, observable, with_policy


@dataclass(frozen=True)
class H2O(Pass):
    """Keeps the newest tokens and those that got the most attention so far (Zhang et al. 2023, section 4).

    Before: `cache 0.0 heads=0,1 .. policy=full`
    After:  `cache 0.0 heads=0,1 .. policy=heavy_hitters(heavy=128,recent=128,slack=64,prefill=exact)`

    Options: `tokens`, the budget of a head; `recent`, how many of them are the newest (half where it is not
    given, as in the paper); `slack`, tokens that may gather before each head chooses anew; `prefill`, `exact`
    (all of the prompt is held while it is read) or `streaming` (each head chooses after every chunk).

    Differs from the paper: heads choose after `slack` tokens, not after each; a KV head adds up the
    attention of its query heads.
    """

    tokens: int = 256
    recent: int | None = None
    slack: int = 64
    prefill: str = "exact"

    name = "h2o"
    requires = frozenset({"cache planned"})

    def __post_init__(self) -> None:
        check_budget(self.name, self.tokens, self.newest, "recent")
        check_options("cache.prune", self.policy)

    @property
    def newest(self) -> int:
        return max(1, self.tokens // 2) if self.recent is None else self.recent

    def policy(self) -> HeavyHitters:
        """The policy that these options ask for. Raises IRError for one that cannot be."""
        return HeavyHitters(self.tokens - self.newest, self.newest, self.slack, self.prefill)

    def run(self, program: Program) -> PassResult:
        result, policy = PassResult(), self.policy()
        for layer in observable(program, result, policy):
            with_policy(program, layer, policy)
            result.applied(
                f"layer {layer.layer}",
                f"{layer.kv_heads} KV heads keep {policy.heavy} heavy hitters and {policy.recent} "
                "recent tokens",
            )
        return result
