"""Which tokens of those that are packed matter most."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..cache.mixed import Mixed, ZipCache

#: Queries whose attention is taken at a time, so that scores cost little memory.
QUERIES = 64


@dataclass(frozen=True)
class Seen:
    """What is known of how tokens were attended to, where a storage asks for it."""

    score_KT: Tensor | None = None
    """The attention that each token got, summed over queries."""
    queries_T: Tensor | None = None
    """How many queries could see each token."""
    query_max_KD: Tensor | None = None
    """The largest magnitude of each channel of the queries."""


def chosen_first(storage: Mixed, seen: Seen, tokens_KTD: Tensor) -> Tensor:
    """An order [K, T] of whole granules' tokens in which each granule starts with its salient ones.

    The tokens with the highest scores of all are salient, `salient` a granule: accumulated scores for MiKV
    (its section 3.1 takes H2O's policy), for ZipCache their mean over the queries that could see the
    token (section 4.2, equation 8). Without scores the newest are.
    """
    heads, total = tokens_KTD.shape[:2]
    if seen.score_KT is None:
        score_KT = torch.arange(float(total)).expand(heads, -1)
    elif isinstance(storage, ZipCache) and seen.queries_T is not None:
        score_KT = seen.score_KT / seen.queries_T
    else:
        score_KT = seen.score_KT
    granules = total // storage.granule
    top = score_KT.topk(granules * storage.salient, dim=1).indices
    salient = torch.zeros(heads, total, dtype=torch.bool, device=top.device).scatter(1, top, True)
    # A stable sort keeps each part in the order of time, so that neighbours share their scales.
    by_part = torch.argsort((~salient).to(torch.uint8), dim=1, stable=True)
    sizes = (storage.salient, storage.granule - storage.salient)
    parts = by_part.split([granules * size for size in sizes], dim=1)
    cut = [part.unflatten(1, (granules, size)) for part, size in zip(parts, sizes, strict=True)]
    return torch.cat(cut, dim=2).flatten(1).to(tokens_KTD.device)


def attention_scores(q_BSHD: Tensor, keys_BKCD: Tensor, used_B: Tensor, sizes_B: Tensor) -> Tensor:
    """The attention that each slot gets from a step's queries, summed over these and over a KV head's query
    heads, [B, K, C].

    The first sizes[b] of row b's queries (scaled already) are real, and query s sees the slots up to
    used[b] + s. The softmax goes over slots only: against packed tokens, where there are any, no score is
    kept, and a factor that all slots share changes no order much.
    """
    kv_heads, slots = keys_BKCD.shape[1:3]
    index_C = torch.arange(slots, device=keys_BKCD.device)
    total = keys_BKCD.new_zeros(*keys_BKCD.shape[:3], dtype=torch.float32)
    for first in range(0, q_BSHD.shape[1], QUERIES):
        part = q_BSHD[:, first : first + QUERIES]
        place_S = torch.arange(first, first + part.shape[1])
        last_BS = (used_B[:, None] + place_S).to(keys_BKCD.device)
        real_BS = (place_S < sizes_B[:, None]).to(keys_BKCD.device)
        q = part.transpose(1, 2).unflatten(1, (kv_heads, -1)).float()
        logits = q @ keys_BKCD.float().unsqueeze(2).mT
        hidden = index_C > last_BS[:, :, None]
        weights = torch.softmax(logits.masked_fill(hidden[:, None, None], float("-inf")), dim=-1)
        total += (weights * real_BS[:, None, None, :, None]).sum((2, 3))
    return total
