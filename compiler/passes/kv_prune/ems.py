"""EMS: evict, then merge, by a global and local score."""

from __future__ import annotations

from dataclasses import dataclass

from ...ir.kv.keep.policies import Merged
from ...ir.program import Program
from ..base import Pass, PassResult, check_options
from .layers import check_budget, observable, with_policy


@dataclass(frozen=True)
class EMS(Pass):
    """Evict-then-merge for each head, by its global-local score (Li et al. 2024).

    Before: `cache 0.0 heads=0,1 .. policy=full`
    After:  `cache 0.0 heads=0,1 .. policy=merged(heavy=224,recent=32,slack=64,prefill=exact,local=32,..)`

    Options: `tokens`, the budget of a head; `recent`, how many of them are the newest; `slack`, tokens
    that may gather before each head chooses anew; `local`, the queries that the local score is of;
    `similarity`, the cosine of keys from which on a token is merged into a kept one, below it is in the
    zero class and gone; `prefill`, `exact` or `streaming`.

    Differs from the paper: local attention fades with age by 1 - 1 / `local` in place of a hard window,
    so that no queries are kept; both scores are shares of a head's attention and count equally; one
    `similarity` holds for every head, where the paper adapts it; centres and merged tokens are averaged
    by their scores.
    """

    tokens: int = 256
    recent: int = 32
    slack: int = 64
    local: int = 32
    similarity: float = 0.6
    prefill: str = "exact"

    name = "ems"
    requires = frozenset({"cache planned"})

    def __post_init__(self) -> None:
        check_budget(self.name, self.tokens, self.recent, "recent")
        check_options("cache.prune", self.policy)

    def policy(self) -> Merged:
        """The policy that these options ask for. Raises IRError for one that cannot be."""
        heavy = self.tokens - self.recent
        return Merged(heavy, self.recent, self.slack, self.prefill, self.local, self.similarity)

    def run(self, program: Program) -> PassResult:
        result, policy = PassResult(), self.policy()
        for layer in observable(program, result, policy):
            with_policy(program, layer, policy)
            result.applied(
                f"layer {layer.layer}",
                f"{layer.kv_heads} KV heads keep {policy.heavy} centres, which others merge into, and "
                f"{self.recent} recent tokens",
            )
        return result
