"""matryoshka_kv: the first directions of a trained basis in place of all channels of each head."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

from ....errors import RecipeError
from ...analysis.head_rows import LostHeadsError, output_projection
from ...calibrate.observers.head_bases import HeadBases, site_of
from ...calibrate.orthogonal import PARTS as EIGHTHS
from ...calibrate.statistics import digest_of
from ...ir.item_bytes import ITEM_BYTES
from ...ir.kv.keep.full import Full
from ...ir.kv.layout import CacheLayout, HeadGroup, LayerCache
from ...ir.kv.store.plain.storage import Plain
from ...ir.program import Program, attention_nodes, call_arguments
from ..base import Pass, PassResult
from ..methods import SHARE
from .head_bases import Bases, cut, project, taken, zeros

#: Of bases that were not trained: sizes alone count then.
_UNTRAINED = "untrained"

#: Directions of keys and of values by layers.
_Ranks = dict[int, tuple[int, int]]


@SHARE.register
@dataclass(frozen=True)
class MatryoshkaKV(Pass):
    """Keeps `keep` of the channels of each head, in bases that were trained (Lin et al. 2024, section 4).

    Before: `%o = attention(%q, %k, %v, ..)` over heads of D channels
    After:  `%o = attention(%q U, %k U, (%v - m) V, ..) V' + m` over heads of fewer (`head_bases.py`), and the
    weights `cache.LAYER.key_basis.MARK` [KV heads, D, rank], `.value_basis` and `.value_mean`, and the same
    for all query heads, `.query_basis`, `.output_basis` and `.output_mean`. The mark is a hash of the model's
    weights. In the layout heads have so many channels: these are what other methods prune, pack and read.

    Shares are rounded to eighths of a head's size; `key_keep` and `value_keep` where they differ from `keep`.
    `steps` of training in each layer, on `read` tokens of the calibration text, which the model writes where
    none is given; with 0 the directions are principal ones. `bases` is an artifact of this model whose bases
    are taken: those of a larger rank serve for a smaller one.

    Measured on SmolLM2-135M-Instruct, recall behind 1,000 and 4,000 tokens: 0.12 and 0.00 by the defaults, at
    a KL of 0.40 and 75 % of the bytes, against 0.70 and 0.65 of the whole cache. Principal directions without
    training have a KL of 1.47, `cskv` of half of the channels has 0.057, and slots of int8, a quarter of the
    bytes, 0.0028: heads this few and narrow have no channels to spare behind their rotary embedding.

    Differs from the paper: each layer's bases are trained against what that layer gives, on 4,096 tokens,
    without a gradient through the model, where the paper distils the whole model; one number of directions
    for all keys and one for all values, where the paper searches one for each head; and what attention gives
    is turned back behind it, not in the weight that reads it.
    """

    keep: float = 0.75
    key_keep: float | None = None
    value_keep: float | None = None
    steps: int = 150
    read: int = 4096
    bases: str = ""

    name = "matryoshka_kv"
    trained = True
    requires = frozenset({"cache planned"})

    def __post_init__(self) -> None:
        for share in (self.keep, self.key_keep, self.value_keep):
            if share is not None and not 0 < share < 1:
                raise RecipeError(
                    f"cache.share: {self.name} keeps a share of the channels between 0 and 1, not {share}"
                )
        if self.steps < 0:
            raise RecipeError(
                f"cache.share: {self.name} trains bases in 0 or more steps, not {self.steps}"
            )
        if self.read < 16:
            raise RecipeError(
                f"cache.share: {self.name} reads 16 or more tokens of the calibration text, not {self.read}"
            )

    def run(self, program: Program) -> PassResult:
        result = PassResult()
        if program.layout is None:
            result.skipped("graph", "no attention in the graph")
            return result
        reasons = _left_alone(program)
        ranks: _Ranks = {}
        for layer in program.layout.layers:
            if layer.layer in reasons:
                result.skipped(f"layer {layer.layer}", reasons[layer.layer])
            else:
                ranks[layer.layer] = self._ranks(layer)
        if ranks:
            self._project(program, ranks, result)
        return result

    def _ranks(self, layer: LayerCache) -> tuple[int, int]:
        key, value = self.key_keep or self.keep, self.value_keep or self.keep
        return rank_of(key, layer.key_size), rank_of(value, layer.value_size)

    def _project(self, program: Program, ranks: _Ranks, result: PassResult) -> None:
        assert program.layout is not None
        found, mark, told = self._bases(program, ranks, result)
        for node in attention_nodes(program):
            number = int(call_arguments(node)["layer"])
            if number in ranks:
                project(program, node, found[number], mark)
        layers = []
        for layer in program.layout.layers:
            if layer.layer in ranks:
                key, value = ranks[layer.layer]
                narrow = replace(layer, key_size=key, value_size=value)
                after, before = (_token_bytes(each) for each in (narrow, layer))
                what = f"{after} bytes a token, from {before}; {told.get(layer.layer, '')}"
                result.applied(f"layer {layer.layer}", what.removesuffix("; "))
                layer = narrow
            layers.append(layer)
        program.layout = CacheLayout(tuple(layers))

    def _bases(
        self, program: Program, ranks: _Ranks, result: PassResult
    ) -> tuple[dict[int, Bases], str, dict[int, str]]:
        """(each layer's bases, the mark of their model, what is to be told of each)."""
        if program.statistics is None:
            result.skipped("bases", "without weights they are not trained; only sizes count")
            return zeros(program, ranks), _UNTRAINED, {}
        # The weights as they are here: what passes before did to them counts.
        mark = digest_of({name: program.weights[name] for name in program.weights})[:12]
        if self.bases:
            origin = f"bases from {self.bases}"
            return taken(Path(self.bases), ranks, mark), mark, dict.fromkeys(ranks, origin)
        observer = HeadBases(output_weights(program, ranks), self.steps, self.read)
        found = program.statistics.of(program, observer)
        bases = {}
        told = {}
        for number, each in ranks.items():
            trained = found[site_of(number)]
            bases[number] = cut(trained, each)
            half, before = (float(trained[name][EIGHTHS // 2 - 1]) for name in ("error", "start"))
            told[number] = (
                f"with half of the directions {half:.2%} of the output's square is lacking, {before:.2%} "
                "before training"
            )
        return bases, mark, told


def rank_of(share: float, size: int) -> int:
    """Directions for a share of a head's channels: 1 to 7 eighths of them, which training drew."""
    return min(EIGHTHS - 1, max(1, round(share * EIGHTHS))) * size // EIGHTHS


def _token_bytes(layer: LayerCache) -> int:
    return layer.kv_heads * (layer.key_size + layer.value_size) * ITEM_BYTES["f32"]


def output_weights(
    program: Program, layers: Collection[int] | None = None
) -> dict[int, str | None]:
    """The weights that read the heads of layers, of all where none are named; None where heads are not read
    by a weight alone."""
    found: dict[int, str | None] = {}
    for node in attention_nodes(program):
        number = int(call_arguments(node)["layer"])
        if layers is None or number in layers:
            try:
                read = call_arguments(output_projection(node))["weight_NM"]
            except LostHeadsError:
                read = None
            known = read is not None and program.weight_of(read) is not None
            found[number] = str(read.target) if known else None
    return found


def _left_alone(program: Program) -> dict[int, str]:
    """Why layers keep all channels, by layer."""
    assert program.layout is not None
    reasons = {}
    for given in map(call_arguments, attention_nodes(program)):
        layer = program.layout[int(given["layer"])]
        sizes = {layer.key_size, layer.value_size}
        if layer.groups != (HeadGroup(tuple(range(layer.kv_heads)), Full(), Plain()),):
            reason = "an earlier pass decided how it is cached"
        elif readers := program.layout.readers(layer.layer):
            reason = f"its cache is read by layer {', '.join(map(str, readers))} too"
        elif given.get("by_distance_HR") is not None:
            reason = "relative positions are added to its attention"
        elif any(size % EIGHTHS for size in sizes):
            reason = f"heads of {' and '.join(map(str, sorted(sizes)))} channels have no eighths"
        else:
            continue
        reasons[layer.layer] = reason
    return reasons
