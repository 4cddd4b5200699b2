"""Choosing pages by bounds of their keys, in torch.

Shape suffixes as in `compiler/ir/ops`, and P pages, E twice the head size: a page's largest numbers, then its
smallest.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Pages(Protocol):
    """What choosing goes by: the options of `Quest`, which imports this."""

    @property
    def page(self) -> int: ...
    @property
    def share(self) -> float: ...
    @property
    def tokens(self) -> int: ...
    @property
    def spread(self) -> float: ...
    @property
    def always(self) -> int: ...


def chosen(reader: Pages, q_BKGSD: Tensor, keys_BKCD: Tensor, visible_BSC: Tensor) -> Tensor:
    """Which slots each new token reads, bool [B, K, S, C], by bounds of all pages found anew."""
    pages = -(-keys_BKCD.shape[2] // reader.page)
    slot_N = torch.arange(pages * reader.page, device=keys_BKCD.device)
    last = keys_BKCD.shape[2] - 1
    bounds = bounds_of(keys_BKCD[:, :, slot_N.clamp(max=last)], reader.page)
    return chosen_by(reader, q_BKGSD, bounds, visible_BSC)


def bounds_of(keys_BKND: Tensor, page: int) -> Tensor:
    """The largest and the smallest numbers of whole pages of keys, [B, K, P, E]."""
    paged = keys_BKND.unflatten(2, (-1, page))
    return torch.cat((paged.amax(3), paged.amin(3)), -1)


def refresh(bounds_BKPE: Tensor, keys_BKCD: Tensor, used_B: Tensor, new: int, page: int) -> None:
    """Finds anew, in place, the bounds of the pages in which row b has `new` tokens from slot used[b] on.

    Slots behind the newest count as that: what they hold from before stands for nothing.
    """
    first_B, count = used_B // page, (new + page - 2) // page + 1
    slot_BN = first_B[:, None] * page + torch.arange(count * page, device=used_B.device)
    slot_BN = slot_BN.minimum(used_B[:, None] + new - 1)
    place_BP = first_B[:, None] + torch.arange(count, device=used_B.device)
    for bounds, keys, slots, places in zip(bounds_BKPE, keys_BKCD, slot_BN, place_BP, strict=True):
        bounds[:, places] = bounds_of(keys[None, :, slots], page)[0]


def chosen_by(reader: Pages, q_BKGSD: Tensor, bounds_BKPE: Tensor, visible_BSC: Tensor) -> Tensor:
    """Which slots each new token reads, bool [B, K, S, C], among the visible ones.

    The pages that are always read go first, then others by their score (`Quest`), of equal ones the older.
    Bounds of a page that a query sees a part of may be of all of it.
    """
    pages = -(-visible_BSC.shape[2] // reader.page)
    more = pages * reader.page - visible_BSC.shape[2]
    seen_BSP = (
        torch.nn.functional.pad(visible_BSC, (0, more)).unflatten(2, (-1, reader.page)).any(3)
    )
    place_BSP = seen_BSP.cumsum(2)
    newest_BSP = place_BSP > place_BSP[:, :, -1:] - (reader.always - 1)
    always_BSP = seen_BSP & (newest_BSP | (place_BSP == 1))
    hidden_B11SP = ~seen_BSP[:, None, None]
    half, away = q_BKGSD / 2, (q_BKGSD * (reader.spread / 2)).abs()
    parts_BKGSE = torch.cat((half + away, half - away), -1)
    upper_BKGSP = parts_BKGSE @ bounds_BKPE[:, :, None, :pages].mT
    share_BKGSP = upper_BKGSP.masked_fill(hidden_B11SP, -torch.inf).log_softmax(-1)
    score_BKSP = share_BKGSP.amax(2)
    score_BKSP = score_BKSP.masked_fill(always_BSP[:, None], torch.inf)
    order_BKSP = score_BKSP.sort(dim=-1, descending=True, stable=True).indices
    wanted_BS = (visible_BSC.sum(2).double() * reader.share).clamp(min=reader.tokens) / reader.page
    count_BS = wanted_BS.ceil().clamp(min=reader.always)
    rank_P = torch.arange(pages, device=order_BKSP.device)
    first_BKSP = (rank_P < count_BS[:, :, None])[:, None].expand(order_BKSP.shape)
    read_BKSP = torch.zeros_like(first_BKSP).scatter(-1, order_BKSP, first_BKSP)
    read_BKSC = read_BKSP.repeat_interleave(reader.page, -1)[..., : visible_BSC.shape[2]]
    return read_BKSC & visible_BSC[:, None]
