"""native_window: layers with a sliding window of their own let go of what no later token sees."""

from __future__ import annotations

from dataclasses import dataclass

from ...ir.kv.keep.window import Window
from ...ir.program import Program, attention_nodes, call_arguments
from ..base import Pass, PassResult
from .layers import with_policy


@dataclass(frozen=True)
class NativeWindow(Pass):
    """Frees the cache behind the sliding windows that a model has anyway (Mistral, Gemma 2 and 3, GPT-OSS).

    Before: `cache 0.0 .. policy=full`, of a layer whose attention has a window of 4,096
    After:  `cache 0.0 .. policy=window(sinks=0,recent=4096,slack=512,compensation=0,prefill=streaming)`

    Nothing is lost: the slots hold the newest tokens side by side, so that the operator's window, which
    counts slots, hides the same tokens as before. `slack` is what may gather before the window is
    moved, and bounds a prefill step; 0 leaves the layers as they are, with every token kept and masked.
    """

    slack: int = 512

    name = "native_window"
    requires = frozenset({"cache planned"})

    def run(self, program: Program) -> PassResult:
        result = PassResult()
        if program.layout is None or not self.slack:
            result.skipped("graph", "no attention in the graph" if self.slack else "switched off")
            return result
        for found in map(call_arguments, attention_nodes(program)):
            layer, window = program.layout[int(found["layer"])], int(found["window"])
            if not window:
                continue
            where = f"layer {layer.layer}"
            owner = layer.groups[0].owner
            if owner is not None:
                result.skipped(where, f"reads the cache of layer {owner}, which keeps that window")
                continue
            if window + self.slack >= program.model.context:
                result.skipped(
                    where,
                    f"its window of {window} tokens and the slack of {self.slack} are no less than the "
                    f"context of {program.model.context}",
                )
                continue
            with_policy(program, layer, Window(0, window, self.slack, prefill="streaming"))
            result.applied(
                where, f"keeps its window of {window} tokens and a slack of {self.slack}"
            )
        return result
