"""Choosing pages by a statistic of their keys, in torch.

Shape suffixes as in `compiler/ir/ops`, and P pages, E numbers of a page's statistic, which stand in `bounds`.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor


class Pages(Protocol):
    """What choosing goes by: the options of a `Paged`, which imports this."""

    @property
    def page(self) -> int: ...
    @property
    def share(self) -> float: ...
    @property
    def tokens(self) -> int: ...
    @property
    def always(self) -> int: ...
    @property
    def apart(self) -> int: ...
    @property
    def statistic(self) -> Any: ...


def chosen(reader: Pages, q_BKGSD: Tensor, keys_BKCD: Tensor, visible_BSC: Tensor) -> Tensor:
    """Which slots each new token reads, bool [B, K, S, C], by statistics of all pages found anew."""
    pages = -(-keys_BKCD.shape[2] // reader.page)
    slot_N = torch.arange(pages * reader.page, device=keys_BKCD.device)
    last = keys_BKCD.shape[2] - 1
    bounds = statistics_of(reader, keys_BKCD[:, :, slot_N.clamp(max=last)])
    return chosen_by(reader, q_BKGSD, bounds, visible_BSC)


def statistics_of(reader: Pages, keys_BKND: Tensor) -> Tensor:
    """Of whole pages of keys, [B, K, P, E]."""
    found: Tensor = reader.statistic.of_pages(keys_BKND.unflatten(2, (-1, reader.page)))
    return found


def refresh(
    reader: Pages, bounds_BKPE: Tensor, keys_BKCD: Tensor, used_B: Tensor, new: int
) -> None:
    """Finds anew, in place, the statistics of the pages in which row b has `new` tokens from slot used[b] on.

    Slots behind the newest count as that: what they hold from before stands for nothing.
    """
    page = reader.page
    first_B, count = used_B // page, (new + page - 2) // page + 1
    slot_BN = first_B[:, None] * page + torch.arange(count * page, device=used_B.device)
    slot_BN = slot_BN.minimum(used_B[:, None] + new - 1)
    place_BP = first_B[:, None] + torch.arange(count, device=used_B.device)
    for bounds, keys, slots, places in zip(bounds_BKPE, keys_BKCD, slot_BN, place_BP, strict=True):
        bounds[:, places] = statistics_of(reader, keys[None, :, slots])[0]


def chosen_by(reader: Pages, q_BKGSD: Tensor, bounds_BKPE: Tensor, visible_BSC: Tensor) -> Tensor:
    """Which slots each new token reads, bool [B, K, S, C], among the visible ones.

    The pages that are always read go first, then those that are most apart, then others by their score
    (`Paged`), of equal ones the older. Statistics of a page that a query sees a part of may be of all of it.
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
    parts_BKGSE = reader.statistic.asked(q_BKGSD)
    upper_BKGSP = parts_BKGSE @ bounds_BKPE[:, :, None, :pages].mT
    share_BKGSP = upper_BKGSP.masked_fill(hidden_B11SP, -torch.inf).log_softmax(-1)
    score_BKSP = share_BKGSP.amax(2)
    if reader.apart:
        far_BKSP = bounds_BKPE[:, :, None, :pages, -1].float().expand(score_BKSP.shape)
        far_BKSP = far_BKSP.masked_fill((always_BSP | ~seen_BSP)[:, None], -torch.inf)
        far_BKSP = _first(far_BKSP, torch.tensor(reader.apart)) & seen_BSP[:, None]
        score_BKSP = score_BKSP.masked_fill(far_BKSP, torch.finfo(score_BKSP.dtype).max)
    score_BKSP = score_BKSP.masked_fill(always_BSP[:, None], torch.inf)
    wanted_BS = (visible_BSC.sum(2).double() * reader.share).clamp(min=reader.tokens) / reader.page
    count_BS = wanted_BS.ceil().clamp(min=reader.always) + reader.apart
    read_BKSP = _first(score_BKSP, count_BS[:, None, :, None])
    read_BKSC = read_BKSP.repeat_interleave(reader.page, -1)[..., : visible_BSC.shape[2]]
    return read_BKSC & visible_BSC[:, None]


def _first(score_BKSP: Tensor, count: Tensor) -> Tensor:
    """Those of the highest scores, so many, of equal ones the older."""
    order_BKSP = score_BKSP.sort(dim=-1, descending=True, stable=True).indices
    rank_P = torch.arange(score_BKSP.shape[-1], device=score_BKSP.device)
    first_BKSP = (rank_P < count.to(rank_P.device)).expand(order_BKSP.shape)
    return torch.zeros_like(first_BKSP).scatter(-1, order_BKSP, first_BKSP)
