"""attach_cache: the compiler gives the model its KV cache."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import fx

from ....errors import IRError, RecipeError
from ...ir.kv.layout import (
    BOUNDS,
    PARTS,
    TOKENS,
    CacheLayout,
    HeadGroup,
    LayerCache,
    cache_name,
    granules_dim,
    packed_of,
    paged_dim,
    pages_dim,
    query_name,
    slots_dim,
)
from ...ir.ops.attention import CachedAttention
from ...ir.ops.bounded import BoundedAttention
from ...ir.ops.low_rank import LowRankAttention
from ...ir.ops.packed import PackedAttention
from ...ir.ops.record import Operator, operator_of
from ...ir.ops.shared import SharedAttention
from ...ir.program import (
    Editor,
    Program,
    attention_nodes,
    before_rotary,
    call_arguments,
    remove_dead_nodes,
)
from ...ir.types import DTYPES
from ...ir.weights import Weight
from ..base import Pass, PassResult
from . import retaining
from .look_ahead import rotary_tables, turns_ahead
from .order_channels import Orders, ordered, ordered_back
from .rotate_heads import UNTURNED, rotated, rotated_back, turned

aten = torch.ops.aten

#: Arguments of an operator by their names.
Arguments = dict[str, Any]


@dataclass(frozen=True)
class AttachCache(Pass):
    """Turns attention over the tokens of a call into attention over a cache, as the layout says.

    Before: `%o = attention(%q, %k, %v, none, layer, ..)`
    After:  `%o, %kc, %vc = cached_attention(%q, %k, %v, %cache.key, %cache.value, %used, ..)`
    New inputs: `lengths` [B], tokens that each row has seen; `slots.N` [B], slots in use, for groups that
    let tokens go; `packed.N` [B], packed tokens, for those that pack them (`packed_attention` there); the
    buffers of each head group, of which those that a step writes are outputs too. A layer whose heads are
    cached in several ways gets one call a group, over its heads, and their results are put together again.
    Groups that choose tokens by the attention they got show their queries in `query.LAYER.GROUP` [B, S,
    heads, D], such that their product with the cached keys is the logits, or as `look_ahead.py` says; or what
    trained heads say of its tokens [B, S, heads, 1] (`retaining.py`). A
    rotary embedding in front of q and k moves into the operator, so that a target may turn them while it
    writes the cache; where a storage asks for heads that are rotated (`rotate_heads.py`) or for channels in
    order (`order_channels.py`), it stays in front of that.
    A layer that reads another's cache gets

        `%o = shared_attention(%q, %kc, %vc, %used, ..)`

    over what the owner's call gives, once for each of the owner's groups. Where a reader goes by bounds of
    pages, the call is `bounded_attention`, which reads and writes these too.
    """

    name = "attach_cache"
    requires = frozenset({"cache planned"})
    ensures = frozenset({"cache attached"})

    def run(self, program: Program) -> PassResult:
        result = PassResult()
        nodes = attention_nodes(program)
        if not nodes or program.layout is None:
            result.skipped("graph", "no attention in the graph")
            return result
        attachment = Attachment(program, program.layout)
        as_turned = attachment.as_turned
        for node in nodes:
            found = call_arguments(node)
            cache = program.layout[int(found["layer"])]
            window = int(found["window"])
            owner = cache.groups[0].owner
            if owner is not None:
                attachment.attach_reader(node, cache, program.layout[owner])
                result.applied(f"layer {cache.layer}", f"reads the cache of layer {owner}")
                continue
            attachment.attach(node, cache)
            for index, group in enumerate(cache.groups):
                heads = "" if len(cache.groups) == 1 else f"heads {_listed(group.heads)}: "
                result.applied(
                    f"layer {cache.layer}",
                    f"{heads}{group.policy.name} cache in {group.describe().split()[-1]}"
                    + (f", window {window} by mask" if window else "")
                    + (
                        ", by queries as they are turned"
                        if (cache.layer, index) in as_turned
                        else ""
                    ),
                )
        present = list(program.output.args[0])  # type: ignore[arg-type]
        attachment.editor.set_output(
            present + attachment.values, program.output_names() + attachment.names
        )
        remove_dead_nodes(program)
        return result


def _listed(heads: tuple[int, ...]) -> str:
    return ",".join(map(str, heads))


class Attachment:
    """Builds the calls over the cache, and keeps the inputs and outputs that they need."""

    def __init__(self, program: Program, layout: CacheLayout) -> None:
        self.program = program
        self.layout = layout
        self.editor = Editor(program)
        self.names: list[str] = []
        self.values: list[fx.Node] = []
        self.as_turned: set[tuple[int, int]] = set()
        """Groups whose policy would think of later queries, and is shown them as they are turned."""
        self._calls: dict[tuple[int, int], fx.Node] = {}
        self._orders: dict[tuple[int, int], Orders] = {}
        self._read: dict[tuple[int, int], dict[str, fx.Node]] = {}
        self._counters = {
            name: self.editor.input(name, ["B"], torch.int64)
            for name in (TOKENS, *layout.clocks(), *layout.packs())
        }

    def attach(self, node: fx.Node, cache: LayerCache) -> None:
        """Replaces one attention."""
        given = _before_rotary(call_arguments(node), ("q_BSHD", "k_BSKD"))
        _check_distances(given, cache)
        inputs = [self._inputs(cache, index) for index in range(len(cache.groups))]
        with self.editor.before(node):
            self._tell(given, cache)
            parts = [
                self._call(cache, index, self._of_heads(given, cache, group), inputs[index])
                for index, group in enumerate(cache.groups)
            ]
            out = self._joined(parts, cache)
        self.editor.replace(node, out)

    def attach_reader(self, node: fx.Node, cache: LayerCache, owner: LayerCache) -> None:
        """Replaces the attention of a layer that reads what `owner` caches."""
        given = _before_rotary(call_arguments(node), ("q_BSHD",)) | {"k_BSKD": None, "v_BSKD": None}
        _check_distances(given, cache)
        with self.editor.before(node):
            parts = []
            for index, group in enumerate(owner.groups):
                heads = self._of_heads(given, owner, group) | {"read": cache.groups[0].reader.text}
                heads = self._arranged(owner, index, heads)
                read = self._read_call(self._calls[owner.layer, index], heads)
                parts.append(self._arranged_back(owner, index, read))
            out = self._joined(parts, owner)
        self.editor.replace(node, out)

    def _read_call(self, call: fx.Node, given: Arguments) -> fx.Node:
        """Attention over what another layer's call gives; only queries are new."""
        kind, written = operator_of(call.target), call_arguments(call)
        if kind is LowRankAttention:
            raise IRError(
                f"layer {given['layer']} cannot read another layer's cache of features and a window"
            )
        results = {user.args[1]: user for user in call.users}
        caches = {"key_cache_BKCD": results[1], "value_cache_BKCD": results[2]}
        if kind is PackedAttention:
            return self.editor.results(self._make(kind, written | given | caches))[0]
        return self._make(SharedAttention, written | given | caches)

    def _make(self, kind: type[Operator], given: Arguments) -> fx.Node:
        """A call with those of the arguments that it takes."""
        taken = {each.name for each in fields(kind)} & given.keys()
        return self.editor.make(kind, **{name: given[name] for name in taken})

    def _inputs(self, cache: LayerCache, index: int) -> dict[str, fx.Node]:
        """Inputs for the buffers of a group that a step reads, by the last part of their names."""
        clock = self.layout.clock(cache.groups[index])
        prefix = cache_name(cache.layer, index)
        found = {}
        for spec in cache.group_buffers(index, 1, 1):
            if spec.role != "host":
                dim = granules_dim(clock) if len(spec.shape) == 5 else slots_dim(clock)
                shape = ["B", spec.shape[1], dim, *spec.shape[3:]][: len(spec.shape)]
                if len(spec.shape) == 3:  # features of every token
                    shape = ["B", slots_dim(TOKENS), spec.shape[2]]
                part = spec.name.removeprefix(f"{prefix}.")
                page = cache.groups[index].reader.bounded
                if page:
                    named = pages_dim if part == BOUNDS else paged_dim
                    shape[2] = named(page, clock)
                found[part] = self.editor.input(spec.name, shape, DTYPES[spec.dtype])
        return found

    def _call(
        self, cache: LayerCache, index: int, given: Arguments, inputs: dict[str, fx.Node]
    ) -> fx.Node:
        """The call over one group's cache; gives its output [B, S, heads, D].

        The buffers that it writes become the program's outputs.
        """
        group = cache.groups[index]
        if group.policy.mixes and group.storage.slot_dtype in ("i8", "u8"):
            raise RecipeError(
                f"layer {cache.layer}: tokens that are merged are averaged, which {group.storage.text} would "
                "round each time; keep them in f32, or choose a method that evicts"
            )
        given = self._centred(self._arranged(cache, index, given), inputs["key"])
        if group.observed and not group.policy.told:
            self._show_query(cache, index, given, inputs["key"])
        kind, special = self._special(cache, index, given, inputs)
        slots = {
            "key_cache_BKCD": inputs["key"],
            "value_cache_BKCD": inputs["value"],
            "used_B": self._counters[self.layout.clock(group)],
        }
        call = self._make(kind, given | slots | special)
        self._calls[cache.layer, index] = call
        out, *updated = self.editor.results(call)
        self.values += updated
        self.names += [str(call_arguments(call)[name].target) for name in kind.writes]
        return self._arranged_back(cache, index, out)

    def _arranged(self, cache: LayerCache, index: int, given: Arguments) -> Arguments:
        """The arguments with heads as the storage of a group asks for them."""
        found = rotated(self.editor, given, cache.groups[index].storage.rotated)
        return ordered(
            self.editor, found, self._order(cache, index), cache_name(cache.layer, index)
        )

    def _arranged_back(self, cache: LayerCache, index: int, out: fx.Node) -> fx.Node:
        prefix = cache_name(cache.layer, index)
        out = ordered_back(self.editor, out, self._order(cache, index), prefix)
        return rotated_back(self.editor, out, cache.groups[index].storage.rotated)

    def _order(self, cache: LayerCache, index: int) -> Orders:
        """The orders of a group's channels, which the pass that chose the storage has found."""
        prefix, weights = cache_name(cache.layer, index), self.program.cache_weights
        if (cache.layer, index) not in self._orders:
            parts = cache.groups[index].storage.ordered
            self._orders[cache.layer, index] = {
                part: weights.pop(f"{prefix}.{part}_order") for part in parts
            }
        return self._orders[cache.layer, index]

    def _special(
        self, cache: LayerCache, index: int, given: Arguments, inputs: dict[str, fx.Node]
    ) -> tuple[type[Operator], Arguments]:
        """The operator that attends over what a group's storage holds, and what it takes beside slots."""
        group = cache.groups[index]
        if group.packed:
            return PackedAttention, self._packed(cache, index, given, inputs)
        if group.storage.windowed:
            prefix = cache_name(cache.layer, index)
            names = [f"{prefix}.{part}_basis" for part in PARTS]
            bases = [self.editor.weight(n, self.program.cache_weights.pop(n)) for n in names]
            return LowRankAttention, {
                "key_low_BCR": inputs["key_low"],
                "value_low_BCR": inputs["value_low"],
                "key_basis_RM": bases[0],
                "value_basis_RM": bases[1],
                "lengths_B": self._counters[TOKENS],
                "first": group.lead,
            }
        return BoundedAttention if group.reader.bounded else CachedAttention, {
            "bounds_BKPE": inputs.get(BOUNDS),
            "count_BK": inputs.get("count"),
            "key_scale_KD": self._scale(inputs["key"]),
            "value_scale_KD": self._scale(inputs["value"]),
            "read": group.reader.text,
        }

    def _packed(
        self, cache: LayerCache, index: int, given: Arguments, inputs: dict[str, fx.Node]
    ) -> Arguments:
        group = cache.groups[index]
        if given["window"]:
            raise IRError(
                f"layer {cache.layer} has a window of {given['window']} tokens of its own, which attention "
                "over packed tokens does not know; leave its storage plain"
            )
        self._read[cache.layer, index] = inputs
        lent = {} if group.partner is None else self._read[group.partner, index]
        pieces = group.storage.pieces(cache.shape(group))
        return {
            "packed_B": self._counters[packed_of(self.layout.clock(group))],
            "bulk": [(lent | inputs)[piece.name] for piece in pieces],
            "storage": group.storage.text,
        }

    def _show_query(self, cache: LayerCache, index: int, given: Arguments, keys: fx.Node) -> None:
        """Makes the queries a result: turned, times the softmax's scale and the scales of the keys."""
        group, name = cache.groups[index], query_name(cache.layer, index)
        of_keys = self.program.cache_weights.get(f"{keys.target}_scale")
        tables = rotary_tables(self.editor, given)
        if group.policy.ahead and tables is not None:
            shown = turns_ahead(self.editor, given, tables, group, of_keys, name)
            self.values.append(shown)
            self.names.append(name)
            return
        if group.policy.ahead:
            self.as_turned.add((cache.layer, index))
        query, factor = turned(self.editor, given, given["q_BSHD"]), given["scale"]
        if of_keys is not None:
            heads, size = int(query.meta["val"].shape[2]), int(query.meta["val"].shape[3])
            each, scale = heads // len(group.heads), float(given["scale"])
            factor = self.editor.weight(
                f"{name}_scale",
                Weight(
                    (heads, size),
                    torch.float32,
                    lambda: of_keys.load().repeat_interleave(each, 0) * scale,
                ),
            )
        self.values.append(self.editor.call(aten.mul.Tensor, query, factor))
        self.names.append(name)

    def _tell(self, given: Arguments, cache: LayerCache) -> None:
        """Makes what a layer's trained heads say of its tokens a result of each group that goes by it."""
        indices = [index for index, group in enumerate(cache.groups) if group.policy.told]
        if indices:
            groups = [cache.groups[index] for index in indices]
            self.values += retaining.told(self.editor, given, cache.layer, groups)
            self.names += [query_name(cache.layer, index) for index in indices]

    def _scale(self, cache: fx.Node) -> fx.Node | None:
        scale = self.program.cache_weights.pop(f"{cache.target}_scale", None)
        return None if scale is None else self.editor.weight(f"{cache.target}_scale", scale)

    def _centred(self, given: Arguments, keys: fx.Node) -> Arguments:
        """The arguments less what the pass that chose the storage has taken out of every key."""
        name = f"{keys.target}_centre"
        centre = self.program.cache_weights.pop(name, None)
        if centre is None:
            return given
        key = turned(self.editor, given, given["k_BSKD"])
        query = turned(self.editor, given, given["q_BSHD"])
        less = self.editor.call(aten.sub.Tensor, key, self.editor.weight(name, centre))
        return given | UNTURNED | {"q_BSHD": query, "k_BSKD": less}

    def _of_heads(self, given: Arguments, cache: LayerCache, group: HeadGroup) -> Arguments:
        """The arguments with q, k, v and sinks of a group's heads alone."""
        if len(cache.groups) == 1:
            return given
        each = int(given["q_BSHD"].meta["val"].shape[2]) // cache.kv_heads
        of_query = tuple(head * each + i for head in group.heads for i in range(each))
        axes = {"q_BSHD": 2, "k_BSKD": 2, "v_BSKD": 2, "sinks_H": 0}
        return given | {
            name: self._chosen(
                given[name], axis, group.heads if name in ("k_BSKD", "v_BSKD") else of_query
            )
            for name, axis in axes.items()
            if given[name] is not None
        }

    def _chosen(self, x: fx.Node, axis: int, heads: tuple[int, ...]) -> fx.Node:
        """Some heads of x: a slice where they stand side by side."""
        if heads == tuple(range(int(x.meta["val"].shape[axis]))):
            return x
        first, last = heads[0], heads[-1] + 1
        if heads == tuple(range(first, last)):
            return self.editor.call(aten.slice.Tensor, x, axis, first, last)
        return self.editor.call(aten.index_select.default, x, axis, self._indices(heads))

    def _joined(self, parts: list[fx.Node], cache: LayerCache) -> fx.Node:
        """The groups' outputs as one, heads in their order."""
        if len(parts) == 1:
            return parts[0]
        out = self.editor.call(aten.cat.default, parts, 2)
        each = int(out.meta["val"].shape[2]) // cache.kv_heads
        heads = [head for group in cache.groups for head in group.heads]
        if heads == sorted(heads):
            return out
        order = tuple(
            heads.index(head) * each + i for head in range(len(heads)) for i in range(each)
        )
        return self.editor.call(aten.index_select.default, out, 2, self._indices(order))

    def _indices(self, heads: tuple[int, ...]) -> fx.Node:
        name = "heads." + ".".join(map(str, heads))
        if name in self.program.weights:
            return self.editor.read(name)
        return self.editor.weight(name, Weight.of(torch.tensor(heads)))


def _check_distances(given: Arguments, cache: LayerCache) -> None:
    """A bias by distance counts slots, and is of all heads: raises RecipeError where tokens leave the slots,
    or heads go apart."""
    if given.get("by_distance_HR") is None:
        return
    group = cache.groups[0]
    plain = group.owner is None and group.storage.plain and not group.moves and group.reader.whole
    if len(cache.groups) > 1 or not plain:
        raise RecipeError(
            f"layer {cache.layer} adds relative positions to its attention, which only a cache tells "
            "apart that keeps every token of every head in plain slots: leave out cache.prune, "
            "cache.quant, cache.share and cache.read (any cache.storage will do)"
        )


def _before_rotary(given: Arguments, names: tuple[str, ...]) -> Arguments:
    """The arguments of an attention, these of them before their rotary embedding where they have the same;
    and what it takes."""
    plain, rotary = before_rotary(given, names)
    return given | plain | {name: rotary.get(name, none) for name, none in UNTURNED.items()}
