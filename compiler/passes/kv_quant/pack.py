"""One packed storage for all groups that keep every token: the methods of `[cache.quant]`."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ....errors import IRError, RecipeError
from ...ir.item_bytes import ITEM_BYTES
from ...ir.kv.layout import CacheLayout, HeadGroup, LayerCache
from ...ir.kv.store.packed import Packed
from ...ir.program import Program, own_windows
from ..base import GivenToHeads, PassResult, check_lets_go
from ..cache.order_channels import find_orders


@dataclass(frozen=True)
class PackByStorage(GivenToHeads):
    """Packs the older tokens of every group that keeps all of its tokens.

    Before: `cache 0.0 heads=0,1 .. policy=full storage=f32`
    After:  `cache 0.0 heads=0,1 .. policy=full storage=kivi(..,key_bits=2,value_bits=2,group=32,..)`
    """

    storage: Packed

    def run(self, program: Program) -> PassResult:
        return pack_groups(program, self.storage)


def pack_groups(program: Program, storage: Packed) -> PassResult:
    """Gives the storage to every group that keeps all of its tokens; says what was left alone and why.

    Raises RecipeError where a head's size does not fit the storage, or no token would ever be packed.
    """
    result = PassResult()
    if program.layout is None:
        result.skipped("graph", "no attention in the graph")
        return result
    who = f"cache.quant: {storage.name}"
    check_lets_go(program, who, storage.lead + storage.newest, storage.waiting, "packed")
    windows = own_windows(program)
    layers = [
        _packed(layer, storage, windows[layer.layer], result) for layer in program.layout.layers
    ]
    program.layout = CacheLayout(tuple(layers))
    find_orders(program, storage)
    return result


def _packed(layer: LayerCache, storage: Packed, window: int, result: PassResult) -> LayerCache:
    where = f"layer {layer.layer}"
    if window:
        result.skipped(where, f"has a sliding window of {window} tokens of its own")
        return layer
    groups = []
    for group in layer.groups:
        reason = _left_alone(group)
        heads = f"heads {','.join(map(str, group.heads))}"
        if reason:
            result.skipped(where, f"{heads} {reason}")
            groups.append(group)
            continue
        shape = layer.shape(group)
        try:
            each = storage.granule_bytes(shape) / storage.granule
        except IRError as error:
            raise RecipeError(f"cache.quant, {where}: {error}") from error
        before = shape.heads * (shape.key_size + shape.value_size) * ITEM_BYTES["f32"]
        result.applied(
            where,
            f"{heads}: {each:g} bytes a packed token, from {before}; "
            f"{storage.apart} stay as they are",
        )
        groups.append(replace(group, storage=storage))
    return replace(layer, groups=tuple(groups))


def _left_alone(group: HeadGroup) -> str:
    if group.owner is not None:
        return f"read the tokens of layer {group.owner}"
    if not group.policy.whole:
        return f"keep few tokens already, by {group.policy.name}"
    if group.packed:
        return f"are packed by {group.storage.name} already"
    return ""
