"""Attention over features of tokens (CSKV) as a cascade: no key and no value is ever in memory.

    t tokens by their index in the text, r features of a key, u features of a value; h pairs of channels that
    are rotated together, e channels that are not; the others as in `cascade.py`

A key is features times the head's basis, rotated at the token's index. So it is made within each tile, by a
sum over the walked rank r, in two halves that rotation mixes; the queries come in the same halves.

    lower[b, t, k, h] = low_key[b, t, r] * lower_basis[r, k, h] :: sum(r)        upper, rest likewise
    score = lower_query * (lower * cos - upper * sin) + upper_query * (upper * cos + lower * sin) + ..

Without rotation nothing stands between query and basis: their product is made once, ahead of the stream, and
the scores are its products with the features. Values are never rotated: weights times features are summed,
and the basis comes once, behind the stream. Where a token's value has more features than a tile has room for,
values are made within each tile, as keys are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, fx

from ....ir.cascade.cascade import Cascade
from ....ir.cascade.parser import parse
from ....ir.cascade.printer import FORMAT
from ....ir.cascade.verifier import verify
from ....ir.program import call_arguments
from .cascade import logit_of, softmax_of
from .kinds import type_name

#: The streamed rank: tokens by their index.
STREAM = "t"

#: The most features of values that are summed by weight, as lanes of a tile, and not made into values first.
SUMMED = 256


@dataclass(frozen=True)
class LowRankKind:
    """What the kernel over features depends on. `half` pairs of channels are rotated; as in `AttentionKind`.

    `query`, `features`, `basis` and `table` are types as kernels name them.
    """

    kv_heads: int
    group: int
    key_size: int
    value_size: int
    key_rank: int
    value_rank: int
    half: int
    scale: float
    softcap: float
    query: str
    features: str
    basis: str = "fp32"
    table: str = "fp32"

    @property
    def name(self) -> str:
        """A name for files and functions; kinds of other options may have the same."""
        parts = [f"low_rank{self.key_rank}_{self.value_rank}_h{self.kv_heads * self.group}"]
        parts += [f"kv{self.kv_heads}_d{self.key_size}"]
        return "_".join(parts + (["softcap"] if self.softcap else []))

    @property
    def key_parts(self) -> dict[str, str]:
        """The parts that a key is made in, with the rank of each; none where the query takes the basis."""
        found = {"lower": "h", "upper": "h"} if self.half else {}
        return found | ({"rest": "e"} if self.half and 2 * self.half < self.key_size else {})

    @property
    def summed(self) -> bool:
        """Whether features of values are summed by weight."""
        return self.value_rank <= SUMMED

    @property
    def sizes(self) -> dict[str, int]:
        """Sizes of the ranks that are not of a batch or of tokens."""
        found = {"k": self.kv_heads, "g": self.group, "r": self.key_rank, "u": self.value_rank}
        found |= {"h": self.half, "e": self.key_size - 2 * self.half} if self.half else {}
        return found | {"d": self.key_size, "f": self.value_size}

    @property
    def walked(self) -> tuple[str, ...]:
        """The ranks that sums within a tile run over."""
        return ("r",) if self.summed else ("r", "u")


def low_rank_kind(node: fx.Node) -> LowRankKind:
    """The kind of a `low_rank_attention` call's features.

    Raises UnsupportedError for types that kernels do not read.
    """
    found = call_arguments(node)
    layer = int(found["layer"])

    def of(name: str) -> Tensor:
        made: Tensor = found[name].meta["val"]
        return made

    keys, table = of("key_cache_BKCD"), found["cos_PR"]
    rotated = table is not None and found["positions_BS"] is not None
    kv_heads = int(keys.shape[1])
    return LowRankKind(
        kv_heads=kv_heads,
        group=int(of("q_BSHD").shape[2]) // kv_heads,
        key_size=int(keys.shape[3]),
        value_size=int(of("value_cache_BKCD").shape[3]),
        key_rank=int(of("key_low_BCR").shape[2]),
        value_rank=int(of("value_low_BCR").shape[2]),
        half=int(of("cos_PR").shape[1]) if rotated else 0,
        scale=float(found["scale"]),
        softcap=float(found["softcap"]),
        query=type_name(of("q_BSHD").dtype, layer),
        features=type_name(of("key_low_BCR").dtype, layer),
        basis=type_name(of("key_basis_RM").dtype, layer),
        table=type_name(of("cos_PR").dtype, layer) if rotated else "fp32",
    )


def low_rank_cascade(kind: LowRankKind) -> Cascade:
    """The cascade of a kind."""
    inputs = [
        f"input {name}[{', '.join(ranks)}]" + (" : integer" if name in ("begin", "end") else "")
        for name, ranks in inputs_of(kind).items()
    ]
    used = {rank for ranks in inputs_of(kind).values() for rank in ranks}
    lines = [
        FORMAT,
        *("rank b : B", "rank s : S", "rank t : T"),
        *(f"rank {rank} : {size}" for rank, size in kind.sizes.items() if rank in used),
        *inputs,
        *_statements(kind),
        *("output out", "output lse"),
    ]
    cascade = parse("\n".join(lines))
    verify(cascade)
    return cascade


def inputs_of(kind: LowRankKind) -> dict[str, tuple[str, ...]]:
    """The inputs with their ranks. Tokens from `begin` to before `end` are in no slot."""
    found: dict[str, tuple[str, ...]] = {}
    for name, rank in (kind.key_parts or {"whole": "d"}).items():
        found[f"{name}_query"] = ("b", "s", "k", "g", rank)
        found[f"{name}_basis"] = ("r", "k", rank)
    if kind.half:
        found |= {"cos": ("t", "h"), "sin": ("t", "h")}
    found |= {"low_key": ("b", "t", "r"), "low_value": ("b", "t", "u")}
    return found | {"value_basis": ("u", "k", "f"), "begin": ("b",), "end": ("b",)}


def _statements(kind: LowRankKind) -> Iterator[str]:
    made, score = _score(kind)
    yield from made
    seen = "pos(t) >= begin[b] & pos(t) < end[b]"
    yield f"logit[b, s, k, g, t] = where({seen}, {logit_of(score, kind.scale, kind.softcap)}, -inf)"
    yield from softmax_of(STREAM)
    if kind.summed:
        yield (
            "mix[b, s, k, g, u] = power[b, s, k, g, t] / total[b, s, k, g] * low_value[b, t, u] :: sum(t)"
        )
        yield "out[b, s, k, g, f] = mix[b, s, k, g, u] * value_basis[u, k, f] :: sum(u)"
    else:
        yield "word[b, t, k, f] = low_value[b, t, u] * value_basis[u, k, f] :: sum(u)"
        yield "out[b, s, k, g, f] = power[b, s, k, g, t] / total[b, s, k, g] * word[b, t, k, f] :: sum(t)"
    yield "lse[b, s, k, g] = log(total[b, s, k, g]) + top[b, s, k, g]"


def _score(kind: LowRankKind) -> tuple[list[str], str]:
    """The statements that give the products of queries and keys, and these as an expression."""
    if not kind.half:
        made = [
            "absorbed[b, s, k, g, r] = whole_query[b, s, k, g, d] * whole_basis[r, k, d] :: sum(d)",
            "score[b, s, k, g, t] = absorbed[b, s, k, g, r] * low_key[b, t, r] :: sum(r)",
        ]
        return made, "score[b, s, k, g, t]"
    parts = kind.key_parts
    made = [
        f"{name}[b, t, k, {rank}] = low_key[b, t, r] * {name}_basis[r, k, {rank}] :: sum(r)"
        for name, rank in parts.items()
    ]
    lower, upper, cos, sin = "lower[b, t, k, h]", "upper[b, t, k, h]", "cos[t, h]", "sin[t, h]"
    turned = {
        "lower": f"({lower} * {cos} - {upper} * {sin})",
        "upper": f"({upper} * {cos} + {lower} * {sin})",
        "rest": "rest[b, t, k, e]",
    }
    for name, rank in parts.items():
        query = f"{name}_query[b, s, k, g, {rank}]"
        made.append(f"{name}_score[b, s, k, g, t] = {query} * {turned[name]} :: sum({rank})")
    return made, f"({' + '.join(f'{name}_score[b, s, k, g, t]' for name in parts)})"


def low_rank_types(kind: LowRankKind) -> dict[str, str]:
    """The storage types of the inputs."""
    kinds = {"query": kind.query, "basis": kind.basis, "low": kind.features}
    kinds |= {"cos": kind.table, "sin": kind.table, "begin": "i32", "end": "i32"}
    return {
        name: kinds.get(name) or kinds.get(name.rpartition("_")[2]) or kinds[name.partition("_")[0]]
        for name in inputs_of(kind)
    }


def parts_of(kind: LowRankKind, x_D: Tensor, interleaved: bool) -> dict[str, Tensor]:
    """Views of a tensor whose last dimension is the channels of a key, as a key is cut into parts."""
    if not kind.half:
        return {"whole": x_D}
    if interleaved:
        cuts = [x_D[..., at : 2 * kind.half : 2] for at in (0, 1)]
    else:
        cuts = [x_D[..., : kind.half], x_D[..., kind.half : 2 * kind.half]]
    cuts.append(x_D[..., 2 * kind.half :])
    return dict(zip(kind.key_parts, cuts, strict=False))
