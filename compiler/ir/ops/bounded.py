"""Attention over pages of a cache that are chosen by statistics of their keys."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..kv.read.reader import Reader, parse_reader
from .attention import OverOwnSlots, Scales, halved
from .record import OPERATORS


@OPERATORS.register
@dataclass(eq=False)
class BoundedAttention(OverOwnSlots):
    """`CachedAttention` whose reader goes by statistics of pages that are kept beside the slots.

    Of each page of slots that row b uses, `bounds` [B, K, P, E] holds what `read` scores it by, of its keys
    as they are stored, int8 where the slots are: Quest's are the largest numbers in each channel and then the
    smallest. Those of the pages that the new tokens come into are found anew. Each new token reads what
    `read` chooses by them; the rest is as in `CachedAttention`.

    Gives (out [B, S, H, D], key cache, value cache, bounds).
    """

    name = "bounded_attention"
    writes = ("key_cache_BKCD", "value_cache_BKCD", "bounds_BKPE")

    q_BSHD: Tensor
    k_BSKD: Tensor
    v_BSKD: Tensor
    key_cache_BKCD: Tensor
    value_cache_BKCD: Tensor
    bounds_BKPE: Tensor
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
    read: str

    def take_in(
        self, k_BSKD: Tensor | None, v_BSKD: Tensor | None, scales_KD: Scales = (None, None)
    ) -> None:
        """Writes the new tokens into their slots, and the statistics of their pages."""
        super().take_in(k_BSKD, v_BSKD, scales_KD)
        reader, new = parse_reader(self.read), self.q_BSHD.shape[1]
        reader.choosing.refresh(reader, self.bounds_BKPE, self.key_cache_BKCD, self.used_B, new)

    def chosen(
        self, reader: Reader, q_BKGSD: Tensor, keys_BKCD: Tensor, visible_BSC: Tensor
    ) -> Tensor:
        scale_KD = self.scales[0]
        if scale_KD is not None:  # so that statistics are taken as they are stored
            q_BKGSD = q_BKGSD * scale_KD[:, None, None]
        bounds = self.bounds_BKPE.to(q_BKGSD.dtype)
        read: Tensor = reader.choosing.chosen_by(reader, q_BKGSD, bounds, visible_BSC)
        return read

    def shapes(self) -> Tensor:
        if halved(self.key_cache_BKCD):
            raise ValueError("bounds are of keys whose numbers are an element each")
        reader, given = parse_reader(self.read), int(self.bounds_BKPE.shape[3])
        wanted = reader.bound_numbers(int(self.key_cache_BKCD.shape[3]))
        if given != wanted:
            raise ValueError(f"{reader.name} keeps {wanted} numbers of a page, not {given}")
        return super().shapes()
