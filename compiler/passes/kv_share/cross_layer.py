"""cross_layer: some layers read the keys and values that another layer caches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from ....errors import RecipeError
from ...calibrate.layer_similarity import LayerSimilarity, read_other_layers
from ...calibrate.text import first_rows
from ...ir.kv.layout import CacheLayout, HeadGroup
from ...ir.ops import einfold_ops
from ...ir.program import Program, attention_nodes, call_arguments, remove_dead_nodes
from ..base import Pass, PassResult
from ..methods import SHARE
from .projections import narrow_projections

#: In which order pairs of layers are tried.
ORDERS = ("dissimilar", "similar")

Pair = tuple[int, int]


@SHARE.register
@dataclass(frozen=True)
class CrossLayer(Pass):
    """Has `layers` layers read another layer's cache, as KVSharer (Yang et al. 2024, algorithm 1) finds them.

    Before: `%o1 = attention(%q1, %k1, %v1, .., 1, ..)`, `cache 1.0 heads=0,1 ..`
    After:  `%o1 = attention(%q1, %k0, %v0, .., 1, ..)`, `cache 1.0 heads=0,1 .. owner=0`, and the
    projections of k1 and v1 are gone.

    Pairs of layers are ranked by the distance of their keys and values on the calibration text, the most
    `dissimilar` first, as the paper found better, or the most `similar`. One after the other, the deeper
    layer of a pair reads the other's cache; that stays so while the model's last hidden states keep a mean
    cosine similarity of `threshold` with those of the whole model, until `layers` layers share (0: a quarter
    of them). `rows` rows of `tokens` tokens each are read (the paper: 30 of 64).

    Measured on SmolLM2-135M-Instruct, where it fails: a quarter of its 30 layers sharing makes four times the
    perplexity, and nothing is recalled (0.00 and 0.00 behind 1,000 and 4,000 tokens, against 0.70 and 0.65).

    Differs from the paper: an owner never becomes a reader later, so that no chains form. Layers pair only
    where heads, sizes, sliding window and rotary tables are the same. Without weights (`estimate`) the
    deepest layers that may share are taken; they save the same bytes where as many share in the end, and
    all layers are cached alike.
    """

    layers: int = 0
    order: str = "dissimilar"
    threshold: float = 0.5
    rows: int = 8
    tokens: int = 64

    name = "cross_layer"
    requires = frozenset({"cache planned"})

    def __post_init__(self) -> None:
        if self.order not in ORDERS:
            raise RecipeError(
                f"cross_layer tries {' or '.join(ORDERS)} pairs first, not {self.order!r}"
            )
        if not -1 <= self.threshold <= 1:
            raise RecipeError(
                f"cross_layer: threshold is a cosine similarity, from -1 to 1, not {self.threshold}"
            )
        if self.layers < 0 or self.rows < 1 or self.tokens < 2:
            raise RecipeError(
                "cross_layer wants 0 or more layers, 1 or more rows, 2 or more tokens"
            )

    def run(self, program: Program) -> PassResult:
        result = PassResult()
        if program.layout is None:
            result.skipped("graph", "no attention in the graph")
            return result
        pairs = alike_pairs(program)
        wanted = self._wanted(program.layout, pairs)
        owners = self._chosen(program, pairs, wanted, result)
        read_other_layers(program, owners)
        saved = _weights_saved(program)
        program.layout = _shared_layout(program.layout, owners)
        for reader, owner in owners.items():
            cache = program.layout[reader]
            numbers = cache.kv_heads * (cache.key_size + cache.value_size)
            result.applied(
                f"layer {reader}",
                f"reads the cache of layer {owner}: {4 * numbers} bytes a token less",
                saved // len(owners),
            )
        for layer in program.layout.layers:
            if layer.layer not in owners:
                result.skipped(f"layer {layer.layer}", _reason(layer.layer, owners, pairs))
        return result

    def _wanted(self, layout: CacheLayout, pairs: Sequence[Pair]) -> int:
        readers = most_readers(pairs)
        wanted = self.layers or min(max(1, len(layout.layers) // 4), readers)
        if wanted > readers:
            raise RecipeError(
                f"cross_layer is asked to share {wanted} of {len(layout.layers)} layers, but "
                f"{readers} at most can read an earlier layer with the same heads and window"
            )
        return wanted

    def _chosen(
        self, program: Program, pairs: Sequence[Pair], wanted: int, result: PassResult
    ) -> dict[int, int]:
        if program.statistics is None:
            deepest = sorted(pairs, key=lambda p: (-p[1], p[0]))
            return search(deepest, wanted, lambda _: 1.0, 0.0)
        text = first_rows(program.statistics.text()[0], self.rows, self.tokens, self.name)
        similarity = LayerSimilarity(program, text)
        distances = similarity.distances(pairs)
        ranked = sorted(pairs, key=lambda p: distances[p], reverse=self.order == "dissimilar")
        owners = search(ranked, wanted, similarity.closeness, self.threshold)
        if owners:
            result.measured["cosine similarity of the last hidden states"] = similarity.closeness(
                owners
            )
        if len(owners) < wanted:
            result.skipped(
                "graph", f"only {len(owners)} of {wanted} layers share within {self.threshold}"
            )
        return owners


def search(
    ranked: Sequence[Pair],
    wanted: int,
    closeness: Callable[[Mapping[int, int]], float],
    threshold: float,
) -> dict[int, int]:
    """Goes through pairs (owner, reader) and keeps each that leaves the model close; reader -> owner."""
    owners: dict[int, int] = {}
    for owner, reader in ranked:
        if len(owners) == wanted:
            break
        if reader in owners or owner in owners or reader in owners.values():
            continue
        trial = {**owners, reader: owner}
        if closeness(trial) >= threshold:
            owners = trial
    return owners


def alike_pairs(program: Program) -> list[Pair]:
    """Pairs of layers (i, j), i before j, where j may read what i caches."""
    kinds = {
        int(found["layer"]): _kind(found) for found in map(call_arguments, attention_nodes(program))
    }
    assert program.layout is not None
    free = [
        layer.layer
        for layer in program.layout.layers
        if all(not group.moves and group.owner is None for group in layer.groups)
    ]
    # A layer that the model itself shares may be read by one more, but cannot become a reader.
    return [
        (i, j)
        for i, j in combinations(free, 2)
        if kinds[i] == kinds[j] and not program.layout.readers(j)
    ]


def most_readers(pairs: Sequence[Pair]) -> int:
    """How many layers can read another at most: all of each kind but one."""
    return len({reader for _, reader in pairs})


def _kind(found: Mapping[str, object]) -> tuple[object, ...]:
    """What two layers must have in common: head counts and sizes, window, rotary tables."""
    key, value = found["k_BSKD"], found["v_BSKD"]
    shapes = [tuple(map(int, part.meta["val"].shape[2:])) for part in (key, value)]  # type: ignore[attr-defined]
    rotary: tuple[object, ...] = ()
    if key.target is einfold_ops.rotary.default:  # type: ignore[attr-defined]
        _, positions, cos, sin, interleaved = key.args  # type: ignore[attr-defined]
        rotary = (positions.name, cos.target, sin.target, interleaved)
    return (*shapes, found["window"], *rotary)


def _weights_saved(program: Program) -> int:
    """Drops what no layer reads any more; gives the bytes."""
    before = program.weights.nbytes
    remove_dead_nodes(program)
    narrow_projections(program)
    remove_dead_nodes(program)
    return before - program.weights.nbytes


def _shared_layout(layout: CacheLayout, owners: Mapping[int, int]) -> CacheLayout:
    return CacheLayout(
        tuple(
            replace(
                layer, groups=(HeadGroup(tuple(range(layer.kv_heads)), owner=owners[layer.layer]),)
            )
            if layer.layer in owners
            else layer
            for layer in layout.layers
        )
    )


def _reason(layer: int, owners: Mapping[int, int], pairs: Sequence[Pair]) -> str:
    readers = [reader for reader, owner in owners.items() if owner == layer]
    if readers:
        return f"its cache is read by layer {', '.join(map(str, readers))} too"
    if not any(layer == reader for _, reader in pairs):
        return "no earlier layer has the same heads, sliding window and rotary tables"
    return "keeps its own cache"
