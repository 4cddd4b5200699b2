"""SnapKV: the end of the prompt votes for what stays of it."""

from __future__ import annotations

from dataclasses import dataclass

from ...ir.kv.keep.policies import Voted
from ...ir.program import Program, attention_nodes, call_arguments
from ..base import Pass, PassResult, check_options
from .layers import check_budget, observable, with_policy


@dataclass(frozen=True)
class SnapKV(Pass):
    """Keeps of a prompt what its last tokens attend to (Li et al. 2024, section 4).

    Before: `cache 0.0 heads=0,1 .. policy=full`
    After:  `cache 0.0 heads=0,1 .. policy=voted(chosen=224,observe=32,kernel=7,slack=64,queries=2)`

    Options: `tokens`, the budget of a head; `observe`, the last tokens of the prompt, which vote and
    stay; `kernel`, the neighbours over which votes are max-pooled; `slack`, tokens that may be
    generated before old ones leave.

    Differs from the paper: what is generated is bounded too, to the newest `observe` to `observe` +
    `slack` tokens, for the bytes are fixed at compile time; a prompt that is shorter than the budget
    stays whole, and the first tokens generated fill it up. A KV head adds up the votes of its query
    heads. The prompt is held whole while it is read.
    """

    tokens: int = 256
    observe: int = 32
    kernel: int = 7
    slack: int = 64

    name = "snapkv"
    requires = frozenset({"cache planned"})

    def __post_init__(self) -> None:
        check_budget(self.name, self.tokens, self.observe, "observe")
        check_options("cache.prune", self.policy)

    def policy(self, queries: int = 1) -> Voted:
        """The policy that these options ask for, where `queries` heads share a KV head. Raises IRError for
        one that cannot be."""
        return Voted(self.tokens - self.observe, self.observe, self.kernel, self.slack, queries)

    def run(self, program: Program) -> PassResult:
        result = PassResult()
        heads = {
            int(found["layer"]): int(found["q_BSHD"].meta["val"].shape[2])
            for found in map(call_arguments, attention_nodes(program))
        }
        for layer in observable(program, result, self.policy()):
            policy = self.policy(heads[layer.layer] // layer.kv_heads)
            with_policy(program, layer, policy)
            result.applied(
                f"layer {layer.layer}",
                f"{layer.kv_heads} KV heads keep {policy.chosen} tokens of the prompt by vote of its last "
                f"{self.observe}, and these",
            )
        return result
