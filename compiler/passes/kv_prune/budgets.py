"""Budgets of tokens by head: policies of several sizes in one layout, and how many tokens each head is given.

A budget is a base and a number of steps of so many tokens. Heads are given steps until the mean of all is
what was asked for, so that the bytes are those of one budget for all heads, whichever heads get more.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ....errors import IRError, RecipeError
from ...calibrate.observers.token_scores import TokenScores
from ...calibrate.sites import layer as site_of
from ...ir.kv.keep.heavy_hitters import HeavyHitters
from ...ir.kv.keep.policy import POLICIES, Policy
from ...ir.kv.layout import LayerCache
from ...ir.program import Program, attention_nodes, call_arguments
from ..base import PassResult
from ..method_text import Method, built, read_method
from .heads import Head, heads_of
from .layers import observable, prunable, with_layer

#: Steps that a head of the mean budget holds beside the fewest tokens.
STEPS = 8

#: The policy of a budget of so many tokens.
Make = Callable[[int], Policy]

#: How many tokens of the calibration text a head chooses by their scores, by its budget.
Chosen = Callable[[int], float]


def scoring(text: str, slack: int, tokens: int) -> Make:
    """What makes policies of the method that `text` names, with its options, for several budgets.

    Raises RecipeError where there is no such method, it has no budget, or a policy of `tokens` cannot be.
    """
    place = "cache.prune.by"
    known = {kind.method: Method(kind) for kind in POLICIES.values() if kind.method}
    able = {name: each for name, each in known.items() if "tokens" in each.defaults()}
    try:
        table = read_method(place, text)
        for name in ("tokens", "slack"):
            if name in table:
                raise RecipeError(
                    f"{place}: {name} is an option of the method itself, not of {text}"
                )

        def make(budget: int) -> Policy:
            found: Policy = built(place, able, {**table, "tokens": budget, "slack": slack})
            return found

        make(tokens)
    except ValueError as error:
        raise RecipeError(str(error)) from error
    return make


def fewest(make: Make, tokens: int) -> int:
    """The smallest budget of which there is a policy, `tokens` at most."""

    def possible(budget: int) -> bool:
        try:
            make(budget)
        except RecipeError:
            return False
        return True

    return bisect_left(range(1, tokens), True, key=possible) + 1


@dataclass(frozen=True)
class Sizes:
    """`base` tokens, and steps of `step`: a head of STEPS of them has the mean budget, and none has
    more than `most`."""

    base: int
    step: int
    most: int

    @staticmethod
    def of(tokens: int, least: int, room: int) -> Sizes:
        """For a mean of so many tokens, `least` of them at least and less than `room`. Raises IRError."""
        step = (tokens - least) // STEPS
        if step < 1:
            raise IRError(
                f"a mean budget of {tokens} tokens leaves less than {STEPS} to share out beside the "
                f"{least} that every head keeps at least; raise tokens, or lower floor or what is recent"
            )
        base = tokens - STEPS * step
        return Sizes(base, step, (room - 1 - base) // step)

    def tokens(self, steps: int) -> int:
        return self.base + steps * self.step


def shared_out(scores_KT: Tensor, sizes: Sizes, chosen: Chosen) -> Tensor:
    """Steps of each head, [K]: STEPS of them a head in all, each to the head that has the token of the
    highest score in that place.

    `scores_KT` are of the tokens that a head chooses among, of which it takes `chosen` of its budget. A
    step's score is that of the token in its middle, where the tokens of a head are ordered by theirs (Feng
    et al. 2024, algorithm 1, is the same with steps of one token).
    """
    heads, total = scores_KT.shape
    ends = torch.tensor([chosen(sizes.tokens(steps)) for steps in range(sizes.most + 1)])
    places = ((ends[:-1] + ends[1:]) / 2).long()
    ordered_KT = scores_KT.float().sort(1, descending=True).values
    values_KN = torch.full((heads, sizes.most), -1.0)
    inside = places < total
    values_KN[:, inside] = ordered_KT[:, places[inside]]
    # Behind the text's last token steps are worth nothing; the first heads take them in turns.
    order = values_KN.t().flatten().argsort(descending=True, stable=True)[: STEPS * heads]
    return torch.bincount(order % heads, minlength=heads)


def give(
    program: Program,
    layers: Sequence[LayerCache],
    budgets: Mapping[Head, int],
    make: Make,
    result: PassResult,
) -> None:
    """Gives each head the policy of its budget; heads of a layer that have the same are one group."""
    queries = {
        int(found["layer"]): int(found["q_BSHD"].meta["val"].shape[2])
        for found in map(call_arguments, attention_nodes(program))
    }
    for layer in layers:
        of_tokens: dict[int, list[int]] = {}
        for head in range(layer.kv_heads):
            of_tokens.setdefault(budgets[layer.layer, head], []).append(head)
        (group,) = layer.groups
        each = queries[layer.layer] // layer.kv_heads
        groups = tuple(
            replace(group, heads=tuple(heads), policy=make(tokens).fitted(each))
            for tokens, heads in of_tokens.items()
        )
        with_layer(program, replace(layer, groups=groups))
        policy = groups[0].policy
        said = ", ".join(
            f"{len(heads)} of {tokens} tokens" for tokens, heads in sorted(of_tokens.items())
        )
        result.applied(
            f"layer {layer.layer}",
            f"{layer.kv_heads} KV heads by {policy.method or policy.name}: {said}",
        )


def open_layers(program: Program, policy: Policy, result: PassResult) -> list[LayerCache]:
    """The layers whose heads may have budgets; the others are noted as skipped."""
    asks = policy.scores or policy.once
    return list((observable if asks else prunable)(program, result, policy))


def together(layers: Sequence[LayerCache], whole: bool) -> list[list[LayerCache]]:
    """The layers whose heads share their tokens: all of one size, or each by itself."""
    if not whole:
        return [[layer] for layer in layers]
    found: dict[tuple[int, int], list[LayerCache]] = {}
    for layer in layers:
        found.setdefault((layer.key_size, layer.value_size), []).append(layer)
    return [*found.values()]


def alike(layers: Sequence[LayerCache]) -> list[list[LayerCache]]:
    """The layers that may share by weights: of as many heads, a token of each in as many bytes."""
    found: dict[tuple[int, int, int], list[LayerCache]] = {}
    for layer in layers:
        found.setdefault((layer.kv_heads, layer.key_size, layer.value_size), []).append(layer)
    return [*found.values()]


def attention_by_layer(
    program: Program, layers: Sequence[LayerCache], read: int, result: PassResult
) -> dict[int, Tensor] | None:
    """The attention that tokens of the calibration text got in each layer, [K, tokens]; None where there are
    no weights to read it with, which is noted."""
    if program.statistics is None:
        result.skipped("budgets", "without weights they are shared out at will; only sizes count")
        return None
    found = program.statistics.of(program, TokenScores(HeavyHitters(), read))
    return {each.layer: found[site_of(each.layer)]["score"] for each in layers}


def by_scores(
    layers: Sequence[LayerCache],
    scores: Mapping[int, Tensor] | None,
    sizes: Sizes,
    chosen: Chosen,
) -> dict[Head, int]:
    """The budget of each of the layers' heads by the scores [K, T] of their tokens, by layer; without them
    `at_will`."""
    if scores is None:
        return at_will(layers, sizes)
    shared = shared_out(torch.cat([scores[x.layer] for x in layers]), sizes, chosen).tolist()
    return {head: sizes.tokens(n) for head, n in zip(heads_of(layers), shared, strict=True)}


def by_weights(
    layers: Sequence[LayerCache], weights: Mapping[int, float], sizes: Sizes
) -> dict[Head, int]:
    """Budgets of layers with as many heads each, as near to proportional to their weights as steps can be."""
    mean = sum(weights[x.layer] for x in layers) / len(layers)
    wanted = [
        (sizes.tokens(STEPS) * weights[x.layer] / mean - sizes.base) / sizes.step for x in layers
    ]
    given = [0] * len(layers)
    for _ in range(STEPS * len(layers)):
        open_ = [place for place, steps in enumerate(given) if steps < sizes.most]
        given[max(open_, key=lambda place: wanted[place] - given[place])] += 1
    return {
        (layer.layer, head): sizes.tokens(steps)
        for layer, steps in zip(layers, given, strict=True)
        for head in range(layer.kv_heads)
    }


def at_will(layers: Sequence[LayerCache], sizes: Sizes) -> dict[Head, int]:
    """Budgets where nothing is known: the first heads take what they can.

    No other choice has a higher peak, for the first layer to be compressed then has the most to take beside
    what is still whole.
    """
    left, shared = STEPS * len(heads_of(layers)), []
    for layer in layers:
        each = min(sizes.most, left // layer.kv_heads)
        shared += [each] * layer.kv_heads
        left -= each * layer.kv_heads
    shared[-1] += left
    return {head: sizes.tokens(n) for head, n in zip(heads_of(layers), shared, strict=True)}
