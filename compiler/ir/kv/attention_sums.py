"""How much attention tokens get, in NumPy, from queries and keys alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .codes.half_bytes import numbers

Floats = npt.NDArray[np.float32]

#: Numbers of attention weights that are held at a time: 4 MB, little beside the caches that are chosen from.
_BLOCK = 1 << 20


@dataclass(frozen=True)
class Score:
    """What is added up for each token over the queries that see it: their attention or, where it is
    `counted`, one for each query that gives it less than the mean of what it sees.

    `fading` is what a query counts for once the next one has come, of what it counted for before.
    """

    fading: float = 1.0
    counted: bool = False


def attention_sums(
    q_SHD: Floats, keys_KTD: Any, first: int, weights_MS: Floats, counted: bool = False
) -> Floats:
    """Sums [K, M, T] over queries and the query heads of a KV head of the attention to each slot.

    Query s stands at slot `first` + s and sees the slots up to it. Each query counts by its weight, in
    M ways. Queries are scaled such that their product with the keys is the logit. Where it is `counted`,
    one is added for attention below the mean of the slots that the query sees, in place of the attention.
    """
    heads, total = keys_KTD.shape[:2]
    found = np.zeros((heads, len(weights_MS), total), np.float32)
    each = q_SHD.shape[1] // heads
    rows = max(1, _BLOCK // (total * q_SHD.shape[1]))
    keys_KDT = keys_KTD.astype(np.float32, copy=False).swapaxes(1, 2)
    for start in range(0, len(q_SHD), rows):
        part_SHD = q_SHD[start : start + rows]
        count = len(part_SHD)
        q_KRD = part_SHD.reshape(count, heads, each, -1).transpose(1, 2, 0, 3)
        logits = q_KRD.reshape(heads, each * count, -1) @ keys_KDT
        logits = logits.reshape(heads, each, count, total)
        place_S1 = first + start + np.arange(count)[:, None]
        hidden = np.arange(total) > place_S1
        np.copyto(logits, np.float32(-np.inf), where=hidden)
        logits -= logits.max(-1, keepdims=True)
        attention = np.exp(logits, out=logits)
        attention /= attention.sum(-1, keepdims=True)
        if counted:
            attention = ((attention < 1 / (place_S1 + 1)) & ~hidden).astype(np.float32)
        found += weights_MS[:, start : start + count] @ attention.sum(1)
    return found


def fading_sums(
    q_SHD: Floats, keys_KTD: Any, first: int, scores: Mapping[str, Score]
) -> dict[str, Floats]:
    """The sums [K, T] of each score, in which queries fade by its factor with every one behind them."""
    age = np.arange(len(q_SHD) - 1, -1, -1)
    found: dict[str, Floats] = {}
    for counted in {score.counted for score in scores.values()}:
        named = {name: each.fading for name, each in scores.items() if each.counted == counted}
        weights = np.stack([(fading**age).astype(np.float32) for fading in named.values()])
        sums_KMT = attention_sums(q_SHD, keys_KTD, first, weights, counted)
        found |= {name: sums_KMT[:, at] for at, name in enumerate(named)}
    return found


def host(x: Any) -> Any:
    """As a NumPy array; slots that hold two codes a byte as what they hold, in more bytes: ask for few."""
    array = x if isinstance(x, np.ndarray) else x.detach().cpu().numpy()
    return numbers(array) if array.dtype == np.uint8 else array


def like(x: Floats, other: Any) -> Any:
    """As an array of the kind that `other` is."""
    return x if isinstance(other, np.ndarray) else other.new_tensor(x)
