"""Which tokens of those that are packed matter most."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..store.mixed import Mixed
from .grouped import in_granules


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
    elif storage.per_query and seen.queries_T is not None:
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


def in_parts(
    storage: Mixed, keys_KTD: Tensor, values_KTD: Tensor, seen: Seen
) -> tuple[Tensor, Tensor]:
    """Granules [K, G, T, D] of keys and values that start with their salient tokens."""
    index = chosen_first(storage, seen, keys_KTD)[:, :, None]
    keys, values = (x.gather(1, index.expand(-1, -1, x.shape[2])) for x in (keys_KTD, values_KTD))
    return in_granules(storage, keys), in_granules(storage, values)
