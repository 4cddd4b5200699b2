"""Attention over packed tokens and slots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor

from ..kv.codes.codec import decode
from ..kv.store.packed import Packed
from ..kv.store.storage import GroupShape, read_storage
from .attention import OverSlots, visible_slots
from .record import OPERATORS


@dataclass(frozen=True)
class Partial:
    """Attention over some of the keys, not divided yet: what two parts of the keys are merged by.

    `most` [.., S, 1] is the largest logit, `total` [.., S, 1] the sum of exp(logit - most), and `values`
    [.., S, D] the sum of exp(logit - most) * value. Without a live key `most` is -inf and the sums are 0.
    """

    most: Tensor
    total: Tensor
    values: Tensor

    def merged(self, other: Partial) -> Partial:
        """The state over the keys of both; the order makes no difference but for rounding."""
        most = torch.maximum(self.most, other.most)
        mine, theirs = (_weight(part.most, most) for part in (self, other))
        return Partial(
            most,
            self.total * mine + other.total * theirs,
            self.values * mine + other.values * theirs,
        )

    def finished(self) -> Tensor:
        """values / total; zeros where there was no live key."""
        return torch.nan_to_num(self.values / self.total)

    def attention(self, sinks_H: Tensor | None) -> Tensor:
        """What an operator gives, [B, S, H, D], of a state [B, K, G, S, ..] over all keys but the sinks."""
        state = self
        if sinks_H is not None:
            sink = sinks_H.reshape(1, self.most.shape[1], -1, 1, 1).expand_as(self.most)
            state = self.merged(Partial(sink, torch.ones_like(sink), torch.zeros_like(self.values)))
        return state.finished().flatten(1, 2).transpose(1, 2).contiguous()


def partial_attention(
    q_BKGSD: Tensor,
    k_BKTD: Tensor,
    v_BKTD: Tensor,
    visible_BST: Tensor,
    scale: float,
    softcap: float,
) -> Partial:
    """The state over these keys; G query heads share a KV head. `visible` may be broadcast."""
    logits = (q_BKGSD @ k_BKTD.unsqueeze(2).mT).mul_(scale)
    if softcap:
        logits = logits.div_(softcap).tanh_().mul_(softcap)
    logits.masked_fill_(~visible_BST[:, None, None], float("-inf"))
    most = logits.amax(-1, keepdim=True)
    weights = logits.sub_(_shift(most)).exp_()
    return Partial(most, weights.sum(-1, keepdim=True), weights @ v_BKTD.unsqueeze(2))


def _weight(logits: Tensor, most: Tensor) -> Tensor:
    """exp(logits - most), and 0 for -inf also where `most` is -inf."""
    return torch.exp(logits - _shift(most))


def _shift(most: Tensor) -> Tensor:
    return torch.where(most == float("-inf"), 0.0, most)


@OPERATORS.register
@dataclass(eq=False)
class PackedAttention(OverSlots):
    """Attention of S new tokens over packed tokens and over slots.

    Row b has packed[b] tokens in `bulk`, the pieces of `storage` in their order ([B, heads, granules, rows,
    width] each), all older than the new ones, so every new token sees all of them. The slots, where the
    first tokens may stand too, are as in `CachedAttention`. The softmax goes over both, and over the sinks.

    Without k and v this is a layer that reads another's cache: the slots hold this step's tokens already.

    A few granules are decoded at a time, and their partial state is merged with that of the rest.

    Gives (out [B, S, H, D], key cache, value cache).
    """

    name = "packed_attention"
    writes = ("key_cache_BKCD", "value_cache_BKCD")

    q_BSHD: Tensor
    k_BSKD: Tensor | None
    v_BSKD: Tensor | None
    key_cache_BKCD: Tensor
    value_cache_BKCD: Tensor
    used_B: Tensor
    packed_B: Tensor
    bulk: Sequence[Tensor]
    sinks_H: Tensor | None
    positions_BS: Tensor | None
    cos_PR: Tensor | None
    sin_PR: Tensor | None
    layer: int
    scale: float
    softcap: float
    interleaved: bool
    storage: str

    def run(self) -> Tensor:
        self.take_in(self.k_BSKD, self.v_BSKD)
        query, state = partial_over_slots(self)
        return self._over_bulk(query, state).attention(self.sinks_H)

    def pieces(self) -> dict[str, Tensor]:
        """The bulk by the names that the storage gives its pieces."""
        names = piece_names(packed_storage(self.storage), self._shape())
        return dict(zip(names, self.bulk, strict=True))

    def _shape(self) -> GroupShape:
        keys, values = (cache.shape for cache in self.caches)
        return GroupShape(int(keys[1]), int(keys[3]), int(values[3]))

    def _over_bulk(self, q_BKGSD: Tensor, state: Partial) -> Partial:
        """A state merged with that over the packed tokens, a tile of granules at a time."""
        storage, pieces = packed_storage(self.storage), self.pieces()
        granules = int(self.packed_B.max()) // storage.granule
        for first, last in pairwise([*range(0, granules, storage.tile), granules]):
            tile = {name: piece[:, :, first:last] for name, piece in pieces.items()}
            keys, values = (x.flatten(2, 3) for x in decode(storage, tile))
            granule_T = torch.arange(first, last, device=keys.device)
            token_T = granule_T.repeat_interleave(storage.granule) * storage.granule
            visible_BST = (token_T < self.packed_B[:, None])[:, None]
            tiled = partial_attention(q_BKGSD, keys, values, visible_BST, self.scale, self.softcap)
            state = state.merged(tiled)
        return state

    def shapes(self) -> Tensor:
        form, shape = packed_storage(self.storage), self._shape()
        form.check(shape)
        found = [tuple(map(int, (piece.shape[1], *piece.shape[3:]))) for piece in self.bulk]
        if found != [(shape.heads, piece.rows, piece.width) for piece in form.pieces(shape)]:
            raise ValueError(f"the bulk does not hold the pieces of {self.storage}")
        return super().shapes()


def partial_over_slots(call: OverSlots) -> tuple[Tensor, Partial]:
    """Turned queries [B, K, G, S, D], and the state over the slots, the new tokens taken in."""
    q_BKGSD = call.turned_query().transpose(1, 2).unflatten(1, (call.key_cache_BKCD.shape[1], -1))
    visible_BSC = visible_slots(call.new_slots(), call.slots, 0, None)
    state = partial_attention(q_BKGSD, *call.caches, visible_BSC, call.scale, call.softcap)
    return q_BKGSD, state


@cache
def packed_storage(text: str) -> Packed:
    """The packed storage that an operator's argument names."""
    storage = read_storage(text)
    if not isinstance(storage, Packed):
        raise ValueError(f"{text} packs nothing")
    return storage


@cache
def piece_names(storage: Packed, shape: GroupShape) -> tuple[str, ...]:
    """The bulk buffers of a storage in the order in which the operator takes them."""
    return tuple(piece.name for piece in storage.pieces(shape))
