"""One policy for all heads: what most methods of `[cache.prune]` are."""

from __future__ import annotations

from dataclasses import dataclass

from ...ir.kv.keep.policy import Policy
from ...ir.program import Program, attention_nodes, call_arguments
from ..base import GivenToHeads, PassResult
from .layers import observable, prunable, with_policy


@dataclass(frozen=True)
class KeepByPolicy(GivenToHeads):
    """Gives every KV head of the layers that hold all of their tokens one policy.

    Before: `cache 0.0 heads=0,1 .. policy=full`
    After:  `cache 0.0 heads=0,1 .. policy=window(sinks=4,recent=252,slack=64,..)`
    """

    policy: Policy

    def run(self, program: Program) -> PassResult:
        result = PassResult()
        heads = {
            int(found["layer"]): int(found["q_BSHD"].meta["val"].shape[2])
            for found in map(call_arguments, attention_nodes(program))
        }
        asks = self.policy.scores or self.policy.once
        layers = (observable if asks else prunable)(program, result, self.policy)
        for layer in layers:
            policy = self.policy.fitted(heads[layer.layer] // layer.kv_heads)
            with_policy(program, layer, policy)
            result.applied(
                f"layer {layer.layer}", f"{layer.kv_heads} KV heads keep {policy.says()}"
            )
        return result
