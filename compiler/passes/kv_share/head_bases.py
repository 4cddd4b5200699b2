"""Attention over the first directions of bases of its heads, and what bases an artifact has.

    q, k, v -> q U, k U, (v - m) V        o -> o V' + m

U and V are [D, rank], one of each KV head, for q and o that of the KV head that they go with; m is the mean
of a head's values. Where weights of attention do not sum to 1, beside learned sinks, m is 0. What keys have
in common needs no such care: it adds as much to all logits of a query.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, fx

from ....errors import RecipeError
from ...ir.ops import einfold_ops
from ...ir.program import Editor, Program, attention_nodes, call_arguments
from ...ir.weights import Weight
from ..from_artifact import weights_of

aten = torch.ops.aten

#: What is known of a layer's heads: `key` [K, D, rank], `value` [K, E, rank] and `mean` [K, E].
Bases = Mapping[str, Tensor]

#: The names of these in an artifact, behind `cache.LAYER.` and before the mark of the model.
_NAMES = {"key": "key_basis", "value": "value_basis", "mean": "value_mean"}


def name_of(layer: int, what: str, mark: str) -> str:
    """`cache.0.key_basis.MARK`."""
    return f"cache.{layer}.{what}.{mark}"


def project(program: Program, node: fx.Node, bases: Bases, mark: str) -> None:
    """Has an attention run over as many directions as its bases have."""
    editor, given = Editor(program), call_arguments(node)
    layer, kind = int(given["layer"]), given["q_BSHD"].meta["val"].dtype
    basis_KDR, basis_KER, mean_KE = (bases[part].to(kind) for part in _NAMES)
    heads, kv_heads = (int(given[name].meta["val"].shape[2]) for name in ("q_BSHD", "k_BSKD"))
    key, value, mean = (Weight.of(x.contiguous()) for x in (basis_KDR, basis_KER, mean_KE))
    query, output, added = (
        Weight.of(x.repeat_interleave(heads // kv_heads, 0).contiguous())
        for x in (basis_KDR, basis_KER.mT, mean_KE)
    )

    def read(what: str, weight: Weight) -> fx.Node:
        return editor.weight(name_of(layer, what, mark), weight)

    with editor.before(node):
        q_BSHR = _times(editor, given["q_BSHD"], read("query_basis", query))
        k_BSKR = _times(editor, given["k_BSKD"], read(_NAMES["key"], key))
        less = editor.call(aten.sub.Tensor, given["v_BSKD"], read(_NAMES["mean"], mean))
        v_BSKR = _times(editor, less, read(_NAMES["value"], value))
        out = editor.call(einfold_ops.attention.default, q_BSHR, k_BSKR, v_BSKR, *node.args[3:])
        back = _times(editor, out, read("output_basis", output))
        back = editor.call(aten.add.Tensor, back, read("output_mean", added))
    editor.replace(node, back)


def _times(editor: Editor, x_BSHD: fx.Node, basis_HDR: fx.Node) -> fx.Node:
    """x of each head times its matrix."""
    x_BHSD = editor.call(aten.transpose.int, x_BSHD, 1, 2)
    turned = editor.call(aten.matmul.default, x_BHSD, basis_HDR)
    return editor.call(aten.transpose.int, turned, 1, 2)


def taken(artifact: Path, ranks: Mapping[int, tuple[int, int]], mark: str) -> dict[int, Bases]:
    """The first so many directions of each layer's bases in an artifact. Raises RecipeError where they are of
    another model, or too few."""
    where = f"cache.share: the bases of {artifact}"
    with weights_of(artifact, where) as held:
        known = {*held.keys()}
        marks = {name.split(".key_basis.")[1] for name in known if ".key_basis." in name}
        if not marks:
            raise RecipeError(
                f"{where} cannot be taken, for it has none; name an artifact that was compiled with --share "
                "matryoshka_kv, or leave out bases, and they are trained"
            )
        if marks != {mark}:
            raise RecipeError(
                f"{where} were trained for another model ({', '.join(sorted(marks))}; this one is {mark}): "
                "leave out bases, and they are trained for this one"
            )
        found = {}
        for number, wanted in ranks.items():
            names = {part: name_of(number, what, mark) for part, what in _NAMES.items()}
            if not known.issuperset(names.values()):
                raise RecipeError(
                    f"{where} leave out layer {number}: leave out bases, and they are trained"
                )
            bases = {part: held.get_tensor(name) for part, name in names.items()}
            for part, rank in zip(("key", "value"), wanted, strict=True):
                there = bases[part].shape[-1]
                if there < rank:
                    raise RecipeError(
                        f"{where} have {there} directions of the {part}s of layer {number}, fewer than the "
                        f"{rank} that are to be kept: keep fewer, or leave out bases, and they are trained"
                    )
            found[number] = cut(bases, wanted)
    return found


def cut(bases: Bases, ranks: tuple[int, int]) -> Bases:
    """The first so many directions of keys and of values."""
    key, value = ranks
    return {
        "key": bases["key"][..., :key],
        "value": bases["value"][..., :value],
        "mean": bases["mean"],
    }


def zeros(program: Program, ranks: Mapping[int, tuple[int, int]]) -> dict[int, Bases]:
    """Bases of the sizes that there would be."""
    found = {}
    for given in map(call_arguments, attention_nodes(program)):
        number = int(given["layer"])
        if number in ranks:
            sizes = [given[name].meta["val"].shape[2:] for name in ("k_BSKD", "v_BSKD")]
            (kv_heads, key), (_, value) = (map(int, size) for size in sizes)
            whole = {
                "key": torch.zeros(kv_heads, key, key),
                "value": torch.zeros(kv_heads, value, value),
                "mean": torch.zeros(kv_heads, value),
            }
            found[number] = cut(whole, ranks[number])
    return found
