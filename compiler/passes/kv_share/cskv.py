"""cskv: few features of every token in place of its keys and values, and a window of whole tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ....errors import RecipeError
from ...calibrate.observers.kv_bases import KVBases
from ...calibrate.sites import layer as site_of
from ...calibrate.stream import Later
from ...ir.item_bytes import ITEM_BYTES
from ...ir.kv.keep.full import Full
from ...ir.kv.keep.window import Window
from ...ir.kv.layout import PARTS, CacheLayout, HeadGroup, LayerCache, cache_name
from ...ir.kv.store.low_rank.storage import LowRank
from ...ir.kv.store.plain.storage import Plain
from ...ir.ops import einfold_ops
from ...ir.program import Program, attention_nodes, call_arguments
from ...ir.weights import Weight
from ..base import Pass, PassResult, check_lets_go, check_options
from ..methods import SHARE


@SHARE.register
@dataclass(frozen=True)
class CSKV(Pass):
    """Stores `keep` of the channels of keys and values, for every token (Wang et al. 2024, section 3).

    Before: `cache 0.0 heads=0,1 .. policy=full storage=f32`
    After:  `cache 0.0 heads=0,1 .. policy=window(sinks=4,recent=32,..) storage=low_rank(..)`, and the weights
    `cache.0.0.key_basis` and `cache.0.0.value_basis` [features, channels].

    The newest `recent` tokens, and the `sinks` first, stay whole in slots (up to `slack` more of them); of
    the others the features are read, and their keys rotated when they are. `key_keep` and `value_keep` where
    they differ from `keep`; `dtype` of the features, f32 or f16; `prefill` as for windows. More than 64
    features are rounded to a multiple of 16, so that a GPU loads them in whole vectors.

    Measured on SmolLM2-135M-Instruct, recall behind 1,000 and 4,000 tokens: 0.20 and 0.15 by the defaults, at
    a KL of 0.26 and 22 % of the bytes, against 0.70 and 0.65 of the whole cache; `turboquant`, which keeps
    all channels in 4 bits, has as many bytes and a KL of 0.0011.

    Differs from the paper: it starts from a decomposition of the projections' weights and trains the two
    factors to rebuild keys and values on a text. Here both factors are one basis, the leading singular
    vectors of the keys and values on the calibration text: what that training would reach on this text,
    for no other pair of factors of this rank rebuilds it better. No sinks in the paper. Features are
    not quantized.
    """

    keep: float = 0.2
    key_keep: float | None = None
    value_keep: float | None = None
    recent: int = 32
    sinks: int = 4
    slack: int = 64
    dtype: str = "f32"
    prefill: str = "exact"

    name = "cskv"
    requires = frozenset({"cache planned"})

    def __post_init__(self) -> None:
        for share in (self.keep, self.key_keep, self.value_keep):
            if share is not None and not 0 < share < 1:
                raise RecipeError(
                    f"cache.share: cskv keeps a share of the channels between 0 and 1, not {share}"
                )
        check_options("cache.share", self._policy)
        check_options("cache.share", lambda: self.storage)

    @property
    def storage(self) -> LowRank:
        """What is stored, here of one feature; of how many, the sizes of a layer say."""
        return LowRank(1, 1, self.dtype)

    def _policy(self) -> Window:
        return Window(self.sinks, self.recent, self.slack, prefill=self.prefill)

    def run(self, program: Program) -> PassResult:
        result = PassResult()
        if program.layout is None:
            result.skipped("graph", "no attention in the graph")
            return result
        who, kept = "cache.share: cskv", self.sinks + self.recent
        check_lets_go(program, who, kept, self.slack, "read from its features")
        reasons = _left_alone(program)
        chosen: dict[int, LowRank] = {}
        for layer in program.layout.layers:
            if layer.layer in reasons:
                result.skipped(f"layer {layer.layer}", reasons[layer.layer])
                continue
            storage = self._storage(layer)
            chosen[layer.layer] = storage
            features = (storage.key_rank + storage.value_rank) * ITEM_BYTES[self.dtype]
            before = layer.kv_heads * (layer.key_size + layer.value_size) * ITEM_BYTES["f32"]
            result.applied(
                f"layer {layer.layer}",
                f"{features} bytes a token, from {before}; {self.sinks + self.recent} tokens and up to "
                f"{self.slack} more stay whole",
            )
        if chosen:
            self._store(program, chosen, result)
        return result

    def _storage(self, layer: LayerCache) -> LowRank:
        shares = (self.key_keep or self.keep, self.value_keep or self.keep)
        ranks = [
            features_of(share, layer.kv_heads * layer.size(part))
            for part, share in zip(PARTS, shares, strict=True)
        ]
        return LowRank(ranks[0], ranks[1], self.dtype)

    def _store(self, program: Program, chosen: dict[int, LowRank], result: PassResult) -> None:
        assert program.layout is not None
        ranks = {
            f"{site_of(layer)}.{part}": storage.rank(part)
            for layer, storage in chosen.items()
            for part in PARTS
        }
        bases = Later(program, [KVBases(ranks)])
        program.calibrations.append(bases)
        layers = []
        for layer in program.layout.layers:
            storage = chosen.get(layer.layer)
            if storage is not None:
                for part in PARTS:
                    name = f"{cache_name(layer.layer, 0)}.{part}_basis"
                    shape = (storage.rank(part), layer.kv_heads * layer.size(part))
                    program.cache_weights[name] = Weight(
                        shape, torch.float32, _basis(bases, layer.layer, part, result)
                    )
                group = replace(layer.groups[0], policy=self._policy(), storage=storage)
                layer = replace(layer, groups=(group,))
            layers.append(layer)
        program.layout = CacheLayout(tuple(layers))


def _basis(bases: Later, layer: int, part: str, result: PassResult) -> Callable[[], Tensor]:
    """Gives the basis of a layer's "key" or "value" once the text was read, and reports its error."""

    def load() -> Tensor:
        found = bases.at(f"{site_of(layer)}.{part}")
        result.measured[f"layer {layer} {part}s"] = float(found["error"])
        return found["basis"]

    return load


def features_of(share: float, channels: int) -> int:
    """Features for a share of the channels: at least one, and above 64 a multiple of 16.

    Then the features of a token begin at an address that a GPU loads from in whole vectors.
    """
    found = max(1, round(share * channels))
    return found if found <= 64 else min(16 * round(found / 16), channels)


def _left_alone(program: Program) -> dict[int, str]:
    """Why layers cannot be stored so, by layer."""
    assert program.layout is not None
    reasons = {}
    for found in map(call_arguments, attention_nodes(program)):
        layer = program.layout[int(found["layer"])]
        query, key = found["q_BSHD"], found["k_BSKD"]
        turned = [x.target is einfold_ops.rotary.default for x in (query, key)]
        if found["window"]:
            reason = f"has a sliding window of {found['window']} tokens of its own"
        elif layer.groups != (HeadGroup(tuple(range(layer.kv_heads)), Full(), Plain()),):
            reason = "an earlier pass decided how it is cached"
        elif readers := program.layout.readers(layer.layer):
            reason = f"its cache is read by layer {', '.join(map(str, readers))} too"
        elif any(turned) and (not all(turned) or query.args[1:] != key.args[1:]):
            reason = "queries and keys are rotated in different ways"
        else:
            continue
        reasons[layer.layer] = reason
    return reasons
