"""minicache: pairs of deep layers share the directions of their keys and values."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

from ....errors import RecipeError
from ...ir.item_bytes import ITEM_BYTES
from ...ir.kv.keep.full import Full
from ...ir.kv.layout import CacheLayout, HeadGroup, LayerCache
from ...ir.kv.store.minicache.storage import MiniCache as Storage
from ...ir.kv.store.plain.storage import Plain
from ...ir.program import Program, own_windows
from ..base import Pass, PassResult, check_lets_go
from ..methods import SHARE


@SHARE.register
@dataclass(frozen=True)
class MiniCache(Pass):
    """Merges what adjacent layers of the deeper half cache (Liu et al. 2024, section 4).

    Before: `cache 2.0 .. storage=f32`, `cache 3.0 .. storage=f32`
    After:  `cache 2.0 .. storage=minicache(..)`, `cache 3.0 .. storage=minicache(..) partner=2`

    Of tokens that are neither the first `sinks` nor the newest `residual`, the two layers share one direction
    for keys and one for values, at a share `slerp` of the arc from the shallower layer's to the deeper's;
    each keeps the vectors' lengths. Tokens whose directions differ most are retained unmerged: those within
    `gamma` of the spread of distances from the largest, up to a share `retained` of the tokens of each head.
    That capacity is fixed at compile time, and what is beyond it is merged, the least distant first. Pairs
    begin at the share `start` of the layers. `group` tokens are merged together, and distances are compared
    among them.

    Measured on SmolLM2-135M-Instruct, where it fails: 82 % of the bytes behind 4,000 tokens, more than twice
    the perplexity, and recall of 0.00 and 0.00 behind 1,000 and 4,000, against 0.70 and 0.65 of the whole
    cache. `cross_layer`, which also takes layers of it for alike, fails too; the authors' models are deeper
    and fifty times as large.

    Differs from the paper: tokens are merged when they leave a window of `residual` plain tokens, not
    at once; each head retains its own tokens, and distances are compared within a group, not in the whole
    prompt; the shared directions are not quantized (`dtype` f32 or f16).
    """

    start: float = 0.5
    storage: Storage = field(default_factory=Storage)

    name = "minicache"
    requires = frozenset({"cache planned"})

    def __post_init__(self) -> None:
        if not 0 <= self.start < 1:
            raise RecipeError(
                f"cache.share: start is a share of the layers from 0 to below 1, not {self.start}"
            )

    def options(self) -> dict[str, Any]:
        return {"start": self.start, **self.storage.options()}

    def run(self, program: Program) -> PassResult:
        result, storage = PassResult(), self.storage
        if program.layout is None:
            result.skipped("graph", "no attention in the graph")
            return result
        who = f"cache.share: {self.name}"
        check_lets_go(program, who, storage.lead + storage.newest, storage.waiting, "merged")
        layers = list(program.layout.layers)
        first = math.ceil(self.start * len(layers))
        for layer in layers[:first]:
            result.skipped(f"layer {layer.layer}", f"is before layer {first}, where pairs begin")
        windows = own_windows(program)
        place = first
        while place < len(layers):
            pair = layers[place : place + 2]
            reason = _left_alone(pair, windows, program.layout)
            if reason:
                result.skipped(f"layer {pair[0].layer}", reason)
                place += 1
                continue
            layers[place : place + 2] = _paired(pair, storage)
            result.applied(f"layers {pair[0].layer} and {pair[1].layer}", _saving(pair[0], storage))
            place += 2
        if not result.changed:
            why = result.notes[min(first, len(layers) - 1)]
            raise RecipeError(
                f"{who} finds no two adjacent layers to pair among the {len(layers)}, from layer {first} on "
                f"({why.where}: {why.what}); lower start, or take another method"
            )
        program.layout = CacheLayout(tuple(layers))
        return result


def _left_alone(pair: list[LayerCache], windows: dict[int, int], layout: CacheLayout) -> str:
    """Why the first of two layers cannot be paired with the second."""
    if len(pair) < 2:
        return "has no layer behind it to pair with"
    for layer in pair:
        window = windows[layer.layer]
        if window:
            return f"layer {layer.layer} has a sliding window of {window} tokens of its own"
        plain = HeadGroup(tuple(range(layer.kv_heads)), Full(), Plain())
        if layer.groups != (plain,):
            return f"an earlier pass decided how layer {layer.layer} is cached"
        if readers := layout.readers(layer.layer):
            return f"the cache of layer {layer.layer} is read by layer {', '.join(map(str, readers))} too"
    a, b = pair
    if a.shape(a.groups[0]) != b.shape(b.groups[0]):
        return f"layer {b.layer} has other heads"
    return ""


def _paired(pair: list[LayerCache], storage: Storage) -> list[LayerCache]:
    a, b = pair
    return [
        replace(a, groups=(replace(a.groups[0], storage=storage),)),
        replace(b, groups=(replace(b.groups[0], storage=storage, partner=a.layer),)),
    ]


def _saving(layer: LayerCache, storage: Storage) -> str:
    shape = layer.shape(layer.groups[0])
    of_pair = sum(
        (1 if piece.name in storage.shared else 2) * piece.nbytes for piece in storage.pieces(shape)
    )
    each = shape.heads * of_pair / storage.group
    before = 2 * shape.heads * (shape.key_size + shape.value_size) * ITEM_BYTES["f32"]
    return (
        f"{each:g} bytes a merged token for both, from {before}; {storage.apart} stay as they are"
    )
