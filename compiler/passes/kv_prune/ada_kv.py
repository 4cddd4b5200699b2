"""AdaKV: heads share their tokens by the scores of all of them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from ....errors import CalibrationError, RecipeError
from ...calibrate.observer import Observer
from ...calibrate.observers.token_scores import TokenScores
from ...calibrate.sites import layer as site_of
from ...ir.kv.keep.policy import Policy
from ...ir.options import later
from ...ir.program import Program
from ..base import Pass, PassResult, check_options
from ..methods import PRUNE
from .budgets import Chosen, Make, Sizes, by_scores, fewest, give, open_layers, scoring, together
from .heads import Head

#: The share of the context that a mean budget is where none is given.
_SHARE = 0.25

#: A budget that every method which chooses tokens can have: by it their options are checked.
_MANY = 1 << 20


@PRUNE.register
@dataclass(frozen=True)
class AdaKV(Pass):
    """Heads of a layer have unequal budgets, by how many of the layer's best tokens are theirs (Feng et al.
    2024, section 3).

    Before: `cache 0.0 heads=0,1 .. policy=full`
    After:  `cache 0.0 heads=0 .. policy=voted(chosen=73,observe=32,..)` and
            `cache 0.1 heads=1 .. policy=voted(chosen=375,observe=32,..)`

    Options: `tokens`, the mean budget of a head (where it is not given, `share` of the context, or a quarter
    of it); `by`, the method that chooses tokens, with options of its own where it is given any
    (`snapkv:observe=16`); `floor`, the share of `tokens` that every head has at least; `share`, the share of
    a text that `tokens` are, which budgets are right for (of the context where it is not given); `over`,
    which heads share their tokens, those of a `layer` or of the `model`; `slack`, tokens that may gather
    between moves; `read`, how many tokens of the calibration text are scored.

    Measured on SmolLM2-135M-Instruct, recall behind 1,000 and 4,000 tokens: 0.30 and 0.05 by the defaults,
    which hold 97 % of the bytes behind 1,000, against 0.70 and 0.65 with every token. Heads with even scores,
    which recall needs, are given the fewest tokens.

    Differs from the paper: a layout has its sizes when it is compiled, so heads are compared on the
    calibration text, not on each prompt; budgets are `floor` and eighths of the rest, so that memory is as
    much as with equal budgets, and is really freed.
    """

    tokens: int | None = later()
    by: str = "snapkv"
    floor: float = 0.2
    share: float | None = later()
    over: str = "layer"
    slack: int = 64
    read: int = 1024

    name = "ada_kv"
    requires = frozenset({"cache planned"})

    def __post_init__(self) -> None:
        if not 0 <= self.floor < 1:
            raise RecipeError(f"cache.prune: floor is a share of tokens, 0 to 1, not {self.floor}")
        if self.share is not None and not 0 < self.share <= 1:
            raise RecipeError(
                f"cache.prune: share is of a text, more than 0 to 1, not {self.share}"
            )
        if self.over not in ("layer", "model"):
            raise RecipeError(
                f"cache.prune: heads share over a layer or the model, not {self.over!r}"
            )
        if self.read < 16:
            raise RecipeError(
                f"cache.prune: heads are compared on 16 tokens or more, not {self.read}"
            )
        if not self.measures and scoring(self.by, self.slack, _MANY)(_MANY).told:
            raise RecipeError(
                f"cache.prune: {self.name} compares heads by their scores, and those of {self.by} are of "
                f"each head alone; take kvzip:by={self.by}, which has a measure of its own"
            )
        if self.tokens is None:
            scoring(self.by, self.slack, _MANY)
        else:
            check_options("cache.prune", lambda: self.sizes(2 * self.mean))

    @property
    def measures(self) -> bool:
        """Whether heads are compared by something else than the scores of `by`."""
        return False

    @property
    def mean(self) -> int:
        """The mean budget of a head, where `tokens` is given or has been settled."""
        assert self.tokens is not None
        return self.tokens

    def make(self) -> Make:
        """The policies by budget. Raises RecipeError for options that cannot be."""
        return scoring(self.by, self.slack, self.mean)

    def sizes(self, room: int) -> Sizes:
        """The budgets that there are, less than `room`. Raises IRError where there is nothing to share."""
        least = max(fewest(self.make(), self.mean), round(self.floor * self.mean))
        return Sizes.of(self.mean, least, room)

    def run(self, program: Program) -> PassResult:
        if self.tokens is None:
            tokens = round((self.share or _SHARE) * program.model.context)
            return replace(self, tokens=tokens).run(program)
        result, make = PassResult(), self.make()
        policy = make(self.mean)
        layers = open_layers(program, policy, result)
        if not layers:
            return result
        context = program.model.context
        sizes = self.sizes(context - self.slack)
        scores = None
        if program.statistics is None:
            result.skipped(
                "budgets", "without weights they are shared out at will; only sizes count"
            )
        else:
            compared = self.compared(make, context)
            found = program.statistics.of(program, self.observer(compared))
            scores = {
                x.layer: self.seen(found[site_of(x.layer)]["score"], compared) for x in layers
            }
        budgets: dict[Head, int] = {}
        for part in together(layers, self.over == "model"):
            length = 0 if scores is None else scores[part[0].layer].shape[1]
            budgets |= by_scores(part, scores, sizes, self.chosen(make, context, length))
        give(program, layers, budgets, make, result)
        return result

    def right_for(self, context: int) -> float:
        """Tokens of a text that budgets are right for."""
        return self.mean / self.share if self.share else context

    def compared(self, make: Make, context: int) -> Policy:
        """The policy by which the calibration text is scored: of a budget that is to its length as the mean
        one is to the text that budgets are right for."""
        budget = round(self.mean * min(self.read, context) / self.right_for(context))
        return make(max(budget, fewest(make, self.mean)))

    def observer(self, policy: Policy) -> Observer:
        """What scores the tokens of the calibration text."""
        return TokenScores(policy, self.read)

    def chosen(self, make: Make, context: int, length: int) -> Chosen:
        """How many of the `length` tokens that are seen a head chooses, by its budget.

        The newest tokens are a part of a budget and of the text that budgets are right for, but not of what
        is seen: of a text of L tokens a head of b tokens, n of them the newest, chooses b - n of L - n.
        """
        ratio = length / (self.right_for(context) - make(self.mean).newest)
        return lambda budget: (budget - make(budget).newest) * ratio

    def seen(self, scores_KT: Tensor, policy: Policy) -> Tensor:
        """The scores by which heads are compared: not of the newest tokens, which every head keeps."""
        newest = policy.newest
        if scores_KT.shape[1] <= newest:
            raise CalibrationError(
                f"heads are compared on {scores_KT.shape[1]} tokens of the calibration text, of which "
                f"{self.by} keeps the newest {newest} anyway: give a longer text, or a larger read"
            )
        return scores_KT[:, : scores_KT.shape[1] - newest]
