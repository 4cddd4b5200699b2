"""Attention without a cache, as captured, and with one, as `attach_cache` makes it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..kv.codes.affine import narrowed
from ..kv.codes.half_bytes import as_slots, numbers
from ..kv.read.reader import Reader, parse_reader
from .record import OPERATORS, Operator
from .rotary import Rotary, turned

#: Of keys and of values: a number for each channel [K, D], or none.
Scales = tuple[Tensor | None, Tensor | None]


def masked_attention(
    q_BSHD: Tensor,
    k_BKTD: Tensor,
    v_BKTD: Tensor,
    visible: Tensor,
    sinks_H: Tensor | None,
    scale: float,
    softcap: float,
    bias_BKT: Tensor | None = None,
    bias_BHST: Tensor | None = None,
) -> Tensor:
    """softmax(cap(scale * q k^T) + bias) v over the visible keys, grouped heads, gives [B, S, H, D].

    A query that sees no key at all and has no sink gives zeros; the rest is as in `masked_logits`.
    """
    logits = masked_logits(q_BSHD, k_BKTD, visible, sinks_H, scale, softcap, bias_BKT, bias_BHST)
    return mixed(logits, v_BKTD, sinks_H is not None)


def mixed(logits: Tensor, v_BKTD: Tensor, with_sinks: bool) -> Tensor:
    """The values, weighted by the softmax of `masked_logits`, gives [B, S, H, D]."""
    batch, kv_heads, group, new, _ = logits.shape
    total = v_BKTD.shape[2]
    if with_sinks:
        weights = torch.softmax(logits, dim=-1)[..., :total]
    else:
        weights = torch.ops.aten._safe_softmax(logits, -1)
    out = weights.reshape(batch, kv_heads, group * new, total) @ v_BKTD
    return out.reshape(batch, kv_heads * group, new, -1).transpose(1, 2).contiguous()


def masked_logits(
    q_BSHD: Tensor,
    k_BKTD: Tensor,
    visible: Tensor,
    sinks_H: Tensor | None,
    scale: float,
    softcap: float,
    bias_BKT: Tensor | None = None,
    bias_BHST: Tensor | None = None,
) -> Tensor:
    """cap(scale * q k^T) + bias, [B, K, G, S, T], -inf where a key is not visible; G heads share a KV head.

    A bias is of a KV head and a key, or of a head, a query and a key; the batch of the latter may be 1.
    `softcap` c > 0 caps a logit as c * tanh(x / c) (Gemma 2, section 2). `sinks` holds a learned logit
    a head that takes part in the softmax and has no value (GPT-OSS): one more logit behind the keys'.
    `visible` is bool [B, S, T], or [B, K, S, T] with K the KV heads or 1.
    """
    batch, new, heads, _ = q_BSHD.shape
    kv_heads, total = k_BKTD.shape[1], k_BKTD.shape[2]
    group = heads // kv_heads
    q = q_BSHD.transpose(1, 2).reshape(batch, kv_heads, group * new, -1)
    logits = (q @ k_BKTD.transpose(2, 3)).reshape(batch, kv_heads, group, new, total) * scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    if bias_BKT is not None:
        logits = logits + bias_BKT[:, :, None, None]
    if bias_BHST is not None:
        logits = logits + bias_BHST.unflatten(1, (kv_heads, group))
    visible_BKST = visible if visible.ndim == 4 else visible[:, None]
    logits = logits.masked_fill(~visible_BKST[:, :, None], float("-inf"))
    if sinks_H is not None:
        sink = sinks_H.reshape(1, kv_heads, group, 1, 1).expand(batch, -1, -1, new, 1)
        logits = torch.cat((logits, sink), dim=-1)
    return logits


@OPERATORS.register
@dataclass(eq=False)
class Attention(Operator):
    """Causal self-attention over the tokens of this call; `layer` names the cache it will get.

    `window` w > 0 lets query i see keys i-w+1 .. i (the newest w, itself included); 0 is no window.
    With `by_distance` number d of head h is added to its logit of the key that stands d tokens before the
    query (T5's relative positions, section 2.1); keys farther away than the table reaches get its last.
    """

    name = "attention"
    overwrites = (("q_BSHD",),)

    q_BSHD: Tensor
    k_BSKD: Tensor
    v_BSKD: Tensor
    sinks_H: Tensor | None
    layer: int
    scale: float
    window: int
    softcap: float
    by_distance_HR: Tensor | None = None

    def run(self) -> Tensor:
        batch, new = self.q_BSHD.shape[:2]
        position = torch.arange(new, device=self.q_BSHD.device)
        visible = position[None, :] <= position[:, None]
        if self.window:
            visible = visible & (position[:, None] - position[None, :] < self.window)
        return masked_attention(
            self.q_BSHD,
            self.k_BSKD.transpose(1, 2),
            self.v_BSKD.transpose(1, 2),
            visible[None].expand(batch, -1, -1),
            self.sinks_H,
            self.scale,
            self.softcap,
            bias_BHST=distance_bias(self.by_distance_HR, position[None], new),
        )

    def shapes(self) -> Tensor:
        return self.q_BSHD.new_empty((*self.q_BSHD.shape[:-1], self.v_BSKD.shape[-1]))


class OverSlots(Operator):
    """What calls have in common that attend over the slots of a cache: they all take these arguments."""

    overwrites = (("q_BSHD",),)

    q_BSHD: Tensor
    key_cache_BKCD: Tensor
    value_cache_BKCD: Tensor
    used_B: Tensor
    sinks_H: Tensor | None
    positions_BS: Tensor | None
    cos_PR: Tensor | None
    sin_PR: Tensor | None
    layer: int
    scale: float
    softcap: float
    interleaved: bool

    @property
    def rotary(self) -> Rotary:
        return self.positions_BS, self.cos_PR, self.sin_PR, self.interleaved

    @property
    def caches(self) -> tuple[Tensor, Tensor]:
        """The slots of keys and of values."""
        return self.key_cache_BKCD, self.value_cache_BKCD

    @property
    def slots(self) -> int:
        return self.key_cache_BKCD.shape[2]

    @property
    def value_size(self) -> int:
        """Numbers of a value."""
        return numbers_of(self.value_cache_BKCD)

    def turned_query(self) -> Tensor:
        return turned(self.q_BSHD, *self.rotary)

    def new_slots(self) -> Tensor:
        """The slots [B, S] that the new tokens take."""
        return token_indices(self.used_B, self.q_BSHD.shape[1])

    def take_in(
        self, k_BSKD: Tensor | None, v_BSKD: Tensor | None, scales_KD: Scales = (None, None)
    ) -> None:
        """Rotates new keys and writes them, and values, into their slots; nothing where they are there."""
        if k_BSKD is not None and v_BSKD is not None:
            slot_BS = self.new_slots()
            write_slots(self.key_cache_BKCD, turned(k_BSKD, *self.rotary), slot_BS, scales_KD[0])
            write_slots(self.value_cache_BKCD, v_BSKD, slot_BS, scales_KD[1])

    @property
    def scales(self) -> Scales:
        """Those of the slots, where they hold codes."""
        return None, None

    def shapes(self) -> Tensor:
        if any(halved(cache) for cache in self.caches) and any(s is None for s in self.scales):
            raise ValueError("slots of two codes a byte have scales of keys and of values")
        return self.q_BSHD.new_empty((*self.q_BSHD.shape[:-1], self.value_size))


class OverPlainSlots(OverSlots):
    """What the calls have in common that read nothing but slots; these arguments they take too."""

    count_BK: Tensor | None
    key_scale_KD: Tensor | None
    value_scale_KD: Tensor | None
    window: int
    read: str
    by_distance_HR: Tensor | None = None
    """A class has it where it is among its arguments."""

    @property
    def scales(self) -> Scales:
        return self.key_scale_KD, self.value_scale_KD

    def attended(self, visible_BSC: Tensor | None = None) -> Tensor:
        """Attention over the slots as they are, the new tokens taken in; gives [B, S, H, D].

        A new token sees all slots in its window up to its own, or these, and reads what the reader chooses.
        """
        if visible_BSC is None:
            visible_BSC = self._visible()
        logits = self._logits(visible_BSC)
        values = stored(self.value_cache_BKCD, self.scales[1]).to(logits.dtype)
        return mixed(logits, values, self.sinks_H is not None)

    def sums(self) -> Tensor:
        """The log-sum-exp of the logits of every query over the slots that it sees, [B, S, H]."""
        return self._logits(self._visible()).logsumexp(-1).flatten(1, 2).transpose(1, 2)

    def _visible(self) -> Tensor:
        # A count of no tokens hides its slot by the bias; readers are told of it here.
        counts_BK = self.count_BK if self.read else None
        return visible_slots(self.new_slots(), self.slots, self.window, counts_BK)

    def chosen(
        self, reader: Reader, q_BKGSD: Tensor, keys_BKCD: Tensor, visible_BSC: Tensor
    ) -> Tensor:
        """Which slots each new token reads, bool [B, K, S, C]."""
        read: Tensor = reader.choosing.chosen(reader, q_BKGSD, keys_BKCD, visible_BSC)
        return read

    def _logits(self, visible_BSC: Tensor) -> Tensor:
        query = self.turned_query()
        keys = stored(self.key_cache_BKCD, self.scales[0]).to(query.dtype)
        visible_BKSC = visible_BSC[:, None]
        if self.read:
            q_BKGSD = query.transpose(1, 2).unflatten(1, (keys.shape[1], -1)) * self.scale
            visible_BKSC = self.chosen(parse_reader(self.read), q_BKGSD, keys, visible_BSC)
        return masked_logits(
            query,
            keys,
            visible_BKSC,
            self.sinks_H,
            self.scale,
            self.softcap,
            compensation_bias(self.count_BK, self.slots),
            distance_bias(self.by_distance_HR, self.new_slots(), self.slots),
        )


class OverOwnSlots(OverPlainSlots):
    """What the calls have in common that write the new tokens into the slots first; they take these too."""

    k_BSKD: Tensor
    v_BSKD: Tensor

    def run(self) -> Tensor:
        return self.seeing(None)

    def seeing(self, shown_BSC: Tensor | None) -> Tensor:
        """The same where each new token sees these slots, in place of all in its window up to its own."""
        self.take_in(self.k_BSKD, self.v_BSKD, self.scales)
        return self.attended(shown_BSC)


@OPERATORS.register
@dataclass(eq=False)
class CachedAttention(OverOwnSlots):
    """Attention of S new tokens over a cache of which row b uses `used[b]` slots.

    The new keys (rotated first, where tables are given) and values are written behind them; query s
    sees the cache up to slot used[b] + s, so causality goes by cache index, never by position.
    `window` counts slots in the same way as `Attention`.

    With `count`, slot 0 of KV head h stands for count[b, h] tokens: log(count) is added to its logit, and
    a count of 0 hides it.

    Caches of float16 hold rounded numbers, cut to its largest; they are attended to in the queries' type.

    With scales the caches hold int8: x is stored as clamp(round(x / scale), -128, 127), and what is
    attended to, the new tokens too, is what is stored times its scale. Or they hold uint8 [B, K, C, D / 2]:
    clamp(round(x / scale), -8, 7) + 8, two channels a byte, the even one in its low bits.

    `read` is the text of a reader, which chooses among the slots that a query sees; "" reads all of them.

    `by_distance` is as in `Attention`, its distances between slots.

    Gives (out [B, S, H, D], key cache, value cache).
    """

    name = "cached_attention"
    writes = ("key_cache_BKCD", "value_cache_BKCD")

    q_BSHD: Tensor
    k_BSKD: Tensor
    v_BSKD: Tensor
    key_cache_BKCD: Tensor
    value_cache_BKCD: Tensor
    used_B: Tensor
    count_BK: Tensor | None
    sinks_H: Tensor | None
    positions_BS: Tensor | None
    cos_PR: Tensor | None
    sin_PR: Tensor | None
    key_scale_KD: Tensor | None
    value_scale_KD: Tensor | None
    layer: int
    scale: float
    window: int
    softcap: float
    interleaved: bool
    read: str = ""
    by_distance_HR: Tensor | None = None


def token_indices(used_B: Tensor, new: int) -> Tensor:
    """Where the new tokens stand, [B, S], behind so many in each row."""
    return used_B[:, None] + torch.arange(new, device=used_B.device)


def visible_slots(slot_BS: Tensor, slots: int, window: int, count_BK: Tensor | None) -> Tensor:
    """Which slots each new token sees, bool [B, S, C]; slot 0 only where it stands for something."""
    index_C = torch.arange(slots, device=slot_BS.device)
    visible_BSC = index_C <= slot_BS[:, :, None]
    if window:
        visible_BSC = visible_BSC & (slot_BS[:, :, None] - index_C < window)
    if count_BK is not None:
        visible_BSC = visible_BSC & ((index_C > 0) | (count_BK[:, :1, None] > 0))
    return visible_BSC


def compensation_bias(count_BK: Tensor | None, slots: int) -> Tensor | None:
    """What is added to the logits of each slot, [B, K, C]: log(count) at slot 0, -inf where it is of none."""
    if count_BK is None:
        return None
    index_C = torch.arange(slots, device=count_BK.device)
    log_BK = torch.log(count_BK.clamp(min=0))
    return torch.where(index_C == 0, log_BK[:, :, None], torch.zeros((), device=count_BK.device))


def distance_bias(by_distance_HR: Tensor | None, slot_BS: Tensor, slots: int) -> Tensor | None:
    """What is added to the logits of queries at these slots, [B, H, S, C], by how far behind a key."""
    if by_distance_HR is None:
        return None
    behind_BSC = slot_BS[:, :, None] - torch.arange(slots, device=slot_BS.device)
    return by_distance_HR[:, behind_BSC.clamp(0, by_distance_HR.shape[1] - 1)].transpose(0, 1)


def stored(cache_BKCD: Tensor, scale_KD: Tensor | None) -> Tensor:
    """What the slots stand for."""
    if scale_KD is None:
        return cache_BKCD
    codes_BKCD = numbers(cache_BKCD) if halved(cache_BKCD) else cache_BKCD
    return codes_BKCD * scale_KD[:, None]


def halved(cache_BKCD: Tensor) -> bool:
    """Whether a byte of the slots holds the codes of two channels."""
    return cache_BKCD.dtype == torch.uint8


def numbers_of(cache_BKCD: Tensor) -> int:
    """Numbers of a key or a value in the slots."""
    return int(cache_BKCD.shape[-1]) * (2 if halved(cache_BKCD) else 1)


def write_slots(
    cache_BKCD: Tensor, new_BSKD: Tensor, slot_BS: Tensor, scale_KD: Tensor | None
) -> None:
    """Writes new tokens into their slots, in place."""
    slots = slot_BS[:, None, :, None].expand(-1, cache_BKCD.shape[1], -1, cache_BKCD.shape[3])
    if scale_KD is not None:
        new_BSKD = as_slots(new_BSKD / scale_KD, cache_BKCD).to(cache_BKCD.dtype)
    cache_BKCD.scatter_(2, slots, narrowed(new_BSKD, cache_BKCD.dtype).transpose(1, 2))
