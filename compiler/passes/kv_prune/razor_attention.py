"""RazorAttention: retrieval heads keep all, the others sinks, a recent window and a compensation token."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ....errors import RecipeError
from ...calibrate.observers.retrieval_heads import RetrievalHeads, kv_scores, probe_period
from ...calibrate.sites import layer as site_of
from ...ir.kv.keep.window import Window
from ...ir.kv.layout import LayerCache
from ...ir.program import Program
from ..base import Pass, PassResult, check_options
from ..methods import PRUNE
from .heads import Head, heads_of, keep_whole
from .layers import prunable


@PRUNE.register
@dataclass(frozen=True)
class RazorAttention(Pass):
    """Head-wise pruning by retrieval heads (Tang et al. 2024, sections 3.2 and 3.3).

    Before: `cache 0.0 heads=0,1 .. policy=full`
    After:  `cache 0.0 heads=1 .. policy=full` and
            `cache 0.1 heads=0 .. policy=window(sinks=4,recent=409,slack=64,compensation=1,..)`

    Options: `induction` and `echo`, the shares of KV heads that are retrieval heads by each score;
    `sinks`; `recent`, the window of the other heads (a fifth of the context where it is not given);
    `slack`, tokens that may gather before a window is moved; `prefill`, `exact` (as the paper) or
    `streaming`; `probe`, the random tokens that are repeated to find the heads.

    Measured on SmolLM2-135M-Instruct, recall behind 1,000 and 4,000 tokens: 0.70 and 0.30 by the defaults,
    which hold 52 % of the bytes behind 4,000 and all behind 1,000, and 0.15 and 0.60 with 28 % of the heads,
    against 0.70 and 0.65 with every token. The scores do not find the heads that recall needs; `kvzip` keeps
    it with fewer bytes.

    Differs from the paper: a KV head takes the largest score of its query heads, and shares are of KV
    heads. Heads chosen by echo are the best of those that induction left, so that the number of retrieval
    heads, and with it the bytes, follows from the options. The window has one length (the paper:
    max(4000, N / 5) of N tokens); the probe is 512 tokens (2,500), less where the context has no room for
    four times as many.
    """

    induction: float = 0.14
    echo: float = 0.01
    sinks: int = 4
    recent: int | None = None
    slack: int = 64
    prefill: str = "exact"
    probe: int = 512

    name = "razor_attention"
    requires = frozenset({"cache planned"})

    def __post_init__(self) -> None:
        shares = (self.induction, self.echo, self.induction + self.echo)
        if not all(0 <= share <= 1 for share in shares):
            raise RecipeError(
                f"the shares of retrieval heads, {self.induction} by induction and {self.echo} by echo, must "
                "each be 0 or more, and 1 or less together"
            )
        check_options("cache.prune", lambda: self.policy(5))

    def policy(self, context: int) -> Window:
        """The policy of the heads that do not retrieve. Raises IRError for one that cannot be."""
        recent = max(1, context // 5) if self.recent is None else self.recent
        return Window(self.sinks, recent, self.slack, True, self.prefill)

    def run(self, program: Program) -> PassResult:
        result, window = PassResult(), self.policy(program.model.context)
        layers = list(prunable(program, result, window))
        retrieval = self._retrieval_heads(program, layers, result)
        keep_whole(program, layers, retrieval, window, result)
        return result

    def _retrieval_heads(
        self, program: Program, layers: list[LayerCache], result: PassResult
    ) -> set[Head]:
        """The heads that keep all: as many as the shares say, whatever the scores."""
        every = heads_of(layers)
        counts = math.ceil(self.induction * len(every)), math.ceil(self.echo * len(every))
        if not sum(counts):
            return set()
        # An estimate refuses what a compile does.
        heads = RetrievalHeads(probe_period(self.probe, program.model.context))
        if program.statistics is None:
            result.skipped(
                "retrieval heads", "without weights they are chosen at will; only sizes count"
            )
            # Of the deepest layers: no other choice has a higher peak, for the first layer to be compressed
            # then has the most to take beside what is still whole.
            return set(every[-sum(counts) :])
        found = program.statistics.of(program, heads)
        scores: dict[str, dict[Head, float]] = {"induction": {}, "echo": {}}
        for layer in layers:
            for kind, known in scores.items():
                scores_H = found[site_of(layer.layer)][kind]
                for head, score in enumerate(kv_scores(scores_H, layer.kv_heads)):
                    known[layer.layer, head] = float(score)
        return choose(scores["induction"], scores["echo"], *counts)


def choose(
    induction: dict[Head, float], echo: dict[Head, float], by_induction: int, by_echo: int
) -> set[Head]:
    """The heads with the highest induction scores, and of the others those with the highest echo scores."""
    first = sorted(induction, key=lambda head: -induction[head])[:by_induction]
    rest = [head for head in echo if head not in first]
    return {*first, *sorted(rest, key=lambda head: -echo[head])[:by_echo]}
